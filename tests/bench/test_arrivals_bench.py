"""Requests over time: one trace for everybody, times from the moment a request was due, complete
results."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import Future

import pytest
import torch
from rich.console import Console

from echogen.bench.harness import WrongResult
from echogen.bench.speed import arrivals, servers, serving
from echogen.bench.speed.arrivals import PROVIDERS, play, poisson
from echogen.bench.speed.servers import Batches
from echogen.bench.speed.serving import KINDS, Asked
from echogen.cli import main
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.model import UnifiedTransformer
from echogen.engine.serving.waiting import QueueFull
from echogen.engine.serving.worker import SchedulerClosed

LAYOUT = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.6)),))
PLAIN, GUIDED = KINDS[0], KINDS[1]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The bundled model's prompts, a small random transformer, images of 16 codes."""
    made = Engine.from_pretrained("tiny")
    config = dataclasses.replace(
        made.transformer.config, width=32, layers=1, heads=2, kv_heads=2, head_dim=16,
        mlp_width=48, head_width=32, codebook_size=64, image_tokens=16,
    )  # fmt: skip
    made.transformer = UnifiedTransformer(config).eval()
    made.transformer.initialise(0)
    made.refresh()
    return made


@pytest.fixture
def few_suffice(monkeypatch) -> None:
    """Quantiles of traces that are short, for the tests' sake."""
    monkeypatch.setattr(arrivals, "BEYOND", 0)


def asked(sampling=PLAIN, samples: int = 1, seed: int = 0) -> Asked:
    return Asked(LAYOUT, seed, sampling, samples)


# --- the trace ------------------------------------------------------------------------------------


def test_moments_are_those_of_a_poisson_process():
    moments = poisson(4000, seed=3)
    assert moments == poisson(4000, seed=3) != poisson(4000, seed=4)
    assert moments[:50] == poisson(50, seed=3)
    gaps = torch.tensor([b - a for a, b in zip([0.0, *moments], moments, strict=False)])
    assert gaps.min() > 0
    # Mean and deviation are 1; their standard errors here are 1/√4000 and √2/√4000.
    assert gaps.mean().item() == pytest.approx(1, abs=0.06)
    assert gaps.std().item() == pytest.approx(1, abs=0.09)


class Slow:
    """Takes 0.05 s to take a request, and refuses the third."""

    def __init__(self) -> None:
        self.asked, self.ended = 0, False

    def ask(self, asked, first):
        self.asked += 1
        if self.asked == 3:
            raise QueueFull("full")
        time.sleep(0.05)
        first()
        done = Future[torch.Tensor]()
        done.set_result(torch.zeros(asked.samples, 4, dtype=torch.int64))
        return done

    def load(self):
        return self.asked, 2 * self.asked

    def end(self):
        self.ended = True


def test_times_count_from_when_a_request_was_due(few_suffice):
    """A server that is slow to take requests keeps the later ones waiting outside."""
    server, requests = Slow(), [asked(samples=n) for n in (1, 2, 1, 1)]
    fates = play(server, requests, [0.0, 0.0, 0.01, 0.3])
    assert server.ended and [f.future is None for f in fates] == [False, False, True, False]
    row = arrivals._row(requests, fates, slots=8)
    first = [f.first - f.due for f in fates if f.first]
    assert first[0] >= 0.05 and first[1] >= 0.1 and first[2] >= 0.05
    assert fates[3].due - fates[0].due == pytest.approx(0.3)
    assert (row["finished"], row["refused"]) == (3, 1)
    assert row["images_per_s"] == pytest.approx(4 / (fates[3].ended - fates[0].due))
    assert (row["waiting_mean"], row["waiting_most"]) == (1.5, 3)
    assert row["slots_used"] == pytest.approx((0 + 2 + 4 + 6) / 32)
    assert row["latency_p50_s"] >= row["first_p50_s"] >= 0.05
    late = [f.asked - f.due for f in fates]
    assert late[1] >= 0.05 and late[2] >= 0.09 and row["late_p99_s"] <= max(late)


def test_a_quantile_needs_requests_beyond_it():
    given = {n: [*arrivals.percentiles("late", [1.0] * n).values()] for n in (0, 9, 99, 499, 500)}
    assert given == {
        0: [None] * 3, 9: [None] * 3, 99: [1.0, None, None], 499: [1.0, 1.0, None], 500: [1.0] * 3
    }  # fmt: skip


def test_nobody_taken_is_a_row_too():
    """All that is counted may be refused, by a queue that filled before."""
    fates = [arrivals.Fate(float(i), float(i), 1, 2) for i in range(3)]
    row = arrivals._row([asked()] * 3, fates, slots=2)
    assert (row["finished"], row["refused"], row["images_per_s"]) == (0, 3, 0)
    assert row["latency_p50_s"] is None and row["slots_used"] == 1


# --- fixed batches --------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> list[list[Asked]]:
    """What batches are drawn, by a drawing that takes no time."""
    seen = []

    def one_batch(engine, requests, progress):
        seen.append(requests)
        for code in range(1, 9):
            progress(code, 8)
        return [torch.full((a.samples, 8), a.seed) for a in requests]

    monkeypatch.setattr(servers, "one_batch", one_batch)
    return seen


