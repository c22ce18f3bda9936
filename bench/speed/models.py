"""Models to time: a checkpoint, or random weights of a stated size that need no file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from echogen.bench.peers.janus_port import JanusPort, share_weights
from echogen.engine.attention import plan_no_shapes
from echogen.engine.checkpoints.pretrained import resolve
from echogen.engine.config import ModelConfig
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.model import UnifiedTransformer

BOS, EOS, PAD, BEGIN_IMAGE, PLACEHOLDER = range(5)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """Return the type of the weights, by its name in ``DTYPES``. Raises ValueError."""
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model, and the length of its prompts: ShapesWorld's layouts have about 60
    tokens. VQ and SigLIP tower are stubs, which drawing never runs."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int = 600
    codebook: int = 1024
    grid: int = 8
    prompt_tokens: int = 60

    def janus_config(self) -> JanusConfig:
        """The `transformers` configuration."""
        patch = 8
        return JanusConfig(
            text_config=LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=self.mlp_width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=1024,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                bos_token_id=BOS,
                eos_token_id=EOS,
                pad_token_id=PAD,
                tie_word_embeddings=False,
            ),
            vision_config=JanusVisionConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=self.grid * patch,
                patch_size=patch,
                projection_dim=self.width,
                num_image_tokens=self.grid**2,
            ),
            vq_config=JanusVQVAEConfig(
                embed_dim=8,
                num_embeddings=self.codebook,
                latent_channels=32,
                base_channels=32,
                channel_multiplier=[1, 1, 1, 1],
                num_res_blocks=1,
                projection_dim=self.width,
                image_token_embed_dim=self.width,
                num_patches=self.grid,
            ),
            image_token_id=PLACEHOLDER,
            tie_word_embeddings=False,
        )


RANDOM = {
    "random:micro": Shape(width=32, layers=2, heads=2, mlp_width=48, codebook=64, grid=4),
    "random:tiny": Shape(width=256, layers=6, heads=4, mlp_width=704),
    "random:100m": Shape(
        width=768, layers=14, heads=12, mlp_width=2048, vocabulary=4096, codebook=4096, grid=12
    ),
    "janus_pro_1b": Shape(
        width=2048, layers=24, heads=16, mlp_width=5632, vocabulary=102_400, codebook=16_384,
        grid=24, prompt_tokens=128,
    ),
}  # fmt: skip
"""Random models: one for tests, one shaped like the bundled model, one of 100M parameters, whose
weights no longer fit a cache, and one shaped like Janus-Pro 1B. The last has prompts as long as a
layout of several objects takes, each described in a sentence."""
GPU_ONLY = ("janus_pro_1b",)
"""Models whose 576 codes per image take minutes on a CPU."""


@dataclass(frozen=True)
class Subject:
    """One model on both sides.

    Attributes:
        transformer, code_table: this engine's.
        port: the peer on the same weights; None where none was requested.
        prompts: int64 [N, L], of equal length, ending in begin-of-image.
        bos, pad, begin_image: ids the unconditional prompt is made of.
    """

    transformer: UnifiedTransformer
    code_table: Tensor
    port: JanusPort | None
    prompts: Tensor
    bos: int
    pad: int
    begin_image: int

    def rows(self, prompts: Tensor, cfg: float) -> list[list[int]]:
        """Return the rows that a drawing of ``prompts`` [N, L] runs: with guidance, the
        unconditional ones follow."""
        found: list[list[int]] = prompts.tolist()
        if cfg != 1:
            middle = [self.pad] * (prompts.shape[1] - 2)
            found += [[self.bos, *middle, self.begin_image]] * len(found)
        return found

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Subject:
        """Return the same on another device, in another type; the port moves with it."""
        if self.port is not None:
            self.port.to(device, dtype)
        plan_no_shapes(torch.device(device))
        transformer = self.transformer.to(device, dtype)
        with torch.inference_mode():
            table = transformer.code_table()
        return replace(
            self, transformer=transformer, code_table=table, prompts=self.prompts.to(device)
        )


def load(name: str, batch: int, seed: int, with_port: bool, device: str = "cpu") -> Subject:
    """Load a random model of ``RANDOM``, or whatever ``Engine.from_pretrained`` loads, in float32,
    with ``batch`` prompts of one length, which differ where the model allows it.

    Random weights are drawn on ``device``: drawing a billion takes a processor a minute.

    Raises:
        ValueError: an unknown random model.
        CheckpointError: there is nothing to load under ``name``.
    """
    if not name.startswith("random:") and name not in RANDOM:
        return _from_checkpoint(name, batch, with_port)
    if name not in RANDOM:
        raise ValueError(f"model {name!r} is unknown; random models: {', '.join(RANDOM)}")
    config = RANDOM[name].janus_config()
    with torch.device(device):
        model = UnifiedTransformer(ModelConfig.from_janus(config)).eval()
        theirs = JanusForConditionalGeneration(config) if with_port else None
    model.initialise(seed)
    port = None
    if theirs is not None:
        share_weights(model, theirs)
        port = JanusPort(theirs, BEGIN_IMAGE)
    generator = torch.Generator().manual_seed(seed)
    sizes = batch, RANDOM[name].prompt_tokens
    prompts = torch.randint(PLACEHOLDER + 1, model.config.vocab_size, sizes, generator=generator)
    prompts[:, 0], prompts[:, -1] = BOS, BEGIN_IMAGE
    with torch.inference_mode():
        table = model.code_table()
    return Subject(model, table, port, prompts, BOS, PAD, BEGIN_IMAGE)


def _from_checkpoint(name: str, batch: int, with_port: bool) -> Subject:
    engine = Engine.from_pretrained(name)
    port = None
    if with_port:
        theirs = JanusForConditionalGeneration.from_pretrained(resolve(name), dtype=torch.float32)
        port = JanusPort(theirs, engine.prompts.begin_image)
    with torch.inference_mode():
        table = engine.transformer.code_table()
    p = engine.prompts
    prompts = [p.l2i(_layout(i)) for i in range(batch)]
    if len({len(prompt) for prompt in prompts}) > 1:  # boxes written as text differ in length
        prompts = prompts[:1] * batch
    ids = torch.tensor(prompts)
    return Subject(engine.transformer, table, port, ids, p.bos, p.pad, p.begin_image)


def _layout(index: int) -> Layout:
    """Return one text with two boxes, which move with ``index``; index 0 is the original layout."""
    across, down = (index % 8) / 40, (index // 8 % 8) / 80
    objects = (
        LayoutObject("a red circle in front", (0.10 + across, 0.20 + down, 0.45 + across, 0.60)),
        LayoutObject("a blue square behind", (0.30, 0.35, 0.80 + across, 0.90 + down)),
    )
    return Layout("a red circle in front of a blue square", objects)


def hollow(subject: Subject) -> Subject:
    """Return a model with as many layers and the same prompts, whose tensors hold a few numbers:
    its step makes the calls of a real step without their arithmetic."""
    # The smallest sizes that every way of drawing accepts.
    config = replace(
        subject.transformer.config, width=16, heads=1, kv_heads=1, head_dim=16, mlp_width=16,
        head_width=16, codebook_size=16, code_dim=2,
    )  # fmt: skip
    weight = subject.transformer.norm.weight
    model = UnifiedTransformer(config).eval()
    model.initialise(0)
    return replace(subject, transformer=model, port=None).to(str(weight.device), weight.dtype)
