"""Cases of the end of the cycle: boxes, rewards, advantages, the policy loss."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Outputs, Pass, Peer, Run
from echogen.bench.speed.cases.heads import BETA, older, token_losses
from echogen.kernels.boxes import box_reward
from echogen.kernels.cycle_reward import cycle_reward
from echogen.kernels.group_advantage import group_advantage
from echogen.kernels.grpo import grpo_loss

BINS, FIRST_LOCATION = 1000, 100_016
_GROUPS = {"tiny": {"layouts": 6, "samples": 8}, "training": {"layouts": 64, "samples": 8}}
_BOXES = {name: dims | {"boxes": 8} for name, dims in _GROUPS.items()}
_TOKENS = {"tiny": {"rows": 16, "tokens": 48}, "training": {"rows": 512, "tokens": 576}}
FLOAT = (torch.float32,)  # rewards and log-probabilities are float32 whatever the model's type


# --- boxes --------------------------------------------------------------------------------------


def boxes(make: Make, *shape: int) -> Tensor:
    """Valid boxes, [*shape, 4]."""
    corner = 0.5 * make.uniform(*shape, 2)
    return torch.cat((corner, corner + 0.05 + 0.4 * make.uniform(*shape, 2)), -1)


def _box_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    layouts, samples, count = dims["layouts"], dims["samples"], dims["boxes"]
    return {
        "pred": boxes(make, layouts, samples, count),
        "target": boxes(make, layouts, count),
        "mask": make.uniform(layouts, count) < 2,  # all: a peer has no padding
    }


def _boxes(i: Inputs) -> Outputs:
    found = box_reward(i["pred"], i["target"], i["mask"])
    return found.iou, found.l1, found.reward, found.giou


def compared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, L1 and GIoU as one would write them for valid boxes."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).prod(-1)
    iou = shared / union
    return iou, (a - b).abs().mean(-1), iou - (hull - union) / hull


def scored(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(iou, l1, reward, giou), with padding left out."""
    keep = mask[:, None].to(pred.dtype)
    iou, l1, giou = (x * keep for x in compared(pred, target[:, None].expand_as(pred)))
    lost = (0.5 * (keep - iou) + 0.5 * l1).sum(-1) / keep.sum(-1).clamp(min=1)
    return iou, l1, 1 - lost, giou


def _eager_boxes(i: Inputs) -> Outputs:
    return scored(i["pred"], i["target"], i["mask"])


def _torchvision() -> Run:
    from torchvision.ops import generalized_box_iou_loss

    def run(i: Inputs) -> Outputs:
        target = i["target"][:, None].expand_as(i["pred"])
        return (1 - generalized_box_iou_loss(i["pred"], target, reduction="none"),)

    return run


def _box_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    layouts, samples, count = dims["layouts"], dims["samples"], dims["boxes"]
    n = layouts * samples * count
    targets = layouts * count * 17  # four numbers and a mask
    if mode == "forward":  # reads boxes; writes three numbers per box and one per sample
        return Floor(16 * n + targets + 12 * n + 4 * layouts * samples, 0, 50 * n)
    return Floor(16 * n + targets + 4 * n + 16 * n, 0, 100 * n)  # d_giou in, d_pred out


# --- advantages ---------------------------------------------------------------------------------


def normed(reward: Tensor) -> Tensor:
    """GRPO's advantage for rows of samples."""
    centred = reward - reward.mean(-1, keepdim=True)
    return centred / (reward.std(-1, keepdim=True, correction=0) + 1e-6)


def _group_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    return {"reward": make.uniform(dims["layouts"], dims["samples"])}


def _eager_group(i: Inputs) -> Outputs:
    return normed(i["reward"]), (i["reward"] == i["reward"][:, :1]).all(-1)


def _eager_ranks(i: Inputs) -> Outputs:
    reward, count = i["reward"], i["reward"].shape[1]
    one, other = reward[:, :, None], reward[:, None]
    ahead = ((one > other).to(reward.dtype) - (one < other).to(reward.dtype)).sum(-1) / 2
    advantage = ahead / ((count**2 - 1) / 12) ** 0.5
    return advantage, (i["reward"] == i["reward"][:, :1]).all(-1)


def _group_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["layouts"] * dims["samples"]
    return Floor(8 * n + dims["layouts"], 0, 10 * n, dims["layouts"])  # reward in, advantage out


def _cycle_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    layouts, samples, count = dims["layouts"], dims["samples"], dims["boxes"]
    answers = (boxes(make, layouts, samples, count) * (BINS - 1)).round().long()
    spoilt = make.uniform(layouts, samples, count, 1) < 0.05  # some spell no box
    return {
        "tokens": torch.where(spoilt, 0, answers + FIRST_LOCATION),
        "target": boxes(make, layouts, count),
        "mask": make.uniform(layouts, count) < 0.8,
    }


