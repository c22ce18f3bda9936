"""The packed sequence of stage 1: trees keep to themselves, and the loss is where it belongs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from echogen.engine.config import ModelConfig
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.prompt import LocationCodec, Prompts, TextualCodec
from echogen.train.data.packing import (
    NO_TARGET,
    Batch,
    Tree,
    block_mask,
    i2l_tree,
    l2i_group_tree,
    l2i_tree,
    lay,
    pack,
    shared_tree,
    visibility,
    visible,
)
from echogen.train.data.rows import ROW_TOKENS, cheapest
from echogen.train.stages import passes
from echogen.train.stages.passes import hidden_states
from echogen.train.tokenizer import train_tokenizer

T, V = 9, 20
LAYOUT = Layout(
    "a red circle and a star",
    (LayoutObject("a red circle", (0.1, 0.1, 0.5, 0.5)), LayoutObject("a star", (0.4, 0, 1, 1))),
)
QUESTIONS = [(o.expr, o.box) for o in LAYOUT.objects]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle and a star", "a blue circle"] * 3, bins=17, merges=20)


@pytest.fixture(scope="module", params=["location", "textual"])
def prompts(request, tokenizer) -> Prompts:
    codec = LocationCodec(tokenizer, 17) if request.param == "location" else TextualCodec(tokenizer)
    return Prompts(tokenizer, codec)


@pytest.fixture(scope="module")
def model(tokenizer) -> UnifiedTransformer:
    """Random, no weight zero."""
    config = ModelConfig(
        vocab_size=len(tokenizer), codebook_size=V, code_dim=4, width=32, layers=3, heads=2,
        kv_heads=1, head_dim=16, mlp_width=40, head_width=32, aligner_depth=2, pixel_dim=8,
        pixel_aligner_depth=1, rope_theta=1e4, norm_eps=1e-6, image_tokens=T, image_size=24,
        max_positions=256, tied=False,
    )  # fmt: skip
    model = UnifiedTransformer(config)
    model.initialise(0, std=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    assert all((p != 0).all() for p in model.parameters())
    return model


def codes(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(V, size=T)


@torch.no_grad()
def logits(model: UnifiedTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Image and text logits at every position, as training computes them."""
    hidden = hidden_states(model, batch)
    return model.image_head(hidden), model.text_head(hidden)


def some_trees(prompts: Prompts) -> list[Tree]:
    v = len(prompts.tokenizer)
    return [
        l2i_tree(prompts.l2i(LAYOUT), codes(0), v),
        i2l_tree(prompts, codes(0), QUESTIONS, v),
        l2i_tree(prompts.unconditional(prompts.l2i(LAYOUT), "empty"), codes(1), v),
        i2l_tree(prompts, codes(2), QUESTIONS[:1], v),
        i2l_tree(prompts, codes(1), QUESTIONS[::-1] * 2, v),
    ]


def in_one_row(trees: list[Tree], padding: int = 0) -> Batch:
    """Trees one behind the other in the order given, which `pack` decides by length."""
    return lay(trees, [list(range(len(trees)))], sum(map(len, trees)) + padding, pad=0)


# --- where the loss is ----------------------------------------------------------------------------


def test_l2i_targets_are_the_image_codes_and_nothing_else(prompts):
    prompt, z = prompts.l2i(LAYOUT), codes(0)
    tree = l2i_tree(prompt, z, 1000)
    assert tree.field("ids") == prompt + [1000 + c for c in z[:-1]]
    assert tree.field("positions") == list(range(len(prompt) + T - 1))
    assert set(tree.field("branch")) == {0}
    assert set(tree.field("texts")) == {NO_TARGET}
    # Begin-of-image predicts the first code, every code the next.
    assert tree.field("codes")[: len(prompt) - 1] == [NO_TARGET] * (len(prompt) - 1)
    assert tree.field("codes")[len(prompt) - 1 :] == z.tolist()
    assert prompt[-1] == prompts.begin_image


