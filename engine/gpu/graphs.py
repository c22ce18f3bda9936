"""Steps that run again without Python: each is captured once in a CUDA graph and then replayed.

A step is a function without arguments. Everything that changes from one run to the next lies in
tensors that it was made with and writes itself, so that a replay, which repeats the same launches
on the same memory, goes on where the last one stopped. ``ECHOGEN_EAGER=1`` runs the function
itself every time, for debugging: the same launches, and so the same codes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch.torch_version import TorchVersion

from echogen.kernels.dispatch import FORCE_REFERENCE, INTERPRETED

Step = Callable[[], None]
T = TypeVar("T")

WARM_UPS = 2
"""Runs before a capture: they compile kernels, load modules, and let libraries choose and allocate,
none of which a capture allows."""
MOST_KEPT = 8
"""Recorded steps kept; each is some hundred nodes of a graph and buffers of a few megabytes."""


LEFT_OPEN = TorchVersion(torch.__version__) < "2.13"
"""Whether torch goes on counting a capture that ended in an error. Its allocator does: from then on
``torch.cuda.empty_cache`` fails, and with it every later capture. And its random generator does:
until a capture succeeds, every draw from it outside of one fails."""

ONE = Lock()
"""Held while a step is recorded: torch takes one capture at a time, whatever thread it is in."""


class CaptureError(RuntimeError):
    """A step that cannot be recorded; says why, and how to run it all the same."""


class Recorder(Protocol):
    """How a step is made to run again."""

    def record(self, step: Step) -> Step:
        """What does the same as ``step``; ``step`` itself may be run for that, several times."""
        ...

    def apart(self) -> Recorder:
        """One whose steps may run between any two launches of this one's."""
        ...


class Eager:
    """A step is run as it is."""

    def record(self, step: Step) -> Step:
        """See `Recorder`."""
        return step

    def apart(self) -> Eager:
        """See `Recorder`."""
        return self


class CudaGraphs:
    """A step is a CUDA graph. All graphs of one recorder share their memory (but for those from
    before a capture that failed), as only one of them runs at a time and none leaves anything in it
    that another run reads. So one stream captures them all, since torch's allocator gives what one
    stream freed to that stream alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs = WeakSet[torch.cuda.CUDAGraph]()

    def record(self, step: Step) -> Step:
        """See `Recorder`. Launches already made on the current stream come before the step's.

        Raises:
            CaptureError: the step waits for the device, or does what else no capture allows. The
                current stream is as before, and other steps can be recorded and run.
        """
        if eager():  # asked here too, so that it helps an engine whose steps were refused
            return step
        with ONE, torch.cuda.device(self._device):
            outside = torch.cuda.current_stream()
            own = self._stream = self._stream or torch.cuda.Stream()
            own.wait_stream(outside)
            try:
                with torch.cuda.stream(own):
                    for _ in range(WARM_UPS):
                        step()
                    graph = self._capture(step)
            finally:
                outside.wait_stream(own)

        def replay(_reads: Step = step) -> None:  # a graph knows addresses, and keeps nothing there
            graph.replay()

        return replay

    def apart(self) -> CudaGraphs:
        """See `Recorder`; with memory of its own."""
        return CudaGraphs(self._device)

    def _capture(self, step: Step) -> torch.cuda.CUDAGraph:
        """What ``step`` launches on the current stream. Not by ``torch.cuda.graph``, which leaves
        its own stream the current one where a capture ends in an error."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # within a capture the allocator cannot give anything back
        # cuBLAS's workspace of this stream. As the warm-ups left it, it would lie outside the pool:
        # all graphs would know its address, and the first of them to go would free it (torch since
        # 2.12; elsewhere whoever clears workspaces, as torch.compile's own graphs do). So a capture
        # finds none, allocates one in the pool, and leaves none to others. This clears the
        # workspaces of all streams; whoever multiplies next on one of them allocates another. What
        # another thread is about to launch keeps its memory: freed behind `empty_cache`, it stays
        # with the allocator, which gives it to later work of that stream alone.
        torch._C._cuda_clearCublasWorkspaces()
        if not self._graphs:  # torch refuses the pool of graphs that are gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with _without_collector():
                # Thread-local: other threads may allocate, and copy and wait on their own streams,
                # meanwhile. What waits for the whole device ends the capture all the same.
                self._begin(graph)
                try:
                    step()
                finally:
                    try:
                        self._end(graph)
                    finally:
                        torch._C._cuda_clearCublasWorkspaces()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None  # the end of the capture failed for it
            # Where both the step and the end of its capture failed, the step says why.
            why = str(error.__context__ or error).partition("\n")[0]
            raise CaptureError(
                f"a step of drawing cannot be recorded as a CUDA graph ({why}); set "
                f"ECHOGEN_EAGER=1 to launch its operators one by one, for the same codes"
            ) from error
        self._graphs.add(graph)
        return graph

    def _begin(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
        except RuntimeError:
            self._leave_pool()
            raise

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError as error:
            self._leave_pool()
            if LEFT_OPEN:
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                try:
                    self._capture_nothing()
                except RuntimeError as again:
                    error.add_note(f"torch's random generator is still closed: {again}")
            raise

    def _leave_pool(self) -> None:
        """No capture goes into the pool again, as the allocator of pinned memory counts one that
        failed as open. What graphs there are keep it."""
        self._graphs = WeakSet()

    def _capture_nothing(self) -> None:
        """A capture that succeeds, so that the random generator may be drawn from again."""
        one, graph = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        graph.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        one.zero_()
        graph.capture_end()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector rests. It may find a graph, and a graph that is destroyed while
    another is captured in the same thread ends the capture (pytorch issue 161037)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def eager() -> bool:
    """Whether ``ECHOGEN_EAGER=1`` is set."""
    return os.environ.get("ECHOGEN_EAGER") == "1"


def recorder(device: torch.device) -> Recorder:
    """CUDA graphs on a GPU, unless ``ECHOGEN_EAGER=1`` is set or operators run on their references
    or interpreted, which wait for the device."""
    if device.type != "cuda" or FORCE_REFERENCE or INTERPRETED or eager():
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
