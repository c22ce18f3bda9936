"""Box overlap and the reward of the cycle: how close recovered boxes lie to the requested ones.

In plain torch a reward is some forty launches over tensors of a few thousand elements; here it is
one, and its gradient another, so that it serves as a loss too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.group_advantage import tree_sum
from echogen.kernels.reference import boxes as reference
from echogen.kernels.reference.precision import wide_type

BOXES, TILE = 16, 128  # boxes of a sample at a time; boxes of a tile of samples

_LIMIT = tl.constexpr(reference.LIMIT)
_FLOOR = tl.constexpr(reference.FLOOR)


@triton.jit
def corners(tile, SAMPLES: tl.constexpr, BOXES: tl.constexpr):
    """x1, y1, x2, y2 [SAMPLES, BOXES] of a tile [SAMPLES, BOXES, 4], which was loaded whole: four
    numbers per thread. Device code for other kernels, as is all that does not end in _kernel."""
    x, y = tl.split(tl.reshape(tile, [SAMPLES, BOXES, 2, 2]))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def joined(x1, y1, x2, y2, SAMPLES: tl.constexpr, BOXES: tl.constexpr):
    """The tile [SAMPLES, BOXES, 4] of four corners, to be stored whole."""
    return tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), [SAMPLES, BOXES, 4])


@triton.jit
def places(layout, first_sample, first_box, samples, boxes, SAMPLES: tl.constexpr,
           BOXES: tl.constexpr):  # fmt: skip
    """Index [SAMPLES, BOXES] of a tile's boxes and whether they exist."""
    sample, box = first_sample + tl.arange(0, SAMPLES), first_box + tl.arange(0, BOXES)
    inside = (sample < samples)[:, None] & (box < boxes)[None, :]
    return (layout * samples + sample)[:, None] * boxes + box[None, :], inside


@triton.jit
def coordinates(place, inside, SAMPLES: tl.constexpr, BOXES: tl.constexpr):
    """Index [SAMPLES, BOXES, 4] of a tile's coordinates and whether they exist."""
    at = place[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    return at, tl.broadcast_to(inside[:, :, None], [SAMPLES, BOXES, 4])


@triton.jit
def _target(target_ptr, mask_ptr, layout, first_box, boxes, BOXES: tl.constexpr):
    """Corners [1, BOXES] of a layout's boxes, and whether they count."""
    place, inside = places(layout, 0, first_box, 1, boxes, 1, BOXES)
    at, there = coordinates(place, inside, 1, BOXES)
    x1, y1, x2, y2 = corners(
        tl.load(target_ptr + at, mask=there, other=0.0).to(tl.float32), 1, BOXES
    )
    return x1, y1, x2, y2, inside & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)


@triton.jit
def _valid(x1, y1, x2, y2):
    """Finite and with positive extent."""
    low = (tl.abs(x1) <= _LIMIT) & (tl.abs(y1) <= _LIMIT)
    high = (tl.abs(x2) <= _LIMIT) & (tl.abs(y2) <= _LIMIT)
    return low & high & (x2 > x1) & (y2 > y1)


@triton.jit
def _or_unit(ok, x1, y1, x2, y2):
    """The unit box in place of an invalid one, so that nothing calculated is ever NaN."""
    return (
        tl.where(ok, x1, 0.0),
        tl.where(ok, y1, 0.0),
        tl.where(ok, x2, 1.0),
        tl.where(ok, y2, 1.0),
    )


