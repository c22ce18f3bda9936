"""How much of a policy gradient is signal: do two halves of some rollouts point the same way?

The gradients of m rollouts each are s + noise, with the same s. The cosine between two such means
is near |s|² / (|s|² + n²/m), n² being one rollout's noise; so n²/|s|², the number of rollouts whose
mean is as much signal as noise, is m·(1 − cosine)/cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from echogen.bench.harness import environment
from echogen.train.cycle_rl import CycleRLStage
from echogen.train.recipes import tiny
from echogen.train.start import load_start

CREDITS: tuple[Literal["image", "object"], ...] = ("image", "object")


def run(
    model: str = "tiny",
    rollouts: int = 64,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The agreement of halves for each way to credit a reward, on the same rollouts; JSON-ready.

    Args:
        model: whose gradients, of whatever stage; its weights stay as they are.
        rollouts: in all, half of them in each half.
        batch: layouts a rollout, in groups of the recipe's size.
        seed: of layouts and noise.
        progress: called with (rollouts done, rollouts in all).

    Returns:
        ``results``, for each credit: ``cosine`` between the halves, and ``rollouts_for_half``, the
        rollouts whose mean gradient is as much signal as noise (None: no signal was seen).

    Raises:
        ValueError: an odd number of rollouts.
    """
    if rollouts < 2 or rollouts % 2:
        raise ValueError(f"rollouts = {rollouts}; it must be even and at least 2")
    start = load_start(model, "", any_stage=True)
    recipe = tiny().cycle_rl
    loop = replace(recipe.loop, seed=seed)
    halves: dict[str, list[Tensor]] = {}
    for done, name in enumerate(CREDITS):
        config = replace(recipe, loop=loop, batch=batch, credit=name, beta=0.0)
        stage = CycleRLStage(config, start)
        sums = [torch.zeros(()), torch.zeros(())]
        for step in range(rollouts):
            sums[step % 2] = sums[step % 2] + _gradient(stage, step)
            progress(done * rollouts + step + 1, len(CREDITS) * rollouts)
        halves[name] = sums
    found = []
    for how, (a, b) in halves.items():
        cosine = float(torch.nn.functional.cosine_similarity(a, b, 0))
        least = rollouts / 2 * (1 - cosine) / cosine if cosine > 0 else None
        found.append({"credit": how, "cosine": cosine, "rollouts_for_half": least})
    told = {"model": model, "rollouts": rollouts, "batch": batch, "group": recipe.group}
    return {**told, "seed": seed, "results": found} | environment()


def _gradient(stage: CycleRLStage, step: int) -> Tensor:
    """The gradient of a step's loss, all parameters in one row."""
    stage.module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage.loss(step)
    loss.backward()
    grads = [p.grad.flatten() for p in stage.module.parameters() if p.grad is not None]
    stage.module.zero_grad(set_to_none=True)
    return torch.cat(grads)
