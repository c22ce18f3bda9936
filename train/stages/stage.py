"""What a training stage is to the step loop, and how a stage or a step refuses to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from echogen.train.config import differences, to_json


class Stage(Protocol):
    """What a training stage adds to the loop: its batch → loss, its evaluation, its export.

    A stage may also have:
        selects: the name of one of its validation numbers; then the weights with the most of it are
            exported, and not the last ones. "-NAME": those with the least. None: the last ones.
        loss_part(step, part, parts) → (loss, numbers): the share of every ``parts``-th sample of
            the step's batch, beginning with sample ``part``. Losses, gradients and numbers of the
            parts add up to those of ``loss(step)``: a mean over the batch is divided by what the
            batch has, not by what the part has. Needed where a batch is accumulated or shared out.
        ahead(step, part, parts): make what the host makes of a part before it is asked for. Called
            with what comes next, while the device is busy with backward.
        images: images a step, over all processes, for the rate that is shown.
        pictures() → [(name, picture)]: samples for people, drawn at each evaluation.
        inputs(step) → tensors (in dictionaries and lists) that the step's loss reads, for a dump.
        engine, gather(): the engine that evaluates, and the request that it run on whole weights of
            its own (`WholeEngine`). Needed for adapters and sharded weights.
        idle: how the names of parameters begin of which its loss may have no gradient.
        frozen: models beside the trained one, to be sharded like it.
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
        """The stage's configuration, a dataclass with the `LoopConfig` as its ``loop``. Where it
        has ``updates``, a state is resumable behind multiples of so many steps only."""
        ...

    def begin(self) -> dict[str, float]:
        """Called once, before the first step of a run: what is found out then, or a refusal."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of step ``step`` and the numbers worth logging; a pure function of the step.

        Torch's own random state is set from (seed, step) before, so that it may be used.

        The numbers, one of them "loss", are floats or tensors of one element without a gradient,
        which are read where they are logged: to read one is to wait for the device, and backward
        could not be queued meanwhile.
        """
        ...

    def after_step(self, step: int) -> None:
        """Whatever follows the optimizer step (a codebook's moving averages, say)."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Validation numbers. It may be broken off by an exception at any point."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model in the format users load, into a folder that it makes."""
        ...


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


class BeginRefused(TrainingError):
    """A stage that found, before its first step, that it would do harm; the message says how."""


class NotFinite(TrainingError):
    """A loss or a gradient that is NaN or infinite; the weights are as before the step."""


def resumable(stage: Stage, step: int) -> bool:
    """Whether a run can go on from a state behind ``step`` steps: not between the updates on one
    rollout, which was drawn with weights that are gone."""
    return step % getattr(stage.config, "updates", 1) == 0


HOW = ("parallel", "accumulate", "checkpoint_activations", "deterministic")
"""Settings of the loop that say how a step is computed, and not which."""


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration as `to_json` tells it, what says which run it is: all but ``HOW``."""
    return {**told, "loop": {k: v for k, v in told["loop"].items() if k not in HOW}}


def identity(stage: Stage) -> dict[str, str]:
    """What tells a run's files from those of other runs. Settings in ``HOW`` do not: a run that
    found too little memory may go on in more parts, with the same steps to rounding."""
    told = settings(to_json(stage.config))
    return {"stage": stage.name, "config": json.dumps(told, sort_keys=True)}


def other_run(found: dict[str, Any], stage: Stage) -> str:
    """How the run that wrote a file, by the `identity` there, is another one than ``stage``'s; ""
    where it is not."""
    mine = identity(stage)
    if found.get("stage") != mine["stage"]:
        return f"of stage {found.get('stage')}, not {mine['stage']}"
    if found.get("config") == mine["config"]:
        return ""
    changed = differences(json.loads(found.get("config") or "{}"), json.loads(mine["config"]))
    return few(changed)


def few(changed: list[str]) -> str:
    """The first of some differences, and how many there are besides."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more
