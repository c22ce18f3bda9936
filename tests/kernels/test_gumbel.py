"""The straight-through Gumbel-Softmax, against autograd in float64 that uses no project code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from echogen.kernels import dispatch, gumbel
from echogen.kernels.constants import trial
from echogen.kernels.cuda.loader import GPUS
from echogen.kernels.gumbel import gumbel_st_embed
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.reference import philox

SHAPES = [(1, 1, 1), (3, 7, 2), (19, 300, 8), (50, 389, 8), (17, 131, 16)]
"""Rows, codes, width: ones, primes, and several tiles with a ragged tail on every axis."""


def inputs(shape, generator, device, dtype=torch.float32):
    rows, codes, width = shape
    logits = 3 * torch.randn(rows, codes, generator=generator)
    codebook = F.normalize(torch.randn(codes, width, generator=generator), dim=-1)
    draw = torch.randint(0, 2**32, (rows,), generator=generator)
    position = torch.randint(0, 576, (rows,), generator=generator)
    targets = torch.randint(-1, codes, (rows,), generator=generator)
    kept = [t.to(device) for t in (draw, position, targets)]
    return logits.to(device, dtype), codebook.to(device, dtype), *kept


def oracle(logits, codebook, tau, noise, targets, index=None):
    """y = onehot + soft − soft.detach(), in float64."""
    noisy = logits + noise
    index = noisy.argmax(-1) if index is None else index
    soft = (noisy / tau).softmax(-1)
    hard = F.one_hot(index, logits.shape[1]).to(soft.dtype)
    # The codebook's gradient is that of the rows chosen; the soft sample's is the logits' alone.
    embed = hard @ codebook + (soft - soft.detach()) @ codebook.detach()
    ce = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    return embed, index, torch.where(targets >= 0, ce, 0.0)


@pytest.fixture(params=[False, True], ids=["whole rows", "rows in parts"])
def parts(request, monkeypatch):
    """Whether a row's codes are cut among programs: for the shapes above into up to three."""
    if request.param:
        monkeypatch.setattr(gumbel, "SPLITS", gumbel.Splits(least=128))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("given", [False, True])
def test_forward_and_gradients(shape, tau, given, generator, device, relative_error, parts):
    logits, codebook, draw, position, targets = inputs(shape, generator, device)
    noise = gumbel_noise(5, draw, position, shape[1]).double()
    index = torch.randint(0, shape[1], (shape[0],), generator=generator).to(device)
    index = index if given else None
    ours = [t.clone().requires_grad_() for t in (logits, codebook)]
    truth = [t.double().requires_grad_() for t in (logits, codebook)]
    found = gumbel_st_embed(*ours, tau, 5, draw, position, index, targets)
    embed, wanted_index, ce = oracle(*truth, tau, noise, targets, index)
    assert torch.equal(found.code, wanted_index)
    assert relative_error(found.embed, embed) < 1e-6
    assert relative_error(found.ce, ce) < 1e-5

    weight = torch.randn(embed.shape, generator=generator).to(device)
    (found.embed * weight).sum().add(2 * found.ce.sum()).backward()
    (embed * weight).sum().add(2 * ce.sum()).backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_without_targets_or_a_codebook_gradient(generator, device, relative_error):
    logits, codebook, draw, position, _ = inputs((5, 40, 8), generator, device)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = gumbel_st_embed(ours, codebook, 0.7, 1, draw, position)
    none = torch.full_like(draw, -1)
    noise = gumbel_noise(1, draw, position, 40).double()
    embed, _, _ = oracle(truth, codebook.double(), 0.7, noise, none)
    assert torch.equal(found.ce, torch.zeros_like(found.ce))
    found.embed.square().sum().backward()
    embed.square().sum().backward()
    assert relative_error(ours.grad, truth.grad) < 1e-5


