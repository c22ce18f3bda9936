"""Log-probability and entropy under a linear head, against autograd in float64 that uses no
project code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from echogen.kernels import aot, dispatch, head, logprob
from echogen.kernels.logprob import guided_linear_logprob, linear_logprob

from .memory import peak_bytes, untouched

SHAPES = [(1, 1, 1), (2, 7, 3), (19, 300, 13), (50, 389, 16)]
"""Rows, outputs, width: ones, primes, and at least three chunks of rows and three tiles of columns
with a ragged tail."""
CHUNK = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(logprob, "FORWARD", logprob.ForwardTile(128))
    monkeypatch.setattr(logprob, "BACKWARD", logprob.BackwardTile(128))


def inputs(shape, generator, device, dtype=torch.float32):
    rows, columns, width = shape
    hidden = torch.randn(rows, width, generator=generator)
    weight = 2 * torch.randn(columns, width, generator=generator) / width**0.5
    bias = torch.randn(columns, generator=generator)
    targets = torch.randint(-1, columns, (rows,), generator=generator)
    return *(t.to(device, dtype) for t in (hidden, weight, bias)), targets.to(device)


def oracle(hidden, weight, bias, targets, temperature=1.0):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    p = torch.distributions.Categorical(logits=logits / temperature)
    return torch.where(targets < 0, 0.0, p.log_prob(targets.clamp(min=0))), p.entropy()


def leaves(*tensors, dtype=None):
    return [t.to(dtype or t.dtype).detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_gradients(shape, temperature, with_bias, generator, device, relative_error):
    *head_inputs, targets = inputs(shape, generator, device)
    ours, truth = leaves(*head_inputs), leaves(*head_inputs, dtype=torch.float64)
    bias, true_bias = (ours[2], truth[2]) if with_bias else (None, None)
    found = linear_logprob(*ours[:2], targets, bias, CHUNK, temperature)
    wanted = oracle(*truth[:2], true_bias, targets, temperature)
    assert found.logprob.dtype == found.entropy.dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)

    w = torch.randn(2, shape[0], generator=generator).to(device)
    (w[0] * found.logprob + w[1] * found.entropy).sum().backward()
    (w[0] * wanted[0] + w[1] * wanted[1]).sum().backward()
    for a, b in zip(ours[: 2 + with_bias], truth, strict=False):
        # One output has gradients of zero, which rounding must not move.
        assert relative_error(a.grad, b.grad) < (1e-5 if shape[1] > 1 else 1e-6)


def test_the_gradient_is_that_of_finite_differences(generator, device):
    """In float64, which only the reference computes in."""
    if dispatch.INTERPRETED or device != "cpu":
        pytest.skip("kernels compute in float32")
    *tensors, targets = inputs((5, 9, 4), generator, device, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: tuple(linear_logprob(h, w, targets, b, 2, 0.8)), leaves(*tensors)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chunk", [CHUNK, 64])
def test_other_types(dtype, chunk, generator, device, relative_error):
    """Several chunks (a sum in float32) and one (a product in the weight's type)."""
    *tensors, targets = inputs((40, 150, 24), generator, device, dtype)
    ours, truth = leaves(*tensors), leaves(*tensors, dtype=torch.float64)
    found = linear_logprob(*ours[:2], targets, ours[2], chunk)
    wanted = oracle(*truth, targets)
    assert found.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-13}[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < bound / 3
    (found.logprob + 0.5 * found.entropy).sum().backward()
    (wanted[0] + 0.5 * wanted[1]).sum().backward()
    for a, b in zip(ours, truth, strict=True):
        assert a.grad.dtype == dtype and relative_error(a.grad, b.grad) < bound


def test_the_chunk_does_not_matter(generator, device, relative_error):
    *tensors, targets = inputs((37, 90, 8), generator, device)
    results = []
    for chunk in (None, 1, 5, 37, 1000):
        ours = leaves(*tensors)
        found = linear_logprob(*ours[:2], targets, ours[2], chunk)
        found.logprob.sum().backward()
        results.append([*found, *(t.grad for t in ours)])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_needed_gradients_are_made(needed, generator, device, relative_error):
    *tensors, targets = inputs((20, 30, 8), generator, device)
    whole, part = leaves(*tensors), list(tensors)
    for i in needed:
        part[i] = part[i].clone().requires_grad_()
    for hidden, weight, bias in (whole, part):
        linear_logprob(hidden, weight, targets, bias, CHUNK).logprob.square().sum().backward()
    for i in range(3):
        assert (part[i].grad is not None) == (i in needed)
        if i in needed:
            assert relative_error(part[i].grad, whole[i].grad) < 1e-6


def test_an_entropy_bonus_alone(generator, device, relative_error):
    *tensors, targets = inputs((9, 40, 8), generator, device)
    ours, truth = leaves(*tensors), leaves(*tensors, dtype=torch.float64)
    linear_logprob(*ours[:2], targets, ours[2], CHUNK).entropy.sum().backward()
    oracle(*truth, targets)[1].sum().backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_peaked_and_masked_rows(generator, device):
    """Logits in the thousands, and outputs of no probability: finite, and without gradient."""
    hidden, weight, bias, targets = inputs((20, 300, 8), generator, device)
    allowed = torch.rand(300, generator=generator).to(device) < 0.1
    # The first tiles hold nothing else.
    allowed[:200], allowed[-1] = False, True
    bias[~allowed] = float("-inf")
    targets = torch.full_like(targets, 299)
    ours, truth = leaves(hidden, 300 * weight, bias), leaves(hidden, 300 * weight, bias)
    found = linear_logprob(ours[0], ours[1], targets, ours[2], CHUNK)
    logits = (truth[0].double() @ truth[1].double().T + truth[2].double())[:, allowed]
    logp = logits.log_softmax(-1)
    wanted = logp[:, -1], -(logp.exp() * logp).sum(-1)
    for a, b in zip(found, wanted, strict=True):
        # Logits of 1000 are rounded at 1e-4 in float32.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-3)
    (found.logprob + found.entropy).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in ours)
    assert (ours[1].grad[~allowed] == 0).all() and (ours[2].grad[~allowed] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_masked_by_the_least_number(dtype, generator, device):
    """The other way to mask: tiles of finfo.min before one of logits, and behind it."""
    tile = logprob.FORWARD.columns
    columns = 3 * tile + 5
    hidden, weight, bias, _ = inputs((3, columns, 4), generator, device, dtype)
    allowed = torch.zeros(columns, dtype=torch.bool, device=device)
    allowed[2 * tile + 7 : 2 * tile + 40] = True
    bias = torch.where(allowed, bias, torch.finfo(dtype).min)
    targets = torch.full((3,), 2 * tile + 9, device=device)
    ours = leaves(hidden, weight, bias)
    found = linear_logprob(ours[0], ours[1], targets, ours[2], CHUNK)
    logits = (hidden.double() @ weight.double().T + bias.double())[:, allowed]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=2e-2, atol=2e-2)
    found.logprob.sum().backward(retain_graph=True)
    assert all(torch.isfinite(t.grad).all() for t in ours)
    found.entropy.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in ours)


