"""Layouts written by a language model: the requests, and which of its answers are accepted.

EchoGen finds that Cycle RL learns about as well from layouts that a language model has written as
from real ones. A model's answers are read tolerantly (a fence, an array, one object per line) but
must follow the same rules as every layout; rejected ones are recorded with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from echogen.engine.layout import Layout, LayoutError
from echogen.engine.prompt import ASSISTANT, BEGIN_IMAGE, END_IMAGE, MARKS, USER
from echogen.train.data.endpoint import Answer
from echogen.train.data.layouts import (
    MOST_IN_WORLD,
    MOST_OBJECTS,
    SMALLEST_SIDE,
    check_layout,
    check_split,
    check_truth,
    random_layout,
    scene_of,
)

Message = dict[str, str]
RESERVED = (*MARKS, USER, ASSISTANT, BEGIN_IMAGE, END_IMAGE, "<loc_")

_SYSTEM = (
    "You invent layouts of pictures. Answer with JSON alone: an array of objects, each "
    '{"caption": one line on the whole picture, "objects": [{"expr": a phrase that singles the '
    'object out, "box": [x1, y1, x2, y2]}, …]} and no other key. Boxes are fractions of the canvas '
    "between 0 and 1 from the top left, x1 < x2 and y1 < y2. Objects are listed back to front: a "
    "later one covers an earlier one where they overlap. No two objects of a layout share a phrase."
)
_WORLD = """The pictures show flat shapes on a plain ground.
Shapes: circle, square, triangle, star. Colours: red, green, blue, yellow, purple, cyan.
Textures: solid, striped, dotted. Sizes: small (square root of the box's area at most 0.26), \
large (at least 0.4).
Each side of a box is between 0.19 and 0.56. No object is more than half covered.
An "expr" has one of these forms, and is true of its object and of no other:
- "a red circle", "a striped red circle", "a small red circle", "a large dotted red circle"
- where two objects have one shape and colour: "the left of the two red circles", or right, upper, \
lower, larger, smaller
- where objects overlap: "the red circle in front", "the blue square behind", \
"the red circle in front of the blue square", "the blue square behind the red circle"
- "the red circle left of the blue square", or right of, above, below
Say left, right, above or below only of centres at least 0.125 apart.
Captions read like "a red circle in front of a blue square" or "two green stars, a cyan square"."""
_OPEN = f"""The pictures are photographs of everyday scenes.
Name at most {MOST_OBJECTS} objects a layout. Each side of a box is at least {SMALLEST_SIDE}, and \
no two boxes of a layout all but coincide. An "expr" is a short phrase ("the brown dog on the left \
sofa"); sizes and places are those that the things would have in such a photograph."""
_PLACES = (
    "a kitchen", "a street", "a beach", "a farm", "an office", "a living room", "a harbour",
    "a market", "a park", "a railway station", "a workshop", "a mountain path", "a library",
    "a playground", "a classroom", "a garden", "a sports field", "a bedroom", "a restaurant table",
    "a forest", "a river bank", "a snowy village", "a garage", "a zoo",
)  # fmt: skip


class Rejected(Exception):
    """A layout that is not accepted, with the reason in a word and in a line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Piece(NamedTuple):
    """A part of an answer: the text of one object, or why there is none."""

    text: str
    problem: str | None = None


# --- asking ---------------------------------------------------------------------------------------


def write_request(
    rng: np.random.Generator, batch: int, free: bool
) -> tuple[list[Message], list[Layout]]:
    """A conversation that asks for ``batch`` layouts, and the examples that it shows.

    The request gives each layout's number of objects and one thing to show, since a model left to
    itself writes the same few layouts over and over.

    Args:
        free: ask for photographs, in any words, instead of ShapesWorld's pictures.
    """
    wishes: list[str] = []
    examples: list[Layout] = []
    for i in range(1, batch + 1):
        if free:
            count, thing = rng.integers(1, 7), f"in {rng.choice(_PLACES)}"
        else:
            examples += [random_layout(rng)] if len(examples) < 2 else []
            count = rng.integers(1, MOST_IN_WORLD + 1)
            thing = f"among them {rng.choice(random_layout(rng).objects).expr}"  # type: ignore[arg-type]
        wishes.append(f"{i}. {count} object{'s' if count > 1 else ''}, {thing}")
    parts = [_OPEN if free else _WORLD]
    if examples:
        shown = ",\n".join(example.dumps() for example in examples)
        parts.append(f"For the form only, and not to be repeated:\n[{shown}]")
    parts.append(f"Write {batch} layouts, each unlike the others:\n" + "\n".join(wishes))
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": "\n\n".join(parts)},
    ], examples


