"""Plain-torch straight-through Gumbel-Softmax over a codebook: the oracle of every test and the
CPU path. Rows are taken in chunks, so that memory is bounded as it is in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference import philox
from echogen.kernels.reference.precision import widen

CHUNK = 256

Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    index: Tensor | None,
    targets: Tensor | None,
) -> Kept:
    """(embed, index, ce, lse_a, lse_l, e_soft); see `echogen.kernels.gumbel`."""
    parts = [
        _forward(
            widen(logits[i : i + CHUNK]),
            codebook,
            tau,
            philox.gumbel(seed, draw[i : i + CHUNK], position[i : i + CHUNK], logits.shape[1]),
            None if index is None else index[i : i + CHUNK],
            None if targets is None else targets[i : i + CHUNK],
        )
        for i in range(0, len(logits), CHUNK)
    ]
    a, b, c, d, e, f = (torch.cat(column) for column in zip(*parts, strict=True))
    return a, b, c, d, e, f


def _forward(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    noise: Tensor,
    index: Tensor | None,
    targets: Tensor | None,
) -> Kept:
    noisy = logits + noise
    index = noisy.argmax(-1) if index is None else index.clone()
    lse_a = (noisy / tau).logsumexp(-1)
    e_soft = (noisy / tau - lse_a[:, None]).exp() @ codebook.to(noisy.dtype)
    lse_l, ce = torch.zeros_like(lse_a), torch.zeros_like(lse_a)
    if targets is not None:
        top, codes = logits.amax(-1), logits.shape[1]
        log_total = (logits - top[:, None]).logsumexp(-1)
        lse_l = top + log_total
        at_target = logits.gather(1, targets.clamp(0, codes - 1)[:, None])[:, 0]
        # Not lse_l − at_target: if logits share a large offset, it rounds the logarithm away.
        known = torch.where(targets < codes, (top - at_target) + log_total, torch.nan)
        ce = torch.where(targets >= 0, known, ce)
    inside = (index >= 0) & (index < len(codebook))
    embed = codebook[torch.where(inside, index, 0)].masked_fill(~inside[:, None], torch.nan)
    return embed, index, ce, lse_a, lse_l, e_soft


def backward(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    targets: Tensor | None,
    lse_a: Tensor,
    lse_l: Tensor,
    e_soft: Tensor,
    d_embed: Tensor | None,
    d_ce: Tensor | None,
) -> Tensor:
    """Gradient of the logits [N, V], in their type."""
    out, codes = torch.empty_like(logits), logits.shape[1]
    for i in range(0, len(logits), CHUNK):
        rows = slice(i, i + CHUNK)
        x = widen(logits[rows])
        grad = torch.zeros_like(x)
        if d_embed is not None:
            noisy = x + philox.gumbel(seed, draw[rows], position[rows], codes)
            soft = (noisy / tau - lse_a[rows, None]).exp()
            d = d_embed[rows].to(x.dtype)
            along = d @ codebook.to(x.dtype).T - (d * e_soft[rows]).sum(-1, keepdim=True)
            grad = soft * along / tau
        if targets is not None and d_ce is not None:
            t = targets[rows, None]
            d_rows = d_ce[rows, None].to(x.dtype)
            d_rows = torch.where((t < codes) | (d_rows == 0), d_rows, torch.nan)
            plain = (x - lse_l[rows, None]).exp() * d_rows
            plain.scatter_add_(1, t.clamp(0, codes - 1), -d_rows)
            grad += torch.where(t < 0, 0.0, plain)
        out[rows] = grad.to(out.dtype)
    return out
