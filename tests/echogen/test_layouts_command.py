"""`echogen layouts`: files of layouts by a language model or a sampler, and held to the rules."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from echogen.engine.layout import Layout, LayoutObject
from echogen.train.data import endpoint
from echogen.train.data.layouts import random_layout, read_layouts


def layout(seed: int) -> dict:
    return random_layout(np.random.default_rng((98, seed))).to_dict()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Requests follow each other at once, and so do the tries of one."""
    monkeypatch.setattr(endpoint.Endpoint.__init__, "__defaults__", (
        None, None, 120.0, 5, 0.0, 60.0, lambda seconds: None,
    ))  # fmt: skip


def test_layouts_from_a_language_model(run, llm, tmp_path, monkeypatch):
    out = tmp_path / "layouts.jsonl"
    llm.send(429, headers={"Retry-After": "0"})
    llm.layouts(layout(0), {"caption": "x", "objects": []})
    llm.layouts(layout(1), layout(2))
    monkeypatch.setenv("THE_KEY", "secret")
    asked = ("layouts", "--from-llm", llm.url, "--model", "writer", "--out", out, "--batch", 2)
    done = run(*asked, "--count", 3, "--api-key-env", "THE_KEY", "--temperature", 1, "--json")
    assert done.code == 0, done.err
    assert done.data == {
        "out": str(out), "held": 3, "before": 0, "requests": 2, "taken": 3,
        "rejected": {"layout": 1}, "rejects": str(tmp_path / "layouts.rejects.jsonl"),
        "seeded": True,
    }  # fmt: skip
    assert len(read_layouts(out)) == 3 and "secret" not in done.out + done.err
    assert {h["Authorization"] for h in llm.headers} == {"Bearer secret"}
    assert {r["temperature"] for r in llm.requests} == {1}
    llm.layouts(layout(3))
    done = run(*asked, "--count", 4, "--json")
    assert done.data["before"] == 3 and done.data["taken"] == 1 and len(read_layouts(out)) == 4
    assert run("layouts", "--check", out).code == 0


def test_free_layouts_are_asked_for_and_taken(run, llm, tmp_path):
    dog = {"caption": "a dog", "objects": [{"expr": "a brown dog", "box": [0.1, 0.1, 0.9, 0.9]}]}
    llm.layouts(dog)
    out = tmp_path / "free.jsonl"
    asked = ("layouts", "--from-llm", llm.url, "--model", "m", "--out", out, "--count", 1)
    assert run(*asked, "--open").code == 0
    assert "photographs" in llm.requests[0]["messages"][1]["content"]
    assert read_layouts(out) == [Layout.from_dict(dog)]
    assert run("layouts", "--check", out, "--open").code == 0
    checked = run("layouts", "--check", out)
    assert checked.code == 1 and "line 1" in checked.out


def test_an_endpoint_that_refuses_ends_in_one_line_and_keeps_what_came(run, llm, tmp_path):
    out = tmp_path / "layouts.jsonl"
    llm.layouts(layout(0))
    llm.send(404, '{"error": {"message": "no such model"}}')
    done = run("layouts", "--from-llm", llm.url, "--model", "writer", "--out", out, "--count", 2)
    assert done.code == 2 and "no such model" in done.err and len(done.err.splitlines()) == 1
    assert len(read_layouts(out)) == 1 and "layouts held" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "choose one of"),
        (("--random", "2", "--world", "2"), "got --random and --world"),
        (("--random", "2"), "--out"),
        (("--random", "0", "--out", "OUT"), "--random 0"),
        (("--from-llm", "http://x", "--out", "OUT"), "--model"),
        (("--from-llm", "http://x", "--model", "m", "--out", "OUT", "--count", "0"), "--count"),
        (("--from-llm", "x", "--model", "m", "--out", "OUT"), "no address"),
        (("--from-llm", "http://x", "--model", "m", "--out", "OUT", "--timeout", "0"), "--timeout"),
        (("--from-llm", "http://x", "--model", "m", "--out", "OUT", "--api-key-env", "NO_SUCH"),
         "not set"),
        (("--check", "nowhere.jsonl"), "no such file"),
    ],
)  # fmt: skip
def test_bad_usage(run, tmp_path, options, words):
    out = tmp_path / "layouts.jsonl"
    asked = [str(out) if o == "OUT" else o for o in options]
    assert run("layouts", *asked).refused(words)
    assert not out.exists()
    assert run("layouts", "--random", "2", "--out", tmp_path / "layouts.txt").refused(".jsonl")


