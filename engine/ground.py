"""Grounding: find all expressions of an image in parallel, each on its own branch.

The image is a trunk that every branch sees; branches never see each other, so the answer depends
neither on their order nor on their number. With the location codec boxes cost at most four steps of
the model, however many there are; the first of them is the prefill. A token that the grammar forces
costs no step: it is fed together with the token before it (most of a box written as text is forced:
brackets, commas, spaces). `</box>` is never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.engine.branches import Branches
from echogen.engine.decoding.parts import in_parts
from echogen.engine.layout import Box, LayoutError
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import BoxCodec, LocationCodec, PromptError, Prompts
from echogen.engine.ranges import span
from echogen.kernels.parse_boxes import allowed_location_mask
from echogen.kernels.philox import gumbel_noise

MOST_HELD = 1 << 32
"""Most bytes of keys, values and masks while images are grounded; more images run in parts."""
MOST_ASKED = 2048
"""Most tokens of one image's branches that run at once; more run in parts. The prefill's mask has
an entry for every pair of tokens: 2.5 billion for five thousand expressions of ten tokens."""
BOX_STREAM = 1
"""Stream word of the noise: it separates a sample's boxes from its image codes, which use 0."""


class Answers(NamedTuple):
    """Boxes found, in location tokens.

    Attributes:
        tokens: int64 [N, K, 4]; entries at padding (k ≥ K_n) are meaningless.
        logprob: float32 [N, K, 4], of each token under the grammar-constrained distribution.
    """

    tokens: Tensor
    logprob: Tensor


@torch.inference_mode()
def ground_images(
    model: UnifiedTransformer,
    prompts: Prompts,
    image: Tensor,
    expressions: list[list[str]],
) -> list[list[Box]]:
    """Find the box of every expression by grammar-constrained greedy decoding.

    Args:
        model: the transformer.
        prompts: builds the trunk and the branches.
        image: embedded images [B, T, D] (``embed_codes`` or ``embed_pixels``).
        expressions: for each of the B images, its K_b ≥ 1 expressions.

    Returns:
        For each image, one normalised box per expression; a constrained decode always parses.

    Raises:
        LayoutError: an expression that cannot be used, or for which the model has no room.
    """

    def tokens(expr: str) -> int:
        return len(prompts.branch(expr)) + prompts.codec.steps

    shares = [list(in_parts(row, tokens, MOST_ASKED)) for row in expressions]
    if any(len(share) > 1 for share in shares):
        each = [i for i, share in enumerate(shares) for _ in share]
        some = [part for share in shares for part in share]
        found = iter(ground_images(model, prompts, image[each], some))
        return [[box for _ in share for box in next(found)] for share in shares]
    if isinstance(prompts.codec, LocationCodec) and in_one_piece(prompts.codec):
        answers = ground_tokens(model, prompts, image, expressions).tokens.tolist()
    else:
        with span("engine/ground", batch=len(expressions), branches=sum(map(len, expressions))):
            answers = [
                answer
                for some in parts(model, prompts, image, expressions)
                for answer in _spelled(model, prompts, image[some], expressions[some])
            ]
    boxes = [
        [prompts.codec.parse(answer) for answer in row[: len(asked)]]
        for row, asked in zip(answers, expressions, strict=True)
    ]
    assert all(box is not None for row in boxes for box in row), "the grammar let a non-box through"
    return [[box for box in row if box is not None] for row in boxes]


