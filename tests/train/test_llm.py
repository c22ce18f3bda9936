"""Layouts written by a language model: patience, tolerance in reading, none in judging."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from echogen.engine.layout import Layout, LayoutError
from echogen.train.data.endpoint import Answer, Endpoint, LLMError
from echogen.train.data.harvest import IN_VAIN, Harvest, collect, examine_file
from echogen.train.data.layouts import random_layout, read_layouts
from echogen.train.data.llm import Rejected, Rules, pieces, write_request
from echogen.train.data.shapes import Object, Scene

ASK = [{"role": "user", "content": "layouts, please"}]


def layout(seed: int) -> dict:
    return random_layout(np.random.default_rng((99, seed))).to_dict()


def one(expr: str = "a red circle", box: tuple = (0.1, 0.1, 0.4, 0.4), **more) -> dict:
    return {"caption": expr, "objects": [{"expr": expr, "box": list(box)}], **more}


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def endpoint(llm, waits):
    """``endpoint(**settings)``: the stub server, waited for in no time."""

    def build(**settings) -> Endpoint:
        usual = {"per_minute": 1e9, "wait": waits.append, "pause": 1.0}
        return Endpoint(llm.url, "writer", **usual | settings)

    return build


# --- the endpoint ---------------------------------------------------------------------------------


def test_a_request_says_what_it_should(llm, endpoint):
    llm.say("hello")
    assert endpoint(key="secret", temperature=0.5).ask(ASK, 7) == Answer("hello", False)
    assert llm.paths == ["/v1/chat/completions"]
    assert llm.requests == [
        {"model": "writer", "messages": ASK, "temperature": 0.5, "seed": 7},
    ]
    assert llm.headers[0]["Authorization"] == "Bearer secret"
    Endpoint(llm.url + "/chat/completions/", "writer").ask(ASK, 0)
    assert llm.paths[-1] == "/v1/chat/completions"
    assert "Authorization" not in llm.headers[1] and "temperature" not in llm.requests[1]


def test_a_busy_server_is_asked_again_as_late_as_it_asks(llm, endpoint, waits):
    llm.send(429, headers={"Retry-After": "7"})
    llm.send(503)
    llm.send(500, "down")
    llm.send(429, headers={"Retry-After": formatdate(0)})  # a date that is past
    llm.say("hello")
    assert endpoint().ask(ASK, 0).text == "hello"
    assert waits == [7.0, 2.0, 4.0, 0.0]


def test_a_server_that_goes_on_failing_is_given_up(llm, endpoint, waits):
    llm.send(500, '{"error": {"message": "out of\\nmemory"}}')
    with pytest.raises(LLMError, match=r"HTTP 500 \(out of memory\), at the last of 3 tries"):
        endpoint(tries=3).ask(ASK, 0)
    assert waits == [1.0, 2.0] and len(llm.requests) == 3


def test_a_server_that_asks_for_an_hour_is_not_waited_for(llm, endpoint, waits):
    llm.send(429, headers={"Retry-After": "3600"})
    with pytest.raises(LLMError, match="asks to wait 3600 s"):
        endpoint().ask(ASK, 0)
    assert waits == []


def test_a_slow_answer_and_a_torn_one_are_asked_for_again(llm, endpoint):
    llm.say("late", delay=0.5)
    llm.say("torn", torn=True)
    llm.say("hello")
    assert endpoint(timeout=0.15).ask(ASK, 0).text == "hello"
    llm.script[:] = []
    llm.say("late", delay=0.4)
    with pytest.raises(LLMError, match=r"no answer within 0\.1 s"):
        endpoint(timeout=0.1, tries=2).ask(ASK, 0)


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {}, "--api-key-env"),
        (403, {}, "--api-key-env"),
        (404, {}, "'writer'.*/v1"),
        (400, {}, "HTTP 400.*what the server says"),
        (307, {"Location": "http://elsewhere/v1"}, "to http://elsewhere/v1; name that"),
    ],
)
def test_a_refusal_is_final_and_says_what_to_mend(llm, endpoint, waits, status, headers, words):
    llm.send(status, "no", headers=headers)
    with pytest.raises(LLMError, match=words):
        endpoint(key="secret").ask(ASK, 0)
    assert len(llm.requests) == 1 and waits == []


@pytest.mark.parametrize(
    "body", ["<html>hello", "{}", '{"choices": []}', "[1]", '{"choices": [3]}']
)
def test_an_answer_that_is_no_completion_says_so(llm, endpoint, body):
    llm.send(200, body)
    with pytest.raises(LLMError, match=r"no chat completion.*OpenAI-compatible"):
        endpoint().ask(ASK, 0)


def test_a_server_that_knows_no_seed_is_asked_without(llm, endpoint):
    llm.send(422, "unknown field: seed")
    llm.say("hello")
    asked = endpoint()
    assert asked.ask(ASK, 3).text == "hello" and not asked.seeded
    asked.ask(ASK, 4)
    assert ["seed" in r for r in llm.requests] == [True, False, False]


def test_requests_under_way_together_all_learn_that_seeds_are_not_known(llm, endpoint, monkeypatch):
    for _ in range(2):
        llm.send(422, "unknown field: seed")
    llm.say("hello")
    asked, both = endpoint(), threading.Barrier(2, timeout=60)
    send = asked._opener.open

    def together(request, timeout):
        if b'"seed"' in request.data:
            both.wait()
        return send(request, timeout=timeout)

    monkeypatch.setattr(asked._opener, "open", together)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda seed: asked.ask(ASK, seed).text, range(2)))
    assert answers == ["hello"] * 2 and not asked.seeded


def test_an_address_where_nobody_is(waits):
    with pytest.raises(LLMError, match=r"cannot be reached.*is a server running"):
        Endpoint("http://127.0.0.1:9/v1", "m", wait=waits.append).ask(ASK, 0)
    assert waits == []
    bad = ("http://x:80a0/v1", "http://x:99999/v1", "http://[::1/v1", "http://x /v1", "http://x/é")
    for url in ("localhost:8000", "ftp://x/v1", "http://", "", *bad):
        with pytest.raises(LLMError, match="no address"):
            Endpoint(url, "m")
    with pytest.raises(LLMError, match=r"cannot be reached \(nonnumeric port: 'key@x'\)"):
        Endpoint("http://me:key@x/v1", "m", wait=waits.append).ask(ASK, 0)
    assert waits == []


def test_requests_keep_their_distance(llm, endpoint, waits):
    llm.say("hello")
    asked = endpoint(per_minute=2)
    for _ in range(3):
        asked.ask(ASK, 0)
    assert len(waits) == 2 and all(25 < seconds <= 30 for seconds in waits)


# --- reading answers ------------------------------------------------------------------------------

A, B = one(), one("a blue star", (0.5, 0.5, 0.9, 0.9))
BOTH = [json.dumps(A), json.dumps(B)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([A, B]),
        "\n".join(BOTH),
        f"Sure! Here they are:\n```json\n{json.dumps([A, B], indent=2)}\n```\nEnjoy.",
        json.dumps({"layouts": [A, B]}),
        f"<think>{{maybe}} a star?</think>\n[{BOTH[0]},\n{BOTH[1]},]",
    ],
)
def test_an_answer_is_read_in_whatever_it_is_wrapped(text):
    found = list(pieces(Answer(text, False)))
    assert [json.loads(p.text) for p in found] == [A, B] and not any(p.problem for p in found)


def test_what_is_broken_is_named_and_the_rest_is_read():
    cut = json.dumps({"layouts": [A, B]})[:-20]
    found = list(pieces(Answer(cut, True)))
    assert [p.problem for p in found] == [
        "no JSON: cut off at the answer's length limit", None,
        "no JSON: cut off at the answer's length limit",
    ]  # fmt: skip
    assert json.loads(found[1].text) == A
    bad = BOTH[0].replace("[", "(").replace("]", ")")
    found = list(pieces(Answer(f"[{bad}, {BOTH[1]}]", False)))
    assert [p.text for p in found] == [bad, BOTH[1]] and "no JSON" in (found[0].problem or "")
    quoted = json.dumps(one('a "red" } circle'))
    assert [p.text for p in pieces(Answer(quoted + BOTH[0], False))] == [quoted, BOTH[0]]


@pytest.mark.parametrize("text", ["", "  ", "I would rather not.", "[]", '{"layouts": []}'])
def test_an_answer_without_a_layout_is_reported(text):
    (piece,) = pieces(Answer(text, False))
    assert piece.problem in ("an empty answer", "no layout in the answer")


# --- judging them ---------------------------------------------------------------------------------


def test_the_worlds_own_layouts_keep_to_the_rules():
    rng = np.random.default_rng(5)
    for _ in range(50):
        drawn = random_layout(rng)
        assert Rules().examine(drawn.dumps()) == drawn


TWO = [
    {"expr": "a red circle", "box": [0.1, 0.1, 0.4, 0.4]},
    {"expr": "a blue star", "box": [0.5, 0.5, 0.9, 0.9]},
]


@pytest.mark.parametrize(
    ("kind", "words", "data"),
    [
        ("layout", "unknown key", one(colour="red")),
        ("layout", "outside", one(box=(10, 10, 40, 40))),
        ("layout", "x2", one(box=(0.4, 0.1, 0.1, 0.4))),
        ("layout", "objects is empty", {"caption": "nothing", "objects": []}),
        ("rules", "both 'a red circle'", {"caption": "x", "objects": [TWO[0], TWO[0]]}),
        ("rules", "reserved token <ref>", {"caption": "x <ref>", "objects": TWO}),
        ("world", "not a ShapesWorld expression", one("a red dog")),
        ("world", "0.19 to 0.56|0.188 to 0.562", one(box=(0.1, 0.1, 0.9, 0.4))),
        ("world", "1 to 4", {"caption": "x", "objects": [
            {"expr": f"a {c} circle", "box": [x, 0.1, x + 0.19, 0.4]}
            for c, x in (("red", 0), ("green", .2), ("blue", .4), ("cyan", .6), ("purple", .8))]}),
        ("truth", "does not single it out here", {"caption": "x", "objects": [
            {"expr": "the red circle left of the blue star", "box": [0.5, 0.5, 0.9, 0.9]},
            {"expr": "a blue star", "box": [0.1, 0.1, 0.4, 0.4]}]}),
        ("truth", "half beneath", {"caption": "x", "objects": [
            {"expr": "a red circle", "box": [0.2, 0.2, 0.45, 0.45]},
            {"expr": "a blue square", "box": [0.2, 0.2, 0.7, 0.7]}]}),
    ],
)  # fmt: skip
def test_what_is_turned_away(kind, words, data):
    with pytest.raises(Rejected, match=words) as caught:
        Rules().examine(json.dumps(data))
    assert caught.value.kind == kind


def test_layouts_of_the_other_splits_are_turned_away():
    boxes = ((x, y, x + 20, y + 20) for x in range(40) for y in range(40))
    held = next(b for b in boxes if Scene((Object("circle", "red", "solid", b),)).split() == "test")
    with pytest.raises(Rejected, match="one of ShapesWorld's test layouts") as caught:
        Rules().examine(json.dumps(one(box=tuple(v / 64 for v in held))))
    assert caught.value.kind == "split"


def test_free_layouts_keep_to_the_common_rules_alone():
    assert Rules(free=True).examine(json.dumps(one("a brown dog"))).objects[0].expr == "a brown dog"
    with pytest.raises(Rejected, match=r"0\.02 of the canvas"):
        Rules(free=True).examine(json.dumps(one("a dog", (0.1, 0.1, 0.12, 0.9))))


# --- collecting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [False, True])
def test_requests_ask_for_as_many_and_vary(free):
    first, shown = write_request(np.random.default_rng(0), 7, free)
    again, _ = write_request(np.random.default_rng(0), 7, free)
    other, _ = write_request(np.random.default_rng(1), 7, free)
    assert first == again != other
    assert "Write 7 layouts" in first[1]["content"] and "\n7. " in first[1]["content"]
    assert len(shown) == (0 if free else 2)


def test_a_file_is_filled_and_what_is_turned_away_is_written_down(llm, endpoint, tmp_path):
    llm.layouts(layout(0), layout(1), layout(0))
    llm.say("```\n" + json.dumps([layout(2), one("a dog")]) + "\n```")
    llm.say(None)
    llm.layouts(layout(3), layout(4))
    path, told = tmp_path / "layouts.jsonl", []
    harvest = Harvest(path, Rules())
    tally = collect(endpoint().ask, harvest, 4, 3, 0, lambda *at: told.append(at))
    assert tally.held == tally.taken == 4 and tally.requests == 4
    assert tally.rejected == {"duplicate": 1, "world": 1, "json": 1, "surplus": 1}
    assert read_layouts(path) == [Layout.from_dict(layout(i)) for i in range(4)]
    rejects = [json.loads(line) for line in harvest.rejects.read_text().splitlines()]
    assert [r["kind"] for r in rejects] == ["duplicate", "world", "json", "surplus"]
    assert json.loads(rejects[1]["text"]) == one("a dog") and "dog" in rejects[1]["reason"]
    assert told == [(2, 4), (3, 4), (3, 4), (4, 4)]
    assert len({r["seed"] for r in llm.requests}) == 4
    texts = [r["messages"][1]["content"] for r in llm.requests]
    assert all(f"Write {n} " in t for n, t in zip((3, 2, 1, 1), texts, strict=True))
    assert examine_file(path, Rules()) == (4, [])


def test_an_interrupted_run_goes_on(llm, endpoint, tmp_path):
    path = tmp_path / "layouts.jsonl"
    llm.layouts(layout(0), layout(1))
    llm.send(401)
    with pytest.raises(LLMError):
        collect(endpoint().ask, Harvest(path, Rules()), 4, 2, 0)
    with open(path, "a") as file:
        file.write('{"caption": "torn')  # killed while it wrote
    llm.script[:] = []
    llm.layouts(layout(1), layout(2))
    llm.layouts(layout(3))
    tally = collect(endpoint().ask, Harvest(path, Rules()), 4, 2, 0)
    assert tally.held == 4 and tally.taken == 2 and tally.rejected == {"duplicate": 1}
    assert read_layouts(path) == [Layout.from_dict(layout(i)) for i in range(4)]
    seeds = [r["seed"] for r in llm.requests]
    assert len(set(seeds)) == len(seeds) - 1  # only the request that failed is made again
    collect(endpoint().ask, Harvest(path, Rules()), 4, 2, 0)
    assert len(llm.requests) == len(seeds)


def test_requests_are_under_way_together_and_their_answers_keep_their_order(tmp_path):
    done = [threading.Event() for _ in range(3)]

    def ask(messages, seed):
        if seed < 2:  # the later is answered before
            assert done[seed + 1].wait(60)
        done[seed].set()
        return Answer(json.dumps([layout(2 * seed), layout(2 * seed + 1)]), False)

    path = tmp_path / "layouts.jsonl"
    tally = collect(ask, Harvest(path, Rules()), 6, 2, 0, at_once=8)
    assert (tally.requests, tally.held) == (3, 6)  # no more than are needed
    assert read_layouts(path) == [Layout.from_dict(layout(i)) for i in range(6)]


def test_a_request_that_fails_loses_no_answer_beside_it(tmp_path):
    def ask(messages, seed):
        if seed == 1:
            raise LLMError("no credit left")
        return Answer(json.dumps([layout(seed)]), False)

    path = tmp_path / "layouts.jsonl"
    with pytest.raises(LLMError, match="no credit left"):
        collect(ask, Harvest(path, Rules()), 3, 1, 0, at_once=3)
    assert read_layouts(path) == [Layout.from_dict(layout(i)) for i in (0, 2)]


def test_an_interruption_waits_for_no_answer(tmp_path):
    never, answered = threading.Event(), threading.Event()

    def ask(messages, seed):
        os.kill(os.getpid(), signal.SIGINT)
        never.wait(60)
        answered.set()
        return Answer("[]", False)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background
    try:  # ignores it
        with pytest.raises(KeyboardInterrupt):
            collect(ask, Harvest(tmp_path / "layouts.jsonl", Rules()), 1, 1, 0)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not answered.is_set()
    never.set()


def test_a_last_line_that_nothing_ends_is_kept(tmp_path):
    path = tmp_path / "layouts.jsonl"
    lines = [json.dumps(layout(i)) for i in range(3)]
    path.write_text("\n".join(lines[:2]))  # as an editor may leave it
    harvest = Harvest(path, Rules())
    assert harvest.tally.held == 2
    harvest.add(Answer(f"[{lines[2]}]", False), [], 3)
    assert read_layouts(path) == [Layout.from_dict(layout(i)) for i in range(3)]


@pytest.mark.parametrize("text", ["dear diary", json.dumps(one(), indent=1)])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.jsonl"
    for end in ("\n", ""):
        path.write_text(text + end)
        with pytest.raises(LayoutError, match=r"notes\.jsonl: line 1: .*name another file"):
            Harvest(path, Rules())
        assert path.read_text() == text + "\n"


def test_an_example_of_the_request_is_not_taken_back(tmp_path):
    _, shown = write_request(np.random.default_rng(0), 3, False)
    harvest = Harvest(tmp_path / "layouts.jsonl", Rules())
    text = json.dumps([y.to_dict() for y in shown])
    assert harvest.add(Answer(text, False), shown, 3) == 0
    assert harvest.tally.rejected == {"duplicate": 2}


def test_a_model_that_will_not_is_given_up(llm, endpoint, tmp_path):
    llm.say("I would rather not.")
    harvest = Harvest(tmp_path / "layouts.jsonl", Rules())
    with pytest.raises(LLMError, match=rf"last {IN_VAIN} answers .*json: {IN_VAIN}.*0 of 4"):
        collect(endpoint().ask, harvest, 4, 2, 0)
    assert len({r["seed"] for r in llm.requests}) == IN_VAIN
    assert len(harvest.rejects.read_text().splitlines()) == IN_VAIN


def test_cycle_rl_draws_what_was_collected(llm, endpoint, tmp_path: Path, rl_stage):
    llm.layouts(*(layout(i) for i in range(5)))
    path = tmp_path / "layouts.jsonl"
    collect(endpoint().ask, Harvest(path, Rules()), 5, 5, 0)
    stage = rl_stage(layouts=str(path))
    wanted = {Layout.from_dict(layout(i)).dumps() for i in range(5)}
    drawn = {y.dumps() for index in range(6) for y in stage.layouts(index)}
    assert drawn <= wanted and len(drawn) > 2
