"""What the processes of a run do together; here for a run of one process.

Only this class decides how a batch is split, how the processes' results are added up, and which
process writes files. Runs of several processes override it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from echogen.train.run.average import Average
from echogen.train.run.checkpoint import load_state, previous, save_state
from echogen.train.run.weights import given_by_start, put_weights
from echogen.train.stages.stage import Stage

T = TypeVar("T")


@dataclass
class Trained:
    """What a step changes and a checkpoint stores.

    Attributes:
        module: of the stage.
        optimizers: of its parameters.
        average: of its weights, where the run keeps one.
        given: names of the weights that are left out (see `given_by_start`).
    """

    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: Average | None
    given: frozenset[str] = frozenset()

    def state(self) -> dict[str, Any]:
        """The state as tensors, numbers and strings."""
        weights = self.module.state_dict()
        held = {
            "module": {name: w for name, w in weights.items() if name not in self.given},
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        return held if self.average is None else held | {"average": self.average.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state. Raises StateError if its weights are not those of the module."""
        put_weights(self.module, state["module"], self.given, "the run's state")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average is not None:
            self.average.load(state["average"])

    def template(self, name: str) -> Tensor | None:
        """The template of a tensor of a state (see `shard_state`): the weight that it holds or
        belongs to."""
        kind, *path = name.split("/")
        if kind == "optimizers":  # optimizers/#i/state/%j/what
            groups = self.optimizers[int(path[0][1:])].param_groups
            every = [p for group in groups for p in group["params"]]
            found: Tensor = every[int(path[2][1:])]
            return found
        if kind == "average" and self.average is not None:
            return self.average.state().get(path[0])
        return self.module.state_dict().get(path[0])


class Processes:
    """One process. Every method but ``shares`` and ``settle_alone`` is called by all processes
    together."""

    rank = 0
    count = 1
    given: frozenset[str] = frozenset()
    """Names of the weights that files leave out, known once the stage is prepared (see
    `given_by_start`)."""

    @property
    def writes(self) -> bool:
        """Whether this process writes files (in the run's folder) and prints to the console."""
        return self.rank == 0

    def prepare(self, stage: Stage) -> None:
        """Shard or replicate the weights; called before optimizers are built."""
        self.given = given_by_start(stage)

    def run(self, work: Callable[[], T]) -> T:
        """Compute a part's loss by ``work``, with the weights that it needs."""
        return work()

    def on_first(self, stage: Stage, work: Callable[[], T]) -> T:
        """The result of ``work``, which runs in the first process alone."""
        return work()

    def shares(self, accumulate: int) -> list[tuple[int, int]]:
        """The (part, parts) of a step's batch that this process takes, one after another."""
        parts = accumulate * self.count
        return [(part, parts) for part in range(self.rank, parts, self.count)]

    def total(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """A step's numbers, added up over the processes."""
        return numbers

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """Scale the gradients of the whole batch to a norm of at most ``limit``; return their norm
        before."""
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def gathered(self, held: dict[str, Any]) -> dict[str, Any]:
        """Merge what each process holds by name (tensors in containers) for a file; only the result
        in the process that writes is used."""
        return held

    def any(self, here: bool) -> bool:
        """Whether ``here`` is true in any process."""
        return here

    def save(self, path: Path, head: dict[str, Any], trained: Trained) -> None:
        """Write a checkpoint: ``head`` (which run, which step) and what was trained. Writing may
        continue after the call, until `settle`."""
        if path.is_dir() or previous(path).is_dir():  # of a run of several processes
            from echogen.train.parallel.shard_state import set_aside

            set_aside(path)
        save_state(path, {**head, **trained.state()}, keep_previous=True)

    def settle(self) -> None:
        """Wait until everything written is on the disk. Raises StateError if it cannot be
        written."""

    def settle_alone(self) -> None:
        """`settle` in a process that ends with an error. The others may not have it, so there is no
        waiting for them."""

    def load(self, path: Path, trained: Trained) -> dict[str, Any]:
        """Read what `save` wrote in any number of processes: the head, and the state for
        `Trained.load`."""
        if path.is_dir() or previous(path).is_dir():
            from echogen.train.parallel.shard_state import read

            return read(path, trained.template, None)
        return load_state(path, or_previous=True)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's weights, whole, without ``given`` ones, for a file that any number of
        processes can read; only the result in the process that writes is used."""
        return {n: w for n, w in module.state_dict().items() if n not in self.given}

    def put_weights(self, module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
        """Put whole weights, as `weights` gives them, into the module. Raises StateError, which
        names the file ``what``, if they are not the module's."""
        put_weights(module, weights, self.given, what)
