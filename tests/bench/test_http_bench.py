"""What HTTP adds is timed on equal pictures, and told in the units it claims."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from echogen.bench.harness import WrongResult
from echogen.bench.speed import arrivals, http
from echogen.cli import main


@pytest.fixture(scope="module")
def result():
    seen = []
    found = http.measure(
        "tiny", 3, (2, 1, 2), 2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(n, 5) for n in range(1, 6)]
    return found


def test_each_way_is_timed_alone_and_in_a_crowd(result):
    assert list(result["alone"]) == [http.ENGINE, http.SCHEDULER, http.HTTP]
    assert list(result["many"]) == [http.SCHEDULER, http.HTTP]
    for many in result["many"].values():
        assert many["images_per_s"] == pytest.approx(3 / many["median"])
    assert result["slots"] == 4, "two rows an image: the model's own sampling is guided"
    Console(quiet=True).print(http.table(result))


def test_latency_is_told_for_each_number_of_clients(monkeypatch):
    """Those of warming up, and each client's first, left out; a tail only where it is measured."""
    counted = list[int]()
    monkeypatch.setattr(http, "seconds", lambda call: call() and 0.5)
    right = arrivals.percentiles

    def percentiles(what, values):
        counted.append(len(values))
        return right(what, values)

    monkeypatch.setattr(http, "percentiles", percentiles)
    monkeypatch.setattr(arrivals, "BEYOND", 0.15)
    found = http.measure("tiny", 4, (3, 2), 2)
    assert counted == [4, 4, 4, 4, 4, 2, 2], "2 runs, less 2 and less 3 pictures of each"
    rows = [(row["clients"], row["way"]) for row in found["latency"]]
    alone = [(1, way) for way in (http.ENGINE, http.SCHEDULER, http.HTTP)]
    assert rows == alone + [(n, way) for n in (2, 3) for way in (http.SCHEDULER, http.HTTP)]
    for row in found["latency"]:
        assert row["latency_p99_s"] is None and row["images_per_s"] > 0
        assert (row["latency_p95_s"] is None) == (row["clients"] == 3), "0.05 of 4, and of 2"
        assert row["clients"] == 1 or row["latency_p50_s"] == 0.5
    console = Console(width=120)
    with console.capture() as shown:
        console.print(http.latencies(found))
    assert re.search(r"3 .* HTTP .* 500, –, –", shown.get())
    old = {name: value for name, value in found.items() if name != "latency"}
    Console(quiet=True).print(http.latencies(old), http.table(old))


def test_ratios_are_of_http_to_the_scheduler(monkeypatch):
    taken = {http.ENGINE: 5.0, http.SCHEDULER: 2.0, http.HTTP: 3.0}
    monkeypatch.setattr(http, "alternate", lambda calls, _: {n: [taken[n]] for n in calls})
    found = http.measure("tiny", 2, (1,), 3)
    assert (found["ratio_alone"], found["ratio_many"]) == (1.5, 1.5)
    assert found["alone"][http.ENGINE]["median"] == 5.0
    assert found["many"][http.HTTP]["images_per_s"] == pytest.approx(2 / 3)


def test_other_pictures_are_not_timed(monkeypatch):
    encoded = http.encoded
    monkeypatch.setattr(http, "encoded", lambda image, kind: encoded(image, kind) + b"!")
    with pytest.raises(WrongResult, match="another picture"):
        http.measure("tiny", 1, (1,), 1)


def test_the_command_prints_what_was_measured(monkeypatch, capsys, result):
    monkeypatch.setattr(http, "measure", lambda *_: result)
    assert main(["bench", "http", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    assert main(["bench", "http", "--clients", "8", "0"]) == 2
    assert main(["bench", "http", "--clients"]) == 2
