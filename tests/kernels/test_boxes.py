"""Overlap and reward are what a plain calculation over Python floats says, and their gradients
what autograd in float64 says of one written out here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echogen.kernels import boxes, dispatch
from echogen.kernels.boxes import box_iou, box_reward

NAN, INF = math.nan, math.inf
UNIT = [0.0, 0.0, 1.0, 1.0]


def is_box(b: list[float]) -> bool:
    return all(map(math.isfinite, b)) and b[2] > b[0] and b[3] > b[1]


def plain_iou(a: list[float], b: list[float]) -> float:
    if not is_box(a) or not is_box(b):
        return 0.0
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return wide * high / (sum(areas) - wide * high)


def plain_giou(a: list[float], b: list[float]) -> float:
    if not is_box(a) or not is_box(b):
        return -1.0
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return plain_iou(a, b) - (hull - sum(areas) + wide * high) / hull


def plain_l1(a: list[float], b: list[float]) -> float:
    if not is_box(a) or not is_box(b):
        return 1.0
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 4


# Multiples of 1/64, so that no rounding makes a box of no extent one of some.
COORDINATE = st.integers(0, 64).map(lambda i: i / 64)
ANY = st.lists(st.one_of(COORDINATE, st.sampled_from([NAN, INF, -INF])), min_size=4, max_size=4)
PAIR = st.lists(COORDINATE, min_size=2, max_size=2, unique=True).map(sorted)
VALID = st.tuples(PAIR, PAIR).map(lambda p: [p[0][0], p[1][0], p[0][1], p[1][1]])
BOX = st.one_of(VALID, VALID, ANY)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(BOX, BOX), min_size=1, max_size=8), st.sampled_from(["32", "64"]))
def test_iou_against_plain_python(pairs, bits):
    dtype = {"32": torch.float32, "64": torch.float64}[bits]
    a, b = (torch.tensor([p[i] for p in pairs], dtype=dtype) for i in (0, 1))
    wanted = torch.tensor([plain_iou(*p) for p in pairs], dtype=dtype)
    found = box_iou(a, b)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, box_iou(b, a))
    assert ((found >= 0) & (found <= 1)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_reward_against_plain_python(data):
    b, g, k = (data.draw(st.integers(1, 3)) for _ in range(3))
    w_iou, w_l1 = data.draw(st.sampled_from([(0.5, 0.5), (1.0, 0.0), (0.2, 0.7)]))

    def grid(values, *shape):
        if not shape:
            return data.draw(values)
        return [grid(values, *shape[1:]) for _ in range(shape[0])]

    pred, target = grid(BOX, b, g, k), grid(VALID, b, k)
    mask = grid(st.booleans(), b, k)
    iou, l1, reward, giou = box_reward(
        torch.tensor(pred, dtype=torch.float64),
        torch.tensor(target, dtype=torch.float64),
        torch.tensor(mask),
        w_iou,
        w_l1,
    )
    assert iou.shape == l1.shape == giou.shape == (b, g, k) and reward.shape == (b, g)
    for i in range(b):
        for j in range(g):
            kept = []
            for n in range(k):
                pair = pred[i][j][n], target[i][n]
                wanted = (plain_iou(*pair), plain_l1(*pair)) if mask[i][n] else (0.0, 0.0)
                assert (iou[i, j, n].item(), l1[i, j, n].item()) == pytest.approx(wanted)
                general = plain_giou(*pair) if mask[i][n] else 0.0
                assert giou[i, j, n].item() == pytest.approx(general, abs=1e-9)
                if mask[i][n]:
                    kept.append(w_iou * (1 - wanted[0]) + w_l1 * wanted[1])
            wanted = 1 - sum(kept) / len(kept) if kept else 0.0
            assert reward[i, j].item() == pytest.approx(wanted, abs=1e-9)


def one(pred: list[float], target: list[float], **weights: float) -> float:
    mask = torch.ones(1, 1, dtype=torch.bool)
    return box_reward(torch.tensor([[[pred]]]), torch.tensor([[target]]), mask, **weights)[2].item()


def test_a_better_match_has_a_higher_reward():
    target = [0.2, 0.2, 0.6, 0.6]
    shifted = [one([0.2 + d, 0.2, 0.6 + d, 0.6], target) for d in (0, 0.05, 0.1, 0.2, 0.4)]
    assert shifted[0] == 1
    assert all(a > b for a, b in itertools.pairwise(shifted))
    assert shifted[-1] > one([NAN] * 4, target) == 0
    # Beyond any overlap, the nearer box is still the better one.
    assert one([0.6, 0.2, 1.0, 0.6], target) > one([0.6, 0.6, 1.0, 1.0], target)
    for weights in ({"w_iou": 1.0, "w_l1": 0.0}, {"w_iou": 0.0, "w_l1": 1.0}):
        assert one(target, target, **weights) > one(UNIT, target, **weights)


BROKEN = {
    "nan": [NAN] * 4,
    "one nan": [0.1, NAN, 0.5, 0.5],
    "infinite": [0.0, 0.0, INF, 1.0],
    "all infinite": [-INF, -INF, INF, INF],
    "no width": [0.5, 0.1, 0.5, 0.9],
    "swapped": [0.9, 0.9, 0.1, 0.1],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_box_has_the_largest_discrepancy(name):
    mask = torch.ones(1, 1, dtype=torch.bool)
    pred, target = torch.tensor([[[BROKEN[name]]]]), torch.tensor([[UNIT]])
    iou, l1, reward, giou = box_reward(pred, target, mask)
    assert (iou.item(), l1.item(), reward.item(), giou.item()) == (0, 1, 0, -1)
    assert box_iou(pred[0, 0], pred[0, 0]).item() == 0


def test_padding_contributes_nothing_whatever_it_holds():
    target = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [NAN] * 4], [[NAN] * 4, [INF] * 4]])
    pred = torch.tensor([[[[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3]]], [[[NAN] * 4, UNIT]]])
    mask = torch.tensor([[True, False], [False, False]])
    iou, l1, reward, giou = box_reward(pred, target, mask)
    assert iou.tolist() == giou.tolist() == [[[1, 0]], [[0, 0]]]
    assert l1.tolist() == [[[0, 0]], [[0, 0]]]
    assert reward.tolist() == [[1], [0]]


@pytest.mark.parametrize("side", [1e-3, 1e-10, 1e-25, 1e-40])
def test_boxes_too_small_for_an_area_give_no_nan(side):
    box = torch.tensor([0.0, 0.0, side, side])
    found = box_iou(box, torch.stack((box, torch.tensor(UNIT))))
    assert torch.isfinite(found).all() and ((found >= 0) & (found <= 1)).all()


def test_iou_never_exceeds_one_by_rounding():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(20_000, 2, generator=generator)
    box = torch.cat((low, low + torch.rand(20_000, 2, generator=generator) + 1e-3), -1)
    inner = box * (1 - 1e-7)
    for other in (box, inner, box.nextafter(torch.tensor(2.0))):
        assert box_iou(box, other).max() <= 1
    assert (box_iou(box, box) > 1 - 1e-5).all()


def test_iou_broadcasts():
    a = torch.rand(3, 1, 4).sort(-1).values[..., [0, 1, 2, 3]]
    assert box_iou(a, torch.tensor(UNIT)).shape == (3, 1)
    assert box_iou(a, torch.rand(5, 4)).shape == (3, 5)


@pytest.mark.parametrize("pred, target, mask", [
    ((2, 3, 4, 4), (2, 3, 4), (2, 4)),
    ((2, 3, 4, 4), (2, 4, 4), (2, 3)),
    ((2, 3, 4, 4), (1, 4, 4), (2, 4)),
    ((2, 3, 4, 5), (2, 4, 5), (2, 4)),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(pred, target, mask):
    with pytest.raises(ValueError, match=r"\("):
        box_reward(torch.zeros(pred), torch.zeros(target), torch.ones(mask, dtype=torch.bool))


def test_boxes_are_four_numbers():
    for a, b in ((torch.zeros(3), torch.zeros(4)), (torch.zeros(()), torch.zeros(4))):
        with pytest.raises(ValueError, match="last dimension must be 4"):
            box_iou(a, b)


SHAPES = [(1, 1, 1), (2, 3, 5), (3, 7, 2), (2, 7, 11)]
"""Layouts, samples, boxes: ones, primes, and (in tiles of 2 × 4) three ragged tiles on an axis."""


@pytest.fixture
def small(monkeypatch):
    """Tiles of 2 samples by 4 boxes."""
    monkeypatch.setattr(boxes, "BOXES", 4)
    monkeypatch.setattr(boxes, "TILE", 8)


def random_boxes(shape, generator):
    low = 0.7 * torch.rand(*shape, 2, generator=generator)
    return torch.cat((low, low + 0.05 + 0.5 * torch.rand(*shape, 2, generator=generator)), -1)


def inputs(shape, generator, device, dtype=torch.float32):
    b, g, k = shape
    target = random_boxes((b, k), generator)
    pred = random_boxes((b, g, k), generator)
    near = torch.rand(b, g, k, 1, generator=generator) < 0.5
    pred = torch.where(
        near, target[:, None] + 0.02 * torch.randn(pred.shape, generator=generator), pred
    )
    broken = torch.tensor(list(BROKEN.values()))[torch.arange(b * g * k) % len(BROKEN)]
    pred = torch.where(
        torch.rand(b, g, k, 1, generator=generator) < 0.2, broken.view_as(pred), pred
    )
    mask = torch.rand(b, k, generator=generator) < 0.8
    return pred.to(device, dtype), target.to(device, dtype), mask.to(device)


def oracle(pred, target, mask, w_iou, w_l1):
    """Everything in autograd, in float64; broken boxes are replaced before any arithmetic."""
    p, t = pred.double(), target.double().unsqueeze(1).expand(pred.shape)
    ok = torch.isfinite(p).all(-1) & (p[..., 2:] > p[..., :2]).all(-1)
    ok &= torch.isfinite(t).all(-1) & (t[..., 2:] > t[..., :2]).all(-1)
    unit = torch.tensor(UNIT, dtype=torch.float64, device=pred.device)
    p, t = (torch.where(ok[..., None], x, unit) for x in (p, t))

    def area(low, high):
        return (high - low).clamp(min=0).prod(-1)

    shared = area(torch.maximum(p[..., :2], t[..., :2]), torch.minimum(p[..., 2:], t[..., 2:]))
    hull = area(torch.minimum(p[..., :2], t[..., :2]), torch.maximum(p[..., 2:], t[..., 2:]))
    union = area(p[..., :2], p[..., 2:]) + area(t[..., :2], t[..., 2:]) - shared
    iou = torch.where(ok, shared / union, 0.0)
    giou = torch.where(ok, shared / union - (hull - union) / hull, -1.0)
    l1 = torch.where(ok, (p - t).abs().mean(-1), 1.0)
    keep = mask[:, None].expand(iou.shape)
    d = torch.where(keep, w_iou * (1 - iou) + w_l1 * l1, 0.0).sum(-1)
    reward = torch.where(keep.any(-1), 1 - d / keep.sum(-1).clamp(min=1), 0.0)
    iou, l1, giou = (torch.where(keep, x, 0.0) for x in (iou, l1, giou))
    return iou, l1, reward, giou


def check(found_pred, pred, target, mask, generator, close, only=None):
    """Values to 1e-6 of their range, which is of size one: a GIoU may cancel to nearly nothing, of
    which no float32 keeps six digits. Gradients of all coordinates to 1e-5 of their norm, of a
    single box, whose four may all be such remainders, to 1e-4."""
    truth = pred.double().requires_grad_()
    found = box_reward(found_pred, target, mask, 0.3, 0.7)
    wanted = oracle(truth, target, mask, 0.3, 0.7)
    total, wanted_total = 0.0, 0.0
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == torch.float32 and float((a - b).detach().abs().max()) < 1e-6
        weight = torch.randn(b.shape, generator=generator).to(b.device)
        if only is None or i == only:
            total, wanted_total = total + (a * weight).sum(), wanted_total + (b * weight).sum()
    total.backward()
    wanted_total.backward()
    assert torch.isfinite(found_pred.grad).all()
    bound = 1e-4 if pred.shape[:3].numel() == 1 else 1e-5
    assert close(found_pred.grad, truth.grad) < bound


@pytest.mark.parametrize(
    ("shape", "only"),
    [*((shape, only) for shape in SHAPES[:-1] for only in (None, 0, 1, 2, 3)), (SHAPES[-1], None)],
)
def test_values_and_gradients(shape, only, small, generator, device, relative_error):
    pred, target, mask = inputs(shape, generator, device)
    ours = pred.clone().requires_grad_()
    check(ours, pred, target, mask, generator, relative_error, only)


def test_tiles_of_the_usual_size(generator, device, relative_error):
    pred, target, mask = inputs((2, 19, 35), generator, device)
    check(pred.clone().requires_grad_(), pred, target, mask, generator, relative_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_calculated_in_float32(dtype, small, generator, device, relative_error):
    pred, target, mask = inputs((2, 5, 6), generator, device, dtype)
    ours, truth = pred.clone().requires_grad_(), pred.double().requires_grad_()
    found, wanted = box_reward(ours, target, mask), oracle(truth, target, mask, 0.5, 0.5)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and float((a - b).detach().abs().max()) < 1e-6
    (found.reward.sum() + found.giou.sum()).backward()
    (wanted[2].sum() + wanted[3].sum()).backward()
    assert ours.grad.dtype == dtype
    # Coarse coordinates tie, and both split a tie evenly; but boxes that touch, without overlap,
    # have no one slope: autograd's clamp takes that of the overlap, the operator none.
    low = torch.maximum(pred[..., :2], target[:, None, :, :2])
    high = torch.minimum(pred[..., 2:], target[:, None, :, 2:])
    apart = (low != high).all(-1)
    assert relative_error(ours.grad[apart], truth.grad[apart]) < 1e-2


def test_float64_has_gradients_of_its_own(generator, device, relative_error):
    pred, target, mask = inputs((2, 3, 4), generator, device, torch.float64)
    ours, truth = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    sum(x.sum() for x in box_reward(ours, target, mask)).backward()
    sum(x.sum() for x in oracle(truth, target, mask, 0.5, 0.5)).backward()
    assert ours.grad.dtype == torch.float64 and relative_error(ours.grad, truth.grad) < 1e-12


def test_a_perfect_match_has_no_slope(device):
    target = torch.tensor([[[0.1, 0.2, 0.5, 0.8]]], device=device)
    pred = target[:, None].clone().requires_grad_()
    found = box_reward(pred, target, torch.ones(1, 1, dtype=torch.bool, device=device))
    assert [x.item() for x in found] == [1, 0, 1, 1]
    sum(x.sum() for x in found).backward()
    assert pred.grad.abs().max() < 1e-6


@pytest.mark.parametrize("side", [1e-3, 1e-10, 1e-20, 1e-40, 1e5, 1e11, 1e30])
def test_no_size_overflows(side, device):
    box, zero = torch.tensor([-side, -side, side, side]), torch.zeros(1)
    sharp = torch.cat((zero, zero, torch.tensor([side, 1.0])))
    pred = torch.stack((box, 0.5 * box, sharp, torch.tensor(UNIT)))[None, :, None]
    pred = pred.to(device).requires_grad_()
    for target in (box, torch.tensor(UNIT)):
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        found = box_reward(pred, target[None, None].to(device), mask)
        assert all(torch.isfinite(x).all() for x in found)
        assert found.iou.min() >= 0 and found.giou.min() >= -1 and found.giou.max() <= 1
        (grad,) = torch.autograd.grad(sum(x.sum() for x in found), pred)
        assert torch.isfinite(grad).all()


def test_broken_boxes_and_padding_have_no_gradient_whatever_comes_from_above(device):
    pred = torch.tensor([[[*BROKEN.values(), UNIT]]], device=device).requires_grad_()
    target = torch.tensor([UNIT] * 6 + [[NAN] * 4], device=device)[None]
    mask = torch.tensor([[True] * 6 + [False]], device=device)
    found = box_reward(pred, target, mask)
    above = [torch.full_like(x, NAN) for x in found]
    (grad,) = torch.autograd.grad(list(found), pred, above)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_empty_batches(device):
    for b, g, k in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        pred = torch.zeros(b, g, k, 4, device=device)
        target, mask = torch.zeros(b, k, 4, device=device), torch.zeros(b, k, device=device) > 0
        found = box_reward(pred, target, mask)
        assert found.iou.shape == (b, g, k) and torch.equal(found.reward, pred.new_zeros(b, g))


def test_repeats_are_bit_equal(small, generator, device):
    pred, target, mask = inputs((2, 7, 11), generator, device)
    first, second = (box_reward(pred, target, mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(generator, device):
    pred, target, mask = inputs((2, 3, 2), generator, device)
    arguments = (pred.requires_grad_(), target, mask, 0.5, 0.5)
    torch.library.opcheck(torch.ops.echogen.box_reward.default, arguments)
    d = torch.rand(2, 3, 2, device=device)
    given = (pred.detach(), target, mask, 0.5, 0.5, d, None, d[..., 0].contiguous(), d)
    torch.library.opcheck(torch.ops.echogen.box_reward_backward.default, given)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched):
    pred, target, mask = inputs((2, 3, 2), generator, device)
    box_reward(pred.requires_grad_(), target, mask).reward.sum().backward()
    assert launched == {"_box_reward_kernel": 1, "_box_reward_backward_kernel": 1}


def test_bad_arguments(device):
    pred, target = torch.zeros(2, 3, 4, 4, device=device), torch.zeros(2, 4, 4, device=device)
    good = {"pred": pred, "target": target, "mask": torch.ones(2, 4, device=device) > 0}
    box_reward(**good)
    for change, match in [
        ({"pred": pred[0]}, r"pred has shape \(3, 4, 4\)"),
        ({"pred": pred.long()}, "pred is torch.int64"),
        ({"pred": pred.transpose(0, 1).contiguous().transpose(0, 1)}, "pred has strides"),
        ({"target": target.transpose(0, 1).contiguous().transpose(0, 1)}, "target has strides"),
        ({"target": target.int()}, "target is torch.int32"),
        ({"mask": good["mask"].float()}, "mask is torch.float32"),
        ({"mask": good["mask"][:, :3]}, "mask has shape"),
        ({"w_iou": -1.0}, r"w_iou = -1"),
        ({"w_l1": NAN}, "w_l1 = nan"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            box_reward(**good | change)
