"""The stage 1 model that cells start from: its hashes, and whether it fits the recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from echogen.engine.config import ModelConfig
from echogen.engine.engine import Engine
from echogen.train.config import Recipe
from echogen.train.data.samples import module_hash
from echogen.train.start import model_folder

OF_TOKENIZER = ("image_size", "image_tokens", "codebook_size", "code_dim")
"""Shapes that fresh weights inherit from the image tokenizer."""


@dataclass(frozen=True)
class Given:
    """Facts about a model.

    Attributes:
        weights, tokenizer: hashes of its transformer's weights and of its image tokenizer's.
        config: its shapes.
    """

    weights: str
    tokenizer: str
    config: ModelConfig


def look_at(name: str) -> Given:
    """Load the model of a run or a folder, or a bundled one. Raises CheckpointError, StateError."""
    engine = Engine.from_pretrained(model_folder(name))
    config = engine.transformer.config
    return Given(module_hash(engine.transformer), module_hash(engine.vq), config)


def shapes(recipe: Recipe) -> dict[str, int]:
    """Return the shapes of the models that a recipe makes, named as in `ModelConfig`."""
    c, vq = recipe.pmtp, recipe.vq
    side = vq.image_size >> (len(vq.multipliers) - 1)
    return {
        "image_size": vq.image_size, "image_tokens": side * side, "codebook_size": vq.codes,
        "code_dim": vq.code_dim, "width": c.width, "layers": c.layers, "heads": c.heads,
        "mlp_width": c.mlp_width,
    }  # fmt: skip


def unlike(given: Given, recipe: Recipe, fresh: bool) -> list[str]:
    """List how a model's shapes, or (``fresh``) its image tokenizer's, differ from the recipe's."""
    found = asdict(given.config)
    return [
        f"{name.replace('_', ' ')} {found[name]}, not {wanted}"
        for name, wanted in shapes(recipe).items()
        if found[name] != wanted and (name in OF_TOKENIZER or not fresh)
    ]
