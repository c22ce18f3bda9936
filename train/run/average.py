"""A moving average of the weights, which is evaluated and exported in their place.

Late in a run the weights circle around the point they approach; their average lies nearer to it
(Polyak & Juditsky 1992). With a learning rate that falls to zero there is less to gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from echogen.train.run.weights import check_fits


class Average:
    """Exponential moving average of a module's trained parameters.

    In the first steps the decay is smaller than ``decay``, or the initial weights would stay in the
    average for 1/(1 − decay) steps: after n steps it is at most (1 + n)/(10 + n).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._now = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._mean = {n: p.detach().clone() for n, p in self._now.items()}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Add the weights after ``done`` steps to the average."""
        decay = min(self._decay, (1 + done) / (10 + done))
        for name, p in self._now.items():
            self._mean[name].lerp_(p, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the module has the average as its weights; afterwards its own are
        restored."""
        with torch.no_grad():
            kept = {n: p.detach().clone() for n, p in self._now.items()}
            self._fill(self._mean)
        try:
            yield
        finally:
            with torch.no_grad():
                self._fill(kept)

    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._now.items():
            p.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""
        return dict(self._mean)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a state. Raises StateError if it is not of these parameters."""
        check_fits("the run's moving average", state, self._mean, frozenset())
        for name, mean in self._mean.items():
            mean.copy_(state[name])