def _cycle(i: Inputs) -> Outputs:
    found = cycle_reward(i["tokens"], i["target"], i["mask"], FIRST_LOCATION, BINS)
    return found.iou, found.l1, found.reward, found.advantage


def _eager_cycle(i: Inputs) -> Outputs:
    place = i["tokens"] - FIRST_LOCATION
    found = place.to(i["target"].dtype) / (BINS - 1)
    known = ((place >= 0) & (place < BINS)).all(-1)
    known = known & (place[..., 2] > place[..., 0]) & (place[..., 3] > place[..., 1])
    keep, right = i["mask"][:, None].to(found.dtype), known.to(found.dtype)
    iou, l1, _ = compared(found, i["target"][:, None].expand_as(found))
    iou, l1 = torch.where(known, iou, 0.0) * keep, torch.where(known, l1, 1.0) * keep
    lost = (0.5 * (keep - iou) + 0.5 * l1).sum(-1) / keep.sum(-1).clamp(min=1)
    reward = torch.where(keep.sum(-1) > 0, 1 - lost, 0 * right[..., 0])
    return iou, l1, reward, normed(reward)


def _cycle_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    layouts, samples, count = dims["layouts"], dims["samples"], dims["boxes"]
    n = layouts * samples * count
    # Reads four tokens per box and the targets; writes box, IoU and L1, and two per sample.
    moved = 32 * n + 17 * layouts * count + 24 * n + 8 * layouts * samples + layouts
    return Floor(moved, 0, 60 * n)


# --- the policy loss ----------------------------------------------------------------------------


def _loss_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    logp = -8 * make.uniform(dims["rows"], dims["tokens"])
    return {
        "logp": logp,
        "old": older(logp, make),
        "reference": older(logp, make),
        "advantage": make.floats(dims["rows"]),
        "mask": make.uniform(*logp.shape) < 0.9,
    }


def _sampled_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    inputs = _loss_inputs(make, dims, dtype)
    return inputs | {"sampled": older(inputs["old"], make)}


def _loss(i: Inputs) -> Outputs:
    found = grpo_loss(
        i["logp"], i["old"], i["advantage"], i["mask"], i["reference"], beta=BETA,
        sampled_logp=i.get("sampled"),
    )  # fmt: skip
    return (found.loss,)


def _loss_floor(dims: Dims, size: int, mode: Pass, read: int = 3) -> Floor:
    n = dims["rows"] * dims["tokens"]
    # ``read`` log-probabilities and a mask per token; backward also writes a gradient.
    each = 4 * (read + (mode != "forward")) + 1
    return Floor(each * n + 4 * dims["rows"], 0, 20 * n, (read - 1) * n)


def _sampled_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    return _loss_floor(dims, size, mode, read=4)


CASES = (
    Case(
        operator="box_reward",
        sizes=_BOXES,
        inputs=_box_inputs,
        run=_boxes,
        eager=_eager_boxes,
        outputs=("iou", "l1", "reward", "giou"),
        trains=("pred",),
        graded=("giou",),
        floor=_box_floor,
        dtypes=FLOAT,
        peers=(Peer("torchvision", "torchvision", _torchvision, ("giou",), on_cpu=True),),
    ),
    Case(
        operator="group_advantage",
        sizes=_GROUPS,
        inputs=_group_inputs,
        run=lambda i: tuple(group_advantage(i["reward"])),
        eager=_eager_group,
        outputs=("advantage", "flat"),
        floor=_group_floor,
        dtypes=FLOAT,
    ),
    Case(
        operator="group_advantage",
        variant="rank",
        sizes=_GROUPS,
        inputs=_group_inputs,
        run=lambda i: tuple(group_advantage(i["reward"], mode="rank")),
        eager=_eager_ranks,
        outputs=("advantage", "flat"),
        floor=_group_floor,
        dtypes=FLOAT,
    ),
    Case(
        operator="cycle_reward",
        sizes=_BOXES,
        inputs=_cycle_inputs,
        run=_cycle,
        eager=_eager_cycle,
        outputs=("iou", "l1", "reward", "advantage"),
        floor=_cycle_floor,
        dtypes=FLOAT,
    ),
    Case(
        operator="grpo_loss",
        sizes=_TOKENS,
        inputs=_loss_inputs,
        run=_loss,
        eager=lambda i: token_losses(i["logp"], i),
        outputs=("loss",),
        trains=("logp",),
        graded=("loss",),
        floor=_loss_floor,
        dtypes=FLOAT,
    ),
    Case(
        operator="grpo_loss",
        variant="other sampler",
        sizes=_TOKENS,
        inputs=_sampled_inputs,
        run=_loss,
        eager=lambda i: token_losses(i["logp"], i),
        outputs=("loss",),
        trains=("logp",),
        graded=("loss",),
        floor=_sampled_floor,
        dtypes=FLOAT,
    ),
)
