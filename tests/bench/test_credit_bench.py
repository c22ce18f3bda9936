"""The agreement of gradients: what is compared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from echogen.bench.quality import credit
from echogen.train.start import load_start


def test_gradients_are_compared_with_each_other_and_with_the_judges() -> None:
    seen = []
    asked = ["object, 2 boxes", "judge", "loop, τ = 0.3"]
    found = credit.run(
        rollouts=3, batch=1, gradients=asked, float32=True, progress=lambda *d: seen.append(d)
    )
    rows = {row["gradient"]: row for row in found["results"]}
    assert list(rows) == asked and found["precision"] == "float32"
    judge = rows["judge"]
    for row in rows.values():
        assert row["signal"] <= 1 and row["signal_stderr"] > 0
        assert (row["batches_for_half"] is None) == (row["signal"] <= 0)
        assert list(row["parts"]) == list(credit.PARTS)
        assert all(part["signal"] <= 1 for part in row["parts"].values())
    assert judge["judge_cosine"] in (None, pytest.approx(1.0))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_the_share_of_a_signal_that_is_known() -> None:
    """Gradients made of a signal and noise: share, batches and cosine are those they are made to
    have, within the error that is told; and the error is that of repetition."""
    generator = torch.Generator().manual_seed(3)
    width, rollouts, found = 400, 40, []
    signal = torch.zeros(2, width)
    signal[0, 0] = signal[1, 1] = 2.0
    for _ in range(30):
        noise = torch.randn(2, rollouts, width, generator=generator) / 20  # squared, 1 in all
        ours = signal[0] + noise[0] * 5
        judged = 0.6 * signal[0] + 0.8 * signal[1] + noise[1] * 5
        found.append(credit.compared(ours, judged))
    told = {name: [row[name] for row in found] for name in found[0]}
    share = 4 / (4 + 25)
    assert np.mean(told["signal"]) == pytest.approx(share, abs=0.01)
    assert np.mean(told["batches_for_half"]) == pytest.approx(1 / share - 1, rel=0.1)
    assert np.mean(told["judge_cosine"]) == pytest.approx(0.6, abs=0.05)
    for name in ("signal", "judge_cosine"):
        assert np.mean(told[f"{name}_stderr"]) == pytest.approx(np.std(told[name]), rel=0.4)


def test_every_parameter_that_draws_is_of_one_part() -> None:
    module = load_start("tiny", "", any_stage=True).engine.transformer
    columns = credit._columns(module)
    every = torch.cat(list(columns.values()))
    others = sum(p.numel() for n, p in module.named_parameters() if n.startswith(("text_h", "pix")))
    assert len(every) == len(every.unique()) == sum(p.numel() for p in module.parameters()) - others


def test_noise_alone_has_no_signal() -> None:
    noise = torch.randn(2, 20, 300, generator=torch.Generator().manual_seed(1))
    found = credit.compared(noise[0], noise[1])
    assert abs(found["signal"]) < 3 * found["signal_stderr"]
    assert credit.compared(noise[0] - noise[0].mean(0), None)["batches_for_half"] is None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="rollouts = 2; it must be at least 3"):
        credit.run(rollouts=2)
    with pytest.raises(ValueError, match="gradient 'objects' is unknown; choose of image, object"):
        credit.run(gradients=["objects"])


def test_the_judge_rewards_what_it_sees() -> None:
    """The judge's advantage follows its own IoU, and the self-reward stays out of it."""
    start = load_start("tiny", "", any_stage=True)
    stage = credit._stage("judge", start, batch=2, seed=3)
    held = stage._hold(0)
    score = held.rollout.score
    blind = replace(held.rollout, score=score._replace(iou=torch.zeros_like(score.iou)))
    again = stage._credit(0, blind, held.mask)
    assert torch.equal(again.advantage, held.credit.advantage)
    assert held.credit.advantage.abs().max() > 0