def test_a_temperature_that_waits_for_a_gradient_is_refused(generator, device):
    *tensors, targets = inputs((3, 9, 4), generator, device)
    learnt = torch.ones(1, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"temperature requires a gradient.*detach it"):
        linear_logprob(*tensors[:2], targets, temperature=learnt)
    linear_logprob(*tensors[:2], targets, temperature=learnt.detach())
    with torch.no_grad():
        linear_logprob(*tensors[:2], targets, temperature=learnt)


def test_targets_that_are_none_or_do_not_exist(generator, device):
    hidden, weight, _, targets = inputs((4, 10, 3), generator, device)
    targets[:] = torch.tensor([-7, 3, 10, 2**40])
    hidden.requires_grad_()
    found = linear_logprob(hidden, weight, targets)
    assert found.logprob[0] == 0 and torch.isfinite(found.logprob[1])
    assert found.logprob[2:].isnan().all() and torch.isfinite(found.entropy).all()
    found.logprob[0].backward()
    assert (hidden.grad == 0).all()


def test_a_target_that_is_no_output_has_no_gradient_that_looks_like_one(generator, device):
    hidden, weight, _, _ = inputs((3, 30, 5), generator, device)
    ours = hidden.requires_grad_()
    targets = torch.tensor([3, 30, -1], device=device)
    linear_logprob(ours, weight, targets).logprob.sum().backward()
    assert ours.grad is not None
    assert ours.grad.isnan().all(1).tolist() == [False, True, False]
    assert (ours.grad[2] == 0).all()


