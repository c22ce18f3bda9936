"""The RMS norm, against autograd in float64 that uses no project code."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels import dispatch, rms_norm
from echogen.kernels.rms_norm import add_rms_norm

SHAPES = [(1, 1), (3, 7), (5, 10, 37), (53, 64)]
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-13}


@pytest.fixture(params=[(8, 7), (512, 3)], ids=["one row a tile", "many rows a tile"])
def small_blocks(request, monkeypatch):
    """Several programs, each with several tiles, and several blocks of partial sums."""
    monkeypatch.setattr(rms_norm, "TILE", request.param[0])
    monkeypatch.setattr(rms_norm, "PROGRAMS", request.param[1])
    monkeypatch.setattr(rms_norm, "SUM_ROWS", 2)


def inputs(shape, generator, device, dtype=torch.float32):
    x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    return [t.to(device, dtype) for t in (x, residual, weight)]


def oracle(x, residual, weight, eps):
    summed = x if residual is None else x + residual
    return weight * summed / (summed.square().mean(-1, keepdim=True) + eps).sqrt(), summed


def run(x, residual, weight, eps):
    if residual is None:
        return rms_norm.rms_norm(x, weight, eps), x
    return add_rms_norm(x, residual, weight, eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_forward_and_gradients(shape, add, small_blocks, generator, device, relative_error):
    x, residual, weight = inputs(shape, generator, device)
    given = [x, residual, weight] if add else [x, weight]
    ours = [t.clone().requires_grad_() for t in given]
    truth = [t.double().requires_grad_() for t in given]
    found, summed = run(ours[0], ours[1] if add else None, ours[-1], 1e-5)
    wanted, wanted_sum = oracle(truth[0], truth[1] if add else None, truth[-1], 1e-5)
    assert found.shape == x.shape and found.dtype == torch.float32
    assert relative_error(found, wanted) < 1e-6
    assert relative_error(summed, wanted_sum) < 1e-6

    d = torch.randn(shape, generator=generator).to(device)
    ((found * d).sum() + summed.sin().sum()).backward()
    ((wanted * d).sum() + wanted_sum.sin().sum()).backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("dtype", BOUNDS)
def test_other_types(dtype, small_blocks, generator, device, relative_error):
    given = inputs((29, 37), generator, device, dtype)
    ours = [t.clone().requires_grad_() for t in given]
    truth = [t.double().requires_grad_() for t in given]
    found, summed = add_rms_norm(*ours)
    wanted, wanted_sum = oracle(*truth, 1e-6)
    assert found.dtype == summed.dtype == dtype
    (found.double().square().sum() + summed.double().sum()).backward()
    (wanted.square().sum() + wanted_sum.sum()).backward()
    assert relative_error(found, wanted) < BOUNDS[dtype]
    assert relative_error(summed, wanted_sum) < BOUNDS[dtype]
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_llama(dtype, generator, device):
    """The lines of transformers' LlamaRMSNorm: bit-equal but where 1/rms itself rounds apart."""
    if dtype == torch.bfloat16 and dispatch.INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16, which no GPU does")
    x, residual, weight = inputs((64, 256), generator, device, dtype)
    wide = (x + residual).float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    found, summed = add_rms_norm(x, residual, weight)
    assert torch.equal(summed, x + residual)
    assert (found != weight * wide.to(dtype)).float().mean() < 1e-3


def test_types_promote(generator, device, relative_error):
    x, _, weight = inputs((6, 24), generator, device)
    half = x.to(torch.bfloat16).requires_grad_()
    weight.requires_grad_()
    found = rms_norm.rms_norm(half, weight)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    wanted, _ = oracle(half.double(), None, weight.double(), 1e-6)
    assert relative_error(found, wanted) < 1e-2


def test_a_frozen_weight(generator, device, relative_error, launched):
    x, _, weight = inputs((6, 24), generator, device)
    ours, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    rms_norm.rms_norm(ours, weight).sum().backward()  # the gradient comes as an expanded scalar
    oracle(truth, None, weight.double(), 1e-6)[0].sum().backward()
    assert relative_error(ours.grad, truth.grad) < 1e-5
    assert launched["_rms_norm_weight_grad_kernel"] == 0


def test_the_weight_gradient_is_summed_in_order(generator, device):
    x, _, weight = inputs((300, 24), generator, device)
    d = torch.randn(x.shape, generator=generator).to(device)
    grads = []
    for _ in range(2):
        weight = weight.detach().clone().requires_grad_()
        rms_norm.rms_norm(x, weight).backward(d)
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_rows_do_not_depend_on_the_batch(generator, device):
    x, _, weight = inputs((40, 24), generator, device)
    whole = rms_norm.rms_norm(x, weight)
    assert torch.equal(rms_norm.rms_norm(x[7:9], weight), whole[7:9])


def test_no_rows(device):
    x = torch.zeros(2, 0, 5, device=device, requires_grad=True)
    weight = torch.ones(5, device=device, requires_grad=True)
    rms_norm.rms_norm(x, weight).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros(5, device=device))


def test_opcheck(generator, device):
    x, residual, weight = (t.requires_grad_() for t in inputs((2, 5, 12), generator, device))
    torch.library.opcheck(torch.ops.echogen.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.echogen.add_rms_norm.default, (x, residual, weight, 1e-6))
    x, d, weight = (t.detach() for t in (x, residual, weight))
    rstd = torch.ones(2, 5, device=device)
    for d_summed, wanted in ((d, True), (None, False)):
        torch.library.opcheck(
            torch.ops.echogen.rms_norm_backward.default, (d, d_summed, x, weight, rstd, wanted)
        )


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    x, residual, weight = (t.requires_grad_() for t in inputs((3, 9), generator, device))
    add_rms_norm(x, residual, weight)[0].sum().backward()
    names = ("forward", "backward", "weight_grad")
    assert all(launched[f"_rms_norm_{name}_kernel"] == 1 for name in names)


def test_bad_arguments(device):
    x, weight = torch.zeros(4, 6, device=device), torch.ones(6, device=device)
    good = {"x": x, "residual": x, "weight": weight, "eps": 1e-6}
    add_rms_norm(**good)
    for change, match in [
        ({"weight": weight[:5]}, "weight has shape"),
        ({"weight": weight.long()}, "weight is torch.int64"),
        ({"x": x.int()}, "x is torch.int32"),
        ({"x": torch.zeros((), device=device)}, "x has shape"),
        ({"x": torch.zeros(4, 0, device=device)}, "last axis"),
        ({"x": torch.zeros(1, 8193, device=device)}, "8193"),
        ({"x": torch.zeros(6, 4, device=device).T}, "x has strides"),
        ({"residual": torch.zeros(6, 4, device=device).T}, "residual has strides"),
        ({"residual": x[:3]}, "residual has shape"),
        ({"residual": x.half()}, "residual is torch.float16"),
        ({"eps": 0.0}, "eps = 0.0"),
        ({"eps": float("nan")}, "eps = nan"),
        ({"weight": weight.to("meta")}, "several devices"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            add_rms_norm(**good | change)
