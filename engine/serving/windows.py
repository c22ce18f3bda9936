"""Drawing several codes a step while few images are drawn.

A step of a few rows leaves most of a CPU's products empty. Windows of drafted codes fill them
(`engine.decoding.jacobi`) as a crowd's rows do, and like those they change what is drawn by
rounding at most. When too many come, from the next step on all are drawn code by code (codes by
which an image was ahead of others of its request are drawn again); when enough have gone, the
others go on in windows from where they stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.engine.decoding.jacobi import Drafted, columns_of
from echogen.engine.serving.crowd import Live
from echogen.engine.serving.slots import Ahead


class Windowed:
    """A `crowd.Drawer` of one request, for steps that are windows.

    Its images get on by themselves; what counts as drawn is what all of them have.
    """

    def __init__(self, live: Live) -> None:
        request, columns = live.request, columns_of(live.request.tokens)
        if live.drafts is None:
            live.drafts = [Drafted(codes, request.tokens, columns) for codes in request.codes()]
        self.lives, self.rows, self._images = [live], live.held, live.drafts
        self._starts = list[int]()

    def ahead(self, width: int) -> Ahead:
        """What the next window runs of it."""
        drafts = [image.ahead(width) for image in self._images]
        self._starts = [start for start, _ in drafts]
        halves = len(self.rows.numbers) // len(drafts)
        offsets = [start - self.lives[0].request.drawn for start in self._starts]
        return Ahead(self.rows.numbers, [codes for _, codes in drafts] * halves, offsets * halves)

    def draw(self, logits: Tensor) -> list[Tensor]:
        """See `Drawer`, from logits [R, W, V]: codes int64 [N, n], one at least of each image."""
        request, images = self.lives[0].request, self._images
        positions = torch.tensor(self._starts)[:, None] + torch.arange(logits.shape[1])
        samples = request.sampler.pick(request.sampler.scores(logits, positions), positions)
        for image, start, row in zip(images, self._starts, samples.tolist(), strict=True):
            image.take(start, row)
        end = min(image.done for image in images)
        return [torch.tensor([image.codes[request.drawn : end] for image in images])]
