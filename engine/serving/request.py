"""A request to draw, as who made it holds it: result, partial pictures, cancellation."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from echogen.engine.decoding.sampler import Sampler, Sampling, noise_seed, whole_number
from echogen.engine.layout import Layout
from echogen.engine.serving.partial import Partial, Pictures

PIECES = 32
"""Tensors that an image's codes lie in at most, for a partial result puts them together."""


@dataclass(frozen=True)
class Order:
    """What is asked for; the fields are the arguments of `Scheduler.submit`.

    Raises:
        ValueError: a value out of range.
    """

    layout: Layout
    seed: int
    sampling: Sampling
    samples: int = 1
    draws: Sequence[int] | None = None
    negative: Layout | None = None
    priority: int = 0
    timeout: float | None = None
    every: int = 0
    on_partial: Callable[[Partial], None] | None = None

    def __post_init__(self) -> None:
        # What is no number would break the queue's order, in the thread that draws for all.
        object.__setattr__(self, "seed", noise_seed(self.seed))
        for name in ("samples", "priority", "every"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples}; it must be at least 1")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout}; it must be above 0 seconds")
        if self.every < 0:
            raise ValueError(f"every = {self.every}; it must be 0 (only the whole) or more")


class Request:
    """Images of one layout, waiting, being drawn or done.

    Made by `Scheduler.submit`. ``await request`` gives the codes in an event loop. Cancelling
    ``future`` (or the task that awaits it) cancels the drawing.

    Args:
        none: the codes int64 [N, 0] of its images so far.

    Attributes:
        tokens: codes T of an image.
        future: of the codes int64 [N, T]; its exception is what went wrong, `TimeoutError` at the
            end of the request's time.
        prompts: of the image and, with guidance, of what it leads away from.
        rows: slots it takes.
        priority: the higher are drawn first.
        deadline: when its time is up, on the scheduler's clock.
        overtaken: how often a later request went before it.
        entered: when it was given its slots, on the scheduler's clock; None before.
        drawn: codes t drawn of each image.
        foreseeable: whether its codes can be drafted well (`jacobi.foreseeable`).
    """

    def __init__(
        self,
        order: Order,
        prompts: list[list[int]],
        sampler: Sampler,
        none: Tensor,
        tokens: int,
        pictures: Pictures,
        deadline: float | None = None,
        foreseeable: bool = False,
    ) -> None:
        self.prompts, self.priority, self.deadline = prompts, order.priority, deadline
        self.rows, self.overtaken, self.drawn = len(prompts) * len(none), 0, 0
        self.tokens = tokens
        self.entered: float | None = None
        news = threading.Condition()
        self.foreseeable = foreseeable
        self._sampler: Sampler | None = sampler
        # As they were drawn: a copy of each into its place would be a launch a request and step.
        # Any thread may read the list that is there: codes are only ever added to its end, and
        # where it has become long another takes its place.
        self._pieces, self._pictures = [none], pictures
        self._every, self._on_partial = order.every, order.on_partial
        self._news, self._told = news, 0
        self.future: Future[Tensor] = Future()
        # Not a method of this object: the two would hold each other until garbage is collected.
        self.future.add_done_callback(lambda _: _notify(news))

    # --- for who made it ------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Images N."""
        return len(self._pieces[0])

    def result(self, timeout: float | None = None) -> Tensor:
        """Wait for the codes, int64 [N, T].

        Raises:
            TimeoutError: not done after ``timeout`` seconds, or the request's own time is up.
            CancelledError: it was cancelled.
        """
        return self.future.result(timeout)

    def images(self, timeout: float | None = None) -> list[Image.Image]:
        """Wait for the pictures; raises as ``result`` does."""
        return self._pictures.decode(self.result(timeout))

    def cancel(self) -> bool:
        """Do not draw it, or not to its end; its slots are free for the next step. False where it
        is done already."""
        return self.future.cancel()

    def partial(self) -> Partial:
        """What is drawn now."""
        return self._part(self.drawn)

    def partials(self) -> Iterator[Partial]:
        """What is drawn, each time ``every`` more codes are, the whole images last. Who is slow
        skips some, and so does everybody where a step drew more than ``every``. Raises as
        ``result`` does when there will be no more."""
        seen = 0
        while seen < self.tokens:
            with self._news:
                self._news.wait_for(lambda: self._told > seen or self.future.done())  # noqa: B023
                told = self._told
            if told == seen:
                self.result()  # raises: there was no more to come
            seen = told
            yield self._part(seen)

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.wrap_future(self.future).__await__()

    # --- for the scheduler ----------------------------------------------------------------------

    @property
    def sampler(self) -> Sampler:
        """What draws its codes, until it ends."""
        assert self._sampler is not None, "it has ended"
        return self._sampler

    def put(self, codes: Tensor) -> None:
        """Keep the next codes of every image, int64 [N, n], which nobody changes from here on."""
        if len(self._pieces) == PIECES:
            self._pieces = [torch.cat(self._pieces, 1)]
        self._pieces.append(codes)
        self.drawn += codes.shape[1]

    def tell(self) -> None:
        """Tell who listens of every partial result that there is now, and nobody who cancelled.
        Raises what ``on_partial`` raises."""
        every = self._every or self.tokens
        due = list(range(self._told + every, self.drawn + 1, every))
        if self.drawn == self.tokens and self.tokens % every:
            due.append(self.tokens)
        for told in due:
            if self.future.cancelled():
                return
            with self._news:
                self._told = told
                self._news.notify_all()
            if self._on_partial is not None:
                self._on_partial(self._part(told))

    def late(self) -> str:
        """What is told at the end of its time."""
        return f"the request timed out with {self.drawn} of {self.tokens} codes drawn"

    def codes(self) -> list[list[int]]:
        """Those drawn of each image."""
        return self._kept(self.drawn).tolist()

    def whole(self) -> Tensor:
        """The codes of whole images, to ``finish`` with."""
        return self._kept(self.tokens)

    def finish(self, codes: Tensor) -> bool:
        """Hand over the codes; False where it was cancelled before. Nothing here can fail: who is
        told that it runs is told of an end."""
        self._let_go()
        self._pieces = [codes]  # the others may be parts of what was drawn for many
        if not self.future.set_running_or_notify_cancel():
            return False
        self.future.set_result(codes)
        return True

    def fail(self, error: BaseException) -> bool:
        """Hand over an error; False where it was cancelled before."""
        self._let_go()
        # Who keeps the error would keep what its frames hold, activations and all: after running
        # out of memory just what is needed.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, StopIteration):  # cannot be awaited: who did would wait for ever
            told = RuntimeError(f"drawing ended with {type(error).__name__}: {error}")
            told.__cause__ = error
            error = told
        if not self.future.set_running_or_notify_cancel():
            return False
        self.future.set_exception(error)
        return True

    def _let_go(self) -> None:
        """Of what only drawing needs: the noise is megabytes, and a request may be kept long."""
        self._sampler = self._on_partial = None

    def _part(self, drawn: int) -> Partial:
        return Partial(self._kept(drawn), self.tokens, self._pictures)

    def _kept(self, drawn: int) -> Tensor:
        # A copy outside of inference mode, so that it may be kept for a backward pass.
        with torch.inference_mode(False):
            codes = torch.cat(self._pieces, 1)
            return codes if codes.shape[1] == drawn else codes[:, :drawn].clone()


def _notify(news: threading.Condition) -> None:
    with news:
        news.notify_all()
