"""One step loop for every stage: optimizer, schedule, logging, evaluation, checkpoints, resume.

A stage's batch is a pure function of the step number, so a resumed run needs no data position and
repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from echogen.engine.ranges import span
from echogen.train.checkpoint import StateError, load_state, save_state
from echogen.train.config import LoopConfig, to_json
from echogen.train.metrics import MetricsFile
from echogen.train.optim import build_optimizers, schedule
from echogen.train.selection import Best
from echogen.train.start import note_chosen


class Stage(Protocol):
    """What a training stage adds to the loop: its batch → loss, its evaluation, its export.

    A stage may have ``selects``, the name of one of its validation numbers: then the weights with
    the most of it are exported, and not the last ones.
    """

    @property
    def name(self) -> str:
        """What the run is called."""
        ...

    @property
    def module(self) -> nn.Module:
        """Everything that checkpoints hold; its parameters are trained."""
        ...

    @property
    def config(self) -> Any:
        """The stage's configuration, a dataclass."""
        ...

    def begin(self) -> dict[str, float]:
        """Called once, before the first step of a run: what is found out then, or a refusal."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of step ``step`` and the numbers worth logging; a pure function of the step.

        The numbers, one of them "loss", are floats or tensors of one element without a gradient,
        which are read where they are logged: to read one is to wait for the device, and backward
        could not be queued meanwhile.
        """
        ...

    def after_step(self, step: int) -> None:
        """Whatever follows the optimizer step (a codebook's moving averages, say)."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Validation numbers."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model in the format users load."""
        ...


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


class BeginRefused(TrainingError):
    """A stage that found, before its first step, that it would do harm; the message says how."""


