"""Straight-through Gumbel-Softmax over a codebook, as flash attention with the codes as values.

``y = onehot(argmax(ℓ + g))`` forward, ``softmax((ℓ + g)/τ)`` backward (Jang et al. 2017; Maddison
et al. 2017), times the codebook E. An autograd graph would hold noise, soft and hard samples, each
[N, V]; here none is stored. The noise is a function of its key, and p = softmax((ℓ + g)/τ) enters
the gradient of the logits only as ``dℓ = p ⊙ (dO·Eᵀ − dO·(p·E))/τ``, where p·E is [N, C] and is
summed online, as flash attention sums its output (Dao et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.codebook_grad import codebook_grad
from echogen.kernels.constants import chosen
from echogen.kernels.cuda.loader import gpu
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.philox import gumbel_tile
from echogen.kernels.reference import gumbel as reference
from echogen.kernels.reference.precision import wide_type

ROWS = 16  # of a tile of [N, V] at least, so that one tl.dot reuses a tile of codes
MOST_WIDE = 256
LEAST_K = 8 if tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9) else 16
"""The fewest numbers that `tl.dot` sums over in float32; Triton 3.6 and 3.7 do not take eight."""


@dataclass(frozen=True)
class Tile:
    """Launch constants of a pass: rows and codes of a tile, and warps that share it.

    The rules below choose tiles with few instructions per element whose registers do not spill on
    sm_80 to sm_100, as `echogen bench compile` reports for 8 numbers per code, with targets, under
    Triton 3.9. Forward over many rows of half floats takes 80 registers per thread (72 on sm_80):
    one thread computes each of the dot's 256 numbers, whereas 16 rows on eight warps compute each
    twice. Otherwise forward takes 64 to 80. Backward takes 96 to 114 (128 on sm_80 in bfloat16).
    Only a GPU can tell which is fastest: `echogen bench kernels --tune`.
    """

    rows: int
    columns: int
    warps: int

    def candidates(self) -> list[Self]:
        """16 to 64 rows and half to twice the codes (at least 16), with four and eight warps.
        Nearly all tiles of more than 4,096 numbers spill (sm_90)."""
        codes = (self.columns // 2, self.columns, 2 * self.columns)
        sizes = [(r, c) for r in (16, 32, 64) for c in codes if c >= 16 and r * c <= 4096]
        return [type(self)(*size, warps) for size in sizes for warps in (4, 8)]


class ForwardTile(Tile):
    """Launch constants of the forward pass."""


class BackwardTile(Tile):
    """Launch constants of the backward pass."""


@dataclass(frozen=True)
class Splits:
    """Among how many programs the forward pass divides the codes of a tile of rows.

    Attributes:
        warps: warps that a multiprocessor holds at once, as many as registers allow.
        least: the fewest codes of a program; beside them, writing and merging its partial costs
            little.
        most: the most programs of a tile.
    """

    warps: int = 24
    least: int = 1024
    most: int = 8

    def slots(self, sms: int, warps: int) -> int:
        """Programs of ``warps`` warps that a device holds at once."""
        return sms * max(1, self.warps // warps)

    def of(self, tiles: int, columns: int, slots: int) -> int:
        """The number of programs with which all tiles are done soonest. A program takes 1/n of a
        tile's time, but one program more than there are slots costs as much time as another whole
        wave. Fewer programs that take at most 5 % longer are preferred, as each has a partial to
        write and to merge."""
        most = max(1, min(columns // self.least, self.most))
        times = {n: triton.cdiv(tiles * n, slots) / n for n in range(1, most + 1)}
        return next(n for n, time in times.items() if time <= 1.05 * min(times.values()))

    def candidates(self) -> list[Splits]:
        """Up to 1, 4, 8 and 16 programs, as if a multiprocessor held 16, 24 or 32 warps."""
        return [Splits(w, self.least, most) for w in (16, 24, 32) for most in (1, 4, 8, 16)]


SPLITS = Splits()


def _forward_tile(width: int, rows: int, half: bool, sms: int) -> ForwardTile:
    if width <= 16:
        # Whether tiles of 32 rows on four warps still fill the device once they are split.
        many = rows * SPLITS.most >= 32 * SPLITS.slots(sms, 4)
        return ForwardTile(32, 32, 4) if half and many else ForwardTile(ROWS, 128, 8)
    if width <= 32:
        return ForwardTile(ROWS, 64, 4)
    return ForwardTile(ROWS, 32 if width <= 64 else 16, 4)


def _backward_tile(width: int) -> BackwardTile:
    if width <= 32:
        return BackwardTile(32, 64 if width <= 16 else 32, 4)
    return BackwardTile(ROWS, 32 if width <= 64 else 16, 4)


@triton.jit
def _noisy_tile(
    logits_ptr, seed, draw, position, row, first, rows, columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits and logits + noise of one tile, −inf outside."""
    column = first + tl.arange(0, COLUMNS)
    keep = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(logits_ptr + place, mask=keep, other=float("-inf")).to(tl.float32)
    word = tl.full([1, 1], 0, tl.int32)
    noise = gumbel_tile(seed, draw, position, word, first, COLUMNS)
    return x, x + noise, keep, place


