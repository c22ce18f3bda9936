"""Guided sampling in one launch: logits in; token, its log-probability and its embedding out.

Between two decoding steps the eager path makes some twenty passes over [N, V]: guidance, division,
sort, cumulative sum, noise, softmax, argmax, gather. Here a row is read once (and, if it is
truncated, a second time from cache) and nothing of its size is written. A token is
``argmax(x/T + g)`` with keyed Gumbel noise g, a draw from softmax(x/T) (Gumbel 1954), so the
softmax's sum is needed only for the log-probability and is accumulated online. Truncation needs no
sort: the bits of a float32 are flipped so that they sort like the floats, and the exact threshold
is then found bit by bit, counting the codes above it (top-k) or adding up their probability
(top-p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.constants import chosen
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.philox import gumbel_tile
from echogen.kernels.reference import sampling as reference

ROWS = 1  # per program; decoding has fewer rows than multiprocessors
COLUMNS = 4096  # of a row at a time, by eight warps
LONGEST = 65536  # row that one block can hold for truncation; above 16384 registers spill
EMBED = 4096
COLDEST, SMALLEST = tl.constexpr(reference.COLDEST), tl.constexpr(reference.SMALLEST)

Guided = Literal["none", "blocked", "interleaved"]


@dataclass(frozen=True)
class Tile:
    """Launch constants: columns of a row to draw from at a time, and warps per program. If the row
    is truncated, the warps hold all of it."""

    columns: int
    warps: int

    def candidates(self) -> list[Tile]:
        """Half to twice the columns, with four to sixteen warps."""
        sizes = (self.columns // 2, self.columns, 2 * self.columns)
        return [Tile(columns, warps) for columns in sizes for warps in (4, 8, 16)]


def _tile(columns: int, truncated: bool) -> Tile:
    """Launch constants for rows of ``columns``: 16 elements per thread in the online pass, 32 for a
    truncated row of 16,384."""
    warps = min(16, max(4, columns // 1024)) if truncated else min(8, max(4, columns // 512))
    return Tile(COLUMNS * warps // 8, warps)


@triton.jit
def _scores(
    logits_ptr, row, column, columns, inside, stride, apart, cfg, scale, MIXED: tl.constexpr
):  # fmt: skip
    """x/T of the elements (row, column), −inf outside and where either branch is −inf; ``cfg`` and
    ``scale`` (1/T) broadcast with row."""
    first = row.to(tl.int64) * stride
    place = first * columns + column
    x = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    if MIXED:
        place = (first + apart) * columns + column
        u = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        # −inf − −inf must not be computed.
        dead = (x == float("-inf")) | (u == float("-inf"))
        x, u = tl.where(dead, 0.0, x), tl.where(dead, 0.0, u)
        # u + 1·(x − u) equals x only up to rounding, and guidance schedules contain ones.
        x = tl.where(dead, float("-inf"), tl.where(cfg == 1.0, x, u + cfg * (x - u)))
    return x * scale


@triton.jit
def _ordered(x):
    """uint32 numbers that sort like the float32 ones; 0 and −0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _threshold(key, weight, target):
    """Largest t [rows] such that the weights of the keys ≥ t sum to ``target`` or more. It is exact
    for the rounded sums too: added in a fixed order, a larger set never sums to less."""
    t = tl.zeros_like(target).to(tl.uint32)
    bit = t + 0x80000000
    for _ in range(32):
        with_bit = t | bit
        reached = tl.sum(tl.where(key >= with_bit[:, None], weight, 0.0), 1) >= target
        t = tl.where(reached, with_bit, t)
        bit = bit >> 1
    return t


@triton.jit
def _of_row(pointer, row, each, real, other):
    """Each row's number, or with ``each`` = 0 the single one."""
    return tl.load(pointer + row * each, mask=real, other=other)


