"""What a stage starts from: the model of the previous stage, and the record of its stages.

A model folder written by a stage holds `stage.json`. It lists the stages that the model went
through, so that a stage can refuse a model it is not meant for. If the weights were chosen on
validation, it also names their step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echogen.engine.checkpoints.pretrained import bundled, resolve
from echogen.engine.engine import Engine
from echogen.train.config import Recipe
from echogen.train.data.samples import module_hash
from echogen.train.recipes import RECIPES
from echogen.train.run.checkpoint import StateError

RECORD = "stage.json"


@dataclass(frozen=True)
class Start:
    """The model that a stage starts from.

    Attributes:
        engine: the model, in float32.
        stages: the stages it went through, in order; () if they are unknown.
        fingerprint: hash of the transformer's weights.
    """

    engine: Engine
    stages: tuple[str, ...]
    fingerprint: str


def model_folder(path: str | Path) -> Path:
    """Return the model folder for a run's folder, a model's folder or a bundled model's name.

    Raises:
        StateError: the run has not finished.
        CheckpointError: there is nothing to load.
    """
    if isinstance(path, str) and path in bundled():  # `resolve` has the rule; runs follow it
        return resolve(path)
    path = Path(path)
    if (path / "metrics.jsonl").is_file() or (path / "state.pt").is_file():
        if not (path / "model" / "config.json").is_file():
            raise StateError(f"{path}: this run has no model yet; finish it with --resume")
        return path / "model"
    return resolve(path)


def load_start(
    path: str | Path, after: str, any_stage: bool = False, device: str | torch.device = "cpu"
) -> Start:
    """Load the model that a stage starts from.

    Args:
        path: folder of a run or of a model, or the name of a bundled model.
        after: the stage that the model must have gone through last.
        any_stage: accept a model of any stage, or of an unknown one (for ablations).
        device: where the model is trained.

    Raises:
        StateError: a model of another stage, or one that does not say which; a damaged record.
        CheckpointError: a model that does not load.
    """
    folder = model_folder(path)
    stages = read_record(folder)
    if not any_stage and stages[-1:] != (after,):
        found = f"comes from stage {stages[-1]}" if stages else f"names no stage (no {RECORD})"
        raise StateError(
            f"{path}: this model {found}; this stage begins with one from {after} "
            f"(--any-stage accepts it anyway)"
        )
    engine = Engine.from_pretrained(folder, device)
    return Start(engine, stages, module_hash(engine.transformer))


def recipe_shape(recipe: Recipe) -> dict[str, int]:
    """The shape of a recipe's models, by the names of its settings."""
    names = ("width", "layers", "heads", "mlp_width")
    codes = {"codes": recipe.vq.codes, "image_size": recipe.vq.image_size}
    return {name: getattr(recipe.pmtp, name) for name in names} | codes


def check_shape(start: Start, path: str | Path, recipe: Recipe) -> None:
    """Refuse a model of another shape than the recipe's, since the recipe's rates, batches and
    steps are not meant for it.

    Raises:
        StateError: the shapes differ; the message names the differences and the recipe that fits,
            if there is one.
    """
    c, wanted = start.engine.transformer.config, recipe_shape(recipe)
    found = {name: getattr(c, name) for name in ("width", "layers", "heads", "mlp_width")}
    found |= {"codes": c.codebook_size, "image_size": c.image_size}
    if found == wanted:
        return
    other = [name for name, value in found.items() if value != wanted[name]]
    has, asks = (", ".join(f"{k} {shape[k]}" for k in other) for shape in (found, wanted))
    fits = [name for name, made in RECIPES.items() if recipe_shape(made()) == found]
    mend = f"take --recipe {fits[0]}" if fits else "no recipe has its shape"
    if recipe.name in fits:  # the recipe's settings were changed
        mend = f"leave {', '.join(other)} as the recipe has {'it' if len(other) == 1 else 'them'}"
    raise StateError(
        f"{path}: this model has {has}, and recipe {recipe.name} is for {asks}; {mend} "
        f"(--any-shape accepts it anyway)"
    )


def read_record(folder: Path) -> tuple[str, ...]:
    """The stages that a model went through; () where it has no record."""
    path = folder / RECORD
    if not path.is_file():
        return ()
    try:
        stages = json.loads(path.read_text())["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path}: no record of stages ({error!r}); remove or mend it") from None
    if not isinstance(stages, list) or not all(isinstance(s, str) for s in stages):
        raise StateError(f"{path}: stages is {stages!r}; write a list of names")
    return tuple(stages)


def write_record(folder: Path, stages: tuple[str, ...]) -> None:
    """Record in a model's folder which stages the model went through."""
    (folder / RECORD).write_text(json.dumps({"stages": list(stages)}) + "\n")


def note_chosen(folder: Path, chosen: dict[str, Any]) -> None:
    """Add to a model's record, if it has one, which step's weights were chosen and by which
    number."""
    path = folder / RECORD
    if path.is_file():
        path.write_text(json.dumps({**json.loads(path.read_text()), "chosen": chosen}) + "\n")
