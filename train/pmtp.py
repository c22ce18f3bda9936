"""Stage 1, parallel multi-task pre-training: draw from layouts and ground in images, packed.

`L = CE(image codes | layout) + CE(box tokens | image, expression)` (EchoGen, stage 1), with the
`isolated` mask of METHOD or its `shared` one. Grounding learns more slowly than drawing, so a step
carries further images that are only grounded: a branch costs a dozen tokens on top of the prefix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusVisionConfig,
    JanusVisionModel,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from echogen.engine.config import ModelConfig
from echogen.engine.engine import Engine
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import LocationCodec, Prompts
from echogen.engine.ranges import span
from echogen.engine.rollout import locations
from echogen.engine.sampler import Sampling
from echogen.train import keys
from echogen.train.config import PMTPConfig
from echogen.train.data.packing import Batch, Tree, l2i_prompt, shared_tree
from echogen.train.data.samples import Sample, load_samples
from echogen.train.passes import box_loss, hidden_states, image_loss, worth_logging
from echogen.train.start import Start
from echogen.train.tokenizer import IMAGE_PLACEHOLDER, train_tokenizer
from echogen.train.world import WorldStage, ask


def janus_config(
    config: PMTPConfig, vq: JanusVQVAE, tokenizer: PreTrainedTokenizerBase
) -> JanusConfig:
    """The `transformers` configuration of a small model; its SigLIP tower is a stub of one layer,
    which stage 1 does not train."""
    side = vq.config.num_patches
    patch = 1 << (len(vq.config.channel_multiplier) - 1)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=side * patch,
        patch_size=patch,
        projection_dim=config.width,
        num_image_tokens=side * side,
    )
    # Janus keeps the transformer's width in the tokenizer's configuration too.
    vq_config = JanusVQVAEConfig(**vq.config.to_dict())
    vq_config.projection_dim = vq_config.image_token_embed_dim = config.width
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq_config,
        image_token_id=tokenizer.get_vocab()[IMAGE_PLACEHOLDER],
        tie_word_embeddings=False,
    )


def new_model(config: PMTPConfig, vq: JanusVQVAE, samples: list[Sample]) -> Engine:
    """A model with fresh weights and a tokenizer of the samples' texts."""
    texts = [t for s in samples[:5000] for t in (s.caption, *sum(s.expressions, ()))]
    tokenizer = train_tokenizer(texts, config.bins)
    janus = janus_config(config, vq, tokenizer)
    transformer = UnifiedTransformer(ModelConfig.from_janus(janus))
    transformer.initialise(config.loop.seed)
    torch.manual_seed(config.loop.seed)
    vision: Any = janus.vision_config
    return Engine(
        janus,
        transformer,
        vq,
        JanusVisionModel(vision),
        Prompts(tokenizer, LocationCodec(tokenizer, config.bins)),
        Sampling(temperature=config.temperature, cfg=config.cfg),
        pixels_trained=False,
    )


class PMTPStage(WorldStage):
    """One batch → loss of stage 1, on ShapesWorld."""

    name = "pmtp"

    def __init__(self, config: PMTPConfig, begin: JanusVQVAE | Start) -> None:
        """Fresh weights behind an image tokenizer, or a model of this stage to go on with, whose
        shape, vocabulary and image tokenizer then stand, whatever the configuration says.

        Raises:
            PromptError: a model whose boxes are not location tokens.
        """
        if isinstance(begin, Start):
            engine = begin.engine
            locations(engine.prompts)
            self.config = replace(config, start=begin.fingerprint)
            self._train = load_samples(engine.vq, "train", config.scenes)
            engine.sampling = Sampling(temperature=config.temperature, cfg=config.cfg)
            super().__init__(engine, config.loop.seed, begin.stages[:-1])
            return
        self.config = config
        self._train = load_samples(begin.eval(), "train", config.scenes)
        super().__init__(new_model(config, begin, self._train), config.loop.seed)

    def batch(self, step: int) -> Batch:
        """The packed batch of a step, a pure function of (seed, step)."""
        c = self.config
        rng = keys.generator(c.loop.seed, keys.PMTP_BATCH, step)
        chosen = rng.integers(len(self._train), size=c.batch + c.extra_grounding)
        samples = [self._train[i] for i in chosen]
        if c.mask == "shared":
            trees = [self._both(s, rng) for s in samples[: c.batch]]
            samples = samples[c.batch :]
        else:
            prompts = (
                l2i_prompt(self.prompts, s.layout(rng), c.prompt_dropout, rng)
                for s in samples[: c.batch]
            )
            trees = [self.drawing(p, s.codes) for p, s in zip(prompts, samples, strict=False)]
        trees += [self.grounding(s.codes, ask(s, c.branches, rng)) for s in samples]
        return self.pack(trees)

    def _both(self, sample: Sample, rng: np.random.Generator) -> Tree:
        """The shared tree of a sample. At inference an image that is grounded stands behind no
        layout, and its questions see what it stands behind; so as many samples as have their prompt
        dropped are grounded in that form. Otherwise this mask would be judged on what it never saw.
        """
        c, layout, chance = self.config, sample.layout(rng), rng.random()
        questions = ask(sample, c.branches, rng)
        if c.prompt_dropout <= chance < 2 * c.prompt_dropout:
            return self.grounding(sample.codes, questions)
        prompt = self.prompt(layout, dropped=chance < c.prompt_dropout)
        vocab = self.module.config.vocab_size
        return shared_tree(self.prompts, prompt, sample.codes, questions, vocab)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Cross entropies of image codes and of box tokens, each a mean over its targets."""
        with span("train/pmtp/data", step=step):
            batch = self.batch(step)
        hidden = hidden_states(self.module, batch)
        image, text = image_loss(self.module, hidden, batch), box_loss(self.module, hidden, batch)
        loss = image + text
        numbers = {"loss": loss, "l2i": image, "i2l": text}
        return loss, worth_logging(numbers)
