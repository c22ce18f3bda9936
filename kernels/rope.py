"""Rotary position embedding of queries and keys in one launch; in decoding, also the cache write.

Eager code makes two rotated halves, two products and a sum for each. Here every element is read
once and written once, and a decoded token's key and value go straight to their place in the cache.
That cache may hold 8-bit numbers (float8_e4m3fn) with a scale for every token and head. This halves
the bytes that decoding reads and needs no calibration, as each head is scaled by its own largest
number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.reference import rope as reference

MOST_ROWS = 65_535  # of the batch: CUDA's limit on a grid's second axis
LARGEST = tl.constexpr(reference.LARGEST)
LEAST = tl.constexpr(reference.LEAST)
TILE = 1024  # pairs of elements that a program rotates at a time: heads times half a head


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
def _eight_bits(x):
    """float8_e4m3fn of −448 … 448, rounded to even, as uint8. Computed by definition and not by a
    cast: GPUs before compute capability 8.9 have no cast, and the interpreter's rounds 125 to
    64."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2⁻⁶ the spacing is 2⁻⁹, as float32's is from 2¹⁴ on.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0.015625, small, normal) | tl.where(x < 0, 128, 0)).to(tl.uint8)


@triton.jit
def _keep_scales(scales_ptr, scales_stride, head, kept, x, y):
    """Write the scales of heads whose numbers are x and y, and return their inverses.

    Divisions are IEEE: a GPU's `/` is off by up to two units in the last place. A head whose
    largest number is 448 would then not be scaled by 1, the only scale that keeps all of its 8
    bits.
    """
    most = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 1)
    scale = tl.maximum(tl.div_rn(most, LARGEST), LEAST)
    scale += 0 * tl.sum(x + y, 1)  # maxima drop NaN, which must not be hidden
    tl.store(scales_ptr + head.to(tl.int64) * scales_stride, scale[:, None], mask=kept)
    return tl.div_rn(1.0, scale)[:, None]


@triton.jit
def _rotate_heads(
    x_ptr, x_stride, out_ptr, out_stride, scales_ptr, scales_stride, heads, stored, c1, c2, s1, s2,
    INVERSE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one token, ``…_stride`` elements apart; scaled if there are scales. The
    first ``stored`` heads are stored."""
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
        if scales_ptr is not None:
            kept = head < stored
            inverse = _keep_scales(scales_ptr, scales_stride, head, kept, y1, y2)
            y1, y2 = _eight_bits(y1 * inverse), _eight_bits(y2 * inverse)
        out = out_ptr + head.to(tl.int64) * out_stride + i
        keep &= head < stored
        tl.store(out, y1, mask=keep)
        tl.store(out + HALF, y2, mask=keep)


@triton.jit
def _copy_heads(
    x_ptr, x_stride, out_ptr, out_stride, scales_ptr, scales_stride, heads, stored,
    HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Copy all heads of one token unrotated; scaled and stored as in `_rotate_heads`."""
    i = tl.arange(0, 2 * PAIRS)[None, :]
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None]
        keep = (head < heads) & (i < 2 * HALF)
        x = tl.load(x_ptr + head.to(tl.int64) * x_stride + i, mask=keep, other=0.0)
        if scales_ptr is not None:
            x = x.to(tl.float32)
            kept = head < stored
            x = _eight_bits(x * _keep_scales(scales_ptr, scales_stride, head, kept, x, x))
        tl.store(out_ptr + head.to(tl.int64) * out_stride + i, x, mask=keep & (head < stored))


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
        None, 0, q_heads, q_heads, c1, c2, s1, s2, INVERSE, HALF, PAIRS, Q_HEADS,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + row * k_row + token * k_token, k_head, k_out_ptr + place * k_heads * width, width,
        None, 0, k_heads, k_heads, c1, c2, s1, s2, INVERSE, HALF, PAIRS, K_HEADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["apart"])
