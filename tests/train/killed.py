"""Runs that come to a bad end, for test_faults.py: a process that forks a child for each of them.

Torch is imported once, so that a run takes a fraction of a second. On stdin one JSON object a run,
on stdout one that says how it ended: {"signal": …, "code": …}.

    folder, resume: of the run.
    kill: [place, count]: the child sends itself SIGKILL the count-th time it comes by a place.
    term: [place, count]: the same with SIGTERM.
    after: seconds after which this process sends it ``signal`` (SIGKILL).
    full: step at which the disk becomes full (nothing above 20 kB can be written any more).
    nan: step whose loss is NaN.
    updates: steps on one rollout, between which no run can be resumed.

A run that comes to its end leaves in passed.json how often it came by each place.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echogen.train.config import LoopConfig
from echogen.train.run import checkpoint
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import TrainingError, run
from echogen.train.run.metrics import MetricsFile
from echogen.train.run.stop import Stopped

CONFIG = LoopConfig(
    steps=14, lr=1e-2, muon_lr=1e-2, warmup=2, log_every=1, eval_every=4, save_every=3, threads=1,
    ema=0.9, accumulate=2, decay_shape="cosine",
)  # fmt: skip


@dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig
    updates: int = 1


class Toy:
    """Regression on noise keyed by the step, through dropout, which reads torch's random state."""

    name, selects = "toy", "score"

    def __init__(self, order: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.config, self.order, self.passed = (
            ToyConfig(CONFIG, order.get("updates", 1)),
            order,
            Counter[str](),
        )
        self.module = nn.Sequential()
        self.module.blocks = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 1)])

    def passes(self, place: str) -> None:
        """Come by a place, where an order may end the process."""
        self.passed[place] += 1
        for name, number in (("kill", signal.SIGKILL), ("term", signal.SIGTERM)):
            if self.order.get(name) == [place, self.passed[place]]:
                os.kill(os.getpid(), number)

    def begin(self) -> dict[str, float]:
        self.passes("begin")
        return {"found": 0.25}

    def inputs(self, step: int) -> dict[str, Tensor]:
        return {"x": torch.randn(8, 48, generator=torch.Generator().manual_seed(step))}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.loss_part(step, 0, 1)

    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        self.passes("loss")
        if step == self.order.get("full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        x = self.inputs(step)["x"][part::parts]
        hidden = torch.dropout(self.module.blocks[0](x).relu(), 0.5, True)
        loss = (self.module.blocks[1](hidden) - x[:, :1]).float().square().sum() / 8
        if step == self.order.get("nan") and part == parts - 1:
            loss = loss * float("nan")
        return loss, {"loss": float(loss.detach())}

    def after_step(self, step: int) -> None:
        self.passes("after step")
        self.done = step + 1

    def evaluate(self) -> dict[str, float]:
        self.passes("evaluation")
        weight = float(self.module.blocks[0].weight.detach().sum())
        return {"weight": weight, "score": -abs(weight - 1)}

    def export(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.module.state_dict(), folder / "weights.pt")
        self.passes("export")


def with_places(stage: Toy) -> None:
    """Places in the middle of writing: of a state (half of it is there), before it is renamed and
    behind it, and of a line of metrics."""
    save, replace, fsync, append = torch.save, os.replace, os.fsync, MetricsFile._append

    def half_saved(state: Any, file: Any) -> None:
        if isinstance(file, Path):  # the exported weights
            return save(state, file)
        stage.passes("save")
        if stage.order.get("kill", [""])[0] == "torn save":
            save(state, file.name + ".whole")
            whole = Path(file.name + ".whole").read_bytes()
            file.write(whole[: len(whole) // 2])
            file.flush()
            stage.passes("torn save")
            os.unlink(file.name + ".whole")
            file.seek(0)
            file.truncate()
        return save(state, file)

    def replaced(source: Any, target: Any) -> None:
        stage.passes("before rename")
        replace(source, target)
        stage.passes("behind rename")

    def synced(handle: int) -> None:
        stage.passes("sync")
        fsync(handle)

    def appended(self: MetricsFile, text: str, sync: bool = False) -> None:
        stage.passes("line")
        if stage.order.get("kill", [""])[0] == "torn line":
            append(self, text[: len(text) // 2])
            stage.passes("torn line")
            text = text[len(text) // 2 :]
        append(self, text, sync)

    torch.save = half_saved
    checkpoint.os.replace, checkpoint.os.fsync = replaced, synced
    MetricsFile._append = appended  # type: ignore[method-assign]


def child(order: dict[str, Any]) -> int:
    """Run, in a process of its own; the exit code."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stage = Toy(order)
    with_places(stage)
    try:
        run(stage, CONFIG, folder, order.get("resume", False))
        (folder / "passed.json").write_text(json.dumps(stage.passed))
    except Stopped as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    except (StateError, TrainingError) as error:
        print(type(error).__name__, error)
        return 2
    return 0


def main() -> None:
    """Take orders until stdin ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = child(order)
            finally:
                sys.stdout.flush()
                os._exit(code)
        if "after" in order:
            time.sleep(order["after"])
            os.kill(pid, order.get("signal", signal.SIGKILL))
        status = os.waitpid(pid, 0)[1]
        dead = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        print(json.dumps({"signal": dead, "code": code}), flush=True)


if __name__ == "__main__":
    main()
