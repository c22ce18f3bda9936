"""Launch constants and trials: launches take what is tried, from any thread, and only within."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from echogen.kernels import constants, decode_attention, gumbel, logprob, sampling, wide_linear
from echogen.kernels.constants import chosen, trial
from echogen.kernels.dispatch import recorded
from echogen.kernels.logprob import BackwardTile, ForwardTile, linear_logprob

NOW = [decode_attention.SPLITS, decode_attention.HALF, decode_attention.SINGLE,
       wide_linear.Tile(64, 16, 64, 4, 11), sampling.Tile(2048, 4), gumbel.ForwardTile(16, 16, 4),
       gumbel.BackwardTile(32, 64, 4), gumbel.SPLITS, logprob.FORWARD,
       logprob.BACKWARD]  # fmt: skip


def test_a_trial_is_of_one_type_and_ends():
    other = ForwardTile(64, 2)
    with trial(other) as launched:
        assert chosen(logprob.FORWARD) is other and chosen(logprob.BACKWARD) is logprob.BACKWARD
        with trial():
            assert chosen(logprob.FORWARD) is logprob.FORWARD
        # Where autograd runs a GPU's backward.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(chosen, logprob.FORWARD).result() is other
    assert launched.asked == {ForwardTile: logprob.FORWARD, BackwardTile: logprob.BACKWARD}
    assert chosen(logprob.FORWARD) is logprob.FORWARD and constants._trial is None


def test_launches_take_what_is_tried():
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(7, 4)
    with recorded() as found, trial(BackwardTile(256, 2)):
        linear_logprob(hidden, weight, torch.arange(3)).logprob.sum().backward()
    forward, backward = (launch.constants for launch in found)
    now = logprob.FORWARD
    assert (forward["COLUMNS"], forward["num_warps"]) == (now.columns, now.warps)
    assert (backward["COLUMNS"], backward["num_warps"]) == (256, 2)


@pytest.mark.parametrize("now", NOW, ids=repr)
def test_candidates_are_of_the_type_that_they_would_replace(now):
    others = now.candidates()
    assert len(set(others) - {now}) > 2 and {type(other) for other in others} == {type(now)}
