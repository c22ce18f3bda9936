"""What every train command takes besides its stage's own: how steps are taken, how runs end."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from echogen.train.recipes import tiny
from echogen.train.run.dump import Repeated
from echogen.train.run.loop import Stopped, TrainingError


@pytest.fixture
def djo(run, model, tmp_path, monkeypatch):
    """``djo(how, *options)``: `train djo` with a loop that ends as ``how`` says; its outcome. Its
    ``loops`` are those that came to the loop."""
    found = []
    monkeypatch.setattr(
        "echogen.train.stages.djo.DJOStage",
        lambda config, start: SimpleNamespace(name="djo", config=config),
    )

    def call(how, *options):
        def loop(stage, config, folder, resume):
            found.append(config)
            assert stage.config.loop == config
            if how is not None:
                raise how
            (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')

        monkeypatch.setattr("echogen.train.run.loop.run", loop)
        out = tmp_path / f"run{len(found)}"
        begin = ("--from", model, "--any-stage", "--any-shape", "--out", out)
        return run("train", "djo", *begin, *options)

    call.loops = found
    return call


def test_how_steps_are_taken_reaches_the_loop(djo, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert djo(None).code == 0
    options = ("--accumulate", "2", "--ema", "0.99", "--checkpoint-activations", "--deterministic")
    done = djo(None, *options, "--steps", "5")
    assert done.code == 0, done.err
    plain, asked = djo.loops
    assert plain == tiny().djo.loop
    assert asked == replace(
        plain, steps=5, accumulate=2, ema=0.99, checkpoint_activations=True, deterministic=True
    )


def test_a_cpu_without_bfloat16_is_told_and_float32_chosen(djo, bf16_slowdown):
    assert djo(None).err == ""
    bf16_slowdown(28.4)
    assert "28 times as long" in djo(None).err
    assert djo(None, "--float32").err == ""
    assert [loop.bf16 for loop in djo.loops] == [True, True, False]


def test_settings_that_cannot_be_are_refused(djo):
    assert djo(None, "--accumulate", "0").refused("--accumulate = 0", "at least 1")
    assert djo(None, "--ema", "1.5").refused("--ema = 1.5", "between 0 and 1")
    assert not djo.loops


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_asked_to_stop_leaves_with_the_signals_code(djo, capfd, number, code):
    """The line about it is the loop's, see test_faults.py."""
    with pytest.raises(SystemExit) as left:
        djo(Stopped("djo: stopped", number))
    assert left.value.code == code and str(left.value) == "djo: stopped"
    told = capfd.readouterr()
    assert not told.err and not told.out


def test_training_that_came_to_nothing_is_one_line(djo):
    done = djo(TrainingError("djo: loss nan at step 7; it is in a/dump-step7.pt"))
    assert done.code == 1
    assert done.err == "echogen: djo: loss nan at step 7; it is in a/dump-step7.pt\n"


def test_a_dump_is_repeated_and_nothing_written(djo, tmp_path, monkeypatch):
    dump = tmp_path / "dump-step7.pt"
    assert djo(None, "--repeat", dump).refused(f"--repeat {dump}: no such file")
    dump.write_text("")
    asked = []

    def repeat_dump(stage, config, path):
        asked.append((stage.name, config.accumulate, path))
        numbers = {"loss": float("nan"), "l2i": 0.5}
        return Repeated(7, float("nan"), float("inf"), numbers, ["norm.weight"], [], True)

    monkeypatch.setattr("echogen.train.run.dump.repeat_dump", repeat_dump)
    done = djo(None, "--repeat", dump, "--accumulate", "2", "--json")
    assert done.code == 0, done.err
    assert asked == [("djo", 2, Path(dump))] and not djo.loops
    assert "1 (norm.weight)" in done.out and "made again" in done.out
    assert done.data["step"] == 7 and done.data["loss"] is None
    assert done.data["broken"] == ["norm.weight"] and done.data["same_inputs"] is True
    assert not (tmp_path / "run0").exists()
    json.dumps(done.data, allow_nan=False)
