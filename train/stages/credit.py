"""Credit assignment: one advantage for all tokens of an image, or one for each object's tokens.

An image's reward is the mean over its objects, and one advantage for all of its tokens lets a good
circle reinforce the square that failed beside it. Yet whether an object is found depends mostly on
the tokens in its box. With credit by object, every object is compared with the same object in the
group's other images, and the advantage goes to those tokens alone; only the KL term acts on the
rest of the image. The aim is less noise: `echogen bench credit` measures what share of a gradient
is signal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from echogen.kernels.cycle_reward import CycleReward
from echogen.kernels.group_advantage import Mode, group_advantage

EPS = 0.02
"""ε of an object's advantage, in units of reward. Boxes are quantised, so objects drawn equally
well differ by about a bin of 64, and without ε this would count as much as success and failure."""


class Credit(NamedTuple):
    """Rows of `grpo_loss`: tokens that share an advantage.

    Attributes:
        image: int64 [R], the image that a row's tokens belong to.
        mask: bool [R, S], which of the image's tokens are in the row.
        advantage: float32 [R].
        flat: bool, for every group in which rewards were compared, whether all were equal, so that
            nothing is learnt from it.
    """

    image: Tensor
    mask: Tensor
    advantage: Tensor
    flat: Tensor

    def rows(self, logprob: Tensor) -> Tensor:
        """Log-probabilities [N, S] of images → [R, S] of rows."""
        return logprob.index_select(0, self.image)


def cells(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """The image tokens whose centre lies in a box, and the one that holds the box's own centre, so
    that no box is without tokens: boxes [..., 4] in [0, 1] → bool [..., rows · columns]."""
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)

    def inside(low: Tensor, high: Tensor, count: int) -> Tensor:
        place = torch.arange(count, device=boxes.device)
        centre = (place + 0.5) / count
        own = ((low + high) / 2 * count).floor().clamp(0, count - 1) == place
        return ((low <= centre) & (centre <= high)) | own

    across, down = inside(x1, x2, columns), inside(y1, y2, rows)
    return (down.unsqueeze(-1) & across.unsqueeze(-2)).flatten(-2)


def by_image(score: CycleReward, mask: Tensor) -> Credit:
    """One row per image. Args: score of [B, G] images; mask bool [N, S] of the policy's tokens."""
    image = torch.arange(len(mask), device=mask.device)
    return Credit(image, mask, score.advantage.flatten(), score.flat)


def object_tokens(
    boxes: Tensor, there: Tensor, grid: tuple[int, int] | None, answers: bool
) -> Tensor:
    """Which tokens belong to which object: bool [B, K + 1, S], a row for each object and one for
    tokens of no object. S: the image tokens, if there is a ``grid``, then, with ``answers``, four
    for each of K.

    Args:
        boxes, there: target boxes [B, K, 4], and which of them exist, bool [B, K].
        grid: (rows, columns) of the image tokens; None: they are not part of the policy.
    """
    count, most = there.shape
    parts = [] if grid is None else [cells(boxes, *grid)]
    if answers:
        own = torch.eye(most, dtype=torch.bool, device=there.device).repeat_interleave(4, 1)
        parts.append(own.expand(count, most, 4 * most))
    tokens = torch.cat(parts, -1) & there[..., None]
    rest = ~tokens.any(1, keepdim=True)
    if answers:
        rest[..., -4 * most :] = False
    return torch.cat([tokens, rest], 1)


def by_object(
    score: CycleReward, tokens: Tensor, there: Tensor, w_iou: float, w_l1: float, mode: Mode
) -> Credit:
    """One row for each object of each image, and one of advantage 0 for the rest of the image; rows
    without tokens are left out.

    Args:
        score: of [B, G] images.
        tokens: from `object_tokens`, [B, K + 1, S], on the host, so that the rows are known without
            waiting for the images.
        there: bool [B, K], on the host.
        w_iou, w_l1, mode: as for `cycle_reward`.
    """
    count, group, most = score.iou.shape
    device = score.iou.device
    layout, image, which = (
        at.to(device)
        for at in tokens.any(-1)[:, None].expand(count, group, most + 1).nonzero(as_tuple=True)
    )
    objects = there.flatten().nonzero()[:, 0].to(device)
    tokens, there = tokens.to(device), there.to(device)
    reward = -(w_iou * (1 - score.iou) + w_l1 * score.l1)
    each = reward.transpose(1, 2).reshape(count * most, group).contiguous()
    compared = group_advantage(each, mode=mode, eps=EPS)
    advantage = compared.advantage.view(count, most, group)
    advantage = torch.cat([advantage * there[..., None], advantage.new_zeros(count, 1, group)], 1)
    return Credit(
        layout * group + image,
        tokens[layout, which],
        advantage[layout, which, image].contiguous(),
        compared.flat[objects],
    )
