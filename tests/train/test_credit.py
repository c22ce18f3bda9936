"""Whose advantage a token gets, against loops over images, objects and tokens."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels.cycle_reward import cycle_reward
from echogen.train.stages.credit import EPS, by_image, by_object, cells, object_tokens

BINS, FIRST = 17, 5


def test_cells_are_those_whose_centre_is_inside() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.3, 0.1, 0.6, 0.4], [0.0, 0.0, 1.0, 1.0]])
    found = cells(boxes, 2, 4).view(3, 2, 4)
    assert found[0].tolist() == [[True, True, False, False]] * 2
    assert found[1].tolist() == [[False, True, False, False], [False] * 4]
    assert found[2].all()


@pytest.mark.parametrize("box", [(0.51, 0.51, 0.52, 0.52), (0.99, 0.0, 1.0, 0.01)])
def test_a_box_between_centres_has_the_cell_that_holds_it(box) -> None:
    found = cells(torch.tensor(box), 8, 8).view(8, 8)
    x, y = int((box[0] + box[2]) / 2 * 8), int((box[1] + box[3]) / 2 * 8)
    assert found.sum() == 1 and found[y, x]


def scored(seed: int):
    """Targets of three layouts with one to three objects, and what was found in 4 images each."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    low = torch.randint(0, 9, (3, 3, 2), generator=generator)
    size = torch.randint(2, 8, (3, 3, 2), generator=generator)
    target = torch.cat([low, low + size], -1) / (BINS - 1)
    found = torch.randint(0, BINS, (3, 4, 3, 4), generator=generator) + FIRST
    return cycle_reward(found, target, there, FIRST, BINS, 0.75, 0.25), target, there


@pytest.mark.parametrize("policy", ["image", "boxes", "both"])
def test_an_object_answers_for_its_own_tokens(policy) -> None:
    score, target, there = scored(3)
    grid, answers = None if policy == "boxes" else (4, 4), policy != "image"
    tokens = object_tokens(target, there, grid, answers)
    credit = by_object(score, tokens, there, 0.75, 0.25, "grpo")
    row = 0
    for b in range(3):
        for g in range(4):
            rest = torch.ones(16, dtype=torch.bool)
            for k in range(3):
                if not there[b, k]:
                    continue
                d = 0.75 * (1 - score.iou[b, :, k]) + 0.25 * score.l1[b, :, k]
                wanted = (d.mean() - d[g]) / (d.std(correction=0) + EPS)
                torch.testing.assert_close(credit.advantage[row], wanted, atol=1e-5, rtol=1e-5)
                own = []
                if policy != "boxes":
                    own.append(cells(target[b, k], 4, 4))
                    rest &= ~own[0]
                if answers:
                    own.append(torch.arange(12) // 4 == k)
                assert credit.image[row] == 4 * b + g
                assert torch.equal(credit.mask[row], torch.cat(own))
                row += 1
            if policy != "boxes" and rest.any():
                assert credit.advantage[row] == 0 and torch.equal(credit.mask[row, :16], rest)
                assert not credit.mask[row, 16:].any()
                row += 1
    assert row == len(credit.image)


def test_a_better_drawn_object_is_reinforced_whatever_the_others_do() -> None:
    there = torch.ones(1, 2, dtype=torch.bool)
    target = torch.tensor([[[0, 0, 8, 8], [8, 8, 16, 16]]]) / (BINS - 1)
    good, bad, away = [0, 0, 8, 8], [4, 4, 8, 8], [0, 8, 8, 16]
    found = torch.tensor([[[good, away], [bad, [8, 8, 16, 16]]]]) + FIRST
    score = cycle_reward(found, target, there, FIRST, BINS)
    mask = torch.ones(2, 16, dtype=torch.bool)
    tokens = object_tokens(target, there, (4, 4), False)
    credit = by_object(score, tokens, there, 0.5, 0.5, "grpo")
    assert credit.advantage.sign().view(2, 3).tolist() == [[1, -1, 0], [-1, 1, 0]]
    whole = by_image(score, mask)
    assert whole.rows(torch.arange(32.0).view(2, 16)).shape == (2, 16)
    assert whole.advantage.sign().tolist() == [-1, 1]  # for all tokens, the good circle's too
