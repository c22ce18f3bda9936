"""The rotary embedding, against complex multiplication in float64 that uses no project code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from echogen.kernels import dispatch, rope

from .test_overlap import ptx

SHAPES = [(1, 1, 1, 1, 2), (2, 3, 5, 1, 6), (2, 5, 7, 3, 16), (1, 4, 16, 16, 8)]
"""B, L, H, H_k, K: ones, primes, and, with small tiles, several blocks of heads with a tail."""
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-13}


@pytest.fixture(params=[8, 1024], ids=["small blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(rope, "TILE", request.param)


def inputs(shape, generator, device, dtype=torch.float32, shared=False):
    rows, length, heads, k_heads, width = shape
    q = torch.randn(rows, length, heads, width, generator=generator).to(device, dtype)
    k, v = torch.randn(2, rows, length, k_heads, width, generator=generator).to(device, dtype)
    angle = 6 * torch.rand(1 if shared else rows, length, width // 2, generator=generator)
    return q, k, v, angle.to(device)


def tables(angle, dtype=torch.float32):
    """As transformers makes them: both halves alike, no sign."""
    both = torch.cat((angle, angle), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def oracle(x, angle):
    """(x₁ + i·x₂)·e^{iθ}, in float64."""
    half = x.shape[-1] // 2
    turn = torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())
    turned = torch.complex(x[..., :half], x[..., half:]) * turn.unsqueeze(2)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_forward_and_gradients(shape, shared, blocks, generator, device, relative_error):
    q, k, _, angle = inputs(shape, generator, device, shared=shared)
    ours = [t.clone().requires_grad_() for t in (q, k)]
    truth = [t.double().requires_grad_() for t in (q, k)]
    found = rope.rope(*ours, *tables(angle))
    wanted = [oracle(t, angle) for t in truth]
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-6
    weights = [torch.randn(t.shape, generator=generator).to(device) for t in found]
    sum((a * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(wanted, weights, strict=True)).backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is mapped at first touch on a CPU")
def test_strides_of_a_fused_projection_may_be_large():
    """Tokens 2³⁰ numbers apart: their places do not fit 32 bits. Only their own pages exist."""
    apart, width = 1 << 30, 8
    memory = torch.from_numpy(np.zeros(2 * apart + width, np.float16))
    q = memory.as_strided((1, 3, 1, width), (0, apart, width, 1))
    q.copy_(torch.randn(q.shape))
    angle = torch.rand(1, 3, width // 2)
    found, _ = rope.rope(q, q, *tables(angle))
    wanted, _ = rope.rope(q.contiguous(), q.contiguous(), *tables(angle))
    assert torch.equal(found, wanted)


def test_halves_of_a_table_may_differ(blocks, generator, device):
    """The backward is the transposed map, whatever the tables hold."""
    q, k, _, _ = inputs((2, 3, 5, 3, 6), generator, device)
    cos, sin = torch.randn(2, 2, 3, 6, generator=generator).to(device)
    ours, eager = (t.clone().requires_grad_() for t in (q, q))
    found, _ = rope.rope(ours, k, cos, sin)
    rotated = torch.cat((-eager[..., 3:], eager[..., :3]), -1)
    wanted = eager * cos.unsqueeze(2) + rotated * sin.unsqueeze(2)
    torch.testing.assert_close(found, wanted)
    d = torch.randn(q.shape, generator=generator).to(device)
    found.backward(d)
    wanted.backward(d)
    torch.testing.assert_close(ours.grad, eager.grad)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_other_types(dtype, generator, device, relative_error):
    q, k, _, angle = inputs((2, 5, 3, 2, 16), generator, device, dtype)
    q.requires_grad_()
    found = rope.rope(q, k, *tables(angle.double(), dtype))
    assert all(t.dtype == dtype for t in found)
    assert relative_error(found[0], oracle(q.double(), angle)) < BOUNDS[dtype]
    found[0].sum().backward()
    ones = torch.ones_like(q, dtype=torch.float64)
    assert relative_error(q.grad, oracle(ones, -angle)) < BOUNDS[dtype]


def test_slices_and_transposed_gradients(blocks, generator, device):
    """Slices of a fused projection and gradients of any strides are read where they lie."""
    fused = torch.randn(2, 5, 8, 4, generator=generator).to(device).requires_grad_()
    plain = fused.detach().clone().requires_grad_()
    cos, sin = tables(torch.rand(2, 5, 2, generator=generator).to(device))
    d = torch.randn(2, 4, 5, 4, generator=generator).to(device).transpose(1, 2)
    q, k = rope.rope(fused[:, :, :4], fused[:, :, 4:6], cos, sin)
    wanted_q, wanted_k = rope.rope(
        plain[:, :, :4].contiguous(), plain[:, :, 4:6].contiguous(), cos, sin
    )
    assert q.is_contiguous() and torch.equal(q, wanted_q) and torch.equal(k, wanted_k)
    ((q * d).sum() + k.sum()).backward()
    ((wanted_q * d).sum() + wanted_k.sum()).backward()
    torch.testing.assert_close(fused.grad, plain.grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cache(shape, dtype, blocks, generator, device):
    q, k, v, angle = inputs(shape, generator, device, dtype)
    rows, length, _, heads, width = shape
    capacity = length + 4
    keys, values = torch.randn(2, rows, heads, capacity, width, generator=generator).to(
        device, dtype
    )
    slots = torch.stack([torch.randperm(capacity, generator=generator)[:length]] * rows)
    slots = slots.roll(1, 0).to(device)
    cos, sin = tables(angle, dtype)
    wanted_q, turned = rope.rope(q, k, cos, sin)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for b in range(rows):
        for t in range(length):
            wanted_keys[b, :, slots[b, t]] = turned[b, t]
            wanted_values[b, :, slots[b, t]] = v[b, t]
    found = rope.rope_cache(q, k, v, cos, sin, keys, values, slots)
    assert torch.equal(found, wanted_q)
    assert torch.equal(keys, wanted_keys) and torch.equal(values, wanted_values)


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_in_8_bits(shape, blocks, generator, device):
    """Every head of a token, times its scale, is within half a step of the format of what a wider
    cache would hold; its largest number is exact to rounding, as it becomes the format's."""
    q, k, v, angle = inputs(shape, generator, device)
    rows, length, _, heads, width = shape
    capacity = length + 4
    k[0, 0, 0] = 0  # its scale must not divide by zero
    wide, held = (
        [torch.zeros(rows, heads, capacity, width, device=device, dtype=d) for _ in range(2)]
        for d in (torch.float32, torch.float8_e4m3fn)
    )
    slots = torch.stack([torch.randperm(capacity, generator=generator)[:length]] * rows).to(device)
    rope.rope_cache(q, k, v, *tables(angle), *wide, slots)
    # Of the leading rows of a cache that has one more.
    scales = torch.zeros(2, rows + 1, heads, capacity, device=device)[:, :rows]
    found = rope.rope_cache(q, k, v, *tables(angle), *held, slots, scales)
    assert torch.equal(found, rope.rope(q, k, *tables(angle))[0])
    for exact, eight, scale in zip(wide, held, scales, strict=True):
        near = eight.float() * scale[..., None]
        top = exact.abs().amax(-1, keepdim=True)
        assert ((near - exact).abs() <= exact.abs() / 15.9 + top / 448 / 1000).all()
        torch.testing.assert_close(near.abs().amax(-1, keepdim=True), top)
    written = torch.zeros(rows, heads, capacity, dtype=torch.bool, device=device)
    written.scatter_(2, slots[:, None].expand(-1, heads, -1), True)
    assert ((scales != 0) == written).all(), "scales are written where keys and values are"


