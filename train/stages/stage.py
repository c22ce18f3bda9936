"""The interface of a training stage to the step loop, and the errors that end a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from echogen.train.config import differences, to_json


class Stage(Protocol):
    """What a training stage adds to the loop: its batch → loss, its evaluation, its export.

    A stage may also have:
        selects: the name of a validation number; the weights with its highest value are then
            exported instead of the last ones. "-NAME": those with its lowest value. None: the last
            ones.
        continues: whether it begins with a trained model. That model is then validated before the
            first step, and the stage that selects may export it.
        loss_part(step, part, parts) → (loss, numbers): the contribution of every ``parts``-th
            sample of the step's batch, beginning with sample ``part``. Losses, gradients and
            numbers of the parts add up to those of ``loss(step)``: a mean is divided by the batch's
            count, not by the part's. Needed for gradient accumulation and several processes.
        ahead(step, part, parts): prepare a part's data on the host ahead of time. Called with the
            next part while the device is busy with backward.
        images: images per step, over all processes, for the displayed rate.
        pictures() → [(name, picture)]: samples to look at, drawn at each evaluation.
        inputs(step) → tensors (in dictionaries and lists) that the step's loss reads, for a dump.
        engine, gather(): the engine used in evaluation, and a method that makes it run on whole
            weights of its own (`WholeEngine`). Needed for adapters and sharded weights.
        idle: name prefixes of parameters for which its loss may have no gradient.
        frozen: models beside the trained one, to be sharded like it.
    """

    @property
    def name(self) -> str:
        """The stage's name."""
        ...

    @property
    def module(self) -> nn.Module:
        """Everything that checkpoints store; its parameters are trained, but for frozen ones."""
        ...

    @property
    def config(self) -> Any:
        """The stage's configuration, a dataclass with the `LoopConfig` as its ``loop``. If it has
        ``updates``, a run can resume only after a multiple of that many steps. If its ``start``,
        the fingerprint of all weights that the module begins with, is not empty, checkpoints leave
        out the module's frozen parameters, so these must never change."""
        ...

    def begin(self) -> dict[str, float]:
        """Called once before the first step of a run; returns what it measured, or refuses to
        begin."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of step ``step`` and the numbers worth logging; a pure function of the step.

        Torch's own random state is set from (seed, step) beforehand, so it may be used.

        The numbers, one of them "loss", are floats or one-element tensors without a gradient.
        Tensors are read only when they are logged: reading one waits for the device, and backward
        could not be queued meanwhile.
        """
        ...

    def after_step(self, step: int) -> None:
        """Work that follows the optimizer step, such as updating a codebook's moving averages."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Validation numbers. An exception may interrupt it at any point."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model in the format users load, into a folder that it creates."""
        ...


class TrainingError(RuntimeError):
    """A run that cannot continue; the message says at which step and why."""


class BeginRefused(TrainingError):
    """A run that is refused before its first step; the message says why."""


class NotFinite(TrainingError):
    """A loss or a gradient that is NaN or infinite; the weights are as before the step."""


def resumable(stage: Stage, step: int) -> bool:
    """Whether a run can resume from a state after ``step`` steps: not between the updates on one
    rollout, which was drawn with weights that no longer exist."""
    return step % getattr(stage.config, "updates", 1) == 0


HOW = ("parallel", "accumulate", "checkpoint_activations", "deterministic", "draw_at_once")
"""Settings, of the loop or of a stage, that change how a step is computed, but not what it
computes."""


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration, as from `to_json`, that identifies a run: all but ``HOW``."""
    kept = {k: v for k, v in told.items() if k not in HOW}
    return {**kept, "loop": {k: v for k, v in told["loop"].items() if k not in HOW}}


def identity(stage: Stage) -> dict[str, str]:
    """What identifies a run's files. Settings in ``HOW`` are left out: a run that ran out of memory
    may resume with more parts, and its steps stay the same up to rounding."""
    told = settings(to_json(stage.config))
    return {"stage": stage.name, "config": json.dumps(told, sort_keys=True)}


def other_run(found: dict[str, Any], stage: Stage) -> str:
    """How the run that wrote a file, by the `identity` in it, differs from ``stage``'s run; "" if
    it does not."""
    mine = identity(stage)
    if found.get("stage") != mine["stage"]:
        return f"of stage {found.get('stage')}, not {mine['stage']}"
    if found.get("config") == mine["config"]:
        return ""
    changed = differences(json.loads(found.get("config") or "{}"), json.loads(mine["config"]))
    return summarised(changed)


def summarised(changed: list[str]) -> str:
    """The first three differences, and how many more there are."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more
