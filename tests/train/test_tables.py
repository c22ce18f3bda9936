"""The tables: perfect answers score 1, wrong ones lose what they should, intervals cover."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from echogen.engine.cycle import score
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.images.vision import encode_image, to_pixels
from echogen.train.data.scenes import render
from echogen.train.data.shapes import Scene, sample_scene
from echogen.train.data.source import ShapesWorld
from echogen.train.eval import tables
from echogen.train.eval.intervals import estimate
from echogen.train.eval.judge import Detection, detect
from echogen.train.eval.matching import class_ious
from echogen.train.eval.tables import (
    cycle_table,
    expressions_of,
    frechet_distance,
    i2l_table,
    l2i_table,
    layouts_of,
    quick_scores,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene("val", i) for i in range(24)]


@pytest.fixture(scope="module")
def found(scenes: list[Scene]) -> list[list[Detection]]:
    return [detect(image) for image in render(scenes)]


def test_true_pictures_score_one(scenes: list[Scene], found: list[list[Detection]]) -> None:
    table = l2i_table(scenes, layouts_of(scenes, 0), found)
    for name in ("ap50", "acc50", "spatial", "color", "texture", "shape"):
        assert table[name] == pytest.approx(1.0), name
    assert table["ap"] > 0.95


def test_a_wrong_colour_costs_colour_and_class_alone(
    scenes: list[Scene], found: list[list[Detection]]
) -> None:
    swap = {"red": "blue", "blue": "red"}
    wrong = [[dataclasses.replace(d, color=swap.get(d.color, d.color)) for d in f] for f in found]
    table = l2i_table(scenes, layouts_of(scenes, 0), wrong)
    painted = np.mean([o.color in swap for s in scenes for o in s.objects])
    assert table["color"] == pytest.approx(1 - painted)
    assert table["acc50"] < 1 and table["spatial"] == table["shape"] == 1


def test_empty_pictures_score_zero(scenes: list[Scene]) -> None:
    table = l2i_table(scenes, layouts_of(scenes, 0), [[] for _ in scenes])
    assert all(table[n] == 0 for n in ("ap", "ap50", "ap75", "acc50", "spatial", "texture"))


def test_one_detection_answers_for_one_object_only(scenes: list[Scene]) -> None:
    scene = next(s for s in scenes if len(s.objects) >= 2)
    twin = Scene((scene.objects[0], scene.objects[0]))
    one = [Detection(*_class(scene), box=tuple(scene.boxes()[0].tolist()), score=1.0)]
    assert sorted(class_ious(twin, one)) == [0.0, pytest.approx(1.0)]


def _class(scene: Scene) -> tuple[str, str, str]:
    first = scene.objects[0]
    return first.shape, first.color, first.texture


def test_grounding_accuracies_follow_ref_l4() -> None:
    target = [np.array([[0.0, 0.0, 0.5, 1.0]])] * 4
    boxes = [[(0.0, 0.0, x, 1.0)] for x in (0.5, 0.41, 0.31, 0.2)]  # IoU 1, 0.82, 0.62, 0.4
    table = i2l_table(target, boxes)
    assert (table["acc50"], table["acc75"], table["acc90"]) == (0.75, 0.5, 0.25)
    assert table["macc"] == pytest.approx((10 + 7 + 3) / 40)


def test_the_gap_is_self_judged_minus_judged(
    scenes: list[Scene], found: list[list[Detection]]
) -> None:
    layouts = layouts_of(scenes, 0)
    boxes = [[o.box for o in layout.objects] for layout in layouts]
    table = cycle_table(scenes, layouts, boxes, [[] for _ in scenes])
    assert table["self_iou"] == pytest.approx(1) and table["judge_iou"] == 0
    assert table["gap"] == pytest.approx(1) and table["reward"] == pytest.approx(1)
    assert cycle_table(scenes, layouts, boxes, found)["gap"] < 0.05


def test_what_the_judge_misses_may_be_found_all_the_same(
    scenes: list[Scene], found: list[list[Detection]]
) -> None:
    """Or may not, and where it misses nothing there is nothing to say."""
    layouts = layouts_of(scenes, 0)
    boxes = [[o.box for o in layout.objects] for layout in layouts]
    assert math.isnan(cycle_table(scenes, layouts, boxes, found)["missed_found"])
    half = [own if i % 2 else [] for i, own in enumerate(found)]  # the judge misses every other
    assert cycle_table(scenes, layouts, boxes, half)["missed_found"] == 1
    away = [(0.0, 0.0, 1e-3, 1e-3)]
    some = [away * len(row) if i % 4 else row for i, row in enumerate(boxes)]
    table = cycle_table(scenes, layouts, some, half)
    counts = [len(row) for row in boxes[::2]]
    assert table["missed_found"] == pytest.approx(sum(counts[::2]) / sum(counts))
    low, high = table["interval95"]["missed_found"]
    assert low < table["missed_found"] < high


def test_training_is_told_what_the_table_says(
    scenes: list[Scene], found: list[list[Detection]]
) -> None:
    """To the last bit, and without intervals."""
    layouts, rng = layouts_of(scenes, 0), np.random.default_rng(0)
    boxes = [
        [tuple(np.clip(rng.normal(o.box, 0.1), 0, 1).tolist()) for o in layout.objects]
        for layout in layouts
    ]
    for judged in (found, [own if i % 2 else [] for i, own in enumerate(found)]):
        table = cycle_table(scenes, layouts, boxes, judged)
        told = cycle_table(scenes, layouts, boxes, judged, intervals=False)
        assert told.keys() == table.keys() - {"interval95"}
        for name, value in told.items():
            assert value == table[name] or (value != value and table[name] != table[name]), name
    alone = [score(layout, [row]) for layout, row in zip(layouts, boxes, strict=True)]
    for name, at in (("self_iou", 0), ("self_l1", 1)):
        assert told[name] == np.concatenate([s[at][0].double().numpy() for s in alone]).mean()
    assert told["reward"] == pytest.approx(np.mean([float(s[2][0]) for s in alone]), rel=1e-7)


@torch.no_grad()
def test_the_gap_that_a_trainer_watches_is_that_of_the_cycle(
    scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first scenes alone, as many as are drawn."""
    monkeypatch.setenv("ECHOGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "QUICK", 6)
    engine, layouts = Engine.from_pretrained("tiny-stage1"), layouts_of(scenes[:6], 0)
    true = encode_image(engine.vq, to_pixels(render(scenes[:8]))).numpy()
    world = ShapesWorld(1).validation(engine.vq, len(scenes))
    assert world.layouts == layouts_of(scenes, 0) and world.judge is not None
    parts = (engine.transformer, engine.vq, engine.prompts)
    watched = quick_scores(*parts, true, world.layouts[:8], world.judge)
    codes = engine.generate_codes(layouts, 0, sampling=Sampling(temperature=0.7))
    boxes = engine.ground_codes(codes, expressions_of(layouts))
    images = [np.asarray(image) for image in engine.decode(codes)]
    table = cycle_table(scenes[:6], layouts, boxes, [detect(image) for image in images])
    for name in ("self_iou", "judge_iou", "gap"):
        assert watched[name] == pytest.approx(table[name], abs=1e-5), name
    assert table["self_iou"] > 0.5
    assert quick_scores(*parts, true, world.layouts[:8]) == {
        name: watched[name] for name in ("ground_acc50", "ground_iou", "self_iou")
    }


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        images = [(rng.random(rng.integers(1, 4)) < 0.7) * 1.0 for _ in range(80)]
        e = estimate(images)
        hits += e.low <= 0.7 <= e.high
    assert hits >= 52


def test_frechet_distance_of_shifted_gaussians() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + np.array([3.0, 0.0, 0.0])) == pytest.approx(9, rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    """Along one axis each, the covariances are singular: (3 − 1)² and 2², apart at right angles."""
    line = np.array([-1.0, 0.0, 1.0])[:, None]
    x, y = np.eye(5)[:2]
    assert frechet_distance(3 * line * x, line * x) == pytest.approx(4)
    assert frechet_distance(line * x, line * y) == pytest.approx(2)
    assert frechet_distance(line * x, line * x + 2 * y) == pytest.approx(4)


def test_training_begins_without_what_average_precision_needs():
    """Which a step does not; `echogen train` asks for it before it begins."""
    code = "import sys; sys.modules['pycocotools'] = None; import echogen.train.stages.cycle_rl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
