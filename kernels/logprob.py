"""Log-probability and entropy of each token under a linear head, without storing all logits.

RL trainers need only two numbers per token from a head of V outputs, but eager autograd holds three
to five [N, V] tensors for them (2.4 GB each for 64 images of 576 tokens over 16,384 codes). Here
rows go through the head in chunks, into one buffer. Forward reduces a chunk's logits in one pass,
with a running maximum (Milakov and Gimelshein 2018). Backward recomputes them, overwrites them with
their gradient and multiplies it through the head, as Liger's fused linear cross entropy does for a
loss (Hsu et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.constants import chosen
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.head import (
    HeadGradients,
    check_head,
    fake_gradients,
    logits_in_chunks,
    resolve_chunk,
)
from echogen.kernels.reference import logprob as reference
from echogen.kernels.reference.precision import wide_type


@dataclass(frozen=True)
class Tile:
    """Launch constants of a pass: columns of a row at a time, and warps per program."""

    columns: int = 2048  # 16 per thread, loaded 16 bytes at a time
    warps: int = 4

    def candidates(self) -> list[Self]:
        """Half to twice the columns, with two to eight warps."""
        sizes = (self.columns // 2, self.columns, 2 * self.columns)
        return [type(self)(columns, warps) for columns in sizes for warps in (2, 4, 8)]


class ForwardTile(Tile):
    """Launch constants of the forward pass."""


class BackwardTile(Tile):
    """Launch constants of the backward pass."""


FORWARD, BACKWARD = ForwardTile(), BackwardTile()
MIXED_ROWS = 4096  # rows of hidden states to guide at once


@triton.jit
def _logprob_forward_kernel(
    logits_ptr, targets_ptr, temperature_ptr, logprob_ptr, entropy_ptr, lse_ptr, columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row: Σ exp(z − m) and Σ exp(z − m)·(z − m) with a running maximum m, lane by lane."""
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * columns
    scale = 1.0 / tl.load(temperature_ptr)
    top = tl.full([], float("-inf"), tl.float32)
    total, moment = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    column = tl.arange(0, COLUMNS)
    x = tl.load(start + column, mask=column < columns, other=float("-inf"))
    for _ in range(0, columns, COLUMNS):
        z = x.to(tl.float32) * scale
        # The next tile loads while this one is summed.
        column += COLUMNS
        x = tl.load(start + column, mask=column < columns, other=float("-inf"))
        now = tl.maximum(top, tl.max(z, 0))
        # A tile of only −inf must not give −inf − −inf, nor the first tile 0·−inf.
        safe = tl.where(now == float("-inf"), 0.0, now)
        shift = tl.where(top == float("-inf"), 0.0, top - safe)
        shrink, below = tl.exp(shift), z - safe
        e = tl.exp(below)
        # Bounded: a tile of finfo.min makes the shift so large that its product is −inf, and −inf
        # times a shrink of 0 is NaN.
        moment = (moment + total * tl.maximum(shift, -1e4)) * shrink + e * tl.maximum(below, -1e4)
        total = total * shrink + e
        top = now
    total, moment = tl.sum(total, 0), tl.sum(moment, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, float("nan"), total)  # a row of −inf has no distribution
    log_total = tl.log(total)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < columns)
    at = tl.load(start + target, mask=known, other=float("nan")).to(tl.float32) * scale
    logprob = tl.where(target < 0, 0.0, (at - top) - log_total)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, log_total - moment / total)
    tl.store(lse_ptr + row, top + log_total)


