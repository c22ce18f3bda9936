"""Measure how much of a gradient is signal, and whether it points where the judge's does.

The gradient of a batch is s + noise, with the same s for all batches. The product of two batches'
gradients is |s|² on average; the product of one with itself is |s|² plus the noise n². All pairs of
R batches thus give the share of signal in a batch's squared gradient, |s|²/(|s|² + n²), and the
number of batches whose mean has as much signal as noise, n²/|s|². The jackknife, which leaves out
one batch after another, gives their accuracy (Efron & Stein 1981).

Three kinds of gradients are compared. The first is Cycle RL's. It credits an image's reward to all
of its tokens, or an object's to those in its box; it judges by one decoded box or by several
sampled ones; and its advantage is the reward relative to the group, or the rank within it. The
second is the same, object by object, with the exact judge's IoU in place of the self-reward. The
third is stage 2's, of the loop's cross entropy through soft samples at some temperatures. Training
should follow the judge's gradient, so each one is compared with it: by the cosine between the two
signals, from pairs of different batches. The parts of the network are also measured one by one:
where the signal lies is what is worth training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echogen.bench.harness import environment
from echogen.engine.images.vision import decode_codes, to_images
from echogen.train.config import DJOConfig
from echogen.train.eval.judge import detect
from echogen.train.eval.matching import class_ious
from echogen.train.recipes import tiny
from echogen.train.stages.credit import Credit
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.djo import DJOStage, Noise
from echogen.train.stages.rollouts import Rollout
from echogen.train.start import Start, load_start

JUDGE = "judge"
REWARDS: dict[str, dict[str, Any]] = {
    "image": {"credit": "image"},
    "object": {},
    "object, ranks": {"advantage": "rank"},
    "object, 2 boxes": {"reward_boxes": 2},
    "object, 4 boxes": {"reward_boxes": 4},
    JUDGE: {"w_iou": 1.0, "w_l1": 0.0},
}
"""The settings that each one adds to ``USUAL``, or changes there."""
USUAL: dict[str, Any] = {"credit": "object", "advantage": "grpo", "reward_boxes": 0}
LOOPS = {f"loop, τ = {tau}": tau for tau in (1.0, 0.3)}
"""The first and last τ of stage 2 by default."""
GRADIENTS = (*REWARDS, *LOOPS)

PARTS = {
    "attention": ("qkv", "out", "attn_norm"),
    "MLPs": ("gate_up", "down", "mlp_norm"),
    "image head": ("image_head", "norm"),
    "embeddings": ("text_embedding", "code_embedding", "code_aligner"),
}
"""Parts of the network, each with the modules that occur in its parameters' names. The other
modules take no part in drawing."""


class JudgedRL(CycleRLStage):
    """Cycle RL with an object's IoU, as measured by the exact judge, as its reward."""

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
    """Stage 2's loop term alone, at one temperature. Images are drawn first, and the gradient
    reaches them through a frozen grounder."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """See `Stage`."""
        every = self.examples(step)
        layouts = [x.layout for x in every]
        noise = Noise(self._key, torch.tensor([x.draw for x in every]))
        images, _ = self._sampled(layouts, self.config.tau_start, noise, step)
        asked = [[(o.expr, o.box) for o in layout.objects] for layout in layouts]
        total = sum(map(self.answer_tokens, asked))
        return self._loop(self._questions(layouts), images, total), {}


def run(
    model: str = "tiny",
    rollouts: int = 64,
    batch: int = 8,
    seed: int = 0,
    gradients: Iterable[str] = GRADIENTS,
    float32: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return the share of signal in each gradient, and its agreement with the judge's; JSON-ready.

    All gradients of two kinds are in memory at once (8 bytes per parameter and rollout), plus a
    copy of those of one part.

    Args:
        model: the model whose gradients are measured, of any stage; its weights do not change.
        rollouts: R; stage 2 gets as many batches, with as many images.
        batch: layouts per rollout, in groups of the recipe's size.
        seed: of layouts and noise; rewards are compared on the same images.
        gradients: names from `GRADIENTS`.
        float32: multiply in float32 instead of bfloat16, which the recipe trains in.
        progress: called with (batches done, batches in all).

    Returns:
        ``results``, for each gradient: ``signal`` and ``signal_stderr``, the share of signal in a
        batch's squared gradient; ``batches_for_half``, the number of batches whose mean gradient is
        as much signal as noise (None: no signal was found); ``judge_cosine`` and
        ``judge_cosine_stderr``, between the signal and the judge's (None: one of them was not
        found, or not requested); ``parts``, the same for each of `PARTS` alone.

    Raises:
        ValueError: too few rollouts, or an unknown gradient.
    """
    asked = list(dict.fromkeys(gradients))
    if rollouts < 3:
        raise ValueError(f"rollouts = {rollouts}; it must be at least 3")
    if unknown := [name for name in asked if name not in GRADIENTS]:
        raise ValueError(f"gradient {unknown[0]!r} is unknown; choose of {', '.join(GRADIENTS)}")
    machine = environment()  # now: the checkout may be at another commit by the end
    start = load_start(model, "", any_stage=True)
    # The judge's first: all others are compared with them.
    asked.sort(key=lambda name: (name != JUDGE, GRADIENTS.index(name)))
    judged: Tensor | None = None
    found = []
    for done, name in enumerate(asked):
        stage = _stage(name, start, batch, seed)
        made = torch.stack([
            _gradient(stage, step, float32)
            for step in _counted(rollouts, done * rollouts, len(asked) * rollouts, progress)
        ])  # fmt: skip
        if name == JUDGE:
            judged = made
        parts = {
            part: compared(made[:, columns], None if judged is None else judged[:, columns])
            for part, columns in _columns(stage.module).items()
        }
        found.append({"gradient": name, **compared(made, judged), "parts": parts})
    found.sort(key=lambda row: GRADIENTS.index(row["gradient"]))
    told = {"model": model, "rollouts": rollouts, "batch": batch, "group": tiny().cycle_rl.group}
    told |= {"precision": "float32" if float32 else "bfloat16", "seed": seed}
    return {**told, "results": found} | machine


