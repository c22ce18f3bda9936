"""Attention of a sequence's newest query, or its newest few, over its cache. In decoding, reading
keys and values is the whole cost.

Two measures reduce that cost. The keys of a sequence are split among several programs, so that a
small batch still fills the device, and their partial softmaxes are merged (flash-decoding, Dao et
al. 2023). A prefix that several sequences share is stored once and read once for all of them, with
their queries stacked into one tile (cascade inference, Ye et al. 2024; Hydragen, Juravsky et al.
2024); it adds its own partial softmaxes to each of its sequences. One launch reads prefixes and the
sequences' own caches side by side; another finds which sequence continues which prefix, and many
calls can share its result (`decode_members`).

A partial is the maximum m of the scores (base 2), the sum l of 2^(s − m), and the sum a of
2^(s − m)·v, in float32. Partials merge as ``Σ 2^(mᵢ − m)·aᵢ / Σ 2^(mᵢ − m)·lᵢ`` with m = max mᵢ.

Several queries of one sequence (a window of codes that run together) also share a tile, each with
its own end, so that the keys they see are read once for all of them.

Caches may hold 8-bit numbers, with a scale for every token and head (`rope.rope_cache` writes
them). A key's scale multiplies its scores and a value's scale its weights, so that nothing wider is
ever stored.

Kernels see a flat list of query rows (sequence · H + head), and read a cache in one place
(`_attend`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.constants import chosen
from echogen.kernels.decode_members import (
    ROWS,
    check_heads,
    check_order,
    launch_members,
    members_of,
)
from echogen.kernels.dispatch import INTERPRETED, launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.reference import decode_attention as reference


@dataclass(frozen=True)
class Splits:
    """How finely keys are split.

    Attributes:
        programs: the fewest programs to aim for. Three for each of an H200's 132 multiprocessors,
            as many as fit on one, given the registers and shared memory of bfloat16 tiles 128 wide.
        least: the fewest keys of a program, one bfloat16 tile. With fewer, starting the program and
            writing its partial cost more than the reads.
    """

    programs: int = 396
    least: int = 64

    def of(self, programs: int, keys: int) -> int:
        """Splits to make of up to ``keys`` keys, given ``programs`` without splitting."""
        return max(1, min(triton.cdiv(self.programs, programs), triton.cdiv(keys, self.least)))

    def candidates(self) -> list[Splits]:
        """One to six programs per multiprocessor of an H200, each of at least one to four tiles."""
        return [Splits(132 * n, least) for n in (1, 2, 3, 4, 6) for least in (64, 128, 256)]


@dataclass(frozen=True)
class Tiles:
    """Launch constants of one type of cache.

    Attributes:
        keys: keys of a tile.
        warps, stages: per program; loads run ``stages − 1`` tiles ahead.
    """

    keys: int
    warps: int
    stages: int

    def candidates(self) -> list[Tiles]:
        """Tiles of half, the same and twice the keys, but at least the 16 that `tl.dot` needs."""
        sizes = [keys for keys in (self.keys // 2, self.keys, 2 * self.keys) if keys >= 16]
        return [Tiles(k, warps, stages) for k in sizes for warps in (4, 8) for stages in (2, 3, 4)]


SPLITS = Splits()
HALF = Tiles(keys=64, warps=4, stages=3)
# 8-bit caches are bound by instructions, of which a larger tile needs fewer per key: on sm_90 8.3
# with 182 registers, against 10.6 with 156 for 32 keys and 4 stages.
EIGHT = Tiles(keys=64, warps=4, stages=3)
# float32 has no tensor cores: larger tiles than these spill registers.
SINGLE, SINGLE_NARROW = Tiles(16, 4, 3), Tiles(32, 4, 3)
# Multiplies the product of a value's weight and scale. Scales are a 448th of numbers of about 1,
# and products that are small beside that should not vanish in float16.
WEIGHED = tl.constexpr(64.0)
MERGED = 8  # partials in flight per row while merging
MOST_WIDE = 128


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:  # the interpreter holds bfloat16 as integers and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _fold(
    query, scale, keys_ptr, values_ptr, scales_ptr, apart, first, end, ends, top, total, sums,
    WHOLE: tl.constexpr, RAGGED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Extend a partial softmax by one tile of keys. At least one key lies before the end, so the
    maximum is a number. In a WHOLE tile all keys do, so no masks are needed. If RAGGED, rows have
    their own ends, the last of which is the end, and a row may see nothing of a tile."""
    c, j = tl.arange(0, PADDED), tl.arange(0, KEYS)
    there = (j < KEYS) if WHOLE else (first + j < end)
    keep = there[:, None] & (c < WIDTH)[None, :]
    token = tl.cast(first, tl.int64)  # a plain int in the interpreter
    tile = token * WIDTH + j[:, None] * WIDTH + c[None, :]
    keys = tl.load(keys_ptr + tile, mask=keep, other=0.0)
    scores = _dot(query, tl.trans(keys.to(query.dtype)), WIDE) * scale
    if scales_ptr is not None:
        scores *= tl.load(scales_ptr + token + j, mask=there, other=0.0)[None, :]
    if not WHOLE:
        seen = (first + j[None, :] < ends[:, None]) if RAGGED else there[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, 1))
    base = now
    if RAGGED:
        base = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen nothing yet
    p, shrink = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    values = tl.load(values_ptr + tile, mask=keep, other=0.0)
    if scales_ptr is not None:
        by = tl.load(scales_ptr + apart + token + j, mask=there, other=0.0)
        p *= (by * WEIGHED)[None, :]
    sums = sums * shrink[:, None] + _dot(p.to(query.dtype), values.to(query.dtype), WIDE)
    return now, total, sums


