"""What HTTP adds is timed on equal pictures, and told in the units it claims."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from echogen.bench.harness import WrongResult
from echogen.bench.speed import http
from echogen.cli import main


@pytest.fixture(scope="module")
def result():
    seen = []
    found = http.measure("tiny", 3, 2, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]
    return found


def test_each_way_is_timed_alone_and_in_a_crowd(result):
    assert list(result["alone"]) == [http.ENGINE, http.SCHEDULER, http.HTTP]
    assert list(result["many"]) == [http.SCHEDULER, http.HTTP]
    for many in result["many"].values():
        assert many["images_per_s"] == pytest.approx(3 / many["median"])
    assert result["slots"] == 4, "two rows an image: the model's own sampling is guided"
    Console(quiet=True).print(http.table(result))


def test_ratios_are_of_http_to_the_scheduler(monkeypatch):
    taken = {http.ENGINE: 5.0, http.SCHEDULER: 2.0, http.HTTP: 3.0}
    monkeypatch.setattr(http, "alternate", lambda calls, _: {n: [taken[n]] for n in calls})
    found = http.measure("tiny", 2, 1, 3)
    assert (found["ratio_alone"], found["ratio_many"]) == (1.5, 1.5)
    assert found["alone"][http.ENGINE]["median"] == 5.0
    assert found["many"][http.HTTP]["images_per_s"] == pytest.approx(2 / 3)


def test_other_pictures_are_not_timed(monkeypatch):
    encoded = http.encoded
    monkeypatch.setattr(http, "encoded", lambda image, kind: encoded(image, kind) + b"!")
    with pytest.raises(WrongResult, match="another picture"):
        http.measure("tiny", 1, 1, 1)


def test_the_command_prints_what_was_measured(monkeypatch, capsys, result):
    monkeypatch.setattr(http, "measure", lambda *_: result)
    assert main(["bench", "http", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    assert main(["bench", "http", "--clients", "0"]) == 2
