"""Layouts become token ids and come back; the grammar admits every box and nothing else."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from echogen.engine.layout import Layout, LayoutError, LayoutObject, check_text
from echogen.engine.prompt import (
    LocationCodec,
    PromptError,
    Prompts,
    TextualCodec,
    feasible,
    longest_token,
    quantise,
)

BINS = 33
CODECS = ["location", "textual"]

LAYOUTS = {
    "one": Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.45, 0.6)),)),
    "two": Layout(
        "A photo: a cat, and 2 dogs.",
        (
            LayoutObject("the cat (left)", (0, 0, 0.5, 1)),
            LayoutObject("the dogs", (0.5004, 0.1235, 1, 0.9999)),
        ),
    ),
    "unicode, thin": Layout(
        "ein größerer Kreis über 猫", (LayoutObject("猫", (0.9999, 0.3, 1.0, 0.3001)),)
    ),
}
# PlanGen's prompts between BOS and begin-of-image, written out.
PLANGEN = {
    "one": "<|User|>: a red circle\n\n<|Assistant|>: <grounding><ref>a red circle</ref>"
    "<box>[100, 200, 450, 600]</box></grounding>",
    "two": "<|User|>: A photo: a cat, and 2 dogs.\n\n<|Assistant|>: <grounding>"
    "<ref>the cat (left)</ref><box>[0, 0, 500, 1000]</box>"
    "<ref>the dogs</ref><box>[500, 124, 1000, 1000]</box></grounding>",
    "unicode, thin": "<|User|>: ein größerer Kreis über 猫\n\n<|Assistant|>: <grounding>"
    "<ref>猫</ref><box>[999, 300, 1000, 301]</box></grounding>",
}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def both(small_tokenizer) -> dict[str, Prompts]:
    return {
        "location": Prompts(small_tokenizer, LocationCodec(small_tokenizer, BINS)),
        "textual": Prompts(small_tokenizer, TextualCodec(small_tokenizer)),
    }


@pytest.fixture(params=CODECS)
def prompts(request, both) -> Prompts:
    return both[request.param]


# --- the two sequences ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANGEN)
def test_l2i_is_plangens_byte_for_byte(both, name):
    prompts = both["textual"]
    assert prompts.l2i_text(LAYOUTS[name]) == PLANGEN[name]
    ids = prompts.l2i(LAYOUTS[name])
    written = f"{BOS}{PLANGEN[name]}{EOS}<begin_of_image>"
    assert prompts.tokenizer.decode(ids) == written
    assert prompts.tokenizer.encode(written, add_special_tokens=False) == ids


def test_location_tokens_stand_where_the_text_would(both):
    text = both["location"].l2i_text(LAYOUTS["one"])
    assert text == PLANGEN["one"].replace("[100, 200, 450, 600]", "<loc_3><loc_6><loc_14><loc_19>")


def test_l2i_ids_begin_and_end_as_they_must(prompts):
    vocab = prompts.tokenizer.get_vocab()
    for layout in LAYOUTS.values():
        ids = prompts.l2i(layout)
        assert ids[:2] == [vocab[BOS], vocab["<|User|>"]]  # no space after BOS
        assert ids[-3:] == [vocab["</grounding>"], vocab[EOS], vocab["<begin_of_image>"]]
        assert vocab["<end_of_image>"] not in ids
        assert ids.count(vocab[BOS]) == ids.count(vocab[EOS]) == 1


def test_i2l_trunk_and_branches(prompts):
    decode, vocab = prompts.tokenizer.decode, prompts.tokenizer.get_vocab()
    before, after = prompts.i2l()
    assert decode(before) == f"{BOS}<|User|>: <begin_of_image>"
    assert decode(after) == "<end_of_image> Locate each object.\n\n<|Assistant|>:"
    assert before[0] == vocab[BOS] and after[0] == vocab["<end_of_image>"]
    assert decode(prompts.branch("the cat (left)")) == "<ref>the cat (left)</ref><box>"
    answer = prompts.answer((0.25, 0.5, 0.75, 1))
    expected = {"location": "<loc_8><loc_16><loc_24><loc_32>", "textual": "[250, 500, 750, 1000]"}
    assert decode(answer) == expected[prompts.codec.name] + "</box>"
    assert answer[-1] == vocab["</box>"]


def test_a_branch_and_its_answer_are_what_l2i_holds(prompts):
    """Both tasks spell an object with the same ids."""
    for layout in LAYOUTS.values():
        ids = prompts.l2i(layout)
        for o in layout.objects:
            wanted = prompts.branch(o.expr) + prompts.answer(o.box)
            assert any(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))


def test_the_question_holds_no_expression_and_can_be_changed(small_tokenizer):
    codec = LocationCodec(small_tokenizer, BINS)
    _, after = Prompts(small_tokenizer, codec, "Where?").i2l()
    assert small_tokenizer.decode(after) == "<end_of_image> Where?\n\n<|Assistant|>:"


def test_unconditional_prompts(prompts):
    ids = prompts.l2i(LAYOUTS["two"])
    pad = prompts.unconditional(ids, "pad")
    assert pad == [prompts.bos] + [prompts.pad] * (len(ids) - 2) + [prompts.begin_image]
    assert prompts.unconditional(ids) == pad
    empty = prompts.unconditional(ids, "empty")
    assert prompts.tokenizer.decode(empty) == (
        f"{BOS}<|User|>: \n\n<|Assistant|>: <grounding></grounding>{EOS}<begin_of_image>"
    )


def test_guidance_leads_away_from_the_padding_of_janus(small_tokenizer):
    """It does so whatever the tokenizer itself pads with. Without that mark, it steers away from
    the given id, or else from the tokenizer's own."""
    tokenizer = copy.deepcopy(small_tokenizer)
    codec, mark = LocationCodec(tokenizer, BINS), tokenizer.get_vocab()["<｜▁pad▁｜>"]
    tokenizer.pad_token = tokenizer.eos_token
    assert Prompts(tokenizer, codec, pad=7).pad == Prompts(tokenizer, codec).pad == mark
    vocab = {t: i for t, i in tokenizer.get_vocab().items() if i != mark}
    tokenizer.get_vocab = lambda: vocab
    assert Prompts(tokenizer, codec).pad == tokenizer.eos_token_id
    assert Prompts(tokenizer, codec, pad=7).unconditional([0] * 4)[1:3] == [7, 7]
    tokenizer.pad_token = None
    with pytest.raises(PromptError, match="no PAD token"):
        Prompts(tokenizer, codec)


