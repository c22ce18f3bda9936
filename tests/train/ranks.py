"""What test_distributed runs in each of two processes: runs of the toy model, one after another.

One start of the interpreter for all of them, since that is most of their time. Each run leaves its
folder below the one given; test_distributed reads them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from echogen.train import cycle_rl, world
from echogen.train.config import CycleRLConfig, DJOConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.cycle_rl import CycleRLStage
from echogen.train.djo import DJOStage
from echogen.train.loop import run
from echogen.train.pmtp import PMTPStage
from echogen.train.start import load_start
from echogen.train.vq import build_vq

LOOP = LoopConfig(
    steps=20,
    lr=2e-3,
    warmup=2,
    bf16=False,
    log_every=1,
    eval_every=20,
    save_every=10,
    threads=1,
)
SHORT = dataclasses.replace(LOOP, steps=3, lr=2e-4, eval_every=3, save_every=3)
MANY = dataclasses.replace(
    LOOP, steps=4, muon_lr=2e-3, ema=0.9, accumulate=2, checkpoint_activations=True, eval_every=4,
    save_every=4,
)  # fmt: skip
PMTP = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "bins": 17, "scenes": 24}


class Interrupted(Exception):
    """A run that ends in the middle, in every process."""


class Interrupting(PMTPStage):
    """Stage 1 that ends where a test wants it to."""

    stop_at = -1

    def loss(self, step: int):
        self._stop(step)
        return super().loss(step)

    def loss_part(self, step: int, part: int, parts: int):
        self._stop(step)
        return super().loss_part(step, part, parts)

    def _stop(self, step: int) -> None:
        if step == self.stop_at:
            raise Interrupted


def pmtp(loop: LoopConfig, **settings: Any) -> Interrupting:
    """Stage 1 whose parts hold different numbers of targets."""
    torch.manual_seed(0)
    vq = build_vq(VQConfig(loop=loop, codes=32, latent=32, multipliers=(1, 1, 1, 1)), 32)
    config = PMTPConfig(loop=loop, batch=4, branches=3, **PMTP, **settings)
    return Interrupting(config, vq)


def djo(start: Path, loop: LoopConfig, **settings: Any) -> DJOStage:
    """Stage 2; half of the prompts are dropped, so that parts without a loop occur."""
    config = DJOConfig(loop=loop, scenes=24, batch=2, prompt_dropout=0.5, **settings)
    return DJOStage(config, load_start(start, "pmtp"))


def rl(start: Path, loop: LoopConfig, **settings: Any) -> CycleRLStage:
    """Stage 3, both policies, with a reference."""
    small = {"scenes": 24, "batch": 2, "group": 3, "gate_scenes": 2, "gate_group": 2, "force": True}
    config = CycleRLConfig(loop=loop, policy="both", normalise="token", **small, **settings)
    begun = load_start(start, "djo", any_stage=True)
    begun.engine.transformer.initialise(0, std=0.2)
    return CycleRLStage(config, begun)


def with_parallel(loop: LoopConfig, parallel: str) -> LoopConfig:
    """The loop, its processes sharing the weights in this way."""
    return dataclasses.replace(loop, parallel=parallel)  # type: ignore[arg-type]


def stages(start: Path, parallel: str) -> dict[str, Any]:
    """The runs that are compared between one process and two."""
    long, short, many = (with_parallel(x, parallel) for x in (LOOP, SHORT, MANY))
    return {
        "pmtp": lambda: pmtp(long),
        "many": lambda: pmtp(many, mask="shared", prompt_dropout=0.3),
        "djo": lambda: djo(start, short),
        "sampled": lambda: djo(start, short, prefix="sampled"),
        "rl": lambda: rl(start, short),
    }


def run_all(start: Path, out: Path, parallel: str) -> None:
    """Every stage, to its end."""
    for name, build in stages(start, parallel).items():
        stage = build()
        run(stage, stage.config.loop, out / name)


def interrupted(folder: Path, parallel: str, stop_at: int = 12) -> None:
    """A run of stage 1 that saved its state at step 10 and ended at ``stop_at``."""
    stage = pmtp(with_parallel(LOOP, parallel))
    stage.stop_at = stop_at
    try:
        run(stage, stage.config.loop, folder)
    except Interrupted:
        pass
    else:
        raise AssertionError("it should not have come to its end")
    while not (folder / "state.pt").exists():  # written in the background
        time.sleep(0.01)


def resumed(folder: Path, parallel: str) -> None:
    """Go on with it."""
    stage = pmtp(with_parallel(LOOP, parallel))
    run(stage, stage.config.loop, folder, resume=True)


def main(start: Path, out: Path) -> None:
    """Everything that two processes do."""
    world.VAL_SAMPLES = cycle_rl.VAL_LAYOUTS = 4
    torch.set_num_threads(1)
    took = {}
    for parallel in ("ddp", "fsdp"):
        began = time.perf_counter()
        run_all(start, out / parallel, parallel)
        interrupted(out / f"{parallel}-to-none", parallel)
        resumed(out / f"none-to-{parallel}", parallel)
        if parallel == "fsdp":
            interrupted(out / "fsdp-to-ddp", parallel)
        took[parallel] = time.perf_counter() - began
    resumed(out / "fsdp-to-ddp", "ddp")
    if os.environ["RANK"] == "0":
        (out / "took.json").write_text(json.dumps(took))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
