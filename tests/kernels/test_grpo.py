"""The policy loss, against autograd in float64 that uses no project code."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels import dispatch, grpo
from echogen.kernels.boxes import box_reward
from echogen.kernels.group_advantage import group_advantage
from echogen.kernels.grpo import grpo_loss

SHAPES = [(1, 1), (3, 7), (2, 37), (11, 40)]
"""Rows and tokens; in blocks of 4 by 16, the last takes three each way."""
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 tokens and 4 rows."""
    monkeypatch.setattr(grpo, "TOKENS", 16)
    monkeypatch.setattr(grpo, "ROWS", 4)


def inputs(shape, generator, device, dtype=torch.float32):
    def noise(scale):
        return scale * torch.randn(shape, generator=generator)

    logp = -2 * torch.rand(shape, generator=generator)
    old, ref = logp + noise(0.3), logp + noise(0.5)
    advantage = torch.randn(shape[0], generator=generator).to(device)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, 0] = True
    return *(t.to(device, dtype) for t in (logp, old, ref)), advantage, mask.to(device)


def oracle(logp, old, advantage, mask, ref, beta, normalise, max_tokens, sampled=None, cap=2.0):
    """The formulas as they are written, in float64 autograd."""
    low, high = CLIP["clip_low"], CLIP["clip_high"]
    keep = mask.double()
    old = logp.detach() if old is None else old.double()
    ratio, a = torch.exp(logp - old), advantage.double()[:, None]
    plain, clipped = ratio * a, ratio.clamp(1 - low, 1 + high) * a
    token, capped = -torch.minimum(plain, clipped), torch.zeros_like(keep)
    if sampled is not None:
        importance = torch.exp(old - sampled.double())
        token, capped = token * importance.clamp(max=cap), (importance > cap).double()
    kl = torch.zeros_like(logp)
    if ref is not None:
        d = ref.double() - logp
        kl = torch.exp(d) - d - 1
    token = token + beta * kl
    count = keep.sum()
    if normalise == "sequence":
        rows = (token * keep).sum(1) / keep.sum(1).clamp(min=1)
        loss = rows.sum() / (keep.sum(1) > 0).sum().clamp(min=1)
    elif normalise == "token":
        loss = (token * keep).sum() / count
    else:
        loss = (token * keep).sum() / (len(logp) * max_tokens)
    watched = ((clipped < plain).double(), kl, capped)
    return loss, *((x * keep).sum() / count for x in watched)


@pytest.mark.parametrize("normalise", grpo.NORMALISERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["all", "no old", "no reference", "neither", "other sampler"])
def test_loss_and_gradient(normalise, shape, form, small, generator, device, relative_error):
    logp, old, ref, advantage, mask = inputs(shape, generator, device)
    if len(mask) > 3:
        mask[2] = False  # a sequence of no tokens
    sampled = None
    if form == "other sampler":
        sampled = (old + 0.6 * torch.randn(shape, generator=generator).to(device)).contiguous()
    old = None if form in ("no old", "neither") else old
    ref = None if form in ("no reference", "neither") else ref
    beta = 0.0 if ref is None else 0.1
    rest = {"beta": beta, "normalise": normalise, "max_tokens": 50}
    ours, truth = logp.clone().requires_grad_(), logp.double().requires_grad_()
    found = grpo_loss(
        ours, old, advantage, mask, ref, **CLIP, **rest, sampled_logp=sampled, importance_cap=1.5
    )
    wanted = oracle(truth, old, advantage, mask, ref, beta, normalise, 50, sampled, 1.5)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and a.shape == ()
        assert a.item() == pytest.approx(b.item(), rel=1e-5, abs=1e-6)
    (3 * found.loss).backward()
    (3 * wanted[0]).backward()
    assert relative_error(ours.grad, truth.grad) < 1e-5
    assert (ours.grad[~mask] == 0).all()


def test_blocks_of_the_usual_size(generator, device, relative_error):
    logp, old, ref, advantage, mask = inputs((3, 2500), generator, device)
    ours, truth = logp.clone().requires_grad_(), logp.double().requires_grad_()
    found = grpo_loss(ours, old, advantage, mask, ref, **CLIP, beta=0.1)
    wanted = oracle(truth, old, advantage, mask, ref, 0.1, "sequence", None)
    found.loss.backward()
    wanted[0].backward()
    assert found.loss.item() == pytest.approx(wanted[0].item(), rel=1e-5, abs=1e-6)
    assert relative_error(ours.grad, truth.grad) < 1e-5


