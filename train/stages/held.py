"""What Cycle RL keeps of a rollout while it is in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


WHOLE = Portion(1.0, 1.0, 1.0, 1.0, 1.0)


@dataclass
class Held:
    """A rollout in use, packed for scoring.

    Attributes:
        index: the rollout's number in the run.
        drawn, unconditional, asked: L2I sequences, the same with unconditional prompts (under
            guidance), and I2L ones; None if the policy does not need them.
        sampled: log-probabilities of the policy's tokens under the sampler, [N, S].
        mask: bool [N, S].
        credit: which of these tokens share an advantage.
        portion: the rollout's share of its step.
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
    portion: Portion = WHOLE
    old: Tensor | None = None
    gap: Tensor | None = None
    reference: Tensor | None = None
