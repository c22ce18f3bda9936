"""The order in which a run goes through its training samples, as a function of (seed, step).

With independent choices, an epoch's worth of steps misses 1/e of the samples, 37%.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig
from echogen.train.stages import keys

T = TypeVar("T")


def picked(
    samples: Sequence[T],
    size: int,
    step: int,
    config: PMTPConfig | DJOConfig | CycleRLConfig,
    use: int,
    rng: np.random.Generator,
) -> list[T]:
    """The samples of a step's batch; all batches of a run have one ``size``.

    In epochs, each epoch has all samples in an order of its own, one epoch follows another, and
    batch k takes places k·size to (k + 1)·size − 1. So a batch may cross the end of an epoch, or be
    larger than one.

    Args:
        samples: at least one.
        step: k; in Cycle RL the number of the rollout.
        config: the order and the seed.
        use: of the epochs' orders, see `keys`.
        rng: the batch's generator. Independent choices are the first that it draws; epochs draw
            nothing from it.
    """
    if config.order == "independent":
        return [samples[i] for i in rng.integers(len(samples), size=size)]
    places, first = list[int](), step * size
    while len(places) < size:
        epoch, begin = divmod(first + len(places), len(samples))
        order = _shuffled(config.loop.seed, use, epoch, len(samples))
        places += order[begin : begin + size - len(places)].tolist()
    return [samples[i] for i in places]


@lru_cache(maxsize=2)  # a batch that crosses the end of an epoch is made once for each of its parts
def _shuffled(seed: int, use: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, int64 [count]."""
    return keys.generator(seed, use, epoch).permutation(count)
