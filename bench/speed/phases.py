"""The least cost of drawing and grounding, phase by phase, from the model's shapes.

In each call, a phase reads the weights it uses once, reads the keys and values that its rows hold,
and multiplies every token by the weights. Activations, and the products of attention in a prefill,
are left out: they are small, and a floor may be too low but never too high.
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
        image_head: of the image head.
        cached: numbers that a token leaves in the cache, keys and values of all layers.
    """

    body: int
    image_head: int
    cached: int

    @classmethod
    def of(cls, c: ModelConfig) -> Weights:
        """Derive the numbers from the shapes."""
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        layer = c.width * (2 * queries + 2 * keys + 3 * c.mlp_width)
        image_head = c.width * c.head_width + c.head_width * c.codebook_size
        return cls(c.layers * layer, image_head, 2 * c.layers * keys)


HEADED = {
    "engine/prefill/run": True,
    "engine/decode/step": True,
    "engine/decode/window": True,
    "engine/ground/prefill": False,
    "engine/ground/step": False,
}
"""Phases that have a floor, and whether the image head follows. (The rows of the text head that
grounding reads, those of location tokens, are left out.) For others (sampling, the image decoder)
only the time is shown."""


def floor(config: ModelConfig, row: Row, itemsize: int) -> Floor | None:
    """Return the least cost of all entries of one range; None for a range without a formula.

    Args:
        config: of the model.
        row: the range; its payload sums ``tokens`` (run through the layers), ``rows`` (that pass
            the head) and ``held`` (cached tokens read, over all rows).
        itemsize: bytes per weight.
    """
    if row.category not in HEADED:
        return None
    weights = Weights.of(config)
    head = weights.image_head if HEADED[row.category] else 0
    tokens, rows, held = (row.payload.get(name, 0) for name in ("tokens", "rows", "held"))
    read = row.count * (weights.body + head) + held * weights.cached
    # Two products: of a query with every key, and of the result with every value it reads.
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
    """Return the least cost of a step, averaged over an image.

    Bytes: every weight that a row is multiplied by is read once (the decoder's layers, the image
    head). The ``length`` keys and values of each of the different ``prompts`` are read once, and so
    are those of each row's own codes, half an image's on average. (The prefill reads the weights
    too.) Operations: a product and an addition per weight and row, and two products of a query with
    every key and value that it attends to.

    Args:
        rows: rows that run in a step, including unconditional ones.
        prompts: number of different prompts among them.
        length: of a prompt.
        itemsize: bytes per number.
        fp8: a weight takes one byte.
        fp8_cache: a number in the caches takes one byte, plus four for each head of a token.
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
