"""y = x·Wᵀ for the rows of a large decoding batch, with the norm before it and the residual or
SwiGLU after it in one launch. `skinny_linear` is for 16 rows and fewer.

Above 16 rows torch multiplies well, and what is left to save is the work around its product: the
launch of the norm and its copy of x, the launch of SwiGLU and the 2·M numbers per row that it
reads, and, with fp8 weights, a whole wider copy of W.

The norm needs no pass of its own: ``(x/rms ⊙ g)·Wᵀ = (x ⊙ g)·Wᵀ / rms``, and the sum of squares is
collected from the tiles that the product reads anyway. So x ⊙ g is rounded to bfloat16 once, before
the division, whereas Llama's norm rounds on both sides of the gain: one rounding fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels.constants import chosen
from echogen.kernels.cuda.loader import Gpu, gpu
from echogen.kernels.dispatch import INTERPRETED, launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.reference import wide_linear as reference
from echogen.kernels.skinny_linear import check_linear, fake_linear
from echogen.kernels.swiglu import sigmoid_of

ROWS, MORE_ROWS = 64, 128  # of a tile; the larger if every multiprocessor still gets a tile
# Of a tile; narrower where otherwise at least half of the multiprocessors would read nothing of W.
COLUMNS, LEAST_COLUMNS, DEPTH = 64, 16, 64
STAGES, MOST_STAGES = 4, 11
"""Tiles of the inputs in flight. Memory answers after some 700 ns, so an H200 at full rate has 3.4
MB in flight. If each multiprocessor has one program, 4 tiles per program are less than 1 MB of W.
More should help there (by arithmetic; not timed). No registers spill, but with 12 some do on sm_80
(Triton 3.9)."""
SPARE = 16 << 10  # bytes of shared memory that tiles in flight leave for the rest


@dataclass(frozen=True)
class Tile:
    """Launch constants.

    Attributes:
        rows, columns, depth: sizes of the tiles: x's, W's and both.
        warps, stages: warps per program; tiles of the inputs in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def candidates(self) -> list[Tile]:
        """Both heights, half to twice the columns (at least 16), and more or fewer stages."""
        columns = [c for c in (self.columns // 2, self.columns, 2 * self.columns) if c >= 16]
        return [
            Tile(rows, c, self.depth, warps, stages)
            for rows, warps in ((ROWS, 4), (MORE_ROWS, 8))
            for c in columns
            for stages in sorted({3, STAGES, 6, self.stages})
        ]


@triton.jit
def _product(x, w, sums, WIDE: tl.constexpr):
    """x [ROWS, DEPTH] · w [DEPTH, COLUMNS] added to the sums."""
    if w.dtype == tl.float8e4nv:
        # Exact, with packed conversions. Directly, Triton goes from float16 to bfloat16 number by
        # number, 64 per thread and step for SwiGLU, which is slow on Hopper (Triton's pull request
        # 4563). Not timed.
        w = w.to(tl.float16).to(tl.float32)
    w = w.to(x.dtype)
    if WIDE:  # the interpreter holds bfloat16 as integers and would multiply those
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _wide_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, gain_ptr, residual_ptr, out_ptr, rows, depth, outputs, eps,
    SWIGLU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """One tile of outputs. Neighbouring programs have the same columns, so that W comes from memory
    once, and for the others from the L2 cache."""
    wait_for_earlier(DEPENDENT)
    tiles = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = row < rows, column < outputs
    x_place = row.to(tl.int64)[:, None] * depth
    w_place = column.to(tl.int64)[None, :] * depth
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, DEPTH // 8], tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        there = k < depth
        x = tl.load(x_ptr + x_place + k[None, :], mask=real[:, None] & there[None, :], other=0.0)
        if gain_ptr is not None:
            wide = x.to(tl.float32)
            # 8 neighbours belong to one thread: threads add up only after the loop.
            squares += tl.sum(tl.reshape(wide * wide, [ROWS, DEPTH // 8, 8]), 2)
            gain = tl.load(gain_ptr + k, mask=there, other=0.0).to(tl.float32)
            x = (wide * gain[None, :]).to(x.dtype)
        keep = there[:, None] & inside[None, :]
        w = tl.load(weight_ptr + w_place + k[:, None], mask=keep, other=0.0)
        sums = _product(x, w, sums, WIDE)
        if SWIGLU:
            up_place = (column + outputs).to(tl.int64)[None, :] * depth
            up = tl.load(weight_ptr + up_place + k[:, None], mask=keep, other=0.0)
            ups = _product(x, up, ups, WIDE)
    if gain_ptr is not None:
        inverse = tl.rsqrt(tl.sum(squares, 1) / depth + eps)[:, None]
        sums, ups = sums * inverse, ups * inverse
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + column, mask=inside, other=0.0)[None, :]
        if SWIGLU:
            ups *= tl.load(scale_ptr + outputs + column, mask=inside, other=0.0)[None, :]
    if SWIGLU:
        sums = sums * sigmoid_of(sums) * ups
    place = row.to(tl.int64)[:, None] * outputs + column[None, :]
    stored = real[:, None] & inside[None, :]
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, sums, mask=stored)


def _launch(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, eps: float,
    residual: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    rows, depth = x.shape
    if x.dtype != torch.bfloat16:
        raise TypeError(
            f"x is {x.dtype}; the kernel multiplies bfloat16 by bfloat16 or float8_e4m3fn"
        )
    outputs = len(weight) // 2 if swiglu else len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tile = chosen(_tile(x, weight, outputs, swiglu))
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns)
    launch(
        _wide_linear_kernel, (programs,), x, weight, scale, gain, residual, out, rows, depth,
        outputs, eps, SWIGLU=swiglu, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        WIDE=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _tile(x: Tensor, weight: Tensor, outputs: int, swiglu: bool) -> Tile:
    on = gpu(x.device)
    rows, columns = tiles(len(x), outputs, swiglu, on.sms)
    programs = triton.cdiv(len(x), rows) * triton.cdiv(outputs, columns)
    held = DEPTH * (rows * x.element_size() + columns * weight.element_size() * (1 + swiglu))
    return Tile(rows, columns, DEPTH, 4 if rows == ROWS else 8, stages(programs, held, on))


def stages(programs: int, held: int, on: Gpu) -> int:
    """Number of tiles in flight, of ``held`` bytes each."""
    if programs > on.sms:  # several share a multiprocessor, and its shared memory
        return STAGES
    return max(STAGES, min(MOST_STAGES, (on.shared_bytes - SPARE) // held))


def tiles(rows: int, outputs: int, swiglu: bool, sms: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    # With tiles of two weights, one program of 128 rows or two of 64 fit an sm_90; not timed.
    many = triton.cdiv(rows, MORE_ROWS) * triton.cdiv(outputs, COLUMNS) >= sms
    tile, columns = MORE_ROWS if many and rows > ROWS and not swiglu else ROWS, COLUMNS
    high = triton.cdiv(rows, tile)
    while columns > LEAST_COLUMNS and 2 * high * triton.cdiv(outputs, columns) <= sms:
        columns //= 2
    return tile, columns


@operator("wide_linear", _launch)
def _wide_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, eps: float,
    residual: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    return reference.linear(x, weight, scale, gain, eps, residual, swiglu)


_wide_linear.register_fake(fake_linear)


def wide_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """`skinny_linear` for any number of rows: the same formula, with sums in float32 and no
    gradient. The reference rounds the norm as Llama does; the kernel rounds once less (see the
    module).

    Args:
        x: [R, K], contiguous; bfloat16 on CUDA, any float type on the CPU.
        weight: [N, K], contiguous, of x's type, or float8_e4m3fn (see `skinny_linear.fp8_weight`;
            on CUDA from compute capability 8.9 on), without NaN. K as in `skinny_linear`.
        scale, gain, eps, residual, swiglu: as in `skinny_linear`.

    Returns:
        [R, N], or [R, N/2] with ``swiglu``, of x's type.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    check_linear(x, weight, scale, gain, eps, residual, swiglu)
    made: Tensor = _wide_linear(x, weight, scale, gain, eps, residual, swiglu)
    return made