def test_a_batch_waits_until_it_is_full_or_nobody_comes(drawn):
    server, first = Batches(None, slots=4, queue=9, part=2, full=True), []
    futures = [
        server.ask(each, lambda i=i: first.append(i))
        for i, each in enumerate([asked(samples=3), asked(GUIDED, 1), asked(samples=2, seed=5)])
    ]
    assert server.load() == (3, 0)
    assert server.step() and not server.step()  # the third does not fit beside the first
    assert [len(batch) for batch in drawn] == [1] and first == [0]
    futures.append(server.ask(asked(GUIDED, 1), lambda: first.append(3)))
    assert server.step() and not server.step()  # two guided images are four rows
    assert first == [0, 1, 3] and not futures[2].done()
    server.end()
    assert first == [0, 1, 3, 2] and [len(batch) for batch in drawn] == [1, 2, 1]
    assert torch.equal(futures[2].result(), torch.full((2, 8), 5)) and server.load() == (0, 0)


def test_a_machine_that_is_free_takes_who_waits(drawn):
    server = Batches(None, slots=6, queue=3, part=2, full=False)
    for each in (asked(GUIDED), asked(), asked(GUIDED, 2)):
        server.ask(each, lambda: None)
    with pytest.raises(QueueFull):
        server.ask(asked(), lambda: None)
    assert server.step()  # the oldest's kind goes first
    assert [a.sampling for a in drawn[0]] == [GUIDED, GUIDED]
    assert server.step() and not server.step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_for_batches_that_break_is_told(monkeypatch):
    monkeypatch.setattr(servers, "one_batch", lambda *_: 1 / 0)
    server = Batches(None, slots=2, queue=9, part=2, full=True)
    futures = [server.ask(asked(), lambda: None) for _ in range(3)]
    with server, pytest.raises(ZeroDivisionError):
        for future in futures:
            future.result(60)
    assert all(future.exception(60) for future in futures)
    with pytest.raises(SchedulerClosed, match="died of ZeroDivisionError"):
        server.ask(asked(), lambda: None)


# --- the whole ------------------------------------------------------------------------------------


def test_measure_plays_every_load_to_everybody(engine, few_suffice):
    threads, seen = torch.get_num_threads(), []
    result = arrivals.measure(
        engine, requests=6, slots=6, queue=6, loads=(2.0,), rates=(80.0,),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert torch.get_num_threads() == threads
    assert seen == [(i, 6) for i in range(1, 7)]
    assert json.loads(json.dumps(result)) == result
    rows = result["results"]
    assert [r["provider"] for r in rows] == [*PROVIDERS, *PROVIDERS]
    assert rows[0]["load"] == 2.0 and rows[3]["rate_per_s"] == 80.0
    for r in rows:
        assert r["rate_per_s"] == pytest.approx(r["load"] * result["capacity_per_s"])
        assert (r["finished"], r["refused"], r["different"]) == (5, 0, 0)  # one settles
        assert 0 < r["first_p50_s"] <= r["first_p95_s"] <= r["first_p99_s"]
        assert r["first_p50_s"] < r["latency_p50_s"] <= r["latency_p95_s"] <= r["latency_p99_s"]
        assert 0 <= r["waiting_mean"] <= r["waiting_most"] <= 6 and 0 <= r["slots_used"] <= 1
        assert r["images_per_s"] > 0 and r["late_p99_s"] >= 0
    assert (result["part_tokens"], result["settling"]) == (4, 1)
    Console(quiet=True).print(arrivals.table(result))


def test_what_settles_is_not_counted(engine, monkeypatch):
    """A trace begins with an idle machine; batches are warm as the scheduler is."""
    counted, right = [], arrivals._row

    def row(requests, fates, slots):
        counted.append([a.seed for a in requests])
        return right(requests, fates, slots)

    warmed = []
    monkeypatch.setattr(arrivals, "_row", row)
    monkeypatch.setattr(arrivals, "in_batches", lambda _, requests, slots: warmed.append(requests))
    result = arrivals.measure(engine, requests=10, slots=6, queue=10, loads=(2.0,))
    wanted = serving.mixed(10, 0)
    assert counted == [[a.seed for a in wanted[2:]]] * 3 and warmed == [wanted]
    Console(quiet=True).print(arrivals.table(result))  # too few for any quantile
    assert result["results"][0]["first_p50_s"] is None


def test_another_picture_under_load_is_refused(engine, monkeypatch):
    right = servers.one_batch

    def wrong(*arguments):
        return [codes + 1 for codes in right(*arguments)]

    monkeypatch.setattr(servers, "one_batch", wrong)
    with pytest.raises(WrongResult, match=r"fixed batches drew \d+ of \d+ pictures otherwise"):
        arrivals.measure(engine, requests=2, slots=6, loads=(2.0,))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"requests": 0}, "requests = 0"), ({"queue": 0}, "queue = 0"), ({"slots": 5}, "slots = 5"),
        ({"loads": (0.0,)}, "load = 0"), ({"rates": (-1.0,)}, "rate = -1"),
    ],
)  # fmt: skip
def test_bad_loads_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        arrivals.measure(None, **wrong)


def test_the_command_adds_arrivals(engine, monkeypatch, capsys):
    monkeypatch.setattr(serving, "measure", lambda *_: {"results": []})
    monkeypatch.setattr(serving, "table", lambda _: "")
    monkeypatch.setattr(Engine, "from_pretrained", lambda _: engine)
    words = ["bench", "serving", "--slots", "6", "--arrivals", "2", "--load", "3", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["arrivals"]
    assert {r["load"] for r in result["results"]} == {3.0} and result["queue"] == 16


@pytest.mark.parametrize(
    "words", [["--arrivals", "-1"], ["--queue", "0"], ["--load", "0"], ["--rate", "nan"]]
)
def test_the_command_refuses(words, capsys):
    assert main(["bench", "serving", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and words[0] in line