def test_images_of_one_prompt_share_it(prompts, model):
    """One tree of three images says of each what its own sequence says."""
    v, prompt = len(prompts.tokenizer), prompts.l2i(LAYOUT)
    images = np.stack([codes(i) for i in range(3)])
    group = l2i_group_tree(prompt, images, v)
    alone = [l2i_tree(prompt, z, v) for z in images]
    assert len(group) == len(prompt) - 1 + 3 * T
    batch = pack([group, *alone], prompts.pad)
    together, apart = logits(model, batch)[0].flatten(0, 1)[batch.code_at].chunk(2)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    for name, places in (("codes", batch.code_at), ("ids", batch.image_at)):
        first, second = batch.at(name, places).chunk(2)
        assert first.tolist() == second.tolist()


def test_i2l_targets_are_coordinates_and_the_end_of_the_box(prompts):
    z = codes(0)
    tree = i2l_tree(prompts, z, QUESTIONS, 1000)
    before, after = prompts.i2l()
    trunk = before + [1000 + c for c in z] + after
    assert tree.field("ids")[: len(trunk)] == trunk
    assert tree.field("positions")[: len(trunk)] == list(range(len(trunk)))
    assert tree.field("branch")[: len(trunk)] == [0] * len(trunk)
    assert set(tree.field("texts")[: len(trunk)]) == set(tree.field("codes")) == {NO_TARGET}
    at = len(trunk)
    for k, (expr, box) in enumerate(QUESTIONS, 1):
        question, answer = prompts.branch(expr), prompts.answer(box)
        here = slice(at, at + len(question) + len(answer) - 1)
        assert tree.field("ids")[here] == question + answer[:-1]
        assert tree.field("texts")[here] == [NO_TARGET] * (len(question) - 1) + answer
        assert answer[-1] == prompts.box_end
        assert tree.field("branch")[here] == [k] * (here.stop - here.start)
        assert tree.field("positions")[here] == [
            len(trunk) + i for i in range(here.stop - here.start)
        ]
        at = here.stop
    assert at == len(tree)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("times", [1, 40])
def test_packing_loses_and_invents_nothing(prompts, times, blocks):
    trees = some_trees(prompts) * times
    batch = pack(trees, prompts.pad, blocks=blocks)
    for i, tree in enumerate(trees):
        here = batch.tree == i
        for name in ("ids", "positions", "branch", "codes", "texts"):
            assert getattr(batch, name)[here].tolist() == tree.field(name)
        assert here.any(1).sum() == 1  # in one row, in one piece
        assert here.sum() == len(tree)
    for name, at in (("codes", batch.code_at), ("texts", batch.text_at)):
        wanted = [(i, v) for i, t in enumerate(trees) for v in t.field(name) if v != NO_TARGET]
        found = batch.at("tree", at).tolist(), batch.at(name, at).tolist()
        assert list(zip(*found, strict=True)) == wanted
    images = [
        (i, v) for i, t in enumerate(trees) for v in t.field("ids") if v >= len(prompts.tokenizer)
    ]
    at = batch.image_at
    found = batch.at("tree", at).tolist(), batch.at("ids", at).tolist()
    assert list(zip(*found, strict=True)) == images
    padding = batch.tree == -1
    assert (batch.ids[padding] == prompts.pad).all()
    assert (batch.codes[padding] == NO_TARGET).all() and (batch.texts[padding] == NO_TARGET).all()
    assert int(padding.sum()) < 0.1 * padding.numel() or times == 1


# --- who sees whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("one_row", [False, True])
def test_packed_trees_give_what_each_gives_alone(model, prompts, one_row, relative_error):
    trees = some_trees(prompts)
    batch = pack(trees, prompts.pad)
    if one_row:
        batch = in_one_row(trees, padding=5)
    together = logits(model, batch)
    assert all(torch.isfinite(t).all() for t in together)
    for i, tree in enumerate(trees):
        single = logits(model, pack([tree], prompts.pad))
        for found, wanted in zip(together, single, strict=True):
            assert relative_error(found[batch.tree == i], wanted[0]) < 1e-5


def test_a_branch_gives_what_it_gives_as_a_plain_sequence(model, prompts, relative_error):
    """No trees, no branches: image prefix and one question, causal, positions 0, 1, 2 …"""
    v = len(prompts.tokenizer)
    whole = i2l_tree(prompts, codes(0), QUESTIONS, v)
    found = logits(model, pack([whole], prompts.pad))[1][0]
    for k, question in enumerate(QUESTIONS, 1):
        tree = i2l_tree(prompts, codes(0), [question], v)
        ids = torch.tensor([tree.field("ids")])
        causal = torch.ones(1, len(tree), len(tree), dtype=torch.bool).tril()
        with torch.no_grad():
            hidden = model(
                model.embed_mixed(ids),
                torch.arange(len(tree)),
                additive_mask(causal, torch.float32),
            )
            wanted = model.text_head(hidden[0])
        assert relative_error(found[torch.tensor(whole.field("branch")) == k],
                              wanted[torch.tensor(tree.field("branch")) == 1]) < 1e-5  # fmt: skip


