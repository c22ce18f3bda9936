"""Plain-torch rotary position embedding: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-30  # of a scale, so that a head of zeros has one too


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotate x [B, L, H, K] by tables [B or 1, L, K] in at least float32, to x's type."""
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = x.shape[-1] // 2
    (x1, x2), (c1, c2), (s1, s2) = (t.split(half, -1) for t in (wide, cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if inverse:
        out[..., :half], out[..., half:] = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        out[..., :half], out[..., half:] = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated, or rotated back; see `echogen.kernels.rope`."""
    return _rotate(q, cos, sin, inverse), _rotate(k, cos, sin, inverse)


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scales: Tensor | None,
) -> Tensor:
    """Return q rotated; write k (rotated) and v to ``slots`` in the caches, scaled if given
    scales."""
    rotated = _rotate(k, cos, sin, False) if scales is None else _rotate(k.float(), cos, sin, False)
    row, token = torch.nonzero((slots >= 0) & (slots < keys.shape[2]), as_tuple=True)
    slot = slots[row, token]
    for i, (cache, new) in enumerate(((keys, rotated), (values, v))):
        heads = new[row, token]
        if scales is None:
            cache[row, :, slot] = heads
        else:
            cache[row, :, slot], scales[i, row, :, slot] = scaled_heads(heads)
    return _rotate(q, cos, sin, False)


def scaled_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [..., K] and float32 [...]; see `echogen.kernels.rope`."""
    scale = (x.float().abs().amax(-1) / LARGEST).clamp(min=LEAST)
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale
