"""The cost of HTTP: the same pictures from the engine, from its scheduler, and over a socket.

Each way ends with the bytes of a PNG. Clients and server share one process, so the clients' own
work counts too: the figures over HTTP are an upper bound of what the server adds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.table import Table

from echogen.bench.harness import (
    WrongResult,
    alternate,
    environment,
    quantiles,
    seconds,
    threads,
)
from echogen.bench.speed.arrivals import milliseconds, percentiles
from echogen.engine.decoding.decode import Progress
from echogen.engine.engine import Engine
from echogen.engine.http.app import make_app
from echogen.engine.http.connection import Connection
from echogen.engine.http.wire import encoded
from echogen.engine.layout import Layout
from echogen.engine.serving.scheduler import Scheduler
from echogen.train.data.scenes import load_scenes

ENGINE, SCHEDULER, HTTP = "engine", "scheduler", "HTTP"
QUEUE = 1024

Draw = Callable[[Layout, int], bytes]
"""Draws a layout with a seed, as a PNG."""


def measure(
    model: str = "tiny",
    images: int = 200,
    clients: Sequence[int] = (4, 16),
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time pictures of ShapesWorld's test split with the model's own settings: one after another,
    and from many clients at once. It uses one CPU thread and float32; JSON-ready.

    Args:
        model: what ``Engine.from_pretrained`` takes.
        images: number that each way draws one after another, in turn; and that all clients together
            draw each way, ``repeats`` times.
        clients: how many there are at once, one number after another. Each sends its next request
            as soon as it gets an answer; the scheduler has as many slots as the most of them need.
        repeats: of the clients' runs.
        seed: of the noise.
        progress: called with (runs done, runs in all).

    Returns:
        ``alone``: for each way, the seconds per picture (median, quantiles 0.2 and 0.8); ``many``:
        the same for all pictures of the most ``clients``, and pictures per second; ``ratio_alone``
        and ``ratio_many``: HTTP's time over the scheduler's, medians over the pairs; ``latency``:
        for each number of clients and way, pictures per second and quantiles of a picture's seconds
        (``latency_p50_s`` …, None where too few are beyond; `arrivals.percentiles`), each client's
        first picture left out.

    Raises:
        WrongResult: HTTP returns other bytes than the scheduler; nothing was timed.
        ValueError: images, clients or repeats are out of range.
        CheckpointError: there is no such checkpoint.
    """
    most = max(clients, default=0)
    for name, value in (
        ("images", images), ("clients", min(clients, default=0)), ("repeats", repeats)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")
    engine = Engine.from_pretrained(model)
    layouts = [scene.layout() for scene in load_scenes("test", images)]
    rows = most * (1 + engine.sampling.guided)
    longest = max(len(engine.prompts.l2i(layout)) for layout in layouts)
    with threads(1):
        scheduler = Scheduler(engine, rows, QUEUE, prompt_tokens=longest)
        app = make_app(engine, scheduler, limit=600.0, searches=QUEUE)
        with running(app) as port, _connections(port) as over_http:
            ways: dict[str, Draw] = {
                ENGINE: lambda layout, s: encoded(engine.generate(layout, s), "png"),
                SCHEDULER: lambda layout, s: encoded(
                    scheduler.submit(layout, s).images()[0], "png"
                ),
                HTTP: over_http,
            }
            _check(ways, layouts[0], seed)
            counts = sorted({*clients} - {1}) or [1]  # among others, one client is ``alone``
            done, total = itertools.count(1), images + repeats * len(counts)
            after = (lambda: progress(next(done), total)) if progress else lambda: None
            alone: dict[str, list[float]] = {name: [] for name in ways}
            for i, layout in enumerate(layouts):
                once = alternate({n: partial(way, layout, seed + i) for n, way in ways.items()}, 1)
                for name, values in once.items():
                    alone[name] += values
                after()
            latency = [
                {"clients": 1, "way": name, "images_per_s": images / sum(values)}
                | percentiles("latency", values)
                for name, values in alone.items()
            ]
            for count in counts:
                many, waited = _crowds(ways, layouts, count, seed, repeats, after)
                if count > 1:
                    latency += [
                        {"clients": count, "way": name}
                        | {"images_per_s": images / statistics.median(values)}
                        | percentiles("latency", waited[name])
                        for name, values in many.items()
                    ]
    said = {"model": model, "dtype": "float32", "threads": 1, "images": images}
    said |= {"clients": most, "slots": rows, "repeats": repeats, "seed": seed}
    return said | environment() | {
        "alone": {name: quantiles(values) for name, values in alone.items()},
        "many": {
            name: quantiles(values) | {"images_per_s": images / statistics.median(values)}
            for name, values in many.items()
        },
        "ratio_alone": _ratio(alone),
        "ratio_many": _ratio(many),
        "latency": latency,
    }  # fmt: skip


def _ratio(times: dict[str, list[float]]) -> float:
    pairs = zip(times[HTTP], times[SCHEDULER], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _check(ways: dict[str, Draw], layout: Layout, seed: int) -> None:
    """Compare the ways. Raises WrongResult. The engine itself may differ by rounding, as it runs
    fewer rows."""
    drawn = {name: way(layout, seed) for name, way in ways.items()}
    if drawn[HTTP] != drawn[SCHEDULER]:
        raise WrongResult("another picture came over HTTP than of the scheduler; nothing was timed")


def _crowds(
    ways: Mapping[str, Draw], layouts: list[Layout], clients: int, seed: int, repeats: int,
    after: Callable[[], None],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:  # fmt: skip
    """Draw all layouts with ``clients`` clients, by the scheduler and over HTTP in turn, each of
    which sends its next request as soon as it gets an answer. Return the seconds of each run, and
    those of each picture but a client's first: these begin and end together, as those of a service
    do not, and wait for each other to be decoded."""
    waited: dict[str, list[float]] = {name: [] for name in (SCHEDULER, HTTP)}

    def draw(name: str) -> None:
        def one(number: int, layout: Layout) -> None:
            took = seconds(partial(ways[name], layout, seed + number))
            if number >= clients:
                waited[name].append(took)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, itertools.count(), layouts))

    crowds = {name: partial(draw, name) for name in waited}
    for crowd in crowds.values():
        crowd()
    for values in waited.values():
        values.clear()  # of the warm-up
    many: dict[str, list[float]] = {name: [] for name in crowds}
    for _ in range(repeats):
        for name, values in alternate(crowds, 1).items():
            many[name] += values
        after()
    return many, waited


@contextmanager
def _connections(port: int) -> Iterator[Draw]:
    """Draw pictures over HTTP, on one connection per thread, which is kept open."""
    own, made = threading.local(), list[HTTPConnection]()

    def draw(layout: Layout, seed: int) -> bytes:
        if not hasattr(own, "connection"):
            own.connection = HTTPConnection("127.0.0.1", port, timeout=600)
            made.append(own.connection)
        body = json.dumps({"layout": layout.to_dict(), "seed": seed})
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        own.connection.request("POST", "/v1/images", body, headers)
        answer = own.connection.getresponse()
        data: bytes = answer.read()
        if answer.status != 200:
            raise WrongResult(f"{answer.status}: {data.decode()}")
        return data

    try:
        yield draw
    finally:
        for connection in made:
            connection.close()


@contextmanager
def running(app: FastAPI) -> Iterator[int]:
    """Run a server in a thread for the block, without an access log, and yield its port."""
    config = uvicorn.Config(
        app, port=0, http=Connection, log_level="error", timeout_keep_alive=3600
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start; its log says why")
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        if thread.is_alive():
            raise RuntimeError("the server did not end within 60 seconds of being told to")


def latencies(result: dict[str, Any]) -> Table:
    """Format how long clients waited for a picture; empty for older records, which do not say."""
    shown = Table(title="a picture's latency in ms by the number of clients at once")
    for heading in ("clients", "way"):
        shown.add_column(heading)
    for heading in ("images/s", "p50, p95, p99"):
        shown.add_column(heading, justify="right")
    for row in result.get("latency", ()):
        shown.add_row(
            str(row["clients"]),
            row["way"],
            f"{row['images_per_s']:.2f}",
            milliseconds(row, "latency"),
        )
    return shown


def table(result: dict[str, Any]) -> Table:
    """Format the result of ``measure`` for people."""
    shown = Table(
        title=f"{result['images']} pictures, one after another and of {result['clients']} clients "
        f"({result['model']}, {result['dtype']}, {result['slots']} slots); over HTTP "
        f"{result['ratio_alone']:.2f} and {result['ratio_many']:.2f} times the scheduler's time"
    )
    shown.add_column("way")
    for heading in ("ms alone", "q20 … q80", "images/s of many", "seconds", "q20 … q80"):
        shown.add_column(heading, justify="right")
    for name, alone in result["alone"].items():
        many = result["many"].get(name)
        shown.add_row(
            name,
            f"{1e3 * alone['median']:.2f}",
            f"{1e3 * alone['q20']:.2f} … {1e3 * alone['q80']:.2f}",
            *(
                (
                    f"{many['images_per_s']:.2f}",
                    f"{many['median']:.2f}",
                    f"{many['q20']:.2f} … {many['q80']:.2f}",
                )
                if many
                else ("", "", "")
            ),
        )
    return shown
