"""Where derived data is kept: compiled code, scenes and their codes, models of experiments."""

from __future__ import annotations

import errno
import os
from pathlib import Path

HINT = "name a folder that can be written to in ECHOGEN_CACHE"


class CacheError(Exception):
    """Nothing can be kept in the cache folder; the message says why, and what to change."""


def cache_folder() -> Path:
    """``$ECHOGEN_CACHE``, else ``~/.cache/echogen``; made where it is missing.

    Raises:
        OSError: it cannot be made, or there is no home folder.
    """
    chosen = os.environ.get("ECHOGEN_CACHE")
    try:
        folder = Path(chosen) if chosen else Path.home() / ".cache" / "echogen"
    except RuntimeError:  # of a user that a container knows by number alone, and HOME is not set
        reason = "this user has no home folder, and ECHOGEN_CACHE names no other"
        raise FileNotFoundError(errno.ENOENT, reason) from None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_path(name: str) -> Path:
    """A file or folder of the cache folder, which is there or can be made there.

    Raises:
        CacheError: neither.
    """
    try:
        path = cache_folder() / name
    except OSError as error:
        raise CacheError(f"{error}; {HINT}") from None
    # Path.exists raises where the folder cannot be searched.
    if not os.path.exists(path) and not os.access(path.parent, os.W_OK | os.X_OK):
        raise CacheError(f"the cache folder {path.parent} cannot be written to; {HINT}")
    return path
