"""The benchmark of drawing several codes a step: what it counts, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from echogen.bench.speed import jacobi
from echogen.cli import main
from echogen.engine.decoding.jacobi import MOST_COVER, covered, decode_windows
from echogen.train.data.scenes import load_scenes


def test_run_reports_every_setting():
    threads, seen = torch.get_num_threads(), []
    result = jacobi.run(
        layouts=2, windows=(4, 16), temperatures=(0.3,), batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert torch.get_num_threads() == threads
    assert seen == [(i, 4) for i in range(1, 5)]  # 2 test layouts at once, 1 crowded; 2 settings
    assert json.loads(json.dumps(result)) == result
    assert result["identical"] is True
    rows = result["settings"]
    assert [(r["cfg"], r["window"]) for r in rows] == [(1, 4), (1, 16), (5, 4), (5, 16)]
    for r in rows:
        assert r["images"] == 3 and r["different"] == r["different_in_same_arithmetic"] == 0
        for part in (r, r["crowded"]):
            # Every code that no draft gave cost a step.
            assert part["steps_sequential"] == 64
            assert part["steps_jacobi"] == pytest.approx(64 * (1 - part["acceptance"]["all"]))
            assert part["steps_jacobi"] <= part["steps_jacobi_max"] < 64
            assert part["forwards"] >= part["steps_jacobi"]
            assert 0 < part["acceptance"]["object"] < 1
            assert part["ms_jacobi"] > 0 and part["ms_sequential"] > 0 and part["ratio"] > 0
        assert r["crowded"]["box_cover"] >= jacobi.CROWDED_COVER > r["box_cover"]
    assert rows[1]["steps_jacobi"] < rows[0]["steps_jacobi"]
    Console(quiet=True).print(jacobi.table(result))


def test_a_different_code_is_counted(monkeypatch):
    def wrong(*arguments):
        drawing = decode_windows(*arguments)
        if arguments[5] == 1:
            return drawing
        codes = drawing.codes.clone()
        codes[0, 7] = (codes[0, 7] + 1) % 64
        return dataclasses.replace(drawing, codes=codes)

    monkeypatch.setattr(jacobi, "decode_windows", wrong)
    result = jacobi.run(layouts=2, temperatures=(0.3,), scales=(1.0,))
    (row,) = result["settings"]
    assert result["identical"] is row["identical"] is False
    assert row["different"] == row["different_in_same_arithmetic"] == row["images"] == 3


def test_crowded_scenes_leave_little_ground():
    scenes = jacobi.crowded_scenes(4)
    assert scenes == jacobi.crowded_scenes(4) != jacobi.crowded_scenes(4, seed=1)
    for scene in scenes:
        assert scene.split() == "test"
        assert sum(o.area for o in scene.objects) / 64**2 >= jacobi.CROWDED_COVER
        assert not any(map(any, scene.overlaps))
        assert len(scene.layout().objects) == 4


def test_the_default_follows_the_measured_sets():
    """Windows won on the test layouts and lost on crowded ones: one by one they are told apart."""
    for scene in load_scenes("test", 200):
        assert covered(scene.layout()) <= MOST_COVER
    for scene in jacobi.crowded_scenes(50):
        assert covered(scene.layout()) > MOST_COVER


@pytest.mark.parametrize("asked", [
    {"layouts": 0}, {"batch": 0}, {"windows": (8, 0)}, {"drafts": ("below",)},
    {"dtype": "float16"}, {"model": "random:tiny"},
])  # fmt: skip
def test_bad_requests_are_refused(asked):
    value = next(iter(asked.values()))
    with pytest.raises(ValueError, match=str(value[-1] if isinstance(value, tuple) else value)):
        jacobi.run(**asked)


def test_the_command_prints_one_object(capsys):
    words = ["--layouts", "1", "--temperature", "1", "--cfg", "1", "--window", "8", "--json"]
    assert main(["bench", "engine", "--mode", "jacobi", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["settings"]
    assert (row["temperature"], row["cfg"], row["window"], row["draft"]) == (1, 1, 8, "above")
    assert row["identical"] and row["steps_jacobi"] <= row["steps_sequential"] / 2


@pytest.mark.parametrize("words", [
    ["--mode", "jacobi", "--window", "0"], ["--mode", "jacobi", "--temperature", "nan"],
    ["--mode", "jacobi", "--layouts", "0"], ["--mode", "jacobi", "--model", "random:tiny"],
    ["--window", "8"], ["--dtype", "bfloat16"],
])  # fmt: skip
def test_the_command_refuses(words, capsys):
    assert main(["bench", "engine", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and words[-2] in line
