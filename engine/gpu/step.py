"""One step of a drawing on the device, including sampling and counters, for batches of one shape.

Everything that a step reads and writes is made here, once. A step takes no argument and returns
nothing, so it can be recorded (`engine.gpu.graphs`) and replayed for every code of every drawing of
that shape. A drawing smaller than the shape leaves rows idle: their slots are outside the cache,
they see nothing and do not advance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from echogen.engine.cache import put_prefix
from echogen.engine.decoding.sampler import Drawn, Sampler
from echogen.engine.gpu.device import DeviceTransformer, Piece, Places, Prefixes
from echogen.engine.gpu.graphs import Step as Run
from echogen.engine.gpu.graphs import bucket
from echogen.kernels.checks import FP8, device_seed
from echogen.kernels.decode_members import decode_members
from echogen.kernels.overlap import overlapping
from echogen.kernels.reference.sampling import COLDEST, branches, mixed, truncated
from echogen.kernels.sampling import CfgSample, cfg_sample

S = TypeVar("S", bound="BatchStep")

EDGE = 64
"""Prompt caches end at a multiple of this, so that few different steps are recorded."""


@dataclass(frozen=True)
class Shape:
    """What a step is made for; drawings that round to the same shape share the step.

    Attributes:
        images: samples N, a `bucket`.
        guided: whether there are 2N sequences, the conditional ones first.
        prompts: distinct prompts held, a `bucket`.
        prompt_tokens: tokens of the longest prompt, rounded up to a multiple of ``EDGE``.
        window: consecutive codes of an image that a step runs.
        columns: for windows, how far back a draft looks where no step has sampled yet.
    """

    images: int
    guided: bool
    prompts: int
    prompt_tokens: int
    window: int = 1
    columns: int = 1

    @classmethod
    def of(
        cls,
        sequences: int,
        guided: bool,
        prompts: Sequence[Sequence[int]],
        window: int = 1,
        columns: int = 1,
    ) -> Shape:
        """The shape for ``sequences`` sequences that continue these distinct prompts."""
        longest = max(map(len, prompts))
        tokens = -(-longest // EDGE) * EDGE
        images = bucket(sequences // 2 if guided else sequences)
        return cls(images, guided, bucket(len(prompts)), tokens, window, columns)

    @property
    def sequences(self) -> int:
        """Sequences of a step, including idle ones; with guidance two per image."""
        return 2 * self.images if self.guided else self.images

    @property
    def rows(self) -> int:
        """Tokens of a step; those of a sequence are adjacent."""
        return self.sequences * self.window


@dataclass(frozen=True)
class Choice:
    """The settings of a sampler that decide which launches a step has; its numbers are read on the
    device.

    Attributes:
        greedy: temperature 0.
        top_k: codes kept, 0: all.
        nucleus: whether there is a top-p.
        counted: whether the number of codes left to choose from is kept, too.
    """

    greedy: bool = True
    top_k: int = 0
    nucleus: bool = False
    counted: bool = False

    @classmethod
    def of(cls, sampler: Sampler) -> Choice:
        """Read the settings of a sampler."""
        s = sampler.sampling
        return cls(s.temperature == 0, s.top_k, s.top_p < 1, sampler.counts)


class BatchStep(ABC):
    """What every step of a shape reads and writes, however many codes of an image it runs.

    Args:
        model: runs the layers.
        shape, choice: what the step is made for.

    Attributes:
        places: where the rows are.
        codes: int64 [N, T], the codes drawn.
    """

    _slots: Tensor
    _lengths: Tensor
    _positions: Tensor

    def __init__(self, model: DeviceTransformer, shape: Shape, choice: Choice) -> None:
        self._model, self.shape, self.choice = model, shape, choice
        c, device = model.config, model.table.device
        self._x = torch.zeros(shape.rows, c.width, dtype=model.table.dtype, device=device)
        self.prompts, self.own, *scales = model.memory.views(*caches(model, shape))
        self._prompt_scales: Tensor | None = scales[0] if scales else None
        self._own_scales: Tensor | None = scales[1] if scales else None
        self._count(device)
        self._prepare_prefixes(device)
        self._prepare_sampling(c.image_tokens, device)

    @abstractmethod
    def _count(self, device: torch.device) -> None:
        """Make the tensors that say where the rows are, with all rows idle."""

    def _prepare_prefixes(self, device: torch.device) -> None:
        shape = self.shape
        groups = torch.full((shape.rows,), -1, dtype=torch.int64, device=device)
        lengths = torch.zeros(shape.prompts, dtype=torch.int64, device=device)
        keys, values = self.prompts.unbind(0)
        order = self._order(groups)
        self._prefixes = Prefixes(keys, values, lengths, groups, order, self._prompt_scales)
        keys, values = self.own.unbind(0)
        self.places = Places(
            self._slots, self._lengths, self._positions, keys, values, self._prefixes,
            self._own_scales,
        )  # fmt: skip

    def _order(self, groups: Tensor) -> Tensor:
        c, kind = self._model.config, self._model.table.dtype
        query = torch.empty(len(groups), c.heads, c.head_dim, dtype=kind, device=groups.device)
        return decode_members(groups, query, self.prompts[0, 0])

    def _prepare_sampling(self, steps: int, device: torch.device) -> None:
        images, window = self.shape.images, self.shape.window
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._draws = torch.zeros(images, window, dtype=torch.int64, device=device)
        # Temperature, top-p, and the scale of guidance at every code.
        self._numbers = torch.ones(2 + steps, dtype=torch.float32, device=device)
        self._temperature, self._top_p, self._scales = self._numbers.split([1, 1, steps])
        self.codes = torch.zeros(images, steps, dtype=torch.int64, device=device)

    # --- a new drawing ----------------------------------------------------------------------------

    def open(self, places: Sequence[int], groups: Sequence[int], lengths: Sequence[int]) -> None:
        """Begin a drawing: the sequence at ``places[i]`` continues prompt ``groups[i]``, prompt p
        has ``lengths[p]`` tokens, and the other sequences are idle."""
        shape, prefixes = self.shape, self._prefixes
        group = torch.full((shape.sequences,), -1)
        group[list(places)] = torch.tensor(groups)
        prefixes.groups.copy_(group.repeat_interleave(shape.window))
        prefixes.order.copy_(self._order(prefixes.groups))
        prefixes.lengths.copy_(torch.tensor([*lengths, *[0] * (shape.prompts - len(lengths))]))

    def keep_prompts(self, first: int, keys_values: Tensor) -> None:
        """Store keys and values [2, layers, n, Hk, L, K], keys first, of n prompts from ``first``
        on."""
        prompts = slice(first, first + keys_values.shape[2])
        put_prefix(self.prompts, self._prompt_scales, [prompts], keys_values)

    def choose(self, sampler: Sampler) -> None:
        """Copy a sampler's numbers to the device.

        Raises:
            ValueError: a seed that is not a valid key, or guidance beyond the last code.
        """
        s, images = sampler.sampling, len(sampler.draws)
        self._seed.copy_(device_seed(sampler.seed, self._seed.device))
        self._draws.zero_()
        self._draws[:images] = sampler.draws[:, None]
        scales = s.scales(self.codes.shape[1])
        self._numbers.copy_(torch.tensor([s.temperature, s.top_p, *scales]))

    # --- what is run again and again --------------------------------------------------------------

    def feed(self, embedded: Tensor) -> None:
        """Feed the embeddings [n, D] of the leading images' codes to all sequences of theirs."""
        each = self.shape.images * self.shape.window
        self._x.view(-1, each, self._x.shape[1])[:, : len(embedded)] = embedded

    def _pick(
        self, logits: Tensor, draws: Tensor, position: Tensor, cfg: Tensor | float,
        table: Tensor | None = None,
    ) -> CfgSample:  # fmt: skip
        """Draw from logits with the sampler's numbers; see `cfg_sample`."""
        return cfg_sample(
            logits, self._seed, draws, position, cfg,
            0.0 if self.choice.greedy else self._temperature, self.choice.top_k,
            self._top_p if self.choice.nucleus else 1.0,
            "blocked" if self.shape.guided else "none", table,
        )  # fmt: skip

    @abstractmethod
    def run(self) -> None:
        """Run a step of every image; it takes no arguments, so that it can be recorded."""


