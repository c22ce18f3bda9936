"""Requests that arrive over time, as on a server: at random moments, at a given load.

Gaps between requests are exponential (a Poisson process), in real time, and every provider gets the
same requests at the same moments. Times count from the moment when a request was due, so that a
server cannot look better by being slow to take it. The queue and the slots are read at each
arrival: arrivals at random moments see their average state.

Loads are shares of the scheduler's own capacity, which is measured in the same run with a queue
that is never empty. Fixed batches have a different capacity (`echogen.bench.speed.serving`).

Counting starts once queue and slots are as full as the load makes them: the first ``SETTLING`` of a
trace meets a machine that was idle. A quantile is given where enough requests lie beyond it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from echogen.bench.harness import WrongResult, seconds, threads
from echogen.bench.speed.servers import Batches, Continuous, Server
from echogen.bench.speed.serving import (
    MOST_DIFFERENT,
    SAMPLES,
    SCHEDULER,
    STATIC,
    Asked,
    in_batches,
    mixed,
)
from echogen.engine.decoding.decode import Progress
from echogen.engine.engine import Engine
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.waiting import QueueFull

LOADS = (0.5, 0.8, 1.2)
"""Shares of the capacity: easy, busy, and more than can be drawn."""
WHO_WAITS = "batches of who waits"
PROVIDERS = (SCHEDULER, STATIC, WHO_WAITS)
"""The scheduler; batches that wait until they are full; batches that take whatever waits when the
previous one has ended."""
PARTS = 4
"""An image's first part is this many times smaller than the whole."""
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SETTLING = 0.2
"""Share of a trace that is played but not counted. At a load of 0.8, a queue forgets within about a
hundred requests that it began empty."""
BEYOND = 5
"""Requests that must lie beyond a quantile: 500 for p99."""
WARMING = 50
"""Requests that fixed batches draw before they are timed."""


@dataclass
class Fate:
    """What happened to a request; moments on the clock of ``time.perf_counter``.

    Attributes:
        due: when it was due.
        asked: when it was sent. This is later than ``due`` if the previous one was still being
            taken.
        waiting, held: requests waiting and slots held when it arrived.
        first, ended: when the first part of its images was available, and when all of them were;
            None if refused.
        future: of its codes; None if refused.
        over: set after all of these; a future's result may be available before its callback runs.
    """

    due: float
    asked: float
    waiting: int
    held: int
    first: float | None = None
    ended: float | None = None
    future: Future[Tensor] | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def note_first(self) -> None:
        """Record that the first part is available."""
        self.first = time.perf_counter()

    def note_end(self, _: Future[Tensor]) -> None:
        """Record that the whole is available."""
        self.ended = time.perf_counter()
        self.over.set()


def poisson(count: int, seed: int) -> list[float]:
    """Return the moments of ``count`` arrivals, one per second on average. Divide by a rate to get
    that rate."""
    rng, at, moments = random.Random(seed), 0.0, list[float]()
    for _ in range(count):
        moments.append(at := at + rng.expovariate(1.0))
    return moments


def play(server: Server, asked: Sequence[Asked], moments: Sequence[float]) -> list[Fate]:
    """Send each request at its moment, in seconds from now, and wait for all that were accepted.
    QueueFull is recorded as a request's fate; any other error of a request is raised."""
    began, fates = time.perf_counter(), list[Fate]()
    for each, moment in zip(asked, moments, strict=True):
        time.sleep(max(0.0, began + moment - time.perf_counter()))
        fates.append(fate := Fate(began + moment, time.perf_counter(), *server.load()))
        try:
            fate.future = server.ask(each, fate.note_first)
        except QueueFull:
            continue
        fate.future.add_done_callback(fate.note_end)
    server.end()
    for fate in fates:
        if fate.future is not None:
            fate.over.wait()
            fate.future.result()  # raises what the request raised
    return fates