def _rope_cache_kernel(
    q_ptr, q_row, q_token, q_head, k_ptr, k_row, k_token, k_head, v_ptr, v_row, v_token, v_head,
    cos_ptr, sin_ptr, table_row, keys_ptr, values_ptr, slots_ptr, scales_ptr, apart, q_out_ptr,
    length, q_heads, k_heads, capacity,
    HALF: tl.constexpr, PAIRS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """One program each for the query, key and value of a token, so that none waits for another's
    memory, nor for the slot, which only stores need."""
    wait_for_earlier(DEPENDENT)
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part, place, width = tl.program_id(2), row * length + token, 2 * HALF
    slot, table = tl.load(slots_ptr + place), row * table_row + token * width
    stored = tl.where((slot >= 0) & (slot < capacity), k_heads, 0)
    first = row * k_heads * capacity + slot
    if part == 0:
        c1, c2, s1, s2 = _table(cos_ptr, sin_ptr, table, HALF, PAIRS)
        _rotate_heads(
            q_ptr + row * q_row + token * q_token, q_head, q_out_ptr + place * q_heads * width,
            width, None, 0, q_heads, q_heads, c1, c2, s1, s2, False, HALF, PAIRS, Q_HEADS,
        )  # fmt: skip
    elif part == 1:
        c1, c2, s1, s2 = _table(cos_ptr, sin_ptr, table, HALF, PAIRS)
        if scales_ptr is not None:
            scales_ptr += first
        _rotate_heads(
            k_ptr + row * k_row + token * k_token, k_head, keys_ptr + first * width,
            capacity * width, scales_ptr, capacity, k_heads, stored, c1, c2, s1, s2,
            False, HALF, PAIRS, K_HEADS,
        )  # fmt: skip
    else:
        if scales_ptr is not None:
            scales_ptr += apart + first
        _copy_heads(
            v_ptr + row * v_row + token * v_token, v_head, values_ptr + first * width,
            capacity * width, scales_ptr, capacity, k_heads, stored, HALF, PAIRS, K_HEADS,
        )  # fmt: skip


def _double(q: Tensor, k: Tensor) -> bool:
    """Whether the reference runs: float64 is not a type to train in, and kernels use float32."""
    return torch.float64 in (q.dtype, k.dtype)


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _tiles(q_heads: int, k_heads: int, width: int) -> dict[str, int]:
    """Launch constants: how many heads to rotate at a time."""
    pairs = triton.next_power_of_2(width // 2)
    heads = [min(triton.next_power_of_2(h), max(1, TILE // pairs)) for h in (q_heads, k_heads)]
    return {"HALF": width // 2, "PAIRS": pairs, "Q_HEADS": heads[0], "K_HEADS": heads[1],
            "num_warps": 4}  # fmt: skip


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    if _double(q, k):
        return reference.rope(q, k, cos, sin, inverse)
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
    slots: Tensor, scales: Tensor | None,
) -> Tensor:  # fmt: skip
    if _double(q, k):
        return reference.rope_cache(q, k, v, cos, sin, keys, values, slots, scales)
    rows, length, q_heads, width = q.shape
    k_heads = k.shape[2]
    q_out, apart = q.new_empty(q.shape), 0
    if scales is not None:
        keys, values, apart = keys.view(torch.uint8), values.view(torch.uint8), scales.stride(0)
    launch(
        _rope_cache_kernel, (length, rows, 3), q, *_strides(q), k, *_strides(k), v, *_strides(v),
        cos, sin, length * width if len(cos) > 1 else 0, keys, values, slots, scales,
        apart, q_out, length, q_heads, k_heads, keys.shape[2], **_tiles(q_heads, k_heads, width),
    )  # fmt: skip
    return q_out


@operator("rope", _launch)
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, cos, sin, inverse)


@operator("rope_cache", _launch_cache, mutates=("keys", "values", "scales"))
def _rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slots: Tensor, scales: Tensor | None,
) -> Tensor:  # fmt: skip
    return reference.rope_cache(q, k, v, cos, sin, keys, values, slots, scales)


@_rope.register_fake
def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_rope_cache.register_fake
def _fake_cache(q: Tensor, *_: Tensor | None) -> Tensor:
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
    scales: Tensor | None = None,
) -> Tensor:
    """`rope` for decoding: return q rotated, and write k (rotated) and v into the caches.

    Args:
        q, k, cos, sin: as for `rope`; no gradients.
        v: float [B, L, H_k, K], strides as for q.
        keys, values: [B, H_k, S, K], contiguous; written to. They have k's and v's types, or
            float8_e4m3fn with scales.
        slots: int64 [B, L], where in S each token goes. A slot outside 0 … S − 1 writes nothing
            (padding). A slot that occurs twice in one batch row holds undefined values.
        scales: float32 [2, B, H_k, S], for keys and for values, each contiguous; written to. They
            are the factors by which to multiply the 8-bit numbers of a token's head
            (`scaled_heads`).

    Returns:
        q rotated, [B, L, H, K], contiguous.

    Raises:
        ValueError: shapes, devices or strides that do not fit.
        TypeError: types that do not fit.
    """
    _check(q, k, cos, sin, v)
    rows, length, heads, width = k.shape
    checks.check_scales("scales", scales, keys=keys, values=values)
    for name, cache, of, new in (("keys", keys, "k", k), ("values", values, "v", v)):
        if scales is None and cache.dtype != new.dtype:
            raise TypeError(f"{name} is {cache.dtype} and {of} {new.dtype}; make them the same")
    checks.check_shape("keys", keys, (rows, heads, None, width))
    checks.check_shape("values", values, keys.shape)
    if slots.dtype != torch.int64:
        raise TypeError(f"slots is {slots.dtype}; it must be int64")
    checks.check_shape("slots", slots, (rows, length))
    checks.check_contiguous(
        keys=keys, values=values, slots=slots, **checks.halves("scales", scales)
    )
    checks.check_same_device(q=q, keys=keys, values=values, slots=slots, scales=scales)
    out: Tensor = _rope_cache(q, k, v, cos, sin, keys, values, slots, scales)
    return out


def scaled_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale heads as an 8-bit cache holds them: the largest magnitude of each becomes 448.

    Args:
        x: float [..., K].

    Returns:
        float8_e4m3fn [..., K], and its factors, float32 [...].

    Raises:
        TypeError: x is not a float tensor.
    """
    checks.check_floats(x=x)
    return reference.scaled_heads(x)
