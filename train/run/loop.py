"""One step loop for every stage: optimizer, schedule, logging, evaluation, checkpoints, resume.

A stage's batch is a pure function of the step number, so a resumed run needs no data position and
repeats an uninterrupted one exactly, whenever and however it was interrupted. See `update` for one
step, `processes` for what several processes do together, and `checkpoint` for how files survive a
kill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from echogen.engine.checkpoints.shards import with_usual_mode
from echogen.engine.ranges import listening, span
from echogen.train.config import LoopConfig, to_json
from echogen.train.parallel.distributed import start
from echogen.train.parallel.processes import Processes, Trained
from echogen.train.run.average import Average
from echogen.train.run.board import Board, open_board
from echogen.train.run.checkpoint import StateError, previous, put_back, write_text
from echogen.train.run.dump import inputs_of, write_dump
from echogen.train.run.metrics import MetricsFile
from echogen.train.run.optim import build_optimizers, schedule
from echogen.train.run.progress import Pace, duration, note, progress_bar
from echogen.train.run.runtime import keep_pages, only_deterministic
from echogen.train.run.selection import Best
from echogen.train.run.stop import Stop, Stopped
from echogen.train.run.update import check, update
from echogen.train.stages.stage import BeginRefused as BeginRefused
from echogen.train.stages.stage import (
    NotFinite,
    Stage,
    TrainingError,
    identity,
    other_run,
    resumable,
)
from echogen.train.start import note_chosen


def run(
    stage: Stage,
    config: LoopConfig,
    folder: Path,
    resume: bool = False,
    processes: Processes | None = None,
) -> None:
    """Train ``stage`` for ``config.steps`` steps, keeping everything under ``folder``.

    Writes ``state.pt`` (to resume from; the previous one is ``state.prev.pt``), ``metrics.jsonl``,
    ``config.json``, ``board/`` if TensorBoard is installed and, at the end, the exported model
    under ``model/``. If the stage selects (see `Stage`), it also writes ``best.pt``, the weights to
    export; the last line of the metrics and the model's record name their step. A model that the
    stage continues is validated before the first step, and so its weights may be exported, as those
    of step 0. A step whose loss is not finite leaves ``dump-stepN.pt``, see `dump`.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state of the last whole step is saved.
        TrainingError: the loss became NaN or infinite (the last state stays as it was), the
            stage refuses to begin, or it cannot be run as configured.
        StateError: ``resume`` with a torn state or one of another configuration, with damaged
            metrics, or without the best weights; a file that cannot be written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_pages()
    stop = Stop()
    with stop.listening(), only_deterministic(config.deterministic):
        started = Run(stage, config, folder, resume, processes or start(config), stop)
        with closing(started.board), started.settled():
            started.to_its_end()