@triton.jit
def _compare(x1, y1, x2, y2, s1, t1, s2, t2):
    """IoU, L1 and GIoU of boxes with targets (s1, t1, s2, t2)."""
    ok = _valid(x1, y1, x2, y2) & _valid(s1, t1, s2, t2)
    x1, y1, x2, y2 = _or_unit(ok, x1, y1, x2, y2)
    s1, t1, s2, t2 = _or_unit(ok, s1, t1, s2, t2)
    wide = tl.maximum(tl.minimum(x2, s2) - tl.maximum(x1, s1), 0.0)
    high = tl.maximum(tl.minimum(y2, t2) - tl.maximum(y1, t1), 0.0)
    shared = wide * high
    union = (x2 - x1) * (y2 - y1) + (s2 - s1) * (t2 - t1) - shared
    hull = tl.maximum(x2, s2) - tl.minimum(x1, s1)
    hull = hull * (tl.maximum(y2, t2) - tl.minimum(y1, t1))
    iou = tl.minimum(tl.div_rn(shared, tl.maximum(union, _FLOOR)), 1.0)
    iou = tl.where(union >= _FLOOR, iou, 0.0)
    gap = tl.div_rn(tl.maximum(hull - union, 0.0), tl.maximum(hull, _FLOOR))
    gap = tl.where(hull >= _FLOOR, gap, 1.0)
    l1 = (tl.abs(x1 - s1) + tl.abs(y1 - t1)) + (tl.abs(x2 - s2) + tl.abs(y2 - t2))
    return tl.where(ok, iou, 0.0), tl.where(ok, 0.25 * l1, 1.0), tl.where(ok, iou - gap, -1.0)


@triton.jit
def score_tile(
    x1, y1, x2, y2, target_ptr, mask_ptr, iou_ptr, l1_ptr, giou_ptr, layout, place, inside,
    first_box, boxes, w_iou, w_l1, SAMPLES: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """Compare a tile of boxes with their targets, store what was found, and return the sum of
    discrepancies [SAMPLES] and the number [1] of boxes that count. Launch kernels that use it with
    ``enable_fp_fusion=False``, so that they all round the same way."""
    s1, t1, s2, t2, kept = _target(target_ptr, mask_ptr, layout, first_box, boxes, BOXES)
    iou, l1, giou = _compare(x1, y1, x2, y2, s1, t1, s2, t2)
    tl.store(iou_ptr + place, tl.where(kept, iou, 0.0), mask=inside)
    tl.store(l1_ptr + place, tl.where(kept, l1, 0.0), mask=inside)
    if giou_ptr is not None:
        tl.store(giou_ptr + place, tl.where(kept, giou, 0.0), mask=inside)
    discrepancy = tl.where(kept & inside, w_iou * (1.0 - iou) + w_l1 * l1, 0.0)
    return tree_sum(discrepancy, SAMPLES, BOXES), tl.sum(kept.to(tl.int32), 1)


@triton.jit
def store_reward(
    reward_ptr, layout, first_sample, samples, discrepancy, count, SAMPLES: tl.constexpr
):
    """1 − the mean discrepancy of each sample; 0 where no box counts."""
    sample = first_sample + tl.arange(0, SAMPLES)
    reward = 1.0 - tl.div_rn(discrepancy, tl.maximum(count, 1).to(tl.float32))
    reward = tl.where(count > 0, reward, 0.0)
    tl.store(reward_ptr + layout * samples + sample, reward, mask=sample < samples)


@triton.jit
def _box_reward_kernel(
    pred_ptr, target_ptr, mask_ptr, iou_ptr, l1_ptr, reward_ptr, giou_ptr, samples, boxes,
    w_iou, w_l1, SAMPLES: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    layout, first_sample = tl.program_id(0).to(tl.int64), tl.program_id(1) * SAMPLES
    total, count = tl.zeros([SAMPLES], tl.float32), tl.zeros([1], tl.int32)
    for first_box in range(0, boxes, BOXES):
        place, inside = places(layout, first_sample, first_box, samples, boxes, SAMPLES, BOXES)
        at, there = coordinates(place, inside, SAMPLES, BOXES)
        pred = tl.load(pred_ptr + at, mask=there, other=0.0).to(tl.float32)
        x1, y1, x2, y2 = corners(pred, SAMPLES, BOXES)
        discrepancy, kept = score_tile(
            x1, y1, x2, y2, target_ptr, mask_ptr, iou_ptr, l1_ptr, giou_ptr, layout, place, inside,
            first_box, boxes, w_iou, w_l1, SAMPLES, BOXES,
        )  # fmt: skip
        total += discrepancy
        count += kept
    store_reward(reward_ptr, layout, first_sample, samples, total, count, SAMPLES)


@triton.jit
def _outer(along):
    """1 where a corner lies outside the other box's, ½ on it, else 0."""
    return tl.where(along > 0, 1.0, tl.where(along == 0, 0.5, 0.0))


@triton.jit
def _slope(difference):
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))


