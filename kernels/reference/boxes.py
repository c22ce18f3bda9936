"""Plain-torch box overlap and reward: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference.precision import wide_type, widen

LIMIT = 1e12  # coordinates beyond it count as not finite: their areas could overflow
FLOOR = 1e-24  # a union or hull below it counts as none: a gradient divided by it could overflow

Boxes = tuple[Tensor, Tensor, Tensor, Tensor]


def valid(box: Tensor) -> Tensor:
    """Finite and with positive extent, bool [...] for boxes [..., 4]."""
    extent = (box[..., 2] > box[..., 0]) & (box[..., 3] > box[..., 1])
    return extent & (box.abs() <= LIMIT).all(-1)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether both are valid [...], and the boxes, replaced by the unit box where not both are."""
    ok = valid(a) & valid(b)
    unit = a.new_tensor([0.0, 0.0, 1.0, 1.0])
    return ok, torch.where(ok[..., None], a, unit), torch.where(ok[..., None], b, unit)


def _extents(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Width and height of each box, of what they share, and of their hull: four of [..., 2]."""
    shared = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2], shared.clamp(min=0), hull


def compare(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, L1 (mean of four) and GIoU [...]; 0, 1 and −1 where either is not valid."""
    ok, a, b = _pair(a, b)
    area_a, area_b, shared, hull = (side.prod(-1) for side in _extents(a, b))
    union = area_a + area_b - shared
    # Boxes may be so small that their areas vanish; rounding may leave less union than overlap.
    overlap = torch.where(union >= FLOOR, (shared / union.clamp(min=FLOOR)).clamp(max=1), 0.0)
    gap = torch.where(hull >= FLOOR, (hull - union).clamp(min=0) / hull.clamp(min=FLOOR), 1.0)
    distance = (a - b).abs().mean(-1)
    return (
        torch.where(ok, overlap, 0.0),
        torch.where(ok, distance, 1.0),
        torch.where(ok, overlap - gap, -1.0),
    )


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [...]; 0 where either box is not valid."""
    dtype = torch.promote_types(wide_type(a.dtype), wide_type(b.dtype))
    return compare(*torch.broadcast_tensors(a.to(dtype), b.to(dtype)))[0]


def box_reward(pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float) -> Boxes:
    """(iou, l1, reward, giou); see `echogen.kernels.boxes`."""
    pred, target = widen(pred), target.to(wide_type(pred.dtype))
    overlap, distance, general = compare(pred, target.unsqueeze(1).expand_as(pred))
    discrepancy = w_iou * (1 - overlap) + w_l1 * distance
    keep = mask.unsqueeze(1).expand_as(discrepancy)
    reward = 1 - torch.where(keep, discrepancy, 0.0).sum(-1) / keep.sum(-1).clamp(min=1)
    reward = torch.where(keep.any(-1), reward, 0.0)
    iou, l1, giou = (torch.where(keep, x, 0.0) for x in (overlap, distance, general))
    return iou, l1, reward, giou


def box_reward_backward(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    w_iou: float,
    w_l1: float,
    d_iou: Tensor | None,
    d_l1: Tensor | None,
    d_reward: Tensor | None,
    d_giou: Tensor | None,
) -> Tensor:
    """Gradient of pred [B, G, K, 4], in its type; ties are split evenly."""
    p, t = widen(pred), target.to(wide_type(pred.dtype)).unsqueeze(1).expand_as(pred)
    ok, p, t = _pair(p, t)
    ok = ok & mask.unsqueeze(1)
    zero = torch.zeros_like(p[..., 0])
    by_iou, by_l1, by_giou = (zero if d is None else d for d in (d_iou, d_l1, d_giou))
    if d_reward is not None:
        share = d_reward[..., None] / mask.sum(-1).clamp(min=1)[:, None, None]
        by_iou, by_l1 = by_iou + w_iou * share, by_l1 - w_l1 * share

    box, other, shared, hull = _extents(p, t)
    common, around = shared.prod(-1), hull.prod(-1)
    union = box.prod(-1) + other.prod(-1) - common
    overlap = (common / union.clamp(min=FLOOR)).clamp(max=1)
    by_overlap = torch.where(union >= FLOOR, (by_iou + by_giou) / union.clamp(min=FLOOR), 0.0)
    by_hull = torch.where(around >= FLOOR, by_giou / around.clamp(min=FLOOR), 0.0)
    by_area = by_hull - by_overlap * overlap  # of the union
    filled = union / around.clamp(min=FLOOR)

    # Moving a corner changes an area by the other side's length; an inner corner moves the overlap,
    # an outer one the hull, and one on the other box's edge half of each.
    sign = p.new_tensor([-1.0, -1.0, 1.0, 1.0])
    along = sign * (p - t)
    outer = (along > 0) + 0.5 * (along == 0)
    touching = (shared > 0).all(-1, keepdim=True)
    d_box, d_shared, d_hull = (side[..., [1, 0, 1, 0]] for side in (box, shared, hull))
    grad = by_area[..., None] * d_box
    grad = grad + (by_overlap - by_area)[..., None] * d_shared * (1 - outer) * touching
    grad = grad - (by_hull * filled)[..., None] * d_hull * outer
    grad = sign * grad + 0.25 * by_l1[..., None] * (p - t).sign()
    return torch.where(ok[..., None], grad, 0.0).to(pred.dtype)
