"""Tensors of more than 2³¹ elements, whose places do not fit 32 bits: the last rows come out as
they do alone. On a CPU the same is asked of a few thousand elements."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels.decode_attention import decode_attention
from echogen.kernels.grpo import grpo_loss
from echogen.kernels.gumbel import gumbel_st_embed
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.rms_norm import rms_norm
from echogen.kernels.rope import rope
from echogen.kernels.sampling import cfg_sample
from echogen.kernels.swiglu import swiglu

from .conftest import DEVICE

LARGE = DEVICE == "cuda"
ELEMENTS = 2**31 if LARGE else 2**12
DTYPE = torch.bfloat16 if LARGE else torch.float32
TAIL = 5
pytestmark = pytest.mark.skipif(
    LARGE and torch.cuda.get_device_properties(0).total_memory < 70e9, reason="needs 70 GB"
)


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
        assert error < (1e-2 if LARGE else 1e-5)


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


def test_decode_attention():
    heads, held, width = (16, 4096, 128) if LARGE else (2, 64, 16)
    rows = rows_of(heads * held * width)
    query, keys, values = (
        filled(rows, heads, width),
        *(filled(rows, heads, held, width) for _ in range(2)),
    )
    lengths = torch.full((rows,), held, device=DEVICE)
    found = decode_attention(query, keys, values, lengths)[-TAIL:]
    # Another batch may cut its keys into other splits.
    alone = decode_attention(*(t[-TAIL:].clone() for t in (query, keys, values, lengths)))
    bound = 1e-2 if LARGE else 1e-5
    assert float((found - alone).float().norm() / alone.float().norm()) < bound
