"""A server under load: clients that wait, leave or run out of time, and what goes wrong."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from echogen.engine.http import app, connection, service
from echogen.engine.http.wire import Drawing, Search

from .served import (
    LAYOUT,
    Answer,
    Client,
    beside,
    counters,
    hang_up,
    next_event,
    picture,
    send,
    serving,
)


@pytest.fixture
def held(engine, monkeypatch) -> Iterator[tuple[Client, threading.Event]]:
    """A server whose steps wait for an event, so that requests being drawn stay in that state."""
    going = threading.Event()
    with serving(engine, slots=2, queue=1) as made:
        step = made.scheduler._slots.step

        def stepping() -> Any:
            going.wait(30)
            return step()

        monkeypatch.setattr(made.scheduler._slots, "step", stepping)
        yield made, going
        going.set()


def test_a_silent_stream_says_that_it_is_there(held, monkeypatch):
    client, going = held
    monkeypatch.setattr(service, "BEAT", 0.05)
    connection = client.connect()
    send(connection, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1, "every": 16})
    answer = connection.getresponse()
    assert answer.readline() == b": waiting\n"
    going.set()
    assert b"event: done" in answer.read()


def test_a_stream_whose_sketch_waits_for_others_says_that_it_is_there(held, monkeypatch):
    client, going = held
    monkeypatch.setattr(service, "BEAT", 0.05)
    sent = threading.Event()
    monkeypatch.setattr(service, "_sketched", lambda *_: sent.wait(30) and ["sketch"])
    connection = client.connect()
    send(connection, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1, "every": 1})
    answer = connection.getresponse()
    client.until(lambda: beside(client, "sketch") == 1)
    for _ in range(3):
        assert (answer.readline(), answer.readline()) == (b": waiting\n", b"\n")
    sent.set()
    assert next_event(answer) == ("partial", {"drawn": 1, "codes": 16, "images": ["sketch"]})
    going.set()
    assert b"event: done" in answer.read()


def test_a_stream_is_counted_by_its_end(held, caplog):
    client, going = held
    caplog.set_level(logging.INFO, "echogen.http")
    seconds, route = "echogen_http_request_seconds_count", ("route", "/v1/images")
    late, gone, whole = (client.connect() for _ in range(3))
    asked = {"layout": LAYOUT, "cfg": 1, "every": 16}
    send(late, "POST", "/v1/images", asked | {"timeout": 1})
    assert next_event(late.getresponse())[0] == "error"
    send(gone, "POST", "/v1/images", asked)
    client.until(lambda: client.scheduler.metrics().waiting == 1)
    hang_up(gone)
    client.until(lambda: (seconds, (route, ("status", "499"))) in counters(client))
    going.set()
    send(whole, "POST", "/v1/images", asked)
    assert next_event(whole.getresponse())[0] == "done"
    client.until(lambda: (seconds, (route, ("status", "200"))) in counters(client))
    read = counters(client)
    assert [read[seconds, (route, ("status", s))] for s in ("200", "499", "504")] == [1, 1, 1]
    told = [r.getMessage().split() for r in caplog.records if r.name == "echogen.http"]
    assert [words[3] for words in told] == ["504", "499", "200"]


def test_a_late_sketch_does_not_hold_the_whole(held, monkeypatch):
    client, going = held
    begun, sent = threading.Event(), threading.Event()

    def sketched(*_: Any) -> Any:
        begun.set()
        sent.wait(30)

    monkeypatch.setattr(service, "_sketched", sketched)
    connection = client.connect()
    asked = {"layout": LAYOUT, "cfg": 1, "every": 1, "timeout": 5}
    send(connection, "POST", "/v1/images", asked)
    answer = connection.getresponse()
    assert begun.wait(30)
    going.set()
    assert next_event(answer)[0] == "done"
    sent.set()


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


@pytest.mark.parametrize(("asked", "begun"), [(False, False), (False, True), (True, True)])
def test_who_does_not_ask_is_hung_up_on(engine, monkeypatch, asked, begun):
    whole = b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(engine) as client:
        monkeypatch.setattr(connection, "SLOWEST", 30 if asked else 0.1)
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as silent:
            if asked:
                silent.sendall(whole)
                assert silent.recv(1000).startswith(b"HTTP/1.1 200 OK")
                monkeypatch.setattr(connection, "SLOWEST", 0.1)
            try:
                silent.sendall(whole[:-2] if begun else b"")
                assert silent.recv(1000) == b""
            except ConnectionError:
                pass  # hung up before it was all sent


def test_who_comes_when_too_many_are_there_is_hung_up_on(engine, monkeypatch):
    """Each connection holds an open file, even if it has asked for nothing yet."""
    monkeypatch.setattr(connection, "SPARE", 2)
    made = connection.Connection.connection_made

    def few(self, transport):
        self.limit_concurrency = 3
        made(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", few)
    with serving(engine) as client, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=20))
        late = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=20))
        with suppress(ConnectionError):
            assert late.recv(1000) == b""


def test_who_does_not_read_frees_his_slots(held, monkeypatch):
    client, _ = held
    monkeypatch.setattr(connection, "SLOWEST", 0.1)
    monkeypatch.setattr(service, "_sketched", lambda *_: ["x" * (16 << 20)])
    idle = client.connect()
    send(idle, "POST", "/v1/images", {"layout": LAYOUT, "every": 1})
    client.until(lambda: client.scheduler.metrics().live == 1)
    (live,) = client.scheduler._live
    client.until(live.request.future.cancelled)


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
            body = {"image": picture(8, 8), "expressions": [name]}
            send(connections[name], "POST", "/v1/boxes", body)
            client.until(lambda: searched == ["a red circle"])
        client.until(lambda: beside(client, "search") == 2)
        hang_up(connections["a blue square"])
        client.until(lambda: beside(client, "search") == 1)
        going.set()
        assert connections["a red circle"].getresponse().status == 200
    assert searched == ["a red circle"]


def test_drawings_do_not_wait_for_pictures_that_are_read(engine, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(Search, "picture", lambda *_: going.wait(30))
    body = {"image": picture(8, 8), "expressions": ["a red circle"]}
    with serving(engine) as client:
        connections = [client.connect() for _ in range(3)]
        for connection in connections:
            send(connection, "POST", "/v1/boxes", body)
        client.until(lambda: beside(client, "read") == 3)
        assert client.draw(timeout=5).status == 200
        for connection in connections:
            hang_up(connection)
        going.set()


def test_a_prompt_that_is_not_read_in_time_is_not_waited_for(engine, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(Drawing, "layouts", lambda _: going.wait(30))
    with serving(engine) as client:
        late = client.draw(timeout=0.1)
        going.set()
        assert late.status == 504 and "before its turn to prompt was over" in late.json["error"]


def test_a_check_has_no_time_of_its_own(engine, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(engine, "ground_codes", lambda *_: going.wait(30))
    with serving(engine) as client:
        late = client.draw(check=True, timeout=0.5)
        assert late.status == 504 and "before its turn to search was over" in late.json["error"]
        going.set()


def test_a_check_takes_turns_as_short_as_those_of_searches(engine, monkeypatch):
    monkeypatch.setattr(service, "MOST_EXPRESSIONS", 1)
    going, right, turns = threading.Semaphore(1), engine.ground_codes, []

    def slow(codes: Any, expressions: list[list[str]]) -> Any:
        turns.append((len(codes), *expressions))
        assert going.acquire(timeout=30)
        return right(codes, expressions)

    monkeypatch.setattr(engine, "ground_codes", slow)
    with serving(engine, searches=0) as client:
        connection = client.connect()
        body = {"layout": LAYOUT, "samples": 2, "check": True}
        send(connection, "POST", "/v1/images", body)
        client.until(lambda: len(turns) == 2)
        first, second = (o["expr"] for o in LAYOUT["objects"])
        assert turns == [(1, [first]), (1, [second])]
        search = {"image": picture(8, 8), "expressions": ["a red circle"]}
        full = client.ask("POST", "/v1/boxes", search)
        assert full.status == 503 and "searches wait" in full.json["error"], "a check is in line"
        hang_up(connection)
        left = (("route", "/v1/images"), ("status", "499"))
        client.until(lambda: ("echogen_http_request_seconds_count", left) in counters(client))
        going.release()
        client.until(lambda: beside(client, "search") == 0)
        assert len(turns) == 2, "nothing is looked for that nobody waits for"


def test_many_pictures_do_not_hold_one_of_another_request(engine, monkeypatch):
    """They are decoded one at a time, and requests take turns."""
    going = threading.Semaphore(0)
    with serving(engine) as client:
        pictures = client.scheduler._intake._pictures
        right = pictures.decode

        def decode(codes: Any) -> Any:
            assert going.acquire(timeout=30)
            return right(codes)

        monkeypatch.setattr(pictures, "decode", decode)
        many, one = client.connect(), client.connect()
        send(many, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1, "samples": 4})
        client.until(lambda: beside(client, "decode") == 1)
        send(one, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1})
        client.until(lambda: beside(client, "decode") == 2)
        going.release(2)  # for the first of the many, and for the one
        assert one.getresponse().status == 200
        going.release(3)
        assert many.getresponse().status == 200


def test_many_files_do_not_hold_one_of_another_request(engine, monkeypatch):
    going, right, threads = threading.Semaphore(0), service.in_base64, service.POOLS["encode"]

    def in_base64(image: Any, kind: str) -> str:
        assert kind != "png" or going.acquire(timeout=30)
        return right(image, kind)

    monkeypatch.setattr(service, "in_base64", in_base64)
    with serving(engine) as client:
        many, one, samples = client.connect(), client.connect(), threads + 2
        send(many, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1, "samples": samples})
        client.until(lambda: beside(client, "encode") == threads)
        send(one, "POST", "/v1/images", {"layout": LAYOUT, "cfg": 1, "format": "webp"})
        client.until(lambda: beside(client, "encode") == threads + 1)
        going.release()
        assert one.getresponse().status == 200
        going.release(samples - 1)
        assert many.getresponse().status == 200


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
    read = counters(client)
    assert read["echogen_requests_total", (("outcome", "full"),)] == 1
    assert read["echogen_requests_total", (("outcome", "refused"),)] == 0
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


def test_a_step_that_does_not_end_holds_no_answer(held, monkeypatch):
    """A client gets its answer in time, and ``/health`` says that the server has stalled."""
    client, going = held
    connection = client.connect()
    connection.timeout = 5
    send(connection, "POST", "/v1/images", {"layout": LAYOUT, "timeout": 1})
    late = connection.getresponse()
    assert late.status == 504 and b"of 16 codes drawn; ask for less" in late.read()
    assert client.ask("GET", "/health").status == 200, "a step may take some time"
    monkeypatch.setattr(app, "STALLED", 0.05)
    client.until(lambda: client.ask("GET", "/health").status == 503)
    assert "a step takes" in client.ask("GET", "/health").json["error"]
    going.set()
    client.until(lambda: client.ask("GET", "/health").status == 200)
    client.until(lambda: client.scheduler.metrics().expired == 1)
    assert client.scheduler.metrics().live_slots == 0


def test_an_error_is_of_who_it_is_of(engine, monkeypatch, caplog):
    with serving(engine) as client:
        monkeypatch.setattr(client.scheduler._intake._pictures, "decode", _broken)
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
        body = {"layout": LAYOUT}
        found = client.ask("POST", "/v1/images", body, X_Request_ID="one-of-many")
        assert (found.status, found.json["error"]) == (500, "RuntimeError: no decoder")
        assert found.headers["x-request-id"] == "one-of-many"
        traceback = "RuntimeError: no decoder\nwhile answering request one-of-many"
        client.until(lambda: traceback in caplog.text)
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


def test_searches_wait_in_a_queue_of_their_own(engine, monkeypatch):
    going = threading.Event()
    ground = engine.ground
    monkeypatch.setattr(engine, "ground", lambda *a: going.wait(30) and ground(*a))
    body = {"image": picture(8, 8), "expressions": ["a red circle"]}
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


def test_a_search_that_does_not_end_does_not_hold_the_end(engine, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(engine, "ground", lambda *_: going.wait(60))
    with serving(engine, limit=0.5) as client:
        answer = client.ask(
            "POST", "/v1/boxes", {"image": picture(16, 16), "expressions": ["a star"]}
        )
        assert answer.status == 504
        began = time.monotonic()
    try:
        assert time.monotonic() - began < 20
    finally:
        going.set()
