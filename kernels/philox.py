"""Keyed noise: every sampler's randomness as a pure function of (seed, draw, position, column).

Noise is therefore never stored, and is the same in forward and backward, in any batch order or
batch size, and whether positions are evaluated one by one or in parallel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels.checks import check_integers, check_same_device, device_seed
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import philox as reference

BLOCK_ROWS, BLOCK_COLUMNS = 4, 512


@triton.jit
def _log(x):
    """Natural logarithm of float32 numbers that are positive, finite and not denormal: x = m·2ᵏ
    with m in [2/3, 4/3), log m as a polynomial, in libdevice's own steps and so equal to its last
    bit, without the 8 instructions for numbers that cannot occur here. Multiplications and
    additions are fused explicitly, so that every surrounding kernel rounds the same way."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) & -8388608  # bits of 2/3; sign and exponent
    m = (bits - e).to(tl.float32, bitcast=True) - 1.0
    k = e.to(tl.float32) * 1.1920928955078125e-07  # 2⁻²³
    r = tl.fma(m, -0.130310059, 0.140869141)
    r = tl.fma(r, m, -0.121483512)
    r = tl.fma(r, m, 0.139814854)
    r = tl.fma(r, m, -0.166846126)
    r = tl.fma(r, m, 0.200120345)
    r = tl.fma(r, m, -0.249996200)
    r = tl.fma(r, m, 0.333331972)
    r = tl.fma(r, m, -0.5)
    return tl.fma(k, 0.693147182, tl.fma(r * m, m, m))


@triton.jit
def gumbel_tile(
    seed, draw, position, stream, first, COLUMNS: tl.constexpr, TIGHT: tl.constexpr = False
):
    """Standard Gumbel noise float32 [rows, COLUMNS] for columns first, first + 1, …; ``first`` and
    COLUMNS are multiples of 4, draw and position int64 [rows]. Device code for other kernels.

    TIGHT is for kernels short of registers: it gives the same numbers by the library's logarithm,
    whose branch keeps the compiler from working on many elements at once."""
    block = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    # All four words of the counter are uint32: with 64-bit ones tl.philox is Philox-4x64.
    none = (position[:, None] * 0).to(tl.uint32) + block * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        none + block,
        none + position.to(tl.uint32)[:, None],
        none + draw.to(tl.uint32)[:, None],
        none + stream.to(tl.uint32),
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # Exact, from 2⁻²⁴ to 1 − 2⁻²⁴: so its −log, in [6e-8, 16.7], has a logarithm too.
    u = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    return -tl.log(-tl.log(u)) if TIGHT else -_log(-_log(u))


@triton.jit
def _gumbel_noise_kernel(
    seed_ptr, draw_ptr, position_ptr, out_ptr, rows, columns, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    draw = tl.load(draw_ptr + row, mask=row < rows, other=0)
    position = tl.load(position_ptr + row, mask=row < rows, other=0)
    word = tl.full([1, 1], 0, tl.int32) + stream
    noise = gumbel_tile(tl.load(seed_ptr), draw, position, word, first, COLUMNS)
    column = first + tl.arange(0, COLUMNS)
    keep = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], noise, mask=keep)


def _launch(seed: Tensor, draw: Tensor, position: Tensor, columns: int, stream: int) -> Tensor:
    out = torch.empty(*draw.shape, columns, dtype=torch.float32, device=draw.device)
    grid = (triton.cdiv(draw.numel(), BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    launch(
        _gumbel_noise_kernel, grid, seed, draw, position, out, draw.numel(), columns, stream,
        ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@operator("gumbel_noise", _launch)
def _gumbel_noise(
    seed: Tensor, draw: Tensor, position: Tensor, columns: int, stream: int
) -> Tensor:
    return reference.gumbel(seed, draw, position, columns, stream)


@_gumbel_noise.register_fake
def _fake(seed: Tensor, draw: Tensor, position: Tensor, columns: int, stream: int) -> Tensor:
    return draw.new_empty(*draw.shape, columns, dtype=torch.float32)


def gumbel_noise(
    seed: int | Tensor, draw: Tensor, position: Tensor, columns: int, stream: int = 0
) -> Tensor:
    """Standard Gumbel noise, one row for each (draw, position).

    Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
    seed as key and the words (column // 4, position, draw, stream) as counter. A word x becomes
    ``u = ((x >> 9) + 1/2)·2⁻²³``, strictly inside (0, 1), and ``g = −log(−log u)``. The words are
    the same integers on every device; ``g`` is the same up to the rounding of its logarithms.

    Args:
        seed: 64-bit key, or the key as an int64 tensor of one element, which a CUDA graph reads
            anew at every replay.
        draw: int64 [...], in [0, 2³²): unique to each sample over the whole run; not its place in
            the batch, and not the data set's index (noise would repeat every epoch).
        position: int64, broadcastable to draw's shape, in [0, 2³²): the token's index in its
            sample.
        columns: width of a row (the codebook).
        stream: separates uses that share the other words.

    Returns:
        float32 [..., columns].

    Raises:
        ValueError: ``columns`` below 1, a seed outside 0 … 2⁶³ − 1, several devices.
        TypeError: draw or position that are not integers.
    """
    if columns < 1:
        raise ValueError(f"columns = {columns}; it must be at least 1")
    if not 0 <= stream < 1 << 31:
        raise ValueError(f"stream = {stream}; it must be in 0 … 2^31 - 1")
    check_integers(draw=draw, position=position)
    check_same_device(draw=draw, position=position)
    draw, position = (t.long().contiguous() for t in torch.broadcast_tensors(draw, position))
    made: Tensor = _gumbel_noise(device_seed(seed, draw.device), draw, position, columns, stream)
    return made