def test_the_gradient_raises_what_did_well():
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    grpo_loss(logp, None, torch.tensor([1.0, -1.0]), mask).loss.backward()
    assert (logp.grad[0] < 0).all() and (logp.grad[1] > 0).all()


def test_one_update_is_the_same_as_its_own_old_policy(small, generator, device):
    logp, _, ref, advantage, mask = inputs((5, 40), generator, device)
    grads = []
    for old in (None, logp.clone()):
        ours = logp.clone().requires_grad_()
        found = grpo_loss(ours, old, advantage, mask, ref, beta=0.1)
        found.loss.backward()
        grads.append(ours.grad)
        assert found.clip_fraction == 0
    assert torch.equal(*grads)


def test_what_another_sampler_draws_is_weighted_to_the_policys_gradient(device):
    """Two codes by a policy of (½, ½) and a sampler of (0.8, 0.2): weighted, the mean gradient over
    the sampler's draws is the policy's; unweighted, it is another."""
    policy, sampler = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    reward = torch.tensor([1.0, 0.0])
    logits = policy.log().to(device).requires_grad_()
    mask = torch.ones(2, 1, dtype=torch.bool, device=device)
    grads = {}
    for name, sampled in (("weighted", sampler.log().to(device)[:, None]), ("plain", None)):
        logp = logits.log_softmax(0)[:, None].contiguous()
        # Each code once, its advantage times how often the sampler draws it.
        advantage = (reward * sampler).to(device)
        loss = grpo_loss(logp, None, advantage, mask, sampled_logp=sampled, importance_cap=9.0).loss
        (grads[name],) = torch.autograd.grad(2 * loss, logits)  # a mean over 2 rows
    truth = logits.detach().clone().requires_grad_()
    (-(truth.softmax(0) * reward.to(device)).sum()).backward()
    torch.testing.assert_close(grads["weighted"], truth.grad)
    assert not torch.allclose(grads["plain"], truth.grad, atol=0.05)


def test_a_weight_is_held_at_its_cap_and_leaves_the_penalty_alone(device):
    logp = torch.tensor([[-1.0, -1.0, -1.0]], device=device).requires_grad_()
    sampled = torch.tensor([[-1.0, -4.0, float("-inf")]], device=device)
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    one = torch.ones(1, device=device)
    found = grpo_loss(logp, None, one, mask, sampled_logp=sampled, importance_cap=2.0)
    assert found.loss.item() == pytest.approx(-(1 + 2 + 2) / 3)
    assert found.capped_fraction.item() == pytest.approx(2 / 3)
    ref = torch.full_like(sampled, -2.0)
    rest = {"beta": 0.5, "sampled_logp": sampled}
    none, one = (grpo_loss(logp, None, x * one, mask, ref, **rest) for x in (0.0, 1.0))
    assert (none.loss - one.loss).item() == pytest.approx(5 / 3)
    assert none.loss.item() == pytest.approx(0.5 * none.mean_kl.item())


def test_a_small_kl_does_not_cancel(small, generator, device):
    """exp(d) − d − 1 in float32 is noise for d near 1e-4."""
    logp, old, _, advantage, mask = inputs((5, 40), generator, device)
    ref = logp + 1e-4 * torch.randn(logp.shape, generator=generator).to(device)
    d = torch.where(mask, ref - logp, 0.0).double()
    wanted = (torch.expm1(d) - d).sum() / mask.sum()
    found = grpo_loss(logp, old, advantage, mask, ref).mean_kl
    assert float(found) == pytest.approx(float(wanted), rel=1e-5) and wanted < 1e-7


@pytest.mark.parametrize("normalise", grpo.NORMALISERS)
def test_masked_tokens_contribute_nothing_whatever_they_hold(normalise, small, generator, device):
    logp, old, ref, advantage, mask = inputs((5, 40), generator, device)
    rest = {"normalise": normalise, "max_tokens": 40, "beta": 0.1}
    grads, losses = [], []
    for rubbish in (0.0, float("nan"), float("-inf")):
        new, was, frozen, drawn = (t.masked_fill(~mask, rubbish) for t in (logp, old, ref, old))
        new.requires_grad_()
        found = grpo_loss(new, was, advantage, mask, frozen, **rest, sampled_logp=drawn + 0.5)
        found.loss.backward()
        grads.append(new.grad)
        losses.append(torch.stack([x.detach() for x in found]))
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_a_reference_that_is_only_measured_spoils_nothing(generator, device):
    """With β = 0 its NaN is in the mean KL alone."""
    logp = -torch.rand(2, 9, generator=generator).to(device)
    reference = logp.clone()
    reference[0, 3] = float("nan")
    advantage, mask = torch.ones(2, device=device), torch.ones_like(logp, dtype=torch.bool)
    ours = logp.clone().requires_grad_()
    found = grpo_loss(ours, None, advantage, mask, reference, beta=0.0)
    found.loss.backward()
    assert found.loss.isfinite() and found.mean_kl.isnan()
    assert ours.grad is not None and ours.grad.isfinite().all() and (ours.grad != 0).all()


