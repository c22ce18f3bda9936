"""Stage 1, parallel multi-task pre-training: draw from layouts and ground in images, packed.

`L = CE(image codes | layout) + CE(box tokens | image, expression)` (EchoGen, stage 1), with the
`isolated` mask or the `shared` one. Grounding learns more slowly than drawing, so a step may carry
additional images that are only grounded: a branch costs a dozen tokens on top of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
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
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.ground import locations
from echogen.engine.layout import Layout
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import LocationCodec, Prompts
from echogen.engine.ranges import span
from echogen.train.config import PMTPConfig
from echogen.train.data.packing import Batch, shared_tree
from echogen.train.data.samples import Sample
from echogen.train.data.source import Source
from echogen.train.parallel.distributed import one_goes_first
from echogen.train.run.checkpoint import StateError
from echogen.train.stages import keys
from echogen.train.stages.ahead import Ahead
from echogen.train.stages.order import picked
from echogen.train.stages.passes import box_loss, hidden_states, image_loss, worth_logging
from echogen.train.stages.shares import places
from echogen.train.stages.world import WorldStage, ask, source_of
from echogen.train.start import Start
from echogen.train.tokenizer import IMAGE_PLACEHOLDER, train_tokenizer

TEXT = 448
"""Positions beside a large image's: for its prompt, or its questions."""


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
        max_position_embeddings=max(1024, side * side + TEXT),
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


def new_model(config: PMTPConfig, vq: JanusVQVAE, samples: Sequence[Sample]) -> Engine:
    """Build a model with fresh weights and a tokenizer trained on the samples' texts, on ``vq``'s
    device."""
    texts = [t for s in islice(samples, 5000) for t in (s.caption, *sum(s.expressions, ()))]
    tokenizer = train_tokenizer(texts, config.bins)
    janus = janus_config(config, vq, tokenizer)
    transformer = UnifiedTransformer(ModelConfig.from_janus(janus))
    transformer.initialise(config.loop.seed)
    torch.manual_seed(config.loop.seed)
    vision: Any = janus.vision_config
    siglip, device = JanusVisionModel(vision), vq.quant_conv.weight.device
    for module in (transformer, siglip):
        nn.Module.to(module, device)
    return Engine(
        janus,
        transformer,
        vq,
        siglip,
        Prompts(tokenizer, LocationCodec(tokenizer, config.bins)),
        Sampling(temperature=config.temperature, cfg=config.cfg),
        pixels_trained=False,
    )


class Draw(NamedTuple):
    """A layout to draw a sample from, and whether its prompt is dropped."""

    layout: Layout
    dropped: bool


class Task(NamedTuple):
    """What a step does with a sample: draw it from ``draw`` (None: not drawn), and answer
    ``questions`` about it, each an (expression, box)."""

    sample: Sample
    draw: Draw | None
    questions: list[tuple[str, tuple]]


