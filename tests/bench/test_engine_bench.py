"""The engine's benchmark: complete results, and no figure for a wrong picture."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from echogen.bench import harness
from echogen.bench.peers.janus_port import JanusPort
from echogen.bench.speed import engine

MICRO = "random:micro"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """On a machine whose cores are taken, a second thread turned 1 s into 20."""
    monkeypatch.setattr(engine.os, "cpu_count", lambda: 1)


def test_run_reports_both_providers():
    threads, seen = torch.get_num_threads(), []
    result = engine.run(MICRO, repeats=1, progress=lambda done, total: seen.append((done, total)))
    assert torch.get_num_threads() == threads
    assert seen == [(1, 2), (2, 2)]
    assert json.loads(json.dumps(result)) == result
    assert [r["provider"] for r in result["results"]] == ["echogen", "transformers"]
    for r in result["results"]:
        assert r["tokens_per_s"] == pytest.approx(16 * r["images_per_s"])
        assert r["ms_per_step"] == pytest.approx(1e3 / r["tokens_per_s"])
        assert r["tokens_per_s_q20"] <= r["tokens_per_s"] <= r["tokens_per_s_q80"]
        assert r["threads"] >= 1
    ours, port = result["results"]
    assert result["ratio"] == pytest.approx(ours["tokens_per_s"] / port["tokens_per_s"])
    assert (result["batch"], result["cfg"], result["dtype"]) == (1, 5.0, "float32")
    assert result["device"] == "cpu" and result["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "cpu"} <= result.keys()
    Console(quiet=True).print(engine.table(result))


def test_batch_without_guidance_or_peer():
    result = engine.run(MICRO, peer="none", repeats=1, batch=2, cfg=1.0)
    assert [r["provider"] for r in result["results"]] == ["echogen"]
    assert result["ratio"] is None
    ours = result["results"][0]
    assert ours["tokens_per_s"] == pytest.approx(2 * 1e3 / ours["ms_per_step"])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_picture_is_refused_before_timing(monkeypatch, kind):
    right = JanusPort.generate

    def wrong(self, prompts, cfg, cache):
        codes = right(self, prompts, cfg, cache).clone()
        if cache == kind:
            codes[0, 7] = (codes[0, 7] + 1) % 64
        return codes

    def timed(*_):
        raise AssertionError("timed a wrong result")

    monkeypatch.setattr(JanusPort, "generate", wrong)
    monkeypatch.setattr(engine, "_best", timed)
    monkeypatch.setattr(engine, "alternate", timed)
    with pytest.raises(harness.WrongResult, match=r"position 7 of image 0.*nothing was timed"):
        engine.run(MICRO, repeats=1)


@pytest.mark.parametrize(
    "asked", [{"repeats": 0}, {"batch": 0}, {"peer": "other"}, {"cfg": 1.0}, {"model": "random:no"}]
)
def test_bad_requests_are_refused(asked):
    with pytest.raises(ValueError, match=str(next(iter(asked.values())))):
        engine.run(**{"model": MICRO, **asked})


def test_contestants_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = harness.alternate(calls, 3)
    assert order == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [3, 3]


def test_quantiles():
    assert harness.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx(
        {"median": 3.0, "q20": 1.8, "q80": 4.2}
    )