def test_the_layout_prompt_leaves_grounding_bit_identical(model, prompts):
    """No path leads from the prompt, which holds the answer, to the questions, in any layer."""
    v, prompt = len(prompts.tokenizer), prompts.l2i(LAYOUT)
    other = [prompt[0], *prompt[1:-2][::-1], *prompt[-2:]]
    assert len(other) == len(prompt) and other != prompt
    grounding = i2l_tree(prompts, codes(0), QUESTIONS, v)
    results = []
    for ids in (prompt, other):
        drawing = l2i_tree(ids, codes(0), v)
        # One row, the prompt in front of the questions: causality alone would let them see it.
        batch = in_one_row([drawing, grounding])
        image, text = logits(model, batch)
        results.append((image[batch.tree == 0], text[batch.tree == 1]))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("changed", [1, 2])
def test_a_question_leaves_the_others_bit_identical(model, prompts, changed):
    v = len(prompts.tokenizer)
    tree = i2l_tree(prompts, codes(0), [*QUESTIONS, ("a circle", (0.2, 0.2, 0.4, 0.8))], v)
    branch = torch.tensor(tree.field("branch"))
    batch = in_one_row([tree])
    before = logits(model, batch)[1][0]
    batch.ids[0, branch == changed] = batch.ids[0, branch == changed].flip(0)
    after = logits(model, batch)[1][0]
    assert torch.equal(before[branch != changed], after[branch != changed])
    assert not torch.equal(before[branch == changed], after[branch == changed])


def test_a_planted_leak_is_seen(model, prompts):
    """The tests above would notice: without the tree numbers the prompt reaches the questions."""
    v, prompt = len(prompts.tokenizer), prompts.l2i(LAYOUT)
    other = [prompt[0], *prompt[1:-2][::-1], *prompt[-2:]]
    grounding = i2l_tree(prompts, codes(0), QUESTIONS, v)
    texts = []
    for ids in (prompt, other):
        batch = in_one_row([l2i_tree(ids, codes(0), v), grounding])
        here = batch.tree == 1
        batch.tree.zero_()
        texts.append(logits(model, batch)[1][here])
    assert not torch.allclose(*texts, atol=1e-4)


# --- the shared mask ------------------------------------------------------------------------------


def test_a_shared_tree_has_both_tasks_targets_and_one_image(prompts):
    v, prompt, z = len(prompts.tokenizer), prompts.l2i(LAYOUT), codes(0)
    tree = shared_tree(prompts, prompt, z, QUESTIONS, v)
    drawing, grounding = l2i_tree(prompt, z, v), i2l_tree(prompts, z, QUESTIONS, v)
    assert [c for c in tree.field("codes") if c >= 0] == z.tolist()
    assert tree.field("codes")[: len(drawing)] == drawing.field("codes")
    assert [t for t in tree.field("texts") if t >= 0] == [
        t for t in grounding.field("texts") if t >= 0
    ]
    assert tree.field("ids")[: len(prompt)] == prompt
    assert tree.field("ids")[len(prompt) :] == grounding.field("ids")[len(prompts.i2l()[0]) :]
    # Positions go on behind the prompt; every branch starts behind the trunk.
    moved = len(prompt) - len(prompts.i2l()[0])
    assert tree.field("positions")[len(prompt) :] == [
        p + moved for p in grounding.field("positions")[len(prompts.i2l()[0]) :]
    ]


