"""The stages' benchmark: complete, its shares sum to one, its passes are counted."""

from __future__ import annotations

import json

import pytest

from echogen.bench.speed import train


@pytest.mark.parametrize(
    ("stage", "float32"), [*((name, False) for name in train.STAGES), ("pmtp", True)]
)
def test_run(stage, float32):
    seen = []
    result = train.run(
        stage, batch=2, repeats=1, float32=float32, progress=lambda *done: seen.append(done)
    )
    assert result["dtype"] == ("float32" if float32 else "bfloat16")
    assert json.loads(json.dumps(result)) == result and seen == [(1, 1)]
    assert result["images"] == (16 if stage == "cycle-rl" else 2)
    assert result["images_per_s"] == pytest.approx(result["images"] / result["ms_per_step"] * 1e3)
    assert result["tokens_per_s"] > 0 and 0 < result["utilisation"] < 1
    assert result["peak_mib"] > 100
    assert sum(result["shares"].values()) == pytest.approx(1)
    wanted = {"data", "forward", "backward", "optimizer"}
    wanted |= {"rollout", "reward"} if stage == "cycle-rl" else set()
    assert {f"train/{stage}/{part}" for part in wanted} | {train.PASS} <= result["shares"].keys()


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="stage vq: unknown; choose pmtp, djo, cycle-rl"):
        train.run("vq")
