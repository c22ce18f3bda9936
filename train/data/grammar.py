"""The language of ShapesWorld: captions and referring expressions whose truth can be checked.

An expression is admitted only if it is true of its target and *clearly* false of every other
object, so each relation is three-valued here: holds, clearly fails, or too close to call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from echogen.train.data.shapes import Object, Scene

SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
RELATIONS = ("left", "right", "above", "below", "front", "behind", "larger", "smaller")

# sqrt(box area) in pixels; between the two an object is called neither small nor large.
SMALL_AT_MOST = 17.0
LARGE_AT_LEAST = 25.0
MIN_OFFSET = 8.0  # px between centres before left/right/above/below is said
MIN_AREA_RATIO = 1.5  # before larger/smaller is said

_PAIR_WORD = {
    "left": "left",
    "right": "right",
    "above": "upper",
    "below": "lower",
    "larger": "larger",
    "smaller": "smaller",
}
_PAIR_RELATION = {word: relation for relation, word in _PAIR_WORD.items()}
_JOIN = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "below": "below",
    "front": "in front of",
    "behind": "behind",
}

_WORD = re.compile(r"[a-z]+")
_NOUN = (
    rf"(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<texture>{'|'.join(TEXTURES)}) )?"
    rf"(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
)
_PHRASE = re.compile(rf"(?:a|the) {_NOUN}(?: (?P<rest>.+))?")
_PAIR = re.compile(rf"the (?P<word>{'|'.join(_PAIR_RELATION)}) of the two {_NOUN}s")
_REST = re.compile(rf"(?P<join>{'|'.join(_JOIN.values())}) (?P<reference>(?:a|the) .+)")


@dataclass(frozen=True)
class Phrase:
    """What an expression asks for: the head noun's attributes and, if any, its relation.

    ``None`` marks an attribute that is not mentioned. ``relation`` is one of ``RELATIONS``;
    ``reference`` is the other noun of the relation. For "the left of the two green stars" the
    reference is the same noun (the other green star); for "the red circle in front" it is None.
    """

    color: str
    shape: str
    texture: str | None = None
    size: str | None = None
    relation: str | None = None
    reference: Phrase | None = None


def size_word(area: float) -> str | None:
    """Return "small", "large" or None for a box area in square pixels."""
    side = area**0.5
    if side <= SMALL_AT_MOST:
        return "small"
    return "large" if side >= LARGE_AT_LEAST else None


def words(text: str) -> list[str]:
    """Split a caption or expression into its words, punctuation left out."""
    return _WORD.findall(text)


def parse_expression(expr: str) -> Phrase:
    """Parse a referring expression of the grammar into a :class:`Phrase`.

    Raises ValueError when ``expr`` is not of the grammar.
    """
    pair = _PAIR.fullmatch(expr)
    if pair is not None:
        noun = Phrase(pair["color"], pair["shape"], pair["texture"], pair["size"])
        return Phrase(
            noun.color,
            noun.shape,
            noun.texture,
            noun.size,
            relation=_PAIR_RELATION[pair["word"]],
            reference=noun,
        )
    match = _PHRASE.fullmatch(expr)
    if match is None:
        raise ValueError(
            f"not a ShapesWorld expression: {expr!r}; expected for example 'a striped red circle'"
        )
    relation: str | None = None
    reference: Phrase | None = None
    rest = match["rest"]
    if rest in ("in front", "behind"):
        relation = "behind" if rest == "behind" else "front"
    elif rest is not None:
        joined = _REST.fullmatch(rest)
        if joined is None:
            raise ValueError(f"unknown relation {rest!r} in {expr!r}; known: {sorted(_JOIN)}")
        relation = next(name for name, text in _JOIN.items() if text == joined["join"])
        reference = parse_expression(joined["reference"])
    return Phrase(
        match["color"], match["shape"], match["texture"], match["size"], relation, reference
    )


def holds(scene: Scene, i: int, relation: str, j: int) -> bool | None:
    """Does object ``i`` stand in ``relation`` to object ``j``? None when too close to call."""
    a, b = scene.objects[i], scene.objects[j]
    if relation in ("front", "behind"):
        if not scene.overlaps[i][j]:
            return False
        return (i > j) == (relation == "front")
    if relation in ("larger", "smaller"):
        ratio = a.area / b.area if relation == "larger" else b.area / a.area
        return True if ratio >= MIN_AREA_RATIO else (False if ratio <= 1.0 else None)
    axis = 0 if relation in ("left", "right") else 1
    offset = b.center[axis] - a.center[axis]
    if relation in ("right", "below"):
        offset = -offset
    return True if offset >= MIN_OFFSET else (False if offset <= 0.0 else None)


def _stands(scene: Scene, i: int, relation: str) -> bool | None:
    """Is object ``i`` in front of (behind) everything it overlaps? None when it is between."""
    sides = {i > j for j in range(len(scene.objects)) if scene.overlaps[i][j]}
    if len(sides) == 2:
        return None
    return (relation == "front") in sides


def _noun(obj: Object, size: bool = False, texture: bool = False) -> str:
    parts = [obj.size] if size and obj.size else []
    parts += [obj.texture] if texture else []
    return " ".join([*parts, obj.color, obj.shape])


def _kin(scene: Scene, k: int) -> list[int]:
    """Indices of the other objects with object k's colour and shape."""
    kind = scene.objects[k].kind
    return [i for i, obj in enumerate(scene.objects) if i != k and obj.kind == kind]


