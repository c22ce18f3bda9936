"""The folder for derived data: compiled code, scenes and their codes, models of experiments."""

from __future__ import annotations

import errno
import os
from pathlib import Path

HINT = "name a folder that can be written to in ECHOGEN_CACHE"


class CacheError(Exception):
    """The cache folder cannot be used; the message says why, and what to change."""


def cache_folder() -> Path:
    """Return ``$ECHOGEN_CACHE``, else ``~/.cache/echogen``; create it if it is missing.

    Raises:
        OSError: it cannot be created, or there is no home folder.
    """
    chosen = os.environ.get("ECHOGEN_CACHE")
    try:
        folder = Path(chosen) if chosen else Path.home() / ".cache" / "echogen"
    except RuntimeError:  # HOME is not set, and a container may know its user by number only
        reason = "this user has no home folder, and ECHOGEN_CACHE names no other"
        raise FileNotFoundError(errno.ENOENT, reason) from None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_path(name: str) -> Path:
    """Return the path of a file or folder in the cache folder, which exists or can be created.

    Raises:
        CacheError: it neither exists nor can be created.
    """
    try:
        path = cache_folder() / name
    except OSError as error:
        raise CacheError(f"{error}; {HINT}") from None
    # Path.exists raises where the folder cannot be searched.
    if not os.path.exists(path) and not os.access(path.parent, os.W_OK | os.X_OK):
        raise CacheError(f"the cache folder {path.parent} cannot be written to; {HINT}")
    return path
