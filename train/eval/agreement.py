"""Whether the self-reward ranks a layout's images as the judge does: Cycle RL is no better than
that.

A policy only learns from differences within a group, so correlation is measured within groups: a
reward that merely knows which layouts are hard would look good across them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.images.vision import decode_codes, to_images
from echogen.train.data.scenes import load_scenes
from echogen.train.eval.judge import detect
from echogen.train.eval.matching import class_ious
from echogen.train.eval.tables import layouts_of
from echogen.train.stages.rollouts import roll_out

BATCH = 8  # layouts per rollout


class Agreement(NamedTuple):
    """Spearman's correlation of reward and judge within groups.

    Attributes:
        correlation, stderr: mean over groups (NaN if there is none) and its standard error (NaN
            with fewer than two).
        groups: number of groups in which the judge sees a difference; the mean is over these.
        of: number of all groups.
    """

    correlation: float
    stderr: float
    groups: int
    of: int


def within_groups(reward: np.ndarray, judged: np.ndarray) -> Agreement:
    """Agreement of two scores [B, G], one group per row; ties share their mean rank.

    A group in which only the judge sees a difference counts as 0: the reward says nothing there.
    If such groups were left out, a single lucky group could speak for all the others. A group in
    which the judge sees no difference cannot be right or wrong, and is left out.
    """
    found = []
    for a, b in zip(reward, judged, strict=True):
        if np.ptp(b) > 0:
            told = np.ptp(a) > 0
            found.append(np.corrcoef(rankdata(a), rankdata(b))[0, 1] if told else 0.0)
    if not found:
        return Agreement(float("nan"), float("nan"), 0, len(reward))
    spread = np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    return Agreement(float(np.mean(found)), float(spread), len(found), len(reward))


@torch.no_grad()
def self_agreement(
    engine: Engine,
    count: int,
    group: int,
    sampling: Sampling,
    key: int,
    boxes: int = 0,
    w_iou: float = 0.5,
    w_l1: float = 0.5,
    at_once: int | None = None,
) -> Agreement:
    """Agreement of the self-reward with the judge's mean IoU on ``count`` validation layouts, each
    drawn ``group`` times; ``boxes``, ``at_once``: see `roll_out`."""
    scenes = load_scenes("val", count)
    layouts, reward, judged = layouts_of(scenes, 0), [], []
    for i in range(0, count, BATCH):
        some = layouts[i : i + BATCH]
        draws = torch.arange(i * group, (i + len(some)) * group)
        rollout = roll_out(
            engine, some, group=group, sampling=sampling, key=key, draws=draws, boxes=boxes,
            w_iou=w_iou, w_l1=w_l1, at_once=at_once,
        )  # fmt: skip
        reward.append(rollout.score.reward.cpu().numpy())
        images = to_images(decode_codes(engine.vq, rollout.drawing.codes))
        ious = [class_ious(scenes[i + n // group], detect(x)).mean() for n, x in enumerate(images)]
        judged.append(np.array(ious).reshape(-1, group))
    return within_groups(np.concatenate(reward), np.concatenate(judged))
