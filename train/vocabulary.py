"""Load a pretrained Janus checkpoint for stage 1, with box tokens added to its vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch

from echogen.engine.checkpoints.pretrained import Meta, resolve
from echogen.engine.engine import Engine
from echogen.engine.ground import locations
from echogen.train.data.samples import module_hash
from echogen.train.run.checkpoint import StateError
from echogen.train.start import RECORD, Start, read_record


def pretrained_start(path: str | Path, bins: int, device: str | torch.device = "cpu") -> Start:
    """Load a Janus checkpoint that no stage has trained yet, with ``bins`` location tokens; a
    checkpoint that states how many it has (``echogen.json``) keeps those.

    Missing tokens are added (`add_box_tokens`): the row of ``<loc_i>``, in the embedding and in the
    text head, starts as the mean of the rows of i's digits. Existing rows, the image tokenizer and
    the transformer's shape do not change.

    Args:
        path: folder of a checkpoint, in transformers' Janus format or the original, or a hub id.
        bins: B, one location token each.
        device: where the model is trained.

    Raises:
        StateError: a model that has been through a stage.
        CheckpointError: a model that does not load.
        PromptError: a tokenizer whose location tokens have gaps between them.
    """
    folder = resolve(path)
    if stages := read_record(folder):
        raise StateError(
            f"{path}: this model comes from stage {stages[-1]} ({RECORD}), and --pretrained takes "
            f"only models that no stage has trained; continue it with --from"
        )
    asked = bins if Meta.read(folder).bins is None else None
    engine = Engine.from_pretrained(folder, device, codec="location", bins=asked)
    locations(engine.prompts)
    return Start(engine, (), module_hash(engine.transformer))
