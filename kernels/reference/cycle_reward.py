"""Plain-torch reward of the whole cycle: the pieces, one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference import boxes, group_advantage
from echogen.kernels.reference.precision import wide_type

Cycle = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def parse(tokens: Tensor, first_location: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Boxes [..., 4] of coordinate tokens int64 [..., 4]; NaN where they spell none."""
    place = tokens - first_location
    ok = ((place >= 0) & (place < bins)).all(-1)
    ok &= (place[..., 2] > place[..., 0]) & (place[..., 3] > place[..., 1])
    box = place.clamp(0, bins - 1).to(dtype) / (bins - 1)
    return torch.where(ok[..., None], box, torch.nan)


def cycle_reward(
    tokens: Tensor,
    target: Tensor,
    mask: Tensor,
    first_location: int,
    bins: int,
    w_iou: float,
    w_l1: float,
    mode: str,
    eps: float,
) -> Cycle:
    """(boxes, iou, l1, reward, advantage, flat); see `echogen.kernels.cycle_reward`."""
    box = parse(tokens, first_location, bins, wide_type(target.dtype))
    iou, l1, reward, _ = boxes.box_reward(box, target, mask, w_iou, w_l1)
    advantage, flat = group_advantage.group_advantage(reward, None, None, mode, eps)
    return box, iou, l1, reward, advantage, flat
