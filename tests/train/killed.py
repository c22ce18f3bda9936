"""Runs that come to a bad end, for test_faults.py and test_fault_ranks.py: a process that forks a
child for each of them.

Torch is imported once, so that a run takes a fraction of a second. On stdin one JSON object a run,
on stdout one that says how it ended: {"signal": …, "code": …}, or in several processes a list.

    folder, resume: of the run.
    ranks: processes of the run; each has a log of its own.
    rank: of the one that all of this but ``nan`` is about (0).
    kill: [place, count]: the child sends itself SIGKILL the count-th time it comes by a place.
    term: [place, count]: the same with SIGTERM.
    fail: the same with an error, as of a device that is out of memory.
    hang: the same, and the thread that comes by never returns.
    no_room: the same, and from there on metrics.jsonl is on a full device; what it held is kept.
    last_write: in place of LAST_WRITE, in all processes.
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
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echogen.train.__main__ import leaving
from echogen.train.config import LoopConfig
from echogen.train.parallel import distributed
from echogen.train.run import checkpoint
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import TrainingError, run
from echogen.train.run.metrics import MetricsFile
from echogen.train.run.stop import Stopped

CONFIG = LoopConfig(
    steps=14, lr=1e-2, muon_lr=1e-2, warmup=2, log_every=1, eval_every=4, save_every=3, threads=1,
    ema=0.9, accumulate=2, decay_shape="cosine",
)  # fmt: skip
OF_ALL = {"folder", "resume", "ranks", "updates", "nan", "last_write"}
"""What of an order is about every process."""
PATIENCE = 100
"""Seconds after which a run that hangs is ended by SIGALRM."""


@dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig
    updates: int = 1


class Toy:
    """Regression on noise keyed by the step, through dropout, which reads torch's random state."""

    name, selects, continues = "toy", "score", True

    def __init__(self, order: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.config, self.order, self.passed = (
            ToyConfig(CONFIG, order.get("updates", 1)),
            order,
            Counter[str](),
        )
        self.taken: dict[int, dict[str, Tensor]] = {}
        self.module = nn.Sequential()
        self.module.blocks = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 1)])

    def passes(self, place: str) -> None:
        """Come by a place, where an order may end the process."""
        self.passed[place] += 1
        ends = [how for how, at in self.order.items() if at == [place, self.passed[place]]]
        if "kill" in ends:
            os.kill(os.getpid(), signal.SIGKILL)
        if "term" in ends:
            os.kill(os.getpid(), signal.SIGTERM)
        if "fail" in ends:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "hang" in ends:
            threading.Event().wait()
        if "no_room" in ends:
            metrics = Path(self.order["folder"]) / "metrics.jsonl"
            metrics.rename(metrics.with_suffix(".kept"))
            metrics.symlink_to("/dev/full")

    def begin(self) -> dict[str, float]:
        self.passes("begin")
        self.passes("begun")
        return {"found": 0.25}

    def inputs(self, step: int) -> dict[str, Tensor]:
        """The batch, and as in Cycle RL what this process has taken of it, part by part."""
        return {"x": self.batch(step)} | self.taken.get(step, {})

    def batch(self, step: int) -> Tensor:
        return torch.randn(8, 48, generator=torch.Generator().manual_seed(step))

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.loss_part(step, 0, 1)

    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        self.passes("loss")
        if step == self.order.get("full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        x = self.batch(step)[part::parts]
        self.taken.setdefault(step, {})[f"part {part} of {parts}"] = x
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
        stage.passes(f"before {Path(target).name}")
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


def child(order: dict[str, Any], rank: int = 0) -> int:
    """Run, in a process of its own; the exit code."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"log{rank}" if "ranks" in order else "log"
    log = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if rank != order.get("rank", 0):
        order = {what: order[what] for what in order.keys() & OF_ALL}
    distributed.LAST_WRITE = order.get("last_write", distributed.LAST_WRITE)
    stage = Toy(order)
    with_places(stage)
    try:
        run(stage, CONFIG, folder, order.get("resume", False))
        if not rank:
            (folder / "passed.json").write_text(json.dumps(stage.passed))
    except Stopped as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    except (StateError, TrainingError) as error:
        print(type(error).__name__, error)
        return 2
    return 0


def begun(order: dict[str, Any], rank: int = 0, **environment: str) -> int:
    """The id of a process that carries an order out."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.environ |= environment
        signal.alarm(PATIENCE)
        with leaving():
            code = child(order, rank)
            sys.exit(code)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> dict[str, Any]:
    """How a process came to its end."""
    status = os.waitpid(pid, 0)[1]
    dead = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return {"signal": dead, "code": code}


def several(order: dict[str, Any]) -> list[dict[str, Any]]:
    """How the processes of a run ended, that torchrun would start."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    count = order["ranks"]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = [begun(order, rank, **common, RANK=str(rank)) for rank in range(count)]
    return [ended(pid) for pid in pids]


def main() -> None:
    """Take orders until stdin ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "ranks" in order:
            print(json.dumps(several(order)), flush=True)
            continue
        pid = begun(order)
        if "after" in order:
            time.sleep(order["after"])
            os.kill(pid, order.get("signal", signal.SIGKILL))
        print(json.dumps(ended(pid)), flush=True)


if __name__ == "__main__":
    main()
