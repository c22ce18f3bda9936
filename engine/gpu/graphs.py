"""Steps that run again without Python: each is captured once in a CUDA graph and then replayed.

A step is a function without arguments. Everything that changes from one run to the next is in
tensors that the step was made with and updates itself, so a replay, which repeats the same launches
on the same memory, continues where the last one stopped. ``ECHOGEN_EAGER=1`` runs the function
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
"""Most recorded steps kept; each has a graph of some hundred nodes and a few MB of buffers."""


LEFT_OPEN = TorchVersion(torch.__version__) < "2.13"
"""Whether torch still counts a capture that ended in an error as open. Its allocator does: from
then on ``torch.cuda.empty_cache`` fails, and with it every later capture. Its random generator does
too: until a capture succeeds, every draw from it outside a capture fails."""

ONE = Lock()
"""Held while a step is recorded: torch allows one capture at a time across all threads."""


class CaptureError(RuntimeError):
    """A step cannot be recorded; the message says why, and how to run it anyway."""


class Recorder(Protocol):
    """Makes a step repeatable."""

    def record(self, step: Step) -> Step:
        """Return a function that does the same as ``step``; this may run ``step`` several times."""
        ...

    def apart(self) -> Recorder:
        """Return a recorder whose steps may run between any two launches of this one's steps."""
        ...


class Eager:
    """Runs each step as it is."""

    def record(self, step: Step) -> Step:
        """See `Recorder`."""
        return step

    def apart(self) -> Eager:
        """See `Recorder`."""
        return self


class CudaGraphs:
    """Records each step as a CUDA graph. All graphs of one recorder share their memory (except
    those from before a failed capture), because only one of them runs at a time and none leaves
    anything there that another run reads. One stream captures them all, because torch's allocator
    reuses memory only on the stream that freed it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs = WeakSet[torch.cuda.CUDAGraph]()

    def record(self, step: Step) -> Step:
        """See `Recorder`. Launches already made on the current stream come before the step's.

        Raises:
            CaptureError: the step waits for the device, or does something else that a capture does
                not allow. The current stream is as before, and other steps can be recorded and run.
        """
        if eager():  # checked here too, so that it helps an engine whose capture failed
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

        def replay(_reads: Step = step) -> None:  # a graph holds addresses and keeps nothing alive
            graph.replay()

        return replay

    def apart(self) -> CudaGraphs:
        """See `Recorder`; the new one has its own memory."""
        return CudaGraphs(self._device)

    def _capture(self, step: Step) -> torch.cuda.CUDAGraph:
        """Capture what ``step`` launches on the current stream. This does not use
        ``torch.cuda.graph``, which leaves its own stream current if a capture ends in an error."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # within a capture the allocator cannot give anything back
        # Clear cuBLAS's workspace of this stream. The one that the warm-ups left is outside the
        # pool: all graphs would hold its address, and the first of them to be destroyed would free
        # it (torch since 2.12; in other versions, whatever clears workspaces, such as the graphs of
        # torch.compile). So a capture finds none, allocates one in the pool, and leaves none to
        # others. This clears the workspaces of all streams; the next product on any of them
        # allocates another. What another thread is about to launch keeps its memory: freed after
        # `empty_cache`, it stays with the allocator, which reuses it only on that stream.
        torch._C._cuda_clearCublasWorkspaces()
        if not self._graphs:  # torch refuses a pool whose graphs are gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with _without_collector():
                # Thread-local: meanwhile other threads may allocate, and copy and wait on their own
                # streams. Waiting for the whole device still breaks the capture.
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
                raise error.__context__ from None  # it made the end of the capture fail
            # If both the step and the end of its capture failed, the step's error says why.
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
        """Use this pool for no further capture, as the allocator of pinned memory counts the failed
        one as open. Existing graphs keep the pool."""
        self._graphs = WeakSet()

    def _capture_nothing(self) -> None:
        """Make a capture that succeeds, so that the random generator works again."""
        one, graph = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        graph.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        one.zero_()
        graph.capture_end()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause Python's garbage collector. It might destroy a graph, and destroying a graph while
    another is captured in the same thread breaks the capture (pytorch issue 161037)."""
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
    """Return CUDA graphs on a GPU, unless ``ECHOGEN_EAGER=1`` is set, or the operators run as their
    references or interpreted, which wait for the device."""
    if device.type != "cuda" or FORCE_REFERENCE or INTERPRETED or eager():
        return Eager()
    return CudaGraphs(device)


def bucket(count: int) -> int:
    """Round ``count`` rows or prompts up, so that few different steps are recorded: to 1, 2, 4, 8,
    multiples of 8 up to 128, of 16 up to 256, and so on; above 64 less than an eighth of them is
    idle."""
    power = 1 << (count - 1).bit_length()
    if power <= 8:
        return power
    unit = max(8, power // 16)
    return -(-count // unit) * unit


class StepCache(Generic[T]):
    """Recorded steps by what they were made for; the least recently used one is dropped first."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most, self._held = most, dict[Hashable, T]()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what is held under ``key``; if nothing is, call ``make`` and hold its result."""
        found = self._held.pop(key, None)
        if found is None:
            while len(self._held) >= self._most:
                del self._held[next(iter(self._held))]
            found = make()
        self._held[key] = found
        return found

    def clear(self) -> None:
        """Drop all of them, because the memory or the weights they use are gone."""
        self._held.clear()
