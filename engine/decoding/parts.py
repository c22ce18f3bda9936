"""Splitting items into parts of bounded size, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_parts(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Split items into parts whose sizes sum to at most ``most``; a larger item is its own part. No
    items give one empty part."""
    part, used = list[T](), 0
    for item in items:
        more = size(item)
        if part and used + more > most:
            yield part
            part, used = [], 0
        part.append(item)
        used += more
    yield part