def _columns(module: nn.Module) -> dict[str, Tensor]:
    """Return the positions of each part's parameters in a row of all parameters, int64 [n]."""
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    first = 0
    for name, p in module.named_parameters():
        here, modules = torch.arange(first, first + p.numel()), name.split(".")
        for part, known in PARTS.items():
            if any(module in known for module in modules):
                found[part].append(here)
        first += p.numel()
    return {part: torch.cat(columns) for part, columns in found.items()}


def _counted(
    rollouts: int, before: int, total: int, progress: Callable[[int, int], None]
) -> Iterable[int]:
    for step in range(rollouts):
        yield step
        progress(before + step + 1, total)


def compared(made: Tensor, judged: Tensor | None) -> dict[str, float | None]:
    """Return `run`'s figures for the gradients [R, P] of R batches, given the judge's on the same
    ones."""
    own = _products(made, made)
    share = _jackknife(lambda left: _apart(own, left) / own[left, left].mean(), len(made))
    half = 1 / share[0] - 1 if share[0] > 0 else None
    told = {"signal": share[0], "signal_stderr": share[1], "batches_for_half": half}
    cosine: tuple[float | None, float | None] = None, None
    if judged is not None:
        across, other = _products(made, judged), _products(judged, judged)

        def aligned(left: np.ndarray) -> float:
            ours, theirs = _apart(own, left), _apart(other, left)
            if min(ours, theirs) <= 0:
                return float("nan")
            return float(_apart(across, left) / (ours * theirs) ** 0.5)

        mean, error = _jackknife(aligned, len(made))
        cosine = (mean, error) if np.isfinite(mean) and np.isfinite(error) else (None, None)
    return {**told, "judge_cosine": cosine[0], "judge_cosine_stderr": cosine[1]}


def _products(a: Tensor, b: Tensor) -> np.ndarray:
    """The product of each gradient with each, [R, R]."""
    return np.asarray((a @ b.T).double())


def _apart(products: np.ndarray, left: np.ndarray) -> float:
    """The mean product of different batches, among those in ``left``."""
    some = products[np.ix_(left, left)]
    return float((some.sum() - np.trace(some)) / (len(left) * (len(left) - 1)))


def _jackknife(of: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """Return a statistic of all batches, and its standard error."""
    every = np.arange(count)
    without = np.array([of(np.delete(every, i)) for i in every])
    return float(of(every)), float(((count - 1) * without.var()) ** 0.5)


def _stage(name: str, start: Start, batch: int, seed: int) -> CycleRLStage | DJOStage:
    rl = tiny().cycle_rl
    rl = replace(rl, loop=replace(rl.loop, seed=seed), batch=batch, beta=0.0)
    if name in REWARDS:
        kind = JudgedRL if name == JUDGE else CycleRLStage
        return kind(replace(rl, **USUAL | REWARDS[name]), start)
    djo, tau = tiny().djo, LOOPS[name]
    config: DJOConfig = replace(
        djo, loop=replace(djo.loop, seed=seed), batch=batch * rl.group, prompt_dropout=0.0,
        grounding_weight=0.0, loop_weight=1.0, prefix="sampled", freeze_grounder=True,
        tau_start=tau, tau_end=tau,
    )  # fmt: skip
    return LoopAlone(config, start)


def _gradient(stage: CycleRLStage | DJOStage, step: int, float32: bool) -> Tensor:
    """Return the gradient of a step's loss, all parameters in one row; 0 where there is none."""
    stage.module.zero_grad(set_to_none=True)
    with nullcontext() if float32 else torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage.loss(step)
    loss.backward()
    grads = [
        torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
        for p in stage.module.parameters()
    ]
    stage.module.zero_grad(set_to_none=True)
    return torch.cat(grads)
