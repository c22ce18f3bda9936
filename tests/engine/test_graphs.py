"""Recording a step: what is kept, what a graph's memory depends on, and how a capture fails.

The rules of torch.cuda are written out (`Cuda`), so that all of it is tested without a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

from echogen.engine.gpu import graphs
from echogen.engine.gpu.graphs import CaptureError, CudaGraphs, Eager, StepCache, bucket, recorder


def test_rows_round_up_to_few_sizes():
    sizes = [bucket(n) for n in range(1, 513)]
    assert sizes[:10] == [1, 2, 4, 4, 8, 8, 8, 8, 16, 16] and sizes[-1] == 512
    assert all(n <= size for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) < 40
    assert all(size - n < max(8, n / 8) for n, size in enumerate(sizes, 1))


def test_the_step_used_longest_ago_goes():
    kept, made = StepCache[str](most=2), []
    for key in ("a", "b", "a", "c", "a", "b"):
        assert kept.get(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", "c", "b"] and len(kept) == 2


def test_what_records(monkeypatch):
    assert isinstance(recorder(torch.device("cpu")), Eager)
    monkeypatch.setenv("ECHOGEN_EAGER", "1")
    assert isinstance(recorder(torch.device("cuda", 0)), Eager)


class Cuda:
    """The rules of torch.cuda that recording has to keep:

    - after a capture that failed, the current stream is what it was;
    - a pool belongs to its graphs alone and goes with them;
    - a capture that ends in an error stays open for pinned memory and, on some versions of torch,
      for the device's memory and for the random generator;
    - a graph that is destroyed breaks the capture of another;
    - a stream's workspace lies where it was first needed.

    Attributes:
        now: the current stream.
        capturing: the graph that is being captured.
        broken: whether the current capture has become invalid.
        captures: (stream, pool) of every graph captured.
        workspaces: the pool that each stream's workspace lies in; None: outside of all.
        draws: whether the random generator can be drawn from.
    """

    class Stream:
        def wait_stream(self, other):
            pass

    def __init__(self, monkeypatch, leaves_open):
        self.now = self.outside = Cuda.Stream()
        self.capturing, self.broken, self.captures = None, False, []
        self.leaves_open, self._open, self._pinned = leaves_open, set(), set()
        self.workspaces, self.draws = {}, True
        self._handles, self._users = 0, Counter()
        cuda = self

        class Graph:
            pool = None

            def capture_begin(self, pool, capture_error_mode):
                if pool in cuda._users and not cuda._users[pool]:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                assert cuda.now is not cuda.outside
                if pool in cuda._pinned:
                    raise RuntimeError("already recording to mempool_id")
                cuda._users[pool] += 1
                cuda._open.add(pool)
                cuda.capturing, cuda.broken, self.pool = self, False, pool

            def capture_end(self):
                cuda.capturing = None
                if not (cuda.broken and leaves_open):
                    cuda._open.remove(self.pool)
                if cuda.broken:
                    cuda._pinned.add(self.pool)
                    cuda.draws = not leaves_open
                    raise RuntimeError("CUDA error: failed due to a previous error during capture")
                cuda.draws = True
                cuda.captures.append((cuda.now, self.pool))

            def replay(self):
                pass

            def __del__(self):
                cuda._users[self.pool] -= 1
                cuda.broken = True

        for name, stub in {
            "device": nullcontext, "Stream": Cuda.Stream, "stream": self.stream,
            "current_stream": lambda: self.now, "current_device": lambda: 0,
            "synchronize": lambda: None, "empty_cache": self.empty_cache,
            "graph_pool_handle": self.handle, "CUDAGraph": Graph,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(graphs, "LEFT_OPEN", leaves_open)
        monkeypatch.setattr(
            torch._C, "_cuda_clearCublasWorkspaces", self.workspaces.clear, raising=False
        )
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
        monkeypatch.setattr(
            torch._C,
            "_cuda_endAllocateToPool",
            lambda device, pool: self._open.remove(pool),
            raising=False,
        )

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def empty_cache(self):
        if self._open:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def handle(self):
        self._handles += 1
        return 0, self._handles

    def multiplies(self):
        """A step that needs its stream's workspace; returns where that lies."""
        pool = self.capturing.pool if self.capturing else None
        return self.workspaces.setdefault(self.now, pool)

    def waits(self):
        """A step that waits for the device."""
        if self.capturing:
            self.broken = True
            raise RuntimeError("CUDA error: not permitted when stream is capturing\nmore of it")


