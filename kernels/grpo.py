"""The clipped loss of group-relative policy optimisation, given how much better each sample did
than the others of its layout (`group_advantage`).

In plain torch it would hold a dozen [N, T] tensors for autograd. Here it holds none: forward leaves
five sums per row, and backward recomputes each token and writes the gradient. All sums have a fixed
order, so that a resumed run repeats the original one bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import grpo as reference
from echogen.kernels.reference.precision import wide_type

TOKENS = 1024  # of a row at a time
ROWS = 1024  # of the final reduction at a time

NORMALISERS = ("sequence", "token", "constant")
Normaliser = Literal["sequence", "token", "constant"]

_RATIO_LIMIT = tl.constexpr(reference.RATIO_LIMIT)
_SERIES_BELOW = tl.constexpr(reference.SERIES_BELOW)


@triton.jit
def _held(d):
    """Clamp to ± the limit; NaN stays, which minimum and maximum would drop."""
    return tl.where(d > _RATIO_LIMIT, _RATIO_LIMIT, tl.where(d < -_RATIO_LIMIT, -_RATIO_LIMIT, d))


@triton.jit
def _k3(d):
    """exp(d) − d − 1, from its series where the difference would cancel."""
    series = d * (1 / 40320) + 1 / 5040
    series = series * d + 1 / 720
    series = series * d + 1 / 120
    series = series * d + 1 / 24
    series = series * d + 1 / 6
    series = series * d + 1 / 2
    return tl.where(tl.abs(d) < _SERIES_BELOW, d * d * series, tl.exp(d) - d - 1.0)


@triton.jit
def _token_terms(
    logp_ptr, old_ptr, mask_ptr, ref_ptr, sampled_ptr, advantage, row, first, width, clip_low,
    clip_high, beta, cap, PENALISED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Loss, clipped, k3, capped and d loss/d logp of one block of a row; 0 where masked."""
    column = first + tl.arange(0, TOKENS)
    inside = column < width
    place = row.to(tl.int64) * width + column
    keep = inside & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)
    # Not masked by `keep`, which would prevent 16-byte loads.
    new = tl.where(keep, tl.load(logp_ptr + place, mask=inside, other=0.0).to(tl.float32), 0.0)
    old = new
    if old_ptr is not None:
        old = tl.load(old_ptr + place, mask=inside, other=0.0).to(tl.float32)
        old = tl.where(keep, old, 0.0)
    change = new - old
    ratio = tl.exp(_held(change))
    held = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * advantage
    plain = ratio * advantage
    clipped = keep & (held < plain)
    loss = -tl.where(clipped, held, plain)
    # Clamped ratios have no slope; that of exp(60) would make the whole gradient's norm infinite.
    grad = -tl.where(clipped | (tl.abs(change) > _RATIO_LIMIT), 0.0, plain)
    capped = tl.zeros([TOKENS], tl.int1)
    if sampled_ptr is not None:
        sampled = tl.load(sampled_ptr + place, mask=inside, other=0.0).to(tl.float32)
        importance = tl.exp(_held(old - tl.where(keep, sampled, 0.0)))
        capped = keep & (importance > cap)
        importance = tl.where(capped, cap, importance)
        loss *= importance
        grad *= importance
    kl = tl.zeros([TOKENS], tl.float32)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + place, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(keep, ref, 0.0) - new
        d = _held(apart)
        kl = tl.where(keep, _k3(d), 0.0)
        if PENALISED:  # else the KL is only measured, even where the reference is NaN
            loss += beta * kl
            grad -= tl.where(tl.abs(apart) > _RATIO_LIMIT, 0.0, beta * (kl + d))
    loss, grad = tl.where(keep, loss, 0.0), tl.where(keep, grad, 0.0)
    return loss, clipped, kl, capped, grad, keep, place


