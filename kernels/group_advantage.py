"""Group-relative advantage: how much better a sample did than the others of its layout.

Each group is one program, and all its sums have a fixed order, so that a resumed run repeats the
original one bit for bit. `cycle_reward` shares the device code and so gives the same results.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import group_advantage as reference
from echogen.kernels.reference.precision import wide_type

SAMPLES = 128  # of a group at a time: 16 bytes per thread of one warp

MODES = ("grpo", "dr_grpo", "rloo", "rank")
Mode = Literal["grpo", "dr_grpo", "rloo", "rank"]

_LIMIT = tl.constexpr(reference.LIMIT)


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [ROWS] of the rows of x [ROWS, COLUMNS], neighbours first. The order in which `tl.sum`
    adds depends on how the compiler lays x out over threads, and so on the surrounding kernel."""
    for level in tl.static_range(12):
        if (COLUMNS >> level) > 1:
            left, right = tl.split(tl.reshape(x, [ROWS, COLUMNS >> (level + 1), 2]))
            x = left + right
    return tl.reshape(x, [ROWS])


@triton.jit
def _total(x, SIZE: tl.constexpr):
    return tl.sum(tree_sum(tl.reshape(x, [1, SIZE]), 1, SIZE), 0)


@triton.jit
def _rewards(reward_ptr, mask_ptr, start, size, first, SAMPLES: tl.constexpr):
    """Rewards from ``start + first`` on (0 if not kept or not finite), kept, broken, inside the
    group."""
    at = first + tl.arange(0, SAMPLES)
    inside = at < size
    reward = tl.load(reward_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + start + at, mask=inside, other=0) != 0)
    sound = tl.abs(reward) <= _LIMIT
    return tl.where(keep & sound, reward, 0.0), keep, keep & (sound == 0), inside


@triton.jit
def _above_middle(reward, reward_ptr, mask_ptr, start, size, count, SAMPLES: tl.constexpr):
    """Mid-ranks in the group minus their mean: exact, since they are halves of whole numbers."""
    below, equal = tl.zeros([SAMPLES], tl.int32), tl.zeros([SAMPLES], tl.int32)
    for other in range(size):
        value = tl.load(reward_ptr + start + other).to(tl.float32)
        less, same = value < reward, value == reward
        if mask_ptr is not None:
            keep = tl.load(mask_ptr + start + other) != 0
            less, same = less & keep, same & keep
        below += less.to(tl.int32)
        equal += same.to(tl.int32)
    return ((2 * below + equal).to(tl.float32) - count) * 0.5


