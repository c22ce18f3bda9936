"""Tensors of more than 2³¹ elements, whose places do not fit 32 bits: the last rows come out as
they do alone. On a CPU the same is asked of a few thousand elements."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels.checks import FP8
from echogen.kernels.decode_attention import decode_attention
from echogen.kernels.grpo import grpo_loss
from echogen.kernels.gumbel import gumbel_st_embed
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.rms_norm import add_rms_norm, rms_norm
from echogen.kernels.rope import rope, rope_cache, scaled_heads
from echogen.kernels.sampling import cfg_sample
from echogen.kernels.skinny_linear import fp8_weight, skinny_linear
from echogen.kernels.swiglu import swiglu
from echogen.kernels.wide_linear import wide_linear

from .conftest import DEVICE

LARGE = DEVICE == "cuda"
ELEMENTS = 2**31 if LARGE else 2**12
DTYPE = torch.bfloat16 if LARGE else torch.float32
TAIL = 5
pytestmark = pytest.mark.skipif(
    LARGE and torch.cuda.get_device_properties(0).total_memory < 70e9, reason="needs 70 GB"
)
EIGHT_BITS = pytest.mark.skipif(
    LARGE and torch.cuda.get_device_capability() < (8, 9), reason="needs products in 8 bits"
)
eight_bits = pytest.mark.parametrize("eight", [False, pytest.param(True, marks=EIGHT_BITS)])
CACHE = (16, 4096, 128) if LARGE else (2, 64, 16)
"""Heads, tokens and width of a sequence's keys."""


@pytest.fixture(autouse=True)
def unpoisoned(poisoned, monkeypatch):
    """Filling gigabytes with NaN is another test's business."""
    monkeypatch.undo()


