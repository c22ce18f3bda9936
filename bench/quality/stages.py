"""From a cell to the stage that trains it, timed, and with its best checkpoint kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusVQVAE

from echogen.bench.quality.cells import Cell, Config, Task
from echogen.bench.quality.records import write_json
from echogen.engine.engine import Engine
from echogen.train import keys
from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig
from echogen.train.cycle_rl import CycleRLStage
from echogen.train.data.packing import Batch, l2i_prompt
from echogen.train.data.samples import module_hash
from echogen.train.djo import DJOStage
from echogen.train.loop import Stage
from echogen.train.pmtp import PMTPStage
from echogen.train.start import load_start, model_folder
from echogen.train.world import ask


class OneTaskStage(PMTPStage):
    """Stage 1 with one of its two tasks left out: the same samples in the same order."""

    def __init__(self, config: PMTPConfig, vq: JanusVQVAE, task: Task) -> None:
        if config.mask != "isolated" or config.extra_grounding:
            raise ValueError("one task alone needs mask = 'isolated' and extra_grounding = 0")
        super().__init__(config, vq)
        self._task = task

    def batch(self, step: int) -> Batch:
        c = self.config
        rng = keys.generator(c.loop.seed, keys.PMTP_BATCH, step)
        samples = [self._train[i] for i in rng.integers(len(self._train), size=c.batch)]
        # Both tasks' randomness is drawn, so that either has what it has in company.
        prompts = [l2i_prompt(self.prompts, s.layout(rng), c.prompt_dropout, rng) for s in samples]
        asked = [ask(s, c.branches, rng) for s in samples]
        if self._task == "l2i":
            trees = [self.drawing(p, s.codes) for p, s in zip(prompts, samples, strict=True)]
        else:
            trees = [self.grounding(s.codes, q) for q, s in zip(asked, samples, strict=True)]
        return self.pack(trees)


def build(cell: Cell, config: Config, start: Path | str) -> tuple[Stage, dict[str, Any]]:
    """The stage of a cell, and what is recorded of its beginning.

    Args:
        start: the model it begins with, or (fresh weights) whose image tokenizer it takes.

    Raises:
        StateError: a model of another stage.
        CheckpointError: a model that does not load.
    """
    if isinstance(config, PMTPConfig):
        vq = Engine.from_pretrained(model_folder(start)).vq
        told = {"fingerprint": module_hash(vq), "stages": []}
        if cell.task == "both":
            return PMTPStage(config, vq), told
        return OneTaskStage(config, vq, cell.task), told
    begun = load_start(start, "djo" if isinstance(config, CycleRLConfig) else "pmtp")
    told = {"fingerprint": begun.fingerprint, "stages": list(begun.stages)}
    if isinstance(config, DJOConfig):
        return DJOStage(config, begun), told
    return CycleRLStage(config, begun), told


class Watched:
    """A stage whose steps are timed and whose best checkpoint is kept.

    The best is the one with the highest ``judge_iou`` on validation scenes (``ground_iou`` where
    only grounding is learnt). What it knows lies in the run's folder, so a resumed run goes on.
    """

    def __init__(self, stage: Stage, folder: Path, task: Task) -> None:
        self.stage, self._folder = stage, folder
        self.by = "ground_iou" if task == "i2l" else "judge_iou"
        self._step = -1
        self._began = (0.0, 0.0)
        self._clock = _read(folder / "clock.json", {"steps": 0, "seconds": 0.0, "cpu_seconds": 0.0})
        self.seen: list[dict[str, float]] = _read(folder / "checkpoints.json", [])

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
        self._catch_up(step)
        self._began = (time.perf_counter(), time.process_time())
        return self.stage.loss(step)

    def _catch_up(self, done: int) -> None:
        """Evaluate what a run that was stopped between a checkpoint and its evaluation has not."""
        due = done and done % self.config.loop.eval_every == 0
        if due and all(c["step"] != done for c in self.seen):
            device = next(self.module.parameters()).device.type
            with torch.autocast(device, enabled=False):  # the loop's, around ``loss``
                self._step = done
                self.evaluate()

    def after_step(self, step: int) -> None:
        """Called behind the optimizer: from ``loss`` to here is one step."""
        self.stage.after_step(step)
        self._step = step + 1
        self._clock["steps"] += 1
        self._clock["seconds"] += time.perf_counter() - self._began[0]
        self._clock["cpu_seconds"] += time.process_time() - self._began[1]

    def evaluate(self) -> dict[str, float]:
        """The stage's validation; the model is kept if it is the best so far."""
        values = self.stage.evaluate()
        self._keep(self._step, values[self.by])
        return values

    def _keep(self, step: int, score: float) -> None:
        others = [c for c in self.seen if c["step"] != step]
        if all(score > c["score"] for c in others):
            beside = self._folder / "best.part"
            shutil.rmtree(beside, ignore_errors=True)
            self.stage.export(beside)
            shutil.rmtree(self._best(step), ignore_errors=True)
            os.replace(beside, self._best(step))
        self.seen = sorted([*others, {"step": step, "score": score}], key=lambda c: c["step"])
        write_json(self._folder / "clock.json", self._clock)
        write_json(self._folder / "checkpoints.json", self.seen)
        for folder in self._folder.glob("best-*"):  # last: until here the old one is the best
            if folder != self.best:
                shutil.rmtree(folder)

    def export(self, folder: Path) -> None:
        """The end of the run. A run that was stopped behind its last step has yet to look at it."""
        steps = self.config.loop.steps
        if all(c["step"] != steps for c in self.seen):
            self._step = steps
            self.evaluate()
        self.stage.export(folder)

    def _best(self, step: int) -> Path:
        return self._folder / f"best-{step}"

    @property
    def best(self) -> Path:
        """Folder of the best model so far."""
        return self._best(self.chosen()["step"])

    def chosen(self) -> dict[str, Any]:
        """Which checkpoint it was, and among which."""
        best = max(self.seen, key=lambda c: c["score"])
        return {"step": int(best["step"]), "by": self.by, "of": self.seen}

    def seconds(self, steps: int) -> dict[str, float]:
        """Wall and CPU seconds of ``steps`` steps without evaluations: the mean step's, so that
        steps lost by an interruption do not count."""
        each = max(1, self._clock["steps"])
        return {
            name: round(self._clock[name] / each * steps, 3) for name in ("seconds", "cpu_seconds")
        }


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else otherwise
