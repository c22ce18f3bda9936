"""The step loop: resuming repeats the run, and nothing is lost when something goes wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echogen.train.config import LoopConfig
from echogen.train.run.checkpoint import StateError, load_state, save_state
from echogen.train.run.loop import TrainingError, run
from echogen.train.run.optim import schedule
from echogen.train.start import RECORD, read_record, write_record

from .runs import rows


@dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig


class Toy:
    """Regression on noise keyed by the step; stops or breaks where a test asks for it."""

    name = "toy"

    def __init__(
        self, config: LoopConfig, break_at: int = -1, nan_at: int = -1, break_evaluation: int = 0
    ) -> None:
        torch.manual_seed(0)
        self.config = ToyConfig(config)
        self.module = nn.Sequential()
        self.module.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 1)])
        self.break_at, self.nan_at, self.break_evaluation = break_at, nan_at, break_evaluation
        self.evaluations = 0
        self.exported: list[Path] = []
        self.begun = 0

    def begin(self) -> dict[str, float]:
        self.begun += 1
        return {"found": 0.25}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        if step == self.break_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        hidden = self.module.blocks[0](x).relu()
        loss = (self.module.blocks[1](hidden).float() - x[:, :1]).square().mean()
        if step == self.nan_at:
            loss = loss * float("nan")
        return loss, {"loss": float(loss.detach())}

    def after_step(self, step: int) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        self.evaluations += 1
        if self.evaluations == self.break_evaluation:
            raise KeyboardInterrupt
        return {"weight": float(self.module.blocks[0].weight.detach().sum())}

    def export(self, folder: Path) -> None:
        self.exported.append(folder)
        folder.mkdir()
        torch.save(self.module.state_dict(), folder / "weights.pt")


class Selecting(Toy):
    """Chooses its fifth step; from the ninth on its number is NaN."""

    selects = "score"

    def evaluate(self) -> dict[str, float]:
        values = super().evaluate()
        step = self.steps_done
        return values | {"score": float(4 - abs(step - 5)) if step < 9 else float("nan")}

    def after_step(self, step: int) -> None:
        self.steps_done = step + 1

    def export(self, folder: Path) -> None:
        super().export(folder)
        write_record(folder, ("toy",))


class Continuing(Selecting):
    """Begins with a trained model, whose number is the best, but for a NaN at one step."""

    continues = True
    nan_at_step, steps_done = -1, 0

    def evaluate(self) -> dict[str, float]:
        score = float("nan") if self.steps_done == self.nan_at_step else float(-self.steps_done)
        return super().evaluate() | {"score": score}


class Lessening(Selecting):
    """Chooses the same step by the least of a number."""

    selects = "-score"

    def evaluate(self) -> dict[str, float]:
        values = super().evaluate()
        return values | {"score": -values["score"]}


CONFIG = LoopConfig(
    steps=12, lr=1e-2, muon_lr=1e-2, warmup=2, log_every=1, eval_every=4, save_every=3, threads=1
)


@pytest.mark.parametrize("break_at", [1, 5, 10])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, break_at: int) -> None:
    run(Toy(CONFIG), CONFIG, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Toy(CONFIG, break_at=break_at), CONFIG, tmp_path / "broken")
    resumed = Toy(CONFIG)
    run(resumed, CONFIG, tmp_path / "broken", resume=True)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert len(resumed.exported) == 1 and not resumed.exported[0].exists()
    assert (tmp_path / "broken" / "model" / "weights.pt").is_file()
    assert resumed.begun == (break_at < CONFIG.save_every)  # before the first step, and only there
    assert rows(tmp_path / "broken")[0] == {"step": 0, "found": 0.25}


@pytest.mark.parametrize("save_every", [2, 3, 4])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_killed_while_it_evaluates_loses_no_validation(
    tmp_path: Path, number: int, save_every: int
) -> None:
    config = replace(CONFIG, save_every=save_every)
    run(Toy(config), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Toy(config, break_evaluation=number), config, tmp_path / "broken")
    saved = load_state(tmp_path / "broken" / "state.pt")["step"]
    assert saved == (12 if number == 3 else 4 * number // save_every * save_every)
    run(Toy(config), config, tmp_path / "broken", resume=True)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert [r["step"] for r in rows(tmp_path / "broken") if "val_weight" in r] == [4, 8, 12]


@pytest.mark.parametrize("stage, best", [(Selecting, 4.0), (Lessening, -4.0)])
def test_the_best_validation_is_exported_and_said_to_be(tmp_path: Path, stage, best) -> None:
    config = replace(CONFIG, eval_every=1)
    stopped, five = stage(config, break_at=5), replace(config, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, five, tmp_path / "five")
    run(stage(config), config, tmp_path / "whole")
    exported = torch.load(tmp_path / "whole" / "model" / "weights.pt")
    wanted = load_state(tmp_path / "five" / "state.pt")["module"]
    last = load_state(tmp_path / "whole" / "state.pt")
    assert last["step"] == 12
    assert all(torch.equal(exported[k], wanted[k]) for k in wanted)
    assert not all(torch.equal(exported[k], last["module"][k]) for k in wanted)
    assert rows(tmp_path / "whole")[-1] == {"step": 12, "chosen_step": 5, "chosen_score": best}
    record = json.loads((tmp_path / "whole" / "model" / RECORD).read_text())
    assert record == {"stages": ["toy"], "chosen": {"step": 5, "by": "score", "value": best}}
    assert read_record(tmp_path / "whole" / "model") == ("toy",)


def test_the_model_that_a_run_begins_with_is_exported_if_no_step_improves_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = {k: v.clone() for k, v in Continuing(CONFIG).module.state_dict().items()}
    run(Continuing(CONFIG), CONFIG, tmp_path)
    exported = torch.load(tmp_path / "model" / "weights.pt")
    assert all(torch.equal(exported[k], began[k]) for k in began)
    told = rows(tmp_path)
    assert told[:2] == [
        {"step": 0, "found": 0.25},
        {"step": 0, "val_weight": told[1]["val_weight"], "val_score": 0.0},
    ]
    assert [r["step"] for r in told if "val_score" in r] == [0, 4, 8, 12]
    assert told[-1] == {"step": 12, "chosen_step": 0, "chosen_score": 0.0}
    record = json.loads((tmp_path / "model" / RECORD).read_text())
    assert record["chosen"] == {"step": 0, "by": "score", "value": 0.0}
    last = " ".join(capsys.readouterr().err.split())
    assert "of step 0 (score 0; no step improved on the model it began with), is in" in last


def test_a_model_whose_validation_fails_is_not_exported(tmp_path: Path) -> None:
    stage = Continuing(CONFIG)
    stage.nan_at_step = 0
    run(stage, CONFIG, tmp_path)
    assert rows(tmp_path)[-1] == {"step": 12, "chosen_step": 4, "chosen_score": -4.0}


def test_a_run_from_before_models_were_validated_first_goes_on(tmp_path: Path) -> None:
    """Its folder has no step 0, neither in its metrics nor among the weights to choose from."""
    old = Continuing(CONFIG, break_at=8)
    old.continues = False
    with pytest.raises(KeyboardInterrupt):
        run(old, CONFIG, tmp_path)
    run(Continuing(CONFIG), CONFIG, tmp_path, resume=True)
    assert [r["step"] for r in rows(tmp_path) if "val_score" in r] == [4, 8, 12]
    assert rows(tmp_path)[-1]["chosen_step"] == 4


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_model_that_a_run_begins_with_is_validated_as_it_is(tmp_path: Path, ema) -> None:
    config = replace(CONFIG, ema=ema)
    stage = Continuing(config)
    began = stage.evaluate()["weight"]
    run(stage, config, tmp_path)
    assert rows(tmp_path)[1]["val_weight"] == pytest.approx(began, rel=1e-5)


@pytest.mark.parametrize("break_at", [0, 1, 4, 5, 8, 11])
@pytest.mark.parametrize("stage", [Selecting, Lessening, Continuing])
def test_the_choice_outlasts_an_interruption(tmp_path: Path, stage, break_at: int) -> None:
    config = replace(CONFIG, eval_every=1)
    run(stage(config), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stage(config, break_at=break_at), config, tmp_path / "broken")
    run(stage(config), config, tmp_path / "broken", resume=True)
    run(stage(config), config, tmp_path / "broken", resume=True)  # once more does no harm
    # As text, since a NaN is not equal to itself.
    assert str(rows(tmp_path / "broken")) == str(rows(tmp_path / "whole"))
    a, b = (torch.load(tmp_path / f / "model" / "weights.pt") for f in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_without_its_best_weights_does_not_choose_among_the_rest(tmp_path: Path) -> None:
    config = replace(CONFIG, eval_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(Selecting(config, break_at=8), config, tmp_path)
    best = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").unlink()
    with pytest.raises(StateError, match=r"best\.pt: missing, .* validated 6 times up to step 6"):
        run(Selecting(config), config, tmp_path, resume=True)
    (tmp_path / "best.pt").write_bytes(best[:-500])
    with pytest.raises(StateError, match=r"best\.pt.*no whole training state"):
        run(Selecting(config), config, tmp_path, resume=True)
    other = replace(config, lr=2e-2)
    with pytest.raises(KeyboardInterrupt):
        run(Selecting(other, break_at=8), other, tmp_path / "other")
    (tmp_path / "best.pt").write_bytes((tmp_path / "other" / "best.pt").read_bytes())
    with pytest.raises(StateError, match=r"best\.pt: written by another run"):
        run(Selecting(config), config, tmp_path, resume=True)
    run(Selecting(config), config, tmp_path)  # anew
    assert rows(tmp_path)[-1]["chosen_step"] == 5


def test_numbers_are_read_behind_backward_and_only_where_they_are_logged(tmp_path: Path) -> None:
    read: list[tuple[int, bool]] = []
    went_back: list[int] = []

    class Number:
        def __init__(self, step: int) -> None:
            self.step = step

        def __float__(self) -> float:
            read.append((self.step, self.step in went_back))
            return 0.5 * self.step

    class Lazy(Toy):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
            loss, _ = super().loss(step)
            loss.register_hook(lambda grad: went_back.append(step))
            return loss, {"loss": loss.detach(), "number": Number(step)}

    config = replace(CONFIG, log_every=5)
    run(Lazy(config), config, tmp_path)
    assert read == [(4, True), (9, True), (11, True)]
    assert [r["number"] for r in rows(tmp_path) if "number" in r] == [2.0, 4.5, 5.5]


def test_without_a_choice_the_last_weights_are_exported(tmp_path: Path) -> None:
    run(Toy(CONFIG), CONFIG, tmp_path)
    assert not (tmp_path / "best.pt").exists()
    assert "val_weight" in rows(tmp_path)[-1]


def stopped(folder: Path) -> Path:
    """A run whose state is of step 6, with lines beyond; its metrics."""
    with pytest.raises(KeyboardInterrupt):
        run(Toy(CONFIG, break_at=8), CONFIG, folder)
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("torn", ["", '{"ste', '{"step": 9', "9", '"\N{SNOWMAN}'])
@pytest.mark.parametrize("lines", [9, 10, 11])  # behind step 6 there are 9
def test_a_torn_last_line_of_metrics_does_no_harm(tmp_path: Path, torn: str, lines: int) -> None:
    run(Toy(CONFIG), CONFIG, tmp_path / "whole")
    metrics = stopped(tmp_path / "broken")
    kept = metrics.read_text().splitlines(keepends=True)[:lines]
    metrics.write_bytes("".join(kept).encode() + torn.encode()[:-1])
    run(Toy(CONFIG), CONFIG, tmp_path / "broken", resume=True)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["{", "[1]", '{"loss": 1.0}', ""])
def test_damaged_metrics_are_refused_by_file_and_line(tmp_path: Path, damage: str) -> None:
    metrics = stopped(tmp_path)
    lines = metrics.read_text().splitlines()
    lines[2] = damage
    metrics.write_text(text := "\n".join(lines) + "\n")
    with pytest.raises(StateError, match=r"metrics\.jsonl: line 3 is no line of metrics"):
        run(Toy(CONFIG), CONFIG, tmp_path, resume=True)
    assert metrics.read_text() == text


def test_metrics_outlast_a_kill_while_they_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = stopped(tmp_path)
    before = metrics.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("echogen.train.run.metrics.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run(Toy(CONFIG), CONFIG, tmp_path, resume=True)
    assert metrics.read_text() == before


def test_a_nan_loss_stops_and_leaves_the_last_state(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nan.*at step 7"):
        run(Toy(CONFIG, nan_at=7), CONFIG, tmp_path)
    assert load_state(tmp_path / "state.pt")["step"] == 6


def test_resume_refuses_another_configuration(tmp_path: Path) -> None:
    run(Toy(CONFIG), CONFIG, tmp_path)
    other = replace(CONFIG, lr=2e-2)
    with pytest.raises(StateError, match="another run"):
        run(Toy(other), other, tmp_path, resume=True)


def test_a_torn_state_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1, "x": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(StateError, match=r"state\.pt.*no whole training state"):
        load_state(path)


def test_an_interrupted_write_leaves_the_previous_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(StateError, match="No space left"):
        save_state(path, {"step": 2})
    assert load_state(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_schedule_is_a_trapezoid() -> None:
    config = LoopConfig(steps=100, lr=1.0, warmup=10, decay=0.5)
    values = [schedule(step, config) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9:50] == [1.0] * 41
    assert values[75] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.02)
