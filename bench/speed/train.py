"""The speed of a training stage, and where the time of its step goes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from echogen.bench.harness import environment, quantiles
from echogen.bench.profile.stopwatch import OUTSIDE, Stopwatch
from echogen.bench.profile.subjects import (
    FRESH,
    STAGES,
    Asked,
    Work,
    steps_to_warm,
    training,
    warm_up,
)
from echogen.bench.profile.trace import clock
from echogen.bench.registry import short
from echogen.bench.roofline import measure
from echogen.bench.speed.phases import Weights
from echogen.engine.checkpoints.pretrained import bundled
from echogen.engine.config import ModelConfig
from echogen.engine.ranges import listening
from echogen.train.config import Recipe
from echogen.train.recipes import tiny
from echogen.train.run.progress import PASS, peak_memory
from echogen.train.run.stop import Stop

WATCHED = 2
"""Most steps whose time is divided among ranges."""
PHASES = {
    name: {f"train/{name}/{part}": part for part in ("data", "forward", "backward", "optimizer")}
    for name in ("pmtp", "djo")
} | {
    "cycle-rl": {
        "train/cycle-rl/rollout": "rollout",
        "engine/ground": "grounding",
        "train/cycle-rl/reward": "reward",
        **{f"train/cycle-rl/{part}": "update" for part in ("forward", "backward", "optimizer")},
    }
}
"""The phases of a stage's step, by the ranges that begin them."""
REST = "rest"
"""The part of a step outside its phases, such as clipping."""

Progress = Callable[[int, int], None]


class BatchError(ValueError):
    """A batch cannot be divided into a recipe's parts."""


