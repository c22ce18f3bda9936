"""What draws requests that arrive over time: the scheduler, and batches drawn to their end.

Each accepts requests from any thread, refuses one when the queue is full, and reports when the
first part of a request's images is available. So `echogen.bench.speed.arrivals` can play one trace
to all.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from echogen.bench.speed.serving import Asked, fitting, one_batch
from echogen.engine.engine import Engine
from echogen.engine.serving.partial import Partial
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.waiting import QueueFull
from echogen.engine.serving.worker import SchedulerClosed, Worker

First = Callable[[], None]
"""Called in the drawing thread when the first part of a request's images is drawn."""


class Server(Protocol):
    """Accepts requests while it draws."""

    def ask(self, asked: Asked, first: First) -> Future[Tensor]:
        """Queue a request; return a future of its codes [samples, T]. Raises QueueFull."""
        ...

    def load(self) -> tuple[int, int]:
        """Return the number of requests waiting and of slots held."""
        ...

    def end(self) -> None:
        """Tell the server that no more requests come."""
        ...


class Continuous:
    """A running scheduler.

    Args:
        scheduler: must be started.
        part: codes of an image's first part.
    """

    def __init__(self, scheduler: Scheduler, part: int) -> None:
        self._scheduler, self._part = scheduler, part

    def ask(self, asked: Asked, first: First) -> Future[Tensor]:
        """See `Server`."""

        def told(partial: Partial) -> None:
            if partial.codes.shape[1] == self._part:
                first()

        a = asked
        return self._scheduler.submit(
            a.layout, a.seed, a.sampling, a.samples, every=self._part, on_partial=told
        ).future

    def load(self) -> tuple[int, int]:
        """See `Server`."""
        found = self._scheduler.metrics()
        return found.waiting, found.live_slots

    def end(self) -> None:
        """Do nothing: a scheduler draws what it has."""


@dataclass(eq=False)
class _Waits:
    asked: Asked
    first: First
    future: Future[Tensor] = field(default_factory=Future)


class Batches(Worker):
    """Batches as `decode_image` draws them. Their rows are of one kind, with guidance or without;
    they begin together and are drawn to their end before the next batch begins. First come, first
    served.

    Args:
        engine: draws.
        slots: most rows in a batch.
        queue: requests that may wait.
        part: codes of an image's first part.
        full: wait until a batch is full, or until no more requests come; otherwise take whatever
            waits once the machine is free.
    """

    def __init__(self, engine: Engine, slots: int, queue: int, part: int, full: bool) -> None:
        super().__init__()
        self._engine, self._slots, self._queue = engine, slots, queue
        self._part, self._full = part, full
        self._waiting, self._drawn = list[_Waits](), list[_Waits]()

    def ask(self, asked: Asked, first: First) -> Future[Tensor]:
        """See `Server`."""
        with self._changed:
            if self._closed:
                raise SchedulerClosed(self._closed)
            if len(self._waiting) >= self._queue:
                raise QueueFull(f"{self._queue} requests are waiting")
            self._waiting.append(waits := _Waits(asked, first))
            self._changed.notify_all()
        return waits.future

    def load(self) -> tuple[int, int]:
        """See `Server`."""
        with self._changed:
            return len(self._waiting), sum(each.asked.rows for each in self._drawn)

    def end(self) -> None:
        """See `Server`; draws what is left."""
        self.shutdown()

    def _work(self) -> bool:
        """Draw a batch, if one may begin."""
        with self._changed:
            self._drawn = drawn = self._next()
            self._waiting = [each for each in self._waiting if each not in drawn]
        if not drawn:
            return False

        def progress(done: int, _: int) -> None:
            if done == self._part:
                for each in drawn:
                    each.first()

        found = one_batch(self._engine, [each.asked for each in drawn], progress)
        with self._changed:
            self._drawn = []
        for each, codes in zip(drawn, found, strict=True):
            each.future.set_result(codes)
        return True

    def _next(self) -> list[_Waits]:
        """Return the next batch, of the kind whose turn it is; empty if none waits or may begin."""
        for guided in dict.fromkeys(each.asked.sampling.guided for each in self._waiting):
            mine = [each for each in self._waiting if each.asked.sampling.guided == guided]
            count = fitting([each.asked for each in mine], self._slots)
            rows = sum(each.asked.rows for each in mine[:count])
            if not self._full or self._closed or count < len(mine) or rows == self._slots:
                return mine[:count]
        return []

    def _busy(self) -> bool:
        return bool(self._next())

    def _abandon(self, error: BaseException) -> None:
        with self._changed:
            left, self._waiting, self._drawn = self._drawn + self._waiting, [], []
        for each in left:
            each.future.set_exception(error)
