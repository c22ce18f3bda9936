"""Drawing a request of one image that has the scheduler to itself: several codes a step.

A step of one row or two leaves most of a CPU's products empty. Windows of drafted codes fill them
(`echogen.engine.jacobi`), as a crowd's rows do, and like those they change what is drawn by rounding
at most: whoever comes, from the next step on both are drawn code by code, and whoever is left alone
goes on in windows from where it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.engine.jacobi import Drafted, columns_of, default_window
from echogen.engine.serving.crowd import Live
from echogen.engine.slots import Slots


def window_shapes(tokens: int) -> list[tuple[int, int]]:
    """Rows and codes of the windows of an image of so many ``tokens``, without guidance and with
    it. The last code is drawn and never run."""
    shapes = [(1 + guided, min(default_window(guided), tokens - 1)) for guided in (False, True)]
    return [(rows, codes) for rows, codes in shapes if codes > 1]


class Windowed:
    """A `crowd.Drawer` of a single request, with a step of its own."""

    def __init__(self, live: Live) -> None:
        request = live.request
        self.lives, self.rows = [live], live.held
        self._image = Drafted(request.codes(), request.tokens, columns_of(request.tokens))
        self._width = dict(window_shapes(request.tokens))[request.rows]
        self._start = 0

    def step(self, slots: Slots) -> Tensor:
        """Run the next window; its image logits [R, W, V]."""
        self._start, codes = self._image.ahead(self._width)
        return slots.window(self.rows, torch.tensor([codes]), self._image.done - self._start)

    def draw(self, logits: Tensor) -> list[Tensor]:
        """See `Drawer`, of what ``step`` gave: codes int64 [1, n], one at least."""
        sampler, image, before = self.lives[0].request.sampler, self._image, self._image.done
        positions = torch.arange(self._start, self._start + logits.shape[1])[None]
        samples = sampler.pick(sampler.scores(logits, positions), positions)
        image.take(self._start, samples[0].tolist())
        return [torch.tensor([image.codes[before : image.done]])]
