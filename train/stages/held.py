"""What Cycle RL keeps of a rollout while it is in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from echogen.train.data.packing import Batch
from echogen.train.stages.credit import Credit
from echogen.train.stages.rollouts import Rollout


class Portion(NamedTuple):
    """The shares that a part of a step has in it: of the layouts (and of their images), of their
    boxes, of the policy's tokens, and of the rows of `Credit` and the tokens in these."""

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
        index: which of the run it is.
        drawn, unconditional, asked: L2I sequences, the same behind unconditional prompts (with
            guidance), and I2L ones; None where the policy does not need them.
        sampled: log-probabilities of the policy's tokens by the sampler, [N, S].
        mask: bool [N, S].
        credit: which of these tokens share an advantage.
        portion: what the rollout is of its step's.
        old: those of the trainer before the first update; None until then.
        gap: mean absolute difference of the two.
        reference: those of the frozen reference, which no update changes; None without one.
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
