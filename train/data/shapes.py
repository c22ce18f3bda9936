"""ShapesWorld: a procedural world of captioned layouts in which every answer is exact.

Real data sets and pretrained weights cannot ship with the repository. Here every image, box,
caption and expression follows from (split, index, seed), so training and every table of the
evaluation can be reproduced from the source alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from echogen.train.data import grammar
from echogen.train.data.grammar import COLORS, SHAPES, TEXTURES, Phrase, parse_expression

if TYPE_CHECKING:
    from echogen.engine.layout import Layout
    from echogen.train.eval.judge import Detection

__all__ = [
    "COLORS",
    "GROUND",
    "IMAGE_SIZE",
    "PALETTE",
    "SHAPES",
    "SPLITS",
    "TEXTURES",
    "DrawStatistics",
    "Object",
    "Phrase",
    "Scene",
    "draw_statistics",
    "parse_expression",
    "read_correctly",
    "sample_scene",
    "shape_mask",
]  # fmt: skip

IMAGE_SIZE = 64
GROUND = (240, 238, 230)
# Far apart from each other, from the ground, and from each other's dark shades, so that a
# slightly blurred reconstruction still reads as the same colour.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (50, 170, 70),
    "blue": (40, 70, 230),
    "yellow": (245, 200, 30),
    "purple": (175, 50, 200),
    "cyan": (30, 200, 225),
}
DARK_SHADE = 0.55
SIDE_MIN, SIDE_MAX = 12, 36
SPLITS = ("train", "val", "test")
_SPLIT_PERCENT = (90, 5, 5)

_COUNT_CHANCES = (0.20, 0.30, 0.28, 0.22)  # of 1, 2, 3, 4 objects
_SIDE_LIMIT = (36, 36, 30, 26)  # crowded scenes use smaller objects, else occlusion hides them
_TWIN_CHANCE = 0.2  # of a same-kind pair, given two objects or more
_OVERLAP_CHANCE = 0.4  # per object after the first
_MIN_VISIBLE = 0.6
_MIN_OVERLAP = 0.08  # of the smaller mask: below this, depth could hardly be seen
_MAX_DRAWS = 4000


def dark(color: str) -> tuple[int, int, int]:
    """Return the darker shade (uint8 RGB) that textures alternate with ``color``."""
    r, g, b = PALETTE[color]
    return round(r * DARK_SHADE), round(g * DARK_SHADE), round(b * DARK_SHADE)


def texture_mask(texture: str) -> np.ndarray:
    """Return the canvas-wide dark pixels of a texture, bool [64, 64].

    The phase is locked to the canvas, not to the object: an 8x8 patch inside a striped red
    object is then always the same patch, which keeps the VQ codebook small.
    """
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    if texture == "striped":
        return y % 4 < 2
    if texture == "dotted":
        return (y % 4 < 2) & (x % 4 < 2)
    return np.zeros_like(y, dtype=bool)


@cache
def _tile(color: str, texture: str) -> np.ndarray:
    pixels = np.where(texture_mask(texture)[..., None], dark(color), PALETTE[color])
    return pixels.astype(np.uint8)


def _star_mask(height: int, width: int) -> np.ndarray:
    angle = np.pi * (np.arange(10) / 5 - 0.5)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    px = (px / np.cos(np.pi / 10) + 1) / 2 * width
    py = (py + 1) / (1 + np.cos(np.pi / 5)) * height
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), dtype=bool)
    for i in range(10):  # even-odd rule: toggle at each edge to the right of the pixel centre
        x1, y1, x2, y2 = px[i - 1], py[i - 1], px[i], py[i]
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    # A tip is thinner than a pixel; drawn as a line towards the centre, it is neither lost nor
    # cut off, and the star touches all four box edges.
    for t in np.linspace(0.0, 0.4, 2 * SIDE_MAX):
        tip_x, tip_y = px[::2] + t * (width / 2 - px[::2]), py[::2] + t * (height / 2 - py[::2])
        column = np.clip(np.floor(tip_x), 0, width - 1).astype(int)
        inside[np.clip(np.floor(tip_y), 0, height - 1).astype(int), column] = True
    return inside | inside[:, ::-1]


@cache
def shape_mask(shape: str, height: int, width: int) -> np.ndarray:
    """Return the pixels of ``shape`` in a box of height x width pixels, bool [height, width].

    The mask touches all four sides of the box. It is cached and must not be written to.
    Raises ValueError for an unknown shape.
    """
    y, x = np.mgrid[:height, :width] + 0.5
    off_axis = np.abs(x - width / 2)
    if shape == "square":
        mask = np.ones((height, width), dtype=bool)
    elif shape == "circle":
        mask = (2 * off_axis / width) ** 2 + (2 * y / height - 1) ** 2 <= 1
    elif shape == "triangle":
        # The 0.5 keeps the apex drawn where the sides are closer than a pixel.
        mask = off_axis <= np.maximum(width / 2 * (y + 0.5) / height, 0.5)
    elif shape == "star":
        mask = _star_mask(height, width)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {SHAPES}")
    mask.setflags(write=False)
    return mask


@dataclass(frozen=True)
class Object:
    """One object: class, texture and its pixel box (x1, y1, x2, y2), right and bottom exclusive."""

    shape: str
    color: str
    texture: str
    box: tuple[int, int, int, int]

    @property
    def kind(self) -> tuple[str, str]:
        """(color, shape): the class an evaluation counts by."""
        return self.color, self.shape

    @property
    def area(self) -> int:
        """Area of the box in square pixels."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box (x, y) in pixels."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def size(self) -> str | None:
        """Size word, or None between small and large."""
        return grammar.size_word(self.area)

    def mask(self) -> np.ndarray:
        """Return the object's pixels as if nothing covered it, bool [64, 64]."""
        x1, y1, x2, y2 = self.box
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        canvas[y1:y2, x1:x2] = shape_mask(self.shape, y2 - y1, x2 - x1)
        return canvas


