"""A model's quality and variety: settings chosen on validation scenes, measured on test scenes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.images.vision import decode_codes, to_images
from echogen.engine.layout import Layout
from echogen.train.config import later
from echogen.train.data.scenes import load_scenes
from echogen.train.data.shapes import Scene
from echogen.train.eval.judge import detect
from echogen.train.eval.tables import BATCH, evaluate, judge_boxes, l2i_table, layouts_of

PLAIN = Sampling(temperature=1.0, cfg=1.0)
# The grid on which the recipe's own default was chosen (engine/models/tiny-stage1/training).
GRID = tuple(
    Sampling(temperature=t, cfg=s) for t in (0.3, 0.5, 0.7, 1.0) for s in (1.0, 1.5, 2.0, 3.0)
)


@dataclass(frozen=True)
class Sizes:
    """How much an evaluation draws.

    Attributes:
        validation: scenes on which temperature and guidance are chosen.
        test: scenes of the tables.
        varied, draws: layouts, and pictures of each, for the diversity measures.
        drawings: drawings of each test layout; the measures of drawing (``l2i``) are means over
            them.
        choosing: drawings at T = 1 of each of Cycle RL's validation layouts, by which the weights
            are chosen among a training's evaluations; 0: the stage chooses in its own way.
    """

    validation: int = 96
    test: int = 400
    varied: int = 32
    draws: int = 4
    drawings: int = later(1)
    choosing: int = later(0)


def measure(engine: Engine, sizes: Sizes, seed: int, choose: bool = True) -> dict[str, Any]:
    """Evaluate a model at T = 1, CFG = 1 (``plain``) and at its validation-best setting (``best``).

    Args:
        engine: the model; its default sampling does not change.
        seed: of the noise and of the layouts' wording, so that arms of one seed share both.
        choose: False: do not search; ``best`` is ``plain`` (for a model that does not draw).

    Returns:
        JSON-ready data: ``validation`` (the grid, each entry with the judge's mean IoU), ``plain``
        and ``best``, each the tables of `evaluate` with ``sampling`` and ``diversity``, and
        ``sizes``.
    """
    grid = []
    for sampling in GRID if choose else ():
        found = judged(engine, sizes.validation, seed, sampling)
        grid.append({"temperature": sampling.temperature, "cfg": sampling.cfg, **found})
    best = PLAIN
    if grid:
        top = max(grid, key=lambda row: row["judge_iou"])
        best = Sampling(temperature=top["temperature"], cfg=top["cfg"])
    plain = tables(engine, sizes, seed, PLAIN)
    chosen = plain if best == PLAIN else tables(engine, sizes, seed, best)
    return {"sizes": asdict(sizes), "validation": grid, "plain": plain, "best": chosen}


def judged(
    engine: Engine, count: int, seed: int, sampling: Sampling, drawings: int = 1
) -> dict[str, float]:
    """Return the judge's mean IoU and accuracy at 0.5 on the layouts of validation scenes, over
    ``drawings`` drawings of each."""
    scenes = load_scenes("val", count)
    layouts = layouts_of(scenes, seed)
    # One drawing at a time, so that memory holds only one.
    found = [
        judge_boxes(_draw(engine, layouts, seed, sampling, i * count)[1], scenes)
        for i in range(drawings)
    ]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def tables(engine: Engine, sizes: Sizes, seed: int, sampling: Sampling) -> dict[str, Any]:
    """Return the tables on test scenes at one setting, with the diversity of the pictures."""
    default, engine.sampling = engine.sampling, sampling
    try:
        found = evaluate(engine, "test", sizes.test, seed)
    finally:
        engine.sampling = default
    scenes = load_scenes("test", sizes.test)
    layouts = layouts_of(scenes, seed)
    if sizes.drawings > 1:
        again = [
            drawing(engine, scenes, layouts, seed, sampling, i) for i in range(1, sizes.drawings)
        ]
        found["l2i"] = over_drawings([found["l2i"], *again])
    return {
        "sampling": {"temperature": sampling.temperature, "cfg": sampling.cfg},
        **found,
        "diversity": diversity(engine, layouts[: sizes.varied], sizes.draws, seed, sampling),
    }


def drawing(
    engine: Engine,
    scenes: list[Scene],
    layouts: list[Layout],
    seed: int,
    sampling: Sampling,
    index: int,
) -> dict[str, Any]:
    """The L2I table of one more drawing of every layout; ``index`` 0 is that of `evaluate`."""
    images = _draw(engine, layouts, seed, sampling, index * len(layouts))[1]
    return l2i_table(scenes, layouts, [detect(i) for i in to_images(images)])


def over_drawings(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine several drawings' L2I tables: means of the numbers that all have, `fd_vq` of the
    first.

    Confidence intervals are left out, as they are of one drawing. ``each`` has every drawing's AP
    and accuracy at 0.5, which show the noise of drawing.
    """
    first = {name: value for name, value in found[0].items() if name != "interval95"}
    shared = [name for name in first if all(name in table for table in found)]
    means = {name: float(np.mean([table[name] for table in found])) for name in shared}
    each = {name: [table[name] for table in found] for name in ("ap", "acc50")}
    return {**first, **means, "each": each}


def diversity(
    engine: Engine, layouts: list[Layout], draws: int, seed: int, sampling: Sampling
) -> dict[str, float]:
    """Measure how much pictures of one layout differ, as means over layouts.

    Returns:
        ``distinct_codes``: number of different codes at a position of the image, from 1 (all
        pictures the same) to ``draws``. ``pixel_distance``: mean absolute difference of two
        pictures, in 0 … 1.
    """
    repeated = [layout for layout in layouts for _ in range(draws)]
    codes, images = _draw(engine, repeated, seed, sampling)
    groups = codes.reshape(len(layouts), draws, -1).cpu().numpy()
    distinct = [
        len(np.unique(group[:, place])) for group in groups for place in range(group.shape[1])
    ]
    shown = ((images.clamp(-1, 1) + 1) / 2).reshape(len(layouts), draws, -1)
    pairs = [(shown[:, i] - shown[:, j]).abs().mean() for i, j in combinations(range(draws), 2)]
    return {
        "distinct_codes": float(np.mean(distinct)),
        "pixel_distance": float(torch.stack(pairs).mean()),
        "draws": draws,
    }


def _draw(
    engine: Engine, layouts: list[Layout], seed: int, sampling: Sampling, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Return codes [N, T] and pictures [N, 3, H, W] in −1 … 1. ``first`` is the number of the first
    sample, which its noise is drawn by."""
    codes = torch.cat(
        [
            engine.generate_codes(
                layouts[i : i + BATCH],
                seed,
                [first + j for j in range(i, min(i + BATCH, len(layouts)))],
                sampling=sampling,
            )
            for i in range(0, len(layouts), BATCH)
        ]
    )
    return codes, torch.cat([decode_codes(engine.vq, c) for c in codes.split(BATCH)])
