"""Every knob of a training run, as frozen dataclasses that `train/recipes.py` fills in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoopConfig:
    """The step loop.

    Attributes:
        steps: optimizer steps in all.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon for the transformer's matrices; None: AdamW for all.
        warmup: steps of linear warm-up.
        decay: share of the steps, at the end, over which the rate falls linearly to zero.
        betas, weight_decay, clip: AdamW's, decoupled decay on matrices only, gradient-norm clip.
        bf16: autocast matrix products and convolutions to bfloat16; weights stay float32.
        log_every, eval_every, save_every: steps between log lines, evaluations, checkpoints.
        threads: intra-op threads on a CPU (None: torch's own choice).
        seed: of weights and batches.
    """

    steps: int
    lr: float
    muon_lr: float | None = None
    warmup: int = 100
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = True
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 250
    threads: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if not self.lr > 0 or not 0 <= self.decay <= 1:
            raise ValueError(f"lr = {self.lr} must be positive, decay = {self.decay} in [0, 1]")


@dataclass(frozen=True)
class VQConfig:
    """The image tokenizer of a small model, trained from scratch.

    Attributes:
        channels, multipliers, res_blocks, latent: shape of `JanusVQVAE`; the image side shrinks by
            2^(len(multipliers) − 1).
        codes, code_dim: codebook size and width.
        image_size: pixels along a side.
        batch: images a step.
        warmup_steps: steps as a plain autoencoder before the codebook is seeded by k-means.
        commitment: weight of the pull of features towards their codes.
        agreement: weight of the pull of equal patches towards one feature, whatever surrounds them.
        ema: decay of the codebook's moving averages.
    """

    loop: LoopConfig
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 1
    latent: int = 64
    codes: int = 1024
    code_dim: int = 8
    image_size: int = 64
    batch: int = 16
    warmup_steps: int = 500
    commitment: float = 0.25
    agreement: float = 1.0
    ema: float = 0.98


@dataclass(frozen=True)
class PMTPConfig:
    """Stage 1, parallel multi-task pre-training of a small model.

    Attributes:
        width, layers, heads, mlp_width: the transformer.
        rope_theta: RoPE base; small, since sequences are short.
        bins: location tokens of the box codec.
        scenes: layouts of the training set.
        batch: samples a step that carry both tasks.
        extra_grounding: further samples a step that carry grounding only.
        branches: grounding branches (expressions) of one image.
        prompt_dropout: share of L2I prompts replaced by the unconditional prompt.
        temperature, cfg: default sampling written into the exported model; chosen on validation.
        loop: the step loop.
    """

    loop: LoopConfig
    width: int = 192
    layers: int = 6
    heads: int = 3
    mlp_width: int = 512
    rope_theta: float = 1000.0
    bins: int = 65
    scenes: int = 40_000
    batch: int = 32
    extra_grounding: int = 0
    branches: int = 6
    prompt_dropout: float = 0.1
    temperature: float = 1.0
    cfg: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A whole model: its image tokenizer and its stage 1."""

    name: str
    vq: VQConfig
    pmtp: PMTPConfig
    notes: str = field(default="")


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready data."""
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return data
