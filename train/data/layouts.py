"""Layouts without images, for Cycle RL: drawn at random, or read from a file with one per line.

Both follow the same rules, which layouts from other sources can be checked against too.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np

from echogen.engine.config import ModelConfig
from echogen.engine.layout import Layout, LayoutError, read_text
from echogen.engine.prompt import Prompts
from echogen.train.data.grammar import COLORS, SHAPES, TEXTURES, parse_expression
from echogen.train.data.shapes import IMAGE_SIZE, SIDE_MAX, SIDE_MIN, Object, Scene
from echogen.train.eval.judge import box_iou

MOST_OBJECTS = 10  # PlanGen's limit
SMALLEST_SIDE = 0.03  # below it a box is less than an image code wide, in Janus-Pro's 24×24 codes
MOST_IN_WORLD = 4
LARGEST_IOU = 0.8  # above it two boxes nearly coincide, and the lower object cannot be seen
MOST_DRAWS = 1000


def check_layout(layout: Layout) -> None:
    """Check that recovering a (valid) layout from an image can serve as a reward.

    Raises:
        LayoutError: too many objects, two of them with the same expression, a box too small to be
            drawn, two boxes that nearly coincide.
    """
    if len(layout.objects) > MOST_OBJECTS:
        raise LayoutError(f"layout has {len(layout.objects)} objects; leave at most {MOST_OBJECTS}")
    for i, o in enumerate(layout.objects, 1):
        side = min(o.box[2] - o.box[0], o.box[3] - o.box[1])
        if side < SMALLEST_SIDE:
            raise LayoutError(
                f"object {i} ({o.expr!r}): its box is {side:.3g} of the canvas wide or high; "
                f"make it at least {SMALLEST_SIDE}"
            )
    for (i, a), (j, b) in combinations(enumerate(layout.objects, 1), 2):
        if a.expr == b.expr:
            raise LayoutError(f"objects {i} and {j} are both {a.expr!r}; tell them apart")
        if box_iou(a.box, b.box) > LARGEST_IOU:
            raise LayoutError(
                f"objects {i} and {j}: their boxes overlap by IoU {box_iou(a.box, b.box):.2f}; "
                f"keep it to {LARGEST_IOU}"
            )


def scene_of(layout: Layout) -> Scene:
    """The scene that a layout of ShapesWorld describes, on its grid of pixels. An object whose
    texture is not named gets, if possible, one that is not named for any other of its shape and
    colour.

    Raises:
        LayoutError: an expression outside the world's language, or a size of a box or a number of
            boxes that the world does not have.
    """
    if (count := len(layout.objects)) > MOST_IN_WORLD:
        raise LayoutError(f"layout has {count} objects; ShapesWorld draws 1 to {MOST_IN_WORLD}")
    phrases = []
    for i, o in enumerate(layout.objects, 1):
        try:
            phrases.append(parse_expression(o.expr))
        except ValueError as error:
            raise LayoutError(f"object {i}: {error}") from None
    named = {(p.shape, p.color, p.texture) for p in phrases}
    objects = []
    for i, (o, p) in enumerate(zip(layout.objects, phrases, strict=True), 1):
        x1, y1, x2, y2 = (round(v * IMAGE_SIZE) for v in o.box)
        if not all(SIDE_MIN <= side <= SIDE_MAX for side in (x2 - x1, y2 - y1)):
            raise LayoutError(
                f"object {i} ({o.expr!r}): its box is {o.box[2] - o.box[0]:.3g} wide and "
                f"{o.box[3] - o.box[1]:.3g} high; ShapesWorld's are {SIDE_MIN / IMAGE_SIZE:.3g} "
                f"to {SIDE_MAX / IMAGE_SIZE:.3g}"
            )
        free = [t for t in TEXTURES if (p.shape, p.color, t) not in named]
        texture = p.texture or (free or TEXTURES)[0]
        objects.append(Object(p.shape, p.color, texture, (x1, y1, x2, y2)))
    return Scene(tuple(objects))


def check_truth(layout: Layout, scene: Scene) -> None:
    """Check that every expression is true of its object and singles it out, and that no object is
    more than half beneath others: else the layout cannot be drawn, or not be found. Raises
    LayoutError."""
    for k, o in enumerate(layout.objects):
        forms = scene.expressions(k)
        if o.expr not in forms:
            hint = f"{forms[0]!r} does" if forms else "nothing does; change the layout"
            raise LayoutError(f"object {k + 1}: {o.expr!r} does not single it out here; {hint}")
    if not seen(scene):
        raise LayoutError("an object is more than half beneath those behind it in the list; "
                          "move it, or list it later")  # fmt: skip


def check_split(scene: Scene) -> None:
    """Refuse a layout that models are validated or tested on. Raises LayoutError."""
    if (split := scene.split()) != "train":
        raise LayoutError(f"it is one of ShapesWorld's {split} layouts; move a box")


def check_room(layout: Layout, prompts: Prompts, config: ModelConfig) -> None:
    """Check that a model has room for the prompt and its image. Raises LayoutError."""
    length = len(prompts.l2i(layout)) + config.image_tokens
    if length > config.max_positions:
        raise LayoutError(
            f"takes {length} tokens with its image; this model has room for "
            f"{config.max_positions}, so shorten its texts or name fewer objects"
        )


def read_layouts(path: str | Path) -> list[Layout]:
    """Read a file with one JSON layout per line; empty lines are skipped.

    Raises:
        LayoutError: a file that cannot be read or holds none, or the first line that is not a
            layout or fails `check_layout`; the message names file and line.
    """
    layouts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            layouts.append(Layout.loads(line))
            check_layout(layouts[-1])
        except LayoutError as error:
            raise LayoutError(f"{path}: line {number}: {error}") from None
    if not layouts:
        raise LayoutError(f"{path}: holds no layout; write one JSON object a line")
    return layouts


def random_layout(rng: np.random.Generator) -> Layout:
    """Draw a layout that has no image: one to four objects, with class, texture and box each drawn
    uniformly and independently, in ShapesWorld's language.

    It is drawn again until it passes `check_layout`, an expression singles out every object, none
    is more than half beneath others, and it is not a validation or test layout. Unlike
    ShapesWorld's own layouts it does not follow how scenes are composed there: crowding, sizes that
    fall with the count, how often objects overlap.
    """
    for _ in range(MOST_DRAWS):
        scene = Scene(tuple(_object(rng) for _ in range(rng.integers(1, 5))))
        if scene.split() != "train" or not seen(scene):
            continue
        if not all(scene.expressions(k) for k in range(len(scene.objects))):
            continue
        layout = scene.layout(rng)
        try:
            check_layout(layout)
        except LayoutError:
            continue
        return layout
    raise RuntimeError(f"no valid layout in {MOST_DRAWS} draws")


def _object(rng: np.random.Generator) -> Object:
    shape, color, texture = (str(rng.choice(names)) for names in (SHAPES, COLORS, TEXTURES))
    width, height = rng.integers(SIDE_MIN, SIDE_MAX + 1, size=2).tolist()
    x = int(rng.integers(IMAGE_SIZE - width + 1))
    y = int(rng.integers(IMAGE_SIZE - height + 1))
    return Object(shape, color, texture, (x, y, x + width, y + height))


def seen(scene: Scene) -> bool:
    """Whether at least half of every object is visible."""
    above = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for mask in scene.masks[::-1]:
        if (mask & ~above).sum() < 0.5 * mask.sum():
            return False
        above = above | mask
    return True
