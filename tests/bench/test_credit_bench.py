"""The agreement of gradients: what is compared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echogen.bench.quality import credit
from echogen.train.start import load_start


def test_halves_are_compared_with_each_other_and_with_the_judges() -> None:
    seen = []
    found = credit.run(rollouts=2, batch=1, progress=lambda *done: seen.append(done))
    rows = {row["gradient"]: row for row in found["results"]}
    assert list(rows) == ["image", "object", "judge", "loop, τ = 1.0", "loop, τ = 0.3"]
    # With one batch a half, the judge's halves are crossed with themselves.
    assert rows["judge"]["judge_cosine"] == pytest.approx(rows["judge"]["cosine"], abs=1e-6)
    for row in rows.values():
        assert -1 <= row["cosine"] <= 1 and -1 <= row["judge_cosine"] <= 1
        least = row["rollouts_for_half"]
        assert (least is None) == (row["cosine"] <= 0)
        assert least is None or least == pytest.approx((1 - row["cosine"]) / row["cosine"])
    assert seen[-1] == (10, 10)


def test_an_odd_number_is_refused() -> None:
    with pytest.raises(ValueError, match="rollouts = 3"):
        credit.run(rollouts=3)


def test_the_judge_rewards_what_it_sees() -> None:
    """The judge's advantage follows its own IoU, and the self-reward stays out of it."""
    start = load_start("tiny", "", any_stage=True)
    stage = credit._stages(start, batch=2, seed=3)["judge"]
    held = stage._hold(0)
    score = held.rollout.score
    blind = replace(held.rollout, score=score._replace(iou=torch.zeros_like(score.iou)))
    again = stage._credit(0, blind, held.mask)
    assert torch.equal(again.advantage, held.credit.advantage)
    assert held.credit.advantage.abs().max() > 0