@dataclass(frozen=True)
class Scene:
    """Objects back to front: a later object covers an earlier one."""

    objects: tuple[Object, ...]

    def image(self) -> np.ndarray:
        """Render the scene, uint8 RGB [64, 64, 3]."""
        image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        image[:] = GROUND
        for obj in self.objects:
            x1, y1, x2, y2 = obj.box
            mask = shape_mask(obj.shape, y2 - y1, x2 - x1)
            tile = _tile(obj.color, obj.texture)[y1:y2, x1:x2]
            np.copyto(image[y1:y2, x1:x2], tile, where=mask[..., None])
        return image

    def boxes(self) -> np.ndarray:
        """Return float32 [K, 4] boxes (x1, y1, x2, y2) normalised to [0, 1], never clipped."""
        return np.array([obj.box for obj in self.objects], dtype=np.float32) / IMAGE_SIZE

    @cached_property
    def masks(self) -> np.ndarray:
        """Amodal masks, bool [K, 64, 64]."""
        return np.stack([obj.mask() for obj in self.objects])

    @cached_property
    def overlaps(self) -> list[list[bool]]:
        """K x K: which objects share pixels (an object does not overlap itself)."""
        flat = self.masks.reshape(len(self.objects), -1).astype(np.float32)
        shared = flat @ flat.T > 0
        np.fill_diagonal(shared, False)
        return shared.tolist()

    def caption(self) -> str:
        """Return the scene's caption."""
        return grammar.caption(self)

    def expressions(self, k: int) -> list[str]:
        """Return all expressions that single out object ``k``, the canonical shortest first."""
        return grammar.expressions(self, k)

    def layout(self, rng: np.random.Generator | None = None) -> Layout:
        """Return the layout; with ``rng`` each expression's form is drawn, else canonical."""
        from echogen.engine.layout import Layout, LayoutObject

        chosen = []
        for k, obj in enumerate(self.objects):
            forms = self.expressions(k)
            expr = forms[0] if rng is None else grammar.draw_expression(forms, rng)
            x1, y1, x2, y2 = (side / IMAGE_SIZE for side in obj.box)
            chosen.append(LayoutObject(expr=expr, box=(x1, y1, x2, y2)))
        return Layout(caption=self.caption(), objects=tuple(chosen))

    def split(self) -> str:
        """Return the split this layout belongs to, whatever drew it.

        Textures and depth order are left out of the hash, so a layout and its repainted copy
        never fall on different sides of the split.
        """
        content = sorted((o.shape, o.color, o.box) for o in self.objects)
        digest = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
        percent = int.from_bytes(digest, "big") % 100
        for name, share in zip(SPLITS, _SPLIT_PERCENT, strict=True):
            if percent < share:
                return name
            percent -= share
        raise AssertionError("split shares do not add up to 100")


