"""Plain-torch RMS norm: the oracle of every test and the CPU path. Rows are taken in chunks, so
that float32 memory is bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference.precision import wide_type, widen

CHUNK = 4096


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, 1/rms [...]); see `echogen.kernels.rms_norm`."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    kind = torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(flat.shape, dtype=kind, device=x.device)
    rstd = torch.empty(len(flat), dtype=wide_type(x.dtype), device=x.device)
    for i in range(0, len(flat), CHUNK):
        rows = slice(i, i + CHUNK)
        wide = widen(flat[rows])
        rstd[rows] = torch.rsqrt(wide.square().mean(-1) + eps)
        out[rows] = weight * (wide * rstd[rows, None]).to(x.dtype)
    return out.view(x.shape), rstd.view(x.shape[:-1])


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed sum, sum, 1/rms [...]); see `echogen.kernels.rms_norm`."""
    summed = x + residual
    out, rstd = forward(summed, weight, eps)
    return out, summed, rstd


def backward(
    d_out: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (plus ``d_summed``) and of the weight (empty unless ``weight_grad``)."""
    width = x.shape[-1]
    flat, d_flat = x.reshape(-1, width), d_out.reshape(-1, width)
    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    total = flat.new_zeros(width if weight_grad else 0, dtype=rstd.dtype)
    for i in range(0, len(flat), CHUNK):
        rows = slice(i, i + CHUNK)
        scale = rstd.reshape(-1, 1)[rows]
        unit, d = widen(flat[rows]) * scale, widen(d_flat[rows])
        along = d * weight
        grad = scale * (along - unit * (along * unit).mean(-1, keepdim=True))
        if d_summed is not None:
            grad += d_summed.reshape(-1, width)[rows]
        dx[rows] = grad.to(x.dtype)
        if weight_grad:
            total += (d * unit.to(x.dtype)).sum(0)
    return dx.view(x.shape), total.to(weight.dtype)
