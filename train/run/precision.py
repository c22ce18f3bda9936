"""The cost of training in bfloat16 on a CPU that has no instructions for it."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

SLOW = 1.5
"""If bfloat16 takes at least this many times as long as float32, a CPU is taken to have no
instructions for it. With them it is at least as fast; without, an AMD EPYC of 2021 took 28 times as
long (`echogen doctor`)."""


def bf16_slowdown() -> float:
    """How many times as long a matrix product takes on this CPU in bfloat16 as in float32, by the
    medians of alternating products; this takes a fifth of a second in total."""
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(8):  # the first is not counted
        for dtype, taken in times.items():
            x = torch.ones(256, 256, dtype=dtype)
            start = perf_counter()
            torch.mm(x, x)
            taken.append(perf_counter() - start)
    single, half = (median(taken[1:]) for taken in times.values())
    return half / single


def advice(slowdown: float) -> str | None:
    """What to do about a slowdown; None if nothing is needed."""
    if slowdown < SLOW:
        return None
    return (
        f"this CPU has no instructions for bfloat16: products take {slowdown:.0f} times as long as "
        f"in float32; --float32 trains faster"
    )
