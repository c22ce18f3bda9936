"""The benchmark of the scheduler: complete results, and no figure for a wrong picture."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from echogen.bench.harness import WrongResult
from echogen.bench.speed import serving
from echogen.cli import main

SMALL = {"requests": 2, "slots": 4, "repeats": 1}


@pytest.fixture(autouse=True)
def one_image_each(monkeypatch, request):
    """Larger requests take longer, and the scheduler's own tests have them."""
    if request.function is not test_requests_are_mixed:
        monkeypatch.setattr(serving, "SAMPLES", 1)


@pytest.mark.parametrize("native", ["1", "0"], ids=["in C++", "by PyTorch"])
def test_measure_reports_every_provider(monkeypatch, native):
    monkeypatch.setenv("ECHOGEN_NATIVE", native)
    before, seen = torch.get_num_threads(), []
    result = serving.measure(**SMALL, progress=lambda done, total: seen.append((done, total)))
    assert torch.get_num_threads() == before
    assert json.loads(json.dumps(result)) == result
    names = [r["provider"] for r in result["results"]]
    wanted = [
        serving.SCHEDULER, serving.CODES, serving.INVARIANT, serving.ALONE, serving.DEFAULT,
        serving.STATIC,
    ]  # fmt: skip
    if native == "1":  # where one code a step is the usual way, and no other is apart from it
        wanted = [name for name in wanted if name not in (serving.CODES, serving.DEFAULT)]
    assert names == wanted
    runs = 2 * len(names) - 1  # fixed batches are of many
    assert seen == [(i, runs) for i in range(1, runs + 1)]
    by_name = {r["provider"]: r for r in result["results"]}
    for r in result["results"]:
        assert r["different"] == 0
        assert r["images_per_s"] == pytest.approx(result["images"] / r["seconds_median"])
        assert r["tokens_per_s"] == pytest.approx(64 * r["images_per_s"])
    ours = by_name[serving.SCHEDULER]["seconds_median"]
    assert list(result["ratio"]) == names[1:] and list(result["ratio_alone"]) == names[1:-1]
    for name, ratio in result["ratio"].items():
        assert ratio == pytest.approx(by_name[name]["seconds_median"] / ours)
    assert all(ratio > 0 for ratio in result["ratio_alone"].values())
    assert result["prompt_tokens"][0] < result["prompt_tokens"][1]
    Console(quiet=True).print(serving.table(result))


@pytest.mark.parametrize("name", ["scheduled", "in_batches"])
def test_another_picture_is_refused_before_timing(monkeypatch, name):
    right = getattr(serving, name)

    def wrong(*arguments):
        codes = [c.clone() for c in right(*arguments)]
        codes[0][0, 7] = (codes[0][0, 7] + 1) % 64
        return codes

    monkeypatch.setattr(serving, name, wrong)
    monkeypatch.setattr(serving, "alternate", None)
    monkeypatch.setattr(serving, "check_invariance", lambda *arguments: None)
    with pytest.raises(WrongResult, match=r"1 of \d pictures otherwise; nothing was timed"):
        serving.measure(**SMALL)


def test_a_crowd_that_shows_is_refused(monkeypatch):
    right = serving.scheduled

    def wrong(scheduler, asked):
        codes = right(scheduler, asked)
        return [c + 1 for c in codes] if len(asked) == 1 else codes

    monkeypatch.setattr(serving, "scheduled", wrong)
    with pytest.raises(WrongResult, match="other codes alone than in the crowd"):
        serving.measure(**SMALL)


def test_requests_are_mixed():
    asked = serving.mixed(24, seed=0)
    assert asked == serving.mixed(24, seed=0) != serving.mixed(24, seed=1)
    assert {a.sampling for a in asked} == set(serving.KINDS)
    assert {a.samples for a in asked} == {1, 2, 3}


@pytest.mark.parametrize("asked", [{"requests": 0}, {"repeats": 0}, {"slots": 1}])
def test_bad_requests_are_refused(asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))} = {next(iter(asked.values()))}"):
        serving.measure(**asked)


def test_the_command_prints_one_object(capsys):
    words = ["--requests", "2", "--slots", "6", "--repeats", "1", "--arrivals", "0", "--json"]
    assert main(["bench", "serving", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["requests"], result["slots"]) == (2, 6) and result["ratio_alone"]
    assert "arrivals" not in result


@pytest.mark.parametrize("words", [
    ["--requests", "0"], ["--slots", "5"], ["--repeats", "0"], ["--seed", "-1"],
    ["--model", "random:tiny"],
])  # fmt: skip
def test_the_command_refuses(words, capsys):
    assert main(["bench", "serving", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and words[0] in line


def test_what_ends_the_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("echogen.engine.serving.budget.free_bytes", lambda device: 1 << 30)
    assert main(["bench", "serving", "--slots", "4096"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "4096 slots" in line and "ask for fewer" in line

    def differ(*_):
        raise WrongResult("1 of 2 pictures otherwise; nothing was timed")

    monkeypatch.setattr(serving, "measure", differ)
    assert main(["bench", "serving"]) == 1
    assert capsys.readouterr().err == "echogen: 1 of 2 pictures otherwise; nothing was timed\n"
