"""The keyed noise is Philox-4x32-10, is Gumbel, and depends on its key words alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from echogen.kernels.philox import gumbel_noise
from echogen.kernels.reference import philox as reference

# Random123's published known answers for philox4x32 with 10 rounds: counter, key, result.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
    counter, key, wanted = KNOWN[name]
    found = reference.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in found) == wanted


def test_seed_draw_position_and_column_are_the_documented_words():
    """Counter (column // 4, position, draw, stream); a 64-bit seed is the key, low word first."""
    (_, position, draw, stream), (low, high), _ = KNOWN["pi"]
    seed, row = low | high << 32, (torch.tensor(draw), torch.tensor(position))
    noise = gumbel_noise(seed, *row, 14, stream)
    for block in range(4):
        counter = tuple(torch.tensor(c) for c in (block, position, draw, stream))
        words = [int(w) for w in reference.philox4x32(counter, (low, high))]
        uniform = [((word >> 9) + 0.5) * 2.0**-23 for word in words]
        wanted = torch.tensor([-math.log(-math.log(u)) for u in uniform])
        found = noise[4 * block : 4 * block + 4]
        torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", [0, 1, 511, 512, 0x7FFFFFFF, 0x80000000, 0xFFFFFDFF, 0xFFFFFFFF])
def test_uniforms_are_strictly_inside(monkeypatch, word):
    def constant(counter, key, rounds=10):
        return (torch.full_like(torch.broadcast_tensors(*counter)[0], word),) * 4

    monkeypatch.setattr(reference, "philox4x32", constant)
    zero = torch.tensor([0])
    u = reference.uniform(0, zero, zero, 5)
    assert u.dtype == torch.float32 and ((u > 0) & (u < 1)).all()
    assert torch.isfinite(reference.gumbel(0, zero, zero, 5)).all()
    assert u[0, 0].item() == ((word >> 9) + 0.5) * 2.0**-23


def test_every_implementation_gives_the_same_noise(device, generator):
    """Up to the rounding of two logarithms, over words of all sizes."""
    draw, position = (torch.randint(0, 2**32, (70,), generator=generator) for _ in range(2))
    draw[0], position[0] = 2**32 - 1, 2**32 - 1
    seed = 2**63 - 1 - int(torch.randint(0, 2**40, (), generator=generator))
    found = gumbel_noise(seed, draw.to(device), position.to(device), 1029, stream=3)
    wanted = reference.gumbel(torch.tensor([seed]), draw, position, 1029, 3)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_the_batch():
    draw = torch.tensor([5, 0, 2**32 - 1, 17])
    position = torch.tensor([0, 3, 575, 2**31])
    together = gumbel_noise(9, draw, position, 10)
    assert together.shape == (4, 10) and together.dtype == torch.float32
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(gumbel_noise(9, draw[order], position[order], 10), together[order])
    for i in range(4):
        assert torch.equal(gumbel_noise(9, draw[i], position[i], 10), together[i])


def test_positions_in_parallel_are_positions_one_by_one():
    draws, positions = torch.arange(3), torch.arange(7)
    grid = gumbel_noise(1, draws, positions[:, None], 6)
    assert grid.shape == (7, 3, 6)
    for p in range(7):
        assert torch.equal(gumbel_noise(1, draws, torch.tensor(p), 6), grid[p])


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 33])
def test_a_narrower_row_is_the_beginning_of_a_wider_one(columns):
    draw, position = torch.arange(3), torch.arange(3)
    wide = gumbel_noise(2, draw, position, 64)
    assert torch.equal(gumbel_noise(2, draw, position, columns), wide[:, :columns])


def test_every_word_of_the_key_matters():
    zero, one = torch.tensor(0), torch.tensor(1)
    rows = [
        gumbel_noise(0, zero, zero, 8),
        gumbel_noise(1, zero, zero, 8),
        gumbel_noise(1 << 32, zero, zero, 8),
        gumbel_noise(0, one, zero, 8),
        gumbel_noise(0, zero, one, 8),
        gumbel_noise(0, zero, zero, 8, stream=1),
    ]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_the_noise_is_standard_gumbel():
    noise = gumbel_noise(123, torch.arange(50), torch.arange(40)[:, None], 50).flatten().double()
    count = len(noise)
    assert count == 100_000 and torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772156649) < 4 * math.pi / math.sqrt(6 * count)
    # The fourth central moment of a Gumbel variable is 5.4 variances squared.
    variance = math.pi**2 / 6
    assert abs(noise.var().item() - variance) < 4 * variance * math.sqrt(4.4 / count)
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 0.01


def test_neighbours_are_independent():
    noise = gumbel_noise(7, torch.arange(64), torch.arange(64)[:, None], 64)
    pairs = {
        "draws": (noise[:, :-1], noise[:, 1:]),
        "positions": (noise[:-1], noise[1:]),
        "columns": (noise[..., :-1], noise[..., 1:]),
    }
    for axis, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), axis


def test_no_columns_is_refused():
    with pytest.raises(ValueError, match="columns = 0"):
        gumbel_noise(0, torch.tensor(0), torch.tensor(0), 0)
