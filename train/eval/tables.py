"""The tables of an evaluation on ShapesWorld: L2I, I2L, cycle, and the judge's ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import JanusVQVAE

from echogen.engine.decoding.decode import decode_image
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.ground import ground_images
from echogen.engine.images.vision import decode_codes, encode_image, to_images, to_pixels
from echogen.engine.layout import Box, Layout
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import Prompts
from echogen.kernels.boxes import box_reward
from echogen.train.data.scenes import load_scenes, load_statistics, render
from echogen.train.data.shapes import Scene
from echogen.train.eval.intervals import estimate, mean
from echogen.train.eval.judge import Detection, box_iou, detect
from echogen.train.eval.matching import (
    ATTRIBUTES,
    attribute_answers,
    average_precision,
    class_ious,
)
from echogen.train.stages.rollouts import targets

if TYPE_CHECKING:
    from collections.abc import Callable

    from echogen.engine.engine import Engine
    from echogen.train.data.source import Judge

BATCH = 32
QUICK = 64
"""Layouts drawn by `quick_scores`."""
MACC_THRESHOLDS = np.round(np.arange(0.5, 0.951, 0.05), 2)  # Ref-L4: ten thresholds


def layouts_of(scenes: list[Scene], seed: int) -> list[Layout]:
    """One layout per scene, with the wording of its expressions drawn from (seed, place)."""
    return [s.layout(np.random.default_rng((seed, i))) for i, s in enumerate(scenes)]


def expressions_of(layouts: list[Layout]) -> list[list[str]]:
    """The expressions of every layout."""
    return [[o.expr for o in layout.objects] for layout in layouts]


def judge_boxes(pixels: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The judge's mean IoU and accuracy at 0.5 on pictures [N, 3, H, W] of known scenes."""
    ious = [class_ious(s, detect(i)) for s, i in zip(scenes, to_images(pixels), strict=True)]
    flat = np.concatenate(ious)
    return {"judge_iou": float(flat.mean()), "judge_acc50": float((flat >= 0.5).mean())}


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two feature sets [N, F] as Gaussians (Heusel et al. 2017).

    The trace of √(C₁·C₂) is computed as the sum of the singular values of √C₁·√C₂, as the root of
    the product itself is not safe to compute with fewer samples than features.
    """
    mean = a.mean(0) - b.mean(0)
    roots, spread = [], 0.0
    for x in (a, b):
        values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
        values = np.maximum(values, 0)  # rounding can make zeros slightly negative
        roots.append(vectors * np.sqrt(values) @ vectors.T)
        spread += values.sum()
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(mean @ mean + spread - 2 * shared)


@torch.no_grad()
def vq_features(vq: JanusVQVAE, pixels: Tensor) -> np.ndarray:
    """Encoder features averaged over the grid, float64 [N, latent]."""
    weight = vq.quant_conv.weight
    parts = [
        vq.encoder(p.to(weight.device, weight.dtype)).mean((2, 3)).double().cpu()
        for p in pixels.split(BATCH)
    ]
    return torch.cat(parts).numpy()


def l2i_table(
    scenes: list[Scene], layouts: list[Layout], found: list[list[Detection]]
) -> dict[str, Any]:
    """AP, AP50, AP75, accuracy at IoU 0.5 and 0.75, and LayoutSAM-Eval's four answers."""
    ious = [class_ious(s, d) for s, d in zip(scenes, found, strict=True)]
    answers = [
        attribute_answers(e, s, d)
        for e, s, d in zip(expressions_of(layouts), scenes, found, strict=True)
    ]
    values = {
        "acc50": [(v >= 0.5).astype(float) for v in ious],
        "acc75": [(v >= 0.75).astype(float) for v in ious],
        "judge_iou": ious,
        **{name: [a[name] for a in answers] for name in ATTRIBUTES},
    }
    return average_precision(scenes, found) | _with_intervals(values)


def i2l_table(targets: list[np.ndarray], boxes: list[list[Box]]) -> dict[str, Any]:
    """Ref-L4's accuracies of recovered boxes against true ones."""
    ious = [
        np.array([box_iou(a, b) for a, b in zip(t.tolist(), row, strict=True)])
        for t, row in zip(targets, boxes, strict=True)
    ]
    values = {f"acc{round(100 * t)}": [(v >= t) * 1.0 for v in ious] for t in (0.5, 0.75, 0.9)}
    values["macc"] = [(v[:, None] >= MACC_THRESHOLDS).mean(1) for v in ious]
    values["mean_iou"] = ious
    return _with_intervals(values)


