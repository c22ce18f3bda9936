"""The end of the cycle in one launch: from the tokens of the grounding branches to advantages.

Composed of the separate operators it would take four to six launches, and in plain torch some
eighty; none of them fills more than a corner of the device. It shares the operators' device code
and so gives the same results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import boxes, checks, group_advantage
from echogen.kernels.boxes import (
    check_targets,
    coordinates,
    corners,
    joined,
    places,
    score_tile,
    store_reward,
)
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.group_advantage import advantages
from echogen.kernels.reference import cycle_reward as reference
from echogen.kernels.reference.precision import wide_type


@triton.jit
def _parsed(token, first_location, bins):
    """Bin of a token and whether it is a location."""
    place = token - first_location
    known = (place >= 0) & (place < bins)
    return tl.where(known, place, 0).to(tl.float32), known


@triton.jit
def _cycle_reward_kernel(
    tokens_ptr, target_ptr, mask_ptr, boxes_ptr, iou_ptr, l1_ptr, reward_ptr, advantage_ptr,
    flat_ptr, samples, boxes, first_location, bins, w_iou, w_l1, eps, MODE: tl.constexpr,
    SAMPLES: tl.constexpr, BOXES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    layout = tl.program_id(0).to(tl.int64)
    scale = (bins - 1).to(tl.float32)
    for first_sample in range(0, samples, SAMPLES):
        total, count = tl.zeros([SAMPLES], tl.float32), tl.zeros([1], tl.int32)
        for first_box in range(0, boxes, BOXES):
            place, inside = places(layout, first_sample, first_box, samples, boxes, SAMPLES, BOXES)
            at, there = coordinates(place, inside, SAMPLES, BOXES)
            a, b, c, d = corners(
                tl.load(tokens_ptr + at, mask=there, other=-1), SAMPLES, BOXES
            )  # fmt: skip
            x1, known_1 = _parsed(a, first_location, bins)
            y1, known_2 = _parsed(b, first_location, bins)
            x2, known_3 = _parsed(c, first_location, bins)
            y2, known_4 = _parsed(d, first_location, bins)
            ok = known_1 & known_2 & known_3 & known_4 & (x2 > x1) & (y2 > y1)
            x1 = tl.where(ok, tl.div_rn(x1, scale), float("nan"))
            y1 = tl.where(ok, tl.div_rn(y1, scale), float("nan"))
            x2 = tl.where(ok, tl.div_rn(x2, scale), float("nan"))
            y2 = tl.where(ok, tl.div_rn(y2, scale), float("nan"))
            tl.store(boxes_ptr + at, joined(x1, y1, x2, y2, SAMPLES, BOXES), mask=there)
            discrepancy, kept = score_tile(
                x1, y1, x2, y2, target_ptr, mask_ptr, iou_ptr, l1_ptr, None, layout, place, inside,
                first_box, boxes, w_iou, w_l1, SAMPLES, BOXES,
            )  # fmt: skip
            total += discrepancy
            count += kept
        store_reward(reward_ptr, layout, first_sample, samples, total, count, SAMPLES)
    # Other threads of this program wrote the rewards that are read now.
    tl.debug_barrier()
    flat = advantages(
        reward_ptr, None, advantage_ptr, layout * samples, samples, eps, MODE, GROUP
    )  # fmt: skip
    tl.store(flat_ptr + layout, flat)


def _launch(
    tokens: Tensor, target: Tensor, mask: Tensor, first_location: int, bins: int, w_iou: float,
    w_l1: float, mode: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if target.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.cycle_reward(
            tokens, target, mask, first_location, bins, w_iou, w_l1, mode, eps
        )
    layouts, samples, count, _ = tokens.shape
    made = [
        torch.empty(shape, dtype=torch.float32, device=tokens.device)
        for shape in (tokens.shape, *[tokens.shape[:3]] * 2, *[tokens.shape[:2]] * 2)
    ]
    flat = torch.empty(layouts, dtype=torch.bool, device=tokens.device)
    high, across, warps = boxes.tile(samples, count)
    launch(
        _cycle_reward_kernel, (layouts,), tokens, target, mask, *made, flat, samples, count,
        first_location, bins, w_iou, w_l1, eps, MODE=mode, SAMPLES=high, BOXES=across,
        GROUP=group_advantage.samples_block(samples), num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return (*made, flat)  # type: ignore[return-value]


@operator("cycle_reward", _launch)
def _cycle_reward(
    tokens: Tensor, target: Tensor, mask: Tensor, first_location: int, bins: int, w_iou: float,
    w_l1: float, mode: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return reference.cycle_reward(
        tokens, target, mask, first_location, bins, w_iou, w_l1, mode, eps
    )


@_cycle_reward.register_fake
def _fake(
    tokens: Tensor, target: Tensor, mask: Tensor, first_location: int, bins: int, w_iou: float,
    w_l1: float, mode: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (tokens.shape, *[tokens.shape[:3]] * 2, *[tokens.shape[:2]] * 2)
    made = [tokens.new_empty(shape, dtype=wide_type(target.dtype)) for shape in shapes]
    return *made, tokens.new_empty(tokens.shape[0], dtype=torch.bool)  # type: ignore[return-value]


class CycleReward(NamedTuple):
    """What the grounding branches recovered and what it is worth.

    Attributes:
        boxes: float32 [B, G, K, 4], normalised ``xyxy``; NaN where the tokens spell no box.
        iou, l1: float32 [B, G, K]; 0 at padding.
        reward, advantage: float32 [B, G]; the advantage is within each layout's samples.
        flat: bool [B], layouts whose samples all have the same reward.
    """

    boxes: Tensor
    iou: Tensor
    l1: Tensor
    reward: Tensor
    advantage: Tensor
    flat: Tensor


def cycle_reward(
    tokens: Tensor,
    target: Tensor,
    mask: Tensor,
    first_location: int,
    bins: int,
    w_iou: float = 0.5,
    w_l1: float = 0.5,
    mode: group_advantage.Mode = "grpo",
    eps: float = 1e-6,
) -> CycleReward:
    """Score the answers of grounding branches (EchoGen, arXiv 2603.18001, stage 3).

    Four location tokens, x1 y1 x2 y2, spell a box: their bins divided by ``bins − 1``. Other
    tokens, and bins without ``x2 > x1`` and ``y2 > y1``, spell none. The rest is the same as
    `box_reward` and `group_advantage`, to the last bit, without a host synchronisation. Not
    differentiable: tokens have no gradient, and target gets none.

    Args:
        tokens: int64 [B, G, K, 4], for each layout, sample and expression.
        target: float [B, K, 4], the requested boxes.
        mask: bool [B, K]; False is padding and contributes nothing.
        first_location: id of ``<loc_0>``; that of ``<loc_i>`` is i more.
        bins: number of location tokens, at least 2.
        w_iou, w_l1: weights of the reward's terms, see `box_reward`.
        mode, eps: see `group_advantage`.

    Returns:
        CycleReward, in float32 (float64 where target is).

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens is {tokens.dtype}; it must be int64")
    checks.check_shape("tokens", tokens, (None, None, None, 4))
    checks.check_contiguous(tokens=tokens)
    check_targets(target, mask, tokens.shape[0], tokens.shape[2], w_iou, w_l1)
    checks.check_same_device(tokens=tokens, target=target, mask=mask)
    group_advantage.check_mode(mode, eps)
    if not 0 <= first_location < 1 << 31:
        raise ValueError(f"first_location = {first_location}; it must be in 0 … 2^31 - 1")
    if not 2 <= bins <= 1 << 24:
        raise ValueError(f"bins = {bins}; it must be in 2 … 2^24")
    return CycleReward(
        *_cycle_reward(tokens, target.detach(), mask, first_location, bins, w_iou, w_l1, mode, eps)
    )