class Run:
    """A run under way; see `run`."""

    def __init__(
        self,
        stage: Stage,
        config: LoopConfig,
        folder: Path,
        resume: bool,
        processes: Processes,
        stop: Stop,
    ) -> None:
        self.stage, self.config, self.folder = stage, config, folder
        self.processes, self.stop = processes, stop
        self.console = Console(stderr=True, quiet=not processes.writes)
        self.state_path = folder / "state.pt"
        check(stage, config, processes)
        folder.mkdir(parents=True, exist_ok=True)
        processes.prepare(stage)
        optimizers = build_optimizers(stage.module, config)
        average = Average(stage.module, config.ema) if config.ema is not None else None
        self.trained = Trained(stage.module, optimizers, average, processes.given)
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.start = self._restore() if resume else 0
        self.saved = self.start
        # Before anything is written, so that a refused run leaves its folder free.
        found = {} if self.start else _rounded(processes.on_first(stage, self._begin))
        if processes.writes:
            self._tidy()
            write_text(folder / "config.json", json.dumps(to_json(stage.config), indent=2) + "\n")
        self.metrics = MetricsFile(folder / "metrics.jsonl", self.start, processes.writes)
        self.best = self._best()
        shown = processes.writes
        self.board = open_board(folder / "board", self.start, self.console) if shown else Board()
        if found:
            self.metrics.write(step=0, **found)
            self._say(f"{stage.name} before the first step {found}")

    def _begin(self) -> dict[str, float]:
        """What the stage finds before its first step; nothing if a signal ends that, as it then
        ends the run."""
        return self.stop.unless_asked(self.stage.begin) or {}

    # --- the run --------------------------------------------------------------------------------

    def to_its_end(self) -> None:
        """Run the remaining steps and the export."""
        # Step 0, or one whose state was saved, and the run then killed before it was validated.
        if self._due(self.start) and not self.metrics.validated(self.start):
            self._evaluate(self.start)
        pace = Pace(getattr(self.stage, "images", None), self.processes.count)
        with progress_bar(self.console, self.stage.name, self.config.steps, self.start) as bar:
            for step in range(self.start, self.config.steps):
                # A run cannot resume between the updates on one rollout, so they are finished
                # first.
                if resumable(self.stage, step) and self.processes.any(self.stop.asked):
                    self._leave(step)
                self._step(step, pace, bar)
        self._finish()

    def _step(self, step: int, pace: Pace, bar: Progress) -> None:
        c, done = self.config, step + 1
        last, rate = done == c.steps, schedule(step, c)
        pace.start()
        with listening(pace.meter):
            numbers, norm = self._update(rate, step)
        self.stage.after_step(step)
        if self.trained.average is not None:
            self.trained.average.update(done)
        logged = done % c.log_every == 0 or last
        # Reading a number waits for the device, so it is part of the step's time.
        told = note(numbers, pace.rates()) if self.console.is_terminal else ""
        pace.stop(wait=logged)
        bar.update(bar.task_ids[0], completed=done, note=told)
        if logged:
            row = {**_rounded(numbers), "lr": rate * c.lr, "grad_norm": round(norm, 4)}
            rates = _rounded(pace.rates())
            self.metrics.write(step=done, **row, seconds_per_step=round(pace.step, 4), **rates)
            self.board.numbers(done, "train", row | rates)
            if not self.console.is_terminal:
                line, left = {"step": done, **row}, pace.left(c.steps - done)
                told = f"{pace.step:.3f} s/step  {note({}, rates)}"
                told += f"  {duration(left)} left" * (not last)
                self._say(f"{self.stage.name} {line} {told}")
        # Saved first, so that a failing evaluation costs no training.
        if done % c.save_every == 0 or last:
            self._save(done)
        if self._due(done):
            self._evaluate(done)

    def _update(self, rate: float, step: int) -> tuple[dict[str, Any], float]:
        stage, optimizers = self.stage, self.trained.optimizers
        try:
            return update(
                stage, self.config, optimizers, self.parameters, rate, step, self.processes
            )
        except NotFinite as error:
            told, weights = str(error), self.processes.weights(stage.module)
            inputs, lost = self._inputs(step)
            inputs, told = self.processes.gathered(inputs), told + lost
            if self.processes.writes:
                told += self._dumped(step, told, weights, inputs)
            told += self._kept()
            raise TrainingError(f"{told} (try a lower lr)") from None

    def _inputs(self, step: int) -> tuple[dict[str, Any], str]:
        """What the step read in this process; or nothing, and why. It is made again for a dump. If
        that fails, all processes must still report the loss."""
        try:
            return inputs_of(self.stage, step), ""
        except Exception as error:
            return {}, f"; what process {self.processes.rank} read is not made again ({error!r})"

    def _dumped(
        self, step: int, told: str, weights: dict[str, Tensor], inputs: dict[str, Any]
    ) -> str:
        """Dump a step; return where to, or why not."""
        parts = self.config.accumulate * self.processes.count
        try:
            path = write_dump(self.folder, self.stage, step, told, weights, inputs, parts)
        except StateError as error:
            return f"; it is not dumped: {error}"
        return f"; what it was computed from is in {path} (--repeat {path})"

    def _kept(self) -> str:
        """What a failed run can resume from, for its message."""
        try:
            self.processes.settle()
        except StateError as error:
            return f"; {error}"
        return f"; the state of step {self.saved} is kept in {self.state_path}" * bool(self.saved)

    def _due(self, done: int) -> bool:
        """Whether there is an evaluation after ``done`` steps."""
        if not done:  # fresh weights are nothing to compare with
            return getattr(self.stage, "continues", False)
        return done % self.config.eval_every == 0 or done == self.config.steps

    def _evaluate(self, done: int) -> None:
        step = max(0, done - 1)
        with span(f"train/{self.stage.name}/evaluate", step=step), self._averaged():
            broken_off = self._validate(done)
        # After the average is taken out again: the state is of the weights themselves.
        if broken_off and resumable(self.stage, done):
            self._leave(done)

    def _validate(self, done: int) -> bool:
        """Validate the weights as they are; return whether a signal interrupted it."""
        stage = self.stage
        found = self.processes.on_first(stage, lambda: self.stop.unless_asked(stage.evaluate))
        if self.processes.any(found is None):
            return True
        values = _rounded(found or {})
        if self.best is not None:
            self.best.offer(done, values[self.best.by], stage.module)
        self.metrics.write(step=done, **{f"val_{k}": v for k, v in values.items()})
        self._say(f"{stage.name} step {done} validation {values}")
        self.board.numbers(done, "validation", values)
        self.board.pictures(done, stage)
        return False

    def _averaged(self) -> AbstractContextManager[None]:
        average = self.trained.average
        return nullcontext() if average is None else average.in_place()

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)  # a path may hold [brackets]

    # --- checkpoints ----------------------------------------------------------------------------

    def _save(self, done: int) -> None:
        with span(f"train/{self.stage.name}/checkpoint", step=done - 1):
            self.metrics.sync()  # lines of steps before a state are on the disk before it
            head = {**identity(self.stage), "step": done}
            self.processes.save(self.state_path, head, self.trained)
        self.saved = done

    @contextmanager
    def settled(self) -> Iterator[None]:
        """However the block ends, pending writes are on the disk after it.

        An error may be this process's alone (its memory, its disk) or common to all; the two cases
        are not distinguished. On a common error, the processes have already waited for each other
        where it arose.
        """
        try:
            yield
        except BaseException:
            try:
                self.processes.settle_alone()
            except RuntimeError as error:  # in addition to the one being raised
                self._say(f"{self.stage.name}: {error}")
            raise
        self.processes.settle()

    def _restore(self) -> int:
        """Restore the last checkpoint; return its step, or 0 if there is none."""
        path = self.state_path
        if not path.exists() and not previous(path).exists():
            return 0
        state = self.processes.load(path, self.trained)
        if other := other_run(state, self.stage):
            raise StateError(
                f"{path}: written by another run ({other}); "
                "give the same recipe, options, model and data, or another --out"
            )
        self.trained.load(state)
        if "fallen_back" in state:
            self._say(
                f"{self.stage.name}: {state['fallen_back']}, which is of step {state['step']}"
            )
            if self.processes.writes:
                put_back(path)  # or the next save would keep the torn one
        return int(state["step"])

    def _leave(self, done: int) -> None:
        """End the run after ``done`` steps, because a signal asked it to. Raises Stopped."""
        if done != self.saved:
            self._save(done)
        self.processes.settle()
        kept = f"the state of step {done} is saved in {self.state_path}; go on with --resume"
        if not done:
            kept = "no step was done yet"
        asked = self.stop.name if self.stop.asked else "a signal to another process"
        message = f"{self.stage.name}: stopped by {asked}; {kept}"
        self._say(message)
        raise Stopped(message, self.stop.number or signal.SIGTERM)

    def _tidy(self) -> None:
        """Remove what a kill left half-written and, before a first step, what older runs left."""
        old = [] if self.start else [self.state_path, previous(self.state_path)]
        for path in [*self.folder.glob("*.part"), *old]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # --- the end --------------------------------------------------------------------------------

    def _best(self) -> Best | None:
        by = getattr(self.stage, "selects", None)
        if by is None:
            return None
        seen = self.metrics.column(f"val_{by.removeprefix('-')}")
        run = identity(self.stage)
        return Best(self.folder / "best.pt", by, run, self.start, seen, self.processes)

    def _finish(self) -> None:
        """Export the chosen weights, or the last ones."""
        stage, model = self.stage, self.folder / "model"
        self.processes.settle()
        chosen = self.best.restore(stage.module) if self.best is not None else None
        # The best weights are an average already, if one was kept.
        with self._averaged() if chosen is None else nullcontext():
            self.processes.on_first(stage, lambda: self._write_model(model, chosen))
        which = ""
        if chosen is not None:
            unchanged = "" if chosen["step"] else "; no step improved on the model it began with"
            which = f", of step {chosen['step']} ({chosen['by']} {chosen['value']:.6g}{unchanged}),"
            if not self.metrics.column("chosen_step"):
                value = {f"chosen_{chosen['by']}": chosen["value"]}
                self.metrics.write(step=self.config.steps, chosen_step=chosen["step"], **value)
        self._say(f"{stage.name}: done; the model{which} is in {model}")

    def _write_model(self, model: Path, chosen: dict[str, Any] | None) -> None:
        """Write beside the final name and rename, or a kill could leave half a model that looks
        whole."""
        beside = model.with_name(model.name + ".part")
        shutil.rmtree(beside, ignore_errors=True)
        self.stage.export(beside)
        with_usual_mode(beside, beside.rglob("*.safetensors"))
        if chosen is not None:
            note_chosen(beside, chosen)
        if model.exists():
            shutil.rmtree(model)
        os.replace(beside, model)


def _rounded(numbers: dict[str, Any]) -> dict[str, float]:
    # To six significant digits, not decimal places: a sampler-trainer gap of 1e-6 is worth reading.
    return {k: float(f"{float(v):.6g}") for k, v in numbers.items()}