def _with_intervals(values: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    estimates = {name: estimate(per_image) for name, per_image in values.items()}
    means: dict[str, Any] = {name: e.mean for name, e in estimates.items()}
    return means | {"interval95": {name: e.to_list() for name, e in estimates.items()}}


def evaluate(
    engine: Engine,
    split: str,
    count: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """All tables of a model on ``count`` scenes of a split.

    Drawing uses the engine's default sampling; grounding is free-running constrained decoding.
    ``progress`` is called with the number of scenes done and the total.

    Returns:
        JSON-ready data with ``l2i``, ``i2l``, ``cycle``, ``judge_ceiling`` (accuracy at IoU 0.5 of
        the judge on the true pictures), ``vq_ceiling`` (the L2I table of the true pictures after a
        round trip through the image tokenizer), ``misread`` (the share of otherwise valid scenes
        that the judge misread when they were made, and that were drawn again; None: unknown, as
        the scenes were cached before it was counted) and ``count``.
    """
    scenes = load_scenes(split, count)
    layouts = layouts_of(scenes, seed)
    expressions = expressions_of(layouts)
    true = render(scenes, engine.image_size)
    pixels = to_pixels(true)
    true_codes = torch.cat([encode_image(engine.vq, p) for p in pixels.split(BATCH)])
    drawn, recovered, self_boxes = [], [], []
    for i in range(0, count, BATCH):
        rows = slice(i, i + BATCH)
        draws = list(range(i, min(i + BATCH, count)))
        drawn.append(engine.generate_codes(layouts[rows], seed, draws))
        self_boxes += engine.ground_codes(drawn[-1], expressions[rows])
        recovered += engine.ground_codes(true_codes[rows], expressions[rows])
        progress(draws[-1] + 1, count)
    codes = torch.cat(drawn)
    images = torch.cat([decode_codes(engine.vq, c) for c in codes.split(BATCH)])
    found = [detect(i) for i in to_images(images)]
    made = load_statistics(split, count)
    tables: dict[str, Any] = {
        "l2i": l2i_table(scenes, layouts, found),
        "i2l": i2l_table([s.boxes() for s in scenes], recovered),
        "cycle": cycle_table(scenes, layouts, self_boxes, found),
        "judge_ceiling": mean(
            [class_ious(s, detect(i)) >= 0.5 for s, i in zip(scenes, true, strict=True)]
        ),
        "vq_ceiling": l2i_table(
            scenes,
            layouts,
            [
                detect(i)
                for c in true_codes.split(BATCH)
                for i in to_images(decode_codes(engine.vq, c))
            ],
        ),
        "misread": made.shares()["misread"] if made is not None else None,
        "count": count,
    }
    tables["l2i"]["fd_vq"] = frechet_distance(
        vq_features(engine.vq, images), vq_features(engine.vq, pixels)
    )
    return tables


def quick_scores(
    model: UnifiedTransformer,
    vq: JanusVQVAE,
    prompts: Prompts,
    codes: np.ndarray,
    layouts: list[Layout],
    judge: Judge | None = None,
) -> dict[str, float]:
    """The scores watched during training: grounding of true images (all layouts), and the IoU of
    the first ``QUICK`` layouts, drawn at temperature 0.7 without guidance, as the judge
    (``judge_iou``) and the model itself (``self_iou``) find them, with the signed ``gap``, self
    minus judge. On one thread this takes 6.8 s for `tiny` and 256 scenes, of which 0.9 s for
    ``self_iou``.

    Args:
        codes: of the true images [N, T].
        layouts: of these images.
        judge: see `Validation`; without one, its numbers and the gap are missing.
    """
    table = model.code_table().detach()

    def ground(images: Tensor) -> np.ndarray:
        """IoU of every object of the first layouts with the box that is found in its image."""
        found: list[list[Box]] = []
        for i, part in enumerate(images.split(BATCH)):
            asked = expressions_of(layouts[i * BATCH : i * BATCH + len(part)])
            found += ground_images(model, prompts, table[part], asked)
        true = [o.box for layout in layouts[: len(found)] for o in layout.objects]
        boxes = [box for row in found for box in row]
        return np.array([box_iou(a, b) for a, b in zip(true, boxes, strict=True)])

    ious = ground(torch.from_numpy(codes))
    inputs = [prompts.l2i(layout) for layout in layouts[:QUICK]]
    draws = torch.arange(len(inputs), device=table.device)
    c = model.config
    sampler = Sampler(Sampling(temperature=0.7), 0, draws, c.codebook_size, c.image_tokens)
    drawn = decode_image(model, table, inputs, sampler, prompts.pad)
    scores = {"ground_acc50": float((ious >= 0.5).mean()), "ground_iou": float(ious.mean())}
    judged = judge(decode_codes(vq, drawn)) if judge is not None else {}
    scores |= {**judged, "self_iou": float(ground(drawn).mean())}
    if "judge_iou" in judged:
        scores["gap"] = scores["self_iou"] - judged["judge_iou"]
    return scores


def cycle_table(
    scenes: list[Scene],
    layouts: list[Layout],
    boxes: list[list[Box]],
    found: list[list[Detection]],
    intervals: bool = True,
) -> dict[str, Any]:
    """Self-judged IoU, L1 and reward of generated images, the judge's IoU, and the signed gap; with
    95% ``intervals``, which evaluations during training leave out.

    ``missed_found`` shows what the reward is blind to: of the objects that the judge does not find
    at IoU 0.5, with their colour and shape, the share that the model itself finds (NaN: there are
    none).
    """
    # One call for all images: one for each would be most of the time of an evaluation's table.
    target, there = targets(layouts)
    rows = pad_sequence([torch.tensor(row) for row in boxes], batch_first=True)
    scores = box_reward(rows.unsqueeze(1), target, there)

    def of_objects(score: Tensor) -> list[np.ndarray]:
        each = score[:, 0].double().numpy()
        return [row[: len(y.objects)] for row, y in zip(each, layouts, strict=True)]

    self_iou = of_objects(scores.iou)
    judged = [class_ious(s, d) for s, d in zip(scenes, found, strict=True)]
    values = {
        "self_iou": self_iou,
        "self_l1": of_objects(scores.l1),
        "reward": list(scores.reward.double().numpy()),
        "judge_iou": judged,
        "gap": [a - b for a, b in zip(self_iou, judged, strict=True)],
    }
    missed = [own[by < 0.5] >= 0.5 for own, by in zip(self_iou, judged, strict=True)]
    if any(map(len, missed)):
        values["missed_found"] = missed
    table = _with_intervals(values) if intervals else {n: mean(v) for n, v in values.items()}
    table.setdefault("missed_found", float("nan"))
    return table
