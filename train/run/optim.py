"""Optimizers and learning-rate schedule shared by every stage."""

from __future__ import annotations

import math

import torch
from torch import nn

from echogen.train.config import LoopConfig
from echogen.train.run.muon import Muon
from echogen.train.stages.stage import BeginRefused


def build_optimizers(module: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of decoder blocks and AdamW for the rest.

    AdamW (Loshchilov & Hutter 2019) decays matrices and kernels only. Muon's products have the
    dtype of the step's other products.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    use_muon = config.muon_lr is not None
    hidden = [p for n, p in named if use_muon and n.startswith("blocks.") and p.dim() == 2]
    if use_muon and not hidden:
        raise BeginRefused(
            f"muon_lr = {config.muon_lr}, but the module has no decoder blocks; set it to none"
        )
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    ]
    if config.muon_lr is not None:
        optimizers.append(
            Muon(
                hidden,
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                dtype=torch.bfloat16 if config.bf16 else torch.float32,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(step: int, config: LoopConfig) -> float:
    """Share of the peak rate at step 0, 1, …: linear warm-up, constant, then decay to zero, either
    linear or half a period of a cosine."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    tail = max(1.0, config.decay * config.steps)
    left = min(1.0, (config.steps - step) / tail)
    if config.decay_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return warm * left
