"""Overlap and reward are what a plain calculation over Python floats says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    iou, l1, reward = box_reward(
        torch.tensor(pred, dtype=torch.float64),
        torch.tensor(target, dtype=torch.float64),
        torch.tensor(mask),
        w_iou,
        w_l1,
    )
    assert iou.shape == l1.shape == (b, g, k) and reward.shape == (b, g)
    for i in range(b):
        for j in range(g):
            kept = []
            for n in range(k):
                pair = pred[i][j][n], target[i][n]
                wanted = (plain_iou(*pair), plain_l1(*pair)) if mask[i][n] else (0.0, 0.0)
                assert (iou[i, j, n].item(), l1[i, j, n].item()) == pytest.approx(wanted)
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
    iou, l1, reward = box_reward(pred, target, mask)
    assert (iou.item(), l1.item(), reward.item()) == (0, 1, 0)
    assert box_iou(pred[0, 0], pred[0, 0]).item() == 0


def test_padding_contributes_nothing_whatever_it_holds():
    target = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [NAN] * 4], [[NAN] * 4, [INF] * 4]])
    pred = torch.tensor([[[[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3]]], [[[NAN] * 4, UNIT]]])
    mask = torch.tensor([[True, False], [False, False]])
    iou, l1, reward = box_reward(pred, target, mask)
    assert iou.tolist() == [[[1, 0]], [[0, 0]]]
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
