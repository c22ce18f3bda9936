"""Recipes: functions that return the full configuration of a model."""

from __future__ import annotations

from collections.abc import Callable

from echogen.train.config import LoopConfig, PMTPConfig, Recipe, VQConfig


def tiny() -> Recipe:
    """The bundled model: 64×64 pictures of ShapesWorld, 64 image tokens, two CPU cores."""
    return Recipe(
        name="tiny",
        vq=VQConfig(loop=LoopConfig(steps=2500, lr=1e-3)),
        pmtp=PMTPConfig(loop=LoopConfig(steps=5000, lr=1.5e-3, warmup=200)),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny}