def test_an_offset_of_the_logits_costs_no_digits(generator, device):
    hidden, weight, bias, targets = inputs((20, 150, 8), generator, device)
    hidden, weight, bias = ((8 * t).round() / 8 for t in (hidden, weight, bias))  # exact sums
    found = linear_logprob(hidden, weight, targets, bias + 1e4, CHUNK)
    wanted = oracle(hidden.double(), weight.double(), bias.double(), targets)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_nan_is_passed_on(generator, device):
    hidden, weight, bias, targets = inputs((5, 300, 3), generator, device)
    bias[280] = float("nan")
    found = linear_logprob(hidden, weight, targets.clamp(min=0), bias)
    assert found.logprob.isnan().all() and found.entropy.isnan().all()
    nothing = torch.full_like(bias, float("-inf"))
    found = linear_logprob(hidden, weight, targets.clamp(min=0), nothing)
    assert found.logprob.isnan().all() and found.entropy.isnan().all()


@pytest.mark.parametrize("detach", [False, True])
def test_guided(detach, generator, device, relative_error):
    """The layer at the mixed hidden state is the mix of the layer's outputs, bias included."""
    hidden, weight, bias, targets = inputs((20, 150, 8), generator, device)
    uncond = torch.randn(hidden.shape, generator=generator).to(device)
    s = torch.tensor([3.5], device=device)
    tensors = (hidden, uncond, weight, bias)
    ours, truth = leaves(*tensors), leaves(*tensors, dtype=torch.float64)
    found = guided_linear_logprob(
        ours[0], ours[1], ours[2], targets, s, ours[3], detach, CHUNK, 0.9
    )
    c, u, w, b = truth
    conditional, unconditional = (F.linear(h, w, b) for h in (c, u.detach() if detach else u))
    guided = unconditional + 3.5 * (conditional - unconditional)
    p = torch.distributions.Categorical(logits=guided / 0.9)
    logp = torch.where(targets < 0, 0.0, p.log_prob(targets.clamp(min=0)))
    assert relative_error(found.logprob, logp) < 1e-5
    assert relative_error(found.entropy, p.entropy()) < 1e-5
    (found.logprob + found.entropy).sum().backward()
    (logp + p.entropy()).sum().backward()
    assert (ours[1].grad is None) == detach
    for x, y in zip(ours, truth, strict=True):
        if x.grad is not None:
            assert relative_error(x.grad, y.grad) < 2e-5


COMPILED = """
import torch
from echogen.kernels import logprob
logprob.MIXED_ROWS = 8  # three blocks, the last ragged
def score(c, u, w): return logprob.guided_linear_logprob(c, u, w, torch.arange(20), 3.5).logprob
runs = []
for f in (score, torch.compile(score, backend="aot_eager", fullgraph=True)):
    draw = torch.Generator().manual_seed(0)
    ours = [torch.randn(n, 8, generator=draw).requires_grad_() for n in (20, 20, 30)]
    found = f(*ours)
    found.sum().backward()
    runs.append((found, *(t.grad for t in ours)))
for a, b in zip(*runs): torch.testing.assert_close(a, b)
"""


def test_guided_in_a_compiled_graph():
    """In a process of its own: Dynamo remembers functions as it finds them first, and here they are
    those that fill new memory with NaN, which it cannot trace."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_no_guidance_is_the_conditional_row(generator, device):
    hidden, weight, bias, targets = inputs((6, 20, 8), generator, device, torch.bfloat16)
    uncond = hidden.flip(0)
    guided = guided_linear_logprob(hidden, uncond, weight, targets, 1.0, bias)
    plain = linear_logprob(hidden, weight, targets, bias)
    # u + (c − u) is c up to float32's rounding, and bfloat16 shows nothing of it.
    assert torch.equal(guided.logprob, plain.logprob)


def test_a_rerun_is_identical(generator, device):
    *tensors, targets = inputs((50, 150, 8), generator, device)
    runs = []
    for _ in range(2):
        ours = leaves(*tensors)
        found = linear_logprob(*ours[:2], targets, ours[2], CHUNK)
        (found.logprob + found.entropy).sum().backward()
        runs.append([*found, *(t.grad for t in ours)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_default_chunk():
    """Janus-Pro's heads as documented; small ones by the buffer; never more than there are."""
    assert head.chunk_rows(10**6, 16384, 2048, 2) == 4096
    assert head.chunk_rows(10**6, 16384, 2048, 4) == 2048
    assert head.chunk_rows(10**6, 16384, 256, 4) == 1024
    assert head.chunk_rows(10**6, 102400, 64, 2) == 256
    assert head.chunk_rows(4608, 16384, 2048, 2) == 2304  # shared out evenly
    assert head.chunk_rows(7, 16384, 2048, 2) == 7
    assert head.chunk_rows(10**6, 10**7, 1, 4) == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """At eight images of Janus-Pro with a narrow model, forward and backward."""
    rows, columns, width = 4608, 16384, 256

    def eager(hidden, weight, targets, bias):
        logp = F.linear(hidden, weight, bias).float().log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def peak(score):
        tensors = (rows, width), (columns, width), (columns,)
        hidden, weight, bias = (untouched(*shape, dtype=dtype) for shape in tensors)
        targets = untouched(rows, dtype=torch.int64)

        def call():
            logp, entropy = score(hidden, weight, targets, bias)
            (logp.sum() + entropy.sum()).backward()

        return peak_bytes(call)

    assert 10 * peak(linear_logprob) <= peak(eager)
    if dtype == torch.float32:
        # What must be there: one chunk's logits and the gradients; little else is.
        least = head.BUFFER_BYTES + 4 * (columns * width + rows * width)
        assert least <= peak(linear_logprob) < 1.02 * least


