"""Finding many expressions at once gives what each gives alone, with one full forward per token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from echogen.engine.config import ModelConfig
from echogen.engine.ground import Branches, ground_images, parts
from echogen.engine.layout import Box
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.prompt import LocationCodec, Prompts, TextualCodec

EXPRESSIONS = [
    ["a red circle", "the left of the two green stars", "a blue square in front"],
    ["a star"],
    ["two green stars", "a circle"],
]


@pytest.fixture(scope="module")
def small(janus_config, small_tokenizer) -> UnifiedTransformer:
    """A random model whose weights are large enough that every token it sees matters."""
    text = {"vocab_size": len(small_tokenizer), "max_position_embeddings": 256}
    model = UnifiedTransformer(ModelConfig.from_janus(janus_config(**text)))
    model.initialise(0, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["location", "textual"])
def prompts(request, small_tokenizer) -> Prompts:
    codec = {"location": lambda: LocationCodec(small_tokenizer, 33),
             "textual": lambda: TextualCodec(small_tokenizer)}[request.param]()  # fmt: skip
    return Prompts(small_tokenizer, codec)


@pytest.fixture(scope="module")
def images(small) -> Tensor:
    """Three embedded images [3, T, D]."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(EXPRESSIONS), small.config.image_tokens)
    with torch.no_grad():
        return small.embed_codes(
            torch.randint(small.config.codebook_size, shape, generator=generator)
        )


@torch.inference_mode()
def alone(model: UnifiedTransformer, prompts: Prompts, image: Tensor, expr: str) -> Box:
    """One expression as one plain causal sequence, recomputed for every token."""
    before, after = (model.embed_text(torch.tensor(ids)) for ids in prompts.i2l())
    trunk = torch.cat((before, image, after))
    answer: list[int] = []
    while allowed := prompts.codec.allowed(tuple(answer)):
        tail = model.embed_text(torch.tensor(prompts.branch(expr) + answer))
        embedded = torch.cat((trunk, tail)).unsqueeze(0)
        length = embedded.shape[1]
        causal = torch.ones(1, length, length, dtype=torch.bool).tril()
        hidden = model(embedded, torch.arange(length), additive_mask(causal, torch.float32))
        logits = model.text_head(hidden[0, -1])
        answer.append(max(allowed, key=lambda i: logits[i].item()))
    box = prompts.codec.parse(answer)
    assert box is not None
    return box


def test_boxes_are_those_of_each_expression_alone(small, prompts, images):
    found = ground_images(small, prompts, images, EXPRESSIONS)
    assert [len(row) for row in found] == [3, 1, 2]
    wanted = [
        [alone(small, prompts, image, e) for e in row]
        for image, row in zip(images, EXPRESSIONS, strict=True)
    ]
    assert found == wanted
    assert len({box for row in found for box in row}) > 2  # one box for all would prove little


def test_answers_depend_on_neither_order_nor_number(small, prompts, images):
    wanted = ground_images(small, prompts, images[:1], EXPRESSIONS[:1])[0]
    for order in ([2, 0, 1], [1], [2, 1], [0, 0, 2, 0]):
        asked = [EXPRESSIONS[0][i] for i in order]
        assert ground_images(small, prompts, images[:1], [asked]) == [[wanted[i] for i in order]]


def test_many_expressions_go_part_after_part(small, prompts, images, monkeypatch):
    """They are run in parts, as one mask of all branches grows with the square of their tokens."""
    wanted, longest = ground_images(small, prompts, images, EXPRESSIONS), []
    made = Branches.__init__

    def counted(self, model, prompts, image, branches, *rest):
        longest.append(max(sum(map(len, row)) for row in branches))
        made(self, model, prompts, image, branches, *rest)

    monkeypatch.setattr(Branches, "__init__", counted)
    monkeypatch.setattr("echogen.engine.ground.MOST_ASKED", 40)
    assert ground_images(small, prompts, images, EXPRESSIONS) == wanted
    assert max(longest) <= 40
    monkeypatch.setattr("echogen.engine.ground.MOST_ASKED", 1)
    assert ground_images(small, prompts, images, EXPRESSIONS) == wanted, "one by one"


def test_images_run_in_parts_that_fit_with_their_masks(small, prompts, images, monkeypatch):
    (before, after), c, asked = prompts.i2l(), small.config, EXPRESSIONS[:1] * 3
    questions = sum(len(prompts.branch(e)) + prompts.codec.steps for e in EXPRESSIONS[0])
    length = len(before) + images.shape[1] + len(after) + questions
    cache = 2 * c.layers * c.kv_heads * c.head_dim * length * 4
    mask = length**2 * (4 + 1)  # float32 and bool
    wanted = ground_images(small, prompts, images, asked)
    for held, together in ((3 * (cache + mask), 3), (3 * (cache + mask) - 1, 2), (1, 1)):
        monkeypatch.setattr("echogen.engine.ground.MOST_HELD", held)
        found = list(parts(small, prompts, images, asked))
        assert [part.start for part in found] == list(range(0, 3, together))
        assert ground_images(small, prompts, images, asked) == wanted


