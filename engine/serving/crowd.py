"""Groups the requests whose codes are drawn together from a step's logits.

On a CPU each request's sampler draws for itself: it holds its noise for many codes at a time. On
the GPU operators that would be some ten launches per request, while `cfg_sample` draws for all
requests with one kind of sampling in a single launch, whatever their seeds, positions, scales,
temperatures and top-p are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from echogen.engine.cpu.native import gumbel_noise
from echogen.engine.decoding.jacobi import Drafted
from echogen.engine.gpu.step import Choice
from echogen.engine.serving.request import Request
from echogen.engine.serving.slots import Rows
from echogen.kernels.sampling import LONGEST, cfg_sample


@dataclass(eq=False)  # equal to itself only
class Live:
    """A request being drawn.

    Attributes:
        rows: its slots: the conditional ones, then with guidance as many to steer away from; None
            while its prompts are run.
        drafts: of its images, from the first step that is a window to one that is not.
    """

    request: Request
    rows: Rows | None = None
    drafts: list[Drafted] | None = None

    @property
    def held(self) -> Rows:
        """Its slots, once its prompts are run."""
        assert self.rows is not None, "its prompts are not run yet"
        return self.rows


class Drawer(Protocol):
    """Draws the next codes of every image of some requests.

    Attributes:
        lives: the requests.
        rows: their slots, with all conditional ones first.
    """

    lives: list[Live]
    rows: Rows

    def draw(self, logits: Tensor) -> list[Tensor]:
        """Draw the next codes int64 [N, n] of each request from logits [R, V] (windows: [R, W, V]),
        which have one row for each of ``rows``, in their order."""
        ...


class Alone:
    """A `Drawer` of one request, by its own sampler."""

    def __init__(self, live: Live) -> None:
        self.lives, self.rows = [live], live.held

    def draw(self, logits: Tensor) -> list[Tensor]:
        """See `Drawer`."""
        request = self.lives[0].request
        return [request.sampler(logits, request.drawn)[:, None]]


class Kind(NamedTuple):
    """What the requests of one crowd have in common: the launch that draws their codes."""

    guided: bool
    choice: Choice

    @classmethod
    def of(cls, live: Live) -> Kind:
        """The kind of a request."""
        sampler = live.request.sampler
        choice = Choice.of(sampler)
        return cls(sampler.sampling.guided, Choice() if choice.greedy else choice)

    def draw(
        self, logits: Tensor, seeds: Tensor, draws: Tensor, positions: Tensor,
        scales: Tensor | None, temperatures: Tensor, top_ps: Tensor,
    ) -> Tensor:  # fmt: skip
        """Draw a code int64 [N] for each of N images from logits [N, V], or with guidance [2N, V],
        conditional rows first. All others are [N], one number per image; without guidance there are
        no scales."""
        choice = self.choice
        return cfg_sample(
            logits, seeds, draws, positions, 1.0 if scales is None else scales,
            0.0 if choice.greedy else temperatures, choice.top_k,
            top_ps if choice.nucleus else 1.0, "blocked" if self.guided else "none",
        ).token  # fmt: skip


class Crowd:
    """A `Drawer` of requests of one kind on a device. What differs between them is in tensors with
    one element per image. It is made anew when a request comes or goes."""

    def __init__(self, lives: list[Live]) -> None:
        self.lives, self._kind = lives, Kind.of(lives[0])
        images = [live.request.samples for live in lives]
        held = list(zip(lives, images, strict=True))
        numbers = [row for live, n in held for row in live.held.numbers[:n]]
        numbers += [row for live, n in held for row in live.held.numbers[n:]]
        self._images = images
        samplers = [live.request.sampler for live in lives]
        self._draws = torch.cat([sampler.draws for sampler in samplers])
        device = self._draws.device
        self.rows = Rows(numbers, torch.tensor(numbers, device=device))

        def of_images(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            repeated = [v for v, n in zip(values, images, strict=True) for _ in range(n)]
            return torch.tensor(repeated, dtype=dtype, device=device)

        self._seeds = of_images([sampler.seed for sampler in samplers], torch.int64)
        self._positions = of_images([live.request.drawn for live in lives], torch.int64)
        asked = [sampler.sampling for sampler in samplers]
        self._temperatures = of_images([s.temperature for s in asked], torch.float32)
        self._top_ps = of_images([s.top_p for s in asked], torch.float32)
        scales = [sampler.scales.expand(n, -1) for sampler, n in zip(samplers, images, strict=True)]
        self._scales = torch.cat(scales)

    def draw(self, logits: Tensor) -> list[Tensor]:
        """See `Drawer`."""
        scales = None
        if self._kind.guided:
            scales = self._scales.gather(1, self._positions[:, None])[:, 0]
        drawn = self._kind.draw(
            logits, self._seeds, self._draws, self._positions, scales, self._temperatures,
            self._top_ps,
        )  # fmt: skip
        self._positions += 1
        return list(drawn[:, None].split(self._images))


CHOICES = (Choice(), *(Choice(False, k, nucleus) for k in (0, 1) for nucleus in (False, True)))
"""Every choice that is compiled by itself; the value of a top-k is not compiled in."""


def warm_up(logits: Tensor, on_operators: bool) -> None:
    """Compile what draws codes, for requests of every kind, from logits [R, V] of any step.
    Otherwise all requests would wait at the first one of a kind: for seconds, while ten kernels are
    compiled on a GPU, or on a CPU the C++ that makes noise. Both are kept on disk for later
    starts."""
    numbers = torch.zeros(1, dtype=torch.int64, device=logits.device)
    if not on_operators:
        gumbel_noise(0, numbers, numbers, 1)
        return
    ones = torch.ones(1, device=logits.device)
    for guided in (False, True)[: len(logits)]:
        for choice in CHOICES:
            if logits.shape[1] > LONGEST and (choice.top_k or choice.nucleus):
                continue  # no request can have it
            Kind(guided, choice).draw(
                logits[: 1 + guided],
                numbers,
                numbers,
                numbers,
                ones if guided else None,
                ones,
                ones,
            )


class Pace:
    """Keeps the host from running ahead of a GPU. Launching a step takes less time than running it,
    and the launch queue holds dozens of steps: a new request would wait for all of them, and a
    cancelled one would still be drawn for as long."""

    AHEAD = 2
    """Launched steps that the device may not have run yet; with one, it would wait for each."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._steps = device, deque[torch.cuda.Event]()

    def __call__(self) -> None:
        """After the launch of a step, wait for the one ``AHEAD`` before it. Device errors are
        raised here."""
        if self._device.type != "cuda":
            return
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()
            event.record()
        self._steps.append(event)
        if len(self._steps) > self.AHEAD:
            self._steps.popleft().synchronize()


def drawers(lives: list[Live], on_operators: bool) -> list[Drawer]:
    """The drawers for all of ``lives``. With ``on_operators`` they are crowds, except for samplers
    that have a call of their own."""
    alone, crowds = list[Drawer](), dict[Kind, list[Live]]()
    for live in lives:
        if on_operators and live.request.sampler.on_device:
            crowds.setdefault(Kind.of(live), []).append(live)
        else:
            alone.append(Alone(live))
    return [*alone, *map(Crowd, crowds.values())]
