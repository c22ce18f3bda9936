"""Plain-torch straight-through Gumbel-Softmax over a codebook: the oracle of every test and the
CPU path. Rows are taken in chunks, so that memory is bounded as it is in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference import philox

CHUNK = 256

Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


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
            _wide(logits[i : i + CHUNK]),
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
        lse_l = logits.logsumexp(-1)
        at_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        ce = torch.where(targets >= 0, lse_l - at_target, ce)
    return codebook[index], index, ce, lse_a, lse_l, e_soft


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
    d_embed: Tensor,
    d_ce: Tensor | None,
) -> Tensor:
    """Gradient of the logits [N, V], in their type."""
    out = torch.empty_like(logits)
    for i in range(0, len(logits), CHUNK):
        rows = slice(i, i + CHUNK)
        x = _wide(logits[rows])
        noisy = x + philox.gumbel(seed, draw[rows], position[rows], logits.shape[1])
        soft = (noisy / tau - lse_a[rows, None]).exp()
        d = d_embed[rows].to(x.dtype)
        along = d @ codebook.to(x.dtype).T - (d * e_soft[rows]).sum(-1, keepdim=True)
        grad = soft * along / tau
        if targets is not None and d_ce is not None:
            t = targets[rows]
            d_rows = torch.where(t >= 0, d_ce[rows].to(x.dtype), 0.0)[:, None]
            plain = (x - lse_l[rows, None]).exp() * d_rows
            grad += plain.scatter_add(1, t.clamp(min=0)[:, None], -d_rows)
        out[rows] = grad.to(out.dtype)
    return out


def codebook_grad(d_embed: Tensor, index: Tensor, codes: int) -> Tensor:
    """Sum of d_embed [N, C] over the rows that chose each code, in order of rows; [V, C]."""
    wide = _wide(d_embed)
    return wide.new_zeros(codes, wide.shape[1]).index_add_(0, index, wide)
