"""Stage 1, parallel multi-task pre-training: draw from layouts and ground in images, packed.

`L = CE(image codes | layout) + CE(box tokens | image, expression)` (EchoGen, stage 1), with the
isolated mask of METHOD. Grounding learns more slowly than drawing, so a step carries further
images that are only grounded: a branch costs a dozen tokens on top of the prefix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
from echogen.engine.model import UnifiedTransformer, additive_mask, tree_visibility
from echogen.engine.prompt import LocationCodec, Prompts
from echogen.engine.sampler import Sampling
from echogen.train.config import PMTPConfig
from echogen.train.data.packing import Batch, Tree, i2l_tree, l2i_prompt, l2i_tree, pack
from echogen.train.data.samples import Sample, load_samples
from echogen.train.data.scenes import load_scenes
from echogen.train.tokenizer import IMAGE_PLACEHOLDER, train_tokenizer

VAL_SAMPLES = 256


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


class PMTPStage:
    """One batch → loss of stage 1, on ShapesWorld."""

    name = "pmtp"

    def __init__(self, config: PMTPConfig, vq: JanusVQVAE) -> None:
        self.config, self.vq = config, vq.eval()
        self._train = load_samples(vq, "train", config.scenes)
        self._val = load_samples(vq, "val", VAL_SAMPLES)
        texts = [t for s in self._train[:5000] for t in (s.caption, *sum(s.expressions, ()))]
        self.tokenizer = train_tokenizer(texts, config.bins)
        self.janus = janus_config(config, vq, self.tokenizer)
        self.prompts = Prompts(self.tokenizer, LocationCodec(self.tokenizer, config.bins))
        self.module = UnifiedTransformer(ModelConfig.from_janus(self.janus))
        self.module.initialise(config.loop.seed)
        self.module.pixel_aligner.requires_grad_(False)

    # --- batches --------------------------------------------------------------------------------

    def _grounding(self, sample: Sample, rng: np.random.Generator) -> Tree:
        """A branch for every object, then further expressions of random objects."""
        objects = list(range(len(sample.boxes)))
        objects += rng.integers(
            len(objects), size=max(0, self.config.branches - len(objects))
        ).tolist()
        asked = {}
        for k in objects:
            forms = sample.expressions[k]
            asked[forms[rng.integers(len(forms))]] = sample.boxes[k]
        return i2l_tree(
            self.prompts, sample.codes, list(asked.items()), self.module.config.vocab_size
        )

    def _drawing(self, sample: Sample, rng: np.random.Generator, dropout: float) -> Tree:
        prompt = l2i_prompt(self.prompts, sample.layout(rng), dropout, rng)
        return l2i_tree(prompt, sample.codes, self.module.config.vocab_size)

    def batch(self, step: int) -> Batch:
        """The packed batch of a step, a pure function of (seed, step)."""
        c = self.config
        rng = np.random.default_rng((c.loop.seed, 3, step))
        chosen = rng.integers(len(self._train), size=c.batch + c.extra_grounding)
        samples = [self._train[i] for i in chosen]
        trees = [self._drawing(s, rng, c.prompt_dropout) for s in samples[: c.batch]]
        trees += [self._grounding(s, rng) for s in samples]
        return pack(trees, 0, self.prompts.pad)

    # --- loss -----------------------------------------------------------------------------------

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        image, text = self._losses(self.batch(step))
        loss = image + text
        numbers = {"loss": loss, "l2i": image, "i2l": text}
        return loss, {k: float(v.detach()) for k, v in numbers.items()}

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropies of image codes and of box tokens, each a mean over its targets."""
        model = self.module
        length = batch.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = tree_visibility(batch.tree, batch.branch, batch.tree, batch.branch, causal)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        hidden = model(model.embed_mixed(batch.ids), batch.positions, additive_mask(seen, dtype))
        losses = []
        for head, targets in ((model.image_head, batch.codes), (model.text_head, batch.texts)):
            here = targets >= 0
            losses.append(F.cross_entropy(head(hidden[here]).float(), targets[here]))
        return losses[0], losses[1]

    def after_step(self, step: int) -> None:
        """Nothing follows the optimizer step in this stage."""

    # --- evaluation and export ------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation losses, free-running grounding on true images, the judge on drawn ones."""
        from echogen.train.eval.tables import quick_scores

        rng = np.random.default_rng((self.config.loop.seed, 4))
        trees = [self._drawing(s, rng, 0.0) for s in self._val]
        trees += [self._grounding(s, rng) for s in self._val]
        image, text = self._losses(pack(trees, 0, self.prompts.pad))
        scenes = load_scenes("val", VAL_SAMPLES)
        codes = np.stack([s.codes for s in self._val])
        scores = quick_scores(self.module.eval(), self.vq, self.prompts, codes, scenes)
        self.module.train()
        return {"l2i": float(image), "i2l": float(text), **scores}

    def export(self, folder: Path) -> None:
        """Write a Janus checkpoint in bfloat16, which `Engine.from_pretrained` loads."""
        from echogen.engine.engine import Engine

        torch.manual_seed(self.config.loop.seed)
        vision: Any = self.janus.vision_config
        siglip = JanusVisionModel(vision)
        sampling = Sampling(temperature=self.config.temperature, cfg=self.config.cfg)
        engine = Engine(
            self.janus,
            self.module,
            self.vq,
            siglip,
            self.prompts,
            sampling,
            pixels_trained=False,
        )
        engine.save_pretrained(folder, dtype=torch.bfloat16)
