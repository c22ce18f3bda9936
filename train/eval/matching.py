"""Compares the layout with what the judge sees: matches, attributes, average precision."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from scipy.optimize import linear_sum_assignment

from echogen.train.data.grammar import COLORS, SHAPES, parse_expression
from echogen.train.data.shapes import IMAGE_SIZE, Scene
from echogen.train.eval.judge import Detection, answer, box_iou

CLASSES = [(color, shape) for color in COLORS for shape in SHAPES]
ATTRIBUTES = ("spatial", "color", "texture", "shape")


def class_ious(scene: Scene, found: list[Detection]) -> np.ndarray:
    """For each object, its IoU with the detection of its class that it is matched to (0: none).

    Within a class, detections and objects are matched one to one for the largest total IoU.
    """
    ious = np.zeros((len(scene.objects), max(1, len(found))))
    for i, (o, box) in enumerate(zip(scene.objects, scene.boxes().tolist(), strict=True)):
        for j, d in enumerate(found):
            if (d.color, d.shape) == o.kind:
                ious[i, j] = box_iou(d.box, box)
    rows, columns = linear_sum_assignment(-ious)
    result = np.zeros(len(scene.objects))
    result[rows] = ious[rows, columns]
    return result


def attribute_answers(
    expressions: list[str], scene: Scene, found: list[Detection]
) -> dict[str, np.ndarray]:
    """LayoutSAM-Eval's four questions for every asked-for box; an attribute that the expression
    does not mention counts as yes where anything lies in the box."""
    answers: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for expr, box in zip(expressions, scene.boxes().tolist(), strict=True):
        asked = parse_expression(expr)
        for name in ATTRIBUTES:
            value = None if name == "spatial" else getattr(asked, name)
            answers[name].append(answer(found, box, name, value))
    return {name: np.array(values, dtype=float) for name, values in answers.items()}


def average_precision(scenes: list[Scene], found: list[list[Detection]]) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of the judge's detections, class = colour × shape."""
    truth = {
        "images": [{"id": i} for i in range(len(scenes))],
        "categories": [{"id": c + 1} for c in range(len(CLASSES))],
        "annotations": [
            _annotation(n + 1, i, o.kind, box)
            for n, (i, o, box) in enumerate(
                (i, o, box)
                for i, s in enumerate(scenes)
                for o, box in zip(s.objects, s.boxes().tolist(), strict=True)
            )
        ],
    }
    results = [
        _annotation(0, i, (d.color, d.shape), d.box) | {"score": d.score}
        for i, row in enumerate(found)
        for d in row
    ]
    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    from pycocotools.coco import COCO  # imported here, as training does not need it
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # the COCO API prints its progress
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("ap", "ap50", "ap75"), map(float, evaluation.stats[:3]), strict=True))


def _annotation(
    number: int, image: int, kind: tuple[str, str], box: tuple[float, ...]
) -> dict[str, object]:
    x1, y1, x2, y2 = (v * IMAGE_SIZE for v in box)
    return {
        "id": number,
        "image_id": image,
        "category_id": CLASSES.index(kind) + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
    }