@triton.jit
def _lowest_kept(
    logits_ptr, share, row, real, columns, stride, apart, top_k, cfg, scale,
    MIXED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Key [rows] of the least likely code that top-k, then top-p keep."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = real & (column < columns)
    x = _scores(logits_ptr, row, column, columns, inside, stride, apart, cfg, scale, MIXED)
    key, most = _ordered(x), tl.max(x, 1)
    lowest = tl.zeros_like(most).to(tl.uint32)
    if TOP_K:
        # Padding is counted, but as the smallest: the k-th of more than k codes lies above it.
        lowest = _threshold(key, 1.0, tl.zeros_like(most) + top_k)
    if TOP_P:
        most = tl.where(most == float("-inf"), 0.0, most)
        p = tl.where(key >= lowest[:, None], tl.exp(x - most[:, None]), 0.0)
        lowest = tl.maximum(lowest, _threshold(key, p, tl.maximum(share, SMALLEST) * tl.sum(p, 1)))
    return lowest


@triton.jit(
    do_not_specialize=[
        "rows",
        "top_k",
        "apart",
        "seed_each",
        "cfg_each",
        "temperature_each",
        "top_p_each",
    ]
)
def _cfg_sample_kernel(
    logits_ptr, seed_ptr, draw_ptr, position_ptr, table_ptr, cfg_ptr, temperature_ptr, top_p_ptr,
    token_ptr, logprob_ptr, embed_ptr, rows, columns, width, stride, apart, top_k,
    seed_each, cfg_each, temperature_each, top_p_each,
    MIXED: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    TABLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    EMBED: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_earlier(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    scale, cfg = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 1.0, tl.float32)
    if MIXED:
        cfg = _of_row(cfg_ptr, row, cfg_each, real, 1.0)
    if not GREEDY:
        temperature = _of_row(temperature_ptr, row, temperature_each, real, 1.0)
        # A maximum would drop NaN.
        scale = 1.0 / tl.where(temperature < COLDEST, COLDEST, temperature)
    if TOP_K or TOP_P:
        share = cfg
        if TOP_P:
            share = _of_row(top_p_ptr, row, top_p_each, real, 1.0)
        lowest = _lowest_kept(
            logits_ptr, share, row[:, None], real[:, None], columns, stride, apart, top_k,
            cfg[:, None], scale[:, None], MIXED, TOP_K, TOP_P, BLOCK,
        )  # fmt: skip
    if not GREEDY:  # after truncation, whose registers they would occupy
        seed = _of_row(seed_ptr, row, seed_each, real, 0)
        draw = tl.load(draw_ptr + row, mask=real, other=0)
        position = tl.load(position_ptr + row, mask=real, other=0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    token, broken = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = real[:, None] & (column < columns)
        x = _scores(
            logits_ptr, row[:, None], column, columns, inside, stride, apart, cfg[:, None],
            scale[:, None], MIXED,
        )  # fmt: skip
        if TOP_K or TOP_P:
            x = tl.where(_ordered(x) >= lowest[:, None], x, float("-inf"))
        noisy = x
        if GREEDY:
            broken += tl.sum((x != x).to(tl.int32), 1)
        else:
            word = tl.full([1, 1], 0, tl.int32)
            # Otherwise sixteen warps spill on sm_80, and take 90 registers on sm_100, not 62.
            tight: tl.constexpr = TOP_K or TOP_P
            noisy = x + gumbel_tile(seed[:, None], draw, position, word, first, COLUMNS, tight)
            now = tl.maximum(top, tl.max(x, 1))
            # A tile of only −inf must not give −inf − −inf.
            safe = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
            top = now
        here, where = tl.max(noisy, 1, return_indices=True)
        token = tl.where(here > best, first + where, token)
        best = tl.maximum(best, here)

    token = tl.minimum(token, columns - 1)  # NaN compares with nothing, so padding may win
    # Greedy: the best code has probability 1, unless there is none.
    sound = (broken == 0) & (best > float("-inf"))
    logprob = tl.where(sound, tl.zeros([ROWS], tl.float32), float("nan"))
    if not GREEDY:
        x = _scores(logits_ptr, row, token, columns, real, stride, apart, cfg, scale, MIXED)
        drawn = total > 0  # otherwise the row holds NaN or only −inf
        x, top = tl.where(drawn, x, 0.0), tl.where(drawn, top, 0.0)
        logprob = tl.where(drawn, x - top - tl.log(tl.where(drawn, total, 1.0)), float("nan"))
    tl.store(token_ptr + row, token.to(tl.int64), mask=real)
    tl.store(logprob_ptr + row, logprob, mask=real)
    if TABLE:
        source, out = token.to(tl.int64)[:, None] * width, row.to(tl.int64)[:, None] * width
        for first in range(0, width, EMBED):
            c = first + tl.arange(0, EMBED)[None, :]
            keep = real[:, None] & (c < width)
            entry = tl.load(table_ptr + source + c, mask=keep, other=0.0)
            tl.store(embed_ptr + out + c, entry, mask=keep)


def _launch(
    logits: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    table: Tensor | None,
    cfg: Tensor | None,
    temperature: Tensor | None,
    top_k: int,
    top_p: Tensor | None,
    guided: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(draw), logits.shape[1]
    width = 0 if table is None else table.shape[1]
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    embed = (logits if table is None else table).new_empty(rows, width)
    truncated = temperature is not None and (top_k > 0 or top_p is not None)
    row = max(4, triton.next_power_of_2(columns))
    tile = chosen(_tile(row, truncated))
    # Not fused: the largest score is rounded, but a fused x/T minus it would not be. If only one
    # code is kept, its log-probability would then differ from 0 by up to half a unit in x/T's last
    # place (0.25 for x = 8 at T = 1e-6).
    launch(
        _cfg_sample_kernel, (triton.cdiv(rows, ROWS),), logits, seed, draw, position, table, cfg,
        temperature, top_p, token, logprob, embed, rows, columns, width,
        2 if guided == "interleaved" else 1, rows if guided == "blocked" else 1, top_k,
        *(int(t is not None and len(t) > 1) for t in (seed, cfg, temperature, top_p)),
        MIXED=cfg is not None, GREEDY=temperature is None, TOP_K=truncated and top_k > 0,
        TOP_P=truncated and top_p is not None, TABLE=width > 0, ROWS=ROWS,
        COLUMNS=min(row, tile.columns), BLOCK=row if truncated else 0, EMBED=EMBED,
        num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return token, logprob, embed


@operator("cfg_sample", _launch)
def _cfg_sample(
    logits: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    table: Tensor | None,
    cfg: Tensor | None,
    temperature: Tensor | None,
    top_k: int,
    top_p: Tensor | None,
    guided: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.cfg_sample(
        logits, seed, draw, position, table, cfg, temperature, top_k, top_p, guided
    )


@_cfg_sample.register_fake
def _fake(
    logits: Tensor, seed: Tensor, draw: Tensor, position: Tensor, table: Tensor | None,
    cfg: Tensor | None, temperature: Tensor | None, top_k: int, top_p: Tensor | None, guided: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = len(draw)
    embed = logits.new_empty(rows, 0) if table is None else table.new_empty(rows, table.shape[1])
    return torch.empty_like(draw), draw.new_empty(rows, dtype=torch.float32), embed


class CfgSample(NamedTuple):
    """What `cfg_sample` returns.

    Attributes:
        token: int64 [N], the codes drawn.
        logprob: float32 [N], natural logarithm of their probability under the guided, tempered and
            truncated distribution.
        embed: [N, D], their rows of the table, in its type; [N, 0] without one.
    """

    token: Tensor
    logprob: Tensor
    embed: Tensor


def _number(
    name: str, value: float | Tensor, off: float, low: float, words: str, device: torch.device,
    rows: int,
) -> Tensor | None:  # fmt: skip
    """Return the value as a device tensor, [1] or one for each of ``rows``; None for the number
    ``off``, at which the kernel skips the step."""
    if isinstance(value, Tensor):
        return checks.device_scalar(name, value, device, 0, rows)
    high = 1.0 if name == "top_p" else float(np.finfo(np.float32).max)
    if not low <= value <= high:
        raise ValueError(f"{name} = {value}; it must be {words}")
    return None if value == off else checks.device_scalar(name, value, device, -1)


def cfg_sample(
    logits: Tensor,
    seed: int | Tensor,
    draw: Tensor,
    position: Tensor,
    cfg: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float | Tensor = 1.0,
    guided: Guided = "none",
    table: Tensor | None = None,
) -> CfgSample:
    """Draw one code per sample from guided, tempered, truncated logits.

    ``x = u + s·(c − u)`` (classifier-free guidance, Ho & Salimans 2022) in float32, and exactly c
    where s is 1; a code at −inf in either branch has probability 0. x/T is cut to the ``top_k``
    largest, then to the smallest set of most likely codes whose probability, renormalised after
    top-k, reaches ``top_p`` (Holtzman et al. 2020); codes that tie with the last one kept are kept
    too. The token is ``argmax(x/T + g)`` over the codes that are left, with g from
    `echogen.kernels.philox`. A row's result depends only on its logits, its key and its numbers,
    not on its place in the batch. Not differentiable.

    Temperature 0 takes the most likely code (the first if several tie), with log-probability 0. A
    row of only −inf, or with a NaN, gives an arbitrary code in range and log-probability NaN.

    Args:
        logits: [N, V] where ``guided`` is "none", else [2N, V]; any float type.
        seed: 64-bit noise key, or an int64 tensor of one key, or of one per sample.
        draw: int64 [N], a number unique to each sample over the whole run.
        position: int64 [N], the token's index in its sample.
        cfg: guidance scale s, 0 or more. At the number 1 no unconditional row is read.
        temperature: T, 0 or more; a number between 0 and 1e-6, or a tensor's value below 1e-6,
            counts as 1e-6.
        top_k: how many codes to keep; 0, or V or more, keeps all.
        top_p: in (0, 1]; 1 keeps all (a tensor of 1 keeps all that contribute to a float32 sum).
        guided: where the unconditional rows are: "none"; "blocked", after all the conditional ones
            (transformers); "interleaved", each after its conditional one (Janus).
        table: [V, D], the codes' next input embeddings; None for none.

    ``seed``, ``cfg``, ``temperature`` and ``top_p`` may be tensors, of one element or of N, one per
    sample. They are then read on the device, anew at every replay of a CUDA graph, and their values
    are not checked.

    Raises:
        ValueError: shapes, strides or devices that do not fit, an odd number of rows with
            guidance, a number out of its range, a scale other than 1 without guidance, V above
            65536 with truncation.
        TypeError: logits or a table that are not floats, draw or position that are not integers.
    """
    checks.check_floats(logits=logits, table=table)
    checks.check_integers(draw=draw, position=position)
    checks.check_choice("guided", guided, ("none", "blocked", "interleaved"))
    checks.check_shape("logits", logits, (None, None))
    checks.check_not_empty(logits=logits)
    rows, columns = logits.shape
    if guided != "none":
        if rows % 2:
            raise ValueError(f"logits has {rows} rows; guided = {guided!r} needs two a sample")
        rows //= 2
    elif isinstance(cfg, Tensor) or cfg != 1:
        raise ValueError(f"cfg = {cfg}; without unconditional rows (guided = 'none') it must be 1")
    checks.check_shape("draw", draw, (rows,))
    checks.check_shape("position", position, (rows,))
    if table is not None:
        checks.check_shape("table", table, (columns, None))
        table = table.detach()
    checks.check_contiguous(logits=logits, draw=draw, position=position, table=table)
    checks.check_same_device(logits=logits, draw=draw, position=position, table=table)
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}; it must be 0 (all) or more")
    top_k = top_k if top_k < columns else 0
    on = logits.device
    scale = _number("cfg", cfg, 1, 0, "finite and 0 or more", on, rows)
    tempered = _number("temperature", temperature, 0, 0, "finite and 0 or more", on, rows)
    share = _number("top_p", top_p, 1, math.ulp(0.0), "above 0 and at most 1", on, rows)
    if columns > LONGEST and tempered is not None and (top_k > 0 or share is not None):
        raise ValueError(f"logits has {columns} columns; top_k and top_p take up to {LONGEST}")
    found = _cfg_sample(
        logits.detach(),
        checks.device_seed(seed, on, rows),
        draw.long(),
        position.long(),
        table,
        scale,
        tempered,
        top_k,
        share,
        guided,
    )
    return CfgSample(*found)
