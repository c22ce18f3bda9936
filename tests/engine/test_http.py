"""The HTTP service as its clients see it: it answers with the engine's own pictures."""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
import logging
import re
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.http import middleware, service, wire
from echogen.engine.http.middleware import BODIES, BODY
from echogen.engine.http.wire import (
    EVENTS,
    JSON,
    MEDIA,
    Drawing,
    Refused,
    encoded,
    preferred,
    short,
)
from echogen.engine.layout import Layout, LayoutObject

from .served import (
    LAYOUT,
    TWO,
    Client,
    begin,
    counters,
    hang_up,
    next_event,
    opened,
    picture,
    send,
    serving,
)


@pytest.fixture(scope="module")
def client(engine) -> Iterator[Client]:
    with serving(engine) as made:
        yield made


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
    codes = engine.generate_codes([TWO] * 2, 2, [4, 9], sampling=sampling, negative=TWO)
    assert [image["draw"] for image in found["images"]] == [4, 9]
    for image, wanted_picture in zip(found["images"], engine.decode(codes), strict=True):
        assert np.array_equal(opened(image["image"]), np.asarray(wanted_picture))
    assert found["sampling"] == json.loads(json.dumps(vars(sampling)))


def test_a_scale_of_one_turns_the_models_own_guidance_off(engine):
    engine = copy.copy(engine)
    engine.sampling = Sampling(cfg=3.0, cfg_schedule="cosine", cfg_start=2.0, cfg_span=(2, 9))
    with serving(engine) as client:
        found = client.draw(cfg=1).json
        assert found["sampling"] == vars(Sampling())
    body = Drawing(layout=LAYOUT, cfg=1, cfg_start=4.0)
    assert body.sampling(engine.sampling) == replace(engine.sampling, cfg=1.0, cfg_start=4.0)


def test_files_of_pictures_are_quick_to_write_and_lose_nothing(engine):
    picture = engine.generate(TWO)
    data = encoded(picture, "png")
    assert np.array_equal(opened(data), np.asarray(picture))
    assert b"IDAT\x78\x01" in data, "zlib's quickest level, by its header (RFC 1950)"


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


def test_only_the_picture_that_is_sent_is_decoded(client, engine, monkeypatch):
    """A check reads codes, and of a single picture there is nothing to choose."""
    cycle, pictures = engine.cycle(TWO, samples=3, seed=1), client.scheduler._intake._pictures
    decoded, searched, right, ground = [], [], pictures.decode, engine.ground_codes
    monkeypatch.setattr(pictures, "decode", lambda codes: decoded.append(codes) or right(codes))
    monkeypatch.setattr(engine, "ground_codes", lambda *a: searched.append(a) or ground(*a))
    for samples in (3, 1):
        body = {"layout": LAYOUT, "seed": 1, "samples": samples, "check": True}
        found = client.ask("POST", "/v1/images", body, Accept="image/png")
        assert found.status == 200
        (codes,), wanted = decoded, cycle.codes[[cycle.best if samples > 1 else 0]]
        assert codes.tolist() == wanted.tolist()
        assert np.array_equal(opened(found.body), np.asarray(engine.decode(wanted)[0]))
        decoded.clear()
    assert len(searched) == 3


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
    for drawn in (4, 8, 12):  # the prompt gives the first code, each step one more
        name, part = next_event(answer)
        assert (name, part["drawn"], part["codes"]) == ("partial", drawn, 16)
        parts.append([opened(image) for image in part["images"]])
        permits.release(4)
    name, whole = next_event(answer)
    assert (name, answer.read()) == ("done", b"")
    permits.release(100)
    assert whole["images"] == client.draw(seed=3, samples=2).json["images"]
    for row, pictures in enumerate(parts, 1):  # 4 codes are a row of the picture
        for part in pictures:
            below = part[row * len(part) // 4 :]
            assert (below == 128).all() and len(np.unique(part)) > 1


def test_partial_pictures_of_every_code(client, engine, monkeypatch):
    """Each shows all that is drawn so far, whether a step draws one code or several, and the whole
    picture is what the engine draws code by code."""
    free = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.6)),))
    slots, drawn = client.scheduler._slots, []

    def slowly(right: Any, *asked: Any) -> Any:
        time.sleep(0.1)  # so that a picture is sent between two steps
        return right(*asked)

    for name in ("step", "window"):
        monkeypatch.setattr(slots, name, partial(slowly, getattr(slots, name)))
    connection = client.connect()
    asked = {"layout": free.to_dict(), "seed": 3, "samples": 2, "every": 1, "temperature": 1}
    send(connection, "POST", "/v1/images", asked)
    answer = connection.getresponse()
    while (told := next_event(answer))[0] == "partial":
        drawn.append(told[1]["drawn"])
    assert drawn and drawn == sorted(set(drawn)) and drawn[-1] < 16
    codes = engine.generate_codes([free] * 2, 3, sampling=Sampling(), decoding="sequential")
    for image, wanted in zip(told[1]["images"], engine.decode(codes), strict=True):
        assert np.array_equal(opened(image["image"]), np.asarray(wanted))


