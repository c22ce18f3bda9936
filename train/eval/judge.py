"""The exact judge: reads objects, textures, depth and relations off the pixels of an image.

It learns nothing and never sees a layout, because a judge that picks the component best matching
the target flatters the model. From the world it knows only the palette and the shapes' masks.
Each colour's components are fitted with every shape; pixels of other objects count neither way,
since the shape may go on beneath them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from echogen.train.data.grammar import RELATIONS
from echogen.train.data.shapes import (
    COLORS,
    GROUND,
    IMAGE_SIZE,
    PALETTE,
    SHAPES,
    dark,
    shape_mask,
    texture_mask,
)  # fmt: skip

GROUND_LABEL, UNKNOWN_LABEL = len(COLORS), len(COLORS) + 1
IOU_MATCH = 0.5  # LayoutSAM-Eval: an answer is about the detection that overlaps the box this much

_SIDE_MIN, _SIDE_MAX = 10, 40  # the world's 12..36 px, with room for damage
_MAX_COLOR_DISTANCE = 60.0
_MIN_SCORE = 0.6
_MIN_SHOWN = 0.5  # of a shape's pixels must be seen, else the fit is guesswork
_GOOD_FIT = 0.985  # above this no search for a better box is worth its time
_HIDDEN_COST = 0.08  # of two equally good fits, the one that supposes less wins
_MIN_CONTRAST = 0.12  # of the palette's dark step; half-resolution copies keep about 0.2
_MUTUAL = 0.15  # two objects cannot each hide this share of the other
_MAX_PARTS = 6  # a colour: four objects at most, some split; keeps patchwork images affordable
_CORE = np.ones((3, 3), dtype=bool)  # an object has room for it, an edge's mixed pixels do not
_RUNS = 3  # at most this many runs of pixels in a row of a mask (a star's points)
_AXES = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two xyxy boxes, 0.0 when both are empty."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0.0) * max(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


@dataclass(frozen=True)
class Detection:
    """One object read off an image.

    ``box`` is xyxy in [0, 1], including what is supposed beneath other objects. ``score`` in
    [0, 1] is how well the seen region fills the shape (IoU over the pixels that can be known).
    ``depth`` is how many objects lie in the longest chain below this one: of two that overlap,
    the one in front has the larger depth.
    """

    shape: str
    color: str
    texture: str
    box: tuple[float, float, float, float]
    score: float
    depth: int = 0

    @property
    def center(self) -> tuple[float, float]:
        """Centre (x, y) in [0, 1]."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> float:
        """Area of the box, 1.0 for the whole image."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def iou(self, box: Sequence[float]) -> float:
        """IoU of this detection's box with another normalised xyxy box."""
        return box_iou(self.box, box)

    def mask(self) -> np.ndarray:
        """The fitted shape's pixels, bool [64, 64]."""
        return _template(SHAPES.index(self.shape), *(round(v * IMAGE_SIZE) for v in self.box))


@dataclass(frozen=True)
class _Fit:
    value: float  # score less the cost of what is supposed hidden
    score: float
    shape: int
    box: tuple[int, int, int, int]

    @property
    def whole(self) -> bool:
        """A good fit that supposes next to nothing hidden."""
        return self.score >= 0.95 and self.score - self.value <= 0.02 * _HIDDEN_COST


@lru_cache(maxsize=1)
def _color_table() -> np.ndarray:
    """Label of every RGB value at 5 bits a channel, uint8 [32768].

    A label covers the colour, its dark shade, their mixtures (a blurred texture) and mixtures
    with less than half ground (a blurred edge); further off than a limit is unknown.
    """
    ground, prototypes, labels = np.array(GROUND, dtype=np.float32), [], []
    for i, color in enumerate(COLORS):
        bright, shade = np.array(PALETTE[color], np.float32), np.array(dark(color), np.float32)
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            for pale in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
                prototypes.append((1 - pale) * ((1 - t) * bright + t * shade) + pale * ground)
                labels.append(i if pale < 0.5 else GROUND_LABEL)
    levels = np.arange(32, dtype=np.float32) * 8 + 4
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    points = np.stack(prototypes)
    square = (rgb**2).sum(1)[:, None] + (points**2).sum(1) - 2 * rgb @ points.T
    nearest = square.argmin(1)
    table = np.array(labels, dtype=np.uint8)[nearest]
    table[square.min(1) > _MAX_COLOR_DISTANCE**2] = UNKNOWN_LABEL
    return table


