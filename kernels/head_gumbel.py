"""The straight-through sampler from hidden states, without ever storing the logits of all rows.

Rows go through the linear head in chunks, into one buffer that `gumbel`'s kernels read; backward
recomputes a chunk's logits and overwrites them with their gradient. For a head of 16,384 codes this
removes the largest tensor of a training step: 64 images of 576 tokens have 2.4 GB of float32
logits, and as much again for their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from echogen.kernels import checks, gumbel
from echogen.kernels.codebook_grad import codebook_grad
from echogen.kernels.dispatch import operator
from echogen.kernels.gumbel import GumbelSample, Kept
from echogen.kernels.head import (
    HeadGradients,
    check_head,
    fake_gradients,
    logits_in_chunks,
    resolve_chunk,
    rows_of,
)
from echogen.kernels.reference import head_gumbel as reference
from echogen.kernels.reference.precision import wide_type


def _launch_forward(
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
) -> Kept:
    if hidden.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.forward(
            hidden, weight, codebook, tau, seed, draw, position, bias, index, targets, chunk
        )
    out = gumbel.empty_outputs(len(hidden), codebook)
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        a, b, c, d, e, f = (tensor[rows] for tensor in out)
        gumbel.launch_forward_into(
            (a, b, c, d, e, f), logits, codebook, tau, seed, draw[rows], position[rows],
            rows_of(index, rows), rows_of(targets, rows),
        )  # fmt: skip
    return out


def _launch_backward(
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_hidden, need_weight, need_bias)
    if hidden.dtype == torch.float64:
        return reference.backward(
            hidden, weight, codebook, tau, seed, draw, position, bias, targets, lse_a, lse_l,
            e_soft, d_embed, d_ce, needs, chunk,
        )  # fmt: skip
    grads = HeadGradients(hidden, weight, needs, triton.cdiv(len(hidden), chunk))
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        gumbel.launch_backward_into(
            logits, logits, codebook, tau, seed, draw[rows], position[rows], rows_of(targets, rows),
            lse_a[rows], lse_l[rows], e_soft[rows], rows_of(d_embed, rows), rows_of(d_ce, rows),
        )  # fmt: skip
        grads.add(rows, logits)
    return grads.result()


@operator("head_gumbel_st_embed", _launch_forward)
def _head_gumbel(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.forward(
        hidden, weight, codebook, tau, seed, draw, position, bias, index, targets, chunk
    )


@operator("head_gumbel_st_embed_backward", _launch_backward)
def _head_gumbel_backward(
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(
        hidden, weight, codebook, tau, seed, draw, position, bias, targets, lse_a, lse_l, e_soft,
        d_embed, d_ce, (need_hidden, need_weight, need_bias), chunk,
    )  # fmt: skip


@_head_gumbel.register_fake
def _fake_forward(
    hidden: Tensor, weight: Tensor, codebook: Tensor, tau: Tensor, seed: Tensor, draw: Tensor,
    position: Tensor, bias: Tensor | None, index: Tensor | None, targets: Tensor | None,
    chunk: int,
) -> Kept:  # fmt: skip
    rows, kept = len(hidden), wide_type(hidden.dtype)
    a, b, c = (hidden.new_empty(rows, dtype=kept) for _ in range(3))
    embed = codebook.new_empty(rows, codebook.shape[1])
    e_soft = hidden.new_empty(rows, codebook.shape[1], dtype=kept)
    return embed, hidden.new_empty(rows, dtype=torch.int64), a, b, c, e_soft


@_head_gumbel_backward.register_fake
def _fake_backward(
    hidden: Tensor, weight: Tensor, codebook: Tensor, tau: Tensor, seed: Tensor, draw: Tensor,
    position: Tensor, bias: Tensor | None, targets: Tensor | None, lse_a: Tensor, lse_l: Tensor,
    e_soft: Tensor, d_embed: Tensor | None, d_ce: Tensor | None, need_hidden: bool,
    need_weight: bool, need_bias: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_gradients(hidden, weight, need_hidden, need_weight, need_bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *key, _, targets, chunk = inputs
    _, index, _, lse_a, lse_l, e_soft = output
    ctx.mark_non_differentiable(index, lse_a, lse_l, e_soft)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*key, targets, lse_a, lse_l, e_soft, index)
    ctx.chunk = chunk


def _backward(
    ctx: Any, d_embed: Tensor | None, _index: None, d_ce: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *saved, index = ctx.saved_tensors
    codebook, targets = saved[2], saved[8]
    hidden, weight, with_codebook, *_, bias, _, _, _ = ctx.needs_input_grad
    d_embed, d_ce = gumbel.above(d_embed, d_ce, targets)
    d_hidden = d_weight = d_bias = d_codebook = None
    if (hidden or weight or bias) and not (d_embed is None and d_ce is None):
        grads = _head_gumbel_backward(*saved, d_embed, d_ce, hidden, weight, bias, ctx.chunk)
        needed = zip((hidden, weight, bias), grads, strict=True)
        d_hidden, d_weight, d_bias = (grad if needs else None for needs, grad in needed)
    if with_codebook and d_embed is not None:
        d_codebook = codebook_grad(d_embed, index, len(codebook)).to(codebook.dtype)
    return d_hidden, d_weight, d_codebook, *[None] * 4, d_bias, None, None, None


_head_gumbel.register_autograd(_backward, setup_context=_setup)


def head_gumbel_st_embed(
    hidden: Tensor,
    weight: Tensor,
    codebook: Tensor,
    tau: float | Tensor,
    seed: int | Tensor,
    draw: Tensor,
    position: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    targets: Tensor | None = None,
    chunk: int | None = None,
) -> GumbelSample:
    """`gumbel_st_embed` of the logits ``hidden·Wᵀ + b``, a chunk of rows at a time.

    Gradients reach hidden, weight, bias and codebook. Sums over chunks are float32 and in a fixed
    order, so that a rerun is identical. Gradients that are not needed are not computed.

    Args:
        hidden: float [N, D], contiguous.
        weight: [V, D], of hidden's type, contiguous.
        codebook: float [V, C], contiguous; C up to 256.
        bias: [V], of hidden's type.
        chunk: rows whose logits exist at once. None chooses by size: up to 4096, see
            `echogen.kernels.head.chunk_rows`.

    ``tau``, ``seed``, ``draw``, ``position``, ``index``, ``targets``, the result and the errors are
    those of `echogen.kernels.gumbel.gumbel_st_embed`.
    """
    check_head(hidden, weight, bias)
    per_row = {"draw": draw, "position": position, "index": index, "targets": targets}
    checks.check_same_device(hidden=hidden, weight=weight, codebook=codebook, bias=bias, **per_row)
    gumbel.check_sampling(codebook, len(hidden), len(weight), per_row)
    embed, chosen, ce, *_ = _head_gumbel(
        hidden,
        weight,
        codebook,
        checks.device_scalar("tau", tau, hidden.device, 0),
        checks.device_seed(seed, hidden.device),
        draw.long(),
        position.long(),
        bias,
        None if index is None else index.long(),
        None if targets is None else targets.long(),
        resolve_chunk(chunk, hidden, weight),
    )
    return GumbelSample(embed, chosen, ce)
