"""From image logits to codes: guidance, temperature, truncation, keyed Gumbel-max noise."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from echogen.engine.cpu.native import gumbel_noise
from echogen.engine.prompt import Unconditional
from echogen.kernels.reference import sampling as reference
from echogen.kernels.reference.sampling import COLDEST

Schedule = Literal["constant", "linear", "cosine"]
"""How the guidance scale moves from the first guided position to the last."""
CFG_MAX = 1e4
"""Largest guidance scale: far above any useful one, and far below any at which guided logits
overflow float32 and the codes drawn from them would be meaningless."""


def whole_number(name: str, value: int) -> int:
    """Return a whole number of any integer type as an int. Raises ValueError, which names ``name``
    and the value."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}; it must be a whole number") from None


def noise_seed(value: int) -> int:
    """Return a valid noise key. Raises ValueError if ``value`` is not one."""
    seed = whole_number("seed", value)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed}; it must be in 0 … 2^63 - 1")
    return seed


def check_draws(draws: Sequence[int] | None, images: int) -> list[int]:
    """Return the draw id of each of ``images`` images; 0 … images − 1 where ``draws`` is None.

    Raises:
        ValueError: not one per image, or not a 32-bit word, which is what the noise takes.
    """
    if draws is None:
        return list(range(images))
    found = [whole_number("draw", draw) for draw in draws]
    if len(found) != images:
        raise ValueError(f"{len(found)} draws for {images} images; give one to each")
    for draw in found:
        if not 0 <= draw < 2**32:
            raise ValueError(f"draw {draw}; it must be in 0 … 2^32 - 1")
    return found


@dataclass(frozen=True)
class Sampling:
    """How image codes are drawn.

    Attributes:
        temperature: divides the guided logits; 0 takes the most likely code.
        cfg: classifier-free guidance scale s in ``u + s·(c − u)`` (Ho & Salimans 2022), at most
            ``CFG_MAX``; 1 is off, and then no unconditional rows are computed.
        top_k: keep the k most likely codes (0: all).
        top_p: keep the smallest set of codes with at least this probability (1: all).
        unconditional: prompt of the unconditional rows, "pad" (Janus) or "empty" (PlanGen).
        cfg_schedule: "constant": every guided position has scale ``cfg``; "linear" and "cosine":
            the scale goes from ``cfg_start`` at the first guided position to ``cfg`` at the last,
            in equal steps or along half a period of a cosine.
        cfg_start: the scale at which such a schedule begins.
        cfg_span: (a, b) guides only positions a … b − 1, in drawing order; None guides all.
    """

    temperature: float = 1.0
    cfg: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    unconditional: Unconditional = "pad"
    cfg_schedule: Schedule = "constant"
    cfg_start: float = 1.0
    cfg_span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}; it must be 0 or more")
        if not math.isfinite(self.cfg) or not 0 <= self.cfg <= CFG_MAX:
            raise ValueError(
                f"cfg = {self.cfg}; it must be 0 or more (1 is off), at most {CFG_MAX:g}"
            )
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k))
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; it must be in (0, 1]")
        if self.unconditional not in ("pad", "empty"):
            raise ValueError(f"unconditional = {self.unconditional!r}; choose 'pad' or 'empty'")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.cfg_schedule not in get_args(Schedule):
            raise ValueError(
                f"cfg_schedule = {self.cfg_schedule!r}; choose one of {get_args(Schedule)}"
            )
        if not math.isfinite(self.cfg_start) or not 0 <= self.cfg_start <= CFG_MAX:
            raise ValueError(
                f"cfg_start = {self.cfg_start}; it must be 0 or more (1 is off), at most "
                f"{CFG_MAX:g}"
            )
        if self.cfg_schedule == "constant" and self.cfg_start != 1:
            raise ValueError(
                f"cfg_start = {self.cfg_start} with cfg_schedule = 'constant', which begins at "
                f"cfg; choose 'linear' or 'cosine'"
            )
        if self.cfg_span is None:
            return
        span = tuple(self.cfg_span)  # JSON has lists
        if len(span) != 2 or not all(type(n) is int for n in span) or not 0 <= span[0] < span[1]:
            raise ValueError(
                f"cfg_span = {self.cfg_span}; write two positions, 0 or more, the first below "
                f"the second (which is the first that is not guided any more)"
            )
        object.__setattr__(self, "cfg_span", span)
        if not self.guided:
            raise ValueError(
                f"cfg_span = {span} with cfg = {self.cfg}, which guides nothing; set cfg to "
                f"another scale than 1, or leave cfg_span out"
            )

    def over(self, given: dict[str, Any]) -> Sampling:
        """These settings with the given ones, by name, in their place. A given ``cfg`` of 1 turns
        guidance off, its schedule and span with it, unless part of these is given too.

        Raises:
            ValueError: the settings are out of range, or conflict.
        """
        own, varied = asdict(self), ("cfg_schedule", "cfg_start", "cfg_span")
        if given.get("cfg") == 1 and given.keys().isdisjoint(varied):
            unguided = asdict(Sampling())
            own |= {name: unguided[name] for name in varied}
        return Sampling(**own | given)

    @property
    def guided(self) -> bool:
        """Whether there are unconditional rows at all."""
        return self.cfg != 1 or self.cfg_start != 1

    @property
    def scheduled(self) -> bool:
        """Whether the scale depends on the position."""
        return self.guided and (self.cfg_schedule != "constant" or self.cfg_span is not None)

    def scales(self, steps: int) -> list[float]:
        """The guidance scale at each of ``steps`` positions; 1 where nothing is guided.

        Raises:
            ValueError: ``cfg_span`` reaches beyond the last position.
        """
        first, end = self.cfg_span or (0, steps)
        if end > steps:
            raise ValueError(
                f"cfg_span = ({first}, {end}); an image of this model has {steps} positions"
            )
        scales = [1.0] * steps
        for position in range(first, end):
            # A span of one position is at the schedule's end.
            way = 1.0 if end - first == 1 else (position - first) / (end - 1 - first)
            if self.cfg_schedule == "constant":
                way = 1.0
            elif self.cfg_schedule == "cosine":
                way = (1 - math.cos(math.pi * way)) / 2
            scales[position] = self.cfg_start + way * (self.cfg - self.cfg_start)
        return scales


