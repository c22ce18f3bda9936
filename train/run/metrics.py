"""A run's metrics, one JSON object per line, in a file that survives a kill at any moment.

A line that was being written when the run was killed is torn, but not lost: a resumed run writes it
again, whether it is of a step beyond the restored one or of that step's validation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from echogen.train.run.checkpoint import StateError, write_text

TIMED = ("seconds_per_step", "tokens_per_s", "images_per_s", "memory_mib")
"""Numbers that depend on time and machine; in all others a resumed run repeats an uninterrupted one
exactly."""


class MetricsFile:
    """`metrics.jsonl`; on resume, lines beyond the restored step and a torn last one are dropped.

    Args:
        path: of the file.
        step: the step that the run resumes from; 0 starts a new file.
        writes: False in a process that leaves the file to another one.

    Raises:
        StateError: a line other than the last is not a line of metrics; the file cannot be written,
            here or in any method.
    """

    def __init__(self, path: Path, step: int, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        rows = _read(path) if step and path.exists() else []
        self._rows = [row for row in rows if row["step"] <= step]
        if writes:  # written beside it and renamed, so that a kill leaves the old file whole
            write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows))

    def column(self, name: str) -> list[float]:
        """The values of a number in the lines kept, in their order."""
        return [row[name] for row in self._rows if name in row]

    def validated(self, step: int) -> bool:
        """Whether the lines kept include a validation of this step."""
        there = (row for row in self._rows if row["step"] == step)
        return any(name.startswith("val_") for row in there for name in row)

    def write(self, **values: float | int | str) -> None:
        """Add a line."""
        self._append(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Flush the lines to the disk, so that a power cut does not lose them either."""
        self._append("", sync=True)

    def _append(self, text: str, sync: bool = False) -> None:
        if not self._writes:
            return
        try:
            with open(self._path, "a") as file:
                file.write(text)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise StateError(
                f"{self._path}: cannot be written ({error.strerror}); make room and go on with "
                f"--resume"
            ) from error


def _read(path: Path) -> list[dict[str, Any]]:
    lines, rows = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:  # from JSON or from UTF-8
            if number == len(lines):
                break
            raise StateError(
                f"{path}: line {number} is no line of metrics ({error}); mend or remove it, or "
                f"name another --out"
            ) from None
        rows.append(row)
    return rows
