"""The whole cycle's reward is its pieces, to the last bit, and reads tokens as the codec does."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import echogen.engine
from echogen.engine.prompt import LocationCodec, location_token
from echogen.kernels import boxes, dispatch
from echogen.kernels import group_advantage as advantage
from echogen.kernels.boxes import box_reward
from echogen.kernels.cycle_reward import cycle_reward
from echogen.kernels.group_advantage import group_advantage

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 7, 2), (2, 11, 11)]
"""Layouts, samples, boxes: ones, primes, and (in tiles of 2 × 4, groups of 4) three ragged tiles
and blocks on every axis."""
FIRST, BINS = 1000, 33


class Vocabulary:
    """All that the codec asks of a tokenizer."""

    def get_vocab(self):
        return {location_token(i): FIRST + i for i in range(BINS)} | {"<box>": 7}


@pytest.fixture
def small(monkeypatch):
    """Tiles of 2 samples by 4 boxes, groups in blocks of 4."""
    for module, name, size in ((boxes, "BOXES", 4), (boxes, "TILE", 8), (advantage, "SAMPLES", 4)):
        monkeypatch.setattr(module, name, size)


def inputs(shape, generator, device, dtype=torch.float32):
    """Half of the boxes as a grammar would have them, the rest of any locations, and in places
    tokens that are no location at all."""
    b, _, k = shape
    tokens = FIRST + torch.randint(0, BINS, (*shape, 4), generator=generator)
    tokens = torch.where(torch.rand(*shape, 1, generator=generator) < 0.5, spelt(tokens), tokens)
    strange = torch.tensor([0, FIRST - 1, FIRST + BINS, -1, 2**62, -(2**62), 2**32 + FIRST + 5])
    strange = strange[torch.randint(0, len(strange), tokens.shape, generator=generator)]
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.03, strange, tokens)
    low = 0.6 * torch.rand(b, k, 2, generator=generator)
    target = torch.cat((low, low + 0.3), -1)
    mask = torch.rand(b, k, generator=generator) < 0.8
    return tokens.to(device), target.to(device, dtype), mask.to(device)


def spelt(tokens):
    x, y = (tokens[..., i::2].sort(-1).values for i in (0, 1))
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def parsed(tokens, dtype=torch.float32):
    """The codec's own boxes, one by one; NaN for none."""
    codec = LocationCodec(Vocabulary(), BINS)
    found = [codec.parse(ids) or [float("nan")] * 4 for ids in tokens.view(-1, 4).tolist()]
    return torch.tensor(found, dtype=dtype).view(tokens.shape).to(tokens.device)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(), b.nan_to_num()
    )  # fmt: skip


def check(tokens, target, mask, dtype, **rest):
    weights = {"w_iou": 0.3, "w_l1": 0.6}
    found = cycle_reward(tokens, target, mask, FIRST, BINS, **weights, **rest)
    recovered = parsed(tokens, dtype)
    piece = box_reward(recovered, target, mask, **weights)
    group = group_advantage(piece.reward, **rest)
    wanted = (recovered, piece.iou, piece.l1, piece.reward, group.advantage, group.flat)
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        assert same(a, b), name
    return found


@pytest.mark.parametrize("mode", advantage.MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_its_pieces(mode, shape, small, generator, device):
    tokens, target, mask = inputs(shape, generator, device)
    check(tokens, target, mask, torch.float32, mode=mode, eps=0.01)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 300, 3), (1, 5, 50)])
