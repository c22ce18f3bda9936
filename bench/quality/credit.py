"""How much of a gradient is signal, and does it lead where the judge would have it lead?

The gradients of m batches each are s + noise, with the same s. The cosine between two such means is
near |s|² / (|s|² + n²/m), n² being one batch's noise; so n²/|s|², the number of batches whose mean
is as much signal as noise, is m·(1 − cosine)/cosine.

What is compared: Cycle RL's gradient with an image's reward credited to all of its tokens, or an
object's to those in its box; the same, object by object, with the exact judge's IoU in place of the
self-reward; and stage 2's, of the loop's cross entropy through soft samples at some temperatures.
The judge's is where training should lead, so each is held against it too, every half against the
half of it that was made from other batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from echogen.bench.harness import environment
from echogen.engine.vision import decode_codes, to_images
from echogen.train.config import CycleRLConfig
from echogen.train.credit import Credit
from echogen.train.cycle_rl import CycleRLStage
from echogen.train.djo import DJOStage, Noise
from echogen.train.eval.judge import detect
from echogen.train.eval.matching import class_ious
from echogen.train.recipes import tiny
from echogen.train.rollouts import Rollout
from echogen.train.start import Start, load_start

TEMPERATURES = (1.0, 0.3)
"""Where τ begins and ends by default (METHOD, stage 2)."""


class JudgedRL(CycleRLStage):
    """Cycle RL whose reward is an object's IoU as the exact judge sees it."""

    def _credit(self, index: int, rollout: Rollout, mask: Tensor) -> Credit:
        images = to_images(decode_codes(self.vq, rollout.drawing.codes))
        judged = torch.zeros_like(rollout.score.iou)
        scenes, group = self.scenes(index), rollout.group
        for n, image in enumerate(images):
            found = class_ious(scenes[n // group], detect(image))
            judged[n // group, n % group, : len(found)] = torch.from_numpy(found)
        score = rollout.score._replace(iou=judged)
        return super()._credit(index, replace(rollout, score=score), mask)


class LoopAlone(DJOStage):
    """Stage 2's loop term and nothing else, at one temperature: images are drawn first, and the
    gradient reaches them through a grounder that stays as it is."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """See `Stage`."""
        every = self.examples(step)
        layouts = [x.layout for x in every]
        noise = Noise(self._key, torch.tensor([x.draw for x in every]))
        images, _ = self._sampled(layouts, self.config.tau_start, noise, step)
        asked = [[(o.expr, o.box) for o in layout.objects] for layout in layouts]
        return self._loop(layouts, images, sum(map(self.answer_tokens, asked))), {}


def run(
    model: str = "tiny",
    rollouts: int = 64,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The agreement of halves for each gradient, and with the judge's; JSON-ready.

    Args:
        model: whose gradients, of whatever stage; its weights stay as they are.
        rollouts: in all, half of them in each half; stage 2 gets as many batches of as many images.
        batch: layouts a rollout, in groups of the recipe's size.
        seed: of layouts and noise.
        progress: called with (batches done, batches in all).

    Returns:
        ``results``, for each gradient: ``cosine`` between the halves, ``rollouts_for_half``, the
        batches whose mean gradient is as much signal as noise (None: no signal was seen), and
        ``judge_cosine``, the mean cosine between a half and the other half of the judge's.

    Raises:
        ValueError: an odd number of rollouts.
    """
    if rollouts < 2 or rollouts % 2:
        raise ValueError(f"rollouts = {rollouts}; it must be even and at least 2")
    start = load_start(model, "", any_stage=True)
    stages = _stages(start, batch, seed)
    halves: dict[str, list[Tensor]] = {}
    for done, (name, stage) in enumerate(stages.items()):
        sums = [torch.zeros(()), torch.zeros(())]
        for step in range(rollouts):
            sums[step % 2] = sums[step % 2] + _gradient(stage, step)
            progress(done * rollouts + step + 1, len(stages) * rollouts)
        halves[name] = sums
    judge, found = halves["judge"], []
    for name, (a, b) in halves.items():
        cosine = float(cosine_similarity(a, b, 0))
        least = rollouts / 2 * (1 - cosine) / cosine if cosine > 0 else None
        across = (cosine_similarity(a, judge[1], 0) + cosine_similarity(b, judge[0], 0)) / 2
        row = {"gradient": name, "cosine": cosine, "rollouts_for_half": least}
        found.append(row | {"judge_cosine": float(across)})
    told = {"model": model, "rollouts": rollouts, "batch": batch, "group": tiny().cycle_rl.group}
    return {**told, "seed": seed, "results": found} | environment()


def _stages(start: Start, batch: int, seed: int) -> dict[str, CycleRLStage | DJOStage]:
    rl, djo = tiny().cycle_rl, tiny().djo
    rl = replace(rl, loop=replace(rl.loop, seed=seed), batch=batch, beta=0.0)
    by_image, by_object = replace(rl, credit="image"), replace(rl, credit="object")
    exact: CycleRLConfig = replace(by_object, w_iou=1.0, w_l1=0.0)
    djo = replace(
        djo,
        loop=replace(djo.loop, seed=seed),
        batch=batch * rl.group,
        prompt_dropout=0.0,
        grounding_weight=0.0,
        loop_weight=1.0,
        prefix="sampled",
        freeze_grounder=True,
    )
    loops = {
        f"loop, τ = {tau}": LoopAlone(replace(djo, tau_start=tau, tau_end=tau), start)
        for tau in TEMPERATURES
    }
    return {
        "image": CycleRLStage(by_image, start),
        "object": CycleRLStage(by_object, start),
        "judge": JudgedRL(exact, start),
        **loops,
    }


def _gradient(stage: CycleRLStage | DJOStage, step: int) -> Tensor:
    """The gradient of a step's loss, all parameters in one row; 0 where none arrives."""
    stage.module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage.loss(step)
    loss.backward()
    grads = [
        torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
        for p in stage.module.parameters()
    ]
    stage.module.zero_grad(set_to_none=True)
    return torch.cat(grads)
