"""Derived data that takes minutes to make: it is made in parts, each saved as soon as it is done.

A run that was killed meanwhile continues from the parts. A part is a pure function of its place, so
two runs that make the same data write the same files and need not know of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from echogen.engine.checkpoints.shards import replace_file
from echogen.train.run.progress import telling

T = TypeVar("T")


def place(path: Path, part: range) -> Path:
    """Where a part of the file ``path`` is kept until the whole file exists."""
    return path.with_name(f"{path.stem}.{part.start}-{part.stop}.part{path.suffix}")


def gathered(
    path: Path,
    what: tuple[str, str],
    parts: list[range],
    make: Callable[[list[range], Callable[[int], None]], Iterator[T]],
    encode: Callable[[T], bytes],
    decode: Callable[[bytes, range], T | None],
) -> list[T]:
    """Return all parts of the file ``path``: those saved earlier, and the others, made and saved
    now.

    Args:
        path: the whole file, which the caller writes before dropping the parts (`drop`).
        what: what is done to what, for the progress display: ("drawing", "train scenes").
        parts: the item numbers of each part, in order.
        make: makes the parts of a list, one after another; it calls its second argument with the
            number of items finished since the last call.
        encode: turns a part into the bytes that are saved.
        decode: the inverse; None for an incomplete part, which is then made again.
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
    """The bytes of a part; None if there are none, or another run has just dropped them."""
    try:
        return part.read_bytes()
    except FileNotFoundError:
        return None


def drop(path: Path, parts: Iterable[range]) -> None:
    """Remove the parts of a file once the whole file exists."""
    for part in parts:
        place(path, part).unlink(missing_ok=True)
