"""Plain-torch box overlap and reward: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def valid(box: Tensor) -> Tensor:
    """Finite and with positive extent, bool [...] for boxes [..., 4]."""
    extent = (box[..., 2] > box[..., 0]) & (box[..., 3] > box[..., 1])
    return extent & torch.isfinite(box).all(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [...]; 0 where either box is not valid."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    ok = valid(a) & valid(b)
    union = areas[0] + areas[1] - shared
    # Boxes may be so small that their areas vanish; rounding may leave less union than overlap.
    ok &= union > 0
    return torch.where(ok, (shared / torch.where(ok, union, 1.0)).clamp(max=1), 0.0)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the four coordinates [...]; 1 where either is not valid."""
    return torch.where(valid(a) & valid(b), (a - b).abs().mean(-1), 1.0)


def box_reward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float = 0.5, w_l1: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-box IoU and L1 and the per-sample reward; see `echogen.kernels.boxes`."""
    overlap, distance = (f(pred, target.unsqueeze(1)) for f in (iou, l1))
    discrepancy = w_iou * (1 - overlap) + w_l1 * distance
    keep = mask.unsqueeze(1).expand_as(discrepancy)
    zero = torch.zeros((), dtype=discrepancy.dtype, device=discrepancy.device)
    count = keep.sum(-1).clamp(min=1)
    reward = 1 - torch.where(keep, discrepancy, zero).sum(-1) / count
    reward = torch.where(keep.any(-1), reward, zero)
    return torch.where(keep, overlap, zero), torch.where(keep, distance, zero), reward
