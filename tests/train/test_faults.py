"""Whatever ends a run, it goes on from there as if nothing had happened: real processes, killed."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from echogen.train.run.checkpoint import StateError, load_state, previous, put_back, save_state
from echogen.train.run.dump import repeat_dump
from echogen.train.run.metrics import TIMED
from echogen.train.run.stop import Stop

Order = Callable[..., dict[str, Any]]
SEED = 11
WRITING = ("torn save", "save", "sync", "before rename", "behind rename", "torn line")
PLACES = (*WRITING, "loss", "after step", "evaluation", "export", "begin")


@pytest.fixture(scope="module")
def whole(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert order(folder) == {"signal": None, "code": 0}, (folder / "log").read_text()
    return folder


def same_run(a: Path, b: Path) -> None:
    """Metrics but for the time, exported weights and states are equal bit by bit."""
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMED}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (a, b)
    ]
    assert rows[0] == rows[1]
    states = [load_state(folder / "state.pt") for folder in (a, b)]
    models = [torch.load(folder / "model" / "weights.pt") for folder in (a, b)]
    for one, other in (states, models):
        one, other = (dict(tensors(x)) for x in (one, other))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    left = [p.name for folder in (a, b) for p in folder.glob("*.part")]
    assert not left


def tensors(x: Any, at: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(x, torch.Tensor):
        yield at, x
    elif isinstance(x, dict):
        for key, value in x.items():
            yield from tensors(value, f"{at}.{key}")
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from tensors(value, f"{at}.{i}")


def passes(whole: Path, place: str) -> int:
    """How often an uninterrupted run comes by a place."""
    counts: dict[str, int] = json.loads((whole / "passed.json").read_text())
    return counts[{"torn save": "save", "torn line": "line"}.get(place, place)]


def moments(whole: Path) -> Iterator[dict[str, Any]]:
    """Pseudo-random moments to die at: places in the code, of which every second one is in the
    middle of writing, and points in time."""
    draw = random.Random(SEED)
    while True:
        for names in (WRITING, PLACES, WRITING, None):
            if names is None:
                yield {"after": draw.uniform(0.0, 0.2)}
            else:
                place = draw.choice(names)
                yield {"kill": [place, draw.randint(1, passes(whole, place))]}


def test_a_run_killed_at_twenty_moments_repeats_the_uninterrupted_one(
    order: Order, whole: Path, tmp_path: Path
) -> None:
    killed, writing, runs = 0, 0, 0
    folder, how = tmp_path / "0", moments(whole)
    while killed < 20:
        moment = next(how)
        ended = order(folder, resume=True, **moment)
        died = ended["signal"] == signal.SIGKILL
        assert died or ended["code"] == 0, (moment, (folder / "log").read_text())
        killed += died
        writing += died and moment.get("kill", [""])[0] in WRITING
        if not died:  # it had come to its end: the next one begins
            same_run(folder, whole)
            runs += 1
            folder = tmp_path / str(runs)
    assert order(folder, resume=True)["code"] == 0, (folder / "log").read_text()
    same_run(folder, whole)
    assert writing >= 5


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_the_last_passing_of_each_place(
    order: Order, whole: Path, tmp_path: Path, place: str
) -> None:
    ended = order(tmp_path, kill=[place, passes(whole, place)])
    assert ended["signal"] == signal.SIGKILL, (tmp_path / "log").read_text()
    assert order(tmp_path, resume=True)["code"] == 0, (tmp_path / "log").read_text()
    same_run(tmp_path, whole)


# --- asked to stop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "done"),
    [(["loss", 7], 4), (["after step", 6], 6), (["evaluation", 3], 8), (["evaluation", 5], 14)],
)
def test_sigterm_saves_at_the_end_of_the_step_and_says_so(
    order: Order, whole: Path, tmp_path: Path, place: list[Any], done: int
) -> None:
    assert order(tmp_path, term=place) == {"signal": None, "code": 143}
    assert load_state(tmp_path / "state.pt")["step"] == done
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == (
        f"toy: stopped by SIGTERM; the state of step {done} is saved in {tmp_path / 'state.pt'}; "
        f"go on with --resume"
    )
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == done
    assert order(tmp_path, resume=True)["code"] == 0
    same_run(tmp_path, whole)


def test_a_path_is_said_as_it_is(order: Order, tmp_path: Path) -> None:
    folder = tmp_path / "[bold] run [/1]"
    assert order(folder, term=["loss", 3])["code"] == 143
    assert str(folder / "state.pt") in (folder / "log").read_text()


def test_a_run_stops_where_it_can_be_gone_on_with(order: Order, tmp_path: Path) -> None:
    ended = order(tmp_path, term=["loss", 7], updates=3)  # in step 4
    assert ended["code"] == 143 and load_state(tmp_path / "state.pt")["step"] == 6
    assert order(tmp_path, resume=True, updates=3)["code"] == 0


def test_signals_at_any_time_lose_nothing(order: Order, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(SEED)
    for _ in range(5):
        number = draw.choice([signal.SIGTERM, signal.SIGINT])
        ended = order(tmp_path, resume=True, after=draw.uniform(0.03, 0.2), signal=number)
        # Before the run listens for it, a signal ends it as any other program.
        assert ended["code"] in (0, 128 + number) or ended["signal"] == number, ended
    assert order(tmp_path, resume=True)["code"] == 0
    same_run(tmp_path, whole)


@pytest.mark.parametrize(
    "at", [{"term": ["begin", 1], "kill": ["begun", 1]}, {"term": ["evaluation", 1]}]
)
def test_before_the_first_step_there_is_nothing_to_save(
    order: Order, whole: Path, tmp_path: Path, at: dict[str, Any]
) -> None:
    assert order(tmp_path, **at)["code"] == 143, "at once"
    assert "stopped by SIGTERM; no step was done yet" in (tmp_path / "log").read_text()
    assert not (tmp_path / "state.pt").exists()
    assert order(tmp_path, resume=True)["code"] == 0
    same_run(tmp_path, whole)


@pytest.mark.parametrize("place", [["evaluation", 1], ["save", 1], ["line", 2], ["loss", 1]])
def test_a_kill_around_the_validation_before_the_first_step(
    order: Order, whole: Path, tmp_path: Path, place: list[Any]
) -> None:
    """In it, while its weights or its line are written, and behind it."""
    assert order(tmp_path, kill=place)["signal"] == signal.SIGKILL
    assert not (tmp_path / "state.pt").exists()
    assert (tmp_path / "best.pt").exists() == (place[0] in ("line", "loss"))
    assert order(tmp_path, resume=True)["code"] == 0
    same_run(tmp_path, whole)


def test_a_second_interrupt_does_not_wait() -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_and_leaves_the_last_state(
    order: Order, whole: Path, tmp_path: Path
) -> None:
    assert order(tmp_path, full=7)["code"] == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == (
        f"StateError {tmp_path / 'state.pt'}: cannot be written (File too large); the previous "
        f"state is untouched, so make room and go on with --resume"
    )
    assert load_state(tmp_path / "state.pt")["step"] == 6
    assert not list(tmp_path.glob("*.part"))
    assert order(tmp_path, resume=True)["code"] == 0
    same_run(tmp_path, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_without_room_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    (tmp_path / "state.pt.part").symlink_to("/dev/full")
    with pytest.raises(StateError, match=r"state\.pt: .*No space left on device.*untouched"):
        save_state(path, {"step": 2, "x": torch.zeros(100_000)}, keep_previous=True)
    assert load_state(path)["step"] == 1 and not previous(path).exists()


def test_what_is_no_fault_of_the_disk_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, TypeError, AttributeError)) as caught:
        save_state(tmp_path / "state.pt", {"step": 1, "bad": lambda: 0})
    assert not isinstance(caught.value, StateError)


@pytest.mark.parametrize("last", ["file", "folder", "missing"])
@pytest.mark.parametrize("before", ["file", "folder"])
def test_the_state_before_is_put_back(tmp_path: Path, last: str, before: str) -> None:
    """Runs of one process keep a file, runs of several a folder, and one may go on as the other."""
    path = tmp_path / "state.pt"
    for place, kind in ((path, last), (previous(path), before)):
        if kind == "folder":
            place.mkdir()
            (place / "name").write_text(place.name)
        elif kind == "file":
            place.write_text(place.name)
    put_back(path)
    found = path / "name" if before == "folder" else path
    assert found.read_text() == "state.prev.pt" and not previous(path).exists()


@pytest.mark.parametrize("damage", ["torn", "missing", "empty"])
def test_a_run_outlasts_a_torn_state(
    order: Order, whole: Path, tmp_path: Path, damage: str
) -> None:
    assert order(tmp_path, kill=["loss", 23])["signal"] == signal.SIGKILL  # the state is of step 9
    state = tmp_path / "state.pt"
    assert load_state(state)["step"] == 9 and load_state(previous(state))["step"] == 6
    if damage == "missing":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[: 0 if damage == "empty" else -700])
    assert order(tmp_path, resume=True)["code"] == 0, (tmp_path / "log").read_text()
    told = (tmp_path / "log").read_text()
    assert "no whole training state" in told
    assert "going on from state.prev.pt, which is of step 6" in told
    same_run(tmp_path, whole)


@pytest.mark.parametrize("size", [0, 100, -700])
def test_the_advice_about_a_damaged_state_can_be_followed(
    order: Order, tmp_path: Path, size: int
) -> None:
    """Without --resume the folder is refused, since it holds a run."""
    assert order(tmp_path, kill=["loss", 11])["signal"] == signal.SIGKILL  # the state is of step 3
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:size])
    assert not previous(state).exists()
    assert order(tmp_path, resume=True)["code"] == 2
    told = (tmp_path / "log").read_text().splitlines()[-1]
    assert told.startswith(f"StateError {state}: no whole training state (")
    assert told.endswith("; it cannot be resumed: delete the folder or name another --out")
    assert "without" not in told and "()" not in told and ". " not in told and len(told) < 300


def test_two_torn_states_are_refused_and_left_alone(order: Order, tmp_path: Path) -> None:
    assert order(tmp_path, kill=["loss", 23])["signal"] == signal.SIGKILL
    state = tmp_path / "state.pt"
    for path in (state, previous(state)):
        path.write_bytes(path.read_bytes()[:-700])
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    assert order(tmp_path, resume=True)["code"] == 2
    assert "state.prev.pt: no whole training state" in (tmp_path / "log").read_text()
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")} == before


# --- losses that are not finite -------------------------------------------------------------------


def test_a_nan_loss_leaves_a_dump_that_repeats_it(
    order: Order, whole: Path, tmp_path: Path, killed: Any
) -> None:
    assert order(tmp_path, nan=7)["code"] == 2
    dump, state = tmp_path / "dump-step7.pt", load_state(tmp_path / "state.pt")
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert "loss nan" in last and "at step 7" in last and str(dump) in last
    assert state["step"] == 6 and f"the state of step 6 is kept in {tmp_path}" in last
    found = load_state(dump)
    assert found["step"] == 7 and "loss nan" in found["error"]
    assert torch.equal(found["inputs"]["x"], killed.Toy({}).inputs(7)["x"])

    again = repeat_dump(killed.Toy({"nan": 7}), killed.CONFIG, dump)
    assert again.step == 7 and again.loss != again.loss and again.same_inputs
    assert "blocks.0.weight" in again.broken and again.weights == []
    mended = repeat_dump(killed.Toy({}), killed.CONFIG, dump)
    row = next(
        row
        for row in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
        if row["step"] == 8 and "loss" in row
    )
    assert float(f"{mended.loss:.6g}") == row["loss"] and not mended.broken
    assert order(tmp_path, resume=True)["code"] == 0  # as if it had not happened
    same_run(tmp_path, whole)


def test_a_dump_that_cannot_be_repeated_is_refused(
    order: Order, tmp_path: Path, killed: Any
) -> None:
    order(tmp_path, nan=1)
    path = tmp_path / "dump-step1.pt"
    found = torch.load(path, weights_only=True)
    stage = killed.Toy({})
    stage.inputs = lambda step: {"x": torch.zeros(8, 48)}  # other data than then
    assert not repeat_dump(stage, killed.CONFIG, path).same_inputs
    found["module"]["blocks.1.bias"] += 1
    torch.save(found, path)
    with pytest.raises(StateError, match="not those of its fingerprint"):
        repeat_dump(stage, killed.CONFIG, path)
    torch.save(found | {"config": "{}"}, path)
    with pytest.raises(StateError, match=r"dump-step1\.pt: written by another run"):
        repeat_dump(stage, killed.CONFIG, path)
    save_state(tmp_path / "state.pt", {"step": 3})
    with pytest.raises(StateError, match="no dump of a step"):
        repeat_dump(stage, killed.CONFIG, tmp_path / "state.pt")