class DeviceStep(BatchStep):
    """A step of one code per image.

    Attributes:
        logprob, kept: of the codes drawn, [N, T]; see `sampler.Drawn`.
    """

    def _count(self, device: torch.device) -> None:
        """Make all counters as one tensor, which one addition advances: slots, lengths and
        positions of the rows, and the code that each image draws next."""
        rows, images = self.shape.rows, self.shape.images
        self._counters = torch.zeros(3 * rows + images, dtype=torch.int64, device=device)
        self._ahead = torch.zeros_like(self._counters)
        parts = [rows, rows, rows, images]
        self._slots, self._lengths, self._positions, self._code = self._counters.split(parts)
        self._slots.fill_(-1)

    def _prepare_sampling(self, steps: int, device: torch.device) -> None:
        super()._prepare_sampling(steps, device)
        self.logprob = torch.zeros_like(self.codes, dtype=torch.float32)
        self.kept = torch.zeros_like(self.codes) if self.choice.counted else None

    def open(self, places: Sequence[int], groups: Sequence[int], lengths: Sequence[int]) -> None:
        """See `BatchStep`."""
        super().open(places, groups, lengths)
        shape, counters = self.shape, torch.zeros_like(self._counters, device="cpu")
        ahead = torch.zeros_like(counters)
        slots, held, positions, _ = counters.split([shape.rows] * 3 + [shape.images])
        moves = ahead[: 3 * shape.rows].view(3, shape.rows)
        slots.fill_(-1)
        for row, prompt in zip(places, groups, strict=True):
            slots[row], held[row], positions[row] = 0, 1, lengths[prompt]
            moves[:, row] = 1
            ahead[3 * shape.rows + row % shape.images] = 1
        self._counters.copy_(counters)
        self._ahead.copy_(ahead)

    def layers(self) -> Tensor:
        """Append the codes that were fed; return image logits [R, V]."""
        logits = self._model.logits(self._x, self.places)
        self._counters.add_(self._ahead)
        return logits

    def sample(self, logits: Tensor) -> None:
        """Draw every image's next code from logits [R, V], keep it, and feed it."""
        cut = self._code[:, None]
        cfg: Tensor | float = 1.0
        if self.shape.guided:  # all images are at the same code; the first is never idle
            cfg = self._scales.index_select(0, self._code[:1])
        drawn = self._pick(logits, self._draws.flatten(), self._code, cfg, self._model.table)
        self.codes.scatter_(1, cut, drawn.token[:, None])
        self.logprob.scatter_(1, cut, drawn.logprob[:, None])
        if self.kept is not None:
            self.kept.scatter_(1, cut, self._choices(logits, cfg)[:, None])
        self.feed(drawn.embed)

    def _choices(self, logits: Tensor, cfg: Tensor | float) -> Tensor:
        """Count the codes that the truncation leaves, int64 [N]."""
        scale = cfg if isinstance(cfg, Tensor) else None
        found = mixed(*branches(logits, "blocked" if self.shape.guided else "none"), scale)
        found = found * (1 / self._temperature.clamp(min=COLDEST))
        share = self._top_p if self.choice.nucleus else None
        return (truncated(found, self.choice.top_k, share) > float("-inf")).sum(-1)

    def run(self) -> None:
        """Draw one more code of every image."""
        # A step's first launch is torch's and does not overlap: whatever wrote weights has ended.
        with overlapping(self._x.device):
            self.sample(self.layers())

    def drawn(self, images: int) -> Drawn:
        """Return what was drawn of the leading images."""
        kept = None if self.kept is None else self.kept[:images].clone()
        return Drawn(self.codes[:images].clone(), self.logprob[:images].clone(), kept)


