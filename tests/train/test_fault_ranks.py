"""What ends one of several processes ends them all, with its message, and the run goes on from
there as if nothing had happened."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from echogen.train.run.checkpoint import load_state
from echogen.train.run.dump import repeat_dump
from echogen.train.run.metrics import TIMED

Order = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(order: Any) -> Order:
    """``ranks(folder, **how)`` runs the toy stage of killed.py in two processes."""
    return lambda folder, **how: order(folder, ranks=2, **how)


@pytest.fixture(scope="module")
def whole(ranks: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert codes(ranks(folder)) == [0, 0], log(folder, 0)
    return folder


def codes(ends: list[dict[str, Any]]) -> list[int | None]:
    return [end["code"] for end in ends]


def log(folder: Path, rank: int) -> str:
    return (folder / f"log{rank}").read_text()


def saved(folder: Path) -> int:
    """Behind how many steps the last state is."""
    return int(load_state(folder / "state.pt" / "rest.pt")["step"])


def goes_on(ranks: Order, folder: Path, whole: Path) -> None:
    """Resumed, a run has the metrics and the model of an uninterrupted one."""
    assert codes(ranks(folder, resume=True)) == [0, 0], log(folder, 0)
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMED}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (folder, whole)
    ]
    assert rows[0] == rows[1]
    models = [torch.load(run / "model" / "weights.pt") for run in (folder, whole)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[1])
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_said_and_ends_all(
    ranks: Order, whole: Path, tmp_path: Path, rank: int
) -> None:
    """The other one waits in the step's sums, and the checkpoint behind step 3 may be under way."""
    assert codes(ranks(tmp_path, rank=rank, fail=["loss", 7])) == [1, 1]
    assert log(tmp_path, rank).endswith("OutOfMemoryError: CUDA out of memory\n")
    assert saved(tmp_path) == 3
    goes_on(ranks, tmp_path, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_and_ends_all(ranks: Order, whole: Path, tmp_path: Path) -> None:
    """Only the first process writes metrics."""
    assert codes(ranks(tmp_path, no_room=["line", 7])) == [2, 1]
    metrics = tmp_path / "metrics.jsonl"
    last = log(tmp_path, 0).splitlines()[-1]
    assert last == (
        f"StateError {metrics}: cannot be written (No space left on device); make room and go on "
        f"with --resume"
    )
    metrics.with_suffix(".kept").replace(metrics)
    goes_on(ranks, tmp_path, whole)


def test_a_shard_that_cannot_be_written_ends_all_with_one_error(
    ranks: Order, whole: Path, tmp_path: Path
) -> None:
    assert codes(ranks(tmp_path, rank=1, fail=["save", 1])) == [2, 2]
    for rank in (0, 1):
        last = log(tmp_path, rank).splitlines()[-1]
        assert last.startswith(f"StateError {tmp_path / 'state.pt'}: cannot be written (process 1")
    goes_on(ranks, tmp_path, whole)


@pytest.mark.parametrize(
    ("rank", "place"), [(1, ["save", 15]), (0, ["before state.pt", 2])], ids=["shard", "rename"]
)
def test_a_process_killed_while_a_checkpoint_is_written(
    ranks: Order, whole: Path, tmp_path: Path, rank: int, place: list[Any]
) -> None:
    """In the middle of a shard of the second one, and before it gets its name."""
    ends = ranks(tmp_path, rank=rank, kill=place)
    assert ends[rank]["signal"] == signal.SIGKILL and ends[1 - rank]["code"] == 1
    assert (tmp_path / "state.pt.part").is_dir()
    there = "state.pt" if rank else "state.prev.pt"
    assert load_state(tmp_path / there / "rest.pt")["step"] == 3
    goes_on(ranks, tmp_path, whole)


def test_a_checkpoint_that_hangs_does_not_hold_an_error_up(ranks: Order, tmp_path: Path) -> None:
    """Nor does its thread, which the interpreter would join."""
    ends = ranks(tmp_path, hang=["save", 3], fail=["loss", 7], last_write=0.2)
    assert codes(ends) == [1, 1]
    told = log(tmp_path, 0)
    assert "state.pt: not written in 0.2 seconds, and given up" in told
    assert told.endswith("OutOfMemoryError: CUDA out of memory\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_stops_all_behind_the_step(
    ranks: Order, whole: Path, tmp_path: Path, rank: int
) -> None:
    assert codes(ranks(tmp_path, rank=rank, term=["loss", 7])) == [143, 143]
    asked = "a signal to another process" if rank else "SIGTERM"
    assert log(tmp_path, 0).splitlines()[-1] == (
        f"toy: stopped by {asked}; the state of step 4 is saved in {tmp_path / 'state.pt'}; go on "
        f"with --resume"
    )
    assert saved(tmp_path) == 4
    goes_on(ranks, tmp_path, whole)


def test_sigterm_in_the_validation_before_the_first_step_stops_all(
    ranks: Order, whole: Path, tmp_path: Path
) -> None:
    """The first process validates, and the other one waits for it."""
    assert codes(ranks(tmp_path, term=["evaluation", 1])) == [143, 143]
    assert "stopped by SIGTERM; no step was done yet" in log(tmp_path, 0)
    assert not (tmp_path / "state.pt").exists()
    goes_on(ranks, tmp_path, whole)


def test_a_nan_of_any_process_is_dumped_once_with_what_all_have_read(
    ranks: Order, whole: Path, tmp_path: Path, killed: Any
) -> None:
    assert codes(ranks(tmp_path, nan=7)) == [2, 2]  # in the second one's part
    dump = tmp_path / "dump-step7.pt"
    assert list(tmp_path.glob("dump*")) == [dump]
    assert str(dump) in log(tmp_path, 0).splitlines()[-1]
    assert saved(tmp_path) == 6
    names = {"x", *(f"part {part} of 4" for part in range(4))}
    assert load_state(dump)["inputs"].keys() == names
    again = repeat_dump(killed.Toy({"nan": 7}), killed.CONFIG, dump)  # by one process
    assert again.same_inputs and again.loss != again.loss
    goes_on(ranks, tmp_path, whole)
