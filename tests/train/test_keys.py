"""The randomness of a run: no two samples share noise, and nothing depends on what came before."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels.philox import gumbel_noise
from echogen.train.data.shapes import SPLITS
from echogen.train.stages import keys


def test_draw_ids_are_unique_over_a_run_and_follow_from_the_place() -> None:
    ids = torch.cat([keys.draw_ids(step, 7) for step in range(50)])
    assert ids.tolist() == list(range(350))
    whole = keys.draw_ids(12, 8)
    # Two processes of four samples each draw what one of eight does.
    assert torch.equal(torch.cat((whole[:4], whole[4:])), keys.draw_ids(12, 8))
    with pytest.raises(ValueError, match=r"step 1073741824 of 4 samples is beyond the 2\^32 draws"):
        keys.draw_ids(1 << 30, 4)


def test_uses_and_seeds_have_noise_of_their_own() -> None:
    draws, place = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    noise = {
        (seed, use): gumbel_noise(keys.noise_key(seed, use), draws, place, 16)
        for seed in (0, 1)
        for use in (keys.DJO_NOISE, keys.RL_NOISE, keys.RL_JUDGED)
    }
    rows = torch.cat(list(noise.values()))
    assert len(rows.unique(dim=0)) == len(rows)
    with pytest.raises(ValueError, match="seed = -1"):
        keys.noise_key(-1, keys.RL_NOISE)


def test_no_use_has_the_number_of_a_split() -> None:
    """Scenes are drawn with (seed, split, place), batches with (seed, use, step)."""
    uses = [value for name, value in vars(keys).items() if name.isupper()]
    assert len(set(uses)) == len(uses) > 0
    assert not set(uses) & set(range(len(SPLITS)))


def test_a_generator_follows_from_seed_use_and_step() -> None:
    draws = {
        (seed, use, step): keys.generator(seed, use, step).integers(1 << 40)
        for seed in (0, 1)
        for use in (keys.DJO_BATCH, keys.RL_BATCH)
        for step in range(4)
    }
    assert len(set(draws.values())) == len(draws)
    assert keys.generator(1, keys.RL_BATCH, 3).integers(1 << 40) == draws[1, keys.RL_BATCH, 3]