def caches(model: DeviceTransformer, shape: Shape) -> list[Piece]:
    """The caches of the prompts and of the images' own codes, [2, layers, …] each, keys first; in 8
    bits with their scales, [layers, 2, …]. The last code of an image is never fed."""
    c = model.config
    own, kind = max(1, c.image_tokens - 1), FP8 if model.fp8_cache else model.table.dtype
    held = ((shape.prompts, c.kv_heads, shape.prompt_tokens), (shape.sequences, c.kv_heads, own))
    found = [Piece((2, c.layers, *heads, c.head_dim), kind) for heads in held]
    if model.fp8_cache:
        found += [Piece((c.layers, 2, *heads), torch.float32) for heads in held]
    return found


def _make_room(model: DeviceTransformer, shape: Shape) -> None:
    pieces = caches(model, shape)
    if not model.memory.fits(*pieces):
        model.steps.clear()  # they use memory that is about to be freed
        model.memory.grow(*pieces)


def unrecorded(model: DeviceTransformer, shape: Shape) -> DeviceStep:
    """Make a step for a shape, to be run operator by operator by a caller that does its own
    sampling. The cache contents of every other step are overwritten."""
    _make_room(model, shape)
    return DeviceStep(model, shape, Choice())


def recorded(
    kind: type[S], model: DeviceTransformer, shape: Shape, choice: Choice
) -> tuple[S, Run]:
    """Return the step of a kind for a shape and a choice, and the function that runs it; it is made
    and recorded at first use. The cache contents of this and every other step are overwritten."""
    _make_room(model, shape)

    def make() -> tuple[S, Run]:
        step = kind(model, shape, choice)
        return step, model.recorder.record(step.run)

    found: tuple[S, Run] = model.steps.get((kind, shape, choice), make)
    return found