def test_answers_do_not_depend_on_the_batch(small, prompts, images):
    together = ground_images(small, prompts, images, EXPRESSIONS)
    order = [2, 0, 1]
    shuffled = ground_images(small, prompts, images[order], [EXPRESSIONS[i] for i in order])
    assert shuffled == [together[i] for i in order]
    for i, row in enumerate(EXPRESSIONS):
        assert ground_images(small, prompts, images[i : i + 1], [row]) == together[i : i + 1]


def test_the_image_and_the_expression_matter(small, prompts, images):
    """Otherwise the tests above would pass on a model that reads neither."""
    same = [["a red circle", "a star", "two green stars", "a blue square"]] * 3
    rows = ground_images(small, prompts, images, same)
    assert len({tuple(row) for row in rows}) > 1
    assert any(len(set(row)) > 1 for row in rows)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_always_valid(janus_config, small_tokenizer, prompts, seed):
    """Whatever the weights are: here they are scaled until the logits are extreme."""
    text = {"vocab_size": len(small_tokenizer), "max_position_embeddings": 256}
    model = UnifiedTransformer(ModelConfig.from_janus(janus_config(**text)))
    model.initialise(seed, std=3.0**seed * 0.02)
    image = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(seed))
    for row in ground_images(model, prompts, image, [["a star", "a circle"], ["x"]]):
        for x1, y1, x2, y2 in row:
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Tokens per row of every forward of the transformer."""
    counts, forward = list[int](), UnifiedTransformer.forward

    def counted(self, embeddings, *rest):
        counts.append(embeddings.shape[1])
        return forward(self, embeddings, *rest)

    monkeypatch.setattr(UnifiedTransformer, "forward", counted)
    return counts


def test_of_the_text_head_only_tokens_of_boxes_are_multiplied(small, prompts, images, monkeypatch):
    """They are 1 % of Janus-Pro's vocabulary."""
    widths, right = set[int](), Branches._logits

    def logits(self, hidden):
        found = right(self, hidden)
        widths.add(found.shape[-1])
        return found

    monkeypatch.setattr(Branches, "_logits", logits)
    ground_images(small, prompts, images, EXPRESSIONS)
    assert widths == {len(prompts.codec.ids)} and max(widths) < small.config.vocab_size


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_location_codec_takes_four_runs_of_the_model(
    small, small_tokenizer, images, runs, count
):
    """The first is the prefill, which runs the image once for all expressions; ``</box>`` is never
    run. This holds for any number of expressions, and for images with different numbers of them."""
    prompts = Prompts(small_tokenizer, LocationCodec(small_tokenizer, 33))
    asked = [(EXPRESSIONS[0] * 3)[:count], ["a star"], ["a circle"]]
    ground_images(small, prompts, images, asked)
    before, after = prompts.i2l()
    questions = sum(len(prompts.branch(e)) for e in asked[0])
    longest = max(questions, len(prompts.branch("a star")), len(prompts.branch("a circle")))
    assert runs[0] == len(before) + images.shape[1] + len(after) + longest
    assert runs[1:] == [count] * 3


def test_forced_tokens_cost_no_run_of_the_model(small, small_tokenizer, images, runs):
    """In a box as text, brackets, commas and spaces are forced, and some digits."""
    codec, answers = TextualCodec(small_tokenizer), list[list[int]]()
    right = codec.parse
    codec.parse = lambda ids: answers.append(ids) or right(ids)
    ground_images(small, Prompts(small_tokenizer, codec), images, EXPRESSIONS)
    assert len(answers) == 6
    choices = [
        sum(len(codec.allowed(tuple(ids[:i]))) > 1 for i in range(len(ids))) for ids in answers
    ]
    assert len(runs) == max(choices)  # the prefill gives the first
    assert max(choices) < max(map(len, answers)) - 5


def test_branches_are_fed_unequal_numbers_of_tokens(small, small_tokenizer, images, relative_error):
    """For example where the grammar forces tokens of one and not of another. The cache grows."""
    prompts = Prompts(small_tokenizer, LocationCodec(small_tokenizer, 33))
    ids = prompts.codec.ids
    questions = [[prompts.branch(e) for e in row] for row in EXPRESSIONS[::2]]
    feeds = [
        [[[ids[3]], ids[4:9], []], [[ids[1]], [ids[2]]]],
        [[ids[9:14], [], [ids[8]]], [ids[3:5], [ids[4]]]],
        [[[ids[0]], [ids[6]], ids[1:4]], [[], ids[20:28]]],
    ]
    with torch.inference_mode():
        state = Branches(small, prompts, images[::2], questions)
        state.prefill()
        for step, new in enumerate(feeds):
            logits = state.feed(new)
            for i, row in enumerate(new):
                for j, mine in enumerate(row):
                    if not mine:
                        continue
                    told = [t for feed in feeds[: step + 1] for t in feed[i][j]]
                    before, after = (small.embed_text(torch.tensor(x)) for x in prompts.i2l())
                    tail = small.embed_text(torch.tensor(questions[i][j] + told))
                    whole = torch.cat((before, images[2 * i], after, tail)).unsqueeze(0)
                    length = whole.shape[1]
                    causal = torch.ones(1, length, length, dtype=torch.bool).tril()
                    mask = additive_mask(causal, torch.float32)
                    hidden = small(whole, torch.arange(length), mask)
                    wanted = small.text_head(hidden[0, -1])
                    assert relative_error(logits[i, j], wanted) < 1e-5
