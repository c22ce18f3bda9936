"""What Cycle RL keeps of a rollout while it is in use.

A process draws all its parts of a step at once (`Share`): every step of a drawing reads the
weights, whatever the number of images. Each part is then packed when its turn comes (`Held`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from echogen.train.data.packing import Batch
from echogen.train.stages.credit import Credit
from echogen.train.stages.rollouts import Rollout


class Portion(NamedTuple):
    """A part's share of its step: of the layouts (and their images), of their boxes, of the
    policy's tokens, of the rows of `Credit`, and of the tokens in these rows."""

    layouts: float
    boxes: float
    tokens: float
    rows: float
    row_tokens: float


@dataclass(frozen=True)
class Share:
    """What a process draws of a step's rollout.

    Attributes:
        index: the rollout's number in the run.
        parts: the parts that it takes; their layouts follow one another.
        rollout: of these layouts.
        codes, tokens: the images' codes int64 [N, T] and the boxes' tokens int64 [N, K, 4], on the
            host. They are copied once, as a copy for each part would wait for the update on the
            part before it.
        sizes: of the whole step, what a `Portion` is a share of, float64 [5].
    """

    index: int
    parts: range
    rollout: Rollout
    codes: np.ndarray
    tokens: Tensor
    sizes: np.ndarray

    def of(self, part: int) -> tuple[Rollout, np.ndarray, Tensor]:
        """A part's rollout, codes and tokens."""
        each, place = len(self.rollout.layouts) // len(self.parts), self.parts.index(part)
        rollout = self.rollout.of(place * each, (place + 1) * each)
        images = slice(place * each * rollout.group, (place + 1) * each * rollout.group)
        return rollout, self.codes[images], self.tokens[images]


@dataclass
class Held:
    """A part of a rollout in use, packed for scoring.

    Attributes:
        index: the rollout's number in the run.
        rollout: of the part's layouts.
        drawn, unconditional, asked: L2I sequences, the same with unconditional prompts (under
            guidance), and I2L ones; None if the policy does not need them.
        sampled: log-probabilities of the policy's tokens under the sampler, [N, S].
        mask: bool [N, S].
        credit: which of these tokens share an advantage.
        portion: the part's share of its step.
        old: log-probabilities under the trainer before the first update; None until then.
        gap: mean absolute difference between sampler and trainer.
        reference: log-probabilities under the frozen reference, which no update changes; None
            without one.
    """

    index: int
    rollout: Rollout
    drawn: Batch | None
    unconditional: Batch | None
    asked: Batch | None
    sampled: Tensor
    mask: Tensor
    credit: Credit
    portion: Portion
    old: Tensor | None = None
    gap: Tensor | None = None
    reference: Tensor | None = None
