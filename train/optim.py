"""Optimizer and learning-rate schedule shared by every stage."""

from __future__ import annotations

import torch
from torch import nn

from echogen.train.config import LoopConfig


def build_optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), weight decay on matrices and kernels only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: LoopConfig) -> float:
    """Rate of step 0, 1, …: linear warm-up, constant, linear decay to zero (a trapezoid)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    tail = max(1.0, config.decay * config.steps)
    return config.lr * warm * min(1.0, (config.steps - step) / tail)
