"""Split a step's batch into parts: one per process and, with accumulation, one per turn of it.

The batch of a step is a pure function of (seed, step), so every process draws all of it, which
costs a few random numbers, but builds only its own part. A loss is a mean over the targets of the
whole batch. So a part divides its sum by the whole batch's count, which every process knows without
communication. Losses, numbers and gradients of the parts then add up to those of the batch, even if
parts hold different numbers of targets.
"""

from __future__ import annotations

from torch import Tensor


def places(what: str, count: int, part: int, parts: int) -> range:
    """The places of a part's samples in a batch of ``count``: every ``parts``-th one.

    Raises:
        ValueError: the samples cannot be divided evenly; ``what`` names their setting.
    """
    if count % parts:
        raise ValueError(
            f"{what} = {count} cannot be shared out evenly over {parts} parts (processes × "
            f"accumulate); make it a multiple of {parts}"
        )
    return range(part, count, parts)


def turns(part: int, parts: int, accumulate: int) -> range:
    """The parts that the process of a ``part`` takes, one after another (see `Processes.shares`).
    Where ``parts`` is no multiple of ``accumulate``, as when a step of another run is repeated, it
    is that part alone."""
    count = parts if parts % accumulate else parts // accumulate
    return range(part % count, parts, count)


def part_of_mean(mean: Tensor, count: int, total: int | None) -> Tensor:
    """Convert a mean over a part's ``count`` items into its contribution to the mean over the
    batch's ``total`` items. ``total`` None: the part is the whole batch."""
    return mean if total in (None, count) else mean * (count / total)
