"""Cases of parsing boxes from tokens, and of masking the tokens that may follow."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Pass
from echogen.kernels.parse_boxes import (
    allowed_location_mask,
    allowed_text_mask,
    parse_location_boxes,
    parse_text_boxes,
    text_pieces,
)
from echogen.kernels.reference import parse_boxes as grammar

BINS, SCALE = 1000, 1000
# 64 layouts × 8 samples, eight boxes each; Janus-Pro's vocabulary and location tokens after it.
_ANSWERS = {
    "tiny": {"rows": 6, "vocab": 1100},
    "decoding": {"rows": 4096, "vocab": 103_424},
}
# The mask of one step: 64 sequences of eight branches.
_MASKS = {"tiny": _ANSWERS["tiny"], "decoding": {"rows": 512, "vocab": 103_424}}


def _location_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, first, close = dims["rows"], dims["vocab"] - BINS, dims["vocab"] - BINS - 1
    low = make.integers(0, BINS // 2, rows, 2)
    high = make.integers(BINS // 2, BINS, rows, 2)
    end = make.integers(0, 1, rows, 1) + close - first
    tokens = torch.cat((low, high, end), 1) + first
    lengths = make.integers(0, 6, rows)
    return {"tokens": tokens, "lengths": lengths, "first": first, "close": close}


def _spelling(i: Inputs) -> tuple[Tensor, int, int, int]:
    return i["tokens"], i["first"], BINS, i["close"]


def _vocabulary() -> list[str | None]:
    """A byte-level tokenizer's tokens that spell boxes, and the closing mark."""
    numbers = [str(n) for n in range(1000)]
    return [*numbers, "[", "]", ", ", ",", " ", None]


_OPEN, _SHUT, _COMMA, _CLOSE = 1000, 1001, 1002, 1005


def _text_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, words = dims["rows"], _vocabulary()
    low = make.integers(0, SCALE // 2, rows, 2)
    high = make.integers(SCALE // 2, SCALE, rows, 2)
    mark = make.integers(0, 1, rows)
    x1, y1, x2, y2 = (*low.unbind(1), *high.unbind(1))
    spelled = (mark + _OPEN, x1, mark + _COMMA, y1, mark + _COMMA, x2, mark + _COMMA, y2,
               mark + _SHUT, mark + _CLOSE)  # fmt: skip
    pieces = text_pieces([*words, *[None] * (dims["vocab"] - len(words))])
    return {
        "tokens": torch.stack(spelled, 1),
        "lengths": make.integers(0, 11, rows),
        "pieces": pieces.to(mark.device),
        "close": _CLOSE,
    }


def _following(i: Inputs) -> tuple[Tensor, Tensor, Tensor, int]:
    return i["tokens"], i["lengths"], i["pieces"], i["close"]


def _boxes_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    return Floor(dims["rows"] * (5 * 8 + 16))  # five tokens in, four numbers out


def _text_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    # Ten tokens and their characters in, four numbers out.
    return Floor(dims["rows"] * (10 * 8 + 24 + 16))


def _mask_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    return Floor(dims["rows"] * dims["vocab"])  # one byte written per word


UNROLLED = "the loop over tokens unrolls to thousands of nodes, minutes of compiling"

CASES: tuple[Case, ...] = (
    # Eager is the operators' own reference: the grammar in plain torch, a step per character.
    Case(
        operator="parse_location_boxes",
        sizes=_ANSWERS,
        inputs=_location_inputs,
        run=lambda i: (parse_location_boxes(*_spelling(i)),),
        eager=lambda i: (grammar.location_boxes(*_spelling(i)),),
        outputs=("boxes",),
        floor=_boxes_floor,
        only=torch.float32,
    ),
    Case(
        operator="allowed_location_mask",
        sizes=_MASKS,
        inputs=_location_inputs,
        run=lambda i: (
            allowed_location_mask(
                i["tokens"], i["lengths"], i["first"], BINS, i["close"], i["first"] + BINS
            ),
        ),
        eager=lambda i: (
            grammar.location_mask(
                i["tokens"], i["lengths"], i["first"], BINS, i["close"], i["first"] + BINS
            ),
        ),
        outputs=("mask",),
        floor=_mask_floor,
        only=torch.float32,
    ),
    Case(
        operator="parse_text_boxes",
        sizes=_ANSWERS,
        inputs=_text_inputs,
        run=lambda i: (parse_text_boxes(i["tokens"], i["pieces"], i["close"], SCALE),),
        eager=lambda i: (grammar.text_boxes(i["tokens"], i["pieces"], i["close"], SCALE),),
        outputs=("boxes",),
        floor=_text_floor,
        only=torch.float32,
        uncompiled=UNROLLED,
    ),
    Case(
        operator="allowed_text_mask",
        sizes=_MASKS,
        inputs=_text_inputs,
        run=lambda i: (allowed_text_mask(*_following(i), SCALE),),
        eager=lambda i: (grammar.text_mask(*_following(i), SCALE),),
        outputs=("mask",),
        floor=_mask_floor,
        only=torch.float32,
        uncompiled=UNROLLED,
    ),
)
