"""A CUDA graph's counterpart on a CPU: the operators of a step are recorded once and run again on
the same memory. Anything the step's Python would do differently the next time is lost, as in a
graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
"""Operators that need a value on the host, which no capture allows."""


class _Writing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @property
    def launches(self) -> list[str]:
        """The names of the operators that compute something; making a view does not count."""
        return [f.name() for f, args, _, made in self.calls if not _views(args, made)]


def _views(args: tuple[Any, ...], made: Any) -> bool:
    """Whether a result is memory of the first argument, which no operator that writes returns."""
    first, result = tree_leaves(args)[:1], tree_leaves(made)
    if not first or not isinstance(first[0], Tensor) or not result or result[0] is first[0]:
        return False
    where = first[0].untyped_storage().data_ptr()
    return all(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == where for t in result)


def written(step: Callable[[], object]) -> _Writing:
    """Record what a step calls."""
    with _Writing() as writing:
        step()
    return writing


class Tape:
    """A `graphs.Recorder`.

    Attributes:
        recorded: steps recorded so far.
        replayed: runs of recorded steps.
        asked_apart: how often separate memory was asked for, which a tape does not have.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = self.asked_apart = 0

    def apart(self) -> Tape:
        """See `graphs.Recorder`."""
        self.asked_apart += 1
        return self

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run a step to warm up, then record it, as `graphs.CudaGraphs` does."""
        step()
        calls = written(step).calls
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, made in calls:
                found = func(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay
