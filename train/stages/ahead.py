"""Prepare a step's data on the host while the device is still busy with the previous step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Parts of steps as the pure function ``make(step, part, parts)`` packs them; one part can be
    made ahead of time."""

    def __init__(self, make: Callable[[int, int, int], T]) -> None:
        self._make = make
        self._kept: tuple[tuple[int, int, int], T] | None = None

    def prepare(self, step: int, part: int, parts: int) -> None:
        """Make a part now. It is kept until the next call of `take`, whichever part that is for."""
        self._kept = (step, part, parts), self._make(step, part, parts)

    def take(self, step: int, part: int, parts: int) -> T:
        """Return a part: the prepared one, or one made now."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == (step, part, parts):
            return kept[1]
        return self._make(step, part, parts)