def test_letters_among_the_added_tokens_are_text_like_others(small_tokenizer):
    """DeepSeek's vocabulary, which is Janus's, has such letters."""
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.add_tokens(["ü", "ø"])
    prompts = Prompts(tokenizer, LocationCodec(tokenizer, BINS))
    layout = Layout("grün, üüø", (LayoutObject("die Tür von Bjørn", (0, 0, 1, 1)),))
    ids = prompts.l2i(layout)
    assert ids.count(tokenizer.get_vocab()["ü"]) == 4
    assert prompts.layout(ids) == layout


# --- round trips ----------------------------------------------------------------------------------


def taken(text: str) -> bool:
    """Whether a layout may hold the text: it must be one line that spells no token."""
    try:
        return "<" not in check_text(text, "text")
    except LayoutError:
        return False


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(taken)


@st.composite
def boxes(draw, scale: int) -> tuple[float, float, float, float]:
    """Any box, often thinner than a bin, often on the canvas's edge."""
    ends = []
    for _ in range(2):
        near = st.one_of(st.floats(0, 1), st.integers(0, 2 * scale).map(lambda i: i / (2 * scale)))
        low, high = sorted((draw(near), draw(near)))
        if draw(st.integers(0, 3)) == 0:
            high = min(1.0, low + draw(st.floats(0, 1)) / scale)
        if high <= low:
            low, high = (low, 1.0) if low < 1 else (1 - 0.25 / scale, 1.0)
        ends.append((low, high))
    (x1, x2), (y1, y2) = ends
    return x1, y1, x2, y2


