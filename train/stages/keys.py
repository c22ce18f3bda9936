"""The randomness of a run: every number drawn is a function of (seed, step, place in the batch).

So a resumed run repeats an uninterrupted one without a stored random state. Each use has its own
number, so that no two uses share noise. Numbers 0 to 2 are reserved: scenes are drawn with (seed,
split, place), and these are the three splits. One use has no number: `layouts_of` draws the wording
of an evaluation's layouts with (seed, place). As NumPy pads a short seed with zeros, places 0 to 2
have the bits of the splits' first scenes, and later places those of the uses below at step 0. This
stays, because the committed evaluations have this wording.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PMTP_BATCH, VALIDATION, DJO_BATCH, DJO_NOISE, RL_BATCH, RL_NOISE, RL_JUDGED = range(3, 10)
LAYOUTS, LLM_REQUESTS = 10, 11  # of `echogen layouts`
PMTP_ORDER, DJO_ORDER, RL_ORDER = range(12, 15)
"""Of the samples, epoch by epoch: here an epoch takes the place of a step."""


def generator(seed: int, use: int, step: int = -1) -> np.random.Generator:
    """The generator of one use at one step, or of a use that has no steps."""
    return np.random.default_rng((seed, use) if step < 0 else (seed, use, step))


def noise_key(seed: int, use: int) -> int:
    """Key of `philox` noise: the run's seed in the low word, the use in the high one.

    Raises:
        ValueError: a seed outside 0 … 2³² − 1.
    """
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed = {seed}; it must be in 0 … 2^32 - 1")
    return use << 32 | seed


def draw_ids(step: int, per_step: int) -> Tensor:
    """Draw ids int64 [per_step] of a step's samples, by their place in the global batch: unique
    within the run, and the same however the batch is split.

    Raises:
        ValueError: the run has more samples than there are ids.
    """
    first = step * per_step
    if first + per_step > 1 << 32:
        raise ValueError(f"step {step} of {per_step} samples is beyond the 2^32 draws of a run")
    return torch.arange(first, first + per_step)