@pytest.mark.parametrize("kind", ["random", "world"])
def test_sampled_layouts_keep_to_the_rules_and_come_again(run, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("ECHOGEN_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        done = run("layouts", f"--{kind}", 20, "--seed", seed, "--out", file, "--json")
        assert done.code == 0 and done.data["held"] == 20
    assert files[0].read_text() == files[1].read_text() != files[2].read_text()
    assert len(read_layouts(files[0])) == 20
    checked = run("layouts", "--check", files[0], "--json")
    assert checked.code == 0 and checked.data["good"] == 20
    assert run("layouts", f"--{kind}", 20, "--out", files[0]).refused("is there already")


def test_a_cache_that_takes_nothing_is_named(run, tmp_path, monkeypatch):
    def asked(i):
        return run("layouts", "--world", 2, "--out", tmp_path / f"{i}.jsonl")

    cache, other = tmp_path / "cache", os.access
    cache.touch()
    monkeypatch.setenv("ECHOGEN_CACHE", str(cache))
    assert asked(0).refused(str(cache), "in ECHOGEN_CACHE")
    cache.unlink()
    cache.mkdir()

    def read_only(path, mode):  # root, who may run this, is kept out by a mount alone
        return path != cache and other(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr("os.access", read_only)
        assert asked(1).refused(str(cache), "in ECHOGEN_CACHE")
    assert asked(2).code == 0
    monkeypatch.setattr("os.access", read_only)
    assert asked(3).code == 0  # what is there is read


def test_what_a_model_has_no_room_for(run, model, tmp_path):
    long = "a red circle " + "very " * 1200 + "red"
    box = (0.1, 0.1, 0.9, 0.9)
    path = tmp_path / "long.jsonl"
    path.write_text(Layout(long, (LayoutObject("a red circle", box),)).dumps() + "\n")
    assert run("layouts", "--check", path, "--open").code == 0
    checked = run("layouts", "--check", path, "--open", "--room-of", model, "--json")
    assert checked.code == 1 and checked.data["rejected"] == {"room": 1}
    assert "has room for" in checked.data["lines"][0]["reason"]


def test_check_names_every_line(run, tmp_path):
    path = tmp_path / "layouts.jsonl"
    good = json.dumps(layout(0))
    path.write_text("\n".join([good, "", "{", good, json.dumps(layout(1))]) + "\n")
    checked = run("layouts", "--check", path, "--json")
    assert checked.code == 1 and "2 of 4 layouts" in checked.err
    assert checked.data["good"] == 2
    assert {x["line"]: x["kind"] for x in checked.data["lines"]} == {3: "layout", 4: "duplicate"}
    (tmp_path / "empty.jsonl").write_text("\n")
    assert run("layouts", "--check", tmp_path / "empty.jsonl").code == 2


def test_check_reads_a_layout_file_of_several_lines(run, tmp_path):
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(layout(0), indent=1), encoding="utf-8-sig")
    checked = run("layouts", "--check", path, "--json")
    assert (checked.code, checked.data["good"]) == (0, 1)
    path.write_text(json.dumps(layout(0) | {"caption": ""}, indent=1))
    checked = run("layouts", "--check", path, "--json")
    assert (checked.code, len(checked.data["lines"])) == (1, 1)
    assert "caption is empty" in checked.data["lines"][0]["reason"]