# --- refusals ---------------------------------------------------------------------------------

BAD = [
    ({}, "layout is missing; add it"),
    ({"layout": {"caption": "x", "objects": []}}, "objects is empty"),
    ({"layout": [1]}, "layout = [1]: input should be an object"),
    ({"layout": None}, "layout = null: input should be an object"),
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
    (b"\xef\xbb\xbf[1]", "the body is [1]; send an object"),
    (b"{", "not valid JSON at line 1 column 2"),
    (b"\xff", "not UTF-8 at byte 0"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "a whole number of more than 4300 digits; write a sm"),
    (b'{"seed": 1, "seed": 2}', 'key "seed" appears twice'),
]


def test_what_is_refused_names_what_a_client_can_change(engine):
    """Clients over HTTP do not make the scheduler, so no message mentions it."""
    with serving(engine, slots=1, prompt_tokens=60, queue=1) as client:
        several = client.draw(samples=2)
        assert several.json["error"].endswith("and there are 1; ask for 1 at most")
        guided = client.draw(cfg=2)
        assert guided.json["error"].endswith("ask for one without guidance (cfg = 1)")
        long = client.draw(layout=LAYOUT | {"caption": "a red circle " * 20})
        assert "prompts of 60 (prompt_tokens), so shorten its texts" in long.json["error"]
        client.scheduler._waiting.limit = 0
        full = client.draw()
        assert full.status == 503 and full.json["error"].endswith("again when some are drawn")
        for answer in (several, guided, long, full):
            assert "scheduler" not in answer.json["error"]


@pytest.mark.parametrize(("body", "why"), BAD, ids=range(len(BAD)))
def test_bad_requests_are_told_what_to_mend(client, body, why):
    found = client.ask("POST", "/v1/images", body)
    assert (found.status, list(found.json)) == (400, ["error"])
    assert why in found.json["error"] and "\n" not in found.json["error"]


def test_a_body_of_very_many_values_is_refused_unread(client, monkeypatch):
    """Parsing it, or writing all of it into the refusal, would hold up every client."""
    monkeypatch.setattr(wire, "read_json", lambda _: pytest.fail("it is read"))
    body = b'{"image": [' + b"{}," * 1_000_000 + b"0]}"
    found = client.ask("POST", "/v1/boxes", body)
    assert found.status == 400
    assert "has 2000002 commas and brackets; send 131072 at most" in found.json["error"]


def test_a_refusal_tells_little_of_a_large_value():
    written = list[None]()

    class Value:
        def __repr__(self):
            written.append(None)
            return "0"

    assert short([Value()] * 1000).startswith("[0, 0") and len(written) < 10
    assert short([0] * 9) == "[0, 0, 0, 0, 0, 0, ...]"
    assert short({"a": "x" * 99, "b": None}) == "{'a': 'xxxxxxxxxxxx...xxxxxxxxxxxxx', 'b': None}"


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
        ("image/*, image/png;q=0", "image/jpeg"), ("application/json;q=0, */*", "image/png"),
        ("*/*, image/webp;q=0.9, application/*;q=0.1", "image/png"), ("*/*, image/webp", JSON),
    ],
)  # fmt: skip
def test_the_kind_of_answer_is_the_one_preferred(accept, kind):
    assert preferred(accept, [JSON, *MEDIA]) == kind


