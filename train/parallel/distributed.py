"""Runs of several processes, on as many GPUs and machines as torchrun starts them on.

Each process takes its part of a step's batch (`shares`), and the results are added up: the
gradients in `replicated` and `sharded`, the numbers here. Validation, samples and the exported
model are made by the first process, for which the others wait: they are short compared with the
steps between them, and if they were split, the numbers would depend on the number of processes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from echogen.train.config import LoopConfig
from echogen.train.parallel.processes import Processes, Trained
from echogen.train.parallel.whole import like
from echogen.train.run.checkpoint import StateError
from echogen.train.stages.stage import BeginRefused, Stage, TrainingError

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long processes wait for what one of them does alone; torchrun notices a dead one."""
LAST_WRITE = 60.0
"""Seconds that a process with an error waits for the pending checkpoint; only then does it exit,
and torchrun notices."""


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return _environment("WORLD_SIZE", 1)


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise BeginRefused(f"{name} = {value!r} in the environment; start with torchrun")
    return int(value)


def connect() -> None:
    """Join the processes that torchrun has started, once. Raises BeginRefused."""
    if dist.is_initialized():
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise BeginRefused(
            f"WORLD_SIZE = {world_size()}, but the environment has no {', '.join(missing)}; start "
            f"with torchrun, or unset WORLD_SIZE"
        )
    # Both backends: what is on the CPU (numbers to log, checkpoints) goes over gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


@cache
def patient_group() -> dist.ProcessGroup:
    """The group of all processes, on the CPU, for barriers and messages."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def one_goes_first() -> Iterator[None]:
    """On each machine one process runs the block before the others: it makes what is missing in a
    cache, and they read it."""
    if world_size() == 1:
        yield
        return
    connect()
    first = _environment("LOCAL_RANK", 0) == 0
    if not first:
        dist.barrier(patient_group())
    yield
    if first:
        dist.barrier(patient_group())


def told_by_first(find: Callable[[], T]) -> T:
    """Run ``find`` in the first process, and return its result in all of them."""
    if world_size() == 1:
        return find()
    connect()
    told: list[Any] = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, 0, group=patient_group())
    found: T = told[0]
    return found


def start(config: LoopConfig) -> Processes:
    """The processes of a run, according to ``config.parallel`` and the environment.

    Raises:
        BeginRefused: the two do not fit together.
    """
    kind, count = config.parallel, world_size()
    if kind == "auto":
        kind = "none" if count == 1 else "ddp"
    if kind == "none" and count > 1:
        raise BeginRefused(
            f"parallel = 'none', but torchrun has started {count} processes; set it to 'ddp' or "
            f"'fsdp', or start one"
        )
    if kind == "none":
        return Processes()
    if count == 1:
        raise BeginRefused(
            f"parallel = {kind!r} with one process; start several (torchrun --nproc-per-node 2 -m "
            f"echogen.train …), or set it to 'none'"
        )
    connect()
    if kind == "ddp":
        from echogen.train.parallel.replicated import Replicated

        return Replicated(config)
    from echogen.train.parallel.sharded import Sharded

    return Sharded(config)


class Several(Processes):
    """What runs of several processes have in common, however the weights are stored.

    There are two process groups besides the default one: `patient_group`, and one for checkpoints,
    which are written in a thread.
    """

    def __init__(self, config: LoopConfig) -> None:
        from echogen.train.parallel.shard_state import Saver

        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._config = config
        self._side = patient_group()
        self._saver = Saver(dist.new_group(backend="gloo"))

    def prepare(self, stage: Stage) -> None:
        """Give all processes the first one's weights."""
        super().prepare(stage)
        with torch.no_grad():
            for tensor in [*stage.module.parameters(), *stage.module.buffers()]:
                dist.broadcast(tensor, 0)

    def total(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """See `Processes`. Numbers on a device stay there, so that nothing waits for them."""
        names = sorted(numbers)
        tensors = [v for v in numbers.values() if isinstance(v, Tensor)]
        if tensors:
            device = tensors[0].device
            row = torch.stack([torch.as_tensor(numbers[n], device=device).float() for n in names])
            dist.all_reduce(row)
            return dict(zip(names, row, strict=True))
        row = torch.tensor([numbers[n] for n in names], dtype=torch.float64)
        dist.all_reduce(row, group=self._side)
        added = dict(zip(names, row.tolist(), strict=True))
        return {n: added[n] for n in numbers}

    def gathered(self, held: dict[str, Any]) -> dict[str, Any]:
        """See `Processes`."""
        told = io.BytesIO()
        torch.save(held, told)
        every: list[Any] = [b""] * self.count
        dist.gather_object(told.getvalue(), every if self.rank == 0 else None, 0, self._side)
        found: dict[str, Any] = {}
        for data in filter(None, every):  # not onto the senders' devices
            found |= torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return found

    def any(self, here: bool) -> bool:
        """See `Processes`."""
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._side)
        return bool(flag)

    def on_first(self, stage: Stage, work: Callable[[], T]) -> T:
        """See `Processes`; an error there is raised in all processes."""
        self.assemble(stage)
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except Exception as error:
                known = isinstance(error, (TrainingError, StateError))
                told[1] = (type(error), str(error)) if known else (TrainingError, repr(error))
                dist.broadcast_object_list(told, 0, group=self._side)
                raise
        dist.broadcast_object_list(told, 0, group=self._side)
        if told[1] is not None:
            kind, message = told[1]
            raise kind(message)
        result: T = told[0]
        return result

    def assemble(self, stage: Stage) -> None:
        """Do what needs all processes before the first one works alone."""

    def save(self, path: Path, head: dict[str, Any], trained: Trained) -> None:
        """See `Processes`: every process writes its shards, in the background."""
        self._saver.save(path, {**head, **trained.state()})

    def settle(self) -> None:
        """See `Processes`."""
        self._saver.settle()
        dist.barrier(self._side)  # what only the first process writes is there too

    def settle_alone(self) -> None:
        """See `Processes`. There is no barrier: in one, a process with an error of its own would
        wait for others that wait for it in a step, and torchrun, which ends all processes as soon
        as one ends, would wait for both."""
        self._saver.settle(LAST_WRITE)

    def load(self, path: Path, trained: Trained) -> dict[str, Any]:
        """See `Processes`."""
        from echogen.train.parallel.shard_state import read

        state = read(path, trained.template, self._side)
        dist.barrier(self._side)  # all have read it before anything is moved
        return state

    def put_weights(self, module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
        """See `Processes`."""
        now = module.state_dict()
        placed = {name: like(w, now.get(name)) for name, w in weights.items()}
        super().put_weights(module, placed, what)
