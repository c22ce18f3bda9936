"""Finished cells on disk: one JSON a cell with its metrics log beside it, meant to be committed."""

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
    """An experiment that cannot be run or read; the message names the cell and the fix."""


def record_path(folder: Path, name: str) -> Path:
    """Where a finished cell is kept."""
    return folder / f"{name}.json"


def log_path(folder: Path, name: str) -> Path:
    """Where its metrics log is kept."""
    return folder / f"{name}.metrics.jsonl"


def read_record(folder: Path, name: str) -> Record | None:
    """A finished cell; None where there is none.

    Raises:
        QualityError: a file that is no record, or the record of another cell.
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
    """The seeds of which there are finished cells."""
    found = (re.fullmatch(r".+-seed(\d+)", path.stem) for path in folder.glob("*.json"))
    return {int(match[1]) for match in found if match}


def precision(record: Record) -> str | None:
    """What a cell's training multiplied in, "bfloat16" or "float32"; None: it had none."""
    config = record["settings"].get("config")
    return config and precision_of(config["loop"]["bf16"])


def precision_of(bf16: bool) -> str:
    """The name of the type that a loop multiplies in."""
    return "bfloat16" if bf16 else "float32"


def clock(record: Record) -> str:
    """By which of its numbers a cell's compute is counted: CPU seconds, which leave out what else
    the machine did, or on a GPU, of whose work they tell nothing, wall "seconds" of its steps."""
    found: str = record.get("clock", "cpu_seconds")  # early records are of a CPU, and do not say
    return found


def device(record: Record) -> str:
    """Where a cell was trained: "cpu", or a GPU's name."""
    places: list[dict[str, str]] = record.get("trained_in") or [record["environment"]]
    return places[-1]["device"]


def kind(record: Record) -> str | None:
    """What seconds a step are compared within: a type, and off the CPU the device."""
    return (found := precision(record)) and kind_of(found, device(record))


def kind_of(precision: str, device: str) -> str:
    """See `kind`."""
    return precision if device == "cpu" else f"{precision} on {device}"


def pace(
    cell: Cell, known: Mapping[str, Cell], read: Callable[[str], Record | None]
) -> Record | None:
    """The record whose seconds a step turn a cell's budget into steps: that of its own seed, or,
    where this was trained in another type than the budget was, or on another device, of the first
    seed's that was not. Steps of all seeds cost the same, those of two types or devices do not.

    Args:
        known: all cells, by name.
        read: gives a finished cell's record, None where there is none.
    """
    own, spent = read(cell.pace), [kind(r) for name in cell.budget if (r := read(name))]
    if own is None or kind(own) in spent:
        return own
    stem = known[cell.pace].stem
    others = (read(name) for name, other in known.items() if other.stem == stem)
    return next((r for r in others if r is not None and kind(r) in spent), own)


def write_record(folder: Path, record: Record, log: Path | None) -> None:
    """Keep a finished cell: its log first, so that a record that is there has its log. A number
    that JSON cannot hold (NaN, infinity) becomes None, as in every result of the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is not None:
        replace_file(log_path(folder, record["cell"]), log.read_bytes())
    write_json(record_path(folder, record["cell"]), finite(record))


def write_json(path: Path, data: Any) -> None:
    """Write a file whole, or not at all."""
    replace_file(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
