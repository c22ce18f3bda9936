"""A rollout of Cycle RL: each layout drawn several times, grounded in every image, and scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echogen.engine.decoding.rollout import Drawing, draw, ground
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.ground import Answers, locations
from echogen.engine.layout import Layout
from echogen.engine.ranges import span
from echogen.kernels.cycle_reward import CycleReward, cycle_reward
from echogen.kernels.group_advantage import Mode


@dataclass(frozen=True)
class Rollout:
    """G images of each of B layouts; sample g of layout b is row b·G + g of N.

    Attributes:
        layouts: the B layouts.
        drawing: N images and how they were drawn.
        answers: the boxes found in them, [N, K, 4]; if several are sampled per object, the first.
        mask: bool [B, K], False where a layout has fewer than K objects.
        score: reward and advantage [B, G], and what they are made of.
    """

    layouts: list[Layout]
    drawing: Drawing
    answers: Answers
    mask: Tensor
    score: CycleReward

    @property
    def group(self) -> int:
        """G, images per layout."""
        return len(self.drawing.codes) // len(self.layouts)

    def of(self, first: int, end: int) -> Rollout:
        """The rollout of layouts ``first`` to ``end`` − 1, as if they had been drawn alone: K is
        the most objects among them."""
        here = self.layouts[first:end]
        images, most = slice(first * self.group, end * self.group), most_objects(here)
        codes, logprob, kept = self.drawing
        drawing = Drawing(codes[images], logprob[images], None if kept is None else kept[images])
        answers = Answers(*(x[images, :most] for x in self.answers))
        score = CycleReward(*(x[first:end] for x in self.score))
        boxes, iou, l1 = (x[:, :, :most] for x in (score.boxes, score.iou, score.l1))
        score = score._replace(boxes=boxes, iou=iou, l1=l1)
        return Rollout(here, drawing, answers, self.mask[first:end, :most], score)


def _expected(score: CycleReward, boxes: int) -> CycleReward:
    """Reduce a score of K·n answers, ``boxes`` = n to each of K questions, to the K questions: the
    mean IoU and L1 of each, and its first box. The reward, a mean over all answers, does not
    change."""
    iou, l1, box = (x.unflatten(2, (-1, boxes)) for x in (score.iou, score.l1, score.boxes))
    return score._replace(iou=iou.mean(-1), l1=l1.mean(-1), boxes=box[:, :, :, 0])


def most_objects(layouts: list[Layout]) -> int:
    """K, the most objects of a layout."""
    return max(len(y.objects) for y in layouts)


def targets(layouts: list[Layout]) -> tuple[Tensor, Tensor]:
    """Target boxes, float32 [B, K, 4], and which of them exist, bool [B, K]."""
    most = most_objects(layouts)
    box, mask = torch.zeros(len(layouts), most, 4), torch.zeros(len(layouts), most, dtype=bool)  # type: ignore[call-overload]
    for b, layout in enumerate(layouts):
        count = len(layout.objects)
        box[b, :count] = torch.tensor([o.box for o in layout.objects])
        mask[b, :count] = True
    return box, mask


def _drawn(
    engine: Engine,
    layouts: list[Layout],
    group: int,
    sampling: Sampling,
    key: int,
    draws: Tensor,
    at_once: int | None,
) -> Drawing:
    """Draw G images of each layout, in turns of as equal size as whole layouts allow: a GPU records
    its steps anew for every number of rows."""
    turns = 1 if at_once is None else -(-len(layouts) // max(1, at_once // group))
    drawn = list[Drawing]()
    for some in np.array_split(np.arange(len(layouts)), turns):
        asked = [layouts[b] for b in some for _ in range(group)]
        try:
            mine = draws[some[0] * group : (some[-1] + 1) * group]
            drawn.append(draw(engine, asked, sampling, key, mine))
        except torch.OutOfMemoryError as error:
            if len(some) > 1:  # one layout's images cannot be divided
                error.add_note(
                    f"{len(asked)} images were drawn at once; set draw_at_once below that"
                )
            raise
    if len(drawn) == 1:
        return drawn[0]
    kept = [x.kept for x in drawn if x.kept is not None]
    return Drawing(
        torch.cat([x.codes for x in drawn]),
        torch.cat([x.logprob for x in drawn]),
        torch.cat(kept) if kept else None,
    )


def roll_out(
    engine: Engine,
    layouts: list[Layout],
    *,
    group: int,
    sampling: Sampling,
    key: int,
    draws: Tensor,
    boxes: int = 0,
    w_iou: float = 0.5,
    w_l1: float = 0.5,
    mode: Mode = "grpo",
    at_once: int | None = None,
) -> Rollout:
    """Draw, ground and score with the engine's current weights.

    Everything derived from the weights is rebuilt first, so that rollouts use the current step's
    weights: the table of code embeddings and, on a CPU, the packed copy that drawing reads (for its
    cost with the tiny model see ``pack_ms`` in bench/results/engine-tiny-cpu.json).

    Args:
        engine: the model.
        layouts: B layouts.
        group: G, images per layout.
        sampling: how their codes are drawn.
        key, draws: seed of the noise, and draw ids int64 [B·G].
        boxes: 0 takes the most likely box of each object; n ≥ 1 samples n, and the object's IoU and
            L1 are their mean: an unbiased estimate of the expectation under the grounder's
            distribution.
        w_iou, w_l1, mode: see `cycle_reward`.
        at_once: the most images that are drawn at once, G or more: the images of a layout stay
            together. None: all. (Grounding divides itself, see `engine.ground`.)
    """
    # Without the trainer's autocast, so that the engine computes as it does for users.
    images = len(layouts) * group
    with (
        span("train/cycle-rl/rollout", batch=images),
        torch.autocast(engine.device.type, enabled=False),
    ):
        engine.refresh()
        drawing = _drawn(engine, layouts, group, sampling, key, draws, at_once)
        each = max(boxes, 1)
        asked = [
            [o.expr for o in layout.objects for _ in range(each)]
            for layout in layouts
            for _ in range(group)
        ]
        answers = ground(engine, drawing.codes, asked, (key, draws) if boxes else None)
        box, mask = (t.to(engine.device) for t in targets(layouts))
        target, there = (t.repeat_interleave(each, 1) for t in (box, mask))
        first, bins = locations(engine.prompts)
        tokens = answers.tokens.unflatten(0, (len(layouts), group))
        with span("train/cycle-rl/reward", batch=images):
            score = cycle_reward(tokens, target, there, first, bins, w_iou, w_l1, mode)
    if each > 1:
        score, answers = _expected(score, each), Answers(*(x[:, ::each] for x in answers))
    return Rollout(layouts, drawing, answers, mask, score)
