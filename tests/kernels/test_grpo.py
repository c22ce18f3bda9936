"""The group-relative advantage, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels.grpo import group_advantage


def test_by_hand():
    # Means 2, 0.5; population deviations sqrt(2), 0.5.
    reward = torch.tensor([[0.0, 2, 2, 4], [0, 1, 0, 1]], dtype=torch.float64)
    found = group_advantage(reward, eps=0.0)
    wanted = [[-(2**0.5), 0, 0, 2**0.5], [-1, 1, -1, 1]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_epsilon_is_added_to_the_deviation():
    found = group_advantage(torch.tensor([[0.0, 1.0]]), eps=0.5)
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, 0.7071067])
@pytest.mark.parametrize("samples", [1, 3, 8, 7])
def test_equal_rewards_have_no_advantage(value, samples):
    """Exactly none: the mean of equal floats need not be that float."""
    found = group_advantage(torch.full((2, samples), value))
    assert torch.equal(found, torch.zeros(2, samples))


def test_groups_do_not_mix():
    reward = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    found = group_advantage(reward)
    for i in range(5):
        assert torch.equal(found[i : i + 1], group_advantage(reward[i : i + 1]))
    torch.testing.assert_close(found.mean(-1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(5), atol=1e-4, rtol=0)


def test_order_within_the_group_does_not_matter_and_better_is_higher():
    reward = torch.tensor([[0.1, 0.9, 0.4, 0.5]])
    order = torch.tensor([2, 0, 3, 1])
    found = group_advantage(reward)
    torch.testing.assert_close(group_advantage(reward[:, order]), found[:, order])
    assert torch.equal(found.argsort(), reward.argsort())


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[layouts, samples\]"):
        group_advantage(torch.zeros(shape))
