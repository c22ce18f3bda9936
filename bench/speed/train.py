"""How fast a training stage runs, and where its step's time goes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch

from echogen.bench.harness import environment, quantiles
from echogen.bench.profile.stopwatch import Row, Stopwatch
from echogen.bench.profile.subjects import Asked, warmed
from echogen.bench.profile.trace import clock
from echogen.bench.roofline import measure
from echogen.bench.speed.phases import Weights
from echogen.engine.config import ModelConfig
from echogen.engine.ranges import listening
from echogen.train.recipes import tiny

STAGES = ("pmtp", "djo", "cycle-rl")
PASS = "train/pass"


def run(
    stage: str,
    model: str = "tiny",
    batch: int = 8,
    repeats: int = 5,
    device: str = "cpu",
    float32: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time optimizer steps of a stage with the recipe ``tiny``; JSON-ready.

    Args:
        stage: one of ``STAGES``.
        model: that stages 2 and 3 begin with, and whose image tokenizer stage 1 takes.
        batch: samples a step; layouts a rollout in Cycle RL.
        repeats: steps timed, after one to warm up.
        device: "cpu" or "cuda".
        float32: multiply in float32 where the recipe says bfloat16.
        progress: called with (steps done, steps in all).

    Returns:
        ``images_per_s`` and ``tokens_per_s`` (padding included, of the trainer's own passes),
        ``ms_per_step`` with quantiles, ``utilisation`` (`needed` over the measured rate of matrix
        products in ``dtype``, the stage's type), ``peak_mib`` of the process or, on CUDA, of its
        tensors, ``shares`` of the time by range, and the environment.

    Raises:
        ValueError: no such stage.
        CheckpointError: no such model.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage}: unknown; choose {', '.join(STAGES)}")
    subject = warmed(stage, Asked(model, device, batch, float32))
    watch, times = Stopwatch(clock(device)), []
    with listening(watch):
        for done in range(repeats):
            watch.start()
            subject.work()
            times.append(watch.stop())
            progress(done + 1, repeats)
    whole, spread = sum(times), quantiles(times)
    passes = watch.rows.get(PASS, Row(PASS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    loop = getattr(tiny(), stage.replace("-", "_")).loop
    dtype = torch.bfloat16 if loop.bf16 and not float32 else torch.float32
    ceiling = measure(torch.device(device), dtype).flops_per_s
    return {
        "stage": stage,
        "model": model,
        "batch": batch,
        "images": subject.images,
        "dtype": str(dtype).removeprefix("torch."),
        "ms_per_step": 1e3 * spread["median"],
        "ms_per_step_q20": 1e3 * spread["q20"],
        "ms_per_step_q80": 1e3 * spread["q80"],
        "images_per_s": subject.images / spread["median"],
        "tokens_per_s": passes.payload.get("tokens", 0) / repeats / spread["median"],
        "utilisation": needed(subject.config, passes) / whole / ceiling,
        "peak_mib": peak,
        "shares": {
            row.category: row.seconds / whole
            for row in sorted(watch.rows.values(), key=lambda row: -row.seconds)
        },
        "threads": torch.get_num_threads(),
    } | environment(device)


def needed(config: ModelConfig, passes: Row) -> int:
    """Operations of the decoder's weights in all passes and their backward: 6 a weight and token,
    as trainers count them; heads, attention's own products and rollouts are left out, and a pass
    that has no backward (a reference's) counts a third of that too much."""
    return 6 * Weights.of(config).body * passes.payload.get("tokens", 0)