def keep_pages() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel.

    A training step allocates and frees the same large tensors again and again; with the default
    thresholds each one is mapped afresh and its pages are faulted in and zeroed. Measured on one
    core, SiLU over 8.4 M floats: 16.6 ms before, 2.1 ms after.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; musl has none and does not need it
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def run(stage: Stage, config: LoopConfig, folder: Path, resume: bool = False) -> None:
    """Train ``stage`` for ``config.steps`` steps, keeping everything under ``folder``.

    Writes ``state.pt`` (resumable), ``metrics.jsonl``, ``config.json`` and, at the end, the
    exported model under ``model/``. Where the stage selects (see `Stage`), also ``best.pt``, the
    weights to export; which they are ends the metrics and stands in the model's record.

    Raises:
        TrainingError: the loss became NaN or infinite (the last state stays as it was), or the
            stage refuses to begin.
        StateError: ``resume`` with a torn state or one of another configuration, with damaged
            metrics, or without the best weights.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_pages()
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = build_optimizers(stage.module, config)
    state_path = folder / "state.pt"
    start = _restore(stage, optimizers, state_path) if resume and state_path.exists() else 0
    # Before anything is written: a run that is refused leaves its folder free.
    found = {} if start else _rounded(stage.begin())
    (folder / "config.json").write_text(json.dumps(to_json(stage.config), indent=2) + "\n")
    metrics = MetricsFile(folder / "metrics.jsonl", start)
    best = _best(stage, folder, start, metrics)
    console = Console(stderr=True)
    if found:
        metrics.write(step=0, **found)
        console.print(f"{stage.name} before the first step {found}", soft_wrap=True)
    # A run may have been killed behind its state and before that step's validation was written.
    if start and _due(config, start) and not metrics.validated(start):
        _evaluate(stage, start, metrics, best, console)
    with _progress(console, stage.name, config.steps, start) as bar:
        _steps(stage, config, optimizers, start, metrics, best, bar, state_path, console)
    chosen = best.restore(stage.module) if best is not None else None
    stage.export(folder / "model")
    which = ""
    if chosen is not None:
        which = f", of step {chosen['step']} ({chosen['by']} {chosen['value']:.6g})"
        note_chosen(folder / "model", chosen)
        if not metrics.column("chosen_step"):
            value = {f"chosen_{chosen['by']}": chosen["value"]}
            metrics.write(step=config.steps, chosen_step=chosen["step"], **value)
    console.print(f"{stage.name}: done; the model{which} is in {folder / 'model'}")


def _best(stage: Stage, folder: Path, start: int, metrics: MetricsFile) -> Best | None:
    by = getattr(stage, "selects", None)
    if by is None:
        return None
    return Best(folder / "best.pt", by, _identity(stage), start, metrics.column(f"val_{by}"))


def _steps(
    stage: Stage,
    config: LoopConfig,
    optimizers: list[torch.optim.Optimizer],
    start: int,
    metrics: MetricsFile,
    best: Best | None,
    bar: Progress,
    state_path: Path,
    console: Console,
) -> None:
    began, parameters = time.perf_counter(), list(stage.module.parameters())
    for step in range(start, config.steps):
        rate = schedule(step, config)
        try:
            numbers, norm = update(stage, config, optimizers, parameters, rate, step)
        except TrainingError as error:
            kept = f"the state of the last checkpoint is kept in {state_path} (try a lower lr)"
            raise TrainingError(f"{error}; {kept}") from None
        stage.after_step(step)
        done, last = step + 1, step + 1 == config.steps
        bar.update(bar.task_ids[0], completed=done, note=f"loss {float(numbers['loss']):.4f}")
        if done % config.log_every == 0 or last:
            seconds = (time.perf_counter() - began) / (done - start)
            row = {
                "step": done,
                **_rounded(numbers),
                "lr": rate * config.lr,
                "grad_norm": round(norm, 4),
            }
            metrics.write(**row, seconds_per_step=round(seconds, 4))
            if not console.is_terminal:
                console.print(f"{stage.name} {row} {seconds:.3f} s/step", soft_wrap=True)
        # Saved first: a failing evaluation costs no training.
        if done % config.save_every == 0 or last:
            with span(f"train/{stage.name}/checkpoint", step=step):
                save_state(state_path, _state(stage, optimizers, done))
        if _due(config, done):
            _evaluate(stage, done, metrics, best, console)


def _due(config: LoopConfig, done: int) -> bool:
    """Is there an evaluation behind ``done`` steps?"""
    return done % config.eval_every == 0 or done == config.steps


def _evaluate(
    stage: Stage, done: int, metrics: MetricsFile, best: Best | None, console: Console
) -> None:
    with span(f"train/{stage.name}/evaluate", step=done - 1):
        values = _rounded(stage.evaluate())
    if best is not None:
        best.offer(done, values[best.by], stage.module)
    metrics.write(step=done, **{f"val_{k}": v for k, v in values.items()})
    console.print(f"{stage.name} step {done} validation {values}", soft_wrap=True)


def update(
    stage: Stage,
    config: LoopConfig,
    optimizers: list[torch.optim.Optimizer],
    parameters: list[nn.Parameter],
    rate: float,
    step: int,
) -> tuple[dict[str, Any], float]:
    """One optimizer step at ``rate`` of the peak; the stage's numbers, as `Stage.loss` gives them,
    and the gradient norm.

    Raises:
        TrainingError: a loss or a gradient that is NaN or infinite; the weights are as before.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        optimizer.zero_grad(set_to_none=True)
    device, part = parameters[0].device.type, f"train/{stage.name}"
    with (
        span(f"{part}/forward", step=step),
        torch.autocast(device, torch.bfloat16, enabled=config.bf16),
    ):
        loss, numbers = stage.loss(step)
    with span(f"{part}/backward", step=step):
        loss.backward()
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
    if not math.isfinite(float(loss.detach())) or not math.isfinite(norm):
        raise TrainingError(
            f"{stage.name}: loss {float(loss.detach())}, gradient norm {norm} at step {step}"
        )
    with span(f"{part}/optimizer", step=step):
        for optimizer in optimizers:
            optimizer.step()
    return numbers, norm


def _identity(stage: Stage) -> dict[str, Any]:
    return {"stage": stage.name, "config": json.dumps(to_json(stage.config), sort_keys=True)}


def _state(stage: Stage, optimizers: list[torch.optim.Optimizer], step: int) -> dict[str, Any]:
    return {
        **_identity(stage),
        "step": step,
        "module": stage.module.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }


def _restore(stage: Stage, optimizers: list[torch.optim.Optimizer], path: Path) -> int:
    state = load_state(path)
    if any(state[key] != value for key, value in _identity(stage).items()):
        raise StateError(
            f"{path}: written by another run ({state['stage']}, other settings); "
            "give the same recipe and options, or another --out"
        )
    stage.module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def _rounded(numbers: dict[str, Any]) -> dict[str, float]:
    # To six digits, not places: a gap of 1e-6 between sampler and trainer is worth reading.
    return {k: float(f"{float(v):.6g}") for k, v in numbers.items()}


def _progress(console: Console, name: str, steps: int, start: int) -> Progress:
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
    bar.add_task(name, total=steps, completed=start, note="")
    return bar
