"""Where derived data is kept: compiled code, scenes and their codes, models of experiments."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$ECHOGEN_CACHE``, else ``~/.cache/echogen``; made where it is missing."""
    chosen = os.environ.get("ECHOGEN_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "echogen"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