@triton.jit
def _codes_tile(codebook_ptr, first, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """Codes first … of the codebook, float32 [COLUMNS, PADDED], zero outside."""
    column, c = first + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    keep = (column < columns)[:, None] & (c < WIDTH)[None, :]
    place = column[:, None] * WIDTH + c[None, :]
    return tl.load(codebook_ptr + place, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _larger(top, here):
    """The maximum, and the same with 0 for −inf: a row of only −inf so far must not give −inf −
    −inf."""
    now = tl.maximum(top, here)
    return now, tl.where(now == float("-inf"), 0.0, now)


@triton.jit
def _finish(
    row, rows, columns, index, top, total, soft, top_l, total_l, at_target, target,
    given_ptr, codebook_ptr, embed_ptr, index_ptr, ce_ptr, lse_a_ptr, lse_l_ptr, e_soft_ptr,
    TARGETS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Store the results of whole rows."""
    inside = row < rows
    # NaN compares with nothing, so padding may win an argmax: keep the index in the codebook.
    index = tl.minimum(index, columns - 1).to(tl.int64)
    if given_ptr is not None:
        index = tl.load(given_ptr + row, mask=inside, other=0)
    known = inside & (index >= 0) & (index < columns)
    total = tl.where(inside, total, 1.0)
    c = tl.arange(0, PADDED)
    keep = inside[:, None] & (c < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + c[None, :]
    chosen = tl.load(
        codebook_ptr + index[:, None] * WIDTH + c[None, :],
        mask=known[:, None] & (c < WIDTH)[None, :], other=float("nan"),
    )  # fmt: skip
    tl.store(embed_ptr + place, chosen, mask=keep)
    tl.store(e_soft_ptr + place, soft / total[:, None], mask=keep)
    tl.store(index_ptr + row, index, mask=inside)
    tl.store(lse_a_ptr + row, top + tl.log(total), mask=inside)
    lse_l, ce = tl.zeros_like(top), tl.zeros_like(top)
    if TARGETS:
        log_l = tl.log(tl.where(inside, total_l, 1.0))
        lse_l = top_l + log_l
        # Not lse_l − at_target: if logits share a large offset, it rounds the logarithm away.
        ce = tl.where(target < columns, (top_l - at_target) + log_l, float("nan"))
        ce = tl.where(target < 0, 0.0, ce)
    tl.store(lse_l_ptr + row, lse_l, mask=inside)
    tl.store(ce_ptr + row, ce, mask=inside)


@triton.jit
def _gumbel_st_forward_kernel(
    logits_ptr, codebook_ptr, tau_ptr, seed_ptr, draw_ptr, position_ptr, given_ptr, targets_ptr,
    embed_ptr, index_ptr, ce_ptr, lse_a_ptr, lse_l_ptr, e_soft_ptr, parts_ptr, soft_ptr,
    rows, columns, share, TARGETS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows over all codes or, where there are ``parts``, over ``share`` of them."""
    row, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inside = row < rows
    seed, scale = tl.load(seed_ptr), 1.0 / tl.load(tau_ptr)
    draw = tl.load(draw_ptr + row, mask=inside, other=0)
    position = tl.load(position_ptr + row, mask=inside, other=0)
    target = tl.full([ROWS], -1, tl.int64)
    if TARGETS:
        target = tl.load(targets_ptr + row, mask=inside, other=-1)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    top_l, total_l = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    at_target = tl.zeros([ROWS], tl.float32)
    soft = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, columns), COLUMNS):
        x, noisy, _, _ = _noisy_tile(
            logits_ptr, seed, draw, position, row, first, rows, columns, COLUMNS
        )
        here = tl.max(noisy, 1)
        index = tl.where(here > best, first + tl.argmax(noisy, 1), index)
        best = tl.maximum(best, here)
        now, safe = _larger(top, here * scale)
        p = tl.exp(noisy * scale - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 1)
        codes = _codes_tile(codebook_ptr, first, columns, WIDTH, PADDED, COLUMNS)
        soft = soft * shrink[:, None] + tl.dot(p, codes, input_precision="ieee")
        top = now
        if TARGETS:
            now_l, safe_l = _larger(top_l, tl.max(x, 1))
            total_l = total_l * tl.exp(top_l - safe_l) + tl.sum(tl.exp(x - safe_l[:, None]), 1)
            top_l = now_l
            column = first + tl.arange(0, COLUMNS)
            at_target += tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
    if parts_ptr is None:
        _finish(
            row, rows, columns, index, top, total, soft, top_l, total_l, at_target, target,
            given_ptr, codebook_ptr, embed_ptr, index_ptr, ce_ptr, lse_a_ptr, lse_l_ptr,
            e_soft_ptr, TARGETS, WIDTH, PADDED,
        )  # fmt: skip
    else:
        place = split * rows + row.to(tl.int64)
        each = tl.num_programs(1).to(tl.int64) * rows
        tl.store(parts_ptr + place, top, mask=inside)
        tl.store(parts_ptr + each + place, total, mask=inside)
        tl.store(parts_ptr + 2 * each + place, best, mask=inside)
        tl.store(parts_ptr + 3 * each + place, index.to(tl.float32, bitcast=True), mask=inside)
        if TARGETS:
            tl.store(parts_ptr + 4 * each + place, top_l, mask=inside)
            tl.store(parts_ptr + 5 * each + place, total_l, mask=inside)
            tl.store(parts_ptr + 6 * each + place, at_target, mask=inside)
        c = tl.arange(0, PADDED)
        keep = inside[:, None] & (c < WIDTH)[None, :]
        tl.store(soft_ptr + place[:, None] * WIDTH + c[None, :], soft, mask=keep)


@triton.jit
def _gumbel_st_merge_kernel(
    parts_ptr, soft_ptr, codebook_ptr, given_ptr, targets_ptr, embed_ptr, index_ptr, ce_ptr,
    lse_a_ptr, lse_l_ptr, e_soft_ptr, rows, columns, splits,
    TARGETS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a tile of rows in the order of codes, so that the first of ties is
    chosen."""
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = row < rows
    target = tl.full([ROWS], -1, tl.int64)
    if TARGETS:
        target = tl.load(targets_ptr + row, mask=inside, other=-1)
    best, index = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.int32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    top_l, total_l = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    at_target = tl.zeros([ROWS], tl.float32)
    soft = tl.zeros([ROWS, PADDED], tl.float32)
    each = splits.to(tl.int64) * rows
    for split in range(splits):
        place = split * rows + row.to(tl.int64)
        part = tl.load(parts_ptr + place, mask=inside, other=float("-inf"))
        now, safe = _larger(top, part)
        shrink, weight = tl.exp(top - safe), tl.exp(part - safe)
        total = total * shrink + weight * tl.load(parts_ptr + each + place, mask=inside, other=0.0)
        keep = inside[:, None] & (c < WIDTH)[None, :]
        some = tl.load(soft_ptr + place[:, None] * WIDTH + c[None, :], mask=keep, other=0.0)
        soft = soft * shrink[:, None] + weight[:, None] * some
        top = now
        here = tl.load(parts_ptr + 2 * each + place, mask=inside, other=float("-inf"))
        chosen = tl.load(parts_ptr + 3 * each + place, mask=inside, other=0.0)
        index = tl.where(here > best, chosen.to(tl.int32, bitcast=True), index)
        best = tl.maximum(best, here)
        if TARGETS:
            part = tl.load(parts_ptr + 4 * each + place, mask=inside, other=float("-inf"))
            now_l, safe_l = _larger(top_l, part)
            total_l = total_l * tl.exp(top_l - safe_l) + tl.exp(part - safe_l) * tl.load(
                parts_ptr + 5 * each + place, mask=inside, other=0.0
            )
            top_l = now_l
            at_target += tl.load(parts_ptr + 6 * each + place, mask=inside, other=0.0)
    _finish(
        row, rows, columns, index, top, total, soft, top_l, total_l, at_target, target,
        given_ptr, codebook_ptr, embed_ptr, index_ptr, ce_ptr, lse_a_ptr, lse_l_ptr, e_soft_ptr,
        TARGETS, WIDTH, PADDED,
    )  # fmt: skip


@triton.jit
def _gumbel_st_backward_kernel(
    logits_ptr, codebook_ptr, tau_ptr, seed_ptr, draw_ptr, position_ptr, targets_ptr,
    lse_a_ptr, lse_l_ptr, e_soft_ptr, d_embed_ptr, d_ce_ptr, out_ptr, rows, columns,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS
    inside = row < rows
    column = first + tl.arange(0, COLUMNS)
    keep = inside[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(logits_ptr + place, mask=keep, other=float("-inf")).to(tl.float32)
    grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    if d_embed_ptr is not None:
        seed, scale = tl.load(seed_ptr), 1.0 / tl.load(tau_ptr)
        draw = tl.load(draw_ptr + row, mask=inside, other=0)
        position = tl.load(position_ptr + row, mask=inside, other=0)
        word = tl.full([1, 1], 0, tl.int32)
        noisy = x + gumbel_tile(seed, draw, position, word, first, COLUMNS)
        lse_a = tl.load(lse_a_ptr + row, mask=inside, other=0.0)
        p = tl.exp(noisy * scale - lse_a[:, None])
        c = tl.arange(0, PADDED)
        keep_c = inside[:, None] & (c < WIDTH)[None, :]
        place_c = row.to(tl.int64)[:, None] * WIDTH + c[None, :]
        d = tl.load(d_embed_ptr + place_c, mask=keep_c, other=0.0).to(tl.float32)
        e_soft = tl.load(e_soft_ptr + place_c, mask=keep_c, other=0.0)
        codes = _codes_tile(codebook_ptr, first, columns, WIDTH, PADDED, COLUMNS)
        along = tl.dot(d, tl.trans(codes), input_precision="ieee") - tl.sum(d * e_soft, 1)[:, None]
        grad = p * along * scale
    if d_ce_ptr is not None:
        target = tl.load(targets_ptr + row, mask=inside, other=-1)
        d_ce = tl.load(d_ce_ptr + row, mask=inside, other=0.0).to(tl.float32)
        d_ce = tl.where((target < columns) | (d_ce == 0), d_ce, float("nan"))
        d_ce = tl.where(target < 0, 0.0, d_ce)
        lse_l = tl.load(lse_l_ptr + row, mask=inside, other=0.0)
        hit = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
        # A row without a target has no share, whatever its logits are.
        share = d_ce[:, None] * (tl.exp(x - lse_l[:, None]) - hit)
        grad += tl.where((target < 0)[:, None], 0.0, share)
    tl.store(out_ptr + place, grad, mask=keep)


def _padded(width: int, least: int = 8) -> int:
    return max(least, triton.next_power_of_2(width))


Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _launch_forward(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    index: Tensor | None,
    targets: Tensor | None,
) -> Kept:
    if logits.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.forward(logits, codebook, tau, seed, draw, position, index, targets)
    out = empty_outputs(len(logits), codebook)
    launch_forward_into(out, logits, codebook, tau, seed, draw, position, index, targets)
    return out


def empty_outputs(rows: int, codebook: Tensor) -> Kept:
    """Allocate what `launch_forward_into` fills: embed, index, ce, lse_a, lse_l, e_soft."""
    width = codebook.shape[1]
    index = torch.empty(rows, dtype=torch.int64, device=codebook.device)
    ce, lse_a, lse_l = (torch.empty_like(index, dtype=torch.float32) for _ in range(3))
    e_soft = torch.empty(rows, width, dtype=torch.float32, device=codebook.device)
    return codebook.new_empty(rows, width), index, ce, lse_a, lse_l, e_soft


def launch_forward_into(
    out: Kept, logits: Tensor, codebook: Tensor, tau: Tensor, seed: Tensor, draw: Tensor,
    position: Tensor, index: Tensor | None, targets: Tensor | None,
) -> None:  # fmt: skip
    """Run the forward pass, into the given tensors or rows of tensors."""
    (rows, columns), width, sms = logits.shape, codebook.shape[1], gpu(logits.device).sms
    tile = chosen(_forward_tile(width, rows, logits.element_size() == 2, sms))
    tiles, rule = triton.cdiv(rows, tile.rows), chosen(SPLITS)
    splits = rule.of(tiles, columns, rule.slots(sms, tile.warps))
    share = triton.cdiv(triton.cdiv(columns, splits), tile.columns) * tile.columns
    splits = triton.cdiv(columns, share)  # none is left without codes
    parts = soft = None
    if splits > 1:
        # top, total, best and its index; of the plain logits top, total and the target's logit
        parts = torch.empty(7, splits, rows, dtype=torch.float32, device=logits.device)
        soft = torch.empty(splits, rows, width, dtype=torch.float32, device=logits.device)
    constants = {"TARGETS": targets is not None, "WIDTH": width, "PADDED": _padded(width)}
    launch(
        _gumbel_st_forward_kernel, (tiles, splits), logits, codebook, tau, seed, draw, position,
        index, targets, *out, parts, soft, rows, columns, share, ROWS=tile.rows,
        COLUMNS=tile.columns, num_warps=tile.warps, **constants,
    )  # fmt: skip
    if splits > 1:
        launch(
            _gumbel_st_merge_kernel, (triton.cdiv(rows, ROWS),), parts, soft, codebook, index,
            targets, *out, rows, columns, splits, ROWS=ROWS, num_warps=4, **constants,
        )  # fmt: skip


def _launch_backward(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    targets: Tensor | None,
    lse_a: Tensor,
    lse_l: Tensor,
    e_soft: Tensor,
    d_embed: Tensor | None,
    d_ce: Tensor | None,
) -> Tensor:
    if logits.dtype == torch.float64:
        return reference.backward(
            logits, codebook, tau, seed, draw, position, targets, lse_a, lse_l, e_soft, d_embed,
            d_ce,
        )  # fmt: skip
    out = torch.empty_like(logits)
    launch_backward_into(
        out, logits, codebook, tau, seed, draw, position, targets, lse_a, lse_l, e_soft, d_embed,
        d_ce,
    )  # fmt: skip
    return out


def launch_backward_into(
    out: Tensor, logits: Tensor, codebook: Tensor, tau: Tensor, seed: Tensor, draw: Tensor,
    position: Tensor, targets: Tensor | None, lse_a: Tensor, lse_l: Tensor, e_soft: Tensor,
    d_embed: Tensor | None, d_ce: Tensor | None,
) -> None:  # fmt: skip
    """Run the backward pass; ``out`` may be ``logits``, as the program that writes an element has
    read it before."""
    (rows, columns), width = logits.shape, codebook.shape[1]
    tile = chosen(_backward_tile(width))
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
    launch(
        _gumbel_st_backward_kernel, grid, logits, codebook, tau, seed, draw, position, targets,
        lse_a, lse_l, e_soft, d_embed, None if targets is None else d_ce, out, rows, columns,
        WIDTH=width, PADDED=_padded(width, LEAST_K), ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip


@operator("gumbel_st_embed", _launch_forward)
def _gumbel_st_embed(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    index: Tensor | None,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.forward(logits, codebook, tau, seed, draw, position, index, targets)


@operator("gumbel_st_embed_backward", _launch_backward)
def _gumbel_st_embed_backward(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    targets: Tensor | None,
    lse_a: Tensor,
    lse_l: Tensor,
    e_soft: Tensor,
    d_embed: Tensor | None,
    d_ce: Tensor | None,
) -> Tensor:
    return reference.backward(
        logits, codebook, tau, seed, draw, position, targets, lse_a, lse_l, e_soft, d_embed, d_ce
    )


@_gumbel_st_embed.register_fake
def _fake_forward(
    logits: Tensor, codebook: Tensor, tau: Tensor, seed: Tensor, draw: Tensor, position: Tensor,
    index: Tensor | None, targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, wide = len(logits), wide_type(logits.dtype)
    ce, lse_a, lse_l = (logits.new_empty(rows, dtype=wide) for _ in range(3))
    embed = codebook.new_empty(rows, codebook.shape[1])
    e_soft = logits.new_empty(rows, codebook.shape[1], dtype=wide)
    return embed, logits.new_empty(rows, dtype=torch.int64), ce, lse_a, lse_l, e_soft


@_gumbel_st_embed_backward.register_fake
def _fake_backward(
    logits: Tensor, codebook: Tensor, tau: Tensor, seed: Tensor, draw: Tensor, position: Tensor,
    targets: Tensor | None, lse_a: Tensor, lse_l: Tensor, e_soft: Tensor,
    d_embed: Tensor | None, d_ce: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, codebook, tau, seed, draw, position, _, targets = inputs
    _, index, _, lse_a, lse_l, e_soft = output
    ctx.mark_non_differentiable(index, lse_a, lse_l, e_soft)
    ctx.set_materialize_grads(False)  # one output's gradient costs half as much as both
    ctx.save_for_backward(
        logits, codebook, tau, seed, draw, position, targets, lse_a, lse_l, e_soft, index
    )


def _backward(
    ctx: Any, d_embed: Tensor | None, _index: None, d_ce: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *key, lse_a, lse_l, e_soft, index = ctx.saved_tensors
    codebook, targets = key[1], key[-1]
    d_embed, d_ce = above(d_embed, d_ce, targets)
    d_logits = d_codebook = None
    if ctx.needs_input_grad[0] and not (d_embed is None and d_ce is None):
        d_logits = _gumbel_st_embed_backward(*key, lse_a, lse_l, e_soft, d_embed, d_ce)
    if ctx.needs_input_grad[1] and d_embed is not None:
        d_codebook = codebook_grad(d_embed, index, len(codebook)).to(codebook.dtype)
    return d_logits, d_codebook, *[None] * 6


def above(
    d_embed: Tensor | None, d_ce: Tensor | None, targets: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the outputs' gradients in the form that the backward operators take; None where there
    is none, and for a cross entropy without targets."""
    return (
        None if d_embed is None else d_embed.contiguous(),
        None if d_ce is None or targets is None else d_ce.contiguous(),
    )


_gumbel_st_embed.register_autograd(_backward, setup_context=_setup)


class GumbelSample(NamedTuple):
    """The result of straight-through sampling.

    Attributes:
        embed: [N, C], rows of the codebook, in its type.
        code: int64 [N], the codes chosen (or given).
        ce: float32 [N] (float64 for float64 logits), cross entropy of the plain logits with the
            targets; 0 without targets and where a target is negative.
    """

    embed: Tensor
    code: Tensor
    ce: Tensor


def check_sampling(
    codebook: Tensor, rows: int, columns: int, per_row: dict[str, Tensor | None]
) -> None:
    """Check the arguments that both forms of the sampler share, for logits [rows, columns].

    Raises:
        ValueError, TypeError: as in `gumbel_st_embed`.
    """
    checks.check_floats(codebook=codebook)
    checks.check_integers(**per_row)
    checks.check_shape("codebook", codebook, (columns, None))
    for name, tensor in per_row.items():
        if tensor is not None:
            checks.check_shape(name, tensor, (rows,))
    checks.check_not_empty(codebook=codebook)
    checks.check_contiguous(codebook=codebook, **per_row)
    if codebook.shape[1] > MOST_WIDE:
        raise ValueError(f"codebook is {codebook.shape[1]} wide; the kernel holds {MOST_WIDE}")


def gumbel_st_embed(
    logits: Tensor,
    codebook: Tensor,
    tau: float | Tensor,
    seed: int | Tensor,
    draw: Tensor,
    position: Tensor,
    index: Tensor | None = None,
    targets: Tensor | None = None,
) -> GumbelSample:
    """Sample one code per row and return its embedding, with a gradient through the soft sample.

    Forward ``embed = E[argmax(ℓ + g)]``; backward, with ``p = softmax((ℓ + g)/τ)``,
    ``dℓ = p ⊙ (dO·Eᵀ − dO·(p·E))/τ``, plus the cross entropy's share, and ``dE`` sums dO over the
    rows that chose each code, in the order of rows (straight-through Gumbel-Softmax, Jang et al.
    2017; EchoGen, arXiv 2603.18001, stage 2). Noise is `philox.gumbel_noise` of (seed, draw,
    position), regenerated in backward.

    Args:
        logits: float [N, V], contiguous.
        codebook: float [V, C], contiguous; C up to 256.
        tau: temperature of the soft sample, above 0; a tensor of one element is not checked.
        seed: key of the noise, an int or an int64 tensor of one element.
        draw, position: int64 [N], the words of each row's noise.
        index: int64 [N], codes already sampled (with the same noise); the noise then only shapes
            the soft sample. A code outside the codebook has embedding NaN.
        targets: int64 [N], codes for the cross entropy, which is 0 for a negative target and NaN
            beyond the codebook.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    checks.check_floats(logits=logits)
    checks.check_shape("logits", logits, (None, None))
    per_row = {"draw": draw, "position": position, "index": index, "targets": targets}
    checks.check_not_empty(logits=logits)
    checks.check_contiguous(logits=logits)
    checks.check_same_device(logits=logits, codebook=codebook, **per_row)
    check_sampling(codebook, len(logits), logits.shape[1], per_row)
    long = [None if t is None else t.long() for t in per_row.values()]
    embed, chosen, ce, *_ = _gumbel_st_embed(
        logits,
        codebook,
        checks.device_scalar("tau", tau, logits.device, 0),
        checks.device_seed(seed, logits.device),
        *long,
    )
    return GumbelSample(embed, chosen, ce)