@triton.jit
def _logprob_backward_kernel(
    logits_ptr, targets_ptr, temperature_ptr, lse_ptr, entropy_ptr, d_logprob_ptr, d_entropy_ptr,
    columns, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Overwrite a tile of one row's logits with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale = 1.0 / tl.load(temperature_ptr)
    target = tl.load(targets_ptr + row)
    lse, entropy = tl.load(lse_ptr + row).to(tl.float32), tl.load(entropy_ptr + row).to(tl.float32)
    d_logprob = tl.load(d_logprob_ptr + row).to(tl.float32)
    # A target beyond the outputs has log-probability NaN, and so gradient NaN.
    d_logprob = tl.where((target < columns) | (d_logprob == 0), d_logprob, float("nan"))
    d_logprob = tl.where(target < 0, 0.0, d_logprob)
    d_entropy = tl.load(d_entropy_ptr + row).to(tl.float32)
    place, keep = logits_ptr + row * columns + column, column < columns
    logp = tl.load(place, mask=keep, other=float("-inf")).to(tl.float32) * scale - lse
    spread = d_entropy * (tl.maximum(logp, -1e4) + entropy)  # 0·log 0 is 0
    spread = tl.where(d_entropy == 0, 0.0, spread)
    grad = tl.where(column == target, d_logprob, 0.0) - tl.exp(logp) * (d_logprob + spread)
    tl.store(place, grad * scale, mask=keep)


def _launch_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.forward(hidden, weight, targets, temperature, bias, chunk)
    logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropy, lse = torch.empty_like(logprob), torch.empty_like(logprob)
    tile = chosen(FORWARD)
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        launch(
            _logprob_forward_kernel, (len(logits),), logits, targets[rows], temperature,
            logprob[rows], entropy[rows], lse[rows], len(weight), COLUMNS=tile.columns,
            num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return logprob, entropy, lse


def _launch_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    needs, columns = (need_hidden, need_weight, need_bias), len(weight)
    if hidden.dtype == torch.float64:
        return reference.backward(
            hidden, weight, targets, temperature, bias, lse, entropy, d_logprob, d_entropy, needs,
            chunk,
        )  # fmt: skip
    grads = HeadGradients(hidden, weight, needs, triton.cdiv(len(hidden), chunk))
    tile = chosen(BACKWARD)
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        launch(
            _logprob_backward_kernel, (len(logits), triton.cdiv(columns, tile.columns)), logits,
            targets[rows], temperature, lse[rows], entropy[rows], d_logprob[rows],
            d_entropy[rows], columns, COLUMNS=tile.columns, num_warps=tile.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        grads.add(rows, logits)
    return grads.result()


@operator("linear_logprob", _launch_forward)
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.forward(hidden, weight, targets, temperature, bias, chunk)


@operator("linear_logprob_backward", _launch_backward)
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_hidden, need_weight, need_bias)
    return reference.backward(
        hidden, weight, targets, temperature, bias, lse, entropy, d_logprob, d_entropy, needs, chunk
    )


@_linear_logprob.register_fake
def _fake_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, bias: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    a, b, c = (hidden.new_empty(len(hidden), dtype=wide_type(hidden.dtype)) for _ in range(3))
    return a, b, c


@_linear_logprob_backward.register_fake
def _fake_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, bias: Tensor | None,
    lse: Tensor, entropy: Tensor, d_logprob: Tensor, d_entropy: Tensor, need_hidden: bool,
    need_weight: bool, need_bias: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_gradients(hidden, weight, need_hidden, need_weight, need_bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *kept, chunk = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*kept, lse, entropy)
    ctx.chunk = chunk


def _backward(
    ctx: Any, d_logprob: Tensor, d_entropy: Tensor, _lse: None
) -> tuple[Tensor | None, ...]:
    hidden, weight, _, _, bias = ctx.needs_input_grad[:5]
    # Backward has the same chunks as forward and so the same products, and neither fuses z/T with
    # the subtraction after it: the log-sum-exp matches the logits exactly.
    d_hidden, d_weight, d_bias = _linear_logprob_backward(
        *ctx.saved_tensors, d_logprob.contiguous(), d_entropy.contiguous(), hidden, weight, bias,
        ctx.chunk,
    )  # fmt: skip
    of_head = d_hidden if hidden else None, d_weight if weight else None
    return *of_head, None, None, d_bias if bias else None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup)


class LogProb(NamedTuple):
    """What a policy update needs from a head.

    Attributes:
        logprob: float32 [N] (float64 for float64 input), natural logarithm; 0 where the target is
            negative, NaN where it is V or more.
        entropy: likewise, in nats.
    """

    logprob: Tensor
    entropy: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    temperature: float | Tensor = 1.0,
) -> LogProb:
    """Compute log p(target) and H(p) per row, with p = softmax((hidden·Wᵀ + b)/T).

    Backward, with z = logits/T: ``dz = dlogp ⊙ (onehot − p) − dH ⊙ p ⊙ (log p + H)``, times 1/T,
    and then through the layer. Sums over chunks are float32 and in a fixed order, so that a rerun
    is identical. Gradients that are not needed are not computed. The logits are rounded to hidden's
    type, like those of a sampler that runs the same layer without guidance.

    Args:
        hidden: float [N, D], contiguous.
        weight: [V, D], of hidden's type, contiguous.
        targets: int64 [N]; a negative one has no log-probability (but still an entropy).
        bias: [V], of hidden's type.
        chunk: rows whose logits exist at once. None chooses by size: up to 4096, see
            `echogen.kernels.head.chunk_rows`.
        temperature: the sampler's T, above 0; a tensor of one element is not checked.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    check_head(hidden, weight, bias)
    checks.check_integers(targets=targets)
    checks.check_shape("targets", targets, (len(hidden),))
    checks.check_contiguous(targets=targets)
    checks.check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias)
    logprob, entropy, _ = _linear_logprob(
        hidden,
        weight,
        targets.long(),
        checks.device_scalar("temperature", temperature, hidden.device, 0),
        bias,
        resolve_chunk(chunk, hidden, weight),
    )
    return LogProb(logprob, entropy)


def _scaled(d: Tensor, by: Tensor) -> Tensor:
    out, kept = torch.empty_like(d), wide_type(d.dtype)
    for first in range(0, len(d), MIXED_ROWS):
        rows = slice(first, first + MIXED_ROWS)
        out[rows] = d[rows].to(kept) * by
    return out


# Its helpers live outside the class: torch.compile's Dynamo traces no attribute of the class.
class _Guided(torch.autograd.Function):
    """``u + s·(c − u)`` in at least float32, rounded once, some rows at a time. Over all rows at
    once, backward would hold three float32 tensors of the hidden states' size (860 MiB for 64
    images of Janus-Pro, twice what the head itself needs)."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, u: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(s)
        out, kept = torch.empty_like(c), wide_type(c.dtype)
        for first in range(0, len(c), MIXED_ROWS):
            rows = slice(first, first + MIXED_ROWS)
            plain = u[rows].to(kept)
            out[rows] = plain + s * (c[rows].to(kept) - plain)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (s,) = grads, ctx.saved_tensors
        parts = zip(ctx.needs_input_grad[:2], (s, 1 - s), strict=True)
        return *(_scaled(d, by) if needed else None for needed, by in parts), None


