"""Drawing several codes per step on a GPU (`engine.decoding.jacobi`): a recorded step runs a window
of every image, samples it, accepts what is correct and prepares the next window, all on the device.

No step accepts more than a window, so the host knows the least number of steps still needed, and
waits for the device only after those: some twenty-five times in an image of 576 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echogen.engine.decoding.sampler import Sampler
from echogen.engine.gpu.decode import Prompted
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.step import BatchStep, Choice, recorded
from echogen.engine.ranges import span
from echogen.kernels.accept_window import accept_window
from echogen.kernels.overlap import overlapping


class WindowStep(BatchStep):
    """A step of one window of codes per image, each image's at its own position.

    Attributes:
        done: int64 [N], number of final codes of each image; T for an idle one.
        drafted: bool [N, T], final codes that were accepted from a draft.
        steps: int64 [N], steps that each image has needed.
    """

    def _count(self, device: torch.device) -> None:
        shape, tokens = self.shape, self._model.config.image_tokens
        self._where = torch.zeros(3, shape.rows, dtype=torch.int64, device=device)
        self._slots, self._lengths, self._positions = self._where.unbind(0)
        self._slots.fill_(-1)
        self._origin = self._where.new_full((shape.sequences,), -1)
        fed = self._where.new_zeros(2, shape.images * shape.window)
        self._fed, self._code = fed.unbind(0)
        self.done = self._where.new_full((shape.images,), tokens)
        self.steps = torch.zeros_like(self.done)
        self.drafted = torch.zeros(shape.images, tokens, dtype=torch.bool, device=device)

    def open(self, places: Sequence[int], groups: Sequence[int], lengths: Sequence[int]) -> None:
        """See `BatchStep`; the first window is the one after the first code."""
        super().open(places, groups, lengths)
        shape = self.shape
        origin = torch.full((shape.sequences,), -1)
        done = torch.full((shape.images,), self.codes.shape[1])
        for sequence, prompt in zip(places, groups, strict=True):
            origin[sequence], done[sequence % shape.images] = lengths[prompt], 1
        first = torch.arange(shape.window).expand(shape.sequences, -1)
        where = torch.stack((first, first + 1, first + origin[:, None]))
        idle = torch.tensor([-1, 0, 0])[:, None, None]
        self._where.copy_(torch.where(origin[:, None] >= 0, where, idle).flatten(1))
        self._origin.copy_(origin)
        self.done.copy_(done)
        self.steps.zero_()
        self.drafted.zero_()
        self._code.copy_(first[: shape.images].flatten() + 1)

    def begin(self, logits: Tensor) -> None:
        """Draw the first codes of the leading images from their prompts' logits; the first draft is
        made of nothing else."""
        draws = self._draws[: len(logits) // (2 if self.shape.guided else 1), 0].contiguous()
        first = self._sampled(logits, draws, torch.zeros_like(draws))
        self.codes[: len(first)] = first[:, None]
        self._fed.view(self.shape.images, -1)[: len(first)] = first[:, None]

    def _sampled(self, logits: Tensor, draws: Tensor, position: Tensor) -> Tensor:
        guided = self.shape.guided
        cfg = self._scales.index_select(0, position) if guided else 1.0
        return self._pick(logits, draws, position, cfg).token

    def run(self) -> None:
        """Run one more window of every image."""
        with overlapping(self._x.device):
            self.feed(self._model.table.index_select(0, self._fed))
            logits = self._model.logits(self._x, self.places)
            sampled = self._sampled(logits, self._draws.flatten(), self._code)
            accept_window(
                sampled, self.codes, self.drafted, self.done, self.steps, self._fed, self._code,
                self._where, self._origin, self.shape.columns,
            )  # fmt: skip


class DeviceWindows(Prompted[WindowStep]):
    """One drawing in windows; its codes are those of `DeviceDecoding`.

    Args:
        model, prompts, guided, sampler: as for `DeviceDecoding`.
        window: codes W of a step, fewer than an image has.
        columns: how far back a draft looks where no step has sampled yet.
    """

    def __init__(
        self,
        model: DeviceTransformer,
        prompts: list[list[int]],
        guided: bool,
        sampler: Sampler,
        window: int,
        columns: int,
    ) -> None:
        super().__init__(model, prompts, guided)
        shape = self.shape(window, columns)
        self._sampler = sampler
        self._step, self._run = recorded(WindowStep, model, shape, Choice.of(sampler))
        self.open()

    def draw(
        self, tell: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Run the whole drawing; return the codes int64 [N, T], which of them were drafted, bool
        [N, T], and the steps of each image, including the prompt's.

        Args:
            tell: called after every step, the prompts' too, with (codes drawn of the image that has
                the fewest, codes in all); this waits for the device each time.
        """
        step, run, sampler = self._step, self._run, self._sampler
        step.choose(sampler)
        with span("engine/prefill", rows=self._rows):
            logits = self.prefill()
        with span("engine/sample", rows=self._images, step=0):
            step.begin(logits)
        tokens, window, fewest = step.codes.shape[1], step.shape.window, 1
        if tell is not None:
            tell(int(step.done[: self._images].min()), tokens)
        while fewest < tokens:
            sure = -(-(tokens - fewest) // window) if tell is None else 1
            about = {"rows": self._rows * window, "tokens": self._rows * window}
            held = self.held + self._rows * fewest  # at least
            for _ in range(sure):
                with span("engine/decode/window", held=held, step=fewest, **about):
                    run()
            fewest = int(step.done[: self._images].min())
            if tell is not None:
                tell(fewest, tokens)
        images = slice(self._images)
        steps = [1 + n for n in step.steps[images].tolist()]
        return step.codes[images].clone(), step.drafted[images].clone(), steps
