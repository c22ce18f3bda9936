"""Training state on disk: written beside the old one and renamed, so that one is always whole.

The previous state is kept as ``NAME.prev.pt``. A kill, a full disk or a power cut cannot tear a
state that is in place, but a failing disk or an interrupted copy can; the run then resumes from the
previous one.
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
"""The advice if a run's files are damaged; without --resume its folder is refused as well."""


class StateError(RuntimeError):
    """A training state that cannot be used; the message names the file and the fix."""


def save_state(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write ``state`` (tensors, numbers, strings, containers of them) to ``path`` atomically.

    Args:
        path: the file; at every moment there is a whole one, the old or the new.
        state: what `load_state` returns.
        keep_previous: keep the old file as `previous`.

    Raises:
        StateError: it cannot be written, for example to a full disk; the old file is unchanged.
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
        # Torch's writer hides the file's own error behind one about its position.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        beside.unlink(missing_ok=True)
        raise StateError(
            f"{path}: cannot be written ({cause.strerror}); the previous state is untouched, so "
            f"make room and go on with --resume"
        ) from error


def previous(path: Path) -> Path:
    """Where the previous state is kept."""
    return path.with_suffix(".prev" + path.suffix)


def put_back(path: Path) -> None:
    """Put the previous state in the place of the last one, which is torn or missing."""
    if path.is_dir():
        shutil.rmtree(path)
    elif previous(path).is_dir():  # a folder cannot replace a file
        path.unlink(missing_ok=True)
    os.replace(previous(path), path)


def _second_name(path: Path) -> None:
    """Give the file at ``path`` the second name ``previous(path)``, so that ``path`` is never
    missing."""
    link = path.with_name(path.name + ".link.part")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # no hard links on this file system: for a moment only the previous exists
        os.replace(path, previous(path))
    else:
        os.replace(link, previous(path))
        link.unlink(missing_ok=True)  # a rename leaves both names if they are of the same file


def load_state(path: Path, or_previous: bool = False, mend: str = GIVEN_UP) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Args:
        path: of the file.
        or_previous: if it is torn or missing, read the previous one; its name is then under
            "fallen_back", with the reason.
        mend: what helps if nothing can be read.

    Raises:
        StateError: the file is torn or foreign, and there is no previous one.
    """
    return fallen_back(path, whole_state, or_previous, mend)


def load_head(path: Path) -> dict[str, Any]:
    """Read the numbers and strings of a state and leave its tensors on the disk.

    A memory map would do too, but where a disk fails to read it ends the process (SIGBUS).

    Raises:
        StateError: the file is torn or foreign; damage within a tensor is not noticed.
    """
    state = fallen_back(path, lambda place: whole_state(place, "meta"), or_previous=False)
    return {name: value for name, value in state.items() if isinstance(value, (int, float, str))}


def fallen_back(
    path: Path, read: Callable[[Path], dict[str, Any]], or_previous: bool, mend: str = GIVEN_UP
) -> dict[str, Any]:
    """A state as returned by ``read``; see `load_state`."""
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


def whole_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a state of one process, its tensors onto a device; "meta": their shapes alone. Raises
    StateError with the reason but no advice."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as error:
        raise StateError(f"{path}: no whole training state ({reason(error)})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise StateError(f"{path}: no training state (it has no step)")
    return state


def reason(error: BaseException) -> str:
    """What torch says about a file, without its sentences on possible causes."""
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
