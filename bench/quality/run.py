"""Run the missing cells, each after those it needs, and keep every finished one.

A cell's run lies in the folder of models, outside the repository, and is resumed there. Its result
is written in one piece beside the other results. A stop between or within cells thus costs at most
the steps since the last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echogen.bench.quality import score
from echogen.bench.quality.cells import Cell, samples
from echogen.bench.quality.lab import Lab
from echogen.bench.quality.records import (
    QualityError,
    Record,
    read_record,
    record_path,
    write_json,
    write_record,
)
from echogen.bench.quality.stages import Timed, build, checkpoint
from echogen.commands import run_folder
from echogen.commands.output import InputError
from echogen.engine.checkpoints.keymap import CheckpointError
from echogen.engine.engine import Engine
from echogen.engine.layout import LayoutError
from echogen.train.config import differences
from echogen.train.data.samples import module_hash
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import TrainingError
from echogen.train.run.loop import run as train
from echogen.train.start import load_start, model_folder

REFUSED = (QualityError, TrainingError, StateError, CheckpointError, LayoutError)
"""Errors that keep one cell from starting or finishing."""


def run_all(lab: Lab, chosen: list[Cell], again: bool = False) -> dict[str, str]:
    """Run cells in order; return, by name, why a cell did not run. A cell that cannot be run (its
    settings changed, Cycle RL refused to start) does not stop the others, except those that need
    it."""
    failed: dict[str, str] = {}
    for cell in chosen:
        state, why = lab.state(cell)
        lost = next((name for name in cell.needs if name in failed), None)
        if lost is not None:
            failed[cell.name] = f"{cell.name}: needs {lost}"
        elif state == "blocked":
            lab.tell(f"{cell.name}: left out, it {why}")
        else:
            try:
                run_cell(lab, cell, again)
            except REFUSED as error:
                named = str(error).startswith(cell.name)
                failed[cell.name] = str(error) if named else f"{cell.name}: {error}"
                lab.tell(failed[cell.name])
    return failed


def run_cell(lab: Lab, cell: Cell, again: bool = False) -> None:
    """Run a cell after those it needs, unless it is done.

    Args:
        again: discard what exists of this cell and run it again.

    Raises:
        QualityError: the cell is done with other settings, lacks something, or is run by another
            process.
        TrainingError: its training failed, or Cycle RL refused to start.
        StateError, CheckpointError, LayoutError: a file that it resumes from or reads is damaged.
    """
    state, why = lab.state(cell)
    if state == "blocked":
        raise QualityError(f"{cell.name}: {why}, one JSON layout a line")
    if state == "changed" and not again:
        raise QualityError(
            f"{cell.name}: done already with other settings ({why}); --cell {cell.name} --again "
            f"runs it again"
        )
    if state == "done" and not again:
        lab.tell(f"{cell.name}: done already")
        return
    lab.check_start(cell)
    for name in cell.needs:
        if lab.state(lab.find(name))[0] != "done":
            run_cell(lab, lab.find(name))
    lab.check_pace(cell)
    with held(lab, cell):
        if again:
            record_path(lab.results, cell.name).unlink(missing_ok=True)
            for path in folder_of(lab, cell).iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        _finish(lab, cell)


def folder_of(lab: Lab, cell: Cell) -> Path:
    """Where a cell's run and its model are stored."""
    return lab.models / cell.name


@contextmanager
def held(lab: Lab, cell: Cell) -> Iterator[None]:
    """Lock a cell, so that one process at a time runs it."""
    folder_of(lab, cell).mkdir(parents=True, exist_ok=True)
    try:
        with run_folder.held(folder_of(lab, cell), cell.name):
            yield
    except InputError as error:
        raise QualityError(str(error)) from None


def _finish(lab: Lab, cell: Cell) -> None:
    """Train and evaluate a cell, and write its record."""
    run = folder_of(lab, cell) / "run"
    if cell.stage == "none":
        begun = load_start(
            _beginning(lab, cell), "pmtp", any_stage=cell.parent is not None, device=lab.device
        )
        engine, log = begun.engine, None
        trained: dict[str, Any] = {
            "start": {"fingerprint": begun.fingerprint, "stages": list(begun.stages)},
            **dict.fromkeys(("steps", "samples", "drawn", "seconds", "cpu_seconds"), 0),
        }
    else:
        trained = dict(trained_model(lab, cell))
        engine = Engine.from_pretrained(folder_of(lab, cell) / "model", lab.device)
        log = run / "metrics.jsonl"
    lab.tell(f"{cell.name}: evaluating")
    found = score.measure(engine, lab.sizes(cell), cell.seed, choose=cell.task != "i2l")
    start = {"cell": cell.parent, **trained.pop("start")}
    if cell.parent is None and "/" not in (name := lab.given(cell)):
        start["model"] = name  # a bundled name; a path would mean nothing elsewhere
    record: Record = {
        "cell": cell.name,
        "arm": cell.arm,
        "seed": cell.seed,
        "stage": cell.stage,
        "scale": lab.scale,
        "settings": lab.settings(cell),
        "start": start,
        "model": module_hash(engine.transformer),
        **trained,
        "evaluation": found,
        "environment": lab.environment,
    }
    write_record(lab.results, record, log)
    for name in ("state.pt", "state.prev.pt", "best.pt"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "model", ignore_errors=True)
    lab.tell(f"{cell.name}: done, written to {record_path(lab.results, cell.name)}")