@triton.jit
def _corner_grad(sign, x, s, d_box, d_shared, d_hull, d_l1):
    """Gradient of one coordinate. Moving a corner changes an area by the other side's length: an
    inner corner moves the overlap, an outer one the hull, one on the other box's edge half of
    each."""
    outer = _outer(sign * (x - s))
    return sign * (d_box + d_shared * (1.0 - outer) - d_hull * outer) + 0.25 * d_l1 * _slope(x - s)


@triton.jit
def _box_reward_backward_kernel(
    pred_ptr, target_ptr, mask_ptr, d_iou_ptr, d_l1_ptr, d_reward_ptr, d_giou_ptr, out_ptr,
    samples, boxes, w_iou, w_l1, SAMPLES: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    layout, first_sample = tl.program_id(0).to(tl.int64), tl.program_id(1) * SAMPLES
    share = tl.zeros([SAMPLES], tl.float32)
    if d_reward_ptr is not None:
        count = tl.zeros([1], tl.int32)
        for first in range(0, boxes, BOXES):
            box = first + tl.arange(0, BOXES)
            kept = tl.load(mask_ptr + layout * boxes + box, mask=box < boxes, other=0) != 0
            count += tl.sum(kept.to(tl.int32), 0)
        sample = first_sample + tl.arange(0, SAMPLES)
        d_reward = tl.load(
            d_reward_ptr + layout * samples + sample, mask=sample < samples, other=0.0
        )
        share = d_reward.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)
    for first in range(0, boxes, BOXES):
        place, inside = places(layout, first_sample, first, samples, boxes, SAMPLES, BOXES)
        at, there = coordinates(place, inside, SAMPLES, BOXES)
        pred = tl.load(pred_ptr + at, mask=there, other=0.0).to(tl.float32)
        x1, y1, x2, y2 = corners(pred, SAMPLES, BOXES)
        s1, t1, s2, t2, kept = _target(target_ptr, mask_ptr, layout, first, boxes, BOXES)
        ok = inside & kept & _valid(x1, y1, x2, y2) & _valid(s1, t1, s2, t2)
        x1, y1, x2, y2 = _or_unit(ok, x1, y1, x2, y2)
        s1, t1, s2, t2 = _or_unit(ok, s1, t1, s2, t2)
        by_iou = w_iou * share[:, None] + tl.zeros([SAMPLES, BOXES], tl.float32)
        by_l1 = -w_l1 * share[:, None] + tl.zeros([SAMPLES, BOXES], tl.float32)
        by_giou = tl.zeros([SAMPLES, BOXES], tl.float32)
        if d_iou_ptr is not None:
            by_iou += tl.load(d_iou_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if d_l1_ptr is not None:
            by_l1 += tl.load(d_l1_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if d_giou_ptr is not None:
            by_giou += tl.load(d_giou_ptr + place, mask=inside, other=0.0).to(tl.float32)

        wide = tl.maximum(tl.minimum(x2, s2) - tl.maximum(x1, s1), 0.0)
        high = tl.maximum(tl.minimum(y2, t2) - tl.maximum(y1, t1), 0.0)
        shared = wide * high
        union = (x2 - x1) * (y2 - y1) + (s2 - s1) * (t2 - t1) - shared
        hull_x = tl.maximum(x2, s2) - tl.minimum(x1, s1)
        hull_y = tl.maximum(y2, t2) - tl.minimum(y1, t1)
        hull = hull_x * hull_y
        per_union, per_hull = 1.0 / tl.maximum(union, _FLOOR), 1.0 / tl.maximum(hull, _FLOOR)
        by_overlap = tl.where(union >= _FLOOR, (by_iou + by_giou) * per_union, 0.0)
        by_hull = tl.where(hull >= _FLOOR, by_giou * per_hull, 0.0)
        by_union = by_hull - by_overlap * tl.minimum(shared * per_union, 1.0)
        by_shared = tl.where(shared > 0, by_overlap - by_union, 0.0)
        by_hull *= union * per_hull

        d_x, d_y = by_union * (y2 - y1), by_union * (x2 - x1)
        d_shared_x, d_shared_y = by_shared * high, by_shared * wide
        d_hull_x, d_hull_y = by_hull * hull_y, by_hull * hull_x
        g_x1 = _corner_grad(-1.0, x1, s1, d_x, d_shared_x, d_hull_x, by_l1)
        g_y1 = _corner_grad(-1.0, y1, t1, d_y, d_shared_y, d_hull_y, by_l1)
        g_x2 = _corner_grad(1.0, x2, s2, d_x, d_shared_x, d_hull_x, by_l1)
        g_y2 = _corner_grad(1.0, y2, t2, d_y, d_shared_y, d_hull_y, by_l1)
        grad = joined(
            tl.where(ok, g_x1, 0.0), tl.where(ok, g_y1, 0.0),
            tl.where(ok, g_x2, 0.0), tl.where(ok, g_y2, 0.0), SAMPLES, BOXES,
        )  # fmt: skip
        tl.store(out_ptr + at, grad, mask=there)


def tile(samples: int, boxes: int) -> tuple[int, int, int]:
    """Samples and boxes of a tile, and the warps that share it. Each box has its own thread, as
    each IEEE division is a call that a thread would repeat for every further box (with four warps
    for 64 boxes `cycle_reward` spilled a register on sm_100)."""
    wide = min(triton.next_power_of_2(max(boxes, 1)), BOXES)
    high = min(triton.next_power_of_2(max(samples, 1)), max(TILE // wide, 1))
    return high, wide, max(1, high * wide // 32)


def _launch(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if pred.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.box_reward(pred, target, mask, w_iou, w_l1)
    layouts, samples, boxes, _ = pred.shape
    iou, l1, giou = (
        torch.empty(layouts, samples, boxes, dtype=torch.float32, device=pred.device)
        for _ in range(3)
    )
    reward = torch.empty(layouts, samples, dtype=torch.float32, device=pred.device)
    high, wide, warps = tile(samples, boxes)
    launch(
        _box_reward_kernel, (layouts, triton.cdiv(samples, high)), pred, target, mask, iou, l1,
        reward, giou, samples, boxes, w_iou, w_l1, SAMPLES=high, BOXES=wide, num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return iou, l1, reward, giou


def _launch_backward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float, d_iou: Tensor | None,
    d_l1: Tensor | None, d_reward: Tensor | None, d_giou: Tensor | None,
) -> Tensor:  # fmt: skip
    if pred.dtype == torch.float64:
        return reference.box_reward_backward(
            pred, target, mask, w_iou, w_l1, d_iou, d_l1, d_reward, d_giou
        )
    layouts, samples, boxes, _ = pred.shape
    out = torch.empty_like(pred)
    high, wide, warps = tile(samples, boxes)
    launch(
        _box_reward_backward_kernel, (layouts, triton.cdiv(samples, high)), pred, target, mask,
        d_iou, d_l1, d_reward, d_giou, out, samples, boxes, w_iou, w_l1, SAMPLES=high, BOXES=wide,
        num_warps=warps,
    )  # fmt: skip
    return out


@operator("box_reward", _launch)
def _box_reward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.box_reward(pred, target, mask, w_iou, w_l1)


@operator("box_reward_backward", _launch_backward)
def _box_reward_backward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float, d_iou: Tensor | None,
    d_l1: Tensor | None, d_reward: Tensor | None, d_giou: Tensor | None,
) -> Tensor:  # fmt: skip
    return reference.box_reward_backward(
        pred, target, mask, w_iou, w_l1, d_iou, d_l1, d_reward, d_giou
    )


@_box_reward.register_fake
def _fake(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_type(pred.dtype)
    iou, l1, giou = (pred.new_empty(pred.shape[:3], dtype=dtype) for _ in range(3))
    return iou, l1, pred.new_empty(pred.shape[:2], dtype=dtype), giou


@_box_reward_backward.register_fake
def _fake_backward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float, w_l1: float, d_iou: Tensor | None,
    d_l1: Tensor | None, d_reward: Tensor | None, d_giou: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(pred)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.weights = inputs[3:]
    ctx.set_materialize_grads(False)  # most uses need the gradient of one output


def _backward(ctx, d_iou, d_l1, d_reward, d_giou):
    if not ctx.needs_input_grad[0]:
        return None, None, None, None, None
    given = [None if d is None else d.contiguous() for d in (d_iou, d_l1, d_reward, d_giou)]
    return _box_reward_backward(*ctx.saved_tensors, *ctx.weights, *given), None, None, None, None


_box_reward.register_autograd(_backward, setup_context=_setup)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``xyxy``, elementwise.

    Args:
        a, b: float [..., 4], broadcastable.

    Returns:
        float [...] in [0, 1]; 0 where either box is not finite or has no extent.

    Raises:
        ValueError: a last dimension other than 4.
    """
    _check(a, b)
    # Not an operator: it measures a few boxes at a time, where a launch and the dispatcher cost
    # more than the arithmetic; training steps run `box_reward`.
    return reference.iou(a, b)


class BoxReward(NamedTuple):
    """How well boxes match; a higher reward is a better match.

    Attributes:
        iou, l1: float32 [B, G, K]; 0 at padding.
        reward: float32 [B, G]; 0 for a layout without boxes.
        giou: float32 [B, G, K], in [−1, 1]; 0 at padding.
    """

    iou: Tensor
    l1: Tensor
    reward: Tensor
    giou: Tensor


def box_reward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float = 0.5, w_l1: float = 0.5
) -> BoxReward:
    """IoU, L1, GIoU and reward of recovered boxes; a higher reward is a better match.

    ``d_k = w_iou·(1 − IoU(b̂_k, b_k)) + w_l1·mean|b̂_k − b_k|`` and ``r = 1 − mean_k d_k``
    (EchoGen, arXiv 2603.18001, with the sign that rewards success). A box that is not finite or has
    no extent counts as IoU 0, L1 1 and GIoU −1, the largest discrepancy, and has no gradient. GIoU
    is ``IoU − (hull − union)/hull`` (Rezatofighi et al., CVPR 2019), whose gradient also draws
    together boxes that do not overlap. All four are differentiable in pred; where two edges
    coincide, each counts half.

    Args:
        pred: float [B, G, K, 4], normalised ``xyxy``; NaN marks a box that was not recovered.
            Coordinates beyond 1e12 count as not finite, areas below 1e-24 as no overlap.
        target: float [B, K, 4]; gets no gradient.
        mask: bool [B, K]; False is padding and contributes nothing.
        w_iou, w_l1: weights of the two terms.

    Returns:
        BoxReward, in float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices, strides or weights that do not fit.
        TypeError: types that do not fit.
    """
    _check(pred, target)
    checks.check_floats(pred=pred, target=target)
    checks.check_shape("pred", pred, (None, None, None, 4))
    checks.check_contiguous(pred=pred)
    check_targets(target, mask, pred.shape[0], pred.shape[2], w_iou, w_l1)
    checks.check_same_device(pred=pred, target=target, mask=mask)
    return BoxReward(*_box_reward(pred, target, mask, w_iou, w_l1))


def check_targets(
    target: Tensor, mask: Tensor, layouts: int, boxes: int, w_iou: float, w_l1: float
) -> None:
    """Raises ValueError or TypeError if the targets that boxes are compared with do not fit."""
    checks.check_floats(target=target)
    checks.check_bools(mask=mask)
    checks.check_shape("target", target, (layouts, boxes, 4))
    checks.check_shape("mask", mask, (layouts, boxes))
    checks.check_contiguous(target=target, mask=mask)
    for name, weight in (("w_iou", w_iou), ("w_l1", w_l1)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} = {weight}; it must be finite and not negative")


def _check(*boxes: Tensor) -> None:
    for box in boxes:
        if box.dim() == 0 or box.shape[-1] != 4:
            raise ValueError(f"boxes of shape {tuple(box.shape)}; the last dimension must be 4")
