"""The domain's nouns: a box, an object with its referring expression, a layout; and their JSON.

Everything that enters the project as a layout passes through here, so every existing layout is
valid. Each refusal names the object, the value and the fix.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)``, origin at the top left, normalised to [0, 1]; x1 < x2 and y1 < y2."""

SIZE_MAX = 1_000_000
"""Most pixels along a side of a canvas."""
_LAYOUT_KEYS = {"caption", "objects", "size"}
_OBJECT_KEYS = {"expr", "box"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")
"""Control characters, halves of surrogate pairs, line and paragraph separators, and characters that
change the writing direction. `str.isprintable` is not used: it rejects no-break and wide spaces and
joiners, which French, Japanese, Persian and emoji need, and letters newer than Python's tables."""


class LayoutError(ValueError):
    """A layout that is refused; the message is one line that names the value and the fix."""


def _show(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # too deep, too many digits, not JSON's keys
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def check_text(value: object, what: str) -> str:
    """Validate a caption or an expression, one line of text, and return it; ``what`` is its name in
    errors. Raises LayoutError."""
    if not isinstance(value, str):
        raise LayoutError(f"{what} is {_show(value)}; it must be a string")
    if not value.strip():
        raise LayoutError(f"{what} is empty ({_show(value)}); write what the object or scene is")
    if found := _CONTROL.search(value):
        raise LayoutError(
            f"{what} holds a control character, U+{ord(found[0]):04X} ({_show(value)}); "
            f"use one plain line"
        )
    return value


def _number(value: object, what: str) -> float:
    # NumPy's numbers are registered as real numbers; most of them are not floats.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise LayoutError(f"{what} is {_show(value)}; it must be a number")
    try:
        number = float(value)
    except OverflowError:
        raise LayoutError(f"{what} is {_show(value)}; it is too large for a number") from None
    if not math.isfinite(number):
        raise LayoutError(f"{what} is {number}; it must be finite")
    return number


def check_box(box: object, what: str = "box", size: tuple[float, float] | None = None) -> Box:
    """Validate one box and return it normalised.

    Args:
        box: four numbers ``[x1, y1, x2, y2]``, in [0, 1], or in pixels when ``size`` is given.
        what: its name in errors, for instance ``object 2 ("a red circle"): box``.
        size: canvas ``(width, height)`` in pixels, or None for normalised boxes.

    Raises:
        LayoutError: not four finite numbers, outside the canvas, or without extent.
    """
    if isinstance(box, (str, bytes, Mapping)) or not isinstance(box, Iterable):
        raise LayoutError(f"{what} is {_show(box)}; write [x1, y1, x2, y2]")
    items = list(box)
    if len(items) != 4:
        raise LayoutError(f"{what} has {len(items)} numbers ({_show(items)}); write four")
    numbers = [
        _number(v, f"{what} {n}") for v, n in zip(items, ("x1", "y1", "x2", "y2"), strict=True)
    ]
    width, height = size if size is not None else (1.0, 1.0)
    limits = (width, height, width, height)
    for value, limit, name in zip(numbers, limits, ("x1", "y1", "x2", "y2"), strict=True):
        if not 0 <= value <= limit:
            unit = (
                'boxes are fractions of the canvas; for pixels add "size": [width, height]'
                if size is None
                else "move it inside the canvas"
            )
            raise LayoutError(f"{what} {name} = {value:g} is outside [0, {limit:g}]; {unit}")
    x1, y1, x2, y2 = (v / limit for v, limit in zip(numbers, limits, strict=True))
    if x2 <= x1:
        raise LayoutError(f"{what} has x2 = {numbers[2]:g} <= x1 = {numbers[0]:g}; swap or widen")
    if y2 <= y1:
        raise LayoutError(
            f"{what} has y2 = {numbers[3]:g} <= y1 = {numbers[1]:g}; swap or heighten"
        )
    return (x1, y1, x2, y2)


@dataclass(frozen=True)
class LayoutObject:
    """A referring expression and the box of its object; validated when created."""

    expr: str
    box: Box

    def __post_init__(self) -> None:
        check_text(self.expr, "expr")
        object.__setattr__(self, "box", check_box(self.box, f"object {_show(self.expr)}: box"))


@dataclass(frozen=True)
class Layout:
    """A caption and its objects, in drawing order.

    Attributes:
        caption: one line of text for the whole image.
        objects: at least one object, boxes normalised.
        size: canvas ``(width, height)`` in pixels, for ``to_dict`` to write boxes in pixels; None:
            it writes normalised boxes. The boxes held here are normalised either way.
    """

    caption: str
    objects: tuple[LayoutObject, ...]
    size: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_text(self.caption, "caption")
        object.__setattr__(self, "objects", tuple(self.objects))
        if self.size is not None:
            object.__setattr__(self, "size", _size(self.size))
        if not self.objects:
            raise LayoutError('objects is empty; a layout needs at least one {"expr", "box"}')
        for i, item in enumerate(self.objects, 1):
            if not isinstance(item, LayoutObject):
                raise LayoutError(
                    f"object {i} is {_show(item)}; make it a LayoutObject, or the whole by "
                    f"Layout.from_dict"
                )

    @classmethod
    def from_dict(cls, data: object) -> Layout:
        """Read a layout from parsed JSON (see README for the format).

        Raises:
            LayoutError: anything that is not exactly that format; nothing is clipped or guessed.
        """
        fields = _fields(data, _LAYOUT_KEYS, {"caption", "objects"}, "layout")
        caption = check_text(fields["caption"], "caption")
        size = _size(fields["size"]) if "size" in fields else None
        raw = fields["objects"]
        if not isinstance(raw, (list, tuple)):
            raise LayoutError(f'objects is {_show(raw)}; write a list of {{"expr", "box"}}')
        objects = []
        for i, item in enumerate(raw, 1):
            entry = _fields(item, _OBJECT_KEYS, _OBJECT_KEYS, f"object {i}")
            expr = check_text(entry["expr"], f"object {i}: expr")
            box = check_box(entry["box"], f"object {i} ({_show(expr)}): box", size)
            objects.append(LayoutObject(expr, box))
        return cls(caption, tuple(objects), size)

    @classmethod
    def loads(cls, text: str) -> Layout:
        """Read a layout from JSON text. Raises LayoutError, like ``from_dict``."""
        return cls.from_dict(read_json(text))

    @classmethod
    def load(cls, path: str | Path) -> Layout:
        """Read a layout file. Raises LayoutError, whose message begins with the path."""
        text = read_text(path)
        try:
            return cls.loads(text)
        except LayoutError as error:
            raise LayoutError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON-ready data; boxes in pixels when ``size`` is set."""
        width, height = self.size if self.size is not None else (1.0, 1.0)
        scale = (width, height, width, height)
        data: dict[str, Any] = {
            "caption": self.caption,
            "objects": [
                {"expr": o.expr, "box": [v * s for v, s in zip(o.box, scale, strict=True)]}
                for o in self.objects
            ],
        }
        if self.size is not None:
            data["size"] = list(self.size)
        return data

    def dumps(self) -> str:
        """The layout as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write the layout as a JSON file."""
        Path(path).write_text(self.dumps() + "\n", encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Return the text of a file. Raises LayoutError, whose message begins with the path."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise LayoutError(f"{path}: cannot be read ({reason})") from None


def read_json(text: str) -> object:
    """Parse JSON in which no key appears twice.

    Raises:
        LayoutError: anything else, JSON nested too deeply, or a number that Python does not read.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise LayoutError(f"not valid JSON at {where}: {error.msg}") from None
    except RecursionError:
        raise LayoutError("the JSON is nested too deeply; write a plain object") from None
    except LayoutError:
        raise
    except ValueError:  # an integer of more digits than Python converts
        most = sys.get_int_max_str_digits()
        raise LayoutError(
            f"the JSON holds a whole number of more than {most} digits; write a smaller one"
        ) from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise LayoutError(f"key {_show(key)} appears twice; keep one")
        data[key] = value
    return data


def _fields(data: object, known: set[str], needed: set[str], what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise LayoutError(f"{what} is {_show(data)}; write an object with {sorted(needed)}")
    for key in data:
        if key not in known:
            raise LayoutError(f"{what} has the unknown key {_show(key)}; known: {sorted(known)}")
    for key in sorted(needed - set(data)):
        raise LayoutError(f'{what} has no "{key}"; add it')
    return data


def _size(value: object) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise LayoutError(f"size is {_show(value)}; write [width, height] in pixels")
    width, height = (
        _number(v, f"size {n}") for v, n in zip(value, ("width", "height"), strict=True)
    )
    if not all(1 <= pixels <= SIZE_MAX and pixels.is_integer() for pixels in (width, height)):
        raise LayoutError(
            f"size is {_show(value)}; width and height must be positive whole numbers of pixels, "
            f"at most {SIZE_MAX}"
        )
    return (width, height)