@pytest.mark.parametrize(
    "accept", ["text/html", "image/avif", "image/png;q=0", "image/png;q=x", "*/*;q=nan"]
)
def test_what_there_is_not_is_not_accepted(accept):
    with pytest.raises(Refused, match=r"Accept: .*there is application/json, image/png"):
        preferred(accept, [JSON, *MEDIA])


def test_a_form_is_told_to_be_json(client):
    found = client.ask("POST", "/v1/images", b"layout=1", Content_Type="text/plain")
    assert found.status == 415 and "as application/json" in found.json["error"]


def test_a_compressed_body_is_told_to_be_plain(client):
    body = gzip.compress(json.dumps({"layout": LAYOUT}).encode())
    found = client.ask("POST", "/v1/images", body, Content_Encoding="gzip")
    assert found.status == 415 and "'gzip'; send the JSON uncompressed" in found.json["error"]
    same = client.ask("POST", "/v1/images", {"layout": LAYOUT}, Content_Encoding="identity")
    assert same.status == 200


def test_unknown_places_are_told(client):
    assert client.ask("GET", "/v2").json == {"error": "there is no /v2; see /docs"}
    other = client.ask("GET", "/v1/images")
    assert (other.status, other.headers["allow"]) == (405, "POST")
    assert other.json == {"error": "/v1/images takes no GET; see /docs"}
    assert client.ask("POST", "/v1/images/", {"layout": LAYOUT}).status == 404, "nor redirected"


# --- names and log ------------------------------------------------------------------------------


def logged(client: Client, caplog: Any, what: str, count: int = 1) -> list[str]:
    """The lines of the service's log that hold a text. They are written after the answers."""

    def lines() -> list[str]:
        told = [r.getMessage() for r in caplog.records if r.name == "echogen.http"]
        return [line for line in told if what in line]

    client.until(lambda: len(lines()) >= count)
    return lines()


def test_an_answer_bears_the_name_of_its_request(client, caplog):
    caplog.set_level(logging.INFO, "echogen.http")
    given = client.ask("GET", "/v1/model", X_Request_ID="abc-1")
    assert given.headers["x-request-id"] == "abc-1"
    (line,) = logged(client, caplog, "abc-1")
    assert re.fullmatch(r"127\.0\.0\.1 GET /v1/model 200 0\.\d{3} s abc-1", line)
    made = [client.draw(seed=-1).headers["x-request-id"] for _ in range(2)]
    assert len({*made}) == 2 and all(re.fullmatch("[0-9a-f]{32}", name) for name in made)
    assert all("POST /v1/images 400" in logged(client, caplog, name)[0] for name in made)


def test_what_clients_make_up_leaves_no_lines_of_its_own_in_the_log(client, caplog):
    caplog.set_level(logging.INFO, "echogen.http")
    for name in ("a b", "é", "x" * 129, ""):
        found = client.ask("GET", "/a%0a%e9b", X_Request_ID=name)
        assert re.fullmatch("[0-9a-f]{32}", found.headers["x-request-id"])
    client.ask("GET", "/a", X_Forwarded_For="9.9.9.9 GET /admin 200 0.001 s abc")
    lines = logged(client, caplog, " /a", 5)
    assert all(line.isascii() and "\n" not in line for line in lines)
    assert not any("GET /admin" in line for line in lines)


def test_probes_do_not_fill_the_log(client, caplog):
    caplog.set_level(logging.INFO, "echogen.http")
    client.ask("GET", "/metrics")
    client.ask("GET", "/health")
    client.ask("POST", "/health")
    (line,) = logged(client, caplog, "/health")
    assert "POST /health 405" in line and "/metrics" not in caplog.text


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