def test_an_offset_of_the_logits_costs_the_loss_no_digits(generator, device, parts):
    """Beside float64 of the same logits, whose own rounding thus does not count."""
    logits, codebook, draw, position, targets = inputs((19, 300, 8), generator, device)
    logits, targets = logits + 1e4, targets.clamp(min=0)
    found = gumbel_st_embed(logits, codebook, 1.0, 5, draw, position, None, targets)
    wanted = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(found.ce.double(), wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("width", [1, 3, 17, 33, 64, 200, 256])
def test_widths_of_the_codebook(width, generator, device, relative_error):
    logits, codebook, draw, position, targets = inputs((5, 150, width), generator, device)
    ours = [t.clone().requires_grad_() for t in (logits, codebook)]
    truth = [t.double().requires_grad_() for t in (logits, codebook)]
    noise = gumbel_noise(5, draw, position, 150).double()
    found = gumbel_st_embed(*ours, 0.7, 5, draw, position, None, targets)
    wanted, index, _ = oracle(*truth, 0.7, noise, targets)
    assert torch.equal(found.code, index)
    found.embed.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("graded", ["embed", "ce"])
def test_the_gradient_of_one_output_alone(graded, generator, device, relative_error):
    logits, codebook, draw, position, targets = inputs((19, 300, 8), generator, device)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = gumbel_st_embed(ours, codebook, 0.7, 5, draw, position, None, targets)
    noise = gumbel_noise(5, draw, position, 300).double()
    embed, _, ce = oracle(truth, codebook.double(), 0.7, noise, targets)
    getattr(found, graded).square().sum().backward()
    {"embed": embed, "ce": ce}[graded].square().sum().backward()
    assert relative_error(ours.grad, truth.grad) < 1e-5


def test_a_nan_is_not_hidden_and_reads_nothing_else(generator, device, parts):
    """A diverged model gives a code of the codebook and a loss that says so."""
    logits, codebook, draw, position, targets = inputs((3, 389, 8), generator, device)
    targets = targets.clamp(min=0)
    logits[1, -1] = logits[2, 3] = float("nan")
    logits.requires_grad_()
    found = gumbel_st_embed(logits, codebook, 0.7, 5, draw, position, None, targets)
    assert ((found.code >= 0) & (found.code < 389)).all()
    assert found.ce.isnan().tolist() == [False, True, True]
    (found.ce.sum() + found.embed.sum()).backward()
    assert logits.grad is not None
    assert logits.grad[0].isfinite().all() and logits.grad[1:].isnan().any(1).all()


def test_codes_that_are_none(generator, device, parts):
    """Neither wraps around nor reads what lies beside the codebook."""
    logits, codebook, draw, position, _ = inputs((4, 300, 8), generator, device)
    index = torch.tensor([2, 300, -1, 299], device=device)
    targets = torch.tensor([300, 5, -1, 1000], device=device)
    logits.requires_grad_()
    codebook.requires_grad_()
    found = gumbel_st_embed(logits, codebook, 0.7, 5, draw, position, index, targets)
    assert torch.equal(found.embed[[0, 3]], codebook[[2, 299]])
    assert found.embed[[1, 2]].isnan().all() and torch.equal(found.code, index)
    assert found.ce.isnan().tolist() == [True, False, False, True] and found.ce[2] == 0
    found.ce.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isnan().all(1).tolist() == [True, False, False, True]
    assert (logits.grad[2] == 0).all()


def test_float64(generator, device, relative_error):
    """For oracles: in float64 throughout, wherever it runs."""
    shape = (5, 40, 3)
    logits, codebook, draw, position, targets = inputs(shape, generator, device, torch.float64)
    ours = [t.clone().requires_grad_() for t in (logits, codebook)]
    truth = [t.clone().requires_grad_() for t in (logits, codebook)]
    found = gumbel_st_embed(*ours, 0.75, 5, draw, position, None, targets)
    seed = torch.tensor([5], device=device)
    noise = philox.gumbel(seed, draw, position, 40).double()  # to the bit, as float64 would tell
    embed, _, ce = oracle(*truth, 0.75, noise, targets)
    assert found.ce.dtype == torch.float64 and relative_error(found.ce, ce) < 1e-14
    (found.embed.sum() + found.ce.sum()).backward()
    (embed.sum() + ce.sum()).backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("many", [False, True], ids=["few rows", "many rows"])
def test_half_types(dtype, many, generator, device, relative_error, parts):
    logits, codebook, draw, position, targets = inputs((50, 300, 8), generator, device, dtype)
    ours = [t.clone().requires_grad_() for t in (logits, codebook)]
    truth = [t.double().requires_grad_() for t in (logits, codebook)]
    with trial(gumbel.ForwardTile(32, 32, 4) if many else None):  # tiles of twice the rows
        found = gumbel_st_embed(*ours, 1.0, 5, draw, position, None, targets)
    noise = gumbel_noise(5, draw, position, 300).double()
    embed, index, ce = oracle(*truth, 1.0, noise, targets)
    assert found.embed.dtype == dtype and torch.equal(found.code, index)
    (found.embed.float().sum() + found.ce.sum()).backward()
    (embed.sum() + ce.sum()).backward()
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a.grad, b.grad) < 2e-2


