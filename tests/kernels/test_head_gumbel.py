"""The straight-through sampler from hidden states: against autograd in float64 that uses no project
code, and against the sampler on the layer's logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from echogen.kernels import dispatch, head
from echogen.kernels.gumbel import gumbel_st_embed
from echogen.kernels.head_gumbel import head_gumbel_st_embed
from echogen.kernels.philox import gumbel_noise

from .memory import peak_bytes, untouched

SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (50, 389, 13, 8)]
"""Rows, codes, width of the model and of a code: ones, primes, and several chunks of rows and tiles
of codes with a ragged tail."""
CHUNK = 20  # more than a tile of rows, and no multiple of one


def inputs(shape, generator, device, dtype=torch.float32):
    """hidden, weight, bias, codebook; draw, position, targets."""
    rows, codes, model, width = shape
    hidden = torch.randn(rows, model, generator=generator)
    weight = 3 * torch.randn(codes, model, generator=generator) / model**0.5
    bias = torch.randn(codes, generator=generator)
    codebook = F.normalize(torch.randn(codes, width, generator=generator), dim=-1)
    draw = torch.randint(0, 2**32, (rows,), generator=generator)
    position = torch.randint(0, 576, (rows,), generator=generator)
    targets = torch.randint(-1, codes, (rows,), generator=generator)
    floats = [t.to(device, dtype) for t in (hidden, weight, bias, codebook)]
    return floats, [t.to(device) for t in (draw, position, targets)]


def leaves(tensors, dtype=None):
    return [t.to(dtype or t.dtype).detach().clone().requires_grad_() for t in tensors]


def oracle(hidden, weight, bias, codebook, tau, noise, targets, index=None):
    """y = onehot + soft − soft.detach(), in float64."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    index = (logits + noise).argmax(-1) if index is None else index
    soft = ((logits + noise) / tau).softmax(-1)
    hard = F.one_hot(index, logits.shape[1]).to(soft.dtype)
    # The codebook's gradient is that of the rows chosen; the soft sample's is the logits' alone.
    embed = hard @ codebook + (soft - soft.detach()) @ codebook.detach()
    ce = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    return embed, index, torch.where(targets >= 0, ce, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_gradients(shape, given, with_bias, generator, device, relative_error):
    floats, (draw, position, targets) = inputs(shape, generator, device)
    noise = gumbel_noise(5, draw, position, shape[1]).double()
    index = torch.randint(0, shape[1], (shape[0],), generator=generator).to(device)
    index = index if given else None
    ours, truth = leaves(floats), leaves(floats, torch.float64)
    bias, true_bias = (ours[2], truth[2]) if with_bias else (None, None)
    found = head_gumbel_st_embed(
        ours[0], ours[1], ours[3], 0.6, 5, draw, position, bias, index, targets, CHUNK
    )
    embed, wanted_index, ce = oracle(
        truth[0], truth[1], true_bias, truth[3], 0.6, noise, targets, index
    )
    assert torch.equal(found.code, wanted_index)
    assert relative_error(found.embed, embed) < 1e-6
    assert relative_error(found.ce, ce) < 1e-5

    w = torch.randn(embed.shape, generator=generator).to(device)
    (found.embed * w).sum().add(2 * found.ce.sum()).backward()
    (embed * w).sum().add(2 * ce.sum()).backward()
    for a, b in zip(ours, truth, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [CHUNK, 64, None])
def test_equal_to_the_sampler_on_the_layers_logits(dtype, chunk, generator, device, relative_error):
    floats, (draw, position, targets) = inputs((45, 260, 16, 8), generator, device, dtype)
    ours, theirs = leaves(floats), leaves(floats)
    key = (0.8, torch.tensor([3], device=device), draw, position)
    found = head_gumbel_st_embed(ours[0], ours[1], ours[3], *key, ours[2], None, targets, chunk)
    logits = F.linear(*theirs[:3])
    wanted = gumbel_st_embed(logits, theirs[3], *key, None, targets)
    assert torch.equal(found.code, wanted.code) and torch.equal(found.embed, wanted.embed)
    assert relative_error(found.ce, wanted.ce) < 1e-5
    for sample in (found, wanted):
        (sample.embed.float().square().sum() + sample.ce.sum()).backward()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == dtype and relative_error(a.grad, b.grad) < bound


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,)])
def test_only_needed_gradients_are_made(needed, generator, device, relative_error):
    floats, (draw, position, targets) = inputs((25, 30, 8, 4), generator, device)
    whole, part = leaves(floats), list(floats)
    for i in needed:
        part[i] = part[i].clone().requires_grad_()
    for hidden, weight, bias, codebook in (whole, part):
        found = head_gumbel_st_embed(
            hidden, weight, codebook, 1.0, 0, draw, position, bias, None, targets, CHUNK
        )
        (found.embed.square().sum() + found.embed.sum() + found.ce.sum()).backward()
    for i in range(4):
        assert (part[i].grad is not None) == (i in needed)
        if i in needed:
            assert relative_error(part[i].grad, whole[i].grad) < 1e-6


