"""Plain-torch Philox-4x32 and the samplers' noise: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and key increments of Salmon et al. 2011
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[int | Tensor, int | Tensor],
    rounds: int = 10,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (held in int64) for each counter; see `echogen.kernels.philox`."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, but their 64 bits are right; masks undo the shift's sign extension.
        low0, low1 = c0 * _M0, c2 * _M1
        high0, high1 = (low0 >> 32) & _MASK, (low1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1 & _MASK, high0 ^ c3 ^ k1, low0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(
    seed: int | Tensor, draw: Tensor, position: Tensor, columns: int, stream: int = 0
) -> Tensor:
    """Uniforms in (0, 1), float32 [*draw.shape, columns]; see `echogen.kernels.philox`."""
    block = torch.arange((columns + 3) // 4, device=draw.device)
    row_draw, row_position = (t.to(torch.int64).unsqueeze(-1) & _MASK for t in (draw, position))
    words = philox4x32(
        (block, row_position, row_draw, torch.full_like(block, stream)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    bits = torch.stack(words, -1).flatten(-2)[..., :columns]
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel(
    seed: int | Tensor, draw: Tensor, position: Tensor, columns: int, stream: int = 0
) -> Tensor:
    """Standard Gumbel noise, float32 [*draw.shape, columns]; see `echogen.kernels.philox`."""
    return -torch.log(-torch.log(uniform(seed, draw, position, columns, stream)))