@triton.jit
def advantages(
    reward_ptr, mask_ptr, advantage_ptr, start, size, eps,
    MODE: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Write the advantages of the group [start, start + size) and return whether it is flat. Device
    code for other kernels; launch them with ``enable_fp_fusion=False``, so that they all round the
    same way."""
    total = tl.zeros([SAMPLES], tl.float32)
    low = tl.full([SAMPLES], float("inf"), tl.float32)
    high = tl.full([SAMPLES], float("-inf"), tl.float32)
    counts, breaks = tl.zeros([SAMPLES], tl.int32), tl.zeros([SAMPLES], tl.int32)
    for first in range(0, size, SAMPLES):
        reward, keep, broken, _ = _rewards(reward_ptr, mask_ptr, start, size, first, SAMPLES)
        total += reward
        low = tl.minimum(low, tl.where(keep, reward, float("inf")))
        high = tl.maximum(high, tl.where(keep, reward, float("-inf")))
        counts += keep.to(tl.int32)
        breaks += broken.to(tl.int32)
    sound = tl.sum(breaks, 0) == 0
    flat = (tl.min(low, 0) >= tl.max(high, 0)) & sound
    count = tl.sum(counts, 0).to(tl.float32)
    some = tl.maximum(count, 1.0)
    mean = tl.where(sound, tl.div_rn(_total(total, SAMPLES), some), float("nan"))
    if MODE == "grpo":
        squares = tl.zeros([SAMPLES], tl.float32)
        for first in range(0, size, SAMPLES):
            reward, keep, _, _ = _rewards(reward_ptr, mask_ptr, start, size, first, SAMPLES)
            centred = tl.where(keep, reward - mean, 0.0)
            squares += centred * centred
        spread = tl.sqrt_rn(tl.div_rn(_total(squares, SAMPLES), some)) + eps
        spread = tl.where(spread > 0, spread, 1.0)
    if MODE == "rank":
        spread = tl.sqrt_rn(tl.div_rn(some * some - 1.0, 12.0))
        spread = tl.where(count > 1, spread, 1.0)
    others = tl.div_rn(count, tl.maximum(count - 1.0, 1.0))
    for first in range(0, size, SAMPLES):
        reward, keep, _, inside = _rewards(reward_ptr, mask_ptr, start, size, first, SAMPLES)
        advantage = reward - mean
        if MODE == "grpo":
            advantage = tl.div_rn(advantage, spread)
        elif MODE == "rloo":
            advantage = advantage * others
        elif MODE == "rank":
            ahead = _above_middle(reward, reward_ptr, mask_ptr, start, size, count, SAMPLES)
            advantage = tl.where(sound, tl.div_rn(ahead, spread), float("nan"))
        advantage = tl.where(keep & (flat == 0), advantage, 0.0)
        tl.store(advantage_ptr + start + first + tl.arange(0, SAMPLES), advantage, mask=inside)
    return flat


@triton.jit
def _group_advantage_kernel(
    reward_ptr, offsets_ptr, mask_ptr, advantage_ptr, flat_ptr, samples, eps,
    MODE: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + group)
        size = tl.load(offsets_ptr + group + 1) - start
    else:
        start, size = group * samples, samples
    flat = advantages(reward_ptr, mask_ptr, advantage_ptr, start, size, eps, MODE, SAMPLES)
    tl.store(flat_ptr + group, flat)


def samples_block(samples: int) -> int:
    """Number of samples to process at a time in a group of ``samples``."""
    return min(triton.next_power_of_2(max(samples, 1)), SAMPLES)


def _launch(
    reward: Tensor, offsets: Tensor | None, mask: Tensor | None, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    if reward.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.group_advantage(reward, offsets, mask, mode, eps)
    advantage = torch.empty_like(reward, dtype=torch.float32)
    groups = len(reward) if offsets is None else len(offsets) - 1
    samples = reward.shape[1] if offsets is None else reward.shape[0]
    flat = torch.empty(groups, dtype=torch.bool, device=reward.device)
    launch(
        _group_advantage_kernel, (groups,), reward, offsets, mask, advantage, flat, samples, eps,
        MODE=mode, SAMPLES=samples_block(samples), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return advantage, flat


@operator("group_advantage", _launch)
def _group_advantage(
    reward: Tensor, offsets: Tensor | None, mask: Tensor | None, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    return reference.group_advantage(reward, offsets, mask, mode, eps)


@_group_advantage.register_fake
def _fake(
    reward: Tensor, offsets: Tensor | None, mask: Tensor | None, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    groups = reward.shape[0] if offsets is None else offsets.shape[0] - 1
    return (
        torch.empty_like(reward, dtype=wide_type(reward.dtype)),
        reward.new_empty(groups, dtype=torch.bool),
    )


class Advantage(NamedTuple):
    """The advantages of samples within their groups.

    Attributes:
        advantage: float32, shaped like the rewards; 0 for masked samples and in flat groups.
        flat: bool [B], groups whose samples all have the same reward (or that have none): there is
            nothing to learn from them.
    """

    advantage: Tensor
    flat: Tensor


def group_advantage(
    reward: Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    mode: Mode = "grpo",
    eps: float = 1e-6,
) -> Advantage:
    """How much better each sample did than its group.

    With n samples in the group: ``grpo``: ``(r − mean)/(std + ε)``, population deviation (GRPO,
    arXiv 2402.03300); ``dr_grpo``: ``r − mean`` (Dr.GRPO, arXiv 2503.20783); ``rloo``: ``r`` minus
    the mean of the others, ``n/(n − 1)·(r − mean)`` (RLOO, arXiv 2402.14740); ``rank``: the
    standardised rank, ``(rank − (n − 1)/2)/√((n² − 1)/12)`` with ranks from 0 and ties at their
    mean, so that only the order of the rewards matters and not their distances (fitness shaping,
    Wierstra et al., arXiv 1106.4487; n² comparisons per group, so meant for tens of samples). Not
    differentiable: an advantage weights a policy's gradient and has none of its own.

    Args:
        reward: float [B, G], one row for the G samples of a layout; with offsets, [N].
        offsets: int64 [B + 1], from 0 to N; group b is ``reward[offsets[b]:offsets[b + 1]]``. Its
            values are checked on a CPU only.
        mask: bool, shaped like reward; False excludes a sample, which then gets 0 and does not
            count.
        mode: "grpo", "dr_grpo", "rloo" or "rank".
        eps: ε of "grpo", at least 0.

    Returns:
        Advantage, float32 (float64 for float64) and bool [B]. A group with a reward that is not
        finite (or beyond 1e15) has advantage NaN and is not flat.

    Raises:
        ValueError: shapes, devices, strides, offsets or numbers that do not fit.
        TypeError: types that do not fit.
    """
    check_mode(mode, eps)
    checks.check_floats(reward=reward)
    checks.check_bools(mask=mask)
    if offsets is None:
        if reward.dim() != 2:
            raise ValueError(
                f"reward has shape {tuple(reward.shape)}; it must be [layouts, samples], "
                f"or [N] with offsets"
            )
    else:
        checks.check_shape("reward", reward, (None,))
        _check_offsets(offsets, len(reward))
    if mask is not None:
        checks.check_shape("mask", mask, reward.shape)
    checks.check_contiguous(reward=reward, offsets=offsets, mask=mask)
    checks.check_same_device(reward=reward, offsets=offsets, mask=mask)
    return Advantage(*_group_advantage(reward.detach(), offsets, mask, mode, eps))


def check_mode(mode: str, eps: float) -> None:
    """Raises ValueError for an unknown mode of `group_advantage`, and for an eps out of range."""
    checks.check_choice("mode", mode, MODES)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps = {eps}; it must be finite and not negative")


def _check_offsets(offsets: Tensor, size: int) -> None:
    checks.check_shape("offsets", offsets, (None,))
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets is {offsets.dtype}; it must be int64")
    if len(offsets) == 0:
        raise ValueError("offsets has shape (0,); B groups have B + 1 offsets")
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading them would make the host wait for the device
    if offsets[0] != 0 or offsets[-1] != size or (offsets.diff() < 0).any():
        raise ValueError(f"offsets = {offsets.tolist()}; they must rise from 0 to {size}")
