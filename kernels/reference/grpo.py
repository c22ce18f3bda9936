"""Plain-torch group advantage: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward: Tensor, eps: float = 1e-6) -> Tensor:
    """Advantage within rows [B, G]; see `echogen.kernels.grpo`."""
    centred = reward - reward.mean(-1, keepdim=True)
    flat = (reward == reward[:, :1]).all(-1, keepdim=True)
    spread = reward.std(-1, keepdim=True, correction=0)
    return torch.where(flat, torch.zeros_like(reward), centred / (spread + eps))
