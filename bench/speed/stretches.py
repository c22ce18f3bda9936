"""Models one of whose drawings takes seconds on a CPU: this engine draws whole images, its peers
their first codes.

Six providers of a 100M model, each drawing eight images with guidance nine times (to compare, to
choose its threads, five times to be timed, to count memory), would be a quarter of an hour for the
smallest batch of a rollout. What the port and eager PyTorch need for the codes after the first
ones is assumed to be what they need for those. That flatters them, as later codes read a longer
cache; of this engine nothing is projected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

CODES = 17
"""The first codes: a run of the prompts, and sixteen steps."""
REPEATS = 2
"""Timed drawings of each at most."""

Watched = Callable[[Callable[[], None]], object]
"""A drawing that calls back when each code of it is there."""


def busy_seconds(call: Callable[[], object]) -> float:
    """Processor time of a call, which other processes do not lengthen."""
    began = time.process_time()
    call()
    return time.process_time() - began


def in_turn(draws: Mapping[str, Watched], repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds that each drawing takes for ``steps`` codes, ``repeats`` times in turn."""
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(repeats):
        for name, draw in draws.items():
            stamps = list[float]()
            began = time.perf_counter()
            draw(lambda stamps=stamps: stamps.append(time.perf_counter()))  # type: ignore[misc]
            times[name].append(whole(began, stamps, steps))
    return times


def whole(began: float, stamps: Sequence[float], steps: int) -> float:
    """Seconds from ``began`` to code ``steps``, where code i was there at ``stamps[i]``: the run of
    the prompts as it was, and as many steps as an image has, as long as the mean of those seen."""
    first, last, seen = stamps[0], stamps[-1], len(stamps) - 1
    if not seen:
        raise ValueError(f"{len(stamps)} codes were drawn; a step needs two")
    return first - began + (steps - 1) * (last - first) / seen
