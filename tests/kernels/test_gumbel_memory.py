"""The straight-through sampler holds no noise, no soft and no hard sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from echogen.kernels.gumbel import gumbel_st_embed

from .memory import peak_bytes, untouched

ROWS, CODES, WIDTH = 4608, 16384, 8  # eight images of Janus-Pro


def fused(logits, codebook, tau, row):
    found = gumbel_st_embed(logits, codebook, tau, 0, row, row, None, row)
    return found.embed, found.ce


def eager(logits, codebook, tau, row):
    return F.gumbel_softmax(logits, tau, hard=True) @ codebook, F.cross_entropy(logits, row)


def peak(sample) -> int:
    """Of forward and backward, the logits themselves not counted."""
    logits, codebook = untouched(ROWS, CODES), untouched(CODES, WIDTH)
    row = untouched(ROWS, dtype=torch.int64)

    def call():
        embed, ce = sample(logits, codebook, 0.5, row)
        (embed.sum() + ce.sum()).backward()

    return peak_bytes(call)


def test_the_gradient_is_the_one_tensor_of_the_logits_size():
    logits = ROWS * CODES * 4
    assert logits <= peak(fused) < 1.02 * logits
    assert 4 * peak(fused) <= peak(eager)


def test_the_count_itself():
    """Storages made and held count; views, arguments and what was let go do not."""
    x = torch.zeros(1000, device="meta")
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: (x + 1) + 1) == 8000
    assert peak_bytes(lambda: x.view(10, 100)[3:].T) == 0
    assert peak_bytes(lambda: [x + i for i in range(5)]) == 20000
    assert peak_bytes(lambda: [(x + i).sum() for i in range(5)]) == 4000 + 5 * 4
    assert peak_bytes(lambda: torch.add(x, 1, out=x)) == 0
