"""The linear layer of decoding against float64 that uses no project code: the reference, and the
kernels' own source, natively where there is a GPU and emulated on the CPU everywhere."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels import skinny_linear as module
from echogen.kernels.cuda.loader import H200, Gpu
from echogen.kernels.skinny_linear import FP8, MAX_ROWS, TEMPLATES, fp8_weight, plan, skinny_linear

from .emulated import emulate

SHAPES = [(8, 1), (24, 7), (72, 8), (200, 13), (520, 67)]
"""Depths (twice as deep with fp8) and channels: no multiples of 64 or of 512, ones and primes."""
BF16 = torch.bfloat16
TYPES = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
ENDS = pytest.mark.parametrize("end", ["plain", "residual", "swiglu"])


@pytest.fixture(params=["as registered", "emulated", "emulated, warps apart"])
def where(request, device, tmp_path_factory, monkeypatch):
    """Where `skinny_linear` is to be called: on the device, or emulated on the CPU."""
    if request.param == "as registered":
        return device
    emulate(module, tmp_path_factory, monkeypatch, early=request.param == "emulated, warps apart")
    monkeypatch.setattr(module, "_skinny_linear", module._launch)
    return "cpu"


@pytest.fixture
def kernels(where):
    """As `where`, but for the reference."""
    if where == "cpu" and module._skinny_linear is not module._launch:
        pytest.skip("about the kernels")
    return where


@pytest.fixture
def has(where, monkeypatch):
    """Sets what the device has: 3 multiprocessors at first, so that a block has several tiles."""
    most = module.gpu(torch.device(where)).shared_bytes

    def set_to(sms=3, shared_bytes=most):
        monkeypatch.setattr(module, "gpu", lambda device: Gpu(sms, min(most, shared_bytes)))

    set_to()
    return set_to


def room_for(rows, depth, fp8):
    """Shared memory of as many rows with few copies under way: too little for more of either."""
    room = plan(rows, depth, fp8, H200).shared_bytes - 1
    return plan(rows, depth, fp8, Gpu(3, room)).shared_bytes


def oracle(x, weight, scale=None, gain=None, eps=1e-6, residual=None, swiglu=False):
    """float64 throughout, but for the two roundings of Llama's norm."""
    y, weight = x.double(), weight.double()
    if gain is not None:
        y = y / (y.square().mean(1, keepdim=True) + eps).sqrt()
        y = (y.to(x.dtype) * gain).double()
    y = torch.stack([(weight * row).sum(1) for row in y])
    y = y if scale is None else y * scale.double()
    if swiglu:
        gate, up = y[:, : len(weight) // 2], y[:, len(weight) // 2 :]
        return gate / (1 + (-gate).exp()) * up
    return y if residual is None else y + residual.double()


def whole(generator, *shape):
    """Whole numbers so small that float32 sums them exactly, in any order."""
    return torch.randint(-8, 9, shape, generator=generator).float()


def inputs(rows, depth, channels, generator, device, fp8=False, dtype=BF16, end="plain", norm=True):
    """Arguments by name; ``channels`` are outputs."""
    weight_rows = channels * (2 if end == "swiglu" else 1)
    weight = torch.randn(weight_rows, depth, generator=generator) / depth**0.5
    x = torch.randn(rows, depth, generator=generator) * torch.linspace(5, 0.2, rows)[:, None]
    made = {"x": x.to(dtype)}
    if fp8:
        sizes = 9 * torch.rand(weight_rows, 1, generator=generator)
        made["weight"], made["scale"] = fp8_weight(weight * sizes)
    else:
        made["weight"] = weight.to(dtype)
    if norm:
        made["gain"] = (1 + 0.3 * torch.randn(depth, generator=generator)).to(dtype)
    if end == "residual":
        made["residual"] = torch.randn(rows, channels, generator=generator).to(dtype)
    on = {name: tensor.to(device) for name, tensor in made.items()}
    return on | {"swiglu": end == "swiglu", "eps": 1e-3}


@TYPES
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_whole_numbers_are_exact(rows, fp8, where, has, generator):
    """Whatever the order of the sums; so every number of W met its own of x, once."""
    for depth, channels in SHAPES:
        depth *= 2 if fp8 else 1
        x, weight = whole(generator, rows, depth), whole(generator, channels, depth)
        residual = whole(generator, rows, channels)
        given = {"x": x.to(where, BF16), "residual": residual.to(where, BF16)}
        given["weight"] = weight.to(where, FP8 if fp8 else BF16)
        if fp8:
            powers = torch.randint(-3, 4, (channels,), generator=generator)
            given["scale"] = (2.0**powers).to(where)
        found = skinny_linear(**given)
        assert found.dtype == BF16 and found.is_contiguous()
        assert torch.equal(found, oracle(**given).to(BF16)), (depth, channels)


@TYPES
@ENDS
@pytest.mark.parametrize("norm", [False, True], ids=["as it is", "normed"])
@pytest.mark.parametrize("stages", [8, 4])
def test_every_combination(fp8, end, norm, stages, where, has, generator, relative_error):
    for rows, (depth, channels) in zip((1, 2, 3, 7, 16), SHAPES, strict=True):
        depth *= 2 if fp8 else 1
        has(shared_bytes=H200.shared_bytes if stages == 8 else room_for(rows, depth, fp8))
        if where == "cpu":
            assert plan(rows, depth, fp8, module.gpu(None)).stages == stages
        given = inputs(rows, depth, channels, generator, where, fp8, end=end, norm=norm)
        found = skinny_linear(**given)
        assert found.shape == (rows, channels) and found.dtype == BF16
        assert relative_error(found, oracle(**given)) < 5e-3


@TYPES
@pytest.mark.parametrize("sms", [1, 2, 132])
def test_tiles_of_blocks(fp8, sms, where, has, generator, relative_error):
    """One block with all tiles, an uneven share, and more multiprocessors than tiles."""
    has(sms)
    for end, channels in (("plain", 131), ("swiglu", 61)):
        given = inputs(5, 80, channels, generator, where, fp8, end=end)
        assert relative_error(skinny_linear(**given), oracle(**given)) < 5e-3


@TYPES
def test_every_byte_of_w_comes_out_where_it_stood(fp8, where, has):
    """x picks columns of W, all of whose normal finite numbers there are, and −0: out comes Wᵀ.
    (Subnormal bfloat16 may come out as 0: sums are compiled with -ftz=true, as CuPy does it.)"""
    if fp8:
        codes = torch.arange(256, dtype=torch.uint8).view(FP8)
        values = codes[~codes.float().isnan()]
    else:
        codes = torch.arange(-(2**15), 2**15, 37, dtype=torch.int16).view(BF16)
        normal = codes.float().abs() >= torch.finfo(BF16).tiny
        values = codes[codes.float().isfinite() & (normal | (codes == 0))]
    for depth in (16, 48, 1104):
        weight = values.view(torch.uint8 if fp8 else torch.int16).repeat(300)[: 61 * depth]
        weight = weight.view(values.dtype).view(61, depth).to(where)
        scale = torch.ones(61, device=where) if fp8 else None
        for first in sorted({0, depth // 3, depth - 16}):
            x = torch.eye(depth, dtype=BF16)[first : first + 16].to(where)
            found = skinny_linear(x, weight, scale).float()
            assert torch.equal(found, weight[:, first : first + 16].float().T)


@TYPES
@pytest.mark.parametrize("rows", [9, 16])
def test_rows_in_several_launches(rows, fp8, where, has, generator, relative_error, launched):
    """Where shared memory holds a few rows only, W is read again for the next ones."""
    given = inputs(rows, 272, 13, generator, where, fp8, end="residual")
    has(shared_bytes=room_for(4, 272, fp8))
    assert plan(rows, 272, fp8, module.gpu(None)).rows == 4
    assert relative_error(skinny_linear(**given), oracle(**given)) < 5e-3
    if where == "cuda" or module._skinny_linear is module._launch:
        name = f"skinny_linear_{'fp8' if fp8 else 'bf16'}_4"
        assert launched == {name: -(-rows // 4)}


@TYPES
@ENDS
def test_a_row_does_not_depend_on_the_others(fp8, end, kernels, has, generator):
    """Bit-equal alone, in any company, in any place, next to NaN and infinities, and when W is read
    once more for it."""
    given = inputs(MAX_ROWS, 592, 11, generator, kernels, fp8, end=end)
    every = skinny_linear(**given)

    def some(which, **changed):
        rows = {"x": given["x"], "residual": given.get("residual")} | changed
        picked = {k: v[which].contiguous() for k, v in rows.items() if v is not None}
        return skinny_linear(**given | picked)

    for count in (1, 2, 3, 5, 8, 9, 15):
        assert torch.equal(some(slice(0, count)), every[:count])
    order = torch.randperm(MAX_ROWS, generator=generator).to(kernels)
    assert torch.equal(some(order), every[order])
    for bad in (float("nan"), float("inf"), 3e38):
        x = given["x"].clone()
        x[::2] = bad
        assert torch.equal(some(slice(None), x=x)[1::2], every[1::2])
    has(shared_bytes=room_for(4, 592, fp8))
    assert torch.equal(skinny_linear(**given), every)


@TYPES
def test_a_channel_does_not_depend_on_the_others(fp8, kernels, has, generator):
    given = inputs(3, 208, 29, generator, kernels, fp8)
    every = skinny_linear(**given)
    part = {k: given[k][5:18].contiguous() for k in ("weight", "scale") if k in given}
    assert torch.equal(skinny_linear(**given | part), every[:, 5:18])
    if not fp8:
        given["weight"][3] = float("nan")
        found = skinny_linear(**given)
        assert found[:, 3].isnan().all()
        assert torch.equal(found[:, 4:], every[:, 4:]) and torch.equal(found[:, :3], every[:, :3])


@TYPES
def test_repeats_are_bit_equal(fp8, where, has, generator):
    given = inputs(7, 528, 37, generator, where, fp8, end="swiglu")
    assert torch.equal(skinny_linear(**given), skinny_linear(**given))


def test_extreme_gates_and_rows(where, has):
    """e^200 overflows, yet silu(−200) is 0; a row of zeros has an rms of √ε; NaN stays NaN."""
    weight = torch.zeros(8, 8, dtype=BF16, device=where)
    weight[:4, 0] = torch.tensor([-200.0, -89.0, 0.0, 200.0])
    weight[4:, 1] = 1.0
    x = torch.ones(1, 8, dtype=BF16, device=where)
    found = skinny_linear(x, weight, swiglu=True)
    assert torch.equal(found.abs().cpu(), torch.tensor([[0, 0, 0, 200.0]]).to(BF16))
    rows = torch.stack((0 * x[0], float("nan") * x[0], x[0]))
    found = skinny_linear(rows, weight, gain=x[0])
    assert (found[0] == 0).all() and found[1].isnan().all()
    assert found[2].tolist() == [-200, -89, 0, 200, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype, bound", [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (BF16, 5e-3),
])  # fmt: skip
@ENDS
def test_the_reference_takes_any_float(dtype, bound, end, generator, monkeypatch, relative_error):
    monkeypatch.setattr(module.reference, "CHUNK", 300)  # W in several slices
    for fp8 in (False, True):
        given = inputs(5, 48, 13, generator, "cpu", fp8, dtype, end)
        found = skinny_linear(**given)
        assert found.dtype == dtype
        assert relative_error(found, oracle(**given)) < bound


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64, torch.float16])
def test_fp8_weight_survives_the_round_trip(dtype, generator, device):
    """To half a step of a 4-bit significand: 1/16, or near zero 2⁻¹⁰ of the scale."""
    weight = torch.randn(37, 48, generator=generator).to(device, dtype)
    weight *= torch.logspace(-3, 3, 37, device=device).to(dtype)[:, None]
    weight[5], weight[6, 1:] = 0, 0
    made, scale = fp8_weight(weight)
    assert made.dtype == FP8 and scale.dtype == torch.float32 and scale.shape == (37,)
    back, true = made.double() * scale.double()[:, None], weight.double()
    step = torch.maximum(true.abs() / 16, scale.double()[:, None] * 2**-10)
    assert ((back - true).abs() <= step * (1 + 1e-5)).all()
    largest = made.float().abs().amax(1)
    assert (largest == torch.where(true.abs().amax(1) > 0, 448.0, 0.0)).all()
    assert scale[5] == 1


def test_fp8_weight_of_what_is_fp8_already(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    codes = codes[~codes.float().isnan()].view(1, -1)
    made, scale = fp8_weight(codes.float() * 2**-9)
    assert scale.tolist() == [2**-9] and torch.equal(made.float(), codes.float())
    made, scale = fp8_weight(torch.full((1, 16), 1e-44, device=device))  # scales could underflow
    assert (scale > 0).all() and (made.float() == 0).all()


def test_fp8_weight_refuses(device):
    weight = torch.ones(3, 16, device=device)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = weight.clone()
        bad[1, 3] = value
        with pytest.raises(ValueError, match=rf"weight holds {abs(value)} in row 1"):
            fp8_weight(bad)
    with pytest.raises(ValueError, match=r"weight has shape \(16,\)"):
        fp8_weight(weight[0])
    with pytest.raises(ValueError, match=r"weight has shape \(0, 16\)"):
        fp8_weight(weight[:0])
    with pytest.raises(TypeError, match=r"weight is torch.int64"):
        fp8_weight(weight.long())


@TYPES
@pytest.mark.parametrize("gpu", [H200, Gpu(108, 166912), Gpu(58, 101376)], ids=lambda g: g.sms)
def test_plans(fp8, gpu):
    """All rows at once and many bytes under way while they fit; then fewer, and then none."""
    refused = 0
    for depth in [16, 2048, 5632, *range(10_000, 200_000, 9_984)]:
        for rows in range(1, MAX_ROWS + 1):
            try:
                made = plan(rows, depth, fp8, gpu)
            except ValueError as error:
                refused += 1
                assert f"x is {depth} wide" in str(error) and str(gpu.shared_bytes) in str(error)
                assert depth > (gpu.shared_bytes - 40_000) // 2
                continue
            template = next(t for t in reversed(TEMPLATES) if t >= rows)
            assert made.rows <= template and made.stages in module.STAGES
            assert 8192 * made.stages + 2 * made.rows * depth < made.shared_bytes
            assert made.shared_bytes <= gpu.shared_bytes
            if depth == 16:
                assert (made.rows, made.stages) == (template, 8)
    assert refused > 0 and refused % MAX_ROWS == 0, "a refused depth is refused for any rows"


def test_plans_of_janus():
    assert plan(1, 2048, False, H200) == module.Plan(1, 8, 8 * 8192 + 4096 + 64 + 512)
    assert plan(16, 2048, True, H200).stages == 8
    assert plan(16, 5632, False, H200) == module.Plan(16, 4, 4 * 8192 + 16 * (11264 + 64) + 8192)


def test_too_deep_for_the_device(kernels, has):
    x = torch.zeros(2, 99_992, dtype=BF16, device=kernels)
    with pytest.raises(ValueError, match=r"x is 99992 wide: one row takes \d+ bytes.*functional"):
        skinny_linear(x, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="4 GiB of W")
def test_weights_beyond_32_bits():
    weight = torch.zeros(1_050_000, 2048, dtype=BF16, device="cuda")
    weight[-1] = 1
    assert weight.numel() > 2**31
    found = skinny_linear(torch.ones(1, 2048, dtype=BF16, device="cuda"), weight)
    assert found[0, -1] == 2048 and (found[0, :-1] == 0).all()


@pytest.mark.parametrize("end, fp8", [("plain", False), ("residual", True), ("swiglu", True)])
def test_opcheck(end, fp8, generator, device):
    given = inputs(3, 32, 6, generator, device, fp8, end=end, norm=end != "plain")
    names = ("x", "weight", "scale", "gain", "eps", "residual", "swiglu")
    arguments = tuple(given.get(name) for name in names)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if not fp8:  # which torch cannot compare: whether an argument was changed is not asked then
        tests += ("test_schema",)
    operator = torch.ops.echogen.skinny_linear.default
    torch.library.opcheck(operator, arguments, test_utils=tests)


def test_the_kernel_of_as_many_rows_is_entered(kernels, generator, launched):
    for rows in range(1, MAX_ROWS + 1):
        launched.clear()
        skinny_linear(**inputs(rows, 16, 3, generator, kernels))
        template = next(t for t in (1, 2, 4, 8, 16) if t >= rows)
        assert launched == {f"skinny_linear_bf16_{template}": 1}


def test_what_only_the_kernels_refuse(kernels):
    x, weight = (torch.zeros(n, 16, dtype=BF16, device=kernels) for n in (2, 5))
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(TypeError, match=f"x is {dtype} and weight {dtype}"):
            skinny_linear(x.to(dtype), weight.to(dtype))
    for name, good in (("x", x), ("weight", weight), ("gain", x[0].clone())):
        moved = torch.zeros(good.numel() + 1, dtype=BF16, device=kernels)[1:].view(good.shape)
        given = {"x": x, "weight": weight} | {name: moved}
        with pytest.raises(ValueError, match=f"{name} begins 2 bytes behind .* offset 1 of"):
            skinny_linear(**given)
        skinny_linear(**given | {name: moved.clone()})


def test_bad_arguments(device):
    x = torch.zeros(3, 32, dtype=BF16, device=device)
    weight = torch.zeros(6, 32, dtype=BF16, device=device)
    scale = torch.ones(6, device=device)
    good = {"x": x, "weight": weight, "gain": x[0], "residual": x[:, :6].contiguous()}
    fp8 = {"weight": weight.to(FP8), "scale": scale}
    skinny_linear(**good)
    skinny_linear(**good | fp8)
    narrow = {"x": x[:, :24].contiguous(), "gain": None}
    for change, match in [
        ({"x": x[0]}, r"x has shape \(32,\)"),
        ({"x": x.long()}, "x is torch.int64"),
        ({"x": x.to(FP8)}, "x is torch.float8_e4m3fn"),
        ({"x": x[:0], "residual": None}, r"x has shape \(0, 32\); it must not be empty"),
        ({"x": x.repeat(6, 1), "residual": None}, "x has 18 rows; .* up to 16"),
        ({"x": x.T.contiguous().T}, "x has strides"),
        ({"weight": weight[:, :24]}, r"weight has shape \(6, 24\)"),
        ({"weight": weight[:0], "residual": None}, r"weight has shape \(0, 32\)"),
        ({"weight": weight.half()}, "weight is torch.float16"),
        ({"weight": weight.T.contiguous().T}, "weight has strides"),
        ({"weight": weight.to("meta")}, "several devices"),
        (narrow | fp8 | {"weight": fp8["weight"][:, :24].contiguous()}, "24 wide; .* 16·n"),
        ({"x": x[:, :12], "weight": weight[:, :12], "gain": None}, "12 wide; .* 8·n"),
        ({"gain": x[0, :8]}, r"gain has shape \(8,\)"),
        ({"gain": x[0].float()}, "gain is torch.float32"),
        ({"gain": torch.zeros(64, dtype=BF16, device=device)[::2]}, "gain has strides"),
        ({"residual": x[:2, :6]}, r"residual has shape \(2, 6\)"),
        ({"residual": scale.repeat(3, 1)}, "residual is torch.float32"),
        ({"residual": x[:, :6]}, "residual has strides"),
        ({"scale": scale}, "scale is for a float8 weight"),
        (fp8 | {"scale": None}, "scale is for a float8 weight"),
        (fp8 | {"scale": scale[:5]}, r"scale has shape \(5,\)"),
        (fp8 | {"scale": scale.double()}, "scale is torch.float64"),
        (fp8 | {"scale": scale.repeat(2)[::2]}, "scale has strides"),
        ({"eps": 0.0}, "eps = 0.0"),
        ({"eps": float("nan")}, "eps = nan"),
        ({"swiglu": True}, "swiglu .* 6 rows and a residual"),
        ({"swiglu": True, "residual": None, "weight": weight[:5]}, "swiglu .* 5 rows$"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            skinny_linear(**good | change)