@dataclass
class DrawStatistics:
    """Why proposals were drawn again; ``kept`` counts the scenes that were returned.

    Tests are made in the order of the fields, so each proposal is counted once.
    """

    wrong_split: int = 0
    hidden: int = 0
    not_referable: int = 0
    misread: int = 0
    kept: int = 0

    def shares(self) -> dict[str, float]:
        """Share of each cause among the proposals that got as far as its test."""
        left, result = sum(getattr(self, field.name) for field in fields(self)), {}
        for field in fields(self)[:-1]:
            count = getattr(self, field.name)
            result[field.name] = count / left if left else 0.0
            left -= count
        return result


def _place(
    rng: np.random.Generator, placed: list[Object], count: int, overlap: bool
) -> tuple[int, int, int, int]:
    """Draw a box; the last of a few tries is returned even if it collides (it is then redrawn)."""
    limit = _SIDE_LIMIT[count - 1] + 1
    box = (0, 0, SIDE_MIN, SIDE_MIN)
    for u, v, s, t in rng.random((12, 4)).tolist():
        w, h = SIDE_MIN + int(s * (limit - SIDE_MIN)), SIDE_MIN + int(t * (limit - SIDE_MIN))
        if overlap and placed:  # anywhere the last object is touched, else too few overlap
            x1, y1, x2, y2 = placed[-1].box
            x, y = x1 - w + int(u * (x2 - x1 + w)), y1 - h + int(v * (y2 - y1 + h))
            x, y = min(max(x, 0), IMAGE_SIZE - w), min(max(y, 0), IMAGE_SIZE - h)
        else:
            x, y = int(u * (IMAGE_SIZE - w + 1)), int(v * (IMAGE_SIZE - h + 1))
        box = (x, y, x + w, y + h)
        covered = []
        for other in placed:
            x1, y1, x2, y2 = other.box
            dx, dy = min(x + w, x2) - max(x, x1), min(y + h, y2) - max(y, y1)
            shared = dx * dy / min(w * h, other.area) if dx > 0 and dy > 0 else 0.0
            covered.append(shared if shared or min(dx, dy) < 0 else -1.0)
        worst = max(covered, default=0.0)
        if overlap and placed:
            if 0.15 <= worst <= 0.5:
                break
        elif worst == 0.0 and min(covered, default=0.0) >= 0.0:
            break
    return box


def _propose(rng: np.random.Generator) -> Scene:
    u = rng.random(3).tolist()
    count = 1 + int(np.searchsorted(np.cumsum(_COUNT_CHANCES)[:-1], u[0], side="right"))
    objects: list[Object] = []
    kinds: list[tuple[str, str]] = []
    for k in range(count):
        a, b, c, d, e = rng.random(5).tolist()
        shape, color = SHAPES[int(a * len(SHAPES))], COLORS[int(b * len(COLORS))]
        texture = TEXTURES[int(c * len(TEXTURES))]
        if k == 1 and u[1] < _TWIN_CHANCE:
            color, shape = kinds[0]
            # Mostly the same texture too, so that only a relation tells the two apart.
            texture = objects[0].texture if e < 0.6 else texture
        else:
            while (color, shape) in kinds:
                color = COLORS[(COLORS.index(color) + 1) % len(COLORS)]
        kinds.append((color, shape))
        same_color = any(other.color == color for other in objects)
        overlap = d < _OVERLAP_CHANCE and not (same_color and k == 1)
        objects.append(Object(shape, color, texture, _place(rng, objects, count, overlap)))
    order = rng.permutation(count).tolist()
    return Scene(tuple(objects[i] for i in order))


