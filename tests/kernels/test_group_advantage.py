"""The group-relative advantage, against numbers worked out by hand and float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from echogen.kernels import dispatch
from echogen.kernels import group_advantage as module
from echogen.kernels.group_advantage import group_advantage

GROUPS = [(1, 1), (3, 2), (4, 7), (3, 11)]
"""Groups and samples; in blocks of 4, the last takes three."""


@pytest.fixture
def small(monkeypatch):
    """Blocks of 4 samples."""
    monkeypatch.setattr(module, "SAMPLES", 4)


def test_by_hand():
    # Means 2, 0.5; population deviations sqrt(2), 0.5.
    reward = torch.tensor([[0.0, 2, 2, 4], [0, 1, 0, 1]], dtype=torch.float64)
    found = group_advantage(reward, eps=0.0).advantage
    wanted = [[-(2**0.5), 0, 0, 2**0.5], [-1, 1, -1, 1]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_a_rank_says_who_did_better_and_not_by_how_much(device):
    reward = torch.tensor([[0.1, 0.2, 0.2, 0.9], [1.0, 2.0, 2.0, 2.1]], device=device)
    found = group_advantage(reward, mode="rank").advantage
    wanted = torch.tensor([-1.5, 0.0, 0.0, 1.5], device=device) / 1.25**0.5
    torch.testing.assert_close(found, wanted.expand(2, 4))
    assert torch.equal(found, group_advantage(reward**3, mode="rank").advantage)


def test_epsilon_is_added_to_the_deviation():
    found = group_advantage(torch.tensor([[0.0, 1.0]]), eps=0.5).advantage
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, 0.7071067])
@pytest.mark.parametrize("samples", [1, 3, 8, 7])
def test_equal_rewards_have_no_advantage(value, samples):
    """Exactly none: the mean of equal floats need not be that float."""
    found = group_advantage(torch.full((2, samples), value))
    assert torch.equal(found.advantage, torch.zeros(2, samples)) and found.flat.all()


def test_groups_do_not_mix():
    reward = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    found = group_advantage(reward).advantage
    for i in range(5):
        assert torch.equal(found[i : i + 1], group_advantage(reward[i : i + 1]).advantage)
    torch.testing.assert_close(found.mean(-1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(5), atol=1e-4, rtol=0)


def test_order_within_the_group_does_not_matter_and_better_is_higher():
    reward = torch.tensor([[0.1, 0.9, 0.4, 0.5]])
    order = torch.tensor([2, 0, 3, 1])
    found = group_advantage(reward).advantage
    shuffled = group_advantage(reward[:, order]).advantage
    torch.testing.assert_close(shuffled, found[:, order])
    assert torch.equal(found.argsort(), reward.argsort())


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[layouts, samples\]"):
        group_advantage(torch.zeros(shape))


def plain_advantage(rewards: list[float], mode: str, eps: float) -> list[float]:
    n = len(rewards)
    if n == 0 or len(set(rewards)) == 1:
        return [0.0] * n
    mean = sum(rewards) / n
    if mode == "rloo":
        return [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    if mode == "rank":
        ranks = [sum(r > s for s in rewards) + (rewards.count(r) - 1) / 2 for r in rewards]
        return [(rank - (n - 1) / 2) / ((n * n - 1) / 12) ** 0.5 for rank in ranks]
    deviation = (sum((r - mean) ** 2 for r in rewards) / n) ** 0.5
    return [(r - mean) / (deviation + eps if mode == "grpo" else 1) for r in rewards]


def check_advantage(found, reward, mask, bounds, mode, eps, close):
    values, kept = reward.double().flatten().tolist(), mask.flatten().tolist()
    wanted, flat = [0.0] * len(values), []
    for start, end in itertools.pairwise(bounds):
        members = [i for i in range(start, end) if kept[i]]
        group = [values[i] for i in members]
        flat.append(len(set(group)) <= 1)
        for i, a in zip(members, plain_advantage(group, mode, eps), strict=True):
            wanted[i] = a
    assert found.flat.tolist() == flat and found.advantage.shape == reward.shape
    assert close(found.advantage.flatten(), torch.tensor(wanted).to(reward.device)) < 1e-5
    assert (found.advantage[~mask] == 0).all()


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("shape", GROUPS)
@pytest.mark.parametrize("masked", [False, True])
def test_equal_groups(mode, shape, masked, small, generator, device, relative_error):
    reward = (10 * torch.rand(shape, generator=generator)).round().to(device) / 10  # some are equal
    reward[0] = reward[0, 0]
    mask = torch.rand(shape, generator=generator).to(device) < (0.7 if masked else 2)
    found = group_advantage(reward, None, mask if masked else None, mode, 0.01)
    bounds = range(0, reward.numel() + 1, shape[1])
    check_advantage(found, reward, mask, bounds, mode, 0.01, relative_error)


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_ragged_groups(mode, masked, small, generator, device, relative_error):
    bounds = [0, 0, 1, 6, 17, 17, 19, 23]
    reward = torch.rand(23, generator=generator).to(device)
    mask = torch.rand(23, generator=generator).to(device) < (0.7 if masked else 2)
    offsets = torch.tensor(bounds, device=device)
    found = group_advantage(reward, offsets, mask if masked else None, mode, 0.01)
    check_advantage(found, reward, mask, bounds, mode, 0.01, relative_error)


@pytest.mark.parametrize("samples", [1, 8, 300])
def test_ragged_and_equal_groups_agree_to_the_last_bit(samples, generator, device):
    reward = torch.rand(3, samples, generator=generator).to(device)
    offsets = torch.arange(0, 3 * samples + 1, samples, device=device)
    found, wanted = group_advantage(reward.flatten(), offsets), group_advantage(reward)
    assert torch.equal(found.advantage.view(3, samples), wanted.advantage)
    assert torch.equal(found.flat, wanted.flat)


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_reward_that_is_not_finite_shows(mode, value, device):
    reward = torch.tensor([[0.1, value, 0.3], [0.1, 0.2, 0.3]], device=device)
    found = group_advantage(reward, mode=mode)
    assert found.advantage[0].isnan().all() and found.advantage[1].isfinite().all()
    assert found.flat.tolist() == [False, False]
    alone = group_advantage(torch.full((2, 1), value, device=device), mode=mode)
    assert alone.advantage.isnan().all() and not alone.flat.any()
    # A masked one is not there.
    mask = torch.tensor([[True, False, True], [True, False, True]], device=device)
    found = group_advantage(reward, None, mask, mode)
    assert torch.equal(found.advantage[0], found.advantage[1])
    assert found.advantage[0, 1] == 0 and found.advantage[0, 0] < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rewards_are_calculated_in_float32(dtype, generator, device):
    reward = torch.rand(3, 5, generator=generator).to(device, dtype)
    found = group_advantage(reward)
    assert found.advantage.dtype == torch.float32
    assert torch.equal(found.advantage, group_advantage(reward.float()).advantage)


def test_empty_batches(device):
    found = group_advantage(torch.zeros(0, 8, device=device))
    assert found.advantage.shape == (0, 8) and found.flat.shape == (0,)
    found = group_advantage(torch.zeros(0, device=device), torch.zeros(3).long().to(device))
    assert found.flat.tolist() == [True, True]


def test_repeats_are_bit_equal(small, generator, device):
    reward = torch.rand(11, 40, generator=generator).to(device)
    runs = [group_advantage(reward) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(generator, device):
    reward = torch.rand(3, 7, generator=generator).to(device)
    mask, offsets = reward < 0.7, torch.tensor([0, 2, 3], device=device)
    operator = torch.ops.echogen.group_advantage.default
    torch.library.opcheck(operator, (reward, None, mask, "rloo", 0.1))
    torch.library.opcheck(operator, (reward[:, 0].contiguous(), offsets, None, "grpo", 0.1))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernel_is_entered(device, launched):
    group_advantage(torch.zeros(3, 7, device=device))
    assert launched == {"_group_advantage_kernel": 1}


def test_bad_arguments(device):
    reward = torch.rand(6, device=device)
    good = {"reward": reward, "offsets": torch.tensor([0, 2, 6], device=device)}
    group_advantage(**good)
    changes = [
        ({"reward": reward.long()}, "reward is torch.int64"),
        ({"reward": reward[None]}, "reward has shape"),
        ({"reward": torch.rand(12, device=device)[::2]}, "reward has strides"),
        ({"offsets": good["offsets"].int()}, "offsets is torch.int32"),
        ({"offsets": good["offsets"][:0]}, r"offsets has shape \(0,\)"),
        ({"mask": torch.ones(5, device=device) > 0}, "mask has shape"),
        ({"mask": torch.ones(6, device=device)}, "mask is torch.float32"),
        ({"mode": "ppo"}, "mode = 'ppo'"),
        ({"eps": -1.0}, "eps = -1"),
        ({"eps": float("nan")}, "eps = nan"),
    ]
    if device == "cpu":
        changes += [
            ({"offsets": torch.tensor(o)}, r"must rise from 0 to 6")
            for o in ([0, 2, 5], [1, 6], [0, 4, 2, 6], [0, 7, 6])
        ]
    for change, match in changes:
        with pytest.raises((ValueError, TypeError), match=match):
            group_advantage(**good | change)
