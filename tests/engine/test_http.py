"""A service's view: real sockets, a real server, and the engine's own pictures behind them."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from echogen.engine.engine import Engine
from echogen.engine.http import middleware, service
from echogen.engine.http.app import make_app
from echogen.engine.http.middleware import BODIES, BODY
from echogen.engine.http.wire import EVENTS, JSON, MEDIA, Refused, preferred
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.sampler import Sampling
from echogen.engine.scheduler import Scheduler

TWO = Layout(
    "the left of the two green stars",
    (
        LayoutObject("the left of the two green stars", (0.0, 0.25, 0.5, 0.75)),
        LayoutObject("a blue square", (0.5, 0.0, 1.0, 0.5)),
    ),
)
LAYOUT = TWO.to_dict()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """A server, and a connection anew for each question."""

    port: int
    scheduler: Scheduler

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = self.connect()
        send(connection, method, path, body, **headers)
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def draw(self, **fields: Any) -> Answer:
        return self.ask("POST", "/v1/images", {"layout": LAYOUT} | fields)

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not true():
            assert time.monotonic() < end, self.scheduler.metrics()
            time.sleep(0.01)


def send(connection: HTTPConnection, method: str, path: str, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, data, kind | named)


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Client]:
    limits = {k: options.pop(k) for k in ("limit", "searches") if k in options}
    scheduler = Scheduler(engine, **{"slots": 8, "prompt_tokens": 100} | options)
    app = make_app(engine, scheduler, "small", **limits)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Client(server.servers[0].sockets[0].getsockname()[1], scheduler)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive(), "the server ends, with everything that was asked of it"


@pytest.fixture(scope="module")
def client(engine) -> Iterator[Client]:
    with serving(engine) as made:
        yield made


@pytest.fixture
def held(engine, monkeypatch) -> Iterator[tuple[Client, threading.Event]]:
    """A server whose steps wait for an event, so that who is drawn stays so."""
    going = threading.Event()
    with serving(engine, slots=2, queue=1) as made:
        step = made.scheduler._slots.step

        def stepping() -> Any:
            going.wait(30)
            return step()

        monkeypatch.setattr(made.scheduler._slots, "step", stepping)
        yield made, going
        going.set()


def opened(data: str | bytes) -> np.ndarray:
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- drawing ----------------------------------------------------------------------------------


def test_a_picture_is_the_one_that_the_engine_draws(client, engine):
    found = client.ask("POST", "/v1/images", {"layout": LAYOUT, "seed": 5}, Accept="image/png")
    assert (found.status, found.headers["content-type"]) == (200, "image/png")
    assert np.array_equal(opened(found.body), np.asarray(engine.generate(TWO, seed=5)))
    for kind in ("jpeg", "webp"):
        other = client.ask("POST", "/v1/images", {"layout": LAYOUT}, Accept=f"image/{kind}")
        assert Image.open(io.BytesIO(other.body)).format == kind.upper()


def test_settings_and_samples_are_those_asked_for(client, engine):
    asked = {"temperature": 1, "cfg": 3.0, "cfg_span": [2, 9], "top_k": 7, "unconditional": "empty"}
    found = client.draw(seed=2, samples=2, draws=[4, 9], negative=LAYOUT, **asked).json
    sampling = Sampling(**{**asked, "cfg_span": (2, 9)})
    codes = engine.generate_codes([TWO] * 2, 2, [4, 9], sampling, negative=TWO)
    assert [image["draw"] for image in found["images"]] == [4, 9]
    for image, wanted_picture in zip(found["images"], engine.decode(codes), strict=True):
        assert np.array_equal(opened(image["image"]), np.asarray(wanted_picture))
    assert found["sampling"] == json.loads(json.dumps(vars(sampling)))


def test_a_check_finds_the_layout_again(client, engine):
    wanted_cycle = engine.cycle(TWO, samples=3, seed=1)
    found = client.draw(seed=1, samples=3, check=True).json
    assert found["best"] == wanted_cycle.best
    for i, image in enumerate(found["images"]):
        told = wanted_cycle.to_dict(i)
        assert (image["reward"], image["objects"]) == (told["reward"], told["objects"])
    best = client.ask(
        "POST", "/v1/images", {"layout": LAYOUT, "seed": 1, "samples": 3, "check": True},
        Accept="image/png",
    )  # fmt: skip
    assert np.array_equal(opened(best.body), np.asarray(wanted_cycle.images[wanted_cycle.best]))


def next_event(answer: HTTPResponse) -> tuple[str, Any]:
    """The next server-sent event; comments are skipped."""
    fields: dict[str, str] = {}
    while True:
        line = answer.readline().decode()
        assert line, "the stream ended"
        name, _, value = line.rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "data" in fields:
            return fields["event"], json.loads(fields["data"])


def test_partial_pictures_come_as_they_are_drawn(client, monkeypatch):
    step, permits = client.scheduler._slots.step, threading.Semaphore(3)

    def stepping() -> Any:
        assert permits.acquire(timeout=30)
        return step()

    monkeypatch.setattr(client.scheduler._slots, "step", stepping)
    connection = client.connect()
    send(connection, "POST", "/v1/images", {"layout": LAYOUT, "seed": 3, "samples": 2, "every": 4})
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = []
    for drawn in (4, 8, 12):  # the prompt gives the first code, each step another
        name, part = next_event(answer)
        assert (name, part["drawn"], part["codes"]) == ("partial", drawn, 16)
        parts.append([opened(image) for image in part["images"]])
        permits.release(4)
    name, whole = next_event(answer)
    assert (name, answer.read()) == ("done", b"")
    permits.release(100)
    assert whole["images"] == client.draw(seed=3, samples=2).json["images"]
    for row, pictures in enumerate(parts, 1):  # 4 codes are a row of the picture
        for picture in pictures:
            below = picture[row * len(picture) // 4 :]
            assert (below == 128).all() and len(np.unique(picture)) > 1


def test_a_silent_stream_says_that_it_is_there(held, monkeypatch):
    client, going = held
    monkeypatch.setattr(service, "BEAT", 0.05)
    connection = client.connect()
    send(connection, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1, "every": 16})
    answer = connection.getresponse()
    assert answer.readline() == b": waiting\n"
    going.set()
    assert b"event: done" in answer.read()


# --- refusals ---------------------------------------------------------------------------------

BAD = [
    ({}, "layout is missing; add it"),
    ({"layout": {"caption": "x", "objects": []}}, "objects is empty"),
    ({"layout": [1]}, "layout = [1]: input should be a valid dictionary"),
    ({"layout": LAYOUT, "negative": {"caption": 3}}, "negative: "),
    ({"layout": LAYOUT, "seed": "1"}, "seed = '1': input should be a valid integer"),
    ({"layout": LAYOUT, "seed": -1}, "seed = -1; it must be in 0"),
    ({"layout": LAYOUT, "steps": 3}, "'steps' is no field; there are layout, negative"),
    ({"layout": LAYOUT, "samples": 9}, "ask for 8 at most"),
    ({"layout": LAYOUT, "top_p": 0}, "top_p = 0.0; it must be in (0, 1]"),
    ({"layout": LAYOUT, "cfg": 1, "negative": LAYOUT}, "set cfg above 1"),
    ({"layout": LAYOUT, "timeout": 0}, "timeout = 0.0; it must be above 0 seconds"),
    ({"layout": LAYOUT, "every": -1}, "every = -1; it must be 0"),
    ({"layout": LAYOUT, "draws": [1, 2]}, "2 draws for 1 images"),
    ({"layout": LAYOUT, "timeout": float("nan")}, "timeout = nan; it must be above 0 seconds"),
    ({"layout": LAYOUT, "draws": ["x"] * 3000}, "draws.0 = 'x': input should be a valid integer"),
    ({"layout": LAYOUT, "a\nb" * 100: 1}, "is no field"),
    ({"layout": {"caption": "x" * 100_000, "objects": LAYOUT["objects"]}}, "shorten its texts"),
    ([1], "the body is [1]; send an object"),
    (b"{", "not valid JSON at line 1 column 2"),
    (b"\xff", "not UTF-8 at byte 0"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"seed": 1, "seed": 2}', 'key "seed" stands twice'),
]


@pytest.mark.parametrize(("body", "why"), BAD, ids=range(len(BAD)))
def test_bad_requests_are_told_what_to_mend(client, body, why):
    found = client.ask("POST", "/v1/images", body)
    assert (found.status, list(found.json)) == (400, ["error"])
    assert why in found.json["error"] and "\n" not in found.json["error"]


def test_what_is_asked_of_a_single_picture(client):
    several = client.ask("POST", "/v1/images", {"layout": LAYOUT, "samples": 2}, Accept="image/png")
    assert several.status == 400 and "with check = true" in several.json["error"]
    for fields, accept in (({"every": 4}, "image/png"), ({}, EVENTS), ({}, "text/html")):
        found = client.ask("POST", "/v1/images", {"layout": LAYOUT} | fields, Accept=accept)
        assert found.status == 406 and f"Accept: '{accept}'; there is" in found.json["error"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", JSON), ("*/*", JSON), ("application/json", JSON), ("text/html, */*;q=0.1", JSON),
        ("image/*", "image/png"), ("image/webp", "image/webp"), ("Image/JPEG", "image/jpeg"),
        ("image/jpeg;q=0.5, image/webp", "image/webp"), ("image/png;q=0, */*", JSON),
        ("image/avif,image/webp,image/png,*/*;q=0.8", "image/webp"),
    ],
)  # fmt: skip
def test_the_kind_of_answer_is_the_one_preferred(accept, kind):
    assert preferred(accept, [JSON, *MEDIA]) == kind


@pytest.mark.parametrize("accept", ["text/html", "image/avif", "image/png;q=0", "image/png;q=x"])
def test_what_there_is_not_is_not_accepted(accept):
    with pytest.raises(Refused, match=r"Accept: .*there is application/json, image/png"):
        preferred(accept, [JSON, *MEDIA])


def test_a_form_is_told_to_be_json(client):
    found = client.ask("POST", "/v1/images", b"layout=1", Content_Type="text/plain")
    assert found.status == 415 and "as application/json" in found.json["error"]


def test_unknown_places_are_told(client):
    assert client.ask("GET", "/v2").json == {"error": "there is no /v2; see /docs"}
    other = client.ask("GET", "/v1/images")
    assert (other.status, other.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("told", [True, False], ids=["told", "chunked"])
@pytest.mark.parametrize("path", ["/v1/boxes", "/v1/images"])
def test_bodies_have_a_limit(client, told, path):
    most = BODIES.get(path, BODY)
    body = b"x" * (most + 1)
    parts: Any = body if told else iter([body[:most], body[most:]])
    connection = client.connect()
    connection.request("POST", path, parts, {"Content-Type": JSON}, encode_chunked=not told)
    answer = connection.getresponse()
    assert answer.status == 413 and f"{most >> 10} KiB".encode() in answer.read()


def test_a_body_that_does_not_come_is_not_waited_for(client, monkeypatch):
    monkeypatch.setattr(middleware, "SLOWEST", 0.05)
    connection = client.connect()
    connection.putrequest("POST", "/v1/images")
    connection.putheader("Content-Type", JSON)
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408 and b"1 bytes of the body came" in answer.read()


def test_bodies_have_a_limit_together(client, monkeypatch):
    monkeypatch.setattr(middleware, "HELD", 100)
    full = client.draw()
    assert (full.status, full.headers["retry-after"]) == (503, "1")
    monkeypatch.undo()
    assert client.draw().status == 200


# --- load -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 16], ids=["whole", "stream"])
def test_who_hangs_up_frees_his_slots(held, every):
    client, going = held
    asked = {"layout": LAYOUT, "samples": 2, "every": every}
    connection = client.connect()
    send(connection, "POST", "/v1/images", asked)
    client.until(lambda: client.scheduler.metrics().live == 1)
    behind = client.connect()
    send(behind, "POST", "/v1/images", asked)
    client.until(lambda: client.scheduler.metrics().waiting == 1)
    requests = [live.request for live in client.scheduler._live] + client.scheduler._waiting
    for open_one in (connection, behind):
        hang_up(open_one)
    client.until(lambda: all(request.future.cancelled() for request in requests))
    going.set()
    client.until(lambda: client.scheduler.metrics().cancelled == 2)
    assert client.scheduler.metrics().live_slots == 0
    assert client.draw().status == 200


def hang_up(connection: HTTPConnection) -> None:
    assert connection.sock is not None, "it is being answered"
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def test_who_hangs_up_is_not_searched_for(engine, monkeypatch):
    going, searched = threading.Event(), []
    ground = engine.ground

    def slow(picture: Any, expressions: list[str], features: str) -> Any:
        searched.append(expressions[0])
        going.wait(30)
        return ground(picture, expressions, features)

    monkeypatch.setattr(engine, "ground", slow)
    with serving(engine) as client:
        connections = {}
        for name in ("a red circle", "a blue square"):
            connections[name] = client.connect()
            body = {"image": _picture(8, 8), "expressions": [name]}
            send(connections[name], "POST", "/v1/boxes", body)
            client.until(lambda: searched == ["a red circle"])
        client.until(lambda: beside(client, "search") == 2)
        hang_up(connections["a blue square"])
        client.until(lambda: beside(client, "search") == 1)
        going.set()
        assert connections["a red circle"].getresponse().status == 200
    assert searched == ["a red circle"]


def beside(client: Client, kind: str) -> float:
    return counters(client)["echogen_beside", (("kind", kind),)]


def test_a_check_has_no_time_of_its_own(engine, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(engine, "ground_codes", lambda *_: going.wait(30))
    with serving(engine) as client:
        late = client.draw(check=True, timeout=0.5)
        assert late.status == 504 and "a turn to search still to come" in late.json["error"]
        going.set()


def test_a_full_queue_is_told_to_come_later(held):
    client, going = held
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(client.draw(samples=2))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    client.until(lambda: client.scheduler.metrics().live == 1)
    threads[1].start()
    client.until(lambda: client.scheduler.metrics().waiting == 1)
    full = client.draw()
    assert (full.status, full.headers["retry-after"]) == (503, "1")
    assert "queue" in full.json["error"]
    going.set()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200, 200], "who had a place is drawn"


def test_time_is_limited_by_who_asks_and_by_the_server(engine):
    with serving(engine, limit=0.2) as client:
        step = client.scheduler._slots.step
        client.scheduler._slots.step = lambda: time.sleep(0.05) or step()
        for fields in ({"timeout": 0.1}, {"timeout": 100}, {}):
            late = client.draw(**fields)
            assert late.status == 504 and "of 16 codes drawn" in late.json["error"]
        connection = client.connect()
        send(connection, "POST", "/v1/images", {"layout": LAYOUT, "every": 15})
        name, data = next_event(connection.getresponse())
        assert (name, data["status"]) == ("error", 504)


def test_an_error_is_of_who_it_is_of(client, monkeypatch):
    monkeypatch.setattr(client.scheduler._intake._pictures, "decode", _broken)
    found = client.draw()
    assert (found.status, found.json["error"]) == (500, "RuntimeError: no decoder")
    monkeypatch.undo()
    assert client.draw().status == 200


def _broken(*_: Any) -> None:
    raise RuntimeError("no decoder")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scheduler_that_died_is_not_healthy(held, monkeypatch):
    client, going = held
    connection = client.connect()
    send(connection, "POST", "/v1/images", {"layout": LAYOUT})
    client.until(lambda: client.scheduler.metrics().live == 1)
    monkeypatch.setattr(client.scheduler, "_leave", _broken)
    going.set()
    answer = connection.getresponse()
    assert answer.status in (500, 503) and b"no decoder" in answer.read()
    for found in (client.ask("GET", "/health"), client.draw()):
        assert found.status == 503 and "died of RuntimeError: no decoder" in found.json["error"]
        assert "retry-after" not in found.headers, "it will not come back"


def test_a_scheduler_that_ended_is_not_healthy(engine):
    with serving(engine) as client:
        assert client.ask("GET", "/health").json == {"status": "ok"}
        client.scheduler.shutdown()
        for found in (client.ask("GET", "/health"), client.draw()):
            assert found.status == 503 and "shut down" in found.json["error"]


# --- finding, and what is told of it all ------------------------------------------------------


def test_boxes_are_those_that_the_engine_finds(client, engine):
    image = engine.generate(TWO)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    text = base64.b64encode(buffer.getvalue()).decode()
    names = ["a red circle", "a blue square"]
    found = client.ask("POST", "/v1/boxes", {"image": text, "expressions": names}).json
    boxes = [list(box) for box in engine.ground(image, names)]
    assert found["objects"] == [
        {"expr": e, "box": b} for e, b in zip(names, boxes, strict=True)
    ]  # fmt: skip
    for body, why in (
        ({"image": "é", "expressions": names}, "not base64"),
        ({"image": "aaaa", "expressions": names}, "send a PNG, JPEG or WebP"),
        ({"image": _picture(8, 8, "bmp"), "expressions": names}, "send a PNG, JPEG or WebP"),
        ({"image": _picture(8, 4), "expressions": names}, "make it square"),
        ({"image": _picture(5000, 5000), "expressions": names}, "it is 5000x5000; send at most"),
        ({"image": text, "expressions": []}, "expressions = []"),
        ({"image": text, "expressions": [""]}, "an expression is empty"),
        ({"image": text, "expressions": [1] * 9}, "expressions.0 = 1: input should be a valid"),
        ({"image": text, "expressions": ["x"] * 65}, "at most 64 items"),
    ):
        refused = client.ask("POST", "/v1/boxes", body)
        assert refused.status == 400 and why in refused.json["error"], refused.json


def _picture(width: int, height: int, kind: str = "png") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_searches_wait_in_a_queue_of_their_own(engine, monkeypatch):
    going = threading.Event()
    ground = engine.ground
    monkeypatch.setattr(engine, "ground", lambda *a: going.wait(30) and ground(*a))
    body = {"image": _picture(8, 8), "expressions": ["a red circle"]}
    with serving(engine, searches=1) as client:
        answers: list[Answer] = []

        def ask() -> None:
            answers.append(client.ask("POST", "/v1/boxes", body))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        client.until(lambda: len(answers) == 1)
        assert answers[0].status == 503 and "searches wait" in answers[0].json["error"]
        going.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200, 200, 503]


def counters(client: Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = client.ask("GET", "/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(found.body.decode())
        for sample in family.samples
    }


def test_counters_are_told_to_prometheus(engine):
    with serving(engine) as client:
        client.draw(samples=2, cfg=1)
        client.draw(seed=-1)
        client.ask("GET", "/made/up")
        client.until(lambda: client.scheduler.metrics().finished == 1)
        read = counters(client)
        assert read["echogen_slots", ()] == 8 and read["echogen_waiting", ()] == 0
        assert read["echogen_codes_total", ()] == 32
        assert read["echogen_requests_total", (("outcome", "finished"),)] == 1
        assert read["echogen_requests_total", (("outcome", "refused"),)] == 1
        assert read["echogen_beside", (("kind", "search"),)] == 0
        seconds = "echogen_http_request_seconds_count"
        assert read[seconds, (("route", "/v1/images"), ("status", "200"))] == 1
        assert read[seconds, (("route", "/v1/images"), ("status", "400"))] == 1
        assert read[seconds, (("route", "other"), ("status", "404"))] == 1


def test_a_model_tells_what_it_is(client, engine):
    found = client.ask("GET", "/v1/model").json
    assert found["model"] == "small" and found["codes"] == 16 and found["slots"] == 8
    assert found["sampling"]["temperature"] == engine.sampling.temperature
    assert client.ask("HEAD", "/health").status == 200


def test_every_field_and_answer_is_described(client):
    paths = client.ask("GET", "/openapi.json").json["paths"]
    assert set(paths) == {"/v1/images", "/v1/boxes", "/v1/model", "/health", "/metrics"}
    for path in ("/v1/images", "/v1/boxes"):
        told = paths[path]["post"]
        fields = told["requestBody"]["content"][JSON]["schema"]["properties"]
        assert all("description" in field for field in fields.values())
        assert {"200", "400", "413", "415", "503", "504"} <= set(told["responses"])
        assert "422" not in told["responses"], "that is how others refuse"
    kinds = paths["/v1/images"]["post"]["responses"]["200"]["content"]
    assert set(kinds) == {JSON, EVENTS, *MEDIA}