def parts(
    model: UnifiedTransformer, prompts: Prompts, image: Tensor, expressions: list[list[str]]
) -> Iterator[slice]:
    """Yield the slices of embedded images [B, T, D] to ground at once, so that keys, values and
    masks stay below ``MOST_HELD``, or one by one.

    Raises:
        LayoutError: an expression that cannot be used, or for which the model has no room.
    """
    c, (before, after) = model.config, prompts.i2l()
    trunk, steps = len(before) + image.shape[1] + len(after), prompts.codec.steps
    lengths = {e: len(prompts.branch(e)) for row in expressions for e in row}
    for expr, length in lengths.items():
        if length > (room := c.max_positions - trunk - steps):
            raise LayoutError(
                f"an expression takes {length} tokens; this model has room for {room}, "
                f"so shorten it ({expr[:30]!r}...)"
            )
    most = max((sum(lengths[e] + steps for e in row) for row in expressions), default=0)
    length, size = trunk + most, image.element_size()
    cache = 2 * c.layers * c.kv_heads * c.head_dim * size * length
    mask = (size + 1) * length**2  # what is added to the scores, and the booleans it is made of
    together = max(1, MOST_HELD // (cache + mask))
    for first in range(0, len(expressions), together):
        yield slice(first, first + together)


# --- boxes as location tokens -----------------------------------------------------------------


def in_one_piece(codec: LocationCodec) -> bool:
    """Whether the ids of the location tokens are consecutive."""
    return codec.ids == list(range(codec.ids[0], codec.ids[0] + len(codec.ids)))


def locations(prompts: Prompts) -> tuple[int, int]:
    """(id of ``<loc_0>``, number of location tokens).

    Raises:
        PromptError: another codec, or location tokens whose ids are not consecutive.
    """
    codec = prompts.codec
    if not isinstance(codec, LocationCodec):
        raise PromptError(
            f"boxes are written with the {codec.name} codec; rollouts need the location codec"
        )
    if not in_one_piece(codec):
        raise PromptError(
            f"<loc_0> is token {codec.ids[0]}, but the ids of its {len(codec.ids)} location tokens "
            "have gaps; add them to the tokenizer in one piece"
        )
    return codec.ids[0], len(codec.ids)


def location_ids(prompts: Prompts) -> slice:
    """The ids of the location tokens. Of the text head only their rows are multiplied: 1,000 of
    Janus-Pro's 102,400.

    Raises:
        PromptError: as for `locations`.
    """
    first, bins = locations(prompts)
    return slice(first, first + bins)


def constrained(logits: Tensor, tokens: Tensor, step: int, prompts: Prompts) -> Tensor:
    """Scores [N, bins] of coordinate ``step``, from the location tokens' logits [N, bins] and the
    box so far, tokens [N, 4]: −inf for tokens after which no valid box is possible."""
    first, bins = locations(prompts)
    lengths = torch.full((len(tokens),), step, device=tokens.device)
    # Of a vocabulary of the location tokens and of `bins` for </box>; the kernel stores 16 at once.
    vocab = 16 * (bins // 16 + 1)
    allowed = allowed_location_mask(tokens - first, lengths, 0, bins, bins, vocab)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    return scores.masked_fill(~allowed[:, :bins], float("-inf"))


@torch.inference_mode()
def ground_tokens(
    model: UnifiedTransformer,
    prompts: Prompts,
    image: Tensor,
    expressions: list[list[str]],
    noise: tuple[int, Tensor] | None = None,
) -> Answers:
    """Find the box of every expression, in tokens, by grammar-constrained decoding. Nothing waits
    for the device.

    Args:
        model, prompts, image, expressions: as for `ground_images`.
        noise: (seed, draw ids int64 [B]) to sample at temperature 1; None takes the most likely.

    Raises:
        PromptError: the model's boxes are not location tokens (see `locations`).
        LayoutError: an expression that cannot be used, or for which the model has no room.
    """
    found, width = list[Answers](), max(map(len, expressions), default=0)
    with span("engine/ground", batch=len(expressions), branches=sum(map(len, expressions))):
        for some in parts(model, prompts, image, expressions):
            here = None if noise is None else (noise[0], noise[1][some])
            found.append(_located(model, prompts, image[some], expressions[some], here))
    if not found:
        empty = image.new_zeros(0, width, 4, dtype=torch.float32)
        return Answers(empty.long(), empty)
    even = [[F.pad(x, (0, 0, 0, width - x.shape[1])) for x in part] for part in found]
    tokens, logprob = (torch.cat(x) for x in zip(*even, strict=True))
    return Answers(tokens, logprob)


def _located(
    model: UnifiedTransformer,
    prompts: Prompts,
    image: Tensor,
    expressions: list[list[str]],
    noise: tuple[int, Tensor] | None,
) -> Answers:
    branches = [[prompts.branch(e) for e in row] for row in expressions]
    state = Branches(model, prompts, image, branches, location_ids(prompts))
    (first, bins), rows, width = locations(prompts), len(branches), max(map(len, branches))
    tokens = torch.full((rows * width, 4), first, device=image.device)
    logprob = torch.zeros(rows * width, 4, device=image.device)
    logits = state.prefill()
    for step in range(4):
        scores = constrained(logits.flatten(0, 1), tokens, step, prompts)
        noisy = scores
        if noise is not None:
            seed, draws = noise
            draw_id = draws.to(image.device).repeat_interleave(width)
            place = 4 * torch.arange(width, device=image.device).repeat(rows) + step
            noisy = scores + gumbel_noise(seed, draw_id, place, bins, BOX_STREAM)
        chosen = noisy.argmax(-1)
        logprob[:, step] = scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        tokens[:, step] = first + chosen
        if step < 3:
            logits = state.step(tokens[:, step].view(rows, width), step)
    return Answers(tokens.view(rows, width, 4), logprob.view(rows, width, 4))


# --- boxes as any tokens ------------------------------------------------------------------------


def _spelled(
    model: UnifiedTransformer, prompts: Prompts, image: Tensor, expressions: list[list[str]]
) -> list[list[list[int]]]:
    """Answer every expression token by token, as the codec's grammar allows."""
    codec = prompts.codec
    forced = _forced(codec, [])
    branches = [[prompts.branch(e) + forced for e in row] for row in expressions]
    state = Branches(model, prompts, image, branches, codec.ids)
    answers = [[list(forced) for _ in row] for row in branches]
    logits = state.prefill()
    while True:
        new = _extend(logits, codec, answers)
        if not any(codec.allowed(tuple(a)) for row in answers for a in row):
            break
        logits = state.feed(new)
    return answers


def _forced(codec: BoxCodec, answer: list[int]) -> list[int]:
    """Return the tokens that the grammar forces after an answer."""
    forced: list[int] = []
    while len(allowed := codec.allowed((*answer, *forced))) == 1:
        forced += allowed
    return forced


def _extend(
    logits: Tensor, codec: BoxCodec, answers: list[list[list[int]]]
) -> list[list[list[int]]]:
    """Extend every unfinished answer by its most likely allowed token and the tokens it forces;
    return what was added to each. Logits [B, K, V] are those of the codec's ids."""
    scores, added = logits.float().cpu(), list[list[list[int]]]()
    column = {token: i for i, token in enumerate(codec.ids)}
    for i, row in enumerate(answers):
        added.append([])
        for j, answer in enumerate(row):
            new: list[int] = []
            if allowed := codec.allowed(tuple(answer)):
                columns = [column[token] for token in allowed]
                new = [allowed[int(scores[i, j, columns].argmax())]]
                new += _forced(codec, answer + new)
            answer += new
            added[-1].append(new)
    return added
