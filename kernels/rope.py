"""Rotary position embedding of queries and keys in one launch; in decoding, with the cache write.

Eager code makes two rotated halves, two products and a sum of each; here every element is read
once and written once, and a decoded token's key and value go straight to their place in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import rope as reference

MOST_ROWS = 65_535  # of the batch, CUDA's limit of a grid's second axis
TILE = 1024  # pairs of elements that a program rotates at once: heads times half a head


@triton.jit
def _table(cos_ptr, sin_ptr, place, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin of one token, first and second half, float32 [1, PAIRS] each."""
    i = tl.arange(0, PAIRS)[None, :]
    c1 = tl.load(cos_ptr + place + i, mask=i < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + place + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + place + i, mask=i < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + place + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    return c1, c2, s1, s2


@triton.jit
def _rotate_heads(
    x_ptr, x_stride, out_ptr, out_stride, heads, c1, c2, s1, s2,
    INVERSE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """All heads of one token, ``…_stride`` elements apart."""
    i = tl.arange(0, PAIRS)[None, :]
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None]
        keep = (head < heads) & (i < HALF)
        x = x_ptr + head.to(tl.int64) * x_stride + i
        x1 = tl.load(x, mask=keep, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF, mask=keep, other=0.0).to(tl.float32)
        if INVERSE:
            y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
        else:
            y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        out = out_ptr + head.to(tl.int64) * out_stride + i
        tl.store(out, y1, mask=keep)
        tl.store(out + HALF, y2, mask=keep)


@triton.jit
def _copy_heads(
    x_ptr, x_stride, out_ptr, out_stride, heads,
    HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """All heads of one token, as they are."""
    i = tl.arange(0, 2 * PAIRS)[None, :]
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None]
        keep = (head < heads) & (i < 2 * HALF)
        x = tl.load(x_ptr + head.to(tl.int64) * x_stride + i, mask=keep, other=0.0)
        tl.store(out_ptr + head.to(tl.int64) * out_stride + i, x, mask=keep)


@triton.jit
def _rope_kernel(
    q_ptr, q_row, q_token, q_head, k_ptr, k_row, k_token, k_head, cos_ptr, sin_ptr, table_row,
    q_out_ptr, k_out_ptr, length, q_heads, k_heads,
    INVERSE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
):  # fmt: skip
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place, width = row * length + token, 2 * HALF
    c1, c2, s1, s2 = _table(cos_ptr, sin_ptr, row * table_row + token * width, HALF, PAIRS)
    _rotate_heads(
        q_ptr + row * q_row + token * q_token, q_head, q_out_ptr + place * q_heads * width, width,
        q_heads, c1, c2, s1, s2, INVERSE, HALF, PAIRS, Q_HEADS,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + row * k_row + token * k_token, k_head, k_out_ptr + place * k_heads * width, width,
        k_heads, c1, c2, s1, s2, INVERSE, HALF, PAIRS, K_HEADS,
    )  # fmt: skip


@triton.jit
def _rope_cache_kernel(
    q_ptr, q_row, q_token, q_head, k_ptr, k_row, k_token, k_head, v_ptr, v_row, v_token, v_head,
    cos_ptr, sin_ptr, table_row, keys_ptr, values_ptr, slots_ptr, q_out_ptr, length, q_heads,
    k_heads, capacity,
    HALF: tl.constexpr, PAIRS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
):  # fmt: skip
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place, width = row * length + token, 2 * HALF
    slot = tl.load(slots_ptr + place)
    c1, c2, s1, s2 = _table(cos_ptr, sin_ptr, row * table_row + token * width, HALF, PAIRS)
    _rotate_heads(
        q_ptr + row * q_row + token * q_token, q_head, q_out_ptr + place * q_heads * width, width,
        q_heads, c1, c2, s1, s2, False, HALF, PAIRS, Q_HEADS,
    )  # fmt: skip
    if (slot >= 0) & (slot < capacity):
        cached, between = (row * k_heads * capacity + slot) * width, capacity * width
        _rotate_heads(
            k_ptr + row * k_row + token * k_token, k_head, keys_ptr + cached, between, k_heads,
            c1, c2, s1, s2, False, HALF, PAIRS, K_HEADS,
        )  # fmt: skip
        _copy_heads(
            v_ptr + row * v_row + token * v_token, v_head, values_ptr + cached, between, k_heads,
            HALF, PAIRS, K_HEADS,
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _tiles(q_heads: int, k_heads: int, width: int) -> dict[str, int]:
    """Launch constants: heads that are rotated at once."""
    pairs = triton.next_power_of_2(width // 2)
    heads = [min(triton.next_power_of_2(h), max(1, TILE // pairs)) for h in (q_heads, k_heads)]
    return {"HALF": width // 2, "PAIRS": pairs, "Q_HEADS": heads[0], "K_HEADS": heads[1],
            "num_warps": 4}  # fmt: skip


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    rows, length, q_heads, width = q.shape
    k_heads = k.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    launch(
        _rope_kernel, (length, rows), q, *_strides(q), k, *_strides(k), cos, sin,
        length * width if len(cos) > 1 else 0, q_out, k_out, length, q_heads, k_heads,
        INVERSE=inverse, **_tiles(q_heads, k_heads, width),
    )  # fmt: skip
    return q_out, k_out


def _launch_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slots: Tensor,
) -> Tensor:  # fmt: skip
    rows, length, q_heads, width = q.shape
    k_heads = k.shape[2]
    q_out = q.new_empty(q.shape)
    launch(
        _rope_cache_kernel, (length, rows), q, *_strides(q), k, *_strides(k), v, *_strides(v),
        cos, sin, length * width if len(cos) > 1 else 0, keys, values, slots, q_out, length,
        q_heads, k_heads, keys.shape[2], **_tiles(q_heads, k_heads, width),
    )  # fmt: skip
    return q_out


@operator("rope", _launch)
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, cos, sin, inverse)


@operator("rope_cache", _launch_cache, mutates=("keys", "values"))
def _rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slots: Tensor,
) -> Tensor:  # fmt: skip
    return reference.rope_cache(q, k, v, cos, sin, keys, values, slots)


@_rope.register_fake
def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_rope_cache.register_fake
def _fake_cache(q: Tensor, *_: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _setup(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, d_q, d_k):
    d_q, d_k = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k))
    return *_rope(d_q, d_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, v: Tensor | None = None) -> None:
    checks.check_floats(q=q, k=k, v=v, cos=cos, sin=sin)
    checks.check_shape("q", q, (None, None, None, None))
    rows, length, _, width = q.shape
    if rows > MOST_ROWS:
        raise ValueError(f"q has {rows} rows; one launch rotates up to {MOST_ROWS}")
    if width < 2 or width % 2:
        raise ValueError(f"q has heads of {width}; rotation pairs their halves: it must be even")
    checks.check_shape("k", k, (rows, length, None, width))
    checks.check_shape("cos", cos, (None, length, width))
    checks.check_shape("cos", cos, (rows if len(cos) > 1 else 1, length, width))
    checks.check_shape("sin", sin, cos.shape)
    if v is not None:
        checks.check_shape("v", v, k.shape)
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; its last axis must be contiguous")
    checks.check_contiguous(cos=cos, sin=sin)
    checks.check_same_device(q=q, k=k, v=v, cos=cos, sin=sin)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos or sin requires a gradient; the tables are constants here")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position (RoFormer, Su et al. 2021), halves paired as in Llama.

    ``y₁ = x₁·cos₁ − x₂·sin₁``, ``y₂ = x₂·cos₂ + x₁·sin₂`` for the halves of a head, in float32 and
    rounded once; the backward is the rotation by the opposite angle. The tables are those of
    transformers: ``sin`` carries no sign (that of `echogen.engine.model.Rotary` does, and its first
    half would have to be negated).

    Args:
        q: float [B, L, H, K], K even; any strides with a contiguous last axis, so that slices of
            a fused projection need no copy. B up to 65,535.
        k: float [B, L, H_k, K], likewise.
        cos, sin: float [B or 1, L, K], contiguous, constants.

    Returns:
        q and k rotated, contiguous, each in its type.

    Raises:
        ValueError: shapes, devices or strides that do not fit; a table that requires a gradient.
        TypeError: types that do not fit.
    """
    _check(q, k, cos, sin)
    q_out, k_out = _rope(q, k, cos, sin, False)
    return q_out, k_out


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """`rope` for decoding: returns q rotated and writes k, rotated, and v into the caches.

    Args:
        q, k, cos, sin: as for `rope`; no gradients.
        v: float [B, L, H_k, K], strides as for q.
        keys, values: float [B, H_k, S, K], contiguous; written in their own type.
        slots: int64 [B, L], where in S each token goes. A slot outside 0 … S − 1 writes nothing
            (padding); one that occurs twice in a row holds either token.

    Returns:
        q rotated, [B, L, H, K], contiguous.

    Raises:
        ValueError: shapes, devices or strides that do not fit.
        TypeError: types that do not fit.
    """
    _check(q, k, cos, sin, v)
    checks.check_floats(keys=keys, values=values)
    rows, length, heads, width = k.shape
    checks.check_shape("keys", keys, (rows, heads, None, width))
    checks.check_shape("values", values, keys.shape)
    if slots.dtype != torch.int64:
        raise TypeError(f"slots is {slots.dtype}; it must be int64")
    checks.check_shape("slots", slots, (rows, length))
    checks.check_contiguous(keys=keys, values=values, slots=slots)
    checks.check_same_device(q=q, keys=keys, values=values, slots=slots)
    out: Tensor = _rope_cache(q, k, v, cos, sin, keys, values, slots)
    return out
