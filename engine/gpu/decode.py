"""Drawing on a GPU: the plain transformer runs the prompts once, then a recorded step draws each
code, without Python for each layer and without waiting for the device.

The keys and values of each distinct prompt are in memory once, however many rows continue it, and
are read once per step for all of them; rows store only their own codes. Prompts are padded on the
right, where causal attention never looks, so a drawing does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

import torch
from torch import Tensor

from echogen.engine.decoding.padded import run_padded
from echogen.engine.decoding.sampler import Sampler
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import Step as Run
from echogen.engine.gpu.step import Choice, DeviceStep, S, Shape, recorded, unrecorded
from echogen.engine.ranges import span

TOGETHER = 32
"""Prompts run at once: their activations are small compared with the caches of a drawing."""


class Prompted(Generic[S]):
    """The prompts of a drawing on the device, and the step that continues them. All drawings on one
    model share its memory: hold ``model.lock``, finish one drawing before the next begins, and draw
    all of them on one stream, whose order keeps them apart.

    Args:
        model: runs the steps.
        prompts: of R sequences, with guidance R = 2N, the conditional ones first.
        guided: whether there is guidance.
        share: store equal prompts once; False stores a copy per sequence, for comparisons.
    """

    _step: S

    def __init__(
        self,
        model: DeviceTransformer,
        prompts: list[list[int]],
        guided: bool,
        share: bool = True,
    ) -> None:
        self._model, self._rows, self._guided = model, len(prompts), guided
        self._images = len(prompts) // 2 if guided else len(prompts)
        found: dict[object, int] = {}
        keys = [tuple(p) if share else row for row, p in enumerate(prompts)]
        self._groups = [found.setdefault(key, len(found)) for key in keys]
        self._different = list(dict(zip(self._groups, prompts, strict=True)).values())

    def shape(self, window: int = 1, columns: int = 1) -> Shape:
        """The shape of the step that continues the prompts."""
        return Shape.of(self._rows, self._guided, self._different, window, columns)

    def open(self) -> None:
        """Begin the drawing in the step's memory."""
        # The unconditional sequences begin after all images of the step, idle ones included.
        behind = self._step.shape.images - self._images
        images = self._images
        self._places = [row if row < images else row + behind for row in range(self._rows)]
        self._step.open(self._places, self._groups, [len(p) for p in self._different])

    @property
    def held(self) -> int:
        """Prompt tokens in the cache; each distinct prompt counts once."""
        return sum(map(len, self._different))

    def _prompt_logits(self) -> Tensor:
        """Run the prompts; return the image logits [P, V] of their last tokens."""
        found = list[Tensor]()
        for first in range(0, len(self._different), TOGETHER):
            prompts = self._different[first : first + TOGETHER]
            block, logits = run_padded(self._model.plain, self._model.table, prompts)
            self._step.keep_prompts(first, block)
            found.append(logits)
        return torch.cat(found)

    def prefill(self) -> Tensor:
        """See `decode.Decoding`."""
        return self._prompt_logits()[self._groups]


class DeviceDecoding(Prompted[DeviceStep]):
    """One drawing code by code, either as a whole (`draw`) or driven from outside (see
    `decode.Decoding`).

    Args:
        model, prompts, guided, share: see `Prompted`.
        sampler: the sampler that `draw` uses; None if `draw` is not called.
    """

    def __init__(
        self,
        model: DeviceTransformer,
        prompts: list[list[int]],
        guided: bool,
        share: bool = True,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__(model, prompts, guided, share)
        self._sampler = sampler
        self._run: Run | None = None
        if sampler is None:
            self._step = unrecorded(model, self.shape())
        else:
            self._step, self._run = recorded(DeviceStep, model, self.shape(), Choice.of(sampler))
        self.open()

    def step(self, code: Tensor) -> Tensor:
        """See `decode.Decoding`; the step is launched operator by operator."""
        self._step.feed(self._model.table[code])
        return self._step.layers()[self._places]

    def draw(self, tell: Callable[[int, int], None] | None = None) -> Tensor:
        """Run the whole drawing; return image codes int64 [N, T]. The sampler receives what was
        drawn.

        Args:
            tell: called after every code with (codes drawn of an image, codes in all); this waits
                for the device each time, so that the numbers are true.
        """
        sampler, step, steps = self._sampler, self._step, self._model.config.image_tokens
        run = self._run
        assert sampler is not None and run is not None, "made with the sampler that draws"
        step.choose(sampler)
        with span("engine/prefill", rows=self._rows):
            found = self.prefill()
            logits = found.new_zeros(step.shape.rows, found.shape[1])
            logits[self._places] = found
        held = self.held
        for done in range(1, steps + 1):
            if done == 1:
                with span("engine/sample", rows=self._rows, step=0):
                    step.sample(logits)
            else:
                held += self._rows
                about = {"rows": self._rows, "tokens": self._rows, "held": held}
                with span("engine/decode/step", step=done - 2, **about):
                    run()
            if tell is not None:
                if logits.is_cuda:
                    torch.cuda.current_stream(logits.device).synchronize()
                tell(done, steps)
        drawn = step.drawn(self._images)
        sampler.take(drawn)
        return drawn.codes
