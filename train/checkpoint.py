"""Training state on disk: written beside the old one and renamed, so that one is always whole."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class StateError(RuntimeError):
    """A training state that cannot be used; the message names the file and the mend."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, containers of them) to ``path`` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StateError(
            f"{path}: cannot be written ({error.strerror}); the previous state is untouched"
        ) from error
    os.replace(beside, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote. Raises StateError where the file is torn or foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise StateError(
            f"{path}: no whole training state ({error}); start without --resume"
        ) from None
    if not isinstance(state, dict) or "step" not in state:
        raise StateError(f"{path}: no training state (it has no step); start without --resume")
    return state
