"""The benchmark of what a step of several codes costs, and what it projects from acceptance."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from echogen.bench.speed import windows
from echogen.cli import main
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import MOST_KEPT, Eager


@pytest.fixture
def trained(tmp_path):
    """What mode jacobi would have counted: eight codes a step, four of crowded layouts."""
    row = {"temperature": 1.0, "cfg": 5.0, "window": 4, "steps_sequential": 64, "steps_jacobi": 8.0,
           "crowded": {"steps_sequential": 64, "steps_jacobi": 16.0}}  # fmt: skip
    rows = [row | {"temperature": 0.3, "steps_jacobi": 1.0}, row | {"window": 8}, row]
    path = tmp_path / "jacobi.json"
    path.write_text(json.dumps({"model": "tiny", "dtype": "float32", "settings": rows}))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_every_window_is_timed_beside_one_code(trained, cfg, dtype):
    threads, seen = torch.get_num_threads(), []
    result = windows.run(
        "random:micro", (1, 4), 2, cfg, dtype, repeats=3, threads=1, trained=trained,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert torch.get_num_threads() == threads and result["threads"] == 1
    assert seen == [(i, 3) for i in range(4)]
    assert json.loads(json.dumps(result)) == result and "commit" in result
    assert [row["window"] for row in result["windows"]] == [1, 4]
    assert result["ms_sequential"] > 0 and result["image_tokens"] == 16
    for row in result["windows"]:
        assert row["ms_per_step_q20"] <= row["ms_per_step"] <= row["ms_per_step_q80"]
        assert row["ratio"] > 0
    one, four = (row["projection"] for row in result["windows"])
    assert one is None and (four is None) == (cfg == 1.0)  # nothing was counted of those
    Console(quiet=True).print(windows.table(result))


def test_on_a_gpu_no_window_is_recorded_while_it_is_timed(monkeypatch, trained):
    """However many there are."""

    class Counting(Eager):
        made = 0

        def record(self, step):
            Counting.made += 1
            return step

    def on_operators(plain, table):
        return DeviceTransformer(plain, table, record=Counting())

    monkeypatch.setattr(windows, "on_operators", on_operators)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    each = range(1, 9)
    assert 1 + len(each) > MOST_KEPT
    windows.run("random:micro", each, 1, 1.0, repeats=2, threads=1, trained=trained)
    assert Counting.made == 1 + len(each)


def test_a_projection_says_what_it_is_made_of(trained, tmp_path):
    told = windows._projected(trained, 4, 5.0, 576, 0.01, 2.0)
    # 576 codes, eight a step: 72 steps of twice ten milliseconds each.
    assert told == {
        "from": "tiny", "temperature": 1.0,
        "test": {"codes_a_step": 8.0, "ms_per_image": pytest.approx(1440), "times_as_fast": 4.0},
        "crowded": {"codes_a_step": 4.0, "ms_per_image": pytest.approx(2880), "times_as_fast": 2.0},
    }  # fmt: skip
    assert windows._projected(tmp_path / "none.json", 4, 5.0, 576, 0.01, 2.0) is None


def test_the_command(capsys):
    words = ["--mode", "window", "--model", "random:micro", "--repeats", "1", "--window", "2"]
    assert main(["bench", "engine", *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["mode"] == "window" and result["windows"][0]["window"] == 2
    assert main(["bench", "engine", *words, "--window", "9"]) == 2
    assert "--window 9: this model's are 1 to 8 codes" in capsys.readouterr().err
    assert main(["bench", "engine", *words, "--draft", "left"]) == 2
