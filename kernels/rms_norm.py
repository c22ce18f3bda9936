"""RMS norm, alone or with the residual addition before it, in one read and one write.

Eager code reads a row four times, and once more for the addition. Rounding follows transformers'
Llama: rows are normalised in float32, rounded to the input's type, then multiplied by the weight,
so that half-precision models give the numbers they were trained with (Zhang & Sennrich 2019).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.reference import rms_norm as reference
from echogen.kernels.reference.precision import wide_type

TILE = 2048  # the fewest elements of a program's tile: narrow rows share a program
PROGRAMS = 512  # of backward, each with its own partial sum of the weight's gradient
MAX_WIDTH = 8192  # a row is held in registers; wider ones would spill
SUM_ROWS, SUM_COLUMNS = 128, 16


@triton.jit(do_not_specialize=["rows"])  # otherwise 1, 8 and 16 rows would be three kernels
def _rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr, eps, rows, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    keep = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    wait_for_earlier(DEPENDENT)
    x = tl.load(x_ptr + place, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + place, mask=keep, other=0.0).to(tl.float32)
        stored = x.to(x_ptr.dtype.element_ty)
        tl.store(summed_ptr + place, stored, mask=keep)
        x = stored.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    unit = (x * rstd[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + place, unit * weight[None, :], mask=keep)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _rms_norm_backward_kernel(
    d_out_ptr, d_summed_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, width,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With n = x/rms: dx = (w·d − n·mean(w·d·n))/rms, and this program's share of Σ d·n."""
    program, column = tl.program_id(0), tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        keep = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(x_ptr + place, mask=keep, other=0.0).to(tl.float32)
        d = tl.load(d_out_ptr + place, mask=keep, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        unit, along = x * rstd, d * weight[None, :]
        dx = rstd * (along - unit * (tl.sum(along * unit, 1) / width)[:, None])
        if ADD:
            dx += tl.load(d_summed_ptr + place, mask=keep, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx, mask=keep)
        if WEIGHT:
            total += tl.sum(d * unit.to(x_ptr.dtype.element_ty).to(tl.float32), 0)
    if WEIGHT:
        tl.store(partial_ptr + program * width + column, total, mask=column < width)


@triton.jit
def _rms_norm_weight_grad_kernel(
    partial_ptr, out_ptr, programs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum of the partial sums, always in the same order, so that a rerun is identical."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        keep = (row < programs)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        total += tl.sum(tl.load(partial_ptr + place, mask=keep, other=0.0), 0)
    tl.store(out_ptr + column, total, mask=column < width)


def _double(x: Tensor, weight: Tensor) -> bool:
    """Whether the reference runs: float64 is not a type to train in, and kernels use float32."""
    return torch.float64 in (x.dtype, weight.dtype)


def _tile(width: int) -> dict[str, int]:
    """Launch constants for rows of this width."""
    columns = triton.next_power_of_2(width)
    # 16 elements per thread, but 8 for rows above 4096: there, with 16, backward would spill up to
    # 56 bytes if the width is not a multiple of 16 (Triton 3.9; with 8 up to 24, in bfloat16).
    warps = min(32, max(4, columns // (512 if columns <= 4096 else 256)))
    return {"ROWS": max(1, TILE // columns), "COLUMNS": columns, "num_warps": warps}


def _launch_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _double(x, weight):
        return reference.forward(x, weight, eps)
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    return out, _launch_forward_into(out, None, x, None, weight, eps)


def _launch_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if _double(x, weight):
        return reference.add_forward(x, residual, weight, eps)
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    summed = torch.empty_like(x)
    return out, summed, _launch_forward_into(out, summed, x, residual, weight, eps)


def _launch_forward_into(
    out: Tensor, summed: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    width = x.shape[-1]
    rstd = torch.empty(x.shape[:-1], dtype=wide_type(x.dtype), device=x.device)
    tile = _tile(width)
    launch(
        _rms_norm_forward_kernel, (triton.cdiv(rstd.numel(), tile["ROWS"]),), x, residual, weight,
        out, summed, rstd, eps, rstd.numel(), width, ADD=residual is not None, **tile,
    )  # fmt: skip
    return rstd


def _launch_backward(
    d_out: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    if _double(x, weight):
        return reference.backward(d_out, d_summed, x, weight, rstd, weight_grad)
    rows, width, tile = rstd.numel(), x.shape[-1], _tile(x.shape[-1])
    programs = min(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)
    dx, d_weight = torch.empty_like(x), weight.new_empty(width if weight_grad else 0)
    partial = None
    if weight_grad:
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel, (programs,), d_out, d_summed, x, weight, rstd, dx, partial,
        rows, width, ADD=d_summed is not None, WEIGHT=weight_grad, **tile,
    )  # fmt: skip
    if weight_grad:
        launch(
            _rms_norm_weight_grad_kernel, (triton.cdiv(width, SUM_COLUMNS),), partial, d_weight,
            programs, width, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dx, d_weight


@operator("rms_norm", _launch_forward)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.forward(x, weight, eps)


@operator("add_rms_norm", _launch_add)
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.add_forward(x, residual, weight, eps)


@operator("rms_norm_backward", _launch_backward)
def _rms_norm_backward(
    d_out: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return reference.backward(d_out, d_summed, x, weight, rstd, weight_grad)


@_rms_norm.register_fake
def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    return out, x.new_empty(x.shape[:-1], dtype=wide_type(x.dtype))


@_add_rms_norm.register_fake
def _fake_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, rstd = _fake(x, weight, eps)
    return out, torch.empty_like(x), rstd


@_rms_norm_backward.register_fake
def _fake_backward(
    d_out: Tensor, d_summed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), weight.new_empty(x.shape[-1] if weight_grad else 0)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, d_out, _rstd):
    wanted = ctx.needs_input_grad[1]
    dx, d_weight = _rms_norm_backward(d_out.contiguous(), None, *ctx.saved_tensors, wanted)
    return dx, d_weight if wanted else None, None


def _setup_add(ctx, inputs, output) -> None:
    _, summed, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(summed, inputs[2], rstd)


def _backward_add(ctx, d_out, d_summed, _rstd):
    wanted = ctx.needs_input_grad[2]
    dx, d_weight = _rms_norm_backward(
        d_out.contiguous(), d_summed.contiguous(), *ctx.saved_tensors, wanted
    )
    return dx, dx, d_weight if wanted else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
_add_rms_norm.register_autograd(_backward_add, setup_context=_setup_add)


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    checks.check_floats(x=x, weight=weight, residual=residual)
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must hold 1 … {MAX_WIDTH}")
    checks.check_shape("weight", weight, x.shape[-1:])
    if residual is not None:
        checks.check_shape("residual", residual, x.shape)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {residual.dtype}, x is {x.dtype}; they must be the same")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps = {eps}; it must be finite and above 0")
    checks.check_contiguous(x=x, weight=weight, residual=residual)
    checks.check_same_device(x=x, weight=weight, residual=residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``w·x/√(mean(x²) + ε)`` over the last axis (Zhang & Sennrich, "Root mean square layer
    normalization", 2019), with Llama's rounding: x/rms in float32, rounded to x's type, times w.

    The weight's gradient is summed in an order fixed by the shape alone.

    Args:
        x: float [..., D], contiguous, D up to 8192.
        weight: float [D].
        eps: ε, above 0.

    Returns:
        [..., D], in the type that x and weight promote to.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    _check(x, weight, eps)
    out: Tensor = _rms_norm(x, weight, eps)[0]
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The residual addition and the norm of its sum, which a pre-norm decoder does twice per layer.

    Args:
        x: float [..., D], a sublayer's output; contiguous, D up to 8192.
        residual: [..., D], of x's type.
        weight: float [D].
        eps: ε, above 0.

    Returns:
        (`rms_norm` of the sum, the sum ``x + residual`` rounded to x's type), both [..., D].

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    _check(x, weight, eps, residual)
    out, summed, _ = _add_rms_norm(x, residual, weight, eps)
    return out, summed
