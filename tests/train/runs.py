"""What tests do with whole runs: interrupt one and go on with it, and read what it has logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echogen.train.config import LoopConfig
from echogen.train.run.loop import run
from echogen.train.run.metrics import TIMED


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what depends on how fast it was."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMED} for x in lines]


def run_in_parts(fresh: Callable[[], Any], loop: LoopConfig, folder: Path, step: int) -> None:
    """A run that Ctrl-C ends behind its ``step``-th step, and that a fresh stage resumes."""
    stopped = fresh()
    own = stopped.after_step

    def interrupted(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt
        own(done)

    stopped.after_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(stopped, loop, folder)
    run(fresh(), loop, folder, resume=True)
