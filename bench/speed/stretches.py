"""Timing of models for which one drawing takes seconds on a CPU: this engine draws whole images,
its peers only their first codes.

With a 100M model and six providers, each would draw eight images with guidance nine times (to
compare, to choose its threads, five times to be timed, to count memory). That would take a quarter
of an hour for the smallest batch of a rollout. The port and eager PyTorch are assumed to need as
much for the later codes as for the first ones. This flatters them, as later codes read a longer
cache. Nothing of this engine is projected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

CODES = 17
"""The first codes: prefill, and sixteen steps."""
REPEATS = 2
"""Most timed drawings of each."""

Watched = Callable[[Callable[[], None]], object]
"""A drawing that calls back when each of its codes is available."""


def busy_seconds(call: Callable[[], object]) -> float:
    """Return the processor time of a call, which other processes do not lengthen."""
    began = time.process_time()
    call()
    return time.process_time() - began


def in_turn(draws: Mapping[str, Watched], repeats: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds that each drawing takes for ``steps`` codes, ``repeats`` times in turn."""
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(repeats):
        for name, draw in draws.items():
            stamps = list[float]()
            began = time.perf_counter()
            draw(lambda stamps=stamps: stamps.append(time.perf_counter()))  # type: ignore[misc]
            times[name].append(whole(began, stamps, steps))
    return times


def whole(began: float, stamps: Sequence[float], steps: int) -> float:
    """Return the seconds from ``began`` to code ``steps``, where code i was available at
    ``stamps[i]``: the prefill as measured, and an image's remaining steps at the mean of those
    measured."""
    first, last, seen = stamps[0], stamps[-1], len(stamps) - 1
    if not seen:
        raise ValueError(f"{len(stamps)} codes were drawn; a step needs two")
    return first - began + (steps - 1) * (last - first) / seen