def test_equal_to_its_pieces_in_tiles_of_the_usual_size(shape, generator, device):
    check(*inputs(shape, generator, device), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_targets_of_other_types(dtype, small, generator, device):
    tokens, target, mask = inputs((2, 7, 6), generator, device, dtype)
    check(tokens, target, mask, torch.float64 if dtype == torch.float64 else torch.float32)


def test_by_hand(device):
    """Bins 0 … 32: a perfect answer, half of it, a box upside down, and no locations."""
    answers = [[8, 8, 24, 24], [8, 8, 24, 16], [8, 24, 24, 8], [8, 8, 24, -7]]
    tokens = FIRST + torch.tensor(answers, device=device)[None, :, None]
    target = torch.tensor([[[0.25, 0.25, 0.75, 0.75]]], device=device)
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    found = cycle_reward(tokens, target, mask, FIRST, BINS, mode="dr_grpo")
    nan = float("nan")
    wanted = [[0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.5], [nan] * 4, [nan] * 4]
    assert same(found.boxes[0, :, 0], torch.tensor(wanted, device=device))
    assert found.iou.flatten().tolist() == [1, 0.5, 0, 0]
    assert found.l1.flatten().tolist() == [0, 0.0625, 1, 1]
    reward = torch.tensor([1, 1 - 0.5 * (0.5 + 0.0625), 0, 0], device=device)
    torch.testing.assert_close(found.reward[0], reward)
    torch.testing.assert_close(found.advantage[0], reward - reward.mean())
    assert found.flat.tolist() == [False]


def test_what_the_codec_writes_is_read(small, device):
    """Every box a codec can write comes back as the codec itself reads it."""
    codec, draw = LocationCodec(Vocabulary(), BINS), random.Random(0)
    vocabulary, ids = Vocabulary().get_vocab(), []
    for _ in range(24):
        (x1, x2), (y1, y2) = (sorted(draw.uniform(0, 1) for _ in range(2)) for _ in range(2))
        text = codec.text((x1, y1, x2, y2))
        ids.append([vocabulary[f"<{name}"] for name in text.split("<")[1:]])
    tokens = torch.tensor(ids, device=device).view(2, 3, 4, 4)
    target = parsed(tokens)[:, 0].contiguous()
    mask = torch.ones(2, 4, dtype=torch.bool, device=device)
    found = check(tokens, target, mask, torch.float32)
    assert found.boxes.isfinite().all()
    torch.testing.assert_close(found.reward[:, 0], torch.ones(2, device=device))


def test_location_tokens_of_the_bundled_model_follow_each_other():
    """`first_location` and a count say which they are."""
    folder = Path(echogen.engine.__file__).parent / "models" / "tiny"
    vocabulary = {}
    for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
    bins = sum(name.startswith("<loc_") for name in vocabulary)
    ids = [vocabulary[location_token(i)] for i in range(bins)]
    assert bins > 1 and ids == list(range(ids[0], ids[0] + bins))


def test_flat_layouts_and_padding(small, device):
    tokens = torch.zeros(2, 5, 3, 4, dtype=torch.int64, device=device)
    target = torch.full((2, 3, 4), float("nan"), device=device)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    found = cycle_reward(tokens, target, mask, FIRST, BINS)
    assert found.flat.all() and found.boxes.isnan().all()
    for x in (found.iou, found.l1, found.reward, found.advantage):
        assert torch.equal(x, torch.zeros_like(x))


def test_empty_batches(device):
    for b, g, k in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        tokens = torch.zeros(b, g, k, 4, dtype=torch.int64, device=device)
        target, mask = torch.zeros(b, k, 4, device=device), torch.zeros(b, k, device=device) > 0
        found = cycle_reward(tokens, target, mask, FIRST, BINS)
        assert found.reward.shape == (b, g) and found.flat.tolist() == [True] * b
        assert torch.equal(found.advantage, torch.zeros_like(found.reward))


def test_repeats_are_bit_equal(small, generator, device):
    given = inputs((2, 11, 11), generator, device)
    first, second = (cycle_reward(*given, FIRST, BINS) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_a_target_that_has_a_gradient_gives_none(generator, device):
    tokens, target, mask = inputs((2, 3, 2), generator, device)
    found = cycle_reward(tokens, target.requires_grad_(), mask, FIRST, BINS)
    assert not any(x.requires_grad for x in found)


def test_opcheck(generator, device):
    _, target, mask = inputs((2, 3, 2), generator, device)
    # Boxes all: opcheck takes NaN for a difference.
    low = torch.randint(0, BINS // 2, (2, 3, 2, 2), generator=generator).to(device)
    tokens = FIRST + torch.cat((low, low + 1 + BINS // 3), -1)
    arguments = (tokens, target, mask, FIRST, BINS, 0.5, 0.5, "grpo", 1e-6)
    torch.library.opcheck(torch.ops.echogen.cycle_reward.default, arguments)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_it_is_one_launch(generator, device, launched):
    cycle_reward(*inputs((2, 3, 2), generator, device), FIRST, BINS)
    assert launched == {"_cycle_reward_kernel": 1}


def test_bad_arguments(device):
    tokens = torch.zeros(2, 3, 4, 4, dtype=torch.int64, device=device)
    good = {"tokens": tokens, "target": torch.zeros(2, 4, 4, device=device),
            "mask": torch.ones(2, 4, device=device) > 0, "first_location": 5,
            "bins": 1000}  # fmt: skip
    cycle_reward(**good)
    for change, match in [
        ({"tokens": tokens.int()}, "tokens is torch.int32"),
        ({"tokens": tokens[..., :3]}, r"tokens has shape \(2, 3, 4, 3\)"),
        ({"tokens": tokens.transpose(0, 1).contiguous().transpose(0, 1)}, "tokens has strides"),
        ({"target": good["target"][:, :2]}, "target has shape"),
        ({"target": good["target"].long()}, "target is torch.int64"),
        ({"mask": good["mask"][:1]}, "mask has shape"),
        ({"mask": good["mask"].int()}, "mask is torch.int32"),
        ({"first_location": -1}, "first_location = -1"),
        ({"bins": 1}, "bins = 1"),
        ({"bins": 1 << 25}, "bins = 33554432"),
        ({"w_iou": float("inf")}, "w_iou = inf"),
        ({"w_l1": -0.5}, "w_l1 = -0.5"),
        ({"mode": "ppo"}, "mode = 'ppo'"),
        ({"eps": -1.0}, "eps = -1"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            cycle_reward(**good | change)
