"""Requests that tests make to the scheduler, and tools to observe it."""

from __future__ import annotations

import random
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.serving.request import Request
from echogen.engine.serving.scheduler import Scheduler

TOKENS = 16
PLAIN, GUIDED = Sampling(), Sampling(cfg=4.0, temperature=0.8)
KINDS = (
    PLAIN,
    GUIDED,
    Sampling(temperature=0),
    Sampling(top_k=5, top_p=0.8),
    Sampling(cfg=3.0, unconditional="empty", top_p=0.9),
    Sampling(cfg=5.0, cfg_schedule="cosine", cfg_span=(3, 11)),
)
ONE = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.6)),))
TWO = Layout(
    "the left of the two green stars",
    (
        LayoutObject("the left of the two green stars", (0.0, 0.25, 0.5, 0.75)),
        LayoutObject("a blue square", (0.5, 0.0, 1.0, 0.5)),
    ),
)
THREE = Layout("a blue square in front of a red circle", (*TWO.objects, *ONE.objects))
LAYOUTS = (ONE, TWO, THREE)


@dataclass(frozen=True)
class Asked:
    layout: Layout
    seed: int
    sampling: Sampling
    samples: int

    @property
    def rows(self) -> int:
        return self.samples * (2 if self.sampling.guided else 1)

    def submit(self, scheduler: Scheduler, **more) -> Request:
        return scheduler.submit(self.layout, self.seed, self.sampling, self.samples, **more)

    def alone(self, engine: Engine) -> torch.Tensor:
        layouts = [self.layout] * self.samples
        return engine.generate_codes(
            layouts, self.seed, sampling=self.sampling, decoding="sequential"
        )


def crowd(count: int, seed: int, slots: int = 8) -> list[Asked]:
    """Random requests, none of which needs more than the slots there are."""
    rng, made = random.Random(seed), list[Asked]()
    while len(made) < count:
        asked = Asked(
            rng.choice(LAYOUTS), rng.randrange(1 << 40), rng.choice(KINDS), rng.randint(1, 3)
        )
        if asked.rows <= slots:
            made.append(asked)
    return made


def finish(scheduler: Scheduler) -> int:
    """Step by hand to the end; return the number of steps."""
    return sum(1 for _ in iter(scheduler.step, False))


def staggered(scheduler: Scheduler, asked: list[Asked], rng: random.Random) -> list[Request]:
    """Submit requests at random moments between steps, and draw them all."""
    requests = []
    for each in asked:
        requests.append(each.submit(scheduler))
        for _ in range(rng.randrange(12)):
            scheduler.step()
    finish(scheduler)
    return requests


class Heard:
    """Payloads of the ranges of one category, for `ranges.listening`."""

    def __init__(self, category: str) -> None:
        self.payloads: list[dict[str, Any]] = []
        self._category = category

    def begin(self, category, payload):
        if category == self._category:
            self.payloads.append(dict(payload))

    def end(self): ...

    def all(self, name: str) -> list[Any]:
        """The value called ``name`` of each."""
        return [payload[name] for payload in self.payloads]


class Held(TorchDispatchMode):
    """Counts the bytes of storages made within, and the most that were held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {storage._cdata for storage in self._storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in self._storages(made):
            if storage._cdata not in self._known | before:
                self._note(storage)
        return made

    @staticmethod
    def _storages(tree) -> list[torch.UntypedStorage]:
        tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        # oneDNN's packed weights, made before, have none.
        return [t.untyped_storage() for t in tensors if t.layout is torch.strided]

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