def saturated(scheduler: Scheduler, asked: Sequence[Asked], queue: int) -> list[Tensor]:
    """Draw all requests with the queue kept full, and return their codes."""
    made = []
    for a in asked:
        while scheduler.metrics().waiting >= queue:
            scheduler.step()
        made.append(scheduler.submit(a.layout, a.seed, a.sampling, a.samples))
    while scheduler.step():
        pass
    return [request.result() for request in made]


def measure(
    engine: Engine,
    requests: int = 150,
    slots: int = 16,
    queue: int = 16,
    loads: Sequence[float] = LOADS,
    rates: Sequence[float] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Play the same requests to every provider at every load, on one thread of a CPU; JSON-ready.

    Args:
        engine: draws; in float32.
        requests: arrivals at each load, of all kinds (`serving.mixed`); the first ``SETTLING`` of
            them are not counted.
        slots: rows of the scheduler and of a batch.
        queue: requests that may wait; more are refused.
        loads: shares of the scheduler's capacity.
        rates: further loads, in requests per second.
        seed: of the requests, their moments and the noise.
        progress: called with (traces played, traces in all).

    Returns:
        ``capacity_per_s`` (requests) and ``capacity_images_per_s`` of the scheduler, ``settling``
        (the number of requests of a trace that are not counted), and ``results``, one object per
        load and provider: see ``_row``.

    Raises:
        WrongResult: at some load, pictures differ from those with a full queue.
        ValueError: a number is out of range.
    """
    check(requests, slots, queue, loads, rates)
    asked, moments = mixed(requests, seed), poisson(requests, seed)
    part = max(1, engine.transformer.config.image_tokens // PARTS)
    longest = max(len(engine.prompts.l2i(a.layout)) for a in asked)
    rows, settling = list[dict[str, Any]](), int(SETTLING * requests)
    with threads(1):
        scheduler = Scheduler(engine, slots, queue, prompt_tokens=longest)
        wanted = saturated(scheduler, asked, queue)  # repeated prompts are cached from here on
        capacity = requests / seconds(lambda: saturated(scheduler, asked, queue))
        in_batches(engine, asked[:WARMING], slots)
        points = [(load, load * capacity) for load in loads]
        points += [(rate / capacity, rate) for rate in rates]
        with scheduler:
            for load, rate in points:
                due = [moment / rate for moment in moments]
                for name in PROVIDERS:
                    with _server(name, engine, scheduler, slots, queue, part) as server:
                        fates = play(server, asked, due)
                    different = check_codes(name, fates, wanted)
                    said = {"load": load, "rate_per_s": rate, "provider": name}
                    found = _row(asked[settling:], fates[settling:], slots)
                    rows.append(said | found | {"different": different})
                    if progress is not None:
                        progress(len(rows), len(points) * len(PROVIDERS))
    images = sum(a.samples for a in asked)
    return {
        "requests": requests, "settling": settling, "images": images, "slots": slots,
        "queue": queue, "seed": seed, "part_tokens": part, "capacity_per_s": capacity,
        "capacity_images_per_s": capacity * images / requests, "results": rows,
    }  # fmt: skip


def check(
    requests: int, slots: int, queue: int, loads: Sequence[float], rates: Sequence[float]
) -> None:
    """Check the arguments of ``measure``. Raises ValueError."""
    if requests < 1 or queue < 1:
        raise ValueError(f"requests = {requests}, queue = {queue}; both must be at least 1")
    if slots < 2 * SAMPLES:
        raise ValueError(f"slots = {slots}; {SAMPLES} guided images take {2 * SAMPLES}")
    for name, values in (("load", loads), ("rate", rates)):
        for value in values:
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value}; it must be above 0")


@contextmanager
def _server(
    name: str, engine: Engine, scheduler: Scheduler, slots: int, queue: int, part: int
) -> Iterator[Server]:
    if name == SCHEDULER:
        yield Continuous(scheduler, part)
        return
    with Batches(engine, slots, queue, part, full=name == STATIC) as batches:
        yield batches


def check_codes(name: str, fates: Sequence[Fate], wanted: Sequence[Tensor]) -> int:
    """Count the images that differ from those drawn with a full queue. Raises WrongResult."""
    pairs = [(f.future.result(), w) for f, w in zip(fates, wanted, strict=True) if f.future]
    different = sum(int((a != b).any(-1).sum()) for a, b in pairs)
    images = sum(len(w) for _, w in pairs)
    if different > MOST_DIFFERENT * images:
        raise WrongResult(f"{name} drew {different} of {images} pictures otherwise under load")
    return different


def _row(asked: Sequence[Asked], fates: Sequence[Fate], slots: int) -> dict[str, Any]:
    """Summarise the counted part of a trace.

    It has the requests ``finished`` and ``refused``; ``images_per_s``, from the first arrival to
    the last end; quantiles of the seconds to the first part (``first_p50_s`` …) and to the end
    (``latency_p50_s`` …) of accepted requests, and of the delay in sending (``late_p50_s`` …, which
    is part of the other two). As seen at arrivals, it also has the mean and the largest number of
    waiting requests, and the mean share of slots held. A quantile is None where fewer than
    ``BEYOND`` requests lie beyond it.
    """
    taken = [(a, f) for a, f in zip(asked, fates, strict=True) if f.future is not None]
    images = sum(a.samples for a, _ in taken)
    ends = [f.ended for _, f in taken if f.ended is not None]
    firsts = [f.first - f.due for _, f in taken if f.first is not None]
    latencies = [f.ended - f.due for _, f in taken if f.ended is not None]
    waiting = [f.waiting for f in fates]
    return {
        "finished": len(taken),
        "refused": len(fates) - len(taken),
        "images_per_s": images / (max(ends) - fates[0].due) if ends else 0.0,
        **percentiles("first", firsts),
        **percentiles("latency", latencies),
        **percentiles("late", [f.asked - f.due for f in fates]),
        "waiting_mean": sum(waiting) / len(waiting),
        "waiting_most": max(waiting),
        "slots_used": sum(f.held for f in fates) / (slots * len(fates)),
    }


def percentiles(what: str, values: Sequence[float]) -> dict[str, float | None]:
    """Quantiles of seconds, by name (``{what}_p50_s`` …); None where too few lie beyond one."""
    return {f"{what}_{name}_s": _quantile(values, share) for name, share in SHARES.items()}


def _quantile(values: Sequence[float], share: float) -> float | None:
    if len(values) * (1 - share) < BEYOND:
        return None
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def table(result: dict[str, Any]) -> Table:
    """Format the result of ``measure`` for people."""
    shown = Table(
        title=f"{result['requests']} requests that come over time, the first {result['settling']} "
        f"not counted, {result['slots']} slots, a queue of {result['queue']}; the scheduler can "
        f"draw {result['capacity_per_s']:.1f} requests/s, "
        f"{result['capacity_images_per_s']:.1f} images/s",
        caption="ms from a request's arrival, – where too few requests say; waiting and slots as "
        "arrivals find them",
    )
    shown.add_column("load")
    shown.add_column("provider")
    for heading in ("images/s", f"first {result['part_tokens']} codes p50, p95, p99",
                    "all p50, p95, p99", "waiting, most", "slots", "refused"):  # fmt: skip
        shown.add_column(heading, justify="right")
    before = None
    for r in result["results"]:
        if before not in (None, r["load"]):
            shown.add_section()
        before = r["load"]
        shown.add_row(
            f"{r['load']:.2f}, {r['rate_per_s']:.1f}/s",
            r["provider"],
            f"{r['images_per_s']:.2f}",
            milliseconds(r, "first"),
            milliseconds(r, "latency"),
            f"{r['waiting_mean']:.1f}, {r['waiting_most']}",
            f"{r['slots_used']:.0%}",
            str(r["refused"]),
        )
    return shown


def milliseconds(row: dict[str, Any], what: str) -> str:
    """Format the quantiles that ``percentiles`` named."""
    found = [row[f"{what}_{name}_s"] for name in SHARES]
    return ", ".join("–" if value is None else f"{1e3 * value:.0f}" for value in found)