class PMTPStage(WorldStage):
    """Stage 1: its batches and its loss."""

    name = "pmtp"

    def __init__(
        self, config: PMTPConfig, begin: JanusVQVAE | Start, source: Source | None = None
    ) -> None:
        """Start from fresh weights with an image tokenizer, or continue a model of this stage,
        whose shape, vocabulary and image tokenizer then override the configuration.

        Args:
            source: the data set; None: the one that the configuration names.

        Raises:
            PromptError: a model whose boxes are not location tokens.
            StateError: adapters on fresh weights.
        """
        if config.loop.lora and not isinstance(begin, Start):
            raise StateError(
                f"lora = {config.loop.lora} adapts a model that has been trained; name one with "
                f"--from, or set lora to 0"
            )
        source = source_of(config) if source is None else source
        self.config = replace(config, data_hash=source.fingerprint)
        self._laid = Ahead(self._lay)
        if isinstance(begin, Start):
            engine = begin.engine
            locations(engine.prompts)
            self.config = replace(self.config, start=begin.fingerprint)
            engine.sampling = Sampling(temperature=config.temperature, cfg=config.cfg)
            super().__init__(engine, config.loop, source, begin.stages[:-1])
            with one_goes_first():
                self._train = source.training(self.vq)
            return
        with one_goes_first():
            self._train = source.training(begin.eval())
        super().__init__(new_model(config, begin, self._train), config.loop, source)

    def tasks(self, step: int) -> list[Task]:
        """The task of each of a step's samples, a pure function of (seed, step)."""
        c = self.config
        rng = keys.generator(c.loop.seed, keys.PMTP_BATCH, step)
        count = c.batch + c.extra_grounding
        samples = picked(self._train, count, step, c, keys.PMTP_ORDER, rng)
        if c.mask == "shared":
            tasks = [self._both(s, rng) for s in samples[: c.batch]]
            return tasks + [Task(s, None, ask(s, c.branches, rng)) for s in samples[c.batch :]]
        drawn: list[Draw | None] = [
            Draw(s.layout(rng), bool(rng.random() < c.prompt_dropout)) for s in samples[: c.batch]
        ]
        drawn += [None] * c.extra_grounding
        return [Task(s, d, ask(s, c.branches, rng)) for s, d in zip(samples, drawn, strict=True)]

    def _both(self, sample: Sample, rng: np.random.Generator) -> Task:
        """Both tasks of a sample in one tree. At inference the text before a grounded image is not
        a layout, and the questions see it. So as many samples as have their prompt dropped are
        grounded in that form; otherwise this mask would be evaluated on a form it has never
        seen."""
        c, layout, chance = self.config, sample.layout(rng), rng.random()
        questions = ask(sample, c.branches, rng)
        if c.prompt_dropout <= chance < 2 * c.prompt_dropout:
            return Task(sample, None, questions)
        return Task(sample, Draw(layout, chance < c.prompt_dropout), questions)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The packed batch of a step, or a part of it."""
        tasks, c = self.tasks(step), self.config
        both, further = tasks[: c.batch], tasks[c.batch :]
        here = [both[i] for i in places("batch", len(both), part, parts)]
        here += [further[i] for i in places("extra_grounding", len(further), part, parts)]
        vocab, drawing, grounding = self.module.config.vocab_size, [], []
        for sample, draw, questions in here:
            prompt = None if draw is None else self.prompt(*draw)
            if prompt is not None and c.mask == "shared":
                drawing.append(shared_tree(self.prompts, prompt, sample.codes, questions, vocab))
                continue
            if prompt is not None:
                drawing.append(self.drawing(prompt, sample.codes))
            if questions:
                grounding.append(self.grounding(sample.codes, questions))
        return self.pack(drawing + grounding)

    @property
    def images(self) -> int:
        """See `Stage`."""
        return self.config.batch + self.config.extra_grounding

    def inputs(self, step: int) -> dict[str, Any]:
        """See `Stage`."""
        return dict(vars(self.batch(step)))

    def targets(self, step: int) -> tuple[int, int]:
        """How many (image codes, box tokens) a step's whole batch predicts."""
        tasks = self.tasks(step)
        codes = sum(len(t.sample.codes) for t in tasks if t.draw is not None)
        return codes, sum(self.answer_tokens(t.questions) for t in tasks)

    def _lay(self, step: int, part: int, parts: int) -> tuple[Batch, tuple[int | None, int | None]]:
        """A part's batch, and how many targets there are in all parts; None: the part is the whole
        batch."""
        with span("train/pmtp/data", step=step):
            batch = self.batch(step, part, parts)
            return batch, self.targets(step) if parts > 1 else (None, None)

    def ahead(self, step: int, part: int, parts: int) -> None:
        """See `Stage`."""
        self._laid.prepare(step, part, parts)

    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, Any]]:
        """Cross entropies of image codes and of box tokens, each a mean over its targets."""
        batch, (codes, answers) = self._laid.take(step, part, parts)
        hidden = hidden_states(self.module, batch)
        image = image_loss(self.module, hidden, batch, codes)
        text = box_loss(self.module, hidden, batch, answers)
        loss = image + text
        numbers = {"loss": loss, "l2i": image, "i2l": text}
        return loss, worth_logging(numbers)
