"""Plain-torch group advantage: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference.precision import widen

LIMIT = 1e15  # a reward beyond it counts as not finite: its square would overflow


def _ranks(r: Tensor, keep: Tensor, group: Tensor) -> Tensor:
    """Rank of each sample among the kept ones of its group, from 0; ties share their mean rank."""
    key = torch.where(keep, r, torch.inf)  # the others come last
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    key, group = key[order], group[order]
    begins = torch.ones_like(keep)
    begins[1:] = (key[1:] != key[:-1]) | (group[1:] != group[:-1])
    run = begins.cumsum(0) - 1
    ends = run.bincount().cumsum(0).to(r.dtype)
    middle = (torch.cat([ends.new_zeros(1), ends[:-1]]) + ends - 1) / 2
    ranks = torch.empty_like(r)
    ranks[order] = middle[run] - torch.searchsorted(group, group).to(r.dtype)
    return ranks


def group_advantage(
    reward: Tensor, offsets: Tensor | None, mask: Tensor | None, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    """(advantage, flat); see `echogen.kernels.group_advantage`."""
    r = widen(reward).reshape(-1)
    keep = torch.ones_like(r, dtype=torch.bool) if mask is None else mask.reshape(-1)
    if offsets is None:
        groups = reward.shape[0]
        group = torch.arange(groups, device=r.device).repeat_interleave(reward.shape[1])
    else:
        groups = len(offsets) - 1
        place = torch.arange(len(r), device=r.device)
        group = torch.searchsorted(offsets, place, right=True) - 1

    sound = r.abs() <= LIMIT
    broken = r.new_zeros(groups).index_add_(0, group, (keep & ~sound).to(r.dtype)) > 0
    r = torch.where(keep & sound, r, 0.0)
    low = r.new_full((groups,), torch.inf)
    low = low.scatter_reduce(0, group, torch.where(keep, r, torch.inf), "amin")
    high = r.new_full((groups,), -torch.inf)
    high = high.scatter_reduce(0, group, torch.where(keep, r, -torch.inf), "amax")
    flat = (low >= high) & ~broken

    count = r.new_zeros(groups).index_add_(0, group, keep.to(r.dtype))
    mean = r.new_zeros(groups).index_add_(0, group, r) / count.clamp(min=1)
    centred = torch.where(keep, r - torch.where(broken, torch.nan, mean)[group], 0.0)
    if mode == "grpo":
        squares = r.new_zeros(groups).index_add_(0, group, centred.square())
        spread = (squares / count.clamp(min=1)).sqrt() + eps
        advantage = centred / torch.where(spread > 0, spread, 1.0)[group]
    elif mode == "rloo":
        advantage = centred * (count / (count - 1).clamp(min=1))[group]
    elif mode == "rank":
        spread = ((count.square() - 1).clamp(min=0) / 12).sqrt()
        middle = torch.where(broken, torch.nan, (count - 1) / 2)
        ahead = _ranks(r, keep, group) - middle[group]
        advantage = ahead / torch.where(count > 1, spread, 1.0)[group]
    else:
        advantage = centred
    advantage = torch.where(keep & ~flat[group], advantage, 0.0)
    return advantage.reshape(reward.shape), flat
