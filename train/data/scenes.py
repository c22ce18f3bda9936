"""ShapesWorld's scenes on disk, so that they are drawn and judged only once."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from echogen.engine.cache_folder import cache_path
from echogen.engine.checkpoints.shards import replace_file
from echogen.train.data import grammar, parts, shapes
from echogen.train.data.canvas import draw
from echogen.train.data.shapes import IMAGE_SIZE, DrawStatistics, Object, Scene, sample_scene

_CHUNK = 500
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def world_version() -> str:
    """Hash of the code that decides what a scene is; part of every cache's name. Layout, comments
    and docstrings do not count."""
    from echogen.train.eval import judge

    digest = hashlib.blake2b(digest_size=6)
    for module in (shapes, grammar, judge):
        tree = ast.parse(Path(str(module.__file__)).read_bytes())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [n for n in body if not _is_text(n)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


_Drawn = tuple[list[list[tuple[str, str, str, tuple[int, ...]]]], DrawStatistics]


def _draw(split: str, indices: range) -> _Drawn:
    tally = DrawStatistics()
    scenes = [sample_scene(split, i, statistics=tally) for i in indices]
    return [[(o.shape, o.color, o.texture, o.box) for o in s.objects] for s in scenes], tally


def _place(split: str, count: int) -> Path:
    # The 0 is the seed; there is only one.
    return cache_path(f"scenes-{world_version()}-{split}-{count}-0.jsonl")


def load_scenes(split: str, count: int) -> list[Scene]:
    """Scenes 0 … count-1 of a split, from the cache or drawn now (on all cores) and cached, part by
    part, so that a killed run's work is not repeated. Counts of why proposals were drawn again are
    kept beside them (see `load_statistics`)."""
    path = _place(split, count)
    if not path.exists():
        chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]

        def drawn(missing: list[range], tell: Callable[[int], None]) -> Iterator[bytes]:
            for part, (scenes, tally) in zip(missing, _draw_all(split, missing), strict=True):
                tell(len(part))
                lines = [json.dumps(line) + "\n" for line in (*scenes, asdict(tally))]
                yield "".join(lines).encode()

        what = ("drawing", f"{split} scenes")
        made = parts.gathered(path, what, chunks, drawn, bytes, _whole)
        cut = [data.splitlines(keepends=True) for data in made]
        total = Counter[str]()
        for *_, tally in cut:
            total.update(json.loads(tally))
        replace_file(_statistics_beside(path), (json.dumps(total) + "\n").encode())
        replace_file(path, b"".join(line for lines in cut for line in lines[:-1]))
        parts.drop(path, chunks)
    return [
        Scene(tuple(Object(s, c, t, tuple(b)) for s, c, t, b in json.loads(line)))
        for line in path.read_text().splitlines()
    ]


def load_statistics(split: str, count: int) -> DrawStatistics | None:
    """Counts of why proposals were drawn again when the scenes of `load_scenes` were made: counting
    later would mean drawing again, 3 to 10 s for 400 test scenes. None if older code made the
    scenes."""
    path = _statistics_beside(_place(split, count))
    return DrawStatistics(**json.loads(path.read_text())) if path.exists() else None


def _statistics_beside(path: Path) -> Path:
    return path.with_suffix(".draws.json")


def _draw_all(split: str, chunks: list[range]) -> Iterator[_Drawn]:
    if len(chunks) < 2:
        yield from (_draw(split, chunk) for chunk in chunks)
        return
    count = min(os.cpu_count() or 1, len(chunks))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, initializer=_follow, initargs=(os.getpid(),)) as pool:
        # Not map, which cancels pending jobs: a pool with a dead worker fails on that.
        try:
            with _held_back(signal.SIGINT, signal.SIGTERM):
                jobs = [pool.submit(_draw, split, chunk) for chunk in chunks]
            for job in jobs:
                yield job.result()
        except BaseException:  # otherwise a signal would wait for the chunks under way
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


@contextmanager
def _held_back(*signals: signal.Signals) -> Iterator[None]:
    """Delay signals until the end of the block, in which workers are started. A signal between a
    fork and the worker's entry among the children would leave a worker that nobody ends and
    everyone waits for. And until a worker has its own handlers (`_follow`), it would react with its
    parent's. Because the signals are blocked, they wait in a worker too; the handlers record those
    that reach a thread which does not block them."""
    if threading.current_thread() is not threading.main_thread():  # no other has handlers
        yield
        return
    came = list[int]()
    handlers = {s: signal.signal(s, lambda number, _: came.append(number)) for s in signals}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for held, handler in handlers.items():
            signal.signal(held, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def _follow(parent: int) -> None:
    """Prepare a worker to end with its parent. The parent may be killed without a chance to end the
    worker, which would then sleep for ever, holding what it inherited (pipes, locks). Only Linux
    can do this."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the parent's handlers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports Ctrl-C
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before that. Children of a fork server are not the parent's own.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent:
        os._exit(1)


def _whole(data: bytes, part: range) -> bytes | None:
    """The part, if it has a line for each scene and one of statistics; else None."""
    return data if data.count(b"\n") == len(part) + 1 and data.endswith(b"}\n") else None


def render(scenes: list[Scene], size: int = IMAGE_SIZE) -> np.ndarray:
    """Pictures of the scenes, uint8 [N, size, size, 3]; ``size`` is a multiple of 64."""
    return np.stack([draw(scene, size) for scene in scenes])
