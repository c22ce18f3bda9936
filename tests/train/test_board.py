"""What TensorBoard finds of a run, and that a run without it says so and goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from echogen.train.config import LoopConfig, PMTPConfig
from echogen.train.run.board import TensorBoard
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import run
from echogen.train.run.metrics import TIMED
from echogen.train.run.progress import Pace, note, peak_memory, progress_bar
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.start import load_start


@pytest.fixture
def stage(pmtp_run: Path, loop: LoopConfig, small_world: None) -> PMTPStage:
    config = dataclasses.replace(loop, bf16=False, eval_every=3)
    return PMTPStage(PMTPConfig(loop=config, scenes=24, batch=3), load_start(pmtp_run, "pmtp"))


def read(folder: Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    return found


def test_a_run_shows_its_numbers_validations_and_samples(stage: PMTPStage, tmp_path: Path) -> None:
    torch.manual_seed(5)
    run(stage, stage.config.loop, tmp_path)
    board = read(tmp_path / "board")
    tags = board.Tags()
    rates = {"train/tokens_per_s", "train/images_per_s", "train/memory_mib"}
    numbers = {"train/loss", "train/l2i", "train/i2l", "train/lr", "train/grad_norm"}
    assert rates | numbers | {"validation/l2i", "validation/judge_iou"} <= set(tags["scalars"])
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in board.Scalars("validation/l2i")] == [0, 3, 6]
    assert all(e.value > 0 for tag in rates for e in board.Scalars(tag))
    assert sorted(tags["images"]) == [f"samples/validation-{i}" for i in range(4)]
    shown = board.Images("samples/validation-0")
    assert [e.step for e in shown] == [0, 3, 6]
    pixels = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
    name, picture = stage.pictures()[0]
    assert name == "validation-0" and pixels.shape == np.asarray(picture).shape
    last = Image.open(io.BytesIO(shown[2].encoded_image_string))
    assert (np.asarray(last) == np.asarray(picture)).all()  # of the weights as they are now


def test_samples_leave_no_trace_in_training(stage: PMTPStage) -> None:
    before = torch.get_rng_state()
    weights = [p.detach().clone() for p in stage.module.parameters()]
    first, again = stage.pictures(), stage.pictures()
    assert torch.equal(before, torch.get_rng_state()) and stage.module.training
    assert all(map(torch.equal, weights, stage.module.parameters()))
    assert all((np.asarray(a) == np.asarray(b)).all() for (_, a), (_, b) in zip(first, again,
               strict=True))  # fmt: skip


def test_a_resumed_board_hides_what_lay_beyond_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoard(tmp_path, 0)
    for step in range(1, 6):
        first.numbers(step, "train", {"loss": float(step)})
    first.close()
    second = TensorBoard(tmp_path, 3)
    second.numbers(4, "train", {"loss": 40.0})
    second.close()
    values = {e.step: e.value for e in read(tmp_path).Scalars("train/loss")}
    assert values == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}


def test_without_tensorboard_a_run_says_so_once(
    stage: PMTPStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("echogen.train.run.board.find_spec", lambda name: None)
    run(stage, stage.config.loop, tmp_path)
    assert capfd.readouterr().err.count("pip install tensorboard") == 1
    assert not (tmp_path / "board").exists() and (tmp_path / "model").exists()


def test_a_board_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "board").write_text("a file")
    with pytest.raises(StateError, match=r"board: cannot be written"):
        TensorBoard(tmp_path / "board", 0)


def test_a_pace_counts_steps_and_what_passed_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 12.0])  # two steps of two seconds, an evaluation between them
    monkeypatch.setattr("echogen.train.run.progress.time.perf_counter", lambda: next(clock))
    pace = Pace(images=6)
    for tokens in (100, 300):
        pace.start()
        pace.meter.begin("train/pass", {"tokens": tokens, "rows": 2})
        pace.meter.begin("engine/decode", {"tokens": 999})
        pace.stop()
    assert pace.step == 2.0
    rates = pace.rates()
    assert rates["tokens_per_s"] == 100 and rates["images_per_s"] == 3
    assert rates["memory_mib"] == pytest.approx(peak_memory() / 2**20, rel=0.1)
    told = note({"loss": torch.tensor(0.5), "reward": 0.25}, rates)
    assert told.startswith("loss 0.5000  reward 0.2500  100 tokens/s  3.0 images/s  ")
    assert told.endswith("MiB")
    assert "reward" not in note({"loss": 0.5}, Pace(None).rates())
    assert pace.left(3) == 18.0  # evaluations are on the way too


def test_a_run_on_the_cpu_beside_a_gpu_tells_its_own_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing was taken on the device, but something in the process has begun with CUDA."""
    own = peak_memory()
    for name, answer in (("is_available", True), ("is_initialized", True)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert peak_memory() >= own
    assert note({}, Pace(None).rates()).endswith("MiB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 << 20)
    assert peak_memory() == 7 << 20


def test_without_a_terminal_a_line_holds_rates_and_the_time_left(
    stage: PMTPStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = stage.config.loop
    run(stage, loop, tmp_path)
    rates = r"\d+\.\d{3} s/step  [\d,]+ tokens/s  [\d.,]+ images/s  [\d,]+ MiB"
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("pmtp {'step'")]
    assert len(lines) == loop.steps // loop.log_every
    assert all(re.search(rf"}} {rates}  about \d+ (s|min|h) left$", x) for x in lines[:-1])
    assert re.search(rf"}} {rates}$", lines[-1])
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "loss" in row]
    assert len(told) == len(lines) and all(row.keys() >= set(TIMED) for row in told)
    assert told[-1]["images_per_s"] == pytest.approx(3 / told[-1]["seconds_per_step"], rel=0.01)


def test_on_a_terminal_a_bar_holds_them() -> None:
    file = io.StringIO()
    console = Console(force_terminal=True, file=file, width=120)
    with progress_bar(console, "djo", steps=40, start=10) as bar:
        told = note({"loss": 0.5}, {"tokens_per_s": 1234.0, "images_per_s": 5, "memory_mib": 678})
        bar.update(bar.task_ids[0], completed=20, note=told)
    shown = Text.from_ansi(file.getvalue()).plain
    assert re.search(r"djo .* 20/40 .*loss 0\.5000  1,234 tokens/s  5\.0 images/s  678 MiB", shown)
    # Elsewhere there is none.
    file = io.StringIO()
    with progress_bar(Console(file=file), "djo", steps=40, start=0) as bar:
        bar.update(bar.task_ids[0], completed=20, note="loss")
    assert not file.getvalue()
