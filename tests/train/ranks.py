"""What test_distributed runs in each of two processes: runs of the toy model, one after another.

One start of the interpreter for all of them, since that is most of their time. Each run leaves its
folder below the one given; test_distributed reads them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from echogen.train.config import CycleRLConfig, DJOConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.data import pictures, samples, scenes
from echogen.train.eval import tables
from echogen.train.run.loop import run
from echogen.train.stages import cycle_rl, world
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.stage import TrainingError
from echogen.train.stages.vq import build_vq
from echogen.train.start import load_start

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
AVERAGED = dataclasses.replace(SHORT, ema=0.9, eval_every=1)
"""Between its rollouts the engine draws with the average."""
MANY = dataclasses.replace(
    LOOP, steps=4, muon_lr=2e-3, ema=0.9, accumulate=2, checkpoint_activations=True, eval_every=4,
    save_every=4,
)  # fmt: skip
SMALL: list[tuple[Any, str, Any]] = [
    (world, "VAL_SAMPLES", 2),
    (world, "PICTURES", 1),
    (cycle_rl, "VAL_LAYOUTS", 2),
    (tables, "judge_boxes", lambda images, scenes: {}),  # half of the time of these runs
    (samples, "world_version", cache(scenes.world_version)),
    (scenes, "world_version", cache(scenes.world_version)),
]
"""What the runs do without: many validation samples, the judge."""
PMTP = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "bins": 17, "scenes": 24}


def pmtp(loop: LoopConfig, **settings: Any) -> PMTPStage:
    """Stage 1 whose parts hold different numbers of targets."""
    torch.manual_seed(0)
    vq = build_vq(VQConfig(loop=loop, codes=32, latent=32, multipliers=(1, 1, 1, 1)), 32)
    config = PMTPConfig(loop=loop, batch=4, branches=3, **PMTP, **settings)
    return PMTPStage(config, vq)


def djo(start: Path, loop: LoopConfig, **settings: Any) -> DJOStage:
    """Stage 2; half of the prompts are dropped, so that parts without a loop occur."""
    config = DJOConfig(loop=loop, scenes=24, batch=2, prompt_dropout=0.5, **settings)
    return DJOStage(config, load_start(start, "pmtp"))


def rl(start: Path, loop: LoopConfig, **settings: Any) -> CycleRLStage:
    """Stage 3, both policies, with a reference."""
    small = {"scenes": 24, "batch": 2, "group": 3, "gate_scenes": 2, "gate_group": 2, "force": True}
    config = CycleRLConfig(loop=loop, policy="both", normalise="token", **small | settings)
    begun = load_start(start, "djo", any_stage=True)
    begun.engine.transformer.initialise(0, std=0.2)
    return CycleRLStage(config, begun)


def adapted(start: Path, loop: LoopConfig) -> PMTPStage:
    """Stage 1 gone on with, on adapters."""
    return PMTPStage(PMTPConfig(loop=loop, scenes=24, batch=4), load_start(start, "pmtp"))


def with_parallel(loop: LoopConfig, parallel: str) -> LoopConfig:
    """The loop, its processes sharing the weights in this way."""
    return dataclasses.replace(loop, parallel=parallel)  # type: ignore[arg-type]


def stages(start: Path, parallel: str) -> dict[str, Any]:
    """The runs that are compared between one process and two."""
    loops = (LOOP, SHORT, AVERAGED, MANY)
    long, short, averaged, many = (with_parallel(x, parallel) for x in loops)
    return {
        "pmtp": lambda: pmtp(long),
        "many": lambda: pmtp(many, mask="shared", prompt_dropout=0.3),
        "djo": lambda: djo(start, short),
        "sampled": lambda: djo(start, short, prefix="sampled"),
        "rl": lambda: rl(start, averaged),
        "rl parts": lambda: rl(start, dataclasses.replace(short, accumulate=2), batch=4),
        "lora": lambda: adapted(start, dataclasses.replace(short, lora=4, save_every=1)),
    }


def run_all(start: Path, out: Path, parallel: str, names: tuple[str, ...] = ()) -> None:
    """Every stage, or those named, to its end."""
    for name, build in stages(start, parallel).items():
        if not names or name in names:
            stage = build()
            run(stage, stage.config.loop, out / name)


def broken(start: Path, folder: Path) -> None:
    """Stage 3, whose loss is NaN at step 1, by the rollout of the second process."""
    stage: Any = rl(start, with_parallel(SHORT, "ddp"))
    loss_part = stage.loss_part

    def nan(step: int, part: int, parts: int) -> Any:
        loss, numbers = loss_part(step, part, parts)
        return loss * (float("nan") if (step, part) == (1, 1) else 1.0), numbers

    stage.loss_part = nan
    with suppress(TrainingError):
        run(stage, stage.config.loop, folder)


def resumed(start: Path, begun: Path, folder: Path, parallel: str) -> None:
    """Go on with a run of stage 1 from its last state but one, in another folder."""
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(begun, folder)
        for name in ("state.pt", "model"):
            there = folder / name
            shutil.rmtree(there) if there.is_dir() else there.unlink()
        os.replace(folder / "state.prev.pt", folder / "state.pt")
    if "RANK" in os.environ:
        dist.barrier()
    stage = stages(start, parallel)[begun.name]()
    run(stage, stage.config.loop, folder, resume=True)


def looked_at(out: Path) -> None:
    """A folder of pictures as each process sees it, and how many of them it opens."""
    rank, folder, seen, look = os.environ["RANK"], out / "mine", [], pictures._looked_at
    if rank == "0":  # the others are told what there is
        folder.mkdir()
        lines = []
        for i in range(3):
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(folder / f"{i}.png")
            objects = [{"expr": "it", "box": [0, 0, 1, 1]}]
            lines.append(json.dumps({"image": f"{i}.png", "caption": "one", "objects": objects}))
        (folder / "layouts.jsonl").write_text("\n".join(lines))
    pictures._looked_at = lambda path: seen.append(path) or look(path)
    source = pictures.Pictures(folder)
    told = [(e.path.name, e.digest, e.layout.to_dict()) for e in source._entries]
    told += [source.fingerprint]
    (out / f"pictures-{rank}.json").write_text(json.dumps({"told": told, "opened": len(seen)}))


def main(start: Path, out: Path) -> None:
    """Everything that two processes do."""
    looked_at(out)
    for module, name, value in SMALL:
        setattr(module, name, value)
    run_all(start, out / "ddp", "ddp", ("pmtp", "many", "djo", "rl", "rl parts"))
    broken(start, out / "ddp" / "broken")
    run_all(start, out / "fsdp", "fsdp", ("pmtp", "many", "sampled", "rl", "rl parts", "lora"))
    while not (out / "none" / "done").exists():  # by the test itself, beside these two
        time.sleep(0.05)
    resumed(start, out / "none" / "pmtp", out / "none-to-ddp", "ddp")
    resumed(start, out / "none" / "pmtp", out / "none-to-fsdp", "fsdp")
    resumed(start, out / "fsdp" / "pmtp", out / "fsdp-to-ddp", "ddp")
    resumed(start, out / "none" / "lora", out / "lora-none-to-fsdp", "fsdp")
    resumed(start, out / "fsdp" / "lora", out / "lora-fsdp-to-ddp", "ddp")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
