"""Plain-torch decode attention: the oracle of every test and the CPU path. Sequences are taken in
chunks that share a prefix, so that a prefix is read once per chunk and memory is bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference.precision import widen

CHUNK = 16


def _scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """Heads [..., K] in at least float32, times their scales [...]."""
    return widen(x) if scales is None else widen(x) * scales[..., None]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    prefix_lengths: Tensor | None,
    groups: Tensor | None,
    scales: Tensor | None = None,
    prefix_scales: Tensor | None = None,
) -> Tensor:
    """[B·W, H, K]; see `echogen.kernels.decode_attention`."""
    out, window = torch.empty_like(query), len(query) // len(keys)
    prefixes = 0 if prefix_keys is None else len(prefix_keys)
    if groups is None:
        groups = torch.full_like(lengths, -1)
    groups = torch.where(groups < prefixes, groups, -1)
    for prefix in range(-1, prefixes):
        shared = None
        if prefix_keys is not None and prefix_values is not None and prefix >= 0:
            end = prefix_keys.shape[2] if prefix_lengths is None else int(prefix_lengths[prefix])
            end = max(end, 0)
            by = (None, None) if prefix_scales is None else prefix_scales[:, prefix, :, :end]
            shared = (
                _scaled(prefix_keys[prefix, :, :end], by[0]),
                _scaled(prefix_values[prefix, :, :end], by[1]),
            )
        members = (groups.clamp(min=-1) == prefix).nonzero()[:, 0]
        for rows in members.split(CHUNK) if len(members) else ():
            own = rows // window
            out[rows] = _attend(
                widen(query[rows]), keys, values, own, lengths[rows], scale, shared, scales
            ).to(out.dtype)
    return out


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    scale: float,
    shared: tuple[Tensor, Tensor] | None,
    scales: Tensor | None,
) -> Tensor:
    """Attention of the queries of ``sequences``, which share one prefix; heads are [kv heads, heads
    of a group]."""
    count, heads, width = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(count, kv_heads, heads // kv_heads, width)
    longest = min(max(int(lengths.max()), 0), keys.shape[2])
    keep = torch.arange(longest, device=query.device) < lengths[:, None]
    by = (None, None) if scales is None else scales[:, sequences, :, :longest]
    own_keys = _scaled(keys[sequences, :, :longest], by[0])
    # Values beyond a sequence's length were never written: NaN there must not reach the sum.
    own_values = _scaled(values[sequences, :, :longest], by[1])
    own_values = own_values.masked_fill_(~keep[:, None, :, None], 0)
    scores = (grouped @ own_keys.mT).masked_fill(~keep[:, None, None], float("-inf"))
    if shared is not None:
        by_head = grouped.transpose(0, 1).reshape(kv_heads, -1, width)
        before = (by_head @ shared[0].mT).unflatten(1, (count, -1)).transpose(0, 1)
        scores = torch.cat([before, scores], -1)
    if scores.shape[-1] == 0:
        return torch.zeros_like(query)
    weights = (scores * scale).softmax(-1)
    seen = keep.any(-1) if shared is None or shared[0].shape[1] == 0 else keep.new_ones(count)
    weights = torch.where(seen[:, None, None, None], weights, 0)
    first = scores.shape[-1] - longest
    out = weights[..., first:] @ own_values
    if shared is not None:
        by_head = weights[..., :first].transpose(0, 1).reshape(kv_heads, -1, first)
        out += (by_head @ shared[1]).unflatten(1, (count, -1)).transpose(0, 1)
    return out.reshape(count, heads, width)
