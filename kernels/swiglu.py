"""The elementwise half of SwiGLU, ``silu(gate)·up``: one read and one write per element, both ways.

Only the projections' outputs are kept for backward, which recomputes silu (Shazeer, "GLU variants
improve transformer", 2020).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.reference import swiglu as reference

ROWS, COLUMNS = 4, 512


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row int64 [ROWS, 1], column [1, COLUMNS] and mask of this program's tile."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def sigmoid_of(x):
    """1/(1 + e⁻ˣ), without the exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_forward_kernel(
    gate_ptr, up_ptr, stride, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_earlier(DEPENDENT)
    row, column, keep = _tile(rows, columns, ROWS, COLUMNS)
    gate = tl.load(gate_ptr + row * stride + column, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, gate * sigmoid_of(gate) * up, mask=keep)


@triton.jit
def _swiglu_backward_kernel(
    d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, stride, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, keep = _tile(rows, columns, ROWS, COLUMNS)
    place = row * stride + column
    d = tl.load(d_out_ptr + row * columns + column, mask=keep, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + place, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=keep, other=0.0).to(tl.float32)
    sigmoid = sigmoid_of(gate)
    tl.store(d_gate_ptr + place, d * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=keep)
    tl.store(d_up_ptr + place, d * gate * sigmoid, mask=keep)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)


def _shape(gate_up: Tensor) -> list[int]:
    """Shape of the result."""
    return [*gate_up.shape[:-1], gate_up.shape[-1] // 2]


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of the fused layout as views [N, F]."""
    gate, up = gate_up.view(-1, gate_up.shape[-1]).chunk(2, -1)
    return gate, up


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _launch_forward_into(out: Tensor, gate: Tensor, up: Tensor) -> None:
    if gate.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        _rows(out).copy_(reference.forward(gate, up))
        return
    rows, columns = gate.shape
    launch(
        _swiglu_forward_kernel, _grid(rows, columns), gate, up, gate.stride(0), out, rows, columns,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


def _launch_backward_into(
    d_gate: Tensor, d_up: Tensor, d_out: Tensor, gate: Tensor, up: Tensor
) -> None:
    if gate.dtype == torch.float64:
        reference.backward_into(_rows(d_gate), _rows(d_up), _rows(d_out), gate, up)
        return
    rows, columns = gate.shape
    launch(
        _swiglu_backward_kernel, _grid(rows, columns), d_out, gate, up, d_gate, d_up,
        gate.stride(0), rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


def _launch(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(_shape(gate_up))
    _launch_forward_into(out, *_halves(gate_up))
    return out


def _launch_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    grad = torch.empty_like(gate_up)
    _launch_backward_into(*_halves(grad), d_out, *_halves(gate_up))
    return grad


def _launch_pair(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _launch_forward_into(out, _rows(gate), _rows(up))
    return out


def _launch_pair_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _launch_backward_into(d_gate, d_up, d_out, _rows(gate), _rows(up))
    return d_gate, d_up


@operator("swiglu", _launch)
def _swiglu(gate_up: Tensor) -> Tensor:
    return reference.forward(*_halves(gate_up)).view(_shape(gate_up))


@operator("swiglu_backward", _launch_backward)
def _swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    grad = torch.empty_like(gate_up)
    reference.backward_into(*_halves(grad), _rows(d_out), *_halves(gate_up))
    return grad


@operator("swiglu_pair", _launch_pair)
def _swiglu_pair(gate: Tensor, up: Tensor) -> Tensor:
    return reference.forward(_rows(gate), _rows(up)).view(gate.shape)


@operator("swiglu_pair_backward", _launch_pair_backward)
def _swiglu_pair_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    reference.backward_into(_rows(d_gate), _rows(d_up), _rows(d_out), _rows(gate), _rows(up))
    return d_gate, d_up


@_swiglu.register_fake
def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(_shape(gate_up))


@_swiglu_backward.register_fake
def _fake_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


@_swiglu_pair.register_fake
def _fake_pair(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@_swiglu_pair_backward.register_fake
def _fake_pair_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out):
    return _swiglu_backward(d_out.contiguous(), *ctx.saved_tensors)


def _backward_pair(ctx, d_out):
    return _swiglu_pair_backward(d_out.contiguous(), *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup)
_swiglu_pair.register_autograd(_backward_pair, setup_context=_setup)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate)·up`` of a fused projection's output, the gate's columns first, then up's.

    It is computed in float32 and rounded once (Shazeer 2020).

    Args:
        gate_up: float [..., 2F], contiguous.

    Returns:
        [..., F], in gate_up's type.

    Raises:
        ValueError: shape or strides that do not fit.
        TypeError: gate_up is not a float tensor.
    """
    checks.check_floats(gate_up=gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] < 2 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; its last axis must be even")
    checks.check_contiguous(gate_up=gate_up)
    out: Tensor = _swiglu(gate_up)
    return out


def swiglu_pair(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of two projections' outputs.

    Args:
        gate: float [..., F], contiguous.
        up: [..., F], of gate's type, contiguous.

    Returns:
        [..., F], in gate's type.

    Raises:
        ValueError: shapes, devices or strides that do not fit.
        TypeError: types that do not fit.
    """
    checks.check_floats(gate=gate, up=up)
    if gate.dim() < 1 or gate.shape[-1] < 1:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; its last axis must not be empty")
    checks.check_shape("up", up, gate.shape)
    if up.dtype != gate.dtype:
        raise TypeError(f"up is {up.dtype}, gate is {gate.dtype}; they must be the same")
    checks.check_contiguous(gate=gate, up=up)
    checks.check_same_device(gate=gate, up=up)
    out: Tensor = _swiglu_pair(gate, up)
    return out