def run(
    stage: str,
    model: str | None = None,
    batch: int | None = None,
    repeats: int = 5,
    device: str = "cpu",
    float32: bool = False,
    progress: Progress = lambda done, total: None,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Time optimizer steps of a stage with a recipe's settings, on 64 scenes; JSON-ready.

    The steps follow one another as in training. The host waits for a GPU before the first and after
    the last step, and in between only where a step itself does. ``phases`` and ``shares`` come from
    further steps, in which it waits at the end of every range. Ctrl-C (SIGINT) ends the run after
    the current step and returns what was measured until then; a second one ends it at once.

    Args:
        stage: one of ``STAGES``.
        model: the model that stages 2 and 3 start from, and whose image tokenizer stage 1 uses;
            FRESH: random weights and a random image tokenizer of the recipe's shapes. Left out: the
            bundled model of the recipe's name, or FRESH if there is none.
        batch: samples per step; in Cycle RL, layouts per rollout. Left out: the recipe's.
        repeats: steps timed, after one to warm up, or three on CUDA.
        device: "cpu" or "cuda".
        float32: multiply in float32 where the recipe says bfloat16.
        progress: called with (steps done, steps in all).
        recipe: gives the settings; `tiny` if left out.

    Returns:
        ``images_per_s`` and ``tokens_per_s`` (of the trainer's own passes, without padding),
        ``padding`` (its share of what was packed in these steps; a stage that packs ahead for the
        next step leaves the first one out), ``ms_per_step`` with quantiles, ``utilisation``
        (`needed` over the measured rate of matrix products in ``dtype``, the stage's type),
        ``peak_mib`` of the process or, on CUDA, of the tensors of the timed steps, ``phases``,
        shares of the time by phase of a step (see ``PHASES``; whatever runs inside a phase is part
        of it, except another phase), ``shares`` of it by innermost range, ``interrupted`` (Ctrl-C
        ended it; if that was before the steps for the shares, these are empty), and the
        environment.

    Raises:
        ValueError: the stage is unknown.
        BatchError: the batch cannot be divided into the recipe's parts.
        CheckpointError: there is no such model.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage}: unknown; choose {', '.join(STAGES)}")
    recipe = recipe or tiny()
    settings = getattr(recipe, stage.replace("-", "_"))
    batch, parts = settings.batch if batch is None else batch, settings.loop.accumulate
    if batch % parts:
        raise BatchError(
            f"batch {batch}: recipe {recipe.name} takes a step in {parts} parts; make it a "
            f"multiple of {parts}"
        )
    model = model or (recipe.name if recipe.name in bundled() else FRESH)
    asked = Asked(model, device, batch, float32, recipe)
    work, subject, packed = training(stage, asked)
    warm_up(work, device, steps_to_warm(device))
    packed.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    passes, stop = Passes(), Stop()
    with stop.listening(signal.SIGINT):
        with listening(passes):
            times, whole = timed(work, repeats, device, progress, stop)
        padding, spread = packed.padding, quantiles(times)
        peak = peak_memory() / 2**20
        phases: dict[str, float] = {}
        shares: dict[str, float] = {}
        if not stop.asked:
            phases, shares = _shares(work, min(repeats, WATCHED), device, stage, stop)
        dtype = torch.bfloat16 if subject.config.loop.bf16 else torch.float32
        ceiling = measure(torch.device(device), dtype).flops_per_s
    return {
        "stage": stage,
        "recipe": recipe.name,
        "model": model,
        "batch": batch,
        "images": subject.images,
        "dtype": short(dtype),
        "ms_per_step": 1e3 * spread["median"],
        "ms_per_step_q20": 1e3 * spread["q20"],
        "ms_per_step_q80": 1e3 * spread["q80"],
        "images_per_s": subject.images / spread["median"],
        "tokens_per_s": passes.tokens * (1 - padding) / len(times) / spread["median"],
        "padding": padding,
        "utilisation": needed(subject.module.config, passes) * (1 - padding) / whole / ceiling,
        "peak_mib": peak,
        "phases": phases,
        "shares": shares,
        "interrupted": stop.asked,
        "threads": torch.get_num_threads(),
    } | environment(device)


class Passes:
    """A listener that counts the tokens of the trainer's passes, including padding.

    Attributes:
        trained: tokens of passes that are kept for backward.
        read: tokens of others, such as a reference's.
    """

    def __init__(self) -> None:
        self.trained = self.read = 0

    @property
    def tokens(self) -> int:
        """Tokens of all passes."""
        return self.trained + self.read

    def begin(self, category: str, payload: dict[str, int]) -> None:
        """See `Listener`."""
        if category != PASS:
            return
        if torch.is_grad_enabled():
            self.trained += payload["tokens"]
        else:
            self.read += payload["tokens"]

    def end(self) -> None:
        """See `Listener`."""


def needed(config: ModelConfig, passes: Passes) -> int:
    """Return the operations of the decoder's weights in all passes and their backward: 6 per weight
    and token, as trainers count them, and 2 where there is no backward. Heads, attention's own
    products and rollouts are left out, and so is recomputation that saves memory."""
    return Weights.of(config).body * (6 * passes.trained + 2 * passes.read)


def timed(
    work: Work, repeats: int, device: str, progress: Progress, stop: Stop
) -> tuple[list[float], float]:
    """Return the seconds of each run and of all, waiting for the device at both ends only; on CUDA
    the single times are between events in its queue. There are fewer runs if ``stop`` was
    requested."""
    on_cuda = device.startswith("cuda")
    marks: list[Any] = []

    def mark() -> None:
        if on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    now = clock(device)
    began = now()
    mark()
    for done in range(repeats):
        work()
        mark()
        progress(done + 1, repeats)
        if stop.asked:
            break
    whole = now() - began
    if on_cuda:
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)], whole
    return [b - a for a, b in pairwise(marks)], whole


class Phases(Stopwatch):
    """Wall time by phase. A range that begins no phase counts for the phase around it."""

    def __init__(self, phases: dict[str, str], clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._phases = phases

    def begin(self, category: str, payload: dict[str, int]) -> None:
        """See `Listener`."""
        super().begin(self._phases.get(category, self._open[-1]), {})


def _shares(
    work: Work, steps: int, device: str, stage: str, stop: Stop
) -> tuple[dict[str, float], dict[str, float]]:
    """Return shares of the time by phase and by innermost range, the largest first."""
    watches = Phases(PHASES[stage], clock(device)), Stopwatch(clock(device))
    with listening(*watches):
        for watch in watches:
            watch.start()
        for _ in range(steps):
            work()
            if stop.asked:
                break
        wholes = [watch.stop() for watch in watches]
    phases, shares = (
        {row.category: row.seconds / whole for row in watch.ranked}
        for watch, whole in zip(watches, wholes, strict=True)
    )
    phases[REST] = phases.pop(OUTSIDE)
    return phases, shares
