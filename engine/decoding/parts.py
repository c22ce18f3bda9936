"""Things in parts of bounded size, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_parts(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Items in parts of at most ``most`` in all, or of a single item that is larger; of no items
    one part that is empty."""
    part, used = list[T](), 0
    for item in items:
        more = size(item)
        if part and used + more > most:
            yield part
            part, used = [], 0
        part.append(item)
        used += more
    yield part