def test_who_sees_whom_in_a_shared_tree(prompts):
    v, prompt = len(prompts.tokenizer), prompts.l2i(LAYOUT)
    trees = [shared_tree(prompts, prompt, codes(i), QUESTIONS, v) for i in range(2)]
    batch = in_one_row([*trees, i2l_tree(prompts, codes(2), QUESTIONS, v)])
    seen, n = visibility(batch)[0], len(prompt)
    after = len(prompts.i2l()[1])
    parts = {"A": n, "B": T, "C": after}
    parts |= {f"D{k}": trees[0].field("branch").count(k) for k in (1, 2)}
    names = [name for name, length in parts.items() for _ in range(length)]
    sees = {"A": "A", "B": "AB", "C": "BC", "D1": ("B", "C", "D1"), "D2": ("B", "C", "D2")}
    size = len(names)
    wanted = torch.tensor(
        [[j <= i and names[j] in sees[names[i]] for j in range(size)] for i in range(size)]
    )
    for first in (0, size):  # both trees, and nothing from one to another
        here = slice(first, first + size)
        assert torch.equal(seen[here, here], wanted)
        outside = seen[here].clone()
        outside[:, here] = False
        assert not outside.any()


def test_the_image_carries_the_layout_prompt_to_the_questions(model, prompts):
    """The leak of the `shared` mask: the questions do not see the prompt, and yet it reaches them
    through the image; with the mask of one layer alone it would not."""
    v, prompt = len(prompts.tokenizer), prompts.l2i(LAYOUT)
    other = [prompt[0], *prompt[1:-2][::-1], *prompt[-2:]]
    assert len(other) == len(prompt) and other != prompt
    texts, firsts = [], []
    for ids in (prompt, other):
        batch = in_one_row([shared_tree(prompts, ids, codes(0), QUESTIONS, v)])
        asked = batch.branch >= 1
        texts.append(logits(model, batch)[1][asked])
        blocks, model.blocks = model.blocks, model.blocks[:1]
        firsts.append(logits(model, batch)[1][asked])
        model.blocks = blocks
    assert not torch.allclose(*texts, atol=1e-4)
    assert torch.equal(*firsts)


# --- on a device ----------------------------------------------------------------------------------


def trees_of_both_masks(prompts: Prompts) -> list[Tree]:
    v = len(prompts.tokenizer)
    shared = shared_tree(prompts, prompts.l2i(LAYOUT), codes(3), QUESTIONS, v)
    return [*some_trees(prompts), shared]


def test_flex_attention_is_told_the_same_as_the_dense_mask(prompts):
    batch = pack(trees_of_both_masks(prompts), prompts.pad)
    rows, length = batch.ids.shape
    row, query, key = torch.meshgrid(
        torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij"
    )
    found = visible(batch)(row, torch.zeros_like(row), query, key)
    assert torch.equal(found, visibility(batch))


@pytest.mark.parametrize("which", ["isolated", "both masks", "images of one prompt"])
def test_the_blocks_are_those_that_torch_finds(prompts, which):
    v, drawn = len(prompts.tokenizer), np.stack([codes(g) for g in range(5)])
    trees = {
        "isolated": lambda: some_trees(prompts),
        "both masks": lambda: trees_of_both_masks(prompts),
        "images of one prompt": lambda: [l2i_group_tree(prompts.l2i(LAYOUT), drawn, v)],
    }[which]()
    trees.append(l2i_tree(prompts.l2i(LAYOUT), np.zeros(300, dtype=np.int64), 1000))
    batch = lay(trees, [[0], list(range(1, len(trees)))], 8 * 128, prompts.pad)
    rows, length = batch.ids.shape
    found = block_mask(batch)
    wanted = create_block_mask(visible(batch), rows, None, length, length, "cpu", 128)
    assert found.shape == wanted.shape and found.BLOCK_SIZE == wanted.BLOCK_SIZE
    for side in ("kv", "q"):
        for kind in ("", "full_"):
            for what in ("num_blocks", "indices"):
                name = f"{kind}{side}_{what}"
                assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.to_dense(), wanted.to_dense())
    assert int(found.full_kv_num_blocks.sum()) > 0  # there are some of either kind
    assert int(found.kv_num_blocks.sum()) > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_what_the_dense_mask_gives(
    model, prompts, monkeypatch, relative_error
):
    trees = trees_of_both_masks(prompts)
    batch = lay(trees, [[0, 1, 2], list(range(3, len(trees)))], 3 * 128, prompts.pad)
    with torch.no_grad():
        dense = hidden_states(model, batch)
        monkeypatch.setattr(passes, "attention_mask", lambda batch, x: block_mask(batch))
        blocked = hidden_states(model, batch)
    assert relative_error(blocked, dense) < 1e-5
    assert not torch.equal(blocked, dense)  # another way was taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"]
)
def test_a_gpus_blocks_train_what_the_dense_mask_trains(
    model, prompts, monkeypatch, relative_error, dtype, bound
):
    trees = trees_of_both_masks(prompts)
    batch = lay(trees, [[0, 1, 2], list(range(3, len(trees)))], 3 * 128, prompts.pad).to("cuda")
    generator, found = torch.Generator("cuda").manual_seed(0), []
    weight = torch.randn(batch.ids.shape, generator=generator, device="cuda")[..., None]
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(
                passes, "attention_mask", lambda b, x: additive_mask(visibility(b), x.dtype)
            )
        moved = copy.deepcopy(model).to("cuda", dtype)
        hidden = hidden_states(moved, batch)
        (hidden.float().square() * weight).sum().backward()
        grads = [p.grad.flatten() for p in moved.blocks.parameters()]
        found.append((hidden.detach(), torch.cat(grads).float()))
    (hidden, grads), (wanted, wanted_grads) = found
    assert torch.isfinite(hidden).all() and grads.abs().max() > 0
    assert relative_error(hidden, wanted) < bound
    assert relative_error(grads, wanted_grads) < bound


