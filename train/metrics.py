"""What a run has measured, one JSON object a line, in a file that a kill at any moment leaves good.

A line that was being written when the run was killed is torn, and no loss: a resumed run writes it
again, be it of a step beyond the restored one or of that step's validation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from echogen.train.checkpoint import StateError


class MetricsFile:
    """`metrics.jsonl`; on resume, lines beyond the restored step and a torn last one are dropped.

    Args:
        path: of the file.
        step: that the run goes on from; 0 begins the file anew.

    Raises:
        StateError: a line before the last that is no line of metrics.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        rows = _read(path) if step and path.exists() else []
        self._rows = [row for row in rows if row["step"] <= step]
        # Beside and renamed: a kill in between leaves the old file whole.
        beside = path.with_name(path.name + ".part")
        with open(beside, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    def column(self, name: str) -> list[float]:
        """The values of a number in the lines kept, in their order."""
        return [row[name] for row in self._rows if name in row]

    def validated(self, step: int) -> bool:
        """Was a validation of this step among the lines kept?"""
        there = (row for row in self._rows if row["step"] == step)
        return any(name.startswith("val_") for row in there for name in row)

    def write(self, **values: float | int | str) -> None:
        """Add a line."""
        with open(self._path, "a") as file:
            file.write(json.dumps(values) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    lines, rows = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:  # of JSON and of UTF-8 alike
            if number == len(lines):
                break
            raise StateError(
                f"{path}: line {number} is no line of metrics ({error}); mend or remove it, or "
                f"start without --resume"
            ) from None
        rows.append(row)
    return rows
