"""Which sequences continue which prefix, in the form that `decode_attention` takes: their order by
prefix, and the tiles of that order that attend together. One launch finds it for many calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import decode_members as reference

# Query rows per tile, from one sequence or from several that share a prefix: the fewest that tl.dot
# takes. With 32 for prefixes, two programs fit a multiprocessor instead of three (78 KB of shared
# memory instead of 72, 128 wide). Larger groups read their prefix again, from the L2 cache.
ROWS = 16
MOST_SHARED = ROWS
SCANNED = 1024  # sequences scanned at a time when members are gathered


@triton.jit(do_not_specialize=["sequences", "prefixes", "slots"])
def _decode_members_kernel(
    groups_ptr, order_ptr, sequences, prefixes, slots,
    MEMBERS: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """One prefix: its sequences in their order, and its tiles (prefix, first, end in the order),
    which follow the order.

    Prefix p with ``start`` sequences before it has slots from ``start // MEMBERS + p`` on: never
    fewer than its tiles, known without the other prefixes, and B // MEMBERS + P in all.
    """
    prefix, i, tiles_ptr = tl.program_id(0), tl.arange(0, SCANNED), order_ptr + sequences
    start, end = 0, 0
    for first in range(0, sequences, SCANNED):
        group = tl.load(groups_ptr + first + i, mask=first + i < sequences, other=-1)
        start += tl.sum(((group >= 0) & (group < prefix)).to(tl.int32), 0)
        end += tl.sum(((group >= 0) & (group <= prefix)).to(tl.int32), 0)
    seen = start
    for first in range(0, sequences, SCANNED):
        group = tl.load(groups_ptr + first + i, mask=first + i < sequences, other=-1)
        mine = (group == prefix).to(tl.int32)
        tl.store(order_ptr + seen + tl.cumsum(mine, 0) - 1, first + i, mask=mine > 0)
        seen += tl.sum(mine, 0)
    slot = start // MEMBERS + prefix
    stop = tl.where(prefix == prefixes - 1, slots, end // MEMBERS + prefix + 1)
    for first in range(slot, stop, SCANNED):
        at = start + (first - slot + i) * MEMBERS
        place, keep = tiles_ptr + 3 * (first + i), first + i < stop
        tl.store(place, tl.zeros_like(i) + prefix, mask=keep)
        tl.store(place + 1, tl.minimum(at, end), mask=keep)
        tl.store(place + 2, tl.minimum(at + MEMBERS, end), mask=keep)


def members_of(query: Tensor, kv_heads: int) -> int:
    """Number of sequences whose queries fill a prefix's tile."""
    return ROWS // (query.shape[1] // kv_heads)


def _order_size(sequences: int, prefixes: int, members: int) -> int:
    """Length of an order: one number per sequence, and three per slot for a tile."""
    return sequences + 3 * (sequences // members + prefixes)


def launch_members(groups: Tensor, prefixes: int, members: int) -> Tensor:
    """Compute the order of these groups, for prefixes whose tiles hold ``members`` sequences."""
    sequences = len(groups)
    size = _order_size(sequences, prefixes, members)
    order = torch.empty(size, dtype=torch.int32, device=groups.device)
    launch(
        _decode_members_kernel, (prefixes,), groups, order, sequences, prefixes,
        sequences // members + prefixes, MEMBERS=members,
        SCANNED=min(SCANNED, triton.next_power_of_2(sequences)), num_warps=4,
    )  # fmt: skip
    return order


@operator("decode_members", launch_members)
def _decode_members(groups: Tensor, prefixes: int, members: int) -> Tensor:
    return reference.decode_members(groups, prefixes, members)


@_decode_members.register_fake
def _fake(groups: Tensor, prefixes: int, members: int) -> Tensor:
    size = _order_size(len(groups), prefixes, members)
    return groups.new_empty(size, dtype=torch.int32)


def decode_members(groups: Tensor, query: Tensor, prefix_keys: Tensor) -> Tensor:
    """Compute the ``order`` of a `decode_attention` call, once for all layers and steps that have
    the same groups; each of them then saves a launch.

    Args:
        groups: int64 or int32 [B], contiguous, as in `decode_attention`.
        query, prefix_keys: [B, H, K] and [P, Hk, Sp, K]; only their shapes and devices are used.

    Returns:
        int32 [B + 3·n]: the sequences by prefix, in their order, and n tiles of them, each a prefix
        with the place of its first sequence and the place after its last.

    Raises:
        ValueError: shapes, devices or strides that do not fit.
        TypeError: groups that are not integers.
    """
    checks.check_integers(groups=groups)
    checks.check_shape("query", query, (None, None, None))
    checks.check_shape("prefix_keys", prefix_keys, (None, None, None, query.shape[2]))
    checks.check_not_empty(query=query, prefix_keys=prefix_keys)
    checks.check_shape("groups", groups, (len(query),))
    checks.check_contiguous(groups=groups)
    checks.check_same_device(groups=groups, query=query, prefix_keys=prefix_keys)
    prefixes, kv_heads, *_ = prefix_keys.shape
    check_heads(query.shape[1], kv_heads)
    made: Tensor = _decode_members(groups, prefixes, members_of(query, kv_heads))
    return made


def check_heads(heads: int, kv_heads: int) -> None:
    """Raises ValueError for numbers of query and key heads that a tile cannot hold together."""
    if heads % kv_heads or heads // kv_heads > MOST_SHARED:
        raise ValueError(
            f"query has {heads} heads and keys {kv_heads}; the query's must be the keys' times "
            f"1 … {MOST_SHARED}"
        )


def check_order(order: Tensor | None, query: Tensor, prefix_keys: Tensor | None) -> None:
    """Check the order that `decode_attention` is given. Raises as it does."""
    if order is None:
        return
    if prefix_keys is None:
        raise ValueError("order is given without a prefix, which it is about")
    prefixes, kv_heads, *_ = prefix_keys.shape
    size = _order_size(len(query), prefixes, members_of(query, kv_heads))
    checks.check_shape("order", order, (size,))
    if order.dtype != torch.int32:
        raise TypeError(f"order is {order.dtype}; it must be int32, as decode_members makes it")
