"""What a run's files hold of a module that is partly frozen, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echogen.train.config import LoopConfig
from echogen.train.run.checkpoint import StateError, load_head, load_state, save_state
from echogen.train.run.loop import TrainingError, run
from echogen.train.run.weights import given_by_start

from .runs import rows, run_in_parts

CONFIG = LoopConfig(
    steps=6, lr=1e-2, warmup=1, log_every=1, eval_every=1, save_every=2, threads=1, bf16=False,
    ema=0.9,
)  # fmt: skip
WIDE = 512
FROZEN = "base.weight"


@dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig
    start: str


class Toy:
    """A small layer trained behind a large frozen one of its start, with a buffer that moves; its
    third step validates best."""

    name, selects = "toy", "score"

    def __init__(self, start: str = "0123", nan_at: int = -1) -> None:
        torch.manual_seed(0)
        self.config, self.nan_at = ToyConfig(CONFIG, start), nan_at
        self.module = nn.Sequential()
        self.module.base = nn.Linear(WIDE, WIDE, bias=False).requires_grad_(False)
        self.module.head = nn.Linear(WIDE, 1)
        self.module.register_buffer("seen", torch.zeros(()))

    def begin(self) -> dict[str, float]:
        return {}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(4, WIDE, generator=torch.Generator().manual_seed(step))
        loss = (self.module.head(self.module.base(x)) - x[:, :1]).square().mean()
        if step == self.nan_at:
            loss = loss * float("nan")
        return loss, {"loss": float(loss.detach())}

    def after_step(self, step: int) -> None:
        self.module.seen += 1
        self.done = step + 1

    def evaluate(self) -> dict[str, float]:
        return {"score": -abs(self.module.seen.item() - 3), "seen": self.module.seen.item()}

    def export(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.module.state_dict(), folder / "weights.pt")


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    save_state(path, state)


def with_everything(state: dict[str, Any]) -> None:
    """As files were before frozen weights were left out."""
    state["module"] = {FROZEN: Toy().module.state_dict()[FROZEN], **state["module"]}


def test_files_hold_what_is_trained(tmp_path: Path) -> None:
    run(Toy(), CONFIG, tmp_path)
    large = WIDE * WIDE * 4
    for name in ("state.pt", "state.prev.pt", "best.pt"):
        assert load_state(tmp_path / name)["module"].keys() == {"head.weight", "head.bias", "seen"}
        assert (tmp_path / name).stat().st_size < 0.05 * large
    exported = torch.load(tmp_path / "model" / "weights.pt")
    assert torch.equal(exported[FROZEN], Toy().module.state_dict()[FROZEN])


def test_without_a_start_files_hold_everything(tmp_path: Path) -> None:
    """The frozen weights are then those of a seed, or follow averages as the tokenizer's codes."""
    assert not given_by_start(Toy(start=""))
    run(Toy(start=""), CONFIG, tmp_path)
    for name in ("state.pt", "best.pt"):
        assert FROZEN in load_state(tmp_path / name)["module"]


def test_tied_weights_are_left_out_by_both_names() -> None:
    stage = Toy()
    stage.module.again = stage.module.base
    assert given_by_start(stage) == {FROZEN, "again.weight"}


@pytest.mark.parametrize("old", [False, True])
def test_a_run_resumes_on_its_start(tmp_path: Path, old: bool) -> None:
    run(Toy(), CONFIG, tmp_path / "whole")
    run_in_parts(Toy, CONFIG, tmp_path / "parts", 4)
    folder = tmp_path / "parts"
    if old:  # the state of step 4, and the best weights of step 3
        stopped = tmp_path / "old"
        with pytest.raises(TrainingError):
            run(Toy(nan_at=4), CONFIG, stopped)
        for name in ("state.pt", "best.pt"):
            rewritten(stopped / name, with_everything)
        run(Toy(), CONFIG, stopped, resume=True)
        folder = stopped
    assert rows(folder) == rows(tmp_path / "whole")
    assert rows(folder)[-1]["chosen_step"] == 3
    for name in ("state.pt", "best.pt"):
        found, wanted = (load_state(run / name)["module"] for run in (folder, tmp_path / "whole"))
        assert all(torch.equal(found[n], w) for n, w in wanted.items())
    models = [torch.load(run / "model" / "weights.pt") for run in (folder, tmp_path / "whole")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][n], w) for n, w in models[1].items())


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda s: s["module"].pop("head.weight"), r"state lacks head\.weight; another"),
    "buffer": (lambda s: s["module"].pop("seen"), r"state lacks seen; another version"),
    "several": (lambda s: s["module"].clear(), r"state lacks seen and 2 more; another"),
    "unknown": (
        lambda s: s["module"].update(tail=torch.zeros(1)),
        r"state has the unknown tail; another version of EchoGen or peft wrote it: use that one",
    ),
    "shape": (
        lambda s: s["module"].update({"head.bias": torch.zeros(2)}),
        r"state has another shape of head\.bias;",
    ),
    "average": (lambda s: s["average"].pop("head.bias"), r"moving average lacks head\.bias;"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    change, told = UNFIT[case]
    with pytest.raises(TrainingError):
        run(Toy(nan_at=4), CONFIG, tmp_path)
    rewritten(tmp_path / "state.pt", change)
    with pytest.raises(StateError, match=told):
        run(Toy(), CONFIG, tmp_path, resume=True)


def test_best_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        run(Toy(nan_at=4), CONFIG, tmp_path)
    rewritten(tmp_path / "best.pt", lambda state: state["module"].pop("head.bias"))
    with pytest.raises(StateError, match=r"best\.pt lacks head\.bias;"):
        run(Toy(), CONFIG, tmp_path, resume=True)


def test_a_state_of_another_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        run(Toy(nan_at=4), CONFIG, tmp_path)
    with pytest.raises(StateError, match=r"another run \(start 0123 → 4567\)"):
        run(Toy("4567"), CONFIG, tmp_path, resume=True)


def test_the_head_of_a_state_is_read_without_its_tensors(tmp_path: Path) -> None:
    path, told = tmp_path / "best.pt", Path("/proc/self/io")
    head = {"stage": "toy", "step": 3, "value": 0.5}
    save_state(path, head | {"module": {"w": torch.zeros(1 << 20)}})
    load_head(path)  # imports what reading takes
    before = told.read_text() if told.exists() else ""
    assert load_head(path) == head
    if before:  # "rchar: BYTES" that read() returned, from the disk or not
        read = [int(text.split()[1]) for text in (before, told.read_text())]
        assert read[1] - read[0] < path.stat().st_size / 20
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(StateError, match=r"best\.pt: no whole training state"):
        load_head(path)
