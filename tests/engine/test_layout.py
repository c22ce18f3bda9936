"""A layout file is either accepted as it is or refused in one clear line."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echogen.engine.layout import Layout, LayoutError, LayoutObject, check_box

PLAIN = {
    "caption": "a red circle in front of a blue square",
    "objects": [
        {"expr": "a red circle in front", "box": [0.10, 0.20, 0.45, 0.60]},
        {"expr": "a blue square behind", "box": [0.30, 0.35, 0.80, 0.90]},
    ],
}
PIXELS = {
    "caption": "zwei Kreise, ein 猫",
    "objects": [{"expr": "der größere Kreis", "box": [0, 10, 320, 240]}],
    "size": [640, 480],
}


def changed(path: tuple[str | int, ...], value: object, base: dict = PLAIN) -> dict:
    """``base`` with another value at ``path``; past the end of a list it is appended."""
    data = copy.deepcopy(base)
    at: object = data
    for step in path[:-1]:
        at = at[step]  # type: ignore[index]
    last = path[-1]
    if isinstance(at, list) and isinstance(last, int):
        at[last : last + 1] = [value]
    else:
        at[last] = value  # type: ignore[index]
    return data


# --- what is accepted -----------------------------------------------------------------------------


def test_json_in_and_out():
    layout = Layout.loads(json.dumps(PLAIN))
    assert layout.caption == PLAIN["caption"]
    assert layout.objects[1] == LayoutObject("a blue square behind", (0.30, 0.35, 0.80, 0.90))
    assert layout.size is None
    assert layout.to_dict() == PLAIN
    assert Layout.loads(layout.dumps()) == layout


def test_pixels_are_normalised_inside_and_pixels_again_outside(tmp_path):
    layout = Layout.from_dict(PIXELS)
    assert layout.objects[0].box == (0, 10 / 480, 0.5, 0.5)
    assert layout.to_dict() == PIXELS
    path = tmp_path / "layout.json"
    layout.save(path)
    assert Layout.load(path) == layout
    assert "größere" in path.read_text(encoding="utf-8")


def test_the_whole_canvas_is_a_box():
    assert check_box([0, 0, 1, 1]) == (0, 0, 1, 1)
    assert check_box((0, 0, 64, 32), size=(64, 32)) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "text",
    [
        "un chien\u00a0: noir",
        "赤い\u3000円",
        "می\u200cخواهم",
        "\U0001f469\u200d\U0001f680",
        "\u05d0\u200e 1",
        "\U0001fae8",  # newer than the tables of Python 3.11
    ],
)
def test_text_of_any_language_is_taken_as_it_stands(text):
    layout = Layout.from_dict(changed(("caption",), text, changed(("objects", 1, "expr"), text)))
    assert layout.caption == layout.objects[1].expr == text


def test_numbers_of_arrays_are_numbers():
    """Detectors give boxes as arrays, and annotations in pixels are stored as such."""
    box = np.array([0.25, 0.5, 0.75, 1])
    for kind in (np.float16, np.float32, np.float64):
        made = Layout("a star", (LayoutObject("a star", box.astype(kind)),))
        assert Layout.loads(made.dumps()) == made and made.objects[0].box == tuple(box)
    assert check_box((box * 64).astype(np.int64), size=(64, 64)) == tuple(box)


def test_layouts_do_not_change():
    layout = Layout.from_dict(PLAIN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.caption = "another"  # type: ignore[misc]
    assert isinstance(layout.objects, tuple)


# --- what is refused ------------------------------------------------------------------------------

BOX = ("objects", 1, "box")
REFUSED = {
    "not an object": ([1, 2], ["layout is [1, 2]", "caption", "objects"]),
    "no caption": ({"objects": PLAIN["objects"]}, ['no "caption"', "add it"]),
    "no objects key": ({"caption": "a"}, ['no "objects"']),
    "unknown key": (PLAIN | {"captoin": "a"}, ["unknown key", "captoin", "caption"]),
    "unknown object key": (changed(("objects", 1, "bbox"), []), ["object 2", '"bbox"', "expr"]),
    "object without expr": (changed(("objects", 0), {"box": [0, 0, 1, 1]}), ["object 1", "expr"]),
    "no objects": (changed(("objects",), []), ["objects is empty", "at least one"]),
    "objects no list": (changed(("objects",), "x"), ["objects", '"x"', "list"]),
    "object no object": (changed(("objects", 1), 7), ["object 2", "7"]),
    "caption a number": (changed(("caption",), 3), ["caption is 3", "string"]),
    "caption empty": (changed(("caption",), ""), ["caption is empty"]),
    "caption blank": (changed(("caption",), "  "), ["caption is empty"]),
    "caption of two lines": (changed(("caption",), "a\nb"), ["caption", "control", "one plain"]),
    "caption of two paragraphs": (changed(("caption",), "a\u2029b"), ["caption", "U+2029"]),
    "caption turned round": (changed(("caption",), "a\u202eb"), ["control", "U+202E"]),
    "caption with a colour": (changed(("caption",), "a\x9b1mb"), ["control", "U+009B"]),
    "expr empty": (changed(("objects", 1, "expr"), ""), ["object 2", "expr is empty"]),
    "expr null": (changed(("objects", 1, "expr"), None), ["object 2", "null", "string"]),
    "expr surrogate": (changed(("objects", 1, "expr"), "\ud800"), ["object 2", "\\ud800"]),
    "box a string": (changed(BOX, "0 0 1 1"), ["object 2", "a blue square", "[x1, y1, x2, y2]"]),
    "box an object": (changed(BOX, {"x1": 0}), ["object 2", "[x1, y1, x2, y2]"]),
    "three numbers": (changed(BOX, [0, 0, 1]), ["object 2", "3 numbers", "four"]),
    "five numbers": (changed(BOX, [0, 0, 1, 1, 1]), ["object 2", "5 numbers", "four"]),
    "a string in it": (changed(BOX, [0, 0, "1", 1]), ["object 2", "x2", '"1"', "number"]),
    "a bool in it": (changed(BOX, [0, 0, True, 1]), ["object 2", "x2", "true", "number"]),
    "nan": (changed(BOX, [0, math.nan, 1, 1]), ["object 2", "y1", "nan", "finite"]),
    "infinity": (changed(BOX, [0, 0, math.inf, 1]), ["object 2", "x2", "inf", "finite"]),
    "huge": (changed(BOX, [0, 0, 10**400, 1]), ["object 2", "x2", "too large"]),
    "huger": (changed(BOX, [0, 0, 10**5000, 1]), ["object 2", "x2", "too large"]),
    "outside": (changed(BOX, [0, 0, 1.2, 1]), ["object 2", "x2 = 1.2", "[0, 1]", '"size"']),
    "negative": (changed(BOX, [0, -0.1, 1, 1]), ["object 2", "y1 = -0.1", "[0, 1]"]),
    "outside pixels": (
        changed(("objects", 0, "box"), [0, 0, 641, 480], PIXELS),
        ["object 1", "x2 = 641", "[0, 640]", "inside"],
    ),
    "swapped x": (changed(BOX, [0.5, 0, 0.4, 1]), ["object 2", "x2 = 0.4", "x1 = 0.5", "swap"]),
    "swapped y": (changed(BOX, [0, 0.9, 1, 0.1]), ["object 2", "y2 = 0.1", "y1 = 0.9", "swap"]),
    "no extent": (changed(BOX, [0.5, 0, 0.5, 1]), ["object 2", "x2 = 0.5 <= x1 = 0.5"]),
    "size a number": (PLAIN | {"size": 64}, ["size is 64", "[width, height]"]),
    "size null": (PLAIN | {"size": None}, ["size is null", "[width, height]"]),
    "size of three": (PLAIN | {"size": [1, 2, 3]}, ["size", "[width, height]"]),
    "size zero": (PLAIN | {"size": [64, 0]}, ["size is [64, 0]", "positive"]),
    "size of half a pixel": (PLAIN | {"size": [64.5, 64]}, ["size is [64.5, 64]", "whole"]),
    "size without end": (PLAIN | {"size": [1e30, 1e30]}, ["size is [1e+30", "at most 1000000"]),
    "size nan": (PLAIN | {"size": [math.nan, 1]}, ["size width", "finite"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_refusal_names_the_object_the_value_and_the_mend(name):
    data, words = REFUSED[name]
    message = refusal(lambda: Layout.from_dict(data))
    assert all(word in message for word in words), message


TEXTS = {
    "empty": ("", "not valid JSON at line 1"),
    "truncated": (json.dumps(PLAIN)[:-20], "not valid JSON at line 1 column"),
    "duplicate key": ('{"caption": "a", "caption": "b", "objects": []}', '"caption" appears twice'),
    "bare NaN": (json.dumps(changed(BOX, [0, 0, math.nan, 1])), "finite"),
    "bare 1e999": (json.dumps(PLAIN).replace("0.45", "1e999"), "finite"),
    "too many digits": (json.dumps(PLAIN).replace("0.45", "1" * 5000), "digits"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "nested box": (json.dumps(PLAIN).replace("[0.1,", "[" * 50_000 + "0.1,"), "nested too deeply"),
    "byte order mark": ("\ufeff" + json.dumps(PLAIN), "BOM"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_layout(name):
    text, word = TEXTS[name]
    assert word in refusal(lambda: Layout.loads(text))


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "layout.json"
    message = refusal(lambda: Layout.load(path))
    assert str(path) in message and "No such file" in message
    assert str(tmp_path) in refusal(lambda: Layout.load(tmp_path))
    path.write_bytes(json.dumps(PLAIN).encode("utf-16"))
    assert "UTF-8" in refusal(lambda: Layout.load(path))
    path.write_bytes(b'{"caption": "\xff"}')
    assert "UTF-8" in refusal(lambda: Layout.load(path))
    path.write_text("{}")
    message = refusal(lambda: Layout.load(path))
    assert message.startswith(f"{path}: ") and '"caption"' in message


def test_a_file_that_windows_marked_as_utf_8_is_read(tmp_path):
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(PLAIN), encoding="utf-8-sig")
    assert Layout.load(path) == Layout.from_dict(PLAIN)


def test_a_layout_made_in_code_is_checked_too():
    one = LayoutObject("a star", (0, 0, 1, 1))
    for make in (
        lambda: LayoutObject("", (0, 0, 1, 1)),
        lambda: LayoutObject("a star", (0, 0, 0, 1)),
        lambda: Layout("a star", ()),
        lambda: Layout("a star", ({"expr": "a star", "box": [0, 0, 1, 1]},)),
        lambda: Layout("\t", (one,)),
        lambda: Layout("a star", (one,), (64, 0)),
        lambda: Layout("a star", (one,), (64, math.nan)),
    ):
        refusal(make)


def refusal(act) -> str:
    """The one line that ``act`` is refused with."""
    with pytest.raises(LayoutError) as caught:
        act()
    message = str(caught.value)
    assert message and message.isprintable(), message
    assert len(message) < 400, message
    return message


# --- anything at all ------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -0.0, 0, 1, 1.0, 5e-324, 1e308, 1.0000000000000002]
    ),
    st.integers(-3, 3),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.floats(0, 1),
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates too
SCALARS = st.one_of(NUMBERS, st.none(), st.booleans(), ANY_TEXT)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.sampled_from(["caption", "objects", "expr", "box", "size", "x"]), inner),
    ),
    max_leaves=12,
)
BOXES = st.one_of(
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.lists(NUMBERS, min_size=3, max_size=5),
    st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.5, 1), st.floats(0.5, 1)).map(list),
)
LIKELY = st.fixed_dictionaries(
    {
        "caption": st.one_of(ANY_TEXT, st.just("a scene")),
        "objects": st.lists(
            st.fixed_dictionaries({"expr": st.one_of(ANY_TEXT, st.just("a")), "box": BOXES}),
            max_size=3,
        ),
    },
    optional={"size": st.lists(NUMBERS, min_size=2, max_size=2), "other": SCALARS},
)
PATHS = st.sampled_from(
    [("caption",), ("objects",), ("objects", 0), ("objects", 1), ("objects", 0, "expr"),
     ("objects", 0, "box"), ("objects", 0, "new"), ("objects", 0, "box", 2), ("size",), ("new",)]
)  # fmt: skip
MUTATED = st.builds(changed, PATHS, VALUES, st.sampled_from([PLAIN, PIXELS])) | st.builds(
    changed, st.just(("objects", 0, "box")), BOXES, st.sampled_from([PLAIN, PIXELS])
)


def close(found: object, wanted: object, scale: float) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(
            close(found[k], wanted[k], scale) for k in wanted
        )
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(
            close(f, w, scale) for f, w in zip(found, wanted, strict=True)
        )
    if isinstance(wanted, str):
        return found == wanted
    return abs(found - wanted) <= 1e-12 * scale


def unchanged_or_refused(data: object, layout: Layout | None) -> None:
    if layout is not None:
        scale = max((1.0, *layout.size)) if layout.size else 1.0
        assert close(layout.to_dict(), data, scale)
        for o in layout.objects:
            x1, y1, x2, y2 = o.box
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def read(act) -> Layout | None:
    try:
        return act()
    except LayoutError as error:
        assert str(error) and str(error).isprintable() and len(str(error)) < 600
        return None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(VALUES, LIKELY, MUTATED))
def test_any_json_is_taken_unchanged_or_refused(data):
    unchanged_or_refused(data, read(lambda: Layout.from_dict(data)))
    text = json.dumps(data)  # with NaN and Infinity, as many writers have it
    unchanged_or_refused(data, read(lambda: Layout.loads(text)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([json.dumps(PLAIN), json.dumps(PIXELS, ensure_ascii=False)]),
    st.integers(0, 400),
    st.integers(0, 6),
    st.one_of(st.binary(max_size=4), st.sampled_from([b"NaN", b"[", b'"', b",", b"1e400", b"\0"])),
)
def test_damaged_bytes_are_taken_as_written_or_refused(tmp_path_factory, text, at, cut, insert):
    raw = text.encode()
    at %= len(raw)
    raw = raw[:at] + insert + raw[at + cut :]
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(raw)
    layout = read(lambda: Layout.load(path))
    if layout is not None:
        unchanged_or_refused(json.loads(raw.decode()), layout)


@pytest.mark.parametrize("kept", range(0, len(json.dumps(PLAIN)), 7))
def test_no_beginning_of_a_file_is_a_layout(tmp_path, kept):
    path = tmp_path / "layout.json"
    path.write_bytes(json.dumps(PLAIN).encode()[:kept])
    assert read(lambda: Layout.load(path)) is None