def test_what_a_recorded_step_reads_stays(monkeypatch):
    """A graph knows only addresses, and whoever made the step may be gone."""
    Cuda(monkeypatch, False)
    held = torch.zeros(3)
    alive = weakref.ref(held)
    run = CudaGraphs(torch.device("cuda", 0)).record(partial(held.add_, 1))
    del held
    gc.collect()
    assert alive() is not None
    del run
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("among", [False, True], ids=["alone", "among others"])
@pytest.mark.parametrize("leaves_open", [False, True])
def test_a_step_that_cannot_be_recorded(monkeypatch, leaves_open, among):
    """One error says why and what to do, and everything else still works."""
    cuda = Cuda(monkeypatch, leaves_open)
    record = CudaGraphs(torch.device("cuda", 0)).record
    others = [record(lambda: None)] * among
    told = r"CUDA graph \(CUDA error: not permitted when stream is capturing\); set ECHOGEN_EAGER=1"
    for _ in range(2):
        with pytest.raises(CaptureError, match=told):
            record(cuda.waits)
        assert cuda.now is cuda.outside and cuda.capturing is None
        assert cuda.draws and gc.isenabled() and not cuda.workspaces
        cuda.empty_cache()
    before = len(cuda.captures)
    for _ in range(2):  # the first is gone when the second is recorded
        again = record(lambda: None)
        del again
    assert len(cuda.captures) == before + 2 and all(run() is None for run in others)
    monkeypatch.setenv("ECHOGEN_EAGER", "1")
    assert record(cuda.waits) == cuda.waits


def test_what_is_no_fault_of_recording_is_told_as_it_is(monkeypatch):
    cuda = Cuda(monkeypatch, False)
    record = CudaGraphs(torch.device("cuda", 0)).record
    for error in (torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()):

        def step(error=error):
            if cuda.capturing:
                raise error

        with pytest.raises(type(error)) as raised:
            record(step)
        assert raised.value is error and cuda.now is cuda.outside and not cuda._open
    error = torch.OutOfMemoryError("CUDA out of memory")

    def fails_twice():
        if cuda.capturing:
            cuda.broken = True  # so that the end of the capture fails as well
            raise error

    with pytest.raises(torch.OutOfMemoryError) as raised:
        record(fails_twice)
    assert raised.value is error


def test_no_graph_is_destroyed_while_another_is_captured(monkeypatch):
    cuda = Cuda(monkeypatch, False)
    record = CudaGraphs(torch.device("cuda", 0)).record
    gc.collect()
    cycle = [record(lambda: None)]
    cycle.append(cycle)
    del cycle

    def step():
        kept = [[] for _ in range(10_000 * bool(cuda.capturing))]  # would run an enabled collector
        assert len(kept) in (0, 10_000)

    often = gc.get_threshold()
    gc.set_threshold(100)
    try:
        record(step)
    finally:
        gc.set_threshold(*often)
    assert gc.isenabled() and len(cuda.captures) == 2


def test_a_workspace_lies_in_the_graphs_own_memory(monkeypatch):
    """Otherwise the first graph to go would free what the others write to."""
    cuda, lay = Cuda(monkeypatch, False), []
    record = CudaGraphs(torch.device("cuda", 0)).record
    held = [record(lambda: lay.append(cuda.multiplies())) for _ in range(2)]
    outside, pool = {*lay[:2], *lay[3:5]}, {lay[2], lay[5]}
    assert outside == {None} and pool == {cuda.captures[0][1]} and len(held) == 2
    assert not cuda.workspaces, "nobody else writes to it"


def test_graphs_share_their_memory_while_there_are_any(monkeypatch):
    cuda = Cuda(monkeypatch, False)
    record = CudaGraphs(torch.device("cuda", 0)).record
    held = [record(lambda: None) for _ in range(3)]
    assert len(set(cuda.captures)) == 1, "one stream and one pool"
    held.clear()
    record(lambda: None)
    assert cuda.captures[3] != cuda.captures[0]