@lru_cache(maxsize=1)
def _run_table() -> tuple[np.ndarray, np.ndarray]:
    """Masks as runs of pixels: int16 [shape, h, w, row, run, 2] (start, end) and areas.

    Sums over a mask then cost two look-ups a row in a cumulative image, so hundreds of
    candidate boxes are scored in one call.
    """
    n = _SIDE_MAX + 1
    runs = np.zeros((len(SHAPES), n, n, _SIDE_MAX, _RUNS, 2), dtype=np.int16)
    areas = np.ones((len(SHAPES), n, n), dtype=np.float32)
    for s, shape in enumerate(SHAPES):
        for h in range(_SIDE_MIN, n):
            for w in range(_SIDE_MIN, n):
                mask = shape_mask(shape, h, w)
                areas[s, h, w] = mask.sum()
                step = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
                rows, ends = np.nonzero(step)
                order = np.arange(len(rows)) - np.searchsorted(rows, rows)
                assert order.max() < 2 * _RUNS, (shape, h, w)
                runs[s, h, w, rows, order // 2, order % 2] = ends
    return runs, areas


def _template(shape: int, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    canvas[y1:y2, x1:x2] = shape_mask(SHAPES[shape], y2 - y1, x2 - x1)
    return canvas


class _Fitter:
    """Scores candidate shapes and boxes against one region, given what may hide it."""

    def __init__(self, region: np.ndarray, hiding: np.ndarray) -> None:
        self.region, self.hiding = region, hiding
        self.count = int(region.sum())
        # Both sums ride in one table: pixels of the region low, pixels that are known high.
        packed = region.astype(np.int32) + (~hiding).astype(np.int32) * 65536
        table = np.zeros((IMAGE_SIZE, IMAGE_SIZE + 1), dtype=np.int32)
        np.cumsum(packed, axis=1, out=table[:, 1:])
        self.table = table.ravel()

    def score(self, shapes: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return value and score, float32 [N], of shapes int [N] in boxes int [N, 4]."""
        runs, areas = _run_table()
        x1, y1, x2, y2 = boxes.T
        heights, widths = y2 - y1, x2 - x1
        tall = int(heights.max())
        rows = np.minimum(y1[:, None] + np.arange(tall), IMAGE_SIZE - 1)
        start = (rows * (IMAGE_SIZE + 1) + x1[:, None])[:, :, None, None]
        sums = self.table[runs[shapes, heights, widths, :tall] + start]
        total = (sums[..., 1] - sums[..., 0]).sum((1, 2))
        seen, known = total & 65535, total >> 16
        score = seen / np.maximum(known + self.count - seen, 1)
        area = areas[shapes, heights, widths]
        value = score - _HIDDEN_COST * (1 - known / area)
        value[seen < _MIN_SHOWN * area] = 0.0
        return value, score

    def best(self, shapes: np.ndarray, boxes: np.ndarray, keep: int = 1) -> list[_Fit]:
        """Return the ``keep`` best fits of every shape in ``shapes`` in every legal box."""
        sides = boxes[:, 2:] - boxes[:, :2]
        legal = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] <= IMAGE_SIZE).all(1)
        legal &= (sides >= _SIDE_MIN).all(1) & (sides <= _SIDE_MAX).all(1)
        boxes = boxes[legal]
        if not len(boxes):
            return []
        each = np.repeat(shapes, len(boxes))
        every = np.tile(boxes, (len(shapes), 1))
        value, score = self.score(each, every)
        fits = []
        for i in np.argsort(-value, kind="stable")[:keep]:
            x1, y1, x2, y2 = every[i].tolist()
            fits.append(_Fit(float(value[i]), float(score[i]), int(each[i]), (x1, y1, x2, y2)))
        return fits


def _grid(*sides: Sequence[int]) -> np.ndarray:
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 4)


_NEIGHBOURS = _grid((-1, 0, 1), (-1, 0, 1), (-1, 0, 1), (-1, 0, 1))
_ALL_SHAPES = np.arange(len(SHAPES))


def _bounds(region: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _fit(region: np.ndarray, hiding: np.ndarray) -> _Fit | None:
    """Fit the best shape and (amodal) box to a region, or None if nothing plausible fits."""
    x1, y1, x2, y2 = _bounds(region)
    if x2 - x1 > _SIDE_MAX + 2 or y2 - y1 > _SIDE_MAX + 2:
        return None
    fitter = _Fitter(region, hiding)
    fits = fitter.best(_ALL_SHAPES, np.array([[x1, y1, x2, y2]]))
    if fits and fits[0].value >= _GOOD_FIT:
        return fits[0]
    # A side can lie further out only where another object adjoins it; also let every side
    # come in a little, since blur and specks push the tight box outwards.
    near = hiding[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1]
    room = (_SIDE_MAX - (x2 - x1), _SIDE_MAX - (y2 - y1))
    open_sides = (
        x1 > 0 and near[:, 0].any(),
        y1 > 0 and near[0].any(),
        x2 < IMAGE_SIZE and near[:, -1].any(),
        y2 < IMAGE_SIZE and near[-1].any(),
    )
    step = (2, 2, 2, 4, 8)[sum(map(bool, open_sides))]  # keeps the number of candidates in bounds
    reach = [range(0, max(room[i % 2], 0) + 1, step) if open_sides[i] else (0,) for i in range(4)]
    offsets = _grid(*reach) * np.array([-1, -1, 1, 1])
    fits = fits + fitter.best(_ALL_SHAPES, offsets + np.array([x1, y1, x2, y2]), keep=6)
    # Refine the best box of the two best shapes by hill climbing.
    refined: dict[int, _Fit] = {}
    for fit in sorted(fits, key=lambda f: -f.value):
        if fit.shape in refined or len(refined) == 2:
            continue
        for _ in range(4):
            found = fitter.best(np.array([fit.shape]), _NEIGHBOURS + np.array(fit.box))[0]
            if found.value <= fit.value + 1e-9:
                break
            fit = found
        refined[fit.shape] = fit
    best = max(refined.values(), key=lambda f: f.value, default=None)
    return best if best is not None and best.score >= _MIN_SCORE and best.value > 0 else None


def _regions(labels: np.ndarray, color: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return a colour's components: those with a solid core, and loose fragments."""
    parts, _ = ndimage.label(labels == color, structure=_CORE)
    cores: list[np.ndarray] = []
    fragments: list[np.ndarray] = []
    for i, where in enumerate(ndimage.find_objects(parts), start=1):
        inside = parts[where] == i
        area = int(inside.sum())
        if area < 4:
            continue
        region = np.zeros(labels.shape, dtype=bool)
        region[where] = inside
        solid = area >= 16 and ndimage.binary_erosion(inside, _CORE).any()
        (cores if solid else fragments).append(region)
    for parts_found in (cores, fragments):
        parts_found.sort(key=lambda r: -int(r.sum()))
    return cores, fragments


def _fit_color(
    cores: list[np.ndarray], fragments: list[np.ndarray], hiding: np.ndarray
) -> list[tuple[_Fit, np.ndarray]]:
    """Fit every object of one colour, joining parts that an object in front has split."""
    found = []
    pending = [(region, _fit(region, hiding)) for region in cores[:_MAX_PARTS]]
    loose: list[tuple[np.ndarray, _Fit | None]] = [(part, None) for part in fragments[:_MAX_PARTS]]
    while pending:
        region, fit = pending.pop(0)
        for others in (pending, loose):
            for i in range(len(others) - 1, -1, -1):
                part, alone = others[i]
                if fit and alone and fit.whole and alone.whole:
                    continue  # two whole objects of one colour
                joined = _fit(region | part, hiding)
                if joined and joined.value >= max(0.85, (fit.value if fit else 0.0) - 0.05):
                    region, fit = region | part, joined
                    others.pop(i)
        if fit is not None:
            found.append((fit, region))
    return found


@lru_cache(maxsize=1)
def _texture_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canvas pixels dark in dots and stripes, dark in stripes only, and bright in both."""
    dots, stripes = texture_mask("dotted"), texture_mask("striped")
    return dots, stripes & ~dots, ~stripes


def _read_texture(image: np.ndarray, region: np.ndarray, color: int) -> str:
    """Compare darkness on the cells where the textures differ; contrast, not level, decides."""
    inner = ndimage.binary_erosion(region, _CORE)
    if inner.sum() >= 24:
        region = inner
    bright, shade = np.array(PALETTE[COLORS[color]]), np.array(dark(COLORS[color]))
    axis = (shade - bright) / ((shade - bright) ** 2).sum()
    # Clipped, because pixels mixed with ground lie beyond the bright end and mean nothing here.
    darkness = np.clip((image - bright) @ axis, 0.0, 1.0)
    levels = []
    for cells in _texture_cells():
        where = region & cells
        if not where.any():
            return "solid"
        levels.append(float(darkness[where].mean()))
    dot, row, rest = levels
    if dot - rest < _MIN_CONTRAST:
        return "solid"
    return "striped" if row - rest > 0.5 * (dot - rest) else "dotted"


def _consistent(found: list[tuple[_Fit, np.ndarray, int]]) -> list[tuple[_Fit, np.ndarray, int]]:
    """Drop objects that suppose themselves beneath each other: a patchwork, not a scene."""
    masks = [_template(fit.shape, *fit.box) for fit, _, _ in found]
    beneath = [
        [float((mask & region).sum()) > _MUTUAL * float(mask.sum()) for _, region, _ in found]
        for mask in masks
    ]
    n = range(len(found))
    return [found[i] for i in n if not any(j != i and beneath[i][j] and beneath[j][i] for j in n)]


def _depths(fits: list[_Fit], colors: list[int], labels: np.ndarray) -> list[int]:
    """Length of the longest chain of objects beneath each one, from who shows where two meet."""
    masks = [_template(fit.shape, *fit.box) for fit in fits]
    below: list[list[int]] = [[] for _ in fits]
    for i in range(len(fits)):
        for j in range(i):
            shared = labels[masks[i] & masks[j]]
            first, second = int((shared == colors[i]).sum()), int((shared == colors[j]).sum())
            if first != second:
                front, back = (i, j) if first > second else (j, i)
                below[front].append(back)
    depths = [0] * len(fits)
    for _ in fits:  # as many rounds as objects also ends a cycle, which only damage can make
        depths = [max((depths[j] + 1 for j in below[i]), default=0) for i in range(len(fits))]
    return depths


def _as_canvas(image: np.ndarray | Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 RGB image [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    if pixels.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        resized = Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)
        pixels = np.asarray(resized)
    return pixels


def detect(image: np.ndarray | Image.Image) -> list[Detection]:
    """Find every object of an image from its pixels alone, best score first.

    ``image`` is a PIL image or uint8 [H, W, 3]; other sizes than 64x64 are resized by nearest
    neighbour. Returns an empty list when nothing looks like an object of the world. Raises
    ValueError for another dtype or shape.
    """
    pixels = _as_canvas(image)
    bits = (pixels >> 3).astype(np.int32)
    labels = _color_table()[(bits[..., 0] << 10) | (bits[..., 1] << 5) | bits[..., 2]]
    parts = {c: _regions(labels, c) for c in range(len(COLORS)) if (labels == c).any()}
    # Only solid regions can hide something: specks and mixed pixels count as damage.
    solid = np.full(labels.shape, -1, dtype=np.int8)
    for color, (cores, _) in parts.items():
        for region in cores:
            solid[region] = color
    found = [
        (fit, region, color)
        for color, (cores, fragments) in parts.items()
        for fit, region in _fit_color(cores, fragments, (solid >= 0) & (solid != color))
    ]
    found = _consistent(found)
    depths = _depths([fit for fit, _, _ in found], [color for _, _, color in found], labels)
    detections = []
    for (fit, region, color), depth in zip(found, depths, strict=True):
        x1, y1, x2, y2 = (side / IMAGE_SIZE for side in fit.box)
        texture = _read_texture(pixels, region, color)
        detections.append(
            Detection(SHAPES[fit.shape], COLORS[color], texture, (x1, y1, x2, y2), fit.score, depth)
        )
    return sorted(detections, key=lambda d: -d.score)


def best_match(detections: Sequence[Detection], box: Sequence[float]) -> Detection | None:
    """Return the detection overlapping ``box`` most, or None if none reaches IoU 0.5."""
    best = max(detections, key=lambda d: d.iou(box), default=None)
    return best if best is not None and best.iou(box) >= IOU_MATCH else None


def answer(
    detections: Sequence[Detection],
    box: Sequence[float],
    attribute: str,
    value: str | None = None,
) -> bool:
    """Answer one LayoutSAM-Eval question about the object that should lie in ``box``.

    ``attribute`` is "spatial" (does any object lie there? ``value`` is not used), "color",
    "texture" or "shape"; the last three ask about the best-overlapping detection. A ``value`` of
    None (attribute not mentioned) counts as yes if an object lies there. Raises ValueError for
    another attribute.
    """
    if attribute not in ("spatial", "color", "texture", "shape"):
        raise ValueError(f"unknown attribute {attribute!r}; known: spatial, color, texture, shape")
    match = best_match(detections, box)
    if match is None:
        return False
    return attribute == "spatial" or value is None or getattr(match, attribute) == value


def related(a: Detection, b: Detection, relation: str) -> bool:
    """Does ``a`` stand in ``relation`` to ``b``, as read off the image?

    ``relation``: left, right, above, below (of box centres), larger, smaller (of box areas),
    front, behind (only objects whose shapes overlap). Raises ValueError for another relation.
    """
    if relation in _AXES:
        axis, sign = _AXES[relation]
        return sign * (b.center[axis] - a.center[axis]) > 0
    if relation in ("larger", "smaller"):
        return a.area > b.area if relation == "larger" else a.area < b.area
    if relation in ("front", "behind"):
        if not (a.mask() & b.mask()).any():
            return False
        return a.depth > b.depth if relation == "front" else a.depth < b.depth
    raise ValueError(f"unknown relation {relation!r}; known: {RELATIONS}")