def trained_model(lab: Lab, cell: Cell) -> dict[str, Any]:
    """Train a cell's model into its folder, resume its training, or find it there. Return what its
    record says of the training."""
    folder = folder_of(lab, cell)
    wanted = lab.settings(cell) | {"start": lab.fingerprint(cell)}
    mark, begun = folder / "trained.json", folder / "settings.json"
    if begun.is_file() and (changed := differences(json.loads(begun.read_text()), wanted)):
        raise QualityError(
            f"{cell.name}: its run in {folder} has other settings ({'; '.join(changed)}); "
            f"--cell {cell.name} --again starts it over"
        )
    if mark.is_file() and (folder / "model").is_dir():
        told: dict[str, Any] = json.loads(mark.read_text())
        return told
    config = lab.config(cell)
    run = folder / "run"
    if not (run / "state.pt").is_file():  # without a state, timings and files are void
        shutil.rmtree(run, ignore_errors=True)
    places = run / "environments.json"  # of every process that took part
    there = json.loads(places.read_text()) if places.is_file() else []
    here = lab.environment["device"]
    if there and there[-1]["device"] != here:  # its seconds would mix both
        raise QualityError(
            f"{cell.name}: its run in {folder} began on {there[-1]['device']}, and this is {here}; "
            f"go on there (--device), or start it over with --cell {cell.name} --again"
        )
    stage, start = build(cell, config, _beginning(lab, cell), lab.device)
    run.mkdir(parents=True, exist_ok=True)
    write_json(begun, wanted)
    if lab.environment not in there:
        write_json(places, [*there, lab.environment])
    lab.tell(f"{cell.name}: {config.loop.steps} steps of {cell.stage} in {folder}")
    timed, log = Timed(stage, run, cell.task, lab.sizes(cell).choosing), run / "metrics.jsonl"
    train(timed, config.loop, run, resume=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(run / "model", folder / "model")
    shown, drawn = samples(config)
    first = json.loads(log.read_text().splitlines()[0])
    told = {
        "start": start,
        "steps": config.loop.steps,
        "samples": shown,
        "drawn": drawn,
        **timed.seconds(config.loop.steps),
        "clock": timed.clock,
        "checkpoint": checkpoint(log, timed.selects),
        "trained_in": json.loads(places.read_text()),
        # What Cycle RL measures before its first step: how its reward agrees with the judge.
        "before": {k: v for k, v in first.items() if k != "step"} if not first["step"] else {},
    }
    write_json(mark, told)
    return told


def recorded_model(lab: Lab, cell: Cell) -> Engine | None:
    """Return the model of a finished cell, if it is here and matches the record."""
    record = read_record(lab.results, cell.name)
    if cell.stage != "none":
        folder = folder_of(lab, cell) / "model"
    elif cell.parent is not None:
        folder = folder_of(lab, lab.find(cell.parent)) / "model"
    elif lab.start is not None:
        folder = model_folder(lab.given(cell))
    else:
        return None
    if record is None or not folder.is_dir():
        return None
    engine = Engine.from_pretrained(folder, lab.device)
    return engine if module_hash(engine.transformer) == record["model"] else None


def _beginning(lab: Lab, cell: Cell) -> Path | str:
    """Return the model that a cell starts from. If the parent is finished but its weights are not
    here (they are not committed), it is trained again, and must come out the same."""
    if cell.parent is None:
        return lab.given(cell)
    parent = lab.find(cell.parent)
    folder = folder_of(lab, parent) / "model"
    if not folder.is_dir():
        lab.tell(f"{parent.name}: its model is not in {lab.models}; training it again")
        with held(lab, parent):
            trained_model(lab, parent)
    record = read_record(lab.results, parent.name)
    found = module_hash(Engine.from_pretrained(folder).transformer)
    if record is None or found != record["model"]:
        raise QualityError(
            f"{parent.name}: the model in {folder} ({found}) is not that of its record "
            f"({record and record['model']}), since another machine trains other weights; bring "
            f"the recorded model there, or --cell {parent.name} --again and then this one again"
        )
    return folder
