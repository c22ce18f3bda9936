"""Drawing several codes a step on a GPU (`engine.decoding.jacobi`): a recorded step runs a window
of every image, samples it, takes over what is right and lays out the next one, all on the device.

No step takes over more than a window, so the host knows how many steps are needed at least, and
waits for the device behind those alone: some twenty-five times in an image of 576 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echogen.engine.decoding.sampler import Sampler
from echogen.engine.gpu.decode import DeviceDecoding
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.step import DeviceStep
from echogen.engine.ranges import span
from echogen.kernels.accept_window import accept_window
from echogen.kernels.overlap import overlapping


class WindowStep(DeviceStep):
    """`DeviceStep` of a window of codes, each image's at a place of its own.

    Attributes:
        done: int64 [N], final codes of each image; T of an idle one.
        drafted: bool [N, T], final codes that were taken over from a draft.
        steps: int64 [N], that each image has needed.
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
        """See `DeviceStep`, of sequences; the first window is that behind the first code."""
        shape, prefixes = self.shape, self.places.prefixes
        assert prefixes is not None
        group = torch.full((shape.sequences,), -1)
        origin, done = group.clone(), torch.full((shape.images,), self.codes.shape[1])
        for sequence, prompt in zip(places, groups, strict=True):
            group[sequence], origin[sequence] = prompt, lengths[prompt]
            done[sequence % shape.images] = 1
        first = torch.arange(shape.window).expand(shape.sequences, -1)
        live = origin[:, None] >= 0
        where = torch.stack((first, first + 1, first + origin[:, None]))
        idle = torch.tensor([-1, 0, 0])[:, None, None]
        self._where.copy_(torch.where(live, where, idle).flatten(1))
        self._origin.copy_(origin)
        self.done.copy_(done)
        self.steps.zero_()
        self.drafted.zero_()
        self._code.copy_(first[: shape.images].flatten() + 1)
        prefixes.groups.copy_(group.repeat_interleave(shape.window))
        prefixes.order.copy_(self._order(prefixes.groups))
        prefixes.lengths.copy_(torch.tensor([*lengths, *[0] * (shape.prompts - len(lengths))]))

    def begin(self, logits: Tensor) -> None:
        """Draw the first codes of the leading images from their prompts' logits; they are all that
        a draft knows."""
        draws = self._draws[: len(logits) // (2 if self.shape.guided else 1), 0].contiguous()
        first = self._pick(logits, draws, torch.zeros_like(draws))
        self.codes[: len(first)] = first[:, None]
        self._fed.view(self.shape.images, -1)[: len(first)] = first[:, None]

    def _pick(self, logits: Tensor, draws: Tensor, position: Tensor) -> Tensor:
        guided = self.shape.guided
        cfg = self._scales.index_select(0, position) if guided else 1.0
        return self._drawn(logits, draws, position, cfg).token

    def run(self) -> None:
        """One window more of every image."""
        with overlapping(self._x.device):
            self.feed(self._model.table.index_select(0, self._fed))
            logits = self._model.logits(self._x, self.places)
            sampled = self._pick(logits, self._draws.flatten(), self._code)
            accept_window(
                sampled, self.codes, self.drafted, self.done, self.steps, self._fed, self._code,
                self._where, self._origin, self.shape.columns,
            )  # fmt: skip


class DeviceWindows(DeviceDecoding):
    """One drawing in windows; see `DeviceDecoding`, whose rules it keeps.

    Args:
        model, prompts, guided, sampler: as there.
        window: codes W of a step, less than an image has.
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
        super().__init__(model, prompts, guided, True, sampler, WindowStep, window, columns)

    def draw_windows(
        self, tell: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """The whole drawing: codes int64 [N, T], which of them were drafted bool [N, T], and the
        steps of each image, the prompt's among them.

        Args:
            tell: called after every step, the prompts' too, with (codes drawn of the image that has
                the fewest, codes in all); the device is then waited for each time.
        """
        step, run, sampler = self._step, self._run, self._sampler
        assert isinstance(step, WindowStep) and run is not None and sampler is not None
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