# --- how many rows --------------------------------------------------------------------------------


def padding(lengths: list[int], blocks: bool) -> float:
    rows, length = cheapest(lengths, blocks)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= length for row in rows)
    assert not blocks or length % 128 == 0
    return 1 - sum(lengths) / (len(rows) * length)


@pytest.mark.parametrize(
    "tokens, blocks",
    [((88, 157), False), ((88, 157), True), ((280, 354), True), ((600, 669), True),
     ((600, 950), True)],
)  # fmt: skip
def test_little_of_a_batch_is_padding(tokens, blocks):
    """Lengths as the recipes have them: 64 codes on a CPU, and up to 576 on a GPU."""
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(*tokens, size=64).tolist()
        assert padding(lengths, blocks) < 0.06


def test_a_row_is_no_longer_than_its_mask_is_worth():
    equal, mixed = [130] * 1000, [400, 300] * 20
    assert cheapest(equal, False)[1] == 130  # nothing is padded, and no pair is in vain
    assert cheapest(mixed, False)[1] == 400  # two a row would be 700, all pairs of them
    assert cheapest(mixed, True)[1] > 700
    assert cheapest(equal, True)[1] <= ROW_TOKENS
    assert cheapest([130] * 999 + [ROW_TOKENS + 1], True)[1] == ROW_TOKENS + 128
    assert cheapest([5000, 5, 5], False)[1] == 5000


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_is_not_compiled_anew_for_every_shape_of_rows(prompts):
    """Batches differ in their rows' number and length: both become symbols at the second shape.
    Behind `VARIANTS` a run would end."""
    compiled = CompileCounter()
    attend = torch.compile(flex_attention, backend=compiled)
    tree = l2i_tree(prompts.l2i(LAYOUT), np.zeros(90, dtype=np.int64), 1000)
    for rows, blocks in [(4, 2), (2, 4), (4, 3), (2, 2), (3, 5), (6, 2), (5, 6), (1, 2), (1, 3)]:
        batch = lay([tree] * rows, [[r] for r in range(rows)], 128 * blocks, prompts.pad)
        query = torch.randn(rows, 2, 128 * blocks, 8)
        attend(query, query, query, block_mask=block_mask(batch))
    assert compiled.frame_count <= 3  # the first, every other, a single row


def test_a_batch_goes_to_a_device_whole(prompts):
    batch = pack(some_trees(prompts), prompts.pad)
    assert batch.to(torch.device("cpu")) is batch
    there = batch.to(torch.device("meta"))
    for name, part in vars(batch).items():
        moved = getattr(there, name)
        assert moved.is_meta and moved.shape == part.shape and moved.dtype == part.dtype


@pytest.fixture(scope="module")
def relative_error():
    """Largest difference over largest magnitude."""

    def measure(found: Tensor, wanted: Tensor) -> float:
        assert found.shape == wanted.shape
        return ((found - wanted).abs().max() / wanted.abs().max()).item()

    return measure