# --- reading --------------------------------------------------------------------------------------


def pieces(answer: Answer) -> Iterator[Piece]:
    """The objects of an answer, whatever they are wrapped in: prose, a fence, an array, lines, a
    list under one key. An object that is not valid JSON comes with its problem."""
    text = re.sub(r"<think>.*?(</think>|\Z)", "", answer.text, flags=re.DOTALL)
    decoder, at, found = json.JSONDecoder(), 0, 0
    while (at := text.find("{", at)) >= 0:
        try:
            data, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            end = _close(text, at)
            why = "cut off at the answer's length limit" if answer.cut else "never closed"
            broken = getattr(error, "msg", None) or type(error).__name__
            if not end:  # never closed: complete objects after it still count
                following = re.compile(r'\{\s*"caption"').search(text, at + 1)
                end, broken = following.start() if following else len(text), why
            found += 1
            yield Piece(text[at:end], f"no JSON: {broken}")
            at = end
            continue
        wrapped = [v for v in data.values() if isinstance(v, list)]
        if not {"caption", "objects"} & set(data) and len(wrapped) == 1:
            at += 1  # a list under one key: its objects follow
            continue
        found += 1
        yield Piece(text[at:end])
        at = end
    if not found:
        yield Piece(text, "an empty answer" if not text.strip() else "no layout in the answer")


def _close(text: str, at: int) -> int:
    """Where the object that opens at ``at`` ends, with quotes respected; 0: nowhere."""
    depth, quoted, i = 0, False, at
    while i < len(text):
        c = text[i]
        if quoted:
            i += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        else:
            depth += (c == "{") - (c == "}")
            if not depth:
                return i + 1
        i += 1
    return 0


def key_of(layout: Layout) -> str:
    """A key that two layouts share if they count as the same: the same objects in any order, boxes
    to a thousandth."""
    return repr(sorted((o.expr, *(round(v, 3) for v in o.box)) for o in layout.objects))


@dataclass(frozen=True)
class Rules:
    """The rules that a layout must follow.

    Attributes:
        free: it need not belong to ShapesWorld.
        fits: raises LayoutError if a model has no room for it.
    """

    free: bool = False
    fits: Callable[[Layout], None] | None = None

    def examine(self, text: str) -> Layout:
        """The layout of one JSON object. Raises Rejected."""
        try:
            layout = Layout.loads(text)
        except LayoutError as error:
            raise Rejected("layout", str(error)) from None
        self.hold(layout)
        return layout

    def hold(self, layout: Layout) -> None:
        """Check a layout. Raises Rejected if it breaks the rules."""
        kind = "rules"
        try:
            check_layout(layout)
            for token in RESERVED:
                if any(token in t for t in (layout.caption, *(o.expr for o in layout.objects))):
                    raise LayoutError(f"a text holds the reserved token {token}; reword it")
            if not self.free:
                kind = "world"
                scene = scene_of(layout)
                kind = "truth"
                check_truth(layout, scene)
                kind = "split"
                check_split(scene)
            if self.fits is not None:
                kind = "room"
                self.fits(layout)
        except LayoutError as error:
            raise Rejected(kind, str(error)) from None
