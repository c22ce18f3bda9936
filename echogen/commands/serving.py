"""The commands that time many requests, at once and over time, and the cost of HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import InputError, print_json, progress
from echogen.commands.serve import check_installed


@dataclass(frozen=True)
class BenchServing:
    """Time mixed requests through the scheduler, against one after another and in fixed batches,
    and the cost of batch-invariant mode; then the same kinds of requests arriving over time, at
    several loads. On one CPU thread."""

    model: str = "tiny"
    """A bundled model, a folder, or a hub id in the Janus format."""
    requests: int = 24
    """Layouts of the test split, each with its own settings and number of images."""
    slots: int = 16
    """Rows per step; an image with guidance takes two."""
    repeats: int = 5
    """Timed runs of each."""
    arrivals: int = 1000
    """Requests that arrive over time at each load; the first fifth is not counted. p99 needs 625
    that are not refused; 1000 take about ten minutes with the tiny model. 0 skips this part."""
    load: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """Arrivals as a share of the scheduler's capacity; repeatable (without this and --rate: 0.5,
    0.8 and 1.2)."""
    rate: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """Arrivals in requests per second; repeatable."""
    queue: int = 16
    """Requests that may wait; further ones are refused."""
    seed: int = 0
    """Seed of the settings, the noise and the arrival times."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("requests", self.requests, 1, 100_000)
        check_range("slots", self.slots, 6, 4096)
        check_range("repeats", self.repeats, 1, 10_000)
        check_range("arrivals", self.arrivals, 0, 100_000)
        check_range("queue", self.queue, 1, 100_000)
        check_seed(self.seed)
        for name, values in (("load", self.load), ("rate", self.rate)):
            for value in values:
                if not 0 < value < float("inf"):
                    raise InputError(f"--{name} {value}: it must be above 0")
        if self.model.startswith("random:"):
            raise InputError(f"--model {self.model}: it reads no layouts; name a checkpoint")
        from echogen.bench.speed import arrivals, serving, tables

        with progress("timing") as update:
            result = serving.measure(
                self.model, self.requests, self.slots, self.repeats, self.seed, update
            )
        tables.console().print(serving.table(result))
        if self.arrivals:
            from echogen.engine.engine import Engine

            engine = Engine.from_pretrained(self.model)
            loads = self.load if self.load or self.rate else arrivals.LOADS
            with progress("playing") as update:
                result["arrivals"] = arrivals.measure(
                    engine, self.arrivals, self.slots, self.queue, loads, self.rate, self.seed,
                    update,
                )  # fmt: skip
            tables.console().print(arrivals.table(result["arrivals"]))
        if self.json:
            print_json(result)


@dataclass(frozen=True)
class BenchHttp:
    """Time what HTTP adds: the same pictures from the engine, from its scheduler and over a socket,
    one by one and for many clients at once. On one CPU thread."""

    model: str = "tiny"
    """A bundled model, a folder, or a hub id in the Janus format."""
    images: int = 200
    """Layouts of the test split."""
    clients: tuple[int, ...] = (4, 16)
    """Concurrent clients, one number after another; each sends its next request as soon as it is
    answered."""
    repeats: int = 5
    """Timed runs of all clients together."""
    seed: int = 0
    """Seed of the noise."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("images", self.images, 1, 100_000)
        for count in self.clients or (0,):
            check_range("clients", count, 1, 256)
        check_range("repeats", self.repeats, 1, 10_000)
        check_seed(self.seed)
        check_installed("bench http")
        from echogen.bench.speed import http, tables

        with progress("timing") as update:
            result = http.measure(
                self.model, self.images, self.clients, self.repeats, self.seed, update
            )
        for shown in (http.table(result), http.latencies(result)):
            tables.console().print(shown)
        if self.json:
            print_json(result)
