"""Recipes: functions that return the full configuration of a model."""

from __future__ import annotations

from collections.abc import Callable

from echogen.train.config import (
    CycleRLConfig,
    DJOConfig,
    LoopConfig,
    PMTPConfig,
    Recipe,
    VQConfig,
)


def tiny() -> Recipe:
    """The bundled model: 64×64 pictures of ShapesWorld, 64 image tokens, two CPU cores."""
    return Recipe(
        name="tiny",
        vq=VQConfig(loop=LoopConfig(steps=1800, lr=1e-3, threads=2), warmup_steps=300),
        pmtp=PMTPConfig(
            loop=LoopConfig(
                steps=5600, lr=2e-3, muon_lr=4e-3, decay=0.5, eval_every=800, threads=2
            ),
            # Best judge IoU of `echogen eval --split val --count 96` over temperatures 0.3, 0.5,
            # 0.7, 1 and CFG 1, 1.5, 2, 3 (engine/models/tiny/training/sampling_on_validation.json).
            temperature=0.3,
            cfg=1.0,
        ),
        # Rates far below stage 1's, which ended at zero: started again near them, the losses of
        # drawing and grounding rise before they fall. And λ below 1: the loop's gradient is several
        # times as long as the others', and clipped together it would drown them.
        djo=DJOConfig(
            loop=LoopConfig(
                steps=2400, lr=5e-5, muon_lr=1e-4, decay=0.5, eval_every=400, threads=2
            ),
            loop_weight=0.2,
        ),
        cycle_rl=CycleRLConfig(
            loop=LoopConfig(
                steps=400,
                lr=2e-5,
                warmup=20,
                eval_every=50,
                save_every=50,
                threads=2,
                # In float32 the trainer's log-probabilities are the sampler's to 1e-6 (the log's
                # sampler_gap); bfloat16 puts 7e-3 between them.
                bf16=False,
            ),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny}