@pytest.mark.parametrize(
    "path, kind, status",
    [("/v1/boxes", JSON, 413), ("/v1/boxes", "text/plain", 415), ("/v2", JSON, 404)],
)
def test_who_still_sends_is_not_reset_before_the_refusal_is_read(client, path, kind, status):
    size = BODIES["/v1/boxes"] + 1 if status == 413 else 100_000
    connection = begin(client, path, size, b"x" * 1000, kind, Connection="close")
    assert select.select([connection.sock], [], [], 60)[0], "it is refused before it is all there"
    left, part = size - 1000, b"x" * -(-size // 20)
    while left > 0:
        connection.send(part[:left])
        left -= len(part)
        time.sleep(0.002)
    answer = connection.getresponse()
    assert answer.status == status and b"error" in answer.read()


def test_a_body_that_does_not_come_is_not_waited_for(client, monkeypatch):
    monkeypatch.setattr(middleware, "SLOWEST", 0.05)
    connection = begin(client, "/v1/images", 10, b"{")
    answer = connection.getresponse()
    assert answer.status == 408 and b"only 1 bytes of the body arrived" in answer.read()


def test_a_body_that_comes_byte_by_byte_has_no_more_time(client, monkeypatch):
    monkeypatch.setattr(middleware, "SLOWEST", 0.2)
    connection = begin(client, "/v1/images", 20, b"{")
    for _ in range(19):
        if select.select([connection.sock], [], [], 0.05)[0]:
            break
        connection.send(b" ")
    assert connection.getresponse().status == 408


def test_bodies_have_a_limit_together(client, monkeypatch):
    monkeypatch.setattr(middleware, "HELD", 100)
    full = client.draw()
    assert (full.status, full.headers["retry-after"]) == (503, "1")
    monkeypatch.undo()
    assert client.draw().status == 200


def test_pictures_that_are_sent_leave_room_for_drawings(client, monkeypatch):
    monkeypatch.setattr(middleware, "HELD", 1000)
    slow = begin(client, "/v1/boxes", 1200, b"{" * 999)
    client.until(lambda: client.ask("POST", "/v1/boxes", {}).status == 503)
    assert client.draw().status == 200
    hang_up(slow)


# --- finding, and what is reported ------------------------------------------------------------


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
        ({"image": "aaaa", "expressions": names}, "3 bytes are no whole picture; send a PNG"),
        ({"image": picture(8, 8, "bmp"), "expressions": names}, "send a PNG, JPEG or WebP"),
        ({"image": picture(8, 4), "expressions": names}, "make it square"),
        ({"image": picture(5000, 5000), "expressions": names}, "it is 5000x5000; send at most"),
        ({"image": text, "expressions": []}, "expressions = []"),
        ({"image": text, "expressions": [""]}, "an expression is empty"),
        ({"image": text, "expressions": ["a\nstar"]}, "an expression holds a control character"),
        ({"image": text, "expressions": [1] * 9}, "expressions.0 = 1: input should be a valid"),
        ({"image": text, "expressions": ["x"] * 65}, "at most 64 items"),
    ):
        refused = client.ask("POST", "/v1/boxes", body)
        assert refused.status == 400 and why in refused.json["error"], refused.json


def test_what_to_find_has_a_length(client, engine, monkeypatch):
    """Time and memory of a search grow with the square of its tokens."""
    most = client.scheduler.plan.prompt_tokens
    long = "a red circle " * most
    tokens = len(engine.prompts.branch(long))
    asked = {"image": picture(8, 8), "expressions": ["a star", long]}
    found = client.ask("POST", "/v1/boxes", asked)
    assert found.status == 400
    assert f"takes {tokens} tokens; at most {most} can be looked for" in found.json["error"]
    monkeypatch.setattr(service, "LONGEST_EXPRESSION", 4)
    checked = client.draw(check=True)
    assert checked.status == 400
    assert "at most 4 can be looked for, so shorten it ('the left of" in checked.json["error"]
    assert client.draw().status == 200, "it is not looked for"


