"""SwiGLU, against autograd in float64 that uses no project code."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels import dispatch, swiglu
from echogen.kernels.swiglu import swiglu_pair

SHAPES = [(1, 1), (3, 7), (3, 3, 37), (14, 70)]
"""Ones, primes, and, with small tiles, several blocks with a ragged tail on both axes."""
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-13}


@pytest.fixture(params=[(4, 16), (4, 512)], ids=["small blocks", "one block a row"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(swiglu, "ROWS", request.param[0])
    monkeypatch.setattr(swiglu, "COLUMNS", request.param[1])


def draw(shape, generator, device, dtype=torch.float32):
    gate, up = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return gate.to(device, dtype), up.to(device, dtype)


def run(gate, up, fused):
    return swiglu.swiglu(torch.cat((gate, up), -1)) if fused else swiglu_pair(gate, up)


def oracle(gate, up):
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fused", [True, False])
def test_forward_and_gradients(shape, fused, blocks, generator, device, relative_error):
    given = draw(shape, generator, device)
    ours = [t.clone().requires_grad_() for t in given]
    truth = [t.double().requires_grad_() for t in given]
    found, wanted = run(*ours, fused), oracle(*truth)
    assert found.shape == shape and found.is_contiguous()
    assert relative_error(found, wanted) < 1e-6
    d = torch.randn(shape, generator=generator).to(device)
    found.backward(d)
    wanted.backward(d.double())
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("fused", [True, False])
def test_other_types(dtype, fused, generator, device, relative_error):
    given = draw((9, 20), generator, device, dtype)
    ours = [t.clone().requires_grad_() for t in given]
    truth = [t.double().requires_grad_() for t in given]
    found, wanted = run(*ours, fused), oracle(*truth)
    assert found.dtype == dtype and relative_error(found, wanted) < BOUNDS[dtype]
    found.sum().backward()  # the gradient comes as an expanded scalar
    wanted.sum().backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < BOUNDS[dtype]


@pytest.mark.parametrize("fused", [True, False])
def test_large_gates_neither_overflow_nor_lose_their_gradient(fused, device):
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device, requires_grad=True)
    up = torch.full_like(gate, 2.0).requires_grad_()
    found = run(gate, up, fused)
    found.sum().backward()
    wanted = torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]], device=device)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gate.grad, torch.tensor([[0.0, 0.0, 1.0, 2.0, 2.0]], device=device))
    torch.testing.assert_close(up.grad, wanted / 2)


def test_no_rows(device):
    x = torch.zeros(2, 0, 6, device=device, requires_grad=True)
    out = swiglu.swiglu(x)
    out.sum().backward()
    assert out.shape == (2, 0, 3) and x.grad.shape == x.shape


def test_a_rerun_is_identical(generator, device):
    gate, up = (t.requires_grad_() for t in draw((9, 20), generator, device))
    runs = []
    for _ in range(2):
        out = swiglu_pair(gate, up)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), (gate, up))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(generator, device):
    gate, up = (t.requires_grad_() for t in draw((2, 3, 6), generator, device))
    both = torch.cat((gate, up), -1).detach().requires_grad_()
    torch.library.opcheck(torch.ops.echogen.swiglu.default, (both,))
    torch.library.opcheck(torch.ops.echogen.swiglu_pair.default, (gate, up))
    gate, up, both = gate.detach(), up.detach(), both.detach()
    torch.library.opcheck(torch.ops.echogen.swiglu_backward.default, (gate, both))
    torch.library.opcheck(torch.ops.echogen.swiglu_pair_backward.default, (gate, gate, up))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_are_entered(fused, generator, device, launched):
    gate, up = (t.requires_grad_() for t in draw((2, 6), generator, device))
    run(gate, up, fused).sum().backward()
    assert launched == {"_swiglu_forward_kernel": 1, "_swiglu_backward_kernel": 1}


def test_bad_arguments(device):
    x = torch.zeros(4, 6, device=device)
    for bad, match in [
        (x.long(), "gate_up is torch.int64"),
        (x[:, :5].contiguous(), "must be even"),
        (x[:, :0], "must be even"),
        (x[:, :4], "gate_up has strides"),
        (x[0, 0], "must be even"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            swiglu.swiglu(bad)
    for gate, up, match in [
        (x, x[:3], "up has shape"),
        (x, x.half(), "up is torch.float16"),
        (x.int(), x, "gate is torch.int32"),
        (x[:, :4], x[:, 2:], "gate has strides"),
        (x, x.to("meta"), "several devices"),
        (x[:, :0], x[:, :0], "gate has shape"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            swiglu_pair(gate, up)
