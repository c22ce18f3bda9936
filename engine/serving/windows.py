"""Draws several codes a step while few images are being drawn.

A step of a few rows leaves most of a CPU's products empty. Windows of drafted codes fill them
(`engine.decoding.jacobi`) as the rows of many images do, and like those they change what is drawn
by rounding at most. When too many images arrive, all are drawn code by code from the next step on
(codes by which an image was ahead of others of its request are drawn again). When enough have
ended, the others continue in windows from where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.engine.decoding.jacobi import Drafted, columns_of
from echogen.engine.serving.crowd import Live
from echogen.engine.serving.slots import Ahead


class Windowed:
    """A `crowd.Drawer` of one request, for steps that are windows.

    Its images advance independently; only codes that all of them have count as drawn.
    """

    def __init__(self, live: Live) -> None:
        request, columns = live.request, columns_of(live.request.tokens)
        if live.drafts is None:
            live.drafts = [Drafted(codes, request.tokens, columns) for codes in request.codes()]
        self.lives, self.rows, self._images = [live], live.held, live.drafts
        self._starts = list[int]()

    def ahead(self, width: int) -> Ahead:
        """What the next window runs for it."""
        drafts = [image.ahead(width) for image in self._images]
        self._starts = [start for start, _ in drafts]
        halves = len(self.rows.numbers) // len(drafts)
        offsets = [start - self.lives[0].request.drawn for start in self._starts]
        return Ahead(self.rows.numbers, [codes for _, codes in drafts] * halves, offsets * halves)

    def draw(self, logits: Tensor) -> list[Tensor]:
        """See `Drawer`; from logits [R, W, V], codes int64 [N, n], at least one per image."""
        request, images = self.lives[0].request, self._images
        positions = torch.tensor(self._starts)[:, None] + torch.arange(logits.shape[1])
        samples = request.sampler.pick(request.sampler.scores(logits, positions), positions)
        for image, start, row in zip(images, self._starts, samples.tolist(), strict=True):
            image.take(start, row)
        end = min(image.done for image in images)
        return [torch.tensor([image.codes[request.drawn : end] for image in images])]
