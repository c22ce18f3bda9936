"""A step's batch in parts: one for each process and, with accumulation, for each turn of a process.

The batch of a step is a pure function of (seed, step), so every process draws the whole of it,
which costs a few random numbers, and lays out its own part only. A loss is a mean over targets of
the whole batch. So a part divides its sum by the whole batch's count, which every process knows
without asking: then losses, numbers and gradients of the parts add up to those of the batch, even
where parts hold different numbers of targets.
"""

from __future__ import annotations

from torch import Tensor


def places(what: str, count: int, part: int, parts: int) -> range:
    """The places in a batch of ``count`` samples that a part holds: every ``parts``-th one.

    Raises:
        ValueError: samples that cannot be shared out evenly; ``what`` names their setting.
    """
    if count % parts:
        raise ValueError(
            f"{what} = {count} cannot be shared out evenly over {parts} parts (processes × "
            f"accumulate); make it a multiple of {parts}"
        )
    return range(part, count, parts)


def part_of_mean(mean: Tensor, count: int, total: int | None) -> Tensor:
    """A mean over ``count`` things of a part → what it adds to the mean over all ``total`` things
    of the batch. None: the part is all there is."""
    return mean if total in (None, count) else mean * (count / total)
