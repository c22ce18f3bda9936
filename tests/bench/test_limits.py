"""The roofline: ceilings that are positive, floors from the model's shapes, shares of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from echogen.bench import roofline
from echogen.bench.profile.stopwatch import Row
from echogen.bench.roofline import Roofline, measure
from echogen.bench.speed import limits, phases
from echogen.engine.config import ModelConfig
from echogen.engine.engine import Engine


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return Engine.from_pretrained("tiny").transformer.config


def test_weights_are_those_of_the_model(config):
    transformer = Engine.from_pretrained("tiny").transformer
    matrices = [p for b in transformer.blocks for p in b.parameters() if p.dim() == 2]
    weights = phases.Weights.of(config)
    assert weights.body == sum(p.numel() for p in matrices)
    head = [p.numel() for p in transformer.image_head.parameters() if p.dim() == 2]
    assert weights.image_head == sum(head)
    assert weights.cached == 2 * config.layers * config.kv_heads * config.head_dim


def test_a_floor_counts_weights_once_a_call_and_products_once_a_token(config):
    weights = phases.Weights.of(config)
    row = Row("engine/decode/step", 3, payload={"rows": 6, "tokens": 6, "held": 100})
    cost = phases.floor(config, row, 4)
    assert cost is not None
    read = 3 * (weights.body + weights.image_head) + 100 * weights.cached
    assert cost.bytes == 4 * read
    assert cost.flops > 2 * 6 * (weights.body + weights.image_head)
    assert phases.floor(config, Row("engine/sample", 3), 4) is None


def test_ceilings_of_a_cpu():
    found = measure(torch.device("cpu"), torch.float32)
    assert all(rate > 1e8 for rate in found.to_dict().values())


@pytest.mark.parametrize(("copy_ms", "rate"), [(2.5, 4e9), (1.0, 8e9)])
def test_ceilings_of_a_gpu_are_timed_as_operators_are(monkeypatch, copy_ms, rate):
    """Reading alone may be faster than a copy, which reads and writes."""
    taken = iter([copy_ms, 1.0, 0.5])

    def times(call, **_):
        call()
        return {"median": next(taken)}

    monkeypatch.setattr(roofline.clock, "times", times)
    monkeypatch.setattr(roofline, "NUMBERS", 10**6)
    monkeypatch.setattr(roofline, "SIDE", 100)
    about = SimpleNamespace(multi_processor_count=132, clock_rate=1_980_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    found = roofline._of_cuda(torch.device("cpu"), torch.float32)
    assert found.bytes_per_s == pytest.approx(rate)
    assert found.flops_per_s == pytest.approx(2 * 100**3 / 0.5e-3)
    assert found.issues_per_s == pytest.approx(132 * 1.98e9 * 128)


@pytest.fixture
def fast(monkeypatch):
    """One run a phase on a machine of given rates: how fast this one is at the moment, beside
    whatever else it does, is not what these tests are about."""
    monkeypatch.setattr(limits, "REPEATS", 1)
    rates = Roofline(1e13, 1e15, 1e14, 1e13)
    monkeypatch.setattr(limits, "measure", lambda *_: rates)
    return rates


def test_equal_prompts_of_a_batch_are_counted_once(fast):
    """They are run once."""
    one, eight = (
        {r["phase"]: r for r in limits._phases("generate", limits.Asked("tiny", "cpu", n), fast)}
        for n in (1, 8)
    )
    prefill = "engine/prefill/run"
    assert eight[prefill]["flops"] == one[prefill]["flops"] > 0
    assert eight[prefill]["bytes"] == one[prefill]["bytes"]
    assert eight["engine/decode/step"]["flops"] > 7 * one["engine/decode/step"]["flops"]


def test_run(fast, monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_sizes", lambda device: {"tiny": ["swiglu", "linear_logprob"]})
    seen = []
    result = limits.run(progress=lambda *done: seen.append(done))
    assert json.loads(json.dumps(result)) == result and seen[-1] == (4, 4)
    assert {r["operator"] for r in result["operators"]} >= {"swiglu", "linear_logprob"}
    assert all(r["percent_of_floor"] > 0 for r in result["operators"])
    by = {(r["work"], r["phase"]): r for r in result["phases"]}
    names = {name for _, name in by}
    (drawn,) = names & {"engine/decode/step", "engine/decode/window"}
    step = by["generate", drawn]
    assert 1 <= step["count"] <= 63 and step["bytes"] > 0
    assert 0 < step["floor_ms"] < step["ms"] and step["percent_of_floor"] < 100
    assert by["generate", "engine/vq/decode"]["floor_ms"] is None
    assert by["generate", "engine/prefill/run"]["percent_of_floor"] < 100
    assert by["ground", "engine/ground/step"]["percent_of_floor"] > 0
    for title, headings, rows in limits.tables(result):
        assert title and all(len(row) == len(headings) for row in rows)
    pytest.importorskip("matplotlib")
    limits.plot(result, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