def test_every_number_of_8_bits(device):
    """Numbers of the format stay, those between go to the nearer one, halves to the even."""
    format = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (format[1:] + format[:-1]) / 2
    nudged = torch.cat((format, between, between * (1 + 1e-6), between * (1 - 1e-6)))
    v = torch.cat((nudged, -nudged, torch.tensor([448.0]))).to(device)
    v = torch.nn.functional.pad(v, (0, len(v) % 2)).view(1, 1, 1, -1)
    slots, table = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones_like(v[0])
    held = torch.zeros(2, *v.shape, device=device).to(torch.float8_e4m3fn)
    scales = torch.zeros(2, 1, 1, 1, device=device)
    rope.rope_cache(v, v, v, table, table, *held, slots, scales)
    assert scales[1] == 1 and torch.equal(held[1].float(), v.to(torch.float8_e4m3fn).float())


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_scales_are_divided_as_the_reference_does_it():
    """448/448 is 1. A GPU's `/` may be off by two units in the last place; the interpreter's is
    not, so that its tests would not notice."""
    x, table, slots = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 4), torch.zeros(1, 1).long()
    held = torch.zeros(2, 1, 2, 3, 4).to(torch.float8_e4m3fn)
    with dispatch.recorded() as found:
        rope.rope_cache(x, x, x, table, table, *held, slots, torch.zeros(2, 1, 2, 3))
    code = ptx(found[0])
    assert "div.rn.f32" in code and "div.full" not in code


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy says what it sees
def test_8_bits_hide_no_nan(device):
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0], [float("inf"), 1, 2, 3]], device=device)
    x = x.view(1, 1, 2, 4)
    slots, table = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 4, device=device)
    held = torch.zeros(2, 1, 2, 1, 4, device=device).to(torch.float8_e4m3fn)
    scales = torch.zeros(2, 1, 2, 1, device=device)
    rope.rope_cache(x, x, x, table, table, *held, slots.to(device), scales)
    assert not (held.float() * scales[..., None]).isfinite().all(-1).any()


