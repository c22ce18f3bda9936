"""Data that takes minutes to make: those who wait are told, and a kill costs a part of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import echogen
from echogen.train.config import LoopConfig, VQConfig
from echogen.train.data import parts, samples, scenes
from echogen.train.data.shapes import draw_statistics, sample_scene
from echogen.train.run import progress
from echogen.train.stages.vq import build_vq

VQ = VQConfig(loop=LoopConfig(steps=1, lr=1e-3), codes=32, latent=32, multipliers=(1, 1, 1, 1))


DRAWING = """
import os, signal, sys, time
from echogen.train.data import scenes

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it

def slow(split, indices):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(600)

if __name__ == "__main__":
    scenes._CHUNK, scenes._draw, os.cpu_count = 1, slow, lambda: 2
    scenes.load_scenes("val", 8)
"""


class Killed(BaseException):
    """What ends a run in the middle of its work."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and small parts."""
    monkeypatch.setenv("ECHOGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scenes, "_CHUNK", 3)
    monkeypatch.setattr(samples, "_PART", 2)
    return tmp_path / "cache"


def lives(work: Any, times: int) -> Any:
    """The work, until it has been done so often."""
    left = iter(range(times))

    def once(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return work(*arguments)

    return once


def test_a_killed_run_encodes_on_from_its_parts_to_the_same_codes(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    vq, drawn = build_vq(VQ, 32).eval(), [sample_scene("train", i, judged=False) for i in range(11)]
    encode = samples.encode_image
    monkeypatch.setattr(samples, "_PART", 100)
    at_once = samples.load_codes(vq, "train", drawn, batch=2)
    (whole,) = cache.iterdir()
    whole.unlink()
    monkeypatch.setattr(samples, "_PART", 2)
    monkeypatch.setattr(samples, "encode_image", lives(encode, 5))
    with pytest.raises(Killed):
        samples.load_codes(vq, "train", drawn, batch=2)
    assert sorted(p.name for p in cache.iterdir()) == [
        f"{whole.stem}.0-4.part.npy",
        f"{whole.stem}.4-8.part.npy",
    ]
    capfd.readouterr()
    monkeypatch.setattr(samples, "encode_image", lives(encode, 2))  # of six batches
    assert np.array_equal(samples.load_codes(vq, "train", drawn, batch=2), at_once)
    told = capfd.readouterr().err.splitlines()
    assert told == [
        f"encoding 11 train pictures (8 of them are there already), once: kept in {whole}"
    ]
    assert list(cache.iterdir()) == [whole]


def test_a_killed_run_draws_scenes_on_from_its_parts(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw_all, asked = scenes._draw_all, []

    def two_of_them(split: str, chunks: list[range]) -> Iterator[Any]:
        yield from draw_all(split, chunks[:2])
        raise Killed

    def noted(split: str, chunks: list[range]) -> Iterator[Any]:
        asked.extend(chunks)
        return draw_all(split, chunks)

    monkeypatch.setattr(scenes, "_draw_all", two_of_them)
    with pytest.raises(Killed):
        scenes.load_scenes("val", 10)
    monkeypatch.setattr(scenes, "_draw_all", noted)
    assert scenes.load_scenes("val", 10) == [sample_scene("val", i) for i in range(10)]
    assert asked == [range(6, 9), range(9, 10)]
    assert len(list(cache.iterdir())) == 2  # the scenes and their statistics
    assert scenes.load_statistics("val", 10) == draw_statistics("val", 10)
    assert "drawing 10 val scenes (6 of them are there already)" in capfd.readouterr().err


def test_parts_that_another_run_drops_are_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came to its end after this one had looked for the whole."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(parts, "drop", lives(parts.drop, 0))
        scenes.load_scenes("val", 4)
    for path in [path for path in cache.iterdir() if ".part" not in path.name]:
        path.unlink()
    read = Path.read_bytes

    def late(path: Path) -> bytes:
        if ".part" in path.name:
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    assert scenes.load_scenes("val", 4) == [sample_scene("val", i) for i in range(4)]


def test_a_torn_part_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vq, drawn = build_vq(VQ, 32).eval(), [sample_scene("train", i, judged=False) for i in range(8)]
    monkeypatch.setattr(samples, "encode_image", lives(samples.encode_image, 7))
    whole = samples.load_codes(vq, "train", drawn, batch=2)
    (path,) = cache.iterdir()
    path.unlink()
    for part, damage in ((range(4), b""), (range(4, 8), samples._as_bytes(whole[4:6]))):
        parts.place(path, part).write_bytes(damage)
    with pytest.raises(Killed):  # four batches more are needed, and not only two
        samples.load_codes(vq, "train", drawn, batch=2)
    torn = scenes._whole(b'[["a"]]\n[["b"]]\n{"kept"', range(2))
    assert torn is None and scenes._whole(b"[]\n[]\n{}\n", range(2)) == b"[]\n[]\n{}\n"
    assert scenes._whole(b"[]\n[]\n", range(2)) is None  # as older code kept them


def test_of_scenes_that_older_code_kept_there_are_no_statistics(cache: Path) -> None:
    scenes.load_scenes("val", 3)
    (path,) = cache.glob("*.draws.json")
    path.unlink()
    assert len(scenes.load_scenes("val", 3)) == 3
    assert scenes.load_statistics("val", 3) is None


def test_where_there_is_no_terminal_a_line_now_and_then_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.telling("drawing", "scenes", 40_000, 10_000, Path("there"), True) as tell:
        for _ in range(30):
            clock[0] += 4.0
            tell(1000)
    assert capfd.readouterr().err.splitlines() == [
        "drawing 40,000 scenes (10,000 of them are there already), once: kept in there",
        "drawing scenes: 18,000 of 40,000, about 88 s left",
        "drawing scenes: 26,000 of 40,000, about 56 s left",
        "drawing scenes: 34,000 of 40,000, about 24 s left",
    ]


def test_little_work_is_done_without_a_word(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(scenes.load_scenes("val", 3)) == 3
    assert not capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "drawing.py"
    script.write_text(DRAWING)
    env = os.environ | {"PYTHONPATH": str(Path(echogen.__file__).parents[1])}
    with subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        workers = {int(run.stdout.readline()) for _ in range(2)}
        run.kill()
        try:
            out, _ = run.communicate(timeout=20)  # which ends when nobody holds the pipe
            assert len(workers) == 2 and not out
        finally:
            for worker in workers:
                if Path(f"/proc/{worker}").exists():
                    os.kill(worker, signal.SIGKILL)


def test_an_interrupted_run_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "drawing.py"
    script.write_text(DRAWING)
    env = os.environ | {"PYTHONPATH": str(Path(echogen.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen([sys.executable, script], env=env, **pipes) as run:
        assert run.stdout is not None
        run.stdout.readline()
        os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C does
        try:
            _, err = run.communicate(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
        assert err.decode().count("KeyboardInterrupt") == 1, err.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_worker_whose_parent_is_gone_already_ends() -> None:
    child = os.fork()
    if not child:
        scenes._follow(parent=os.getpid())  # which is not the one it has
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
