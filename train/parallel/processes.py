"""How many processes a run has, and what they do together: here one, which does all of it.

The loop asks this class, and only it, how a batch is shared out, how what the processes found is
added up, and who writes files. Runs of several processes override it.
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
from echogen.train.stages.stage import Stage

T = TypeVar("T")


@dataclass
class Trained:
    """What a step changes, and a checkpoint holds.

    Attributes:
        module: of the stage.
        optimizers: of its parameters.
        average: of its weights, where the run keeps one.
    """

    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: Average | None

    def state(self) -> dict[str, Any]:
        """As tensors, numbers and strings."""
        held = {
            "module": self.module.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        return held if self.average is None else held | {"average": self.average.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average is not None:
            self.average.load(state["average"])

    def template(self, name: str) -> Tensor | None:
        """What a tensor of a state becomes (see `shard_state`): the weight that it is of, or that
        it is kept for."""
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
    """One process. Every method but ``shares`` is called by all processes at the same moments."""

    rank = 0
    count = 1

    @property
    def writes(self) -> bool:
        """Whether this one writes files (of the run's folder) and speaks to the console."""
        return self.rank == 0

    def prepare(self, stage: Stage) -> None:
        """Before optimizers are built: shard or replicate the weights."""

    def run(self, work: Callable[[], T]) -> T:
        """A part's loss, with what it needs of the weights."""
        return work()

    def on_first(self, stage: Stage, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, where alone it is done."""
        return work()

    def shares(self, accumulate: int) -> list[tuple[int, int]]:
        """The (part, parts) of a step's batch that this process takes, one after another."""
        parts = accumulate * self.count
        return [(part, parts) for part in range(self.rank, parts, self.count)]

    def total(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """A step's numbers, added up over the processes."""
        return numbers

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """Scale the gradients, which are those of the whole batch, to a norm of at most ``limit``;
        their norm before."""
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def gathered(self, held: dict[str, Any]) -> dict[str, Any]:
        """What any process holds by a name, of tensors in containers, for a file; what processes
        get that do not write is not used."""
        return held

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return here

    def save(self, path: Path, head: dict[str, Any], trained: Trained) -> None:
        """Write a checkpoint: ``head`` (which run, which step) and what was trained. It may still
        be under way behind this, until `settle`."""
        if path.is_dir() or previous(path).is_dir():  # of a run of several processes
            from echogen.train.parallel.shard_state import set_aside

            set_aside(path)
        save_state(path, {**head, **trained.state()}, keep_previous=True)

    def settle(self) -> None:
        """Wait until all that was written is on the disk. Raises StateError where it cannot be."""

    def settle_alone(self) -> None:
        """`settle` in a process that ends with an error, which the others may not have: they are
        not waited for."""

    def load(self, path: Path, trained: Trained) -> dict[str, Any]:
        """What `save` wrote, in however many processes: the head, and what `Trained.load` takes."""
        if path.is_dir() or previous(path).is_dir():
            from echogen.train.parallel.shard_state import read

            return read(path, trained.template, None)
        return load_state(path, or_previous=True)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's weights, whole, for a file that any number of processes can read; what
        processes get that do not write is not used."""
        return module.state_dict()

    def put_weights(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """Put whole weights, as `weights` gives them, into the module."""
        module.load_state_dict(weights)
