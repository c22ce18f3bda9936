"""Layouts without images: the rules they keep to, the random ones, and those from a file."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from echogen.engine.layout import Layout, LayoutError, LayoutObject
from echogen.train.data.grammar import parse_expression
from echogen.train.data.layouts import check_layout, random_layout, read_layouts


def layout(*objects: tuple[str, tuple]) -> Layout:
    return Layout("things", tuple(LayoutObject(*o) for o in objects))


BOX = (0.1, 0.1, 0.5, 0.5)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([("a star", BOX), ("a star", (0.6, 0.6, 1, 1))], "objects 1 and 2 are both 'a star'"),
        ([("a star", BOX), ("a dot", (0.6, 0.6, 0.62, 1))], "object 2 .* 0.02 of the canvas"),
        ([("a star", BOX), ("a dot", (0.1, 0.1, 0.5, 0.49))], "objects 1 and 2: .* IoU 0.97"),
        ([(f"star {i}", (i / 16, 0, (i + 1) / 16, 1)) for i in range(11)], "has 11 objects"),
    ],
)
def test_what_could_not_be_rewarded_is_refused(objects, words):
    with pytest.raises(LayoutError, match=words):
        check_layout(layout(*objects))
    check_layout(layout(("a star", BOX), ("a dot", (0.6, 0.6, 0.7, 1))))


def test_random_layouts_keep_to_the_rules_and_cover_the_world():
    rng = np.random.default_rng(0)
    drawn = [random_layout(rng) for _ in range(300)]
    for one in drawn:
        check_layout(one)
        for o in one.objects:
            parse_expression(o.expr)  # of the world's language
            side = np.array(o.box) * 64
            assert (side == side.round()).all()
    counts = Counter(len(one.objects) for one in drawn)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 15
    corners = np.array([o.box for one in drawn for o in one.objects])
    assert corners[:, :2].min() < 0.05 and corners[:, 2:].max() > 0.95
    assert random_layout(np.random.default_rng(7)) == random_layout(np.random.default_rng(7))
    assert len({one.dumps() for one in drawn}) == len(drawn)


def test_random_layouts_are_no_test_layouts(monkeypatch):
    from echogen.train.data.shapes import Scene

    splits = iter(["test", "val", "test", "train"])
    monkeypatch.setattr(Scene, "split", lambda self: next(splits, "train"))
    random_layout(np.random.default_rng(0))
    assert next(splits, None) is None  # the first three were drawn again


def test_a_file_of_layouts_is_read_whole(tmp_path):
    wanted = [layout(("a star", BOX)), layout(("a dot", BOX), ("a star", (0.5, 0.5, 1, 1)))]
    path = tmp_path / "layouts.jsonl"
    path.write_text("\n\n".join(one.dumps() for one in wanted) + "\n")
    assert read_layouts(path) == wanted
    path.write_text(wanted[0].dumps() + "\n", encoding="utf-8-sig")  # as Windows marks it
    assert read_layouts(path) == wanted[:1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"caption": "x", "objects": []}), "objects is empty"),
        (layout(("a star", BOX), ("a star", (0.6, 0.6, 1, 1))).dumps(), "both 'a star'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "layouts.jsonl"
    path.write_text(layout(("a star", BOX)).dumps() + "\n" + line + "\n")
    with pytest.raises(LayoutError, match=rf"layouts\.jsonl: line 2: .*{words}"):
        read_layouts(path)


def test_an_empty_or_absent_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LayoutError, match="holds no layout"):
        read_layouts(tmp_path / "empty.jsonl")
    with pytest.raises(LayoutError, match="cannot be read"):
        read_layouts(tmp_path / "absent.jsonl")