def test_a_nan_is_not_hidden(generator, device):
    logp, old, _, advantage, mask = inputs((3, 7), generator, device)
    broken = logp.clone()
    broken[0, 0] = float("nan")
    for a, b, c in ((broken, old, None), (broken, None, None), (logp, broken, None),
                    (logp, old, broken)):  # fmt: skip
        a = a.clone().requires_grad_()
        found = grpo_loss(a, b, advantage, mask, c, beta=0.0 if c is None else 0.1)
        found.loss.backward()
        assert found.loss.isnan() and a.grad[0, 0].isnan() and a.grad[1:].isfinite().all()
    assert grpo_loss(logp, old, advantage, mask, sampled_logp=broken).loss.isnan()
    assert grpo_loss(logp, old, advantage.fill_(float("nan")), mask).loss.isnan()


def test_distant_policies_do_not_overflow(device):
    logp = torch.tensor([[-1.0, -300.0, -1.0, -300.0]], device=device).requires_grad_()
    old = torch.tensor([[-300.0, -1.0, -300.0, -1.0]], device=device)
    mask = torch.ones(1, 4, dtype=torch.bool, device=device)
    for a in (1.0, -1.0, 0.0):
        found = grpo_loss(logp, old, torch.full((1,), a, device=device), mask, old, beta=0.1)
        (grad,) = torch.autograd.grad(found.loss, logp)
        assert all(torch.isfinite(x).all() for x in (*found, grad))
        assert (grad == 0).all(), "a ratio that is held has no slope, and no say in a clipped norm"


@pytest.mark.parametrize("apart", [59.0, 61.0])
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_held_ratios_have_the_gradient_of_the_loss(apart, a, device):
    new = torch.tensor([[0.0, apart, 0.0, -3.0]], device=device, dtype=torch.float32)
    old = torch.tensor([[0.0, 0.0, apart, -3.5]], device=device)
    ours, truth = new.clone().requires_grad_(), new.double().requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool, device=device)
    grpo_loss(ours, old, torch.tensor([a], device=device), mask, old, beta=0.1).loss.backward()
    change = (truth - old.double()).clamp(-60, 60)
    ratio = change.exp()
    policy = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    (-policy + 0.1 * ((-change).exp() + change - 1)).mean().backward()
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalise", grpo.NORMALISERS)
def test_no_tokens_no_loss(normalise, device):
    logp = torch.zeros(3, 5, device=device, requires_grad=True)
    mask = torch.zeros(3, 5, dtype=torch.bool, device=device)
    found = grpo_loss(logp, None, torch.ones(3, device=device), mask, normalise=normalise,
                      max_tokens=5)  # fmt: skip
    found.loss.backward()
    assert [x.item() for x in found] == [0, 0, 0, 0] and (logp.grad == 0).all()


def test_the_reference_is_measured_without_a_penalty(small, generator, device):
    logp, old, ref, advantage, mask = inputs((5, 40), generator, device)
    grads = []
    for frozen in (None, ref):
        ours = logp.clone().requires_grad_()
        found = grpo_loss(ours, old, advantage, mask, frozen)
        found.loss.backward()
        grads.append(ours.grad)
    assert torch.equal(*grads) and found.mean_kl > 0


def test_a_reward_that_has_a_gradient_gives_none(generator, device):
    """From boxes with a gradient to the loss: the advantage is a weight, and logp alone learns."""
    corner = torch.rand(3, 4, 2, 2, generator=generator)
    pred = torch.cat((0.5 * corner, 0.5 + 0.5 * corner), -1).to(device).requires_grad_()
    target = torch.tensor([0.2, 0.3, 0.6, 0.7], device=device).repeat(3, 2, 1)
    reward = box_reward(pred, target, pred[:, 0, :, 0] >= 0).reward
    found = group_advantage(reward)
    assert reward.requires_grad and not found.advantage.requires_grad
    logp = torch.full((12, 5), -1.0, device=device, requires_grad=True)
    grpo_loss(logp, logp.detach(), found.advantage.flatten(), logp < 0).loss.backward()
    assert logp.grad is not None and (logp.grad != 0).any() and pred.grad is None


