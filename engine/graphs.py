"""Steps that run again without Python: each is captured once in a CUDA graph and then replayed.

A step is a function without arguments. Everything that changes from one run to the next lies in
tensors that it was made with and writes itself, so that a replay, which repeats the same launches
on the same memory, goes on where the last one stopped. ``ECHOGEN_EAGER=1`` runs the function
itself every time, for debugging: the same launches, and so the same codes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch

from echogen.kernels.dispatch import FORCE_REFERENCE

Step = Callable[[], None]
T = TypeVar("T")

WARM_UPS = 2
"""Runs before a capture: they compile kernels, load modules, and let libraries choose and allocate,
none of which a capture allows."""
MOST_KEPT = 8
"""Recorded steps kept; each is some hundred nodes of a graph and buffers of a few megabytes."""


class Recorder(Protocol):
    """How a step is made to run again."""

    def record(self, step: Step) -> Step:
        """What does the same as ``step``; ``step`` itself may be run for that, several times."""
        ...


class Eager:
    """A step is run as it is."""

    def record(self, step: Step) -> Step:
        """See `Recorder`."""
        return step


class CudaGraphs:
    """A step is a CUDA graph. All graphs of one recorder share their memory, as only one of them
    runs at a time and none leaves anything in it that another run reads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, step: Step) -> Step:
        """See `Recorder`. Launches already made on the current stream come before the step's."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Thread-local: what other threads ask of the device meanwhile does not end the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                step()
            self._pool = graph.pool()
        return graph.replay


def recorder(device: torch.device) -> Recorder:
    """CUDA graphs on a GPU, unless ``ECHOGEN_EAGER=1`` is set or operators run on their references,
    which wait for the device."""
    if device.type != "cuda" or FORCE_REFERENCE or os.environ.get("ECHOGEN_EAGER") == "1":
        return Eager()
    return CudaGraphs(device)


def bucket(count: int) -> int:
    """What ``count`` rows or prompts are rounded up to, so that few different steps are recorded:
    1, 2, 4, 8, multiples of 8 up to 128, of 16 up to 256, and so on; above 64 less than an eighth
    of them is idle."""
    power = 1 << (count - 1).bit_length()
    if power <= 8:
        return power
    unit = max(8, power // 16)
    return -(-count // unit) * unit


class Kept(Generic[T]):
    """Recorded steps by what they were made for; the one used longest ago goes first."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most, self._held = most, dict[Hashable, T]()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is held under ``key``, else what ``make`` makes, which is held from now on."""
        found = self._held.pop(key, None)
        if found is None:
            while len(self._held) >= self._most:
                del self._held[next(iter(self._held))]
            found = make()
        self._held[key] = found
        return found

    def clear(self) -> None:
        """Forget all of them, as the memory or the weights they stand on are gone."""
        self._held.clear()