def test_opcheck(generator, device):
    hidden, weight, bias, targets = inputs((5, 140, 3), generator, device)
    ours, one = leaves(hidden, weight, bias), torch.ones(1, device=device)
    operator = torch.ops.echogen.linear_logprob.default
    torch.library.opcheck(operator, (ours[0], ours[1], targets, one, ours[2], 3))
    torch.library.opcheck(operator, (ours[0], weight, targets, one, None, 3))
    kept = operator(hidden, weight, targets, one, bias, 3)[1:]
    row = (hidden, weight, targets, one, bias, kept[1], kept[0], kept[0], kept[1])
    backward = torch.ops.echogen.linear_logprob_backward.default
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (*row, *needs, 3))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    *tensors, targets = inputs((20, 30, 4), generator, device)
    ours = leaves(*tensors)
    linear_logprob(*ours[:2], targets, ours[2], 8).logprob.sum().backward()
    assert launched["_logprob_forward_kernel"] == launched["_logprob_backward_kernel"] == 3


@pytest.mark.skipif(dispatch.INTERPRETED, reason="what a GPU would run is recorded")
def test_logits_are_rounded_before_the_log_sum_exp_is_taken_from_them(generator):
    """As they were in it: fused, their difference would be that of other logits."""
    *tensors, targets = inputs((4, 30, 4), generator, torch.device("cpu"))
    ours = leaves(*tensors)
    with dispatch.recorded() as found:
        linear_logprob(*ours[:2], targets, ours[2], 8).logprob.sum().backward()
    fused = {s.kernel: s.options["enable_fp_fusion"] for s in map(aot.Source.of, found)}
    assert fused == {"_logprob_forward_kernel": False, "_logprob_backward_kernel": False}


def test_bad_arguments(device):
    hidden, weight = torch.zeros(4, 3, device=device), torch.zeros(6, 3, device=device)
    targets, bias = torch.arange(4, device=device), torch.zeros(6, device=device)
    good = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
    linear_logprob(**good)
    for change, match in [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": torch.ones(2)}, "temperature has shape"),
        ({"chunk": 0}, "chunk = 0"),
        ({"hidden": hidden[None]}, "hidden has shape"),
        ({"hidden": hidden[:0], "targets": targets[:0]}, "hidden has shape .* not be empty"),
        ({"hidden": torch.zeros(3, 4, device=device).T}, "hidden has strides"),
        ({"hidden": hidden.long()}, "hidden is torch.int64"),
        ({"weight": weight[:, :2]}, "weight has shape"),
        ({"weight": torch.zeros(3, 6, device=device).T}, "weight has strides"),
        ({"weight": weight.bfloat16()}, "weight is torch.bfloat16 and hidden torch.float32"),
        ({"bias": bias[:5]}, "bias has shape"),
        ({"bias": bias.double()}, "bias is torch.float64"),
        ({"targets": targets[:3]}, "targets has shape"),
        ({"targets": targets.float()}, "targets is torch.float32"),
        ({"targets": torch.arange(8, device=device)[::2]}, "targets has strides"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            linear_logprob(**good | change)
    guided = good | {"hidden_uncond": hidden, "scale": 2.0}
    for change, match in [
        ({"hidden_uncond": hidden[:3]}, "hidden_uncond has shape"),
        ({"hidden_uncond": hidden.long()}, "hidden_uncond is torch.int64"),
        ({"scale": float("nan")}, "scale = nan"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            guided_linear_logprob(**guided | change)
