"""Finished cells on disk: one JSON file per cell and its metrics log, meant to be committed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from echogen.bench.quality.cells import Cell
from echogen.commands.output import finite
from echogen.engine.checkpoints.shards import replace_file

Record = dict[str, Any]
KEYS = {"cell", "arm", "seed", "stage", "scale", "settings", "start", "model", "steps", "samples",
        "drawn", "seconds", "cpu_seconds", "evaluation", "environment"}  # fmt: skip


class QualityError(ValueError):
    """An experiment cannot be run or read; the message names the cell and the fix."""


def record_path(folder: Path, name: str) -> Path:
    """Where a finished cell is stored."""
    return folder / f"{name}.json"


def log_path(folder: Path, name: str) -> Path:
    """Where its metrics log is stored."""
    return folder / f"{name}.metrics.jsonl"


def read_record(folder: Path, name: str) -> Record | None:
    """Read a finished cell; None where there is none.

    Raises:
        QualityError: the file is no record, or the record of another cell.
    """
    path = record_path(folder, name)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise QualityError(f"{path}: not valid JSON ({error}); remove it") from None
    if not isinstance(record, dict) or not record.keys() >= KEYS:
        found = record if isinstance(record, dict) else {}
        raise QualityError(f"{path}: lacks {', '.join(sorted(KEYS - found.keys()))}; remove it")
    if record["cell"] != name:
        raise QualityError(f"{path}: holds the cell {record['cell']!r}; remove or rename it")
    return record


def recorded_seeds(folder: Path) -> set[int]:
    """Return the seeds that have finished cells."""
    found = (re.fullmatch(r".+-seed(\d+)", path.stem) for path in folder.glob("*.json"))
    return {int(match[1]) for match in found if match}


def precision(record: Record) -> str | None:
    """The type a cell's training multiplied in, "bfloat16" or "float32"; None: no training."""
    config = record["settings"].get("config")
    return config and precision_of(config["loop"]["bf16"])


def precision_of(bf16: bool) -> str:
    """The name of the type that a loop multiplies in."""
    return "bfloat16" if bf16 else "float32"


def clock(record: Record) -> str:
    """Return the name of the number that counts a cell's compute. It is CPU seconds, which exclude
    the machine's other work. On a GPU, whose work CPU seconds do not show, it is wall "seconds" of
    steps."""
    found: str = record.get("clock", "cpu_seconds")  # early records, from CPUs, lack it
    return found


def device(record: Record) -> str:
    """Where a cell was trained: "cpu", or a GPU's name."""
    places: list[dict[str, str]] = record.get("trained_in") or [record["environment"]]
    return places[-1]["device"]


def kind(record: Record) -> str | None:
    """What must be equal to compare seconds per step: the type and, off the CPU, the device."""
    return (found := precision(record)) and kind_of(found, device(record))


def kind_of(precision: str, device: str) -> str:
    """See `kind`."""
    return precision if device == "cpu" else f"{precision} on {device}"


def pace(
    cell: Cell, known: Mapping[str, Cell], read: Callable[[str], Record | None]
) -> Record | None:
    """Return the record whose seconds per step convert a cell's budget into steps.

    It is the record of the cell's own seed. If that was trained in another type, or on another
    device, than the budget was, it is the first seed's record that was not. Steps cost the same for
    all seeds, but not for two types or devices.

    Args:
        known: all cells, by name.
        read: returns a finished cell's record, or None where there is none.
    """
    own, spent = read(cell.pace), [kind(r) for name in cell.budget if (r := read(name))]
    if own is None or kind(own) in spent:
        return own
    stem = known[cell.pace].stem
    others = (read(name) for name, other in known.items() if other.stem == stem)
    return next((r for r in others if r is not None and kind(r) in spent), own)


def write_record(folder: Path, record: Record, log: Path | None) -> None:
    """Store a finished cell: its log first, so that every stored record has its log. Numbers that
    JSON cannot hold (NaN, infinity) become None, as in every result of the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is not None:
        replace_file(log_path(folder, record["cell"]), log.read_bytes())
    write_json(record_path(folder, record["cell"]), finite(record))


def write_json(path: Path, data: Any) -> None:
    """Write a file whole, or not at all."""
    replace_file(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
