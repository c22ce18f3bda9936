"""A step's batch in shares: one for each process and, with accumulation, for each part of a step.

The batch of a step is a pure function of (seed, step), so every process draws the whole of it, which
costs a few random numbers, and lays out its own share only. A loss is a mean over targets of the
whole batch. A share therefore divides its sum by the whole batch's count, which everyone knows
without asking: then losses, numbers and gradients of the shares add up to those of the batch, even
where shares hold different numbers of targets.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Which part of a step's batch a call sees; by default all of it.

    Attributes:
        rank, world: the process, and how many there are.
        part, parts: the part of the process's share that goes through the model at once.
    """

    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1

    @property
    def of(self) -> int:
        """How many shares there are."""
        return self.world * self.parts

    @property
    def whole(self) -> bool:
        """Is it the whole batch?"""
        return self.of == 1

    @property
    def process(self) -> Share:
        """The share of the process, all parts together."""
        return Share(self.rank, self.world)

    def places(self, count: int, what: str = "batch") -> range:
        """The places that this share holds of ``count`` samples, which lie together.

        Raises:
            ValueError: samples that cannot be shared out evenly.
        """
        if count % self.of:
            raise ValueError(
                f"{what} = {count} cannot be shared out evenly over {self.world} processes of "
                f"{self.parts} parts each; make it a multiple of {self.of}"
            )
        each = count // self.of
        first = (self.rank * self.parts + self.part) * each
        return range(first, first + each)

    def within(self, count: int) -> range:
        """Of the ``count`` samples of its process's share, those of this part."""
        each = count // self.parts
        return range(self.part * each, (self.part + 1) * each)


WHOLE = Share()
