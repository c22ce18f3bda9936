"""Derived data that takes minutes to make: it is made in parts, each kept as soon as it is there.

A run that is killed meanwhile goes on from the parts. A part is a pure function of its place, so
two runs that make the same data write the same files, and neither has to know of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from echogen.engine.checkpoints.shards import replace_file
from echogen.train.run.progress import telling

T = TypeVar("T")


def place(path: Path, part: range) -> Path:
    """Where a part of the file ``path`` is kept until the whole of it is there."""
    return path.with_name(f"{path.stem}.{part.start}-{part.stop}.part{path.suffix}")


def gathered(
    path: Path,
    what: tuple[str, str],
    parts: list[range],
    make: Callable[[list[range], Callable[[int], None]], Iterator[T]],
    encode: Callable[[T], bytes],
    decode: Callable[[bytes, range], T | None],
) -> list[T]:
    """All parts of the file ``path``: those that are kept, and the others made now, and kept.

    Args:
        path: of the whole, which the caller writes before he drops the parts (`drop`).
        what: is done to what, for those who wait: ("drawing", "train scenes").
        parts: the numbers in each, one behind the other.
        make: the parts of a list, one after another; it calls its second argument with how many
            numbers it has got through since the last call.
        encode: a part as it is kept.
        decode: the other way; None for what is no whole part, which is then made again.
    """
    found: dict[range, T] = {}
    for part in parts:
        data = _read(place(path, part))
        kept = None if data is None else decode(data, part)
        if kept is not None:
            found[part] = kept
    missing = [part for part in parts if part not in found]
    with telling(*what, sum(map(len, parts)), sum(map(len, found)), path, len(parts) > 1) as tell:
        for part, made in zip(missing, make(missing, tell), strict=True):
            if len(parts) > 1:
                replace_file(place(path, part), encode(made))
            found[part] = made
    return [found[part] for part in parts]


def _read(part: Path) -> bytes | None:
    """A part as it is kept; None where there is none, or another run has just dropped it."""
    try:
        return part.read_bytes()
    except FileNotFoundError:
        return None


def drop(path: Path, parts: Iterable[range]) -> None:
    """Remove the parts of a file that is there as a whole."""
    for part in parts:
        place(path, part).unlink(missing_ok=True)