def test_slots_outside_the_cache_write_nothing(generator, device):
    q, k, v, angle = inputs((1, 4, 2, 1, 4), generator, device)
    keys, values = torch.zeros(2, 1, 1, 3, 4, device=device)
    slots = torch.tensor([[-1, 3, 1, 2**40]], device=device)
    rope.rope_cache(q, k, v, *tables(angle), keys, values, slots)
    assert torch.equal(values[0, 0, 1], v[0, 2, 0])
    values[0, 0, 1], keys[0, 0, 1] = 0, 0
    assert not values.any() and not keys.any()


def test_values_are_copied_exactly(device):
    """Infinities and NaN of one element stay where they are."""
    x = torch.zeros(1, 1, 1, 4, device=device)
    v = torch.tensor([float("inf"), 1.0, float("nan"), -2.0], device=device).view(1, 1, 1, 4)
    keys, values = torch.zeros(2, 1, 1, 1, 4, device=device)
    slots = torch.zeros(1, 1, dtype=torch.int64, device=device)
    table = torch.ones(1, 1, 4, device=device)
    rope.rope_cache(x, x, v, table, table, keys, values, slots)
    torch.testing.assert_close(values, v, rtol=0, atol=0, equal_nan=True)


def test_opcheck(generator, device):
    q, k, v, angle = inputs((2, 3, 2, 1, 4), generator, device)
    cos, sin = tables(angle)
    slots = torch.arange(6, device=device).view(2, 3)
    cache = torch.zeros(2, 2, 1, 6, 4, device=device)
    torch.library.opcheck(
        torch.ops.echogen.rope_cache.default, (q, k, v, cos, sin, cache[0], cache[1], slots, None)
    )
    eight = cache.to(torch.float8_e4m3fn)
    more = (eight[0], eight[1], slots, torch.zeros(2, 2, 1, 6, device=device))
    operator = torch.ops.echogen.rope_cache.default
    # The schema's test multiplies what it is given, which no CPU does in 8 bits.
    torch.library.opcheck(operator, (q, k, v, cos, sin, *more), test_utils="test_faketensor")
    q.requires_grad_()
    k.requires_grad_()
    torch.library.opcheck(torch.ops.echogen.rope.default, (q, k, cos, sin, False))
    fused = torch.randn(2, 3, 5, 4, generator=generator).to(device)
    torch.library.opcheck(
        torch.ops.echogen.rope.default, (fused[:, :, :3], fused[:, :, 3:], cos, sin, True)
    )


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    q, k, v, angle = inputs((1, 2, 2, 1, 4), generator, device)
    cache, slots = torch.zeros(2, 1, 1, 3, 4), torch.zeros(1, 2, dtype=torch.int64)
    rope.rope_cache(q, k, v, *tables(angle), *cache, slots)
    rope.rope(q.requires_grad_(), k, *tables(angle))[0].sum().backward()
    assert launched["_rope_cache_kernel"] == 1 and launched["_rope_kernel"] == 2


def test_bad_arguments(device):
    q, k = torch.zeros(2, 3, 4, 6, device=device), torch.zeros(2, 3, 1, 6, device=device)
    table, cache = torch.zeros(2, 3, 6, device=device), torch.zeros(2, 1, 5, 6, device=device)
    slots = torch.zeros(2, 3, dtype=torch.int64, device=device)
    good = {"q": q, "k": k, "cos": table, "sin": table}
    caching = good | {"v": k, "keys": cache, "values": cache.clone(), "slots": slots}
    rope.rope(**good)
    rope.rope_cache(**caching)
    for change, match in [
        ({"q": q[0]}, "q has shape"),
        ({"q": q[..., :5], "k": k[..., :5]}, "heads of 5"),
        ({"k": k[:1]}, "k has shape"),
        ({"k": k[..., :4]}, "k has shape"),
        ({"cos": table[:, :2]}, "cos has shape"),
        ({"cos": table[0, 0, 0]}, "cos has shape"),
        ({"cos": table[:1]}, "sin has shape"),
        ({"q": q.transpose(2, 3).contiguous().transpose(2, 3)}, "last axis"),
        ({"sin": table.transpose(0, 1).contiguous().transpose(0, 1)}, "sin has strides"),
        ({"q": q.long()}, "q is torch.int64"),
        ({"sin": table.to("meta")}, "several devices"),
        ({"cos": table.clone().requires_grad_()}, "constants"),
        ({"v": k[:, :2]}, "v has shape"),
        ({"keys": cache[:1]}, "keys has shape"),
        ({"values": cache[:, :, :4]}, "values has shape"),
        ({"keys": cache.repeat(1, 1, 2, 1)[:, :, ::2]}, "keys has strides"),
        ({"values": cache.int()}, "values is torch.int32"),
        ({"keys": cache.half()}, "keys is torch.float16 and k torch.float32; make them the same"),
        ({"v": k.half()}, "values is torch.float32 and v torch.float16"),
        ({"slots": slots.int()}, "slots is torch.int32"),
        ({"slots": slots[:1]}, "slots has shape"),
    ]:
        if not change.keys() - good.keys():
            with pytest.raises((ValueError, TypeError), match=match):
                rope.rope(**good | change)
        with pytest.raises((ValueError, TypeError), match=match):
            rope.rope_cache(**caching | change)