def test_texts_that_are_far_too_long_are_refused_by_their_characters(client, engine, monkeypatch):
    """Tokenising 4 MiB takes seconds, during which no other text can be tokenised."""
    prompts = engine.prompts
    most, longest = client.scheduler.plan.prompt_tokens, len(max(prompts.tokenizer.vocab, key=len))
    text = "a red circle " * (most * longest // 10)
    monkeypatch.setattr(prompts, "_tokenized", lambda _: pytest.fail("it is tokenised"))
    caption = LAYOUT | {"caption": text}
    expr = LAYOUT | {"objects": [{"expr": text, "box": [0, 0, 1, 1]}]}
    search = client.ask("POST", "/v1/boxes", {"image": picture(8, 8), "expressions": [text]})
    for found, where in (
        (search, "an expression takes at least"),
        (client.draw(layout=caption), "the layout takes at least"),
        (client.draw(layout=expr), "the layout takes at least"),
        (client.draw(layout=LAYOUT, negative=caption, cfg=2), "the layout takes at least"),
    ):
        assert found.status == 400 and found.json["error"].startswith(where)
        assert f" {most}" in found.json["error"] and "shorten" in found.json["error"]


@pytest.mark.parametrize(("name", "most"), [("MOST_EXPRESSIONS", 2), ("MOST_ASKED", 50)])
def test_a_search_takes_turns(client, engine, monkeypatch, name, most):
    """A turn cannot be stopped, so others need not wait longer than one turn."""
    monkeypatch.setattr(service, name, most)
    turns, right, asked = [], engine.ground, ["a red circle", "a blue square", "a star"] * 3
    wanted = right(engine.generate(TWO), asked)

    def ground(image: Any, expressions: list[str], features: str) -> Any:
        turns.append(expressions)
        return right(image, expressions, features)

    monkeypatch.setattr(engine, "ground", ground)
    buffer = io.BytesIO()
    engine.generate(TWO).save(buffer, "png")
    image = base64.b64encode(buffer.getvalue()).decode()
    found = client.ask("POST", "/v1/boxes", {"image": image, "expressions": asked}).json
    assert [each["box"] for each in found["objects"]] == [list(box) for box in wanted]
    assert len(turns) > 1 and [expr for turn in turns for expr in turn] == asked
    for turn in turns:
        tokens = sum(len(engine.prompts.branch(e)) + engine.prompts.codec.steps for e in turn)
        assert tokens <= service.MOST_ASKED and len(turn) <= service.MOST_EXPRESSIONS


def test_after_a_refresh_the_balancer_is_told(engine):
    engine = copy.copy(engine)
    with serving(engine) as client:
        engine.refresh()
        for answer in (client.draw(), client.ask("GET", "/health")):
            assert answer.status == 503 and "make a new scheduler" in answer.json["error"]


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
        for part in ("waiting", "drawing"):
            assert read["echogen_request_seconds_count", (("part", part),)] == 1
        assert read["process_resident_memory_bytes", ()] > 1 << 20
        seconds = "echogen_http_request_seconds_count"
        assert read[seconds, (("route", "/v1/images"), ("status", "200"))] == 1
        assert read[seconds, (("route", "/v1/images"), ("status", "400"))] == 1
        assert read[seconds, (("route", "other"), ("status", "404"))] == 1


def test_times_are_told_up_to_the_limit(engine):
    with serving(engine, limit=200) as client:
        client.ask("GET", "/health")
        bounds = {
            float(dict(labels)["le"])
            for name, labels in counters(client)
            if name == "echogen_http_request_seconds_bucket"
        }
    assert sorted(bounds)[-4:] == [60, 120, 200, float("inf")]


def test_what_is_refused_before_it_is_routed_is_counted_by_route(engine, caplog):
    seconds = "echogen_http_request_seconds_count"
    with serving(engine) as client:
        assert client.ask("POST", "/v1/boxes", b"x" * (BODIES["/v1/boxes"] + 1)).status == 413
        begun = begin(client, "/v1/images", 10, b"{")  # and abandoned in the middle of its body
        hang_up(begun)
        left = (seconds, (("route", "/v1/images"), ("status", "499")))
        client.until(lambda: left in counters(client))
        read = counters(client)
        assert read[left] == 1
        assert read[seconds, (("route", "/v1/boxes"), ("status", "413"))] == 1
        assert not [labels for name, labels in read if name == seconds and labels[0][1] == "other"]
    assert not caplog.records, "nobody's fault"


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


@pytest.mark.parametrize("path", ["/v1/images", "/v1/boxes"])
def test_the_bodies_in_the_docs_are_answered(client, path):
    told = client.ask("GET", "/openapi.json").json["paths"][path]["post"]
    body = told["requestBody"]["content"][JSON]["example"]
    assert client.ask("POST", path, body).status == 200
