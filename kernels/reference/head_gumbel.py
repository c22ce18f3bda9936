"""Plain-torch `head_gumbel_st_embed`, chunk by chunk of rows: the head's logits, then the reference
of the sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.head import HeadGradients, logits_in_chunks, rows_of
from echogen.kernels.reference import gumbel


def forward(
    hidden: Tensor,
    weight: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    targets: Tensor | None,
    chunk: int,
) -> gumbel.Kept:
    """(embed, index, ce, lse_a, lse_l, e_soft) of all rows; see `echogen.kernels.gumbel`."""
    parts = [
        gumbel.forward(
            logits, codebook, tau, seed, draw[rows], position[rows],
            rows_of(index, rows), rows_of(targets, rows),
        )
        for rows, logits in logits_in_chunks(hidden, weight, bias, chunk)
    ]  # fmt: skip
    a, b, c, d, e, f = (torch.cat(column) for column in zip(*parts, strict=True))
    return a, b, c, d, e, f


def backward(
    hidden: Tensor,
    weight: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    lse_a: Tensor,
    lse_l: Tensor,
    e_soft: Tensor,
    d_embed: Tensor | None,
    d_ce: Tensor | None,
    needs: tuple[bool, bool, bool],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    grads = HeadGradients(hidden, weight, needs, -(-len(hidden) // chunk))
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        d_logits = gumbel.backward(
            logits, codebook, tau, seed, draw[rows], position[rows], rows_of(targets, rows),
            lse_a[rows], lse_l[rows], e_soft[rows], rows_of(d_embed, rows), rows_of(d_ce, rows),
        )  # fmt: skip
        grads.add(rows, d_logits)
    return grads.result()
