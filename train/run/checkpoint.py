"""Training state on disk: written beside the old one and renamed, so that one is always whole.

The state before the last is kept as ``NAME.prev.pt``: a kill, a full disk or a power cut cannot
tear a state that is in place, but a failing disk or a copy broken off can, and then the run goes on
from the one before it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from echogen.engine.checkpoints.shards import replace_file, sync

UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)

GIVEN_UP = "it cannot be resumed: delete the folder or name another --out"
"""The mend where a run's files are damaged; without --resume its folder is refused as well."""


class StateError(RuntimeError):
    """A training state that cannot be used; the message names the file and the mend."""


def save_state(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write ``state`` (tensors, numbers, strings, containers of them) to ``path`` atomically.

    Args:
        path: of the file; at every moment there is a whole one, the old or the new.
        state: what `load_state` gives back.
        keep_previous: keep the one that was there as `previous`.

    Raises:
        StateError: it cannot be written, the disk being full, say; what was there is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            _second_name(path)
        os.replace(beside, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        # Torch's writer covers the file's own error with one about its position.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        beside.unlink(missing_ok=True)
        raise StateError(
            f"{path}: cannot be written ({cause.strerror}); the previous state is untouched, so "
            f"make room and go on with --resume"
        ) from error


def previous(path: Path) -> Path:
    """Where the state before the last is kept."""
    return path.with_suffix(".prev" + path.suffix)


def put_back(path: Path) -> None:
    """Let the state before the last be the last, which is torn or missing."""
    if path.is_dir():
        shutil.rmtree(path)
    elif previous(path).is_dir():  # no folder replaces a file
        path.unlink(missing_ok=True)
    os.replace(previous(path), path)


def _second_name(path: Path) -> None:
    """Let ``previous(path)`` be the file at ``path`` too, which is thus never missing there."""
    link = path.with_name(path.name + ".link.part")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without second names: for a moment there is the previous only
        os.replace(path, previous(path))
    else:
        os.replace(link, previous(path))
        link.unlink(missing_ok=True)  # a rename leaves both names where both are of the same file


def load_state(path: Path, or_previous: bool = False, mend: str = GIVEN_UP) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Args:
        path: of the file.
        or_previous: where it is torn or missing, read the one before it; its name is then under
            "fallen_back", with the reason.
        mend: what helps where nothing can be read.

    Raises:
        StateError: a file that is torn or foreign, and none before it.
    """
    return fallen_back(path, whole_state, or_previous, mend)


def fallen_back(
    path: Path, read: Callable[[Path], dict[str, Any]], or_previous: bool, mend: str = GIVEN_UP
) -> dict[str, Any]:
    """A state as ``read`` gives it; see `load_state`."""
    try:
        try:
            return read(path)
        except StateError as error:
            if not or_previous or not previous(path).exists():
                raise
            found = read(previous(path))
            return found | {"fallen_back": f"{error}; going on from {previous(path).name}"}
    except StateError as error:
        raise StateError(f"{error}; {mend}") from None


def whole_state(path: Path) -> dict[str, Any]:
    """A state of one process. Raises StateError with the reason, and no mend."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise StateError(f"{path}: no whole training state ({reason(error)})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise StateError(f"{path}: no training state (it has no step)")
    return state


def reason(error: BaseException) -> str:
    """What torch says of a file, without the sentences about how that may have come."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(error).strip().splitlines() or ["it is empty or ends too early"])[0]
    return first.split(". ")[0].rstrip(".")


def write_text(path: Path, text: str) -> None:
    """Replace a small file. Raises StateError."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise StateError(f"{path}: cannot be written ({error.strerror}); make room") from error
