"""The stage that trains a cell, with a clock on its steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import JanusVQVAE

from echogen.bench.quality import score
from echogen.bench.quality.cells import Cell, Config, Task
from echogen.bench.quality.records import write_json
from echogen.engine.engine import Engine
from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig
from echogen.train.data.samples import module_hash
from echogen.train.run.loop import Stage
from echogen.train.stages.cycle_rl import VAL_LAYOUTS, CycleRLStage
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.pmtp import Task as Asked
from echogen.train.stages.world import WorldStage
from echogen.train.start import load_start, model_folder


class OneTaskStage(PMTPStage):
    """Stage 1 without one of its two tasks: the same samples in the same order."""

    def __init__(self, config: PMTPConfig, vq: JanusVQVAE, task: Task) -> None:
        if config.mask != "isolated" or config.extra_grounding:
            raise ValueError("one task alone needs mask = 'isolated' and extra_grounding = 0")
        super().__init__(config, vq)
        self._task = task

    def tasks(self, step: int) -> list[Asked]:
        # Draw both tasks' randomness, so that a task alone gets the same as with the other.
        every = super().tasks(step)
        if self._task == "l2i":
            return [asked._replace(questions=[]) for asked in every]
        return [asked._replace(draw=None) for asked in every]


def build(
    cell: Cell, config: Config, start: Path | str, device: str = "cpu"
) -> tuple[Stage, dict[str, Any]]:
    """Build the stage of a cell, and what is recorded about its start.

    Args:
        start: the model it starts from or, for fresh weights, the one whose image tokenizer it
            uses.
        device: where it is trained.

    Raises:
        StateError: the model is of another stage.
        CheckpointError: the model does not load.
    """
    if isinstance(config, PMTPConfig):
        vq = Engine.from_pretrained(model_folder(start), device).vq
        told = {"fingerprint": module_hash(vq), "stages": []}
        if cell.task == "both":
            return PMTPStage(config, vq), told
        return OneTaskStage(config, vq, cell.task), told
    after = "djo" if isinstance(config, CycleRLConfig) else "pmtp"
    # Stage 1 is continued as stage 2 without its loop; its model then says that it is of stage 2.
    continued = isinstance(config, DJOConfig) and cell.parent is not None
    begun = load_start(start, after, any_stage=continued, device=device)
    told = {"fingerprint": begun.fingerprint, "stages": list(begun.stages)}
    if isinstance(config, DJOConfig):
        return DJOStage(config, begun), told
    return CycleRLStage(config, begun), told


class Timed:
    """A stage whose optimizer steps are timed, without the evaluations.

    The clock is kept in the run's folder, so that a resumed run continues it. On a GPU, a step ends
    when the device has finished it, and wall seconds count (``clock``). The loop exports the
    checkpoint that is best on validation. It compares the stage's own number if there is one, else
    the judge's IoU (for grounding alone, the grounding IoU). With ``choosing``, it compares the
    judge's IoU of that many drawings of Cycle RL's validation layouts (``drawn_iou``).

    The model that a cell starts from is no candidate, so it does not say that it ``continues`` one:
    an arm is what training makes of its start, however the two compare on validation. The recorded
    cells were chosen so too, and must come out the same when they are trained again.
    """

    def __init__(self, stage: Stage, folder: Path, task: Task, choosing: int = 0) -> None:
        self.stage, self._choosing = stage, choosing
        usual = "ground_iou" if task == "i2l" else "judge_iou"
        own = getattr(stage, "selects", None)
        self.selects: str = "drawn_iou" if choosing else own or usual
        self._device = next(stage.module.parameters()).device
        self.clock = "seconds" if self._device.type == "cuda" else "cpu_seconds"
        """The name of the number that counts compute."""
        self._path, self._began = folder / "clock.json", (0.0, 0.0)
        self._clock = {"steps": 0, "seconds": 0.0, "cpu_seconds": 0.0}
        if self._path.is_file():
            self._clock = json.loads(self._path.read_text())

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def module(self) -> nn.Module:
        return self.stage.module

    @property
    def config(self) -> Any:
        return self.stage.config

    def begin(self) -> dict[str, float]:
        return self.stage.begin()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        self._began = (time.perf_counter(), time.process_time())
        return self.stage.loss(step)

    def __getattr__(self, name: str) -> Any:
        """Forward the optional members of a stage (see `Stage`) that its steps need."""
        if name not in ("ahead", "inputs", "loss_part"):
            raise AttributeError(name)
        found = getattr(self.stage, name)
        return self._timed(found) if name == "loss_part" else found

    def _timed(self, loss_part: Callable[..., Any]) -> Callable[..., Any]:
        def timed(step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
            if part == 0:
                self._began = (time.perf_counter(), time.process_time())
            return loss_part(step, part, parts)

        return timed

    def after_step(self, step: int) -> None:
        """Called after the optimizer: one step lasts from ``loss`` to here."""
        self.stage.after_step(step)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._clock["steps"] += 1
        self._clock["seconds"] += time.perf_counter() - self._began[0]
        self._clock["cpu_seconds"] += time.process_time() - self._began[1]

    def evaluate(self) -> dict[str, float]:
        write_json(self._path, self._clock)
        values = self.stage.evaluate()
        if self._choosing:
            engine = cast(WorldStage, self.stage).engine
            drawn = score.judged(engine, VAL_LAYOUTS, 0, score.PLAIN, self._choosing)
            values |= {"drawn_iou": drawn["judge_iou"]}
        return values

    def export(self, folder: Path) -> None:
        self.stage.export(folder)

    def seconds(self, steps: int) -> dict[str, float]:
        """Return wall and CPU seconds of ``steps`` steps, as that many times the mean step, so that
        work lost to an interruption does not count."""
        each = max(1, self._clock["steps"])
        return {
            name: round(self._clock[name] / each * steps, 3) for name in ("seconds", "cpu_seconds")
        }


def checkpoint(log: Path, by: str) -> dict[str, Any]:
    """Return which checkpoint of a finished run was exported, and from which, by its metrics."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    chosen = next(row["chosen_step"] for row in rows if "chosen_step" in row)
    of = [{"step": r["step"], "score": r[f"val_{by}"]} for r in rows if f"val_{by}" in r]
    return {"step": chosen, "by": by, "of": of}
