"""The linear layer of large batches against float64 that uses no project code."""

from __future__ import annotations

import re

import pytest
import torch

from echogen.kernels import aot, dispatch
from echogen.kernels import wide_linear as module
from echogen.kernels.cuda.loader import Gpu
from echogen.kernels.wide_linear import wide_linear

from .test_overlap import ptx
from .test_skinny_linear import BF16, ENDS, FP8, TYPES, inputs, oracle

SHAPES = [(1, 8, 19), (5, 24, 7), (17, 72, 8), (33, 136, 67)]
"""Rows, depths (twice as deep with fp8) and channels; tails of every tile."""
BOUND = 3e-2 if dispatch.INTERPRETED else 1e-2
"""Of rounding to bfloat16, which the interpreter does towards zero."""


@pytest.fixture(params=[16, 64], ids=["small tiles", "as they are"])
def tiles(request, monkeypatch):
    if request.param == 16:
        for name in ("ROWS", "MORE_ROWS", "COLUMNS", "DEPTH"):
            monkeypatch.setattr(module, name, 16)


@TYPES
def test_whole_numbers_are_exact(fp8, tiles, generator, device):
    """So every number of W met its own of x, once. Sums are below 256, and bfloat16 holds them."""

    def whole(*shape):
        return torch.randint(-1, 2, shape, generator=generator).float()

    for rows, depth, channels in SHAPES:
        depth *= 2 if fp8 else 1
        x, weight = whole(rows, depth), whole(channels, depth)
        given = {"x": x.to(device, BF16), "weight": weight.to(device, FP8 if fp8 else BF16)}
        given["residual"] = whole(rows, channels).to(device, BF16)
        if fp8:
            given["scale"] = (2.0 ** torch.randint(-3, 1, (channels,), generator=generator)).to(
                device
            )
        found = wide_linear(**given)
        assert found.dtype == BF16 and found.is_contiguous()
        assert torch.equal(found, oracle(**given).to(BF16)), (rows, depth, channels)


@TYPES
@ENDS
@pytest.mark.parametrize("norm", [False, True], ids=["as it is", "normed"])
def test_every_combination(fp8, end, norm, tiles, generator, device, relative_error):
    for rows, depth, channels in SHAPES:
        depth *= 2 if fp8 else 1
        given = inputs(rows, depth, channels, generator, device, fp8, end=end, norm=norm)
        assert relative_error(wide_linear(**given), oracle(**given)) < BOUND


@pytest.mark.parametrize("rows", [40, 300])
def test_a_row_is_the_same_whatever_the_others_hold(rows, tiles, generator, device):
    given = inputs(rows, 40, 24, generator, device, end="swiglu")
    found = wide_linear(**given)
    other = given["x"].clone()
    other[1:] = torch.randn(rows - 1, 40, generator=generator).to(device, BF16)
    assert torch.equal(wide_linear(**given | {"x": other})[0], found[0])
    assert torch.equal(wide_linear(**given), found), "the same every time"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy says what it sees
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(value, tiles, generator, device):
    given = inputs(5, 24, 7, generator, device)
    given["x"][2, 3] = value
    assert wide_linear(**given).isfinite().all(-1).tolist() == [True, True, False, True, True]


@TYPES
def test_opcheck(fp8, generator, device):
    given = inputs(18, 32, 24, generator, device, fp8, end="residual")
    names = ("x", "weight", "scale", "gain", "eps", "residual", "swiglu")
    arguments = tuple(given.get(name) for name in names)
    # The schema's test multiplies what it is given, which no CPU does in 8 bits.
    which = {"test_utils": "test_faketensor"} if fp8 else {}
    torch.library.opcheck(torch.ops.echogen.wide_linear.default, arguments, **which)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_one_launch(generator, device, launched):
    wide_linear(**inputs(70, 32, 24, generator, device, True, end="swiglu"))
    assert launched == {"_wide_linear_kernel": 1}


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_one_output_compiles(monkeypatch, generator):
    """Triton makes constants of ones among the arguments."""
    for name in ("ROWS", "MORE_ROWS", "COLUMNS", "DEPTH"):
        monkeypatch.setattr(module, name, 16)
    with dispatch.recorded() as found:
        wide_linear(**inputs(1, 16, 1, generator, "cpu", end="swiglu"))
    assert aot.Source.of(found[0]).compile("sm_90").error is None


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_8_bits_are_converted_in_pairs(monkeypatch, generator):
    """GPUs convert single numbers at a fraction of the rate at which they do all else."""
    for name in ("ROWS", "MORE_ROWS", "COLUMNS", "DEPTH"):
        monkeypatch.setattr(module, name, 16)
    with dispatch.recorded() as found:
        wide_linear(**inputs(17, 32, 8, generator, "cpu", True))
    code = ptx(found[0])
    assert "cvt.rn.f16x2.e4m3x2" in code and not re.search(r"cvt\.(rn\.)?bf16\.f16", code)


@pytest.mark.parametrize(
    ("rows", "outputs", "swiglu", "wanted"),
    [
        (256, 6144, False, (128, 64)),
        (256, 5632, True, (64, 64)),
        (256, 2048, False, (64, 64)),  # 128 programs: nearly all of an H200's 132
        (64, 2048, False, (64, 16)),
        (20, 8, False, (64, 16)),
        (64, 16384, False, (64, 64)),  # no row of a tile twice as high would be there
    ],
)
def test_tiles_are_as_large_as_leaves_the_device_busy(rows, outputs, swiglu, wanted):
    assert module.tiles(rows, outputs, swiglu, 132) == wanted


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])
@pytest.mark.parametrize(("programs", "held"), [(32, 9216), (132, 10_240), (132, 16_384)])
def test_who_is_alone_has_more_under_way_and_room_for_it(programs, held, shared):
    on = Gpu(132, shared)
    found = module.stages(programs, held, on)
    assert module.STAGES <= found <= module.MOST_STAGES and found * held < shared
    assert found > module.STAGES or shared < 6 * held
    assert module.stages(133, held, on) == module.STAGES, "several share a multiprocessor"


def test_bad_arguments(generator, device):
    good = inputs(20, 16, 8, generator, device)
    for change, match in [
        ({"weight": good["weight"][:, :8]}, "weight has shape"),
        ({"x": good["x"][:, :12].contiguous(), "weight": good["weight"][:, :12].contiguous(),
          "gain": good["gain"][:12]}, "12 wide"),
        ({"scale": torch.ones(8, device=device)}, "scale is for a float8 weight"),
        ({"gain": good["gain"].half()}, "gain is torch.float16"),
        ({"residual": good["x"]}, "residual has shape"),
        ({"swiglu": True, "residual": good["x"][:, :8].contiguous()}, "no residual"),
        ({"eps": 0.0}, "eps = 0.0"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=match):
            wide_linear(**good | change)
