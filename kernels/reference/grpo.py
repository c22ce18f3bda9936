"""Plain-torch policy loss: the oracle of every test and the CPU path. Rows are taken in chunks, so
that memory is bounded as it is in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference.precision import widen

CHUNK = 1024
RATIO_LIMIT = 60.0  # log-ratios are clamped to ±60; exp(±60) is within float32
SERIES_BELOW = 0.5  # for smaller |d|, exp(d) − d − 1 cancels and its series does not

Loss = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _held(d: Tensor) -> Tensor:
    return d.clamp(-RATIO_LIMIT, RATIO_LIMIT)


def _k3(d: Tensor) -> Tensor:
    """exp(d) − d − 1, in float32 by its series where the difference would cancel."""
    if d.dtype == torch.float64:
        return torch.expm1(d) - d
    series = torch.full_like(d, 1 / 40320)
    for divisor in (5040, 720, 120, 24, 6, 2):
        series = series * d + 1 / divisor
    return torch.where(d.abs() < SERIES_BELOW, d * d * series, torch.expm1(d) - d)


def _tokens(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None,
    sampled_logp: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    cap: float,
    rows: slice,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, clipped (bool), k3, capped (bool) and d loss/d logp of every token; 0 where masked."""
    keep = mask[rows]
    new = torch.where(keep, widen(logp[rows]), 0.0)
    old = new if old_logp is None else torch.where(keep, old_logp[rows].to(new.dtype), 0.0)
    a = advantage[rows, None].to(new.dtype)
    change = new - old
    ratio = _held(change).exp()
    plain, held = ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a
    clipped = keep & (held < plain)
    loss = -torch.where(clipped, held, plain)
    grad = -torch.where(clipped | (change.abs() > RATIO_LIMIT), 0.0, plain)
    capped = torch.zeros_like(keep)
    if sampled_logp is not None:
        sampled = torch.where(keep, sampled_logp[rows].to(new.dtype), 0.0)
        importance = _held(old - sampled).exp()
        capped = keep & (importance > cap)
        importance = importance.clamp(max=cap)
        loss, grad = loss * importance, grad * importance
    kl = torch.zeros_like(loss)
    if ref_logp is not None:
        apart = torch.where(keep, ref_logp[rows].to(new.dtype), 0.0) - new
        d = _held(apart)
        kl = torch.where(keep, _k3(d), 0.0)
        if beta:
            loss = loss + beta * kl
            grad = grad - torch.where(apart.abs() > RATIO_LIMIT, 0.0, beta * (kl + d))
    return torch.where(keep, loss, 0.0), clipped, kl, capped, torch.where(keep, grad, 0.0)


def _chunks(rows: int) -> list[slice]:
    return [slice(i, i + CHUNK) for i in range(0, rows, CHUNK)]


def loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None,
    sampled_logp: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    cap: float,
    normalise: str,
    max_tokens: int,
) -> Loss:
    """(loss, clip_fraction, mean_kl, capped_fraction, weight of each row's sum [N]); see
    `echogen.kernels.grpo`."""
    sums = []
    for rows in _chunks(len(logp)):
        loss, clipped, kl, capped, _ = _tokens(
            logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta, cap,
            rows,
        )  # fmt: skip
        each = (loss, mask[rows], clipped, kl, capped)
        sums.append(torch.stack([x.sum(-1).to(loss.dtype) for x in each]))
    row_loss, count, clipped_count, row_kl, capped_count = torch.cat(sums, 1)
    tokens = count.sum().clamp(min=1)
    if normalise == "sequence":
        filled = (count > 0).sum().clamp(min=1)
        weight = torch.where(count > 0, 1 / (count.clamp(min=1) * filled), 0.0)
    elif normalise == "token":
        weight = (1 / tokens).repeat(len(logp))
    else:
        weight = torch.full_like(count, 1 / (len(logp) * max_tokens))
    total = (row_loss * weight).sum()
    means = [x.sum() / tokens for x in (clipped_count, row_kl, capped_count)]
    return total, *means, weight


def loss_backward(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None,
    sampled_logp: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    cap: float,
    weight: Tensor,
    d_loss: Tensor,
) -> Tensor:
    """Gradient of logp [N, T], in its type."""
    out = torch.empty_like(logp)
    for rows in _chunks(len(logp)):
        *_, grad = _tokens(
            logp, old_logp, advantage, mask, ref_logp, sampled_logp, clip_low, clip_high, beta, cap,
            rows,
        )  # fmt: skip
        out[rows] = torch.where(mask[rows], grad * (weight[rows] * d_loss)[:, None], 0.0).to(
            out.dtype
        )
    return out
