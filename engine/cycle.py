"""The cycle's score: how well the layout recovered from an image matches the requested one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from echogen.engine.layout import Box, Layout
from echogen.engine.ranges import span
from echogen.kernels.boxes import box_reward
from echogen.kernels.group_advantage import group_advantage


@dataclass(frozen=True)
class CycleResult:
    """Samples of one layout, each drawn, grounded and scored.

    Attributes:
        layout: the requested layout.
        images: G pictures.
        codes: their image codes, int64 [G, T].
        boxes: for each picture, the recovered box of every object.
        iou, l1: float32 [G, K] between recovered and requested boxes.
        reward, advantage: float32 [G]; the advantage is relative to these samples.
        seconds: wall time of drawing, grounding and scoring.
    """

    layout: Layout
    images: list[Image.Image]
    codes: Tensor
    boxes: list[list[Box]]
    iou: Tensor
    l1: Tensor
    reward: Tensor
    advantage: Tensor
    seconds: float

    @property
    def best(self) -> int:
        """Index of the sample with the highest reward (the first of a tie)."""
        return int(self.reward.argmax())

    def to_dict(self, sample: int) -> dict[str, Any]:
        """One sample as JSON-ready data: objects with their boxes and scores, reward, seconds."""
        rows = zip(
            self.layout.objects, self.boxes[sample], self.iou[sample], self.l1[sample], strict=True
        )
        objects = [
            {
                "expr": o.expr,
                "box": list(o.box),
                "recovered": list(box),
                "iou": round(float(iou), 6),
                "l1": round(float(l1), 6),
            }
            for o, box, iou, l1 in rows
        ]
        return {
            "caption": self.layout.caption,
            "objects": objects,
            "reward": round(float(self.reward[sample]), 6),
            "advantage": round(float(self.advantage[sample]), 6),
            "seconds": round(self.seconds, 3),
        }


def score(layout: Layout, boxes: list[list[Box]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """IoU [G, K], L1 [G, K], reward [G] and advantage [G] of the boxes recovered from G images."""
    with span("engine/reward", batch=len(boxes)):
        target = torch.tensor([[o.box for o in layout.objects]])
        found = box_reward(
            torch.tensor(boxes).unsqueeze(0), target, torch.ones(target.shape[:2], dtype=torch.bool)
        )
        advantage = group_advantage(found.reward).advantage[0]
    return found.iou[0], found.l1[0], found.reward[0], advantage
