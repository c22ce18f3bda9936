"""Plain-torch gradient of a codebook: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_grad(d_embed: Tensor, index: Tensor, codes: int) -> Tensor:
    """Sum of d_embed [N, C] over the rows that chose each code, in order of rows; [V, C]. Rows
    without a valid code are ignored."""
    wide = d_embed if d_embed.dtype == torch.float64 else d_embed.float()
    inside = (index >= 0) & (index < codes)
    counted = wide.masked_fill(~inside[:, None], 0)
    chosen = torch.where(inside, index, 0)
    return wide.new_zeros(codes, wide.shape[1]).index_add_(0, chosen, counted)