def guided(logits: Tensor, cfg: float | Tensor) -> Tensor:
    """Logits [2N, ..., V], conditional rows first, → guided logits [N, ..., V]."""
    cond, uncond = logits.chunk(2)
    return uncond + cfg * (cond - uncond)


def truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [..., V] with everything outside top-k, then top-p at -inf. Ties with the last code
    kept are kept too: this is the rule of `cfg_sample`, in the same implementation."""
    share = None
    if top_p < 1:
        share = torch.full((1,), top_p, dtype=torch.float32, device=logits.device)
    rows = logits.reshape(-1, logits.shape[-1])
    return reference.truncated(rows, top_k, share).view_as(logits)


class Drawn(NamedTuple):
    """Codes that a device drew on a sampler's behalf.

    Attributes:
        codes: int64 [N, T].
        logprob: float32 [N, T], of each code under the distribution drawn from.
        kept: int64 [N, T], how many codes its truncation left; None where they are not counted.
    """

    codes: Tensor
    logprob: Tensor
    kept: Tensor | None


class Sampler:
    """Draws the codes of a batch, step by step or several positions at once.

    A code is ``argmax(ℓ/temperature + g)`` with ``g`` keyed by (seed, draw, position): the result
    depends neither on the batch nor on its order, nor on how often a position is drawn.

    Args:
        sampling: the distribution.
        seed: noise key.
        draws: int64 [N], the noise's draw id of each sample.
        codebook: V.
        steps: image tokens T.

    Attributes:
        counts: whether it needs to know how many codes a truncation leaves.
        scales: float32 [T], the guidance scale of every position, on the device of the draws.

    Raises:
        ValueError: guidance beyond the last position (`Sampling.scales`).
    """

    counts = False
    # Noise is drawn for several positions at once: one by one, the 120 small integer operations
    # of a Philox block cost more than the tiny model's step.
    BLOCK = 1 << 21

    def __init__(
        self, sampling: Sampling, seed: int, draws: Tensor, codebook: int, steps: int
    ) -> None:
        self.sampling, self.seed, self.draws = sampling, seed, draws
        self._codebook, self._steps = codebook, steps
        self._chunk = max(1, min(steps, self.BLOCK // max(1, codebook * len(draws))))
        self._blocks = dict[int, Tensor]()
        self._samples = torch.arange(len(draws), device=draws.device)[:, None]
        # In float32 like the logits, so that one position and several use the same rounded scale.
        scales = torch.tensor(sampling.scales(steps), dtype=torch.float32)
        self._scales, self.scales = scales.tolist(), scales.to(draws.device)

    def _block(self, index: int) -> Tensor:
        """Noise [chunk, N, V] of the positions from ``index·chunk`` on."""
        first = index * self._chunk
        last = min(first + self._chunk, self._steps)
        positions = torch.arange(first, last, device=self.draws.device)
        grid = torch.broadcast_tensors(self.draws, positions[:, None])
        return gumbel_noise(self.seed, grid[0], grid[1], self._codebook)

    def _held(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """Return these blocks of noise; they, and no others, are kept for the next call."""
        held = self._blocks
        self._blocks = {i: held[i] if i in held else self._block(i) for i in indices}
        return self._blocks

    def scale(self, step: int) -> float:
        """The guidance scale of position ``step``; at 1 no unconditional row is read."""
        return self._scales[step] if self.sampling.scheduled else self.sampling.cfg

    def _guided(self, logits: Tensor, positions: Tensor | int | None) -> Tensor:
        s = self.sampling
        if not s.scheduled:
            return guided(logits, s.cfg)
        if positions is None:
            raise ValueError(f"cfg_schedule = {s.cfg_schedule!r} needs the positions of the logits")
        cond = logits.chunk(2)[0]
        if isinstance(positions, int):
            scale = self.scale(positions)
            return cond if scale == 1 else guided(logits, scale)
        scales = self.scales[positions].unsqueeze(-1)
        # u + 1·(c − u) is c only up to rounding.
        return torch.where(scales == 1, cond, guided(logits, scales))

    def scores(self, logits: Tensor, positions: Tensor | int | None = None) -> Tensor:
        """Logits [N, ..., V], or [2N, ..., V] with guidance → float32 [N, ..., V], guided, divided
        by the temperature and truncated: everything before the noise. ``positions``, int64 [N, ...]
        or one for all, are those of the logits; only a guidance schedule needs them."""
        s, scores = self.sampling, self.tempered(logits, positions)
        return scores if s.temperature == 0 else truncated(scores, s.top_k, s.top_p)

    def tempered(self, logits: Tensor, positions: Tensor | int | None = None) -> Tensor:
        """``scores`` before the truncation; at temperature 0 it divides by 1."""
        s = self.sampling
        logits = logits.float()
        if s.guided:
            logits = self._guided(logits, positions)
        return logits if s.temperature == 0 else logits * (1 / max(s.temperature, COLDEST))

    def pick(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Draw the codes int64 [N, W] from ``scores`` [N, W, V] at ``positions`` int64 [N, W], each
        below T."""
        if self.sampling.temperature == 0 or not positions.numel():
            return scores.argmax(-1)
        which = positions // self._chunk
        # Images may be far apart: the blocks between them are not needed.
        blocks = self._held(sorted(set(which.flatten().tolist())))
        if len(blocks) == 1:
            ((index, noise),) = blocks.items()
            return (scores + noise[positions - index * self._chunk, self._samples]).argmax(-1)
        gathered = torch.empty_like(scores)
        samples = self._samples.expand_as(positions)
        for index, noise in blocks.items():
            here = which == index
            gathered[here] = noise[positions[here] - index * self._chunk, samples[here]]
        return (scores + gathered).argmax(-1)

    @property
    def on_device(self) -> bool:
        """Whether `kernels.sampling.cfg_sample` draws the same as this object. A subclass that
        overrides ``__call__`` must answer for itself."""
        return type(self).__call__ is Sampler.__call__

    def take(self, drawn: Drawn) -> None:
        """Receive what was drawn on this sampler's behalf; a subclass may keep it."""

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """Logits [N, V], or [2N, V] with guidance, of position ``step`` → codes int64 [N]."""
        scores = self.scores(logits, step)
        if self.sampling.temperature == 0:
            return scores.argmax(-1)
        index = step // self._chunk
        return (scores + self._held([index])[index][step - index * self._chunk]).argmax(-1)