def filled(rows: int, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Zeros but for the last rows, which are drawn: whole gigabytes of normals take long."""
    made = torch.zeros(rows, *shape, dtype=dtype, device=DEVICE)
    made[-TAIL:] = torch.randn(TAIL, *shape, device=DEVICE).to(dtype)
    return made


def rows_of(width: int) -> int:
    return ELEMENTS // width + TAIL + 2


def tail_equals_alone(run, *tensors: torch.Tensor) -> None:
    """Outputs, and gradients of the first tensor, of the last rows."""
    found = []
    for parts in (tensors, tuple(t[-TAIL:].clone() for t in tensors)):
        first = parts[0].detach().requires_grad_()
        outputs = run(first, *parts[1:])
        graded = [o for o in outputs if o.requires_grad]
        kept = [o.detach()[-TAIL:].clone() for o in outputs]
        if graded:
            above = [torch.ones_like(o) for o in graded]
            kept.append(torch.autograd.grad(graded, first, above)[0][-TAIL:].clone())
        found.append(kept)
    for whole, alone in zip(*found, strict=True):
        assert bool(alone.ne(0).any())
        # A row's place in a tile may change the order of a product's sums.
        error = (whole.double() - alone.double()).norm() / alone.double().norm()
        assert error < (1e-2 if LARGE or alone.dtype == torch.bfloat16 else 1e-5)


def key(rows: int) -> torch.Tensor:
    return torch.arange(1, rows + 1, device=DEVICE).flip(0)


def test_gumbel_st_embed():
    codes = 16384 if LARGE else 512
    rows = rows_of(codes)
    codebook = filled(codes, 8)
    codebook[:] = codebook[-1:]  # no row of zeros, whichever code is drawn

    def run(logits, draw):
        found = gumbel_st_embed(logits, codebook, 0.7, 0, draw, draw, None, draw % codes)
        return found.embed, found.ce

    tail_equals_alone(run, filled(rows, codes), key(rows))


def test_cfg_sample():
    codes = 16384 if LARGE else 512
    rows = rows_of(codes)
    table = torch.randn(codes, 8, device=DEVICE).to(DTYPE)
    for settings in ({}, {"top_k": 40}):

        def run(logits, draw, settings=settings):
            return tuple(cfg_sample(logits, 0, draw, draw, table=table, **settings))

        tail_equals_alone(run, filled(rows, codes), key(rows))


def test_gumbel_noise():
    rows = rows_of(512)
    tail_equals_alone(lambda _, d: (gumbel_noise(0, d, d, 512),), filled(rows, 1), key(rows))


def test_transformer_operators():
    width = 2048 if LARGE else 64
    weight = torch.ones(width, dtype=DTYPE, device=DEVICE)
    tail_equals_alone(lambda x: (rms_norm(x, weight),), filled(rows_of(width), width))
    both = (filled(rows_of(width), width) for _ in range(2))
    tail_equals_alone(lambda x, residual: add_rms_norm(x, residual, weight), *both)
    tail_equals_alone(lambda x: (swiglu(x),), filled(rows_of(width), width))
    turn = torch.rand(1, 1, 16, device=DEVICE).to(DTYPE)

    def rotated(x):  # every token a row of the batch's one sequence
        q = x[None]
        tables = (turn.expand(1, len(x), 16).contiguous() for _ in range(2))
        return tuple(y[0] for y in rope(q, q[:, :, :1], *tables))

    heads = width // 16
    tail_equals_alone(rotated, filled(rows_of(width), heads, 16))


def test_grpo_loss():
    tokens = 512
    rows = rows_of(tokens)
    logp, mask = filled(rows, tokens, dtype=torch.float32), torch.zeros(rows, tokens).bool()
    mask = mask.to(DEVICE)
    mask[-TAIL:] = True
    advantage = torch.ones(rows, device=DEVICE)

    def run(logp, mask, advantage):
        old = (logp - 0.01).detach()
        return (grpo_loss(logp, old, advantage, mask).loss[None],)

    tail_equals_alone(run, logp, mask, advantage)


@eight_bits
@pytest.mark.parametrize("linear", [wide_linear, skinny_linear])
def test_large_weights(linear, eight):
    width, kind = 2048 if LARGE else 64, torch.bfloat16
    weight = filled(rows_of(width), width, dtype=kind)
    x = torch.randn(TAIL, width, device=DEVICE).to(kind)
    held, scale = fp8_weight(weight) if eight else (weight, torch.ones(len(weight), device=DEVICE))

    @torch.no_grad()
    def run(scale, held, x):  # every channel a row
        return (linear(x, held, scale if eight else None).t(),)

    tail_equals_alone(run, scale, held, x)


def test_wide_linear_of_many_rows():
    width, kind = 2048 if LARGE else 64, torch.bfloat16
    weight = torch.randn(width, width, device=DEVICE).to(kind)
    gain = torch.ones(width, dtype=kind, device=DEVICE)

    @torch.no_grad()
    def run(x, residual):
        return (wide_linear(x, weight, gain=gain, residual=residual),)

    tail_equals_alone(run, *(filled(rows_of(width), width, dtype=kind) for _ in range(2)))


@eight_bits
def test_rope_cache(eight):
    heads, held, width = CACHE
    rows = rows_of(heads * held * width)
    heads_of = [filled(rows, 1, heads, width) for _ in range(3)]
    turns = [filled(rows, 1, width) for _ in range(2)]
    slots = torch.full((rows, 1), held - 1, device=DEVICE)

    @torch.no_grad()
    def run(q, k, v, cos, sin, slots):
        kind = FP8 if eight else DTYPE
        shape = len(q), heads, held
        caches = [torch.zeros(*shape, width, dtype=kind, device=DEVICE) for _ in range(2)]
        scales = torch.zeros(2, *shape, device=DEVICE) if eight else None
        turned = rope_cache(q, k, v, cos, sin, *caches, slots, scales)
        written = (cache[:, :, -1].float() for cache in caches)
        return turned, *written, *(() if scales is None else scales[..., -1])

    tail_equals_alone(run, *heads_of, *turns, slots)


def held_as(cache: torch.Tensor, eight: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return scaled_heads(cache) if eight else (cache, None)


def attended(query, keys, values, lengths, before=()) -> torch.Tensor:
    """With caches as pairs of numbers and scales; a row continues each of the last ones before."""
    (keys, scales), (values, more) = keys, values
    scales = None if scales is None else torch.stack((scales, more))
    if not before:
        return decode_attention(query, keys, values, lengths, scales=scales)
    (first, prefix_scales), (second, more) = before
    prefix_scales = None if prefix_scales is None else torch.stack((prefix_scales, more))
    groups = torch.arange(len(query), device=DEVICE) + len(first) - len(query)
    return decode_attention(
        query, keys, values, lengths, None, first, second, None, groups, None, scales,
        prefix_scales,
    )  # fmt: skip


def tail(cache: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    return tuple(None if t is None else t[-TAIL:].clone() for t in cache)


@eight_bits
def test_decode_attention(eight, relative_error):
    heads, held, width = CACHE
    rows = rows_of(heads * held * width)
    query = filled(rows, heads, width)
    caches = [held_as(filled(rows, heads, held, width), eight) for _ in range(2)]
    lengths = torch.full((rows,), held, device=DEVICE)
    found = attended(query, *caches, lengths)[-TAIL:]
    # Another batch may cut its keys into other splits.
    alone = attended(query[-TAIL:].clone(), *map(tail, caches), lengths[-TAIL:].clone())
    assert bool(alone.ne(0).any()) and relative_error(found, alone) < (1e-2 if LARGE else 1e-5)


@eight_bits
def test_decode_attention_behind_prefixes(eight, relative_error):
    heads, held, width = CACHE
    prefixes = rows_of(heads * held * width)
    query = torch.randn(TAIL, heads, width, device=DEVICE).to(DTYPE)
    own = [held_as(filled(TAIL, heads, 8, width), eight) for _ in range(2)]
    before = [held_as(filled(prefixes, heads, held, width), eight) for _ in range(2)]
    lengths = torch.full((TAIL,), 8, device=DEVICE)
    found = attended(query, *own, lengths, before)
    alone = attended(query, *own, lengths, [tail(cache) for cache in before])
    assert bool(alone.ne(0).any()) and relative_error(found, alone) < (1e-2 if LARGE else 1e-5)
