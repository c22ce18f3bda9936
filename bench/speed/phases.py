"""What drawing and grounding must cost at least, phase by phase, from the model's shapes.

A phase reads the weights it uses once a call, the keys and values that its rows hold, and
multiplies every token by the weights. Activations and the products of attention in a prefill are
left out: they are little, and a floor may be low but never high.
"""

from __future__ import annotations

from dataclasses import dataclass

from echogen.bench.profile.stopwatch import Row
from echogen.bench.registry import Floor
from echogen.engine.config import ModelConfig


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters that a phase multiplies by.

    Attributes:
        body: of the decoder's layers.
        image_head, text_head: of the heads.
        cached: numbers a token leaves in the cache, keys and values of all layers.
    """

    body: int
    image_head: int
    text_head: int
    cached: int

    @classmethod
    def of(cls, c: ModelConfig) -> Weights:
        """Read off the shapes."""
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        layer = c.width * (2 * queries + 2 * keys + 3 * c.mlp_width)
        image_head = c.width * c.head_width + c.head_width * c.codebook_size
        return cls(c.layers * layer, image_head, c.width * c.vocab_size, 2 * c.layers * keys)


HEADS = {
    "engine/prefill/run": "image_head",
    "engine/decode/step": "image_head",
    "engine/decode/window": "image_head",
    "engine/ground/prefill": "text_head",
    "engine/ground/step": "text_head",
}
"""Phases that have a floor, and the head after each. Others (sampling, the image decoder) show
their time alone."""


def floor(config: ModelConfig, row: Row, itemsize: int) -> Floor | None:
    """Least cost of all entries of one range, or None for one without a formula.

    Args:
        config: of the model.
        row: its payload sums ``tokens`` (run through the layers), ``rows`` (that pass the head) and
            ``held`` (cached tokens read, over all rows).
        itemsize: bytes of a weight.
    """
    if row.category not in HEADS:
        return None
    weights = Weights.of(config)
    head = getattr(weights, HEADS[row.category])
    tokens, rows, held = (row.payload.get(name, 0) for name in ("tokens", "rows", "held"))
    read = row.count * (weights.body + head) + held * weights.cached
    # A query meets every key and value it reads in two products.
    attended = 2 * held * weights.cached * config.heads // config.kv_heads
    return Floor(read * itemsize, 2 * tokens * weights.body + 2 * rows * head + attended)


def step_floor(
    c: ModelConfig,
    rows: int,
    prompts: int,
    length: int,
    itemsize: int,
    fp8: bool = False,
    fp8_cache: bool = False,
) -> Floor:
    """Least cost of a step, the mean over an image.

    Bytes: every weight that a row is multiplied by once (the decoder's layers, the image head), the
    ``length`` keys and values of each of the ``prompts`` that differ once, and those of each row's
    own codes, half an image's on average. (The run of the prompts reads the weights too.)
    Operations: a product and an addition a weight and row, and two products of a query with every
    key and value that it meets.

    Args:
        rows: run in a step, unconditional ones among them.
        prompts: different ones among theirs.
        length: of a prompt.
        itemsize: bytes of a number.
        fp8: of a weight's numbers it is one.
        fp8_cache: of the caches' numbers it is one, and four more for each head of a token.
    """
    weights, own = Weights.of(c), (c.image_tokens - 1) / 2
    held = prompts * length + rows * own
    met = rows * (length + own)
    shared = c.heads // c.kv_heads
    read = (1 if fp8 else itemsize) * (weights.body + weights.image_head)
    number = 1 + 4 / c.head_dim if fp8_cache else itemsize
    return Floor(
        round(read + number * held * weights.cached),
        round(2 * rows * (weights.body + weights.image_head) + 2 * met * weights.cached * shared),
    )