def check_recovered(found, box, scale: int) -> None:
    """Check that edges are off by half a bin at most; a side thinner than a bin becomes one bin,
    nearby."""
    for low, high in ((0, 2), (1, 3)):
        loose = 0.0
        if box[high] - box[low] < 1 / scale:
            assert round((found[high] - found[low]) * scale, 6) == 1
            loose = 1.0
        assert abs(found[low] - box[low]) * scale <= 0.5 + loose + 1e-9
        assert abs(found[high] - box[high]) * scale <= 0.5 + loose + 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(CODECS))
def test_layouts_survive_the_round_trip_to_half_a_bin(both, data, name):
    prompts = both[name]
    scale = prompts.codec.scale
    objects = data.draw(st.lists(st.tuples(WORDS, boxes(scale)), min_size=1, max_size=3))
    layout = Layout(data.draw(WORDS), tuple(LayoutObject(e, b) for e, b in objects))
    ids = prompts.l2i(layout)
    found = prompts.layout(ids)
    assert found.caption == layout.caption
    assert [o.expr for o in found.objects] == [o.expr for o in layout.objects]
    for o, wanted in zip(found.objects, layout.objects, strict=True):
        check_recovered(o.box, wanted.box, scale)
    assert prompts.l2i(found) == ids  # quantised boxes stay where they are


@settings(max_examples=70, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(CODECS))
def test_answers_parse_and_the_grammar_lets_them_through(both, data, name):
    codec = both[name].codec
    box = data.draw(boxes(codec.scale))
    *answer, end = both[name].answer(box)
    assert end == both[name].box_end and len(answer) <= codec.steps
    check_recovered(codec.parse(answer), box, codec.scale)
    for i, token in enumerate(answer):
        assert token in codec.allowed(tuple(answer[:i]))
    assert codec.allowed(tuple(answer)) == []


@pytest.mark.parametrize("scale", [1, 2, 32, 1000])
def test_thin_boxes_become_one_bin_inside_the_canvas(scale):
    for at in [0, 0.2501, 0.5, 0.75, 1 - 1e-9]:
        x1, y1, x2, y2 = quantise((at, at, min(1.0, at + 1e-10), min(1.0, at + 1e-10)), scale)
        assert (x2 - x1, y2 - y1) == (1, 1)
        assert 0 <= x1 <= scale - 1 and x2 <= scale


# --- the grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(18))
def test_every_walk_through_the_grammar_ends_in_a_box(prompts, seed):
    codec, rng, ids = prompts.codec, random.Random(seed), []
    greedy = seed % 3
    while allowed := codec.allowed(tuple(ids)):
        ids.append({0: rng.choice(allowed), 1: allowed[0], 2: allowed[-1]}[greedy])
        assert len(ids) <= codec.steps
    x1, y1, x2, y2 = codec.parse(ids)
    assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_every_box_of_a_few_bins_is_reached_and_no_other():
    """Compare `feasible` with the definition, text by text, for a scale that is small enough."""
    scale = 11
    pairs = [(a, b) for a in range(scale) for b in range(a + 1, scale + 1)]
    texts = {f"[{a}, {c}, {b}, {d}]" for a, b in pairs[::3] for c, d in pairs[::4]}
    beginnings = {t[:i] for t in texts for i in range(len(t) + 1)}
    assert all(feasible(t, scale) for t in beginnings)
    wrong = (
        "[11", "[00", "[01", "[5, 5, 5", "[5, 5, 6, 5", "[5,5", "[ 5", "x", "[5, 5, 12", "[1,  2",
        "[10, 10, 10", "[10, 10, 11, 11]]", "[5, 5, 6, 7] ", "[1]", "[,",
    )  # fmt: skip
    for text in wrong:
        assert not feasible(text, scale), text
    assert feasible("[10, 10, 1", scale) and not feasible("[10, 10, 2", scale)


