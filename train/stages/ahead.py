"""What the host makes of a step while the device is still busy with the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The parts of steps as ``make(step, part, parts)`` packs them, a pure function; one of them
    can be made before it is asked for."""

    def __init__(self, make: Callable[[int, int, int], T]) -> None:
        self._make = make
        self._kept: tuple[tuple[int, int, int], T] | None = None

    def prepare(self, step: int, part: int, parts: int) -> None:
        """Make a part now. It is kept until the next one is taken, whichever that is."""
        self._kept = (step, part, parts), self._make(step, part, parts)

    def take(self, step: int, part: int, parts: int) -> T:
        """A part: the one prepared, or made now."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == (step, part, parts):
            return kept[1]
        return self._make(step, part, parts)
