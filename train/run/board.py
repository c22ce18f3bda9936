"""What TensorBoard shows of a run: its numbers, its validations, and samples drawn along the way.

TensorBoard is optional (``pip install -e .[train]``); a run without it says so once and lacks
nothing else. Event files are only for viewing: they are not read back, and a resumed run hides what
lies beyond its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from echogen.train.run.checkpoint import StateError
from echogen.train.stages.stage import Stage


class Board:
    """Shows numbers and pictures; this base class shows nothing."""

    def numbers(self, step: int, group: str, values: dict[str, Any]) -> None:
        """Add a point to each number's curve, under the name ``group/number``."""

    def pictures(self, step: int, stage: Stage) -> None:
        """Show the samples of a stage that has ``pictures`` (see `Stage`)."""

    def close(self) -> None:
        """Write what is still buffered."""


class TensorBoard(Board):
    """Event files in a folder.

    Args:
        folder: of the files.
        start: the step that the run resumes from.

    Raises:
        ImportError: tensorboard is not installed.
        StateError: a file that cannot be written, here or in any method.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with self._told():
            # What an interrupted run has shown beyond its checkpoint is hidden.
            self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def numbers(self, step: int, group: str, values: dict[str, Any]) -> None:
        with self._told():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def pictures(self, step: int, stage: Stage) -> None:
        drawn = getattr(stage, "pictures", None)
        if drawn is None:
            return
        with self._told():
            for name, picture in drawn():
                pixels = np.asarray(picture.convert("RGB"))
                self._writer.add_image(f"samples/{name}", pixels, step, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        with self._told():
            self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateError(
                f"{self._folder}: cannot be written ({error.strerror}); make room and go on with "
                f"--resume"
            ) from error


def open_board(folder: Path, start: int, console: Console) -> Board:
    """The board of a run; without tensorboard, one that shows nothing, after a line about it."""
    if find_spec("tensorboard") is None:
        console.print("no curves for TensorBoard: it is not installed (pip install tensorboard)")
        return Board()
    return TensorBoard(folder, start)
