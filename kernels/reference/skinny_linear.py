"""Plain-torch linear layer for few rows: the oracle of every test and the CPU path. The weight is
taken in slices of its rows, so that no second copy of it exists in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.kernels.reference.precision import wide_type, widen

CHUNK = 1 << 22  # elements of the weight at a time


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    eps: float,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """[R, N] or [R, N/2]; see `echogen.kernels.skinny_linear`."""
    wide, y = wide_type(x.dtype), widen(x)
    if gain is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = (y.to(x.dtype) * gain).to(wide)
    rows = max(1, CHUNK // weight.shape[1])
    y = torch.cat([F.linear(y, part.to(wide)) for part in weight.split(rows)], 1)
    if scale is not None:
        y = y * scale
    if swiglu:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual).to(x.dtype)