def guided_linear_logprob(
    hidden: Tensor,
    hidden_uncond: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    detach_unconditional: bool = False,
    chunk: int | None = None,
    temperature: float | Tensor = 1.0,
) -> LogProb:
    """`linear_logprob` of classifier-free-guided logits ``u + s·(c − u)`` (Ho and Salimans 2022).

    The head is linear, so the guided logits are the head at the guided hidden state
    ``h = h_u + s·(h_c − h_u)``, bias included (its weights 1 − s and s sum to one): one matrix
    product instead of two. h is mixed in float32 and rounded to hidden's type once.

    A bfloat16 sampler that mixes two rounded logits multiplies their rounding error by about s, and
    differs from this function by 0.04 to 0.06 nats (standard deviation; s of 3 to 5, random weights
    of width 2048). So take a policy's old log-probabilities from here too, not from the sampler.

    Args:
        hidden, hidden_uncond: [N, D] of the conditional and the unconditional rows.
        scale: the guidance scale s; 1 means no guidance. A tensor of one element is not checked.
        detach_unconditional: stop the gradient through the unconditional rows.

    The other arguments, the result and the errors are those of `linear_logprob`.
    """
    checks.check_floats(hidden=hidden, hidden_uncond=hidden_uncond)
    checks.check_shape("hidden", hidden, (None, None))
    checks.check_shape("hidden_uncond", hidden_uncond, hidden.shape)
    checks.check_same_device(hidden=hidden, hidden_uncond=hidden_uncond)
    if hidden_uncond.dtype != hidden.dtype:
        raise TypeError(f"hidden_uncond is {hidden_uncond.dtype} and hidden {hidden.dtype}")
    s = checks.device_scalar("scale", scale, hidden.device, -math.inf)
    uncond = hidden_uncond.detach() if detach_unconditional else hidden_uncond
    mixed: Tensor = _Guided.apply(hidden, uncond, s)
    return linear_logprob(mixed, weight, targets, bias, chunk, temperature)