@triton.jit
def _attend(
    query_ptr, keys_ptr, values_ptr, scales_ptr, apart, token, row, inside, start, end, ends, scale,
    RAGGED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial softmax of query rows over keys start … end of the cache whose first token is
    ``token`` among all, or, if RAGGED, up to their own ``ends``. A value's scale is ``apart`` after
    its key's."""
    c = tl.arange(0, PADDED)
    place = row.to(tl.int64)[:, None] * WIDTH + c[None, :]
    within = (c < WIDTH)[None, :]
    query = tl.load(query_ptr + place, mask=inside[:, None] & within, other=0.0)
    keys_ptr, values_ptr = keys_ptr + token * WIDTH, values_ptr + token * WIDTH
    if scales_ptr is not None:
        scales_ptr += token
        # One instruction converts two 8-bit numbers to float16, two more each to bfloat16 (sm_90).
        # float16's range is enough for a query divided by its largest number.
        most = tl.max(tl.abs(query.to(tl.float32)), 1)
        most = tl.where(most == 0, 1.0, most)[:, None]
        query, scale = (query / most).to(tl.float16), scale * most
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    # Whole tiles of float32 take 255 registers and spill; with masks they take 66 (sm_90).
    if (query.dtype == tl.float32 and not WIDE) or RAGGED:
        for first in range(start, end, KEYS):
            top, total, sums = _fold(
                query, scale, keys_ptr, values_ptr, scales_ptr, apart, first, end, ends, top, total,
                sums, False, RAGGED, WIDTH, PADDED, KEYS, WIDE,
            )  # fmt: skip
    else:
        rest = end - (end - start) % KEYS
        for first in range(start, rest, KEYS):
            top, total, sums = _fold(
                query, scale, keys_ptr, values_ptr, scales_ptr, apart, first, end, ends, top, total,
                sums, True, RAGGED, WIDTH, PADDED, KEYS, WIDE,
            )  # fmt: skip
        if rest < end:
            top, total, sums = _fold(
                query, scale, keys_ptr, values_ptr, scales_ptr, apart, rest, end, ends, top, total,
                sums, False, RAGGED, WIDTH, PADDED, KEYS, WIDE,
            )  # fmt: skip
    if scales_ptr is not None:
        sums /= WEIGHED
    return top, total, sums


@triton.jit
def _held(length_ptr, capacity):
    return tl.minimum(tl.maximum(tl.load(length_ptr), 0), capacity).to(tl.int32)


@triton.jit
def _part_of(length, split, splits, KEYS: tl.constexpr):
    """Keys of one split: whole tiles, the same number for each. 32 bits suffice within a sequence;
    places in the whole cache take 64."""
    share = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
    start = tl.minimum(split.to(tl.int64) * share, length).to(tl.int32)
    return start, start + tl.minimum(share, length - start)


@triton.jit
def _keep_partial(
    sums_ptr, tops_ptr, totals_ptr, row, inside, part, parts, top, total, sums,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Store a partial. An empty part leaves its sums unwritten, which a maximum of −inf marks.
    Maxima drop NaN, so a part of only NaN could pass for empty; its total does not."""
    c, place = tl.arange(0, PADDED), row.to(tl.int64) * parts + part
    tl.store(tops_ptr + place, tl.where(total == total, top, 0.0), mask=inside)
    tl.store(totals_ptr + place, total, mask=inside)
    keep = (inside & (total != 0))[:, None] & (c < WIDTH)[None, :]
    tl.store(sums_ptr + place[:, None] * WIDTH + c[None, :], sums, mask=keep)


@triton.jit
def _own(
    lengths_ptr, place, split, splits, capacity,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr, MEMBERS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """For one sequence, key head and tile of the window: the query rows, one split of the
    sequence's own cache, its end for each row, and the cache's first token among all."""
    TILES: tl.constexpr = (WINDOW + MEMBERS - 1) // MEMBERS
    r, sequence, head = tl.arange(0, ROWS), place // (KV_HEADS * TILES), place // TILES % KV_HEADS
    member = r // SHARED + place % TILES * MEMBERS
    query, inside = sequence * WINDOW + member, (r < MEMBERS * SHARED) & (member < WINDOW)
    if WINDOW == 1:
        length = _held(lengths_ptr + sequence, capacity)
        ends = tl.zeros_like(r) + length
    else:
        held = tl.load(lengths_ptr + query, mask=inside, other=0)
        ends = tl.minimum(tl.maximum(held, 0), capacity).to(tl.int32)
        length = tl.max(ends, 0)
    start, end = _part_of(length, split, splits, KEYS)
    row = (query * KV_HEADS + head) * SHARED + r % SHARED
    token = (sequence * KV_HEADS + head).to(tl.int64) * capacity
    return row, inside, start, end, tl.minimum(ends, end), token


# These numbers change with the batch. Triton would recompile the kernel whenever one is 1 or
# divisible by 16, while a request waits for its image.
@triton.jit(do_not_specialize=["apart", "parts"])
def _decode_own_kernel(
    query_ptr, keys_ptr, values_ptr, scales_ptr, apart, lengths_ptr, out_ptr,
    sums_ptr, tops_ptr, totals_ptr, capacity, parts, scale,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr, MEMBERS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """Sequences without prefixes; writes the result if one split is the whole, else a partial."""
    wait_for_earlier(DEPENDENT)
    split = tl.program_id(1)
    row, inside, start, end, ends, token = _own(
        lengths_ptr, tl.program_id(0), split, tl.num_programs(1), capacity,
        KV_HEADS, SHARED, WINDOW, MEMBERS, ROWS, KEYS,
    )  # fmt: skip
    top, total, sums = _attend(
        query_ptr, keys_ptr, values_ptr, scales_ptr, apart, token, row, inside, start, end, ends,
        scale, WINDOW > 1, WIDTH, PADDED, ROWS, KEYS, WIDE,
    )  # fmt: skip
    if WHOLE:
        c = tl.arange(0, PADDED)
        out = sums / tl.where(total == 0, 1.0, total)[:, None]
        keep = inside[:, None] & (c < WIDTH)[None, :]
        tl.store(out_ptr + row.to(tl.int64)[:, None] * WIDTH + c[None, :], out, mask=keep)
    else:
        _keep_partial(
            sums_ptr, tops_ptr, totals_ptr, row, inside, split, parts, top, total, sums,
            WIDTH, PADDED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["apart", "prefix_apart", "queries", "slots", "before", "parts"])
def _decode_shared_kernel(
    query_ptr, keys_ptr, values_ptr, scales_ptr, apart, lengths_ptr, prefix_keys_ptr,
    prefix_values_ptr, prefix_scales_ptr, prefix_apart, prefix_lengths_ptr, order_ptr, sums_ptr,
    tops_ptr, totals_ptr, capacity, prefix_capacity, queries, slots, before, parts, scale,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr, MEMBERS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """Either one tile of a prefix's sequences with one key head and one split of its keys, or the
    same for a sequence's own cache."""
    wait_for_earlier(DEPENDENT)
    apart, prefix_apart = apart.to(tl.int64), prefix_apart.to(tl.int64)  # one type for both
    program, of_prefixes = tl.program_id(0), slots * KV_HEADS * before
    if program < of_prefixes:
        head, part = program // slots % KV_HEADS, program // (slots * KV_HEADS)
        entry, r = order_ptr + queries + 3 * (program % slots), tl.arange(0, ROWS)
        prefix = tl.load(entry).to(tl.int64)
        first, last = tl.load(entry + 1), tl.load(entry + 2)
        member = first + r // SHARED
        inside = (r < MEMBERS * SHARED) & (member < last)
        query = tl.load(order_ptr + member, mask=inside, other=0)
        row = (query * KV_HEADS + head) * SHARED + r % SHARED
        length = prefix_capacity
        if prefix_lengths_ptr is not None:
            length = _held(prefix_lengths_ptr + prefix, prefix_capacity)
        length = tl.where(first < last, length, 0)
        start, end = _part_of(length, part, before, KEYS)
        ends, token = tl.zeros_like(r) + end, (prefix * KV_HEADS + head) * prefix_capacity
        keys_ptr, values_ptr = prefix_keys_ptr, prefix_values_ptr
        if scales_ptr is not None:
            scales_ptr, apart = prefix_scales_ptr, prefix_apart
    else:
        own = program - of_prefixes
        places = queries // WINDOW * KV_HEADS * ((WINDOW + MEMBERS - 1) // MEMBERS)
        part = before + own // places
        row, inside, start, end, ends, token = _own(
            lengths_ptr, own % places, own // places, parts - before, capacity,
            KV_HEADS, SHARED, WINDOW, MEMBERS, ROWS, KEYS,
        )  # fmt: skip
    top, total, sums = _attend(
        query_ptr, keys_ptr, values_ptr, scales_ptr, apart, token, row, inside, start, end, ends,
        scale, WINDOW > 1, WIDTH, PADDED, ROWS, KEYS, WIDE,
    )  # fmt: skip
    _keep_partial(
        sums_ptr, tops_ptr, totals_ptr, row, inside, part, parts, top, total, sums, WIDTH, PADDED
    )


@triton.jit(do_not_specialize=["prefixes", "before", "parts"])
def _decode_merge_kernel(
    sums_ptr, tops_ptr, totals_ptr, groups_ptr, out_ptr, prefixes, before, parts,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, MERGED: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """One query row: its partials in their order, those of the prefix first."""
    wait_for_earlier(DEPENDENT)
    row, i, c = tl.program_id(0).to(tl.int64), tl.arange(0, MERGED), tl.arange(0, PADDED)
    begin = 0
    if groups_ptr is not None:  # a sequence without a prefix has nothing written there
        group = tl.load(groups_ptr + row // HEADS)
        begin = tl.where((group >= 0) & (group < prefixes), 0, before)
    tops, totals = tops_ptr + row * parts, totals_ptr + row * parts
    top = tl.full([MERGED], float("-inf"), tl.float32)
    for first in range(begin, parts, MERGED):
        here = tl.load(tops + first + i, mask=first + i < parts, other=float("-inf"))
        top = tl.maximum(top, here)
    best = tl.max(top, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    total, out = tl.zeros([MERGED], tl.float32), tl.zeros([PADDED], tl.float32)
    for first in range(begin, parts, MERGED):
        there = first + i < parts
        here = tl.load(tops + first + i, mask=there, other=float("-inf"))
        weight = tl.exp2(here - best)
        total += weight * tl.load(totals + first + i, mask=there, other=0.0)
        keep = (here > float("-inf"))[:, None] & (c < WIDTH)[None, :]
        place = (row * parts + first + i)[:, None] * WIDTH + c[None, :]
        out += tl.sum(weight[:, None] * tl.load(sums_ptr + place, mask=keep, other=0.0), 0)
    whole = tl.sum(total, 0)
    out = out / tl.where(whole == 0, 1.0, whole)
    tl.store(out_ptr + row * WIDTH + c, out, mask=c < WIDTH)


def _tiles(query: Tensor, keys: Tensor) -> Tiles:
    if keys.dtype == checks.FP8:
        return EIGHT
    if query.element_size() == 2:
        return HALF
    return SINGLE_NARROW if query.shape[-1] <= 64 else SINGLE


def _apart(scales: Tensor | None) -> int:
    """Offset from a key's scale to its value's."""
    return 0 if scales is None else scales.stride(0)


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    prefix_lengths: Tensor | None,
    groups: Tensor | None,
    order: Tensor | None = None,
    scales: Tensor | None = None,
    prefix_scales: Tensor | None = None,
) -> Tensor:
    if query.dtype == torch.float64:  # not a type to decode in: kernels calculate in float32
        return reference.decode_attention(
            query, keys, values, lengths, scale, prefix_keys, prefix_values, prefix_lengths, groups,
            scales, prefix_scales,
        )  # fmt: skip
    queries, heads, width = query.shape
    sequences, kv_heads, capacity, _ = keys.shape
    tiles, cut = chosen(_tiles(query, keys)), chosen(SPLITS)
    window, members = queries // sequences, members_of(query, kv_heads)
    places = sequences * kv_heads * triton.cdiv(window, members)
    constants = {
        "KV_HEADS": kv_heads, "SHARED": heads // kv_heads, "WINDOW": window,
        "MEMBERS": members, "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)), "ROWS": ROWS, "KEYS": tiles.keys,
        "WIDE": INTERPRETED, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    # The softmax takes powers of two: one multiplication fewer per score than e^x.
    scale = scale / math.log(2)
    out = torch.empty_like(query)
    prefixes, splits, before = 0, cut.of(places, capacity), 0
    if prefix_keys is not None:
        prefixes, _, length, _ = prefix_keys.shape
        used = max(prefixes, triton.cdiv(queries, members))
        before = cut.of(used * kv_heads, length)
    parts = before + splits
    sums = tops = totals = None
    if parts > 1:
        sums = torch.empty(queries * heads, parts, width, dtype=torch.float32, device=out.device)
        tops, totals = sums.new_empty(2, queries * heads, parts)
    if prefix_keys is None:
        launch(
            _decode_own_kernel, (places, splits), query, keys, values, scales, _apart(scales),
            lengths, out, sums, tops, totals, capacity, parts, scale, WHOLE=parts == 1, **constants,
        )  # fmt: skip
    else:
        if order is None:
            assert groups is not None, "the public function sees to it"
            order = launch_members(groups, prefixes, members)
        slots = queries // members + prefixes
        launch(
            _decode_shared_kernel, (slots * kv_heads * before + places * splits,), query, keys,
            values, scales, _apart(scales), lengths, prefix_keys, prefix_values, prefix_scales,
            _apart(prefix_scales), prefix_lengths, order, sums, tops, totals, capacity, length,
            queries, slots, before, parts, scale, **constants,
        )  # fmt: skip
    if parts > 1:
        launch(
            _decode_merge_kernel, (queries * heads,), sums, tops, totals, groups, out, prefixes,
            before, parts, HEADS=heads, WIDTH=width, PADDED=constants["PADDED"], MERGED=MERGED,
            num_warps=1,
        )  # fmt: skip
    return out


@operator("decode_attention", _launch)
def _decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    prefix_lengths: Tensor | None,
    groups: Tensor | None,
    order: Tensor | None = None,
    scales: Tensor | None = None,
    prefix_scales: Tensor | None = None,
) -> Tensor:
    return reference.decode_attention(
        query, keys, values, lengths, scale, prefix_keys, prefix_values, prefix_lengths, groups,
        scales, prefix_scales,
    )  # fmt: skip


@_decode_attention.register_fake
def _fake(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float,
    prefix_keys: Tensor | None, prefix_values: Tensor | None, prefix_lengths: Tensor | None,
    groups: Tensor | None, order: Tensor | None = None, scales: Tensor | None = None,
    prefix_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(query)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    prefix_keys: Tensor | None = None,
    prefix_values: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    groups: Tensor | None = None,
    order: Tensor | None = None,
    scales: Tensor | None = None,
    prefix_scales: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's query over its group's prefix and then its own cache, or of a
    window of W queries, each up to its own length.

    ``softmax(scale · q·[prefix keys, keys]ᵀ)·[prefix values, values]`` (Vaswani et al. 2017), each
    cache up to its length; nothing beyond it is read. Query head h attends to head
    ``h // (H / Hk)`` of the caches (grouped heads, Ainslie et al. 2023). Lengths and groups are
    read on the device, where their values cannot be checked: lengths are clamped to 0 … the
    capacity, and a sequence without any key gets zeros. Repeated calls are bit-equal, and so is a
    sequence in another batch if it is cut into the same number of splits. The reference computes
    float64, on CUDA too. Not differentiable.

    Args:
        query: float [B·W, H, K], contiguous, like all arguments; K up to 128. The W queries of a
            sequence are adjacent.
        keys, values: [B, Hk, S, K] of the query's type, or float8_e4m3fn with scales; H is 1 … 16
            times Hk.
        lengths: int64 or int32 [B·W], tokens of its sequence's own cache that each query sees, its
            own token included.
        scale: factor of the scores; 1/√K if None.
        prefix_keys, prefix_values: [P, Hk, Sp, K], each stored once for all that share it.
        prefix_lengths: int64 or int32 [P]; Sp each if None.
        groups: int64 or int32 [B·W], in any order: the prefix that each query's sequence continues;
            none if outside 0 … P − 1. Required with prefixes.
        order: the result of `decode_members` for these groups, if several calls share it; None
            computes it here. An order of other groups silently gives wrong results.
        scales, prefix_scales: float32 [2, B, Hk, S] and [2, P, Hk, Sp] of 8-bit caches, for keys
            and for values, each contiguous, as `rope.rope_cache` and `rope.scaled_heads` make them.
            8-bit caches need a GPU of compute capability 8.9 or later. Their products are in
            float16: a value above 458,000 gives infinities or NaN, and heads whose values are all
            below 1e-4 lose digits.

    Returns:
        [B·W, H, K] in the query's type.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit, or only some of a prefix's
            arguments.
        TypeError: types that do not fit.
    """
    floats = {"query": query, "keys": keys, "values": values, "prefix_keys": prefix_keys,
              "prefix_values": prefix_values}  # fmt: skip
    integers = {"lengths": lengths, "prefix_lengths": prefix_lengths, "groups": groups,
                "order": order}  # fmt: skip
    checks.check_floats(query=query)
    checks.check_integers(**integers)
    checks.check_scales("scales", scales, keys=keys, values=values)
    if prefix_keys is not None or prefix_values is not None or prefix_scales is not None:
        before = {"prefix_keys": prefix_keys, "prefix_values": prefix_values}
        checks.check_scales("prefix_scales", prefix_scales, **before)
    for name, tensor in floats.items():
        if tensor is None or name == "query":
            continue
        if scales is None and tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and query {query.dtype}; make them the same")
        if tensor.dtype != keys.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and keys {keys.dtype}; make them the same")
    checks.check_shape("query", query, (None, None, None))
    queries, heads, width = query.shape
    checks.check_shape("keys", keys, (None, None, None, width))
    checks.check_shape("values", values, keys.shape)
    checks.check_shape("lengths", lengths, (queries,))
    checks.check_not_empty(query=query, keys=keys)
    sequences, kv_heads, *_ = keys.shape
    if queries % sequences:
        raise ValueError(
            f"query has {queries} rows for the {sequences} sequences of keys; it needs as many for "
            f"each"
        )
    check_heads(heads, kv_heads)
    if width > MOST_WIDE:
        raise ValueError(f"query is {width} wide; the kernel holds up to {MOST_WIDE}")
    _check_prefix(prefix_keys, prefix_values, prefix_lengths, groups, query, kv_heads)
    check_order(order, query, prefix_keys)
    factors = checks.halves("scales", scales) | checks.halves("prefix_scales", prefix_scales)
    checks.check_contiguous(**floats, **integers, **factors)
    checks.check_same_device(**floats, **integers, **factors)
    scale = 1 / math.sqrt(width) if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale = {scale}; it must be finite")
    return _decode_attention(
        query, keys, values, lengths, scale, prefix_keys, prefix_values, prefix_lengths, groups,
        order, scales, prefix_scales,
    )  # fmt: skip


def _check_prefix(
    keys: Tensor | None, values: Tensor | None, lengths: Tensor | None, groups: Tensor | None,
    query: Tensor, kv_heads: int,
) -> None:  # fmt: skip
    if keys is None or values is None or groups is None:
        parts = {"prefix_keys": keys, "prefix_values": values, "prefix_lengths": lengths,
                 "groups": groups}  # fmt: skip
        given = [name for name, tensor in parts.items() if tensor is not None]
        if given:
            raise ValueError(
                f"only {' and '.join(given)} given; a prefix needs prefix_keys, prefix_values and "
                "groups"
            )
        return
    checks.check_shape("prefix_keys", keys, (None, kv_heads, None, query.shape[2]))
    checks.check_shape("prefix_values", values, keys.shape)
    checks.check_shape("groups", groups, (len(query),))
    if lengths is not None:
        checks.check_shape("prefix_lengths", lengths, (len(keys),))
    checks.check_not_empty(prefix_keys=keys)
