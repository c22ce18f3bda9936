"""The user's own pictures: a folder with a file `layouts.jsonl`, whose lines are their layouts.

A line is an ordinary layout with "image", the path of its picture relative to the file's folder. It
must follow the rules of `echogen layouts --check --open`. A picture must be square, as its boxes
would not survive a crop, and is scaled to the model's size. Only the model itself can tell what is
in a drawing, so there is no judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from transformers import JanusVQVAE

from echogen.engine.engine import Engine
from echogen.engine.images.vision import ImageError, load_image
from echogen.engine.layout import Layout, LayoutError, check_text, read_json, read_text
from echogen.train.data.layouts import check_room
from echogen.train.data.llm import Rejected, Rules, key_of
from echogen.train.data.samples import Sample, cached_codes, image_side, module_hash
from echogen.train.data.source import Validation
from echogen.train.parallel.distributed import told_by_first

FILE = "layouts.jsonl"
EVERY = 50
"""One picture in this many is held back for validation."""


class Entry(NamedTuple):
    """A line of the file.

    Attributes:
        line: its number, from 1.
        path: of the picture.
        digest: hash of the picture's bytes, which identifies it whatever its name.
    """

    line: int
    path: Path
    digest: str
    layout: Layout


class Pictures:
    """A folder's pictures as a `Source`.

    The first process reads all files once at every start, so that none can change unnoticed. The
    image codes are cached by the pictures' bytes and the image tokenizer that made them.

    Raises:
        LayoutError: the first line that breaks the rules, or whose picture cannot be used (the
            message names file and line), or a file with fewer than two different pictures.
    """

    def __init__(self, folder: str | Path) -> None:
        self._file = Path(folder) / FILE
        self._entries = told_by_first(lambda: read_entries(self._file))
        self._first = {e.digest: e for e in reversed(self._entries)}
        """The first line of every different picture."""
        self._held = held_back(self._first)
        if len(self._first) < 2:
            raise LayoutError(
                f"{self._file}: holds one picture; a stage learns from some and is validated on "
                f"others, so add more"
            )
        # See `Source`: a hash of the bytes of the file and of all its pictures.
        digests = [e.digest.encode() for e in self._entries]
        self.fingerprint = _digest(self._file.read_bytes(), *digests)

    def check(self, engine: Engine) -> None:
        """See `Source`: the model must have room for every layout. Raises LayoutError."""
        for entry in self._entries:
            try:
                check_room(entry.layout, engine.prompts, engine.transformer.config)
            except LayoutError as error:
                raise LayoutError(f"{self._file}: line {entry.line} {error}") from None

    def training(self, vq: JanusVQVAE) -> list[Sample]:
        """See `Source`."""
        return self._samples(vq, [e for e in self._entries if e.digest not in self._held])

    def validation(self, vq: JanusVQVAE, count: int) -> Validation:
        """See `Source`."""
        entries = [e for e in self._entries if e.digest in self._held][:count]
        return Validation(self._samples(vq, entries), [e.layout for e in entries], None)

    def _samples(self, vq: JanusVQVAE, entries: list[Entry]) -> list[Sample]:
        rows = dict(zip(sorted(self._first), self._codes(vq), strict=True))
        return [
            Sample(
                rows[e.digest],
                e.layout.caption,
                tuple(o.box for o in e.layout.objects),
                tuple((o.expr,) for o in e.layout.objects),
            )
            for e in entries
        ]

    def _codes(self, vq: JanusVQVAE) -> np.ndarray:
        """Image codes of every different picture, in the order of their digests."""
        side, digests = image_side(vq), sorted(self._first)

        def loaded(some: range) -> np.ndarray:
            return np.stack([self._load(self._first[digests[i]], side) for i in some])

        name = f"{module_hash(vq)}-{side}-{_digest(*map(str.encode, digests))}"
        return cached_codes(vq, name, "pictures", len(digests), loaded)

    def _load(self, entry: Entry, side: int) -> np.ndarray:
        try:
            picture = np.asarray(load_image(str(entry.path), side))
            if not entry.path.is_file() or _digest(entry.path.read_bytes()) != entry.digest:
                # Its codes would be cached under its old bytes.
                raise ImageError(f"{entry.path} has changed since the start; start again")
        except ImageError as error:  # faults that the header did not show
            raise ImageError(f"{self._file}: line {entry.line}: {error}") from None
        return picture


def read_entries(file: Path) -> list[Entry]:
    """Read the lines of a file; empty ones are skipped. Raises LayoutError, see `Pictures`."""
    entries, known = list[Entry](), set[tuple[str, str]]()
    look = cache(_looked_at)  # a picture may have many lines
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _entry(file, number, line, look)
            if (key := (entry.digest, key_of(entry.layout))) in known:
                raise LayoutError("this picture was there before with the same objects and boxes")
        except (LayoutError, Rejected, ImageError) as error:
            raise LayoutError(f"{file}: line {number}: {error}") from None
        known.add(key)
        entries.append(entry)
    if not entries:
        raise LayoutError(f"{file}: holds no layout; write one JSON object a line")
    return entries


def _entry(file: Path, number: int, line: str, look: Callable[[Path], str]) -> Entry:
    data = read_json(line)
    image = data.pop("image", None) if isinstance(data, dict) else None
    layout = Layout.from_dict(data)
    if image is None:
        raise LayoutError('layout has no "image"; add the path of its picture')
    path = file.parent / check_text(image, "image")
    if layout.size is not None and layout.size[0] != layout.size[1]:
        width, height = layout.size
        raise LayoutError(
            f"size is {width:.0f}x{height:.0f}; pictures are square, and boxes refer to the "
            f"picture as it is (after a crop or a pad)"
        )
    Rules(free=True).hold(layout)
    return Entry(number, path, look(path), layout)


def _looked_at(path: Path) -> str:
    """The digest of a picture that, by its header, can be opened, is square and has known black and
    white levels: reading the pixels of all would take minutes at every start. Raises ImageError."""
    usable = False
    unreadable = OSError, ValueError, SyntaxError, Image.DecompressionBombError
    with suppress(*unreadable), Image.open(path) as image:
        usable = image.width == image.height and image.mode not in ("I", "F")
    if not usable:
        load_image(str(path), 1)  # raises the error that says why
    return _digest(path.read_bytes())


def held_back(digests: Iterable[str]) -> set[str]:
    """Which pictures are held back for validation: about one in `EVERY`, chosen by their bytes, so
    that a picture stays on its side whatever its name and whatever is added; at least one, and not
    all. If this rule selects none (of few pictures) or all, a single one is held back, and it may
    be another when some are added."""
    every = set(digests)
    held = {digest for digest in every if int(digest, 16) % EVERY == 0}
    return held if 0 < len(held) < len(every) else {min(every)}


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