def test_location_grammar_lists_exactly_the_valid_boxes(small_tokenizer):
    codec = LocationCodec(small_tokenizer, 4)

    def walk(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        allowed = codec.allowed(ids)
        return [end for t in allowed for end in walk((*ids, t))] if allowed else [ids]

    reached = [codec.parse(list(ids)) for ids in walk(())]
    pairs = [(a / 3, b / 3) for a in range(3) for b in range(a + 1, 4)]
    assert sorted(reached) == sorted((x1, y1, x2, y2) for x1, x2 in pairs for y1, y2 in pairs)


@pytest.mark.parametrize("text", [
    "", "[", "[1, 2, 3, 4", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[3, 2, 1, 4]", "[1, 4, 3, 4]",
    "[1, 2, 3, 1001]", "[1000, 0, 1000, 5]", "[-1, 2, 3, 4]", "[01, 2, 3, 4]", "[1,2,3,4]",
    "[1, 2, 3, 4] ", " [1, 2, 3, 4]", "[0.1, 0.2, 0.3, 0.4]", "a red circle", "[1, 2, 3, ٤]",
    "<loc_1><loc_2><loc_3>", "<loc_1><loc_2><loc_3><loc_4><loc_5>", "<loc_3><loc_2><loc_1><loc_4>",
    "<loc_1><loc_2><loc_3>x", "<loc_1><loc_2><loc_3><ref>", "[1, <pad>2, 3, 4]",
])  # fmt: skip
def test_what_is_no_box_parses_to_none(prompts, text):
    text = text.replace("<pad>", prompts.tokenizer.pad_token)
    ids = prompts.tokenizer.encode(text, add_special_tokens=False)
    assert prompts.codec.parse(ids) is None


@settings(max_examples=70, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(CODECS))
def test_unconstrained_garbage_parses_to_none(both, data, name):
    prompts = both[name]
    vocabulary = len(prompts.tokenizer)
    some = st.lists(st.integers(0, vocabulary + 40), max_size=12)  # spare rows of the embedding too
    prompt = prompts.l2i(LAYOUTS["two"])
    ids = data.draw(some)
    box = prompts.codec.parse(ids)
    assert box is None or (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)
    at, cut = data.draw(st.integers(0, len(prompt))), data.draw(st.integers(0, 4))
    broken = prompt[:at] + ids + prompt[at + cut :]
    for _, box in prompts.boxes(broken):
        assert box is None or (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)
    try:
        assert prompts.layout(broken).objects
    except PromptError as error:
        assert str(error)


def test_spare_ids_between_digits_are_no_box(both):
    """Rows of the embedding beyond the tokenizer decode to nothing, yet are no part of a box."""
    prompts = both["textual"]
    *ids, _ = prompts.answer((0.1, 0.2, 0.3, 0.4))
    assert prompts.codec.parse(ids) == (0.1, 0.2, 0.3, 0.4)
    assert prompts.codec.parse([*ids[:3], len(prompts.tokenizer) + 3, *ids[3:]]) is None


def test_boxes_are_read_one_by_one(prompts):
    good = prompts.branch("a cat") + prompts.answer((0.25, 0.25, 0.5, 0.5))
    no_box = [*prompts.branch("a dog"), prompts.box_end]
    bare = prompts.branch("a cow")[:-1]
    found = prompts.boxes([prompts.pad, *good, *no_box, *bare, *good])
    assert [expr for expr, _ in found] == ["a cat", "a dog", "a cow", "a cat"]
    assert [box is None for _, box in found] == [False, True, True, False]
    assert prompts.boxes([]) == []


@pytest.mark.parametrize("spoil", [
    lambda p, ids: [], lambda p, ids: ids[1:], lambda p, ids: ids[:-1], lambda p, ids: ids[:9],
    lambda p, ids: [i for i in ids if i != p.ref], lambda p, ids: [i for i in ids if i != p.box],
    lambda p, ids: [ids[0], *ids[2:]], lambda p, ids: p.unconditional(ids, "empty"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused(prompts, spoil):
    with pytest.raises(PromptError):
        prompts.layout(spoil(prompts, prompts.l2i(LAYOUTS["one"])))


# --- refusals -------------------------------------------------------------------------------------

RESERVED = [
    "<ref>", "</ref>", "<box>", "</box>", "<grounding>", "</grounding>", "<begin_of_image>",
    "<end_of_image>", "<|User|>", "<|Assistant|>", "<loc_0>", "<loc_7777>", BOS, EOS,
    "<image_placeholder>",
]  # fmt: skip


@pytest.mark.parametrize("token", RESERVED)
def test_reserved_tokens_are_refused(prompts, token):
    text, box = f"a {token} cat", (0, 0, 1, 1)
    for layout, where in (
        (Layout(text, (LayoutObject("a cat", box),)), "caption"),
        (Layout("a cat", (LayoutObject("a cat", box), LayoutObject(text, box))), "object 2"),
    ):
        with pytest.raises(LayoutError, match=where):
            prompts.l2i(layout)
    with pytest.raises(LayoutError, match="expr"):
        prompts.branch(text)


def test_texts_of_strangers_do_not_fill_the_memory(prompts):
    short, long = "a red circle", "a red circle " * 1000
    kept = prompts._kept.cache_info().currsize
    for text in (short, long, long + "!"):
        assert prompts.branch(text) == prompts.branch(text)
    assert prompts._kept.cache_info().currsize <= kept + 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_a_text_takes_no_fewer_tokens_than_its_length_says(both, data):
    """Not even one that is spelled in the vocabulary's longest tokens."""
    prompts = both["location"]
    tokenizer = prompts.tokenizer
    longest = sorted((tokenizer.decode([i]) for i in tokenizer.vocab.values()), key=len)
    some = st.one_of(WORDS, st.sampled_from([t for t in longest if "<" not in t][-10:]))
    text = "".join(data.draw(st.lists(some, max_size=40)))
    assert prompts.fewest(text) <= len(tokenizer.encode(text, add_special_tokens=False))
    assert prompts.fewest(text, text) == -(-2 * len(text) // longest_token(tokenizer))


@pytest.mark.parametrize("change", [
    lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.NFC()),
    lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])),
    lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("removed"), pre_tokenizers.ByteLevel(False)])),
    lambda t: setattr(t.backend_tokenizer, "model", models.WordLevel(t.vocab, "<|User|>")),
    lambda t: t.add_tokens([AddedToken("ü", lstrip=True)]),
])  # fmt: skip
def test_a_length_says_nothing_where_tokens_may_stand_for_any_text(small_tokenizer, change):
    """Such as runs of blanks, or whole unknown words."""
    assert longest_token(small_tokenizer) == len(max(small_tokenizer.vocab, key=len))
    tokenizer = copy.deepcopy(small_tokenizer)
    change(tokenizer)
    assert longest_token(tokenizer) is None
    assert Prompts(tokenizer, LocationCodec(tokenizer, BINS)).fewest("x" * 10_000) == 0


def test_a_length_is_known_of_a_tokenizer_like_janus(small_tokenizer):
    """DeepSeek's splits texts by several patterns before it takes their bytes."""
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in ("[\r\n]", "\\s?[A-Za-z]+")]
    steps = [*splits, pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.add_tokens(["ü", "#" * 128])
    assert longest_token(tokenizer) == 128


@pytest.mark.parametrize("expr", ["", "  "])
def test_an_empty_expression_is_refused(prompts, expr):
    with pytest.raises(LayoutError, match="empty"):
        prompts.branch(expr)


def test_a_tokenizer_without_the_tokens_is_refused(small_tokenizer):
    with pytest.raises(PromptError, match=r"no <loc_33>.*textual codec"):
        LocationCodec(small_tokenizer, BINS + 1)
    with pytest.raises(PromptError, match="at least 2"):
        LocationCodec(small_tokenizer, 1)