@triton.jit
def _grpo_rows_kernel(
    logp_ptr, old_ptr, advantage_ptr, mask_ptr, ref_ptr, sampled_ptr, sums_ptr, rows, width,
    clip_low, clip_high, beta, cap, PENALISED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums of loss, tokens, clipped tokens, k3 and capped tokens of each row, to [5, rows]."""
    row = tl.program_id(0)
    advantage = tl.load(advantage_ptr + row).to(tl.float32)
    losses, kls = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    tokens, clips = tl.zeros([TOKENS], tl.int32), tl.zeros([TOKENS], tl.int32)
    caps = tl.zeros([TOKENS], tl.int32)
    for first in range(0, width, TOKENS):
        loss, clipped, kl, capped, _, keep, _ = _token_terms(
            logp_ptr, old_ptr, mask_ptr, ref_ptr, sampled_ptr, advantage, row, first, width,
            clip_low, clip_high, beta, cap, PENALISED, TOKENS,
        )  # fmt: skip
        losses += loss
        kls += kl
        tokens += keep.to(tl.int32)
        clips += clipped.to(tl.int32)
        caps += capped.to(tl.int32)
    tl.store(sums_ptr + row, tl.sum(losses, 0))
    tl.store(sums_ptr + rows + row, tl.sum(tokens, 0).to(tl.float32))
    tl.store(sums_ptr + 2 * rows + row, tl.sum(clips, 0).to(tl.float32))
    tl.store(sums_ptr + 3 * rows + row, tl.sum(kls, 0))
    tl.store(sums_ptr + 4 * rows + row, tl.sum(caps, 0).to(tl.float32))


@triton.jit
def _grpo_total_kernel(
    sums_ptr, loss_ptr, clip_fraction_ptr, mean_kl_ptr, capped_fraction_ptr, weight_ptr, rows,
    constant, NORMALISE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the totals, then each row's weight in the loss, then the loss."""
    tokens, filled = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    clips, kls = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    caps = tl.zeros([ROWS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        count = tl.load(sums_ptr + rows + row, mask=inside, other=0.0)
        tokens += count
        filled += (count > 0).to(tl.float32)
        clips += tl.load(sums_ptr + 2 * rows + row, mask=inside, other=0.0)
        kls += tl.load(sums_ptr + 3 * rows + row, mask=inside, other=0.0)
        caps += tl.load(sums_ptr + 4 * rows + row, mask=inside, other=0.0)
    every, some = tl.maximum(tl.sum(tokens, 0), 1.0), tl.maximum(tl.sum(filled, 0), 1.0)
    tl.store(clip_fraction_ptr, tl.sum(clips, 0) / every)
    tl.store(mean_kl_ptr, tl.sum(kls, 0) / every)
    tl.store(capped_fraction_ptr, tl.sum(caps, 0) / every)
    losses = tl.zeros([ROWS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        count = tl.load(sums_ptr + rows + row, mask=inside, other=0.0)
        if NORMALISE == "sequence":
            weight = tl.where(count > 0, 1.0 / (tl.maximum(count, 1.0) * some), 0.0)
        elif NORMALISE == "token":
            weight = count * 0.0 + 1.0 / every
        else:
            weight = count * 0.0 + constant
        tl.store(weight_ptr + row, weight, mask=inside)
        losses += tl.load(sums_ptr + row, mask=inside, other=0.0) * weight
    tl.store(loss_ptr, tl.sum(losses, 0))


@triton.jit
def _grpo_backward_kernel(
    logp_ptr, old_ptr, advantage_ptr, mask_ptr, ref_ptr, sampled_ptr, weight_ptr, d_loss_ptr,
    out_ptr, width, clip_low, clip_high, beta, cap, PENALISED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0), tl.program_id(1) * TOKENS
    advantage = tl.load(advantage_ptr + row).to(tl.float32)
    scale = tl.load(weight_ptr + row) * tl.load(d_loss_ptr).to(tl.float32)
    _, _, _, _, grad, keep, place = _token_terms(
        logp_ptr, old_ptr, mask_ptr, ref_ptr, sampled_ptr, advantage, row, first, width,
        clip_low, clip_high, beta, cap, PENALISED, TOKENS,
    )  # fmt: skip
    inside = first + tl.arange(0, TOKENS) < width
    tl.store(out_ptr + place, tl.where(keep, grad * scale, 0.0), mask=inside)


def _launch_loss(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor,
    ref_logp: Tensor | None, sampled_logp: Tensor | None, clip_low: float, clip_high: float,
    beta: float, cap: float, normalise: str, max_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if logp.dtype == torch.float64:
        return reference.loss(
            logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta, cap,
            normalise, max_tokens,
        )  # fmt: skip
    rows, width = logp.shape
    sums = torch.empty(5, rows, dtype=torch.float32, device=logp.device)
    loss, clip_fraction, mean_kl, capped_fraction = (
        torch.empty((), dtype=torch.float32, device=logp.device) for _ in range(4)
    )
    weight = torch.empty(rows, dtype=torch.float32, device=logp.device)
    launch(
        _grpo_rows_kernel, (rows,), logp, old_logp, advantage, mask, ref_logp, sampled_logp, sums,
        rows, width, clip_low, clip_high, beta, cap, PENALISED=beta != 0,
        TOKENS=_tokens_block(width), num_warps=4,
    )  # fmt: skip
    launch(
        _grpo_total_kernel, (1,), sums, loss, clip_fraction, mean_kl, capped_fraction, weight, rows,
        1 / (rows * max_tokens), NORMALISE=normalise,
        ROWS=min(triton.next_power_of_2(rows), ROWS), num_warps=8,
    )  # fmt: skip
    return loss, clip_fraction, mean_kl, capped_fraction, weight


def _launch_loss_backward(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor,
    ref_logp: Tensor | None, sampled_logp: Tensor | None, clip_low: float, clip_high: float,
    beta: float, cap: float, weight: Tensor, d_loss: Tensor,
) -> Tensor:  # fmt: skip
    if logp.dtype == torch.float64:
        return reference.loss_backward(
            logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta, cap,
            weight, d_loss,
        )  # fmt: skip
    out = torch.empty_like(logp)
    rows, width = logp.shape
    block = _tokens_block(width)
    launch(
        _grpo_backward_kernel, (rows, triton.cdiv(width, block)), logp, old_logp, advantage, mask,
        ref_logp, sampled_logp, weight, d_loss, out, width, clip_low, clip_high, beta, cap,
        PENALISED=beta != 0, TOKENS=block, num_warps=4,
    )  # fmt: skip
    return out


def _tokens_block(width: int) -> int:
    return min(triton.next_power_of_2(width), TOKENS)


@operator("grpo_loss", _launch_loss)
def _grpo_loss(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor,
    ref_logp: Tensor | None, sampled_logp: Tensor | None, clip_low: float, clip_high: float,
    beta: float, cap: float, normalise: str, max_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return reference.loss(
        logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta, cap,
        normalise, max_tokens,
    )  # fmt: skip


@operator("grpo_loss_backward", _launch_loss_backward)
def _grpo_loss_backward(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor,
    ref_logp: Tensor | None, sampled_logp: Tensor | None, clip_low: float, clip_high: float,
    beta: float, cap: float, weight: Tensor, d_loss: Tensor,
) -> Tensor:  # fmt: skip
    return reference.loss_backward(
        logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta, cap,
        weight, d_loss,
    )  # fmt: skip


@_grpo_loss.register_fake
def _fake_loss(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor,
    ref_logp: Tensor | None, sampled_logp: Tensor | None, clip_low: float, clip_high: float,
    beta: float, cap: float, normalise: str, max_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def made(*shape: int) -> Tensor:
        return logp.new_empty(shape, dtype=wide_type(logp.dtype))

    return made(), made(), made(), made(), made(logp.shape[0])


@_grpo_loss_backward.register_fake
def _fake_loss_backward(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor,
    ref_logp: Tensor | None, sampled_logp: Tensor | None, clip_low: float, clip_high: float,
    beta: float, cap: float, weight: Tensor, d_loss: Tensor,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logp)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, clip_low, clip_high, beta, cap, _, _ = inputs
    _, *watched, weight = output
    ctx.mark_non_differentiable(*watched, weight)
    ctx.save_for_backward(*tensors, weight)
    ctx.numbers = (clip_low, clip_high, beta, cap)  # type: ignore[attr-defined]


def _backward(ctx, d_loss, *_):
    *inputs, weight = ctx.saved_tensors
    d_logp = None
    if ctx.needs_input_grad[0]:
        d_logp = _grpo_loss_backward(*inputs, *ctx.numbers, weight, d_loss.contiguous())
    return (d_logp, *[None] * 11)


_grpo_loss.register_autograd(_backward, setup_context=_setup)


class GrpoLoss(NamedTuple):
    """The policy loss and the numbers to monitor.

    Attributes:
        loss: float32 scalar, to be minimised; the only one with a gradient.
        clip_fraction: float32 scalar, share of tokens whose ratio is clipped.
        mean_kl: float32 scalar, mean k3 over tokens; 0 without a reference.
        capped_fraction: float32 scalar, share of tokens whose importance is capped at
            ``importance_cap``; 0 without ``sampled_logp``.
    """

    loss: Tensor
    clip_fraction: Tensor
    mean_kl: Tensor
    capped_fraction: Tensor


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    normalise: Normaliser = "sequence",
    max_tokens: int | None = None,
    sampled_logp: Tensor | None = None,
    importance_cap: float = 2.0,
) -> GrpoLoss:
    """Compute the clipped policy loss with a KL penalty; its gradient is recomputed in backward.

    Per token, with ``r = exp(new − old)`` and ``d = ref − new``:
    ``−min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) + β·k3``, ``k3 = exp(d) − d − 1`` (GRPO,
    arXiv 2402.03300; k3: Schulman, "Approximating KL divergence", 2020). Log-ratios are clamped to
    ±60 and have no gradient beyond.

    A sampler that computes in another type than the trainer's draws from a slightly different
    policy than ``old``. With ``sampled_logp`` a token's first term, but not its KL, is weighted by
    ``min(exp(old − sampled), importance_cap)``: truncated importance sampling (Ionides 2008; for
    this mismatch Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025, with a cap of 2). The weight has no gradient, and is 1 up to rounding where the
    two compute alike. ``normalise`` selects how sums over tokens become a loss:

    - ``sequence``: the mean over a sequence's tokens, then over the sequences that have any (GRPO);
    - ``token``: the mean over all tokens of the batch;
    - ``constant``: the sum divided by N·max_tokens (Dr.GRPO, arXiv 2503.20783).

    Args:
        logp: float [N, T], log-probabilities of the tokens under the policy.
        old_logp: [N, T], under the policy before the first update on these samples, as the trainer
            computes it; None means the same policy (one update per rollout), so that the ratio is 1
            and has a gradient.
        advantage: float [N].
        mask: bool [N, T]; False marks padding, which contributes nothing, whatever the
            log-probabilities hold there.
        ref_logp: [N, T], under the frozen reference.
        clip_low, clip_high: how far the ratio may fall below and rise above 1.
        beta: weight of the KL penalty; 0 with ref_logp only measures it.
        normalise: "sequence", "token" or "constant".
        max_tokens: the most tokens a sequence may have; "constant" needs it.
        sampled_logp: [N, T], as the sampler itself computed them; None if the sampler is ``old``.
        importance_cap: the largest weight of a token, at least 1 (infinite for no cap).

    Returns:
        GrpoLoss. Only logp gets a gradient. A batch without any token has loss 0.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    checks.check_choice("normalise", normalise, NORMALISERS)
    same = {"old_logp": old_logp, "mask": mask, "ref_logp": ref_logp, "sampled_logp": sampled_logp}
    floats = {name: tensor for name, tensor in same.items() if name != "mask"}
    checks.check_floats(logp=logp, advantage=advantage, **floats)
    checks.check_bools(mask=mask)
    checks.check_shape("logp", logp, (None, None))
    for name, tensor in same.items():
        if tensor is not None:
            checks.check_shape(name, tensor, logp.shape)
    checks.check_shape("advantage", advantage, logp.shape[:1])
    checks.check_not_empty(logp=logp)
    checks.check_contiguous(logp=logp, advantage=advantage, **same)
    checks.check_same_device(logp=logp, advantage=advantage, **same)
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low}; it must be in 0 … 1")
    if not 0 <= clip_high < float("inf"):
        raise ValueError(f"clip_high = {clip_high}; it must be finite and not negative")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta = {beta}; it must be finite and not negative")
    if beta and ref_logp is None:
        raise ValueError(f"beta = {beta} without ref_logp; pass it, or beta = 0")
    if not importance_cap >= 1:
        raise ValueError(f"importance_cap = {importance_cap}; it must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}; it must be at least 1")
    if normalise == "constant" and max_tokens is None:
        raise ValueError("max_tokens = None; normalise = 'constant' needs it")
    *found, _ = _grpo_loss(
        logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta,
        importance_cap, normalise, max_tokens or 1,
    )  # fmt: skip
    return GrpoLoss(*found)
