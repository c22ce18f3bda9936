"""Recipes: functions that return the full configuration of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
    # Samples are taken in the order in which the bundled models and the recorded cells of `bench
    # quality` were trained.
    return Recipe(
        name="tiny",
        vq=VQConfig(loop=LoopConfig(steps=1800, lr=1e-3, threads=2), warmup_steps=300),
        pmtp=PMTPConfig(
            loop=LoopConfig(
                steps=5600, lr=2e-3, muon_lr=4e-3, decay=0.5, eval_every=800, threads=2
            ),
            temperature=0.3,
            cfg=1.0,
            order="independent",
        ),
        # Stage 1 continued, since its validation losses were still falling: with twice the scenes
        # (the training loss had fallen below the validation loss) and half the rate.
        pmtp_on=PMTPConfig(
            loop=LoopConfig(
                steps=6400, lr=1e-3, muon_lr=2e-3, decay=0.8, eval_every=800, threads=1
            ),
            scenes=80_000,
            # Best judge IoU of `echogen eval --split val --count 96` over temperatures 0.3, 0.5,
            # 0.7, 1 and CFG 1, 1.5, 2, 3 (sampling_on_validation.json of the bundled tiny-stage1).
            temperature=0.5,
            cfg=3.0,
            order="independent",
        ),
        # The rates are far below stage 1's, which ended at zero: this stage continues from there
        # and should not undo it. λ is below 1 because the gradients are clipped together, and
        # drawing and grounding true images should dominate. Both are choices; nothing here was
        # swept.
        djo=DJOConfig(
            loop=LoopConfig(
                steps=2400, lr=5e-5, muon_lr=1e-4, decay=0.5, eval_every=400, threads=2
            ),
            loop_weight=0.2,
            order="independent",
        ),
        # Most of a gradient is noise (`echogen bench credit`). So credit is assigned per object,
        # with rank advantages, which carry more signal, and the rate falls to zero over most of the
        # run, which averages out the noise of late steps. Trained this way, AP at T = 1 rose by
        # 0.012 ± 0.002 (the table `plateau` of `echogen bench quality`). There is no KL term, as
        # the reference model would cost an extra pass.
        cycle_rl=CycleRLConfig(
            loop=LoopConfig(
                steps=700,
                lr=2e-5,
                muon_lr=1e-4,
                warmup=10,
                decay=0.6,
                eval_every=140,
                save_every=50,
                threads=2,
            ),
            credit="object",
            advantage="rank",
            beta=0.0,
            order="independent",
        ),
    )


def small() -> Recipe:
    """One GPU: ShapesWorld at 128×128, 256 image tokens, a transformer of 12 layers.

    It has not been run: sizes and rates are scaled up from `tiny`, and nothing was swept.
    """
    loop = LoopConfig(
        steps=20_000, lr=1e-3, muon_lr=2e-3, decay=0.5, warmup=500, eval_every=2000,
        save_every=1000, threads=None,
    )  # fmt: skip
    # 65 bins, as in `tiny`: scenes are defined on a grid of 64, whatever size they are drawn at.
    pmtp = PMTPConfig(
        loop=loop, width=512, layers=12, heads=8, mlp_width=1408, bins=65, scenes=200_000,
        batch=128, temperature=0.3, cfg=1.0,
    )  # fmt: skip
    on = replace(loop, steps=10_000, lr=5e-4, muon_lr=1e-3, decay=0.8)
    late = replace(loop, steps=5000, lr=5e-5, muon_lr=1e-4, eval_every=500, save_every=500)
    rl = replace(late, steps=1000, lr=2e-5, muon_lr=None, warmup=20, eval_every=100, save_every=100)
    return Recipe(
        name="small",
        vq=VQConfig(
            loop=LoopConfig(steps=10_000, lr=5e-4, eval_every=1000, threads=None),
            channels=64, latent=128, codes=2048, image_size=128, batch=64, warmup_steps=1000,
        ),
        pmtp=pmtp,
        pmtp_on=replace(pmtp, loop=on),
        djo=DJOConfig(loop=late, scenes=200_000, batch=128, loop_weight=0.2),
        # Drawn and scored in bfloat16: `sampler_gap` in the metrics shows how much they differ.
        cycle_rl=CycleRLConfig(loop=rl, scenes=200_000, batch=16, rollout_dtype="bfloat16"),
    )  # fmt: skip


def janus_pro_1b() -> Recipe:
    """The paper's model: Janus-Pro 1B at 384×384, 576 image tokens, B = 1000 location tokens.

    From the paper: AdamW at 5e-5 in all stages; 125k, 60k and 50k steps on 4M, 2M and 50k samples,
    hence 32, 32 and 1 per step; groups of 8. The other AdamW settings and the constant rate are
    those of its predecessor (PlanGen), as the sources at hand do not state them. The image
    tokenizer and the initial weights come from the checkpoint (`train pmtp --pretrained`), which
    ``vq`` only describes. The data are ShapesWorld at 384×384, or (``data``) a folder of pictures.
    A step of stage 3 has one layout and so runs in one process; several processes need a larger
    batch (`--batch`). It has not been run.

    Stages 1 and 2 split a step into two parts to fit one GPU of 141 GB: a layer keeps 83,016 bytes
    per token for backward, which for 45,000 tokens (stage 2 with its loop: 65,000) and 24 layers is
    83 (121) GiB beside 27 GiB of weights, moments and casts. In one part, stage 2 would not fit,
    and stage 1 would leave only a fifth of the memory for logits and everything else. Several GPUs
    need no split (`--accumulate 1`).

    The 83,016 bytes are: the inputs of the norms, 2 · 8192 (float32); the inputs of the matrix
    products, 3 · 4096 and 11,264; queries and keys after rotation, 8192, and before it, with the
    values, 12,288; gate and up, 22,528 (all bfloat16); and the factors of norms and softmax, 72.
    """
    loop = LoopConfig(
        steps=125_000, lr=5e-5, warmup=1000, decay=0.0, betas=(0.9, 0.999), eval_every=5000,
        save_every=1000, threads=None,
    )  # fmt: skip
    pmtp = PMTPConfig(
        loop=loop, width=2048, layers=24, heads=16, mlp_width=5632, rope_theta=10_000.0,
        bins=1000, scenes=200_000, batch=32,
    )  # fmt: skip
    rl = replace(loop, steps=50_000, warmup=20, eval_every=500, save_every=500)
    pmtp = replace(pmtp, loop=replace(loop, accumulate=2))
    return Recipe(
        name="janus_pro_1b",
        vq=VQConfig(
            loop=loop, channels=128, multipliers=(1, 1, 2, 2, 4), res_blocks=2, latent=256,
            codes=16_384, code_dim=8, image_size=384,
        ),
        pmtp=pmtp,
        pmtp_on=pmtp,
        djo=DJOConfig(loop=replace(loop, steps=60_000, accumulate=2), scenes=200_000, batch=32),
        cycle_rl=CycleRLConfig(
            # With eight drawings, an evaluation would draw half as many images as 500 steps do.
            loop=rl, scenes=200_000, batch=1, group=8, rollout_dtype="bfloat16", val_drawings=1,
        ),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "small": small,
    "janus_pro_1b": janus_pro_1b,
}