def test_nothing_is_kept_for_backward_but_the_inputs(generator, device):
    logp, old, ref, advantage, mask = inputs((5, 40), generator, device)
    logp.requires_grad_()
    sampled, kept = old + 0.1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grpo_loss(logp, old, advantage, mask, ref, beta=0.1, sampled_logp=sampled)
    own = {t.data_ptr() for t in (logp, old, advantage, mask, ref, sampled)}
    assert all(t.numel() == 5 or t.data_ptr() in own for t in kept) and len(kept) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype, small, generator, device, relative_error):
    logp, old, ref, advantage, mask = inputs((5, 40), generator, device, dtype)
    ours, truth = logp.clone().requires_grad_(), logp.double().requires_grad_()
    found = grpo_loss(ours, old, advantage, mask, ref, **CLIP, beta=0.1, sampled_logp=ref)
    wanted = oracle(truth, old, advantage, mask, ref, 0.1, "sequence", None, ref)
    found.loss.backward()
    wanted[0].backward()
    exact = dtype == torch.float64
    assert ours.grad.dtype == dtype
    assert found.loss.item() == pytest.approx(
        wanted[0].item(), rel=1e-12 if exact else 1e-5, abs=1e-6
    )
    assert relative_error(ours.grad, truth.grad) < (1e-12 if exact else 1e-2)


def test_repeats_are_bit_equal(small, generator, device):
    logp, old, ref, advantage, mask = inputs((11, 40), generator, device)
    runs = []
    for _ in range(2):
        ours = logp.clone().requires_grad_()
        found = grpo_loss(ours, old, advantage, mask, ref, beta=0.1)
        found.loss.backward()
        runs.append((*found, ours.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(generator, device):
    logp, old, ref, advantage, mask = inputs((3, 7), generator, device)
    ops = torch.ops.echogen
    numbers = (0.2, 0.2, 0.1, 2.0)
    logp.requires_grad_()
    for given in (
        (logp, old, advantage, mask, ref, ref),
        (logp, None, advantage, mask, None, None),
    ):
        torch.library.opcheck(ops.grpo_loss.default, (*given, *numbers, "sequence", 1))
    given = (logp.detach(), old, advantage, mask, ref, ref, *numbers, advantage, advantage.sum())
    torch.library.opcheck(ops.grpo_loss_backward.default, given)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    logp, old, ref, advantage, mask = inputs((3, 7), generator, device)
    grpo_loss(logp.requires_grad_(), old, advantage, mask, ref).loss.backward()
    names = ("grpo_rows", "grpo_total", "grpo_backward")
    assert launched == {f"_{name}_kernel": 1 for name in names}


def test_bad_arguments(device):
    logp = torch.zeros(3, 4, device=device)
    good = {"logp": logp, "old_logp": logp, "advantage": logp[:, 0].contiguous(),
            "mask": logp == 0, "ref_logp": logp}  # fmt: skip
    grpo_loss(**good)
    for change, match in [
        ({"logp": logp[0]}, "logp has shape"),
        ({"logp": logp.int()}, "logp is torch.int32"),
        ({"logp": torch.zeros(4, 3, device=device).T}, "logp has strides"),
        ({"logp": logp[:, :0], "old_logp": logp[:, :0], "ref_logp": None,
          "mask": good["mask"][:, :0]}, "must not be empty"),
        ({"old_logp": logp[:2]}, "old_logp has shape"),
        ({"ref_logp": logp[:, :2]}, "ref_logp has shape"),
        ({"advantage": logp}, "advantage has shape"),
        ({"mask": logp}, "mask is torch.float32"),
        ({"clip_low": 1.5}, "clip_low = 1.5"),
        ({"clip_high": -0.1}, "clip_high = -0.1"),
        ({"sampled_logp": logp[:2]}, "sampled_logp has shape"),
        ({"sampled_logp": logp.int()}, "sampled_logp is torch.int32"),
        ({"importance_cap": 0.5}, "importance_cap = 0.5"),
        ({"importance_cap": float("nan")}, "importance_cap = nan"),
        ({"beta": -1.0}, "beta = -1"),
        ({"beta": 0.1, "ref_logp": None}, "beta = 0.1 without ref_logp"),
        ({"normalise": "batch"}, "normalise = 'batch'"),
        ({"normalise": "constant"}, "max_tokens = None"),
        ({"max_tokens": 0}, "max_tokens = 0"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=match):
            grpo_loss(**good | change)