def test_without_targets(generator, device, relative_error):
    floats, (draw, position, targets) = inputs((23, 40, 8, 4), generator, device)
    ours, truth = leaves(floats), leaves(floats, torch.float64)
    found = head_gumbel_st_embed(
        ours[0], ours[1], ours[3], 0.7, 1, draw, position, ours[2], chunk=CHUNK
    )
    assert torch.equal(found.ce, torch.zeros_like(found.ce))
    noise = gumbel_noise(1, draw, position, 40).double()
    embed, _, _ = oracle(*truth, 0.7, noise, targets)
    (found.embed + found.embed.square()).sum().backward()
    (embed + embed.square()).sum().backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_a_rerun_is_identical(generator, device):
    floats, (draw, position, targets) = inputs((50, 150, 8, 8), generator, device)
    runs = []
    for _ in range(2):
        ours = leaves(floats)
        found = head_gumbel_st_embed(
            ours[0], ours[1], ours[3], 1.0, 4, draw, position, ours[2], None, targets, CHUNK
        )
        (found.embed.sum() + found.ce.sum()).backward()
        runs.append([*found, *(t.grad for t in ours)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory():
    """At eight images of Janus-Pro with a narrow model, forward and backward."""
    rows, codes, model, width = 4608, 16384, 256, 8

    def fused(hidden, weight, bias, codebook, row):
        found = head_gumbel_st_embed(hidden, weight, codebook, 0.5, 0, row, row, bias, None, row)
        return found.embed, found.ce

    def eager(hidden, weight, bias, codebook, row):
        logits = F.linear(hidden, weight, bias)
        embed = F.gumbel_softmax(logits, 0.5, hard=True) @ codebook
        return embed, F.cross_entropy(logits, row)

    def peak(sample):
        tensors = [untouched(rows, model), untouched(codes, model), untouched(codes)]
        tensors += [untouched(codes, width), untouched(rows, dtype=torch.int64)]

        def call():
            embed, ce = sample(*tensors)
            (embed.sum() + ce.sum()).backward()

        return peak_bytes(call)

    assert 10 * peak(fused) <= peak(eager)
    # What must be there: one chunk's logits and the gradients; little else is.
    least = head.BUFFER_BYTES + 4 * (codes * model + rows * model)
    assert least <= peak(fused) < 1.02 * least


def test_opcheck(generator, device):
    floats, (draw, position, targets) = inputs((3, 9, 3, 2), generator, device)
    hidden, weight, bias, codebook = leaves(floats)
    tau, seed = torch.ones(1, device=device), torch.ones(1, dtype=torch.int64, device=device)
    key = (hidden, weight, codebook, tau, seed, draw, position)
    operator = torch.ops.echogen.head_gumbel_st_embed.default
    torch.library.opcheck(operator, (*key, bias, None, targets, 2))
    torch.library.opcheck(operator, (*key, None, targets.clamp(0), None, 2))
    key = tuple(t.detach() for t in key)
    embed, _, ce, *kept = operator(*key, None, None, targets, 3)
    backward = torch.ops.echogen.head_gumbel_st_embed_backward.default
    arguments = (*key, None, targets, *kept, embed, ce)
    torch.library.opcheck(backward, (*arguments, True, True, False, 2))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    floats, (draw, position, targets) = inputs((9, 20, 4, 2), generator, device)
    hidden, weight, bias, codebook = leaves(floats)
    found = head_gumbel_st_embed(
        hidden, weight, codebook, 1.0, 0, draw, position, bias, None, targets, 4
    )
    (found.ce.sum() + found.embed.sum()).backward()
    assert launched["_gumbel_st_forward_kernel"] == launched["_gumbel_st_backward_kernel"] == 3
    assert launched["_codebook_grad_kernel"] == 1


def test_bad_arguments(device):
    hidden, weight = torch.zeros(4, 3, device=device), torch.zeros(6, 3, device=device)
    codebook, rows = torch.zeros(6, 2, device=device), torch.arange(4, device=device)
    good = {"hidden": hidden, "weight": weight, "codebook": codebook, "tau": 1.0, "seed": 0,
            "draw": rows, "position": rows, "bias": torch.zeros(6, device=device)}  # fmt: skip
    head_gumbel_st_embed(**good)
    for change, match in [
        ({"tau": 0.0}, "tau = 0.0"),
        ({"seed": -1}, "seed = -1"),
        ({"chunk": -3}, "chunk = -3"),
        ({"hidden": hidden[None]}, "hidden has shape"),
        ({"hidden": hidden[:, :0], "weight": weight[:, :0]}, "must not be empty"),
        ({"hidden": torch.zeros(3, 4, device=device).T}, "hidden has strides"),
        ({"weight": weight[:, :2]}, "weight has shape"),
        ({"weight": weight.half()}, "weight is torch.float16 and hidden torch.float32"),
        ({"weight": torch.zeros(3, 6, device=device).T}, "weight has strides"),
        ({"bias": torch.zeros(5, device=device)}, "bias has shape"),
        ({"codebook": codebook[:5]}, "codebook has shape"),
        ({"codebook": codebook.long()}, "codebook is torch.int64"),
        ({"codebook": torch.zeros(6, 300, device=device)}, "300 wide"),
        ({"draw": rows[:3]}, "draw has shape"),
        ({"position": rows.float()}, "position is torch.float32"),
        ({"index": rows[:2]}, "index has shape"),
        ({"targets": torch.arange(8, device=device)[::2]}, "targets has strides"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            head_gumbel_st_embed(**good | change)