def _clear(scene: Scene) -> bool:
    """Is every object mostly visible, every overlap plain, and no colour merged with itself?"""
    masks = scene.masks
    areas = masks.sum((1, 2))
    above = np.zeros_like(masks[0])
    for k in range(len(masks) - 1, -1, -1):
        if (masks[k] & ~above).sum() < _MIN_VISIBLE * areas[k]:
            return False
        above = above | masks[k]
    for i, a in enumerate(scene.objects):
        for j in range(i):
            b = scene.objects[j]
            if a.color == b.color:
                # Canvas-locked textures leave no edge between touching objects of one colour.
                grown = masks[i].copy()
                grown[1:] |= masks[i][:-1]
                grown[:-1] |= masks[i][1:]
                grown[:, 1:] |= grown[:, :-1].copy()
                grown[:, :-1] |= grown[:, 1:].copy()
                if (grown & masks[j]).any():
                    return False
            elif scene.overlaps[i][j]:
                shared = (masks[i] & masks[j]).sum()
                if shared < _MIN_OVERLAP * min(areas[i], areas[j]):
                    return False
    return True


def read_correctly(scene: Scene, detections: Sequence[Detection], min_iou: float = 0.75) -> bool:
    """Do the judge's detections match the scene one to one in class, texture, box and depth?

    Depth is compared for the pairs that overlap; ``min_iou`` is asked of every box.
    """
    from echogen.train.eval.judge import related

    if len(detections) != len(scene.objects):
        return False
    unused, matched = list(detections), []
    for obj, box in zip(scene.objects, scene.boxes().tolist(), strict=True):
        for found in unused:
            wanted = (obj.shape, obj.color, obj.texture)
            if (found.shape, found.color, found.texture) == wanted and found.iou(box) >= min_iou:
                unused.remove(found)
                matched.append(found)
                break
        else:
            return False
    pairs = [(i, j) for i in range(len(matched)) for j in range(i) if scene.overlaps[i][j]]
    return all(related(matched[i], matched[j], "front") for i, j in pairs)


def sample_scene(
    split: str,
    index: int,
    seed: int = 0,
    *,
    judged: bool = True,
    statistics: DrawStatistics | None = None,
) -> Scene:
    """Return scene ``index`` of ``split``, a pure function of (split, index, seed, judged).

    Proposals are drawn again when their layout belongs to another split, when an object is
    too hidden, when no expression singles an object out, and (``judged``) when the judge
    misreads the true image. ``statistics`` is updated in place with the count of each.
    Raises ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"got split {split!r}, index {index}; want one of {SPLITS}, index >= 0")
    # Late import: the judge takes its palette and masks from this module.
    from echogen.train.eval.judge import detect

    tally = DrawStatistics() if statistics is None else statistics
    rng = np.random.default_rng(np.random.SeedSequence((seed, SPLITS.index(split), index)))
    for _ in range(_MAX_DRAWS):
        scene = _propose(rng)
        if scene.split() != split:
            tally.wrong_split += 1
        elif not _clear(scene):
            tally.hidden += 1
        elif not all(scene.expressions(k) for k in range(len(scene.objects))):
            tally.not_referable += 1
        elif judged and not read_correctly(scene, detect(scene.image())):
            tally.misread += 1
        else:
            tally.kept += 1
            return scene
    raise RuntimeError(f"no valid scene in {_MAX_DRAWS} draws for {split!r} {index}, seed {seed}")


def draw_statistics(split: str, count: int, seed: int = 0) -> DrawStatistics:
    """Draw ``count`` scenes of ``split`` and return why proposals were drawn again."""
    tally = DrawStatistics()
    for index in range(count):
        sample_scene(split, index, seed, statistics=tally)
    return tally