def _noun_forms(scene: Scene, k: int) -> list[str]:
    target = scene.objects[k]
    forms = []
    for size, texture in ((False, False), (False, True), (True, False), (True, True)):
        if size and target.size is None:
            continue
        opposite = {"small": "large", "large": "small"}.get(target.size or "")
        told_apart = all(
            (texture and scene.objects[i].texture != target.texture)
            or (size and scene.objects[i].size == opposite)
            for i in _kin(scene, k)
        )
        if told_apart:
            forms.append("a " + _noun(target, size, texture))
    return forms


def expressions(scene: Scene, k: int) -> list[str]:
    """Return every expression of the grammar that singles out object ``k``, shortest first.

    The list is empty when nothing singles the object out; such scenes are not admitted by
    ``sample_scene``. Order is fixed: by number of words, then by the order of the rules.
    """
    target, kin, forms = scene.objects[k], _kin(scene, k), _noun_forms(scene, k)
    if len(kin) == 1:
        forms += [
            f"the {word} of the two {_noun(target)}s"
            for relation, word in _PAIR_WORD.items()
            if holds(scene, k, relation, kin[0])
        ]
    for relation, text in (("front", "in front"), ("behind", "behind")):
        if _stands(scene, k, relation) and all(_stands(scene, i, relation) is False for i in kin):
            forms.append(f"the {_noun(target)} {text}")
    for j, other in enumerate(scene.objects):
        if other.kind == target.kind or _kin(scene, j):
            continue
        forms += [
            f"the {_noun(target)} {text} the {_noun(other)}"
            for relation, text in _JOIN.items()
            if holds(scene, k, relation, j)
            and all(holds(scene, i, relation, j) is False for i in kin)
        ]
    return sorted(forms, key=lambda form: form.count(" "))


def draw_expression(forms: list[str], rng: np.random.Generator) -> str:
    """Draw one form; each word more halves its chance, which keeps sequences short."""
    weights = np.array([2.0 ** -form.count(" ") for form in forms])
    return forms[int(rng.choice(len(forms), p=weights / weights.sum()))]


def caption(scene: Scene) -> str:
    """Return the scene's caption: one noun, two nouns with their relation, or a comma list."""
    objects = scene.objects
    counts: dict[str, int] = {}
    for obj in objects:
        counts[_noun(obj)] = counts.get(_noun(obj), 0) + 1
    listed = [f"a {noun}" if n == 1 else f"two {noun}s" for noun, n in counts.items()]
    if len(listed) != 2 or len(objects) != 2:
        return ", ".join(listed)
    if scene.overlaps[0][1]:
        return f"{listed[1]} in front of {listed[0]}"
    dx, dy = (objects[1].center[axis] - objects[0].center[axis] for axis in (0, 1))
    if max(abs(dx), abs(dy)) < MIN_OFFSET:
        return f"{listed[0]}, {listed[1]}"
    relation = (
        ("left" if dx > 0 else "right") if abs(dx) >= abs(dy) else ("above" if dy > 0 else "below")
    )
    return f"{listed[0]} {_JOIN[relation]} {listed[1]}"