@pytest.mark.parametrize(
    ("tiles", "codes", "wanted"),
    [
        (128, 16384, 6),  # 768 of 792 programs at once, where 7 would need a second wave
        (144, 16384, 5),  # 4,608 rows: 720
        (1, 16384, 8),
        (1, 4096, 4),  # of 1,024 codes each
        (1, 100, 1),
        (792, 16384, 1),  # no better with more
        (793, 16384, 6),  # 7 waves of a sixth of a tile's time, instead of 2 of the whole
        (10_000, 16384, 1),  # 13 waves; three programs a tile would save 3 %
    ],
)
def test_splits_take_the_fewest_waves_for_their_work(tiles, codes, wanted):
    assert gumbel.SPLITS.slots(GPUS["sm_90"].sms, 4) == 792
    assert gumbel.SPLITS.of(tiles, codes, 792) == wanted


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_at_the_shapes_of_training_one_wave_does(arch):
    """With the tiles of 32 rows and four warps that many rows of half floats have."""
    sms = GPUS[arch].sms
    for rows in (4096, 4608):
        tile = gumbel._forward_tile(8, rows, True, sms)
        tiles, slots = -(-rows // tile.rows), gumbel.SPLITS.slots(sms, tile.warps)
        assert tiles * gumbel.SPLITS.of(tiles, 16384, slots) <= slots


def test_rows_do_not_depend_on_the_batch(generator, device, parts):
    logits, codebook, draw, position, _ = inputs((37, 260, 8), generator, device)
    whole = gumbel_st_embed(logits, codebook, 1.0, 9, draw, position)
    order = torch.randperm(37, generator=generator).to(device)
    shuffled = gumbel_st_embed(logits[order], codebook, 1.0, 9, draw[order], position[order])
    assert torch.equal(shuffled.code, whole.code[order])
    one = slice(4, 5)
    alone = gumbel_st_embed(logits[one], codebook, 1.0, 9, draw[one], position[one])
    assert torch.equal(alone.code, whole.code[one])


def test_codes_of_no_probability_are_never_drawn(generator, device, parts):
    logits, codebook, draw, position, _ = inputs((40, 300, 8), generator, device)
    allowed = torch.rand(300, generator=generator).to(device) < 0.1
    allowed[-1] = True
    logits[:, ~allowed] = float("-inf")
    logits.requires_grad_()
    found = gumbel_st_embed(logits, codebook, 0.5, 2, draw, position)
    assert allowed[found.code].all()
    found.embed.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert (logits.grad[:, ~allowed] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, generator, device):
    shape = (18, 140, 8)
    logits, codebook, draw, position, targets = inputs(shape, generator, device, dtype)
    tau, seed = torch.ones(1, device=device), torch.ones(1, dtype=torch.int64, device=device)
    logits.requires_grad_()
    codebook.requires_grad_()
    key = (logits, codebook, tau, seed, draw, position)
    # One index a row decides the whole: finite differences and reruns are exact there.
    torch.library.opcheck(torch.ops.echogen.gumbel_st_embed.default, (*key, None, targets))
    torch.library.opcheck(torch.ops.echogen.gumbel_st_embed.default, (*key, targets.clamp(0), None))
    key = tuple(t.detach() for t in key)
    embed, _, ce, *kept = torch.ops.echogen.gumbel_st_embed(*key, None, targets)
    backward = torch.ops.echogen.gumbel_st_embed_backward.default
    for above in ((embed, ce), (None, ce), (embed, None)):
        torch.library.opcheck(backward, (*key, targets, *kept, *above))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    logits, codebook, draw, position, targets = inputs((4, 9, 2), generator, device)
    logits.requires_grad_()
    codebook.requires_grad_()
    found = gumbel_st_embed(logits, codebook, 1.0, 0, draw, position, None, targets)
    (found.ce.sum() + found.embed.sum()).backward()
    names = ("gumbel_st_forward", "gumbel_st_backward", "codebook_grad")
    assert all(launched[f"_{name}_kernel"] == 1 for name in names)


def test_bad_arguments(device):
    logits, codebook = torch.zeros(4, 6, device=device), torch.zeros(6, 2, device=device)
    rows = torch.arange(4, device=device)
    good = {"logits": logits, "codebook": codebook, "tau": 1.0, "seed": 0, "draw": rows,
            "position": rows}  # fmt: skip
    gumbel_st_embed(**good)
    for change, match in [
        ({"tau": 0.0}, "tau = 0.0"),
        ({"tau": float("nan")}, "tau = nan"),
        ({"seed": -1}, "seed = -1"),
        ({"codebook": codebook[:5]}, "codebook has shape"),
        ({"logits": logits[None]}, "logits has shape"),
        ({"logits": torch.zeros(6, 4, device=device).T}, "strides"),
        ({"logits": logits.long()}, "logits is torch.int64"),
        ({"draw": rows[:3]}, "draw has shape"),
        ({"draw": rows.float()}, "draw is torch.float32"),
        ({"index": rows[:2]}, "index has shape"),
        ({"logits": logits[:, :0], "codebook": codebook[:0]}, "must not be empty"),
        ({"codebook": torch.zeros(6, 300, device=device)}, "300 wide"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            gumbel_st_embed(**good | change)
