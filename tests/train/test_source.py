"""A data set of one's own: stages learn from it, are judged by whom it names, and know it again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor
from transformers import JanusVQVAE

from echogen.engine.engine import Engine
from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig
from echogen.train.data.samples import Sample
from echogen.train.data.source import ShapesWorld, Validation
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import run
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.start import load_start, read_record

pytestmark = pytest.mark.usefixtures("small_world")


@dataclass(frozen=True)
class Mine:
    """Two pictures of ShapesWorld under other words."""

    fingerprint: str = "mine"
    judged: bool = False

    def check(self, engine: Engine) -> None:
        pass

    def training(self, vq: JanusVQVAE) -> list[Sample]:
        samples = ShapesWorld(24).training(vq)[:2]
        return [dataclasses.replace(s, caption="my picture") for s in samples]

    def validation(self, vq: JanusVQVAE, count: int) -> Validation:
        world = ShapesWorld(24).validation(vq, count)
        return world._replace(judge=self.judge if self.judged else None)

    def judge(self, pixels: Tensor) -> dict[str, float]:
        return {"judge_iou": 0.25, "pictures": float(len(pixels))}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stages_learn_from_a_source_that_they_are_given(pmtp_run: Path, loop: LoopConfig) -> None:
    start = load_start(pmtp_run, "pmtp")
    first = PMTPStage(PMTPConfig(loop=loop, batch=4, extra_grounding=2), start, Mine())
    second = DJOStage(DJOConfig(loop=loop, batch=4), start, Mine())
    assert [t.sample.caption for t in first.tasks(0)] == ["my picture"] * 6
    assert [x.layout.caption for x in second.examples(0)] == ["my picture"] * 4
    assert first.config.data_hash == second.config.data_hash == "mine"
    world = PMTPStage(PMTPConfig(loop=loop, scenes=24, batch=4), start)
    assert world.config == PMTPConfig(loop=loop, scenes=24, batch=4, start=start.fingerprint)


def test_without_a_judge_the_validation_loss_chooses(
    tmp_path: Path, pmtp_run: Path, loop: LoopConfig
) -> None:
    loop = dataclasses.replace(loop, bf16=False, steps=4, eval_every=1)
    stage = PMTPStage(PMTPConfig(loop=loop, batch=3), load_start(pmtp_run, "pmtp"), Mine())
    run(stage, loop, tmp_path)
    seen = [row for row in rows(tmp_path) if "val_loss" in row]
    scores = {"val_ground_acc50", "val_ground_iou", "val_self_iou"}
    assert [set(row) for row in seen] == [{"step", "val_loss", "val_l2i", "val_i2l"} | scores] * 5
    for row in seen:
        assert row["val_loss"] == pytest.approx(row["val_l2i"] + row["val_i2l"], abs=1e-4)
    best = min(seen, key=lambda row: row["val_loss"])
    chosen = {"chosen_step": best["step"], "chosen_loss": best["val_loss"]}
    assert rows(tmp_path)[-1] == {"step": 4, **chosen}
    record = json.loads((tmp_path / "model" / "stage.json").read_text())
    assert record["chosen"] == {"step": best["step"], "by": "loss", "value": best["val_loss"]}
    assert read_record(tmp_path / "model") == ("pmtp",)


def test_a_judge_of_ones_own_is_asked(pmtp_run: Path, loop: LoopConfig) -> None:
    source = Mine(judged=True)
    stage = PMTPStage(PMTPConfig(loop=loop, batch=3), load_start(pmtp_run, "pmtp"), source)
    found = stage.evaluate()
    assert found["judge_iou"] == 0.25 and found["pictures"] == 4 and stage.selects is None
    assert found["gap"] == found["self_iou"] - 0.25 and "loss" not in found


def test_a_run_is_not_resumed_with_other_data(
    tmp_path: Path, pmtp_run: Path, loop: LoopConfig
) -> None:
    loop = dataclasses.replace(loop, bf16=False, steps=2)

    def begun(*source: Mine) -> DJOStage:
        config = DJOConfig(loop=loop, scenes=24, batch=4)
        return DJOStage(config, load_start(pmtp_run, "pmtp"), *source)

    run(begun(Mine()), loop, tmp_path)
    run(begun(Mine()), loop, tmp_path, resume=True)
    with pytest.raises(StateError, match=r"another run .data_hash mine → other"):
        run(begun(Mine("other")), loop, tmp_path, resume=True)
    with pytest.raises(StateError, match=r"another run .data_hash mine → None"):
        run(begun(), loop, tmp_path, resume=True)
