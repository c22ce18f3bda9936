"""A request to draw, as its submitter sees it: result, partial pictures, cancellation."""

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
"""Most tensors that a request's codes are spread over: a partial result concatenates them."""


@dataclass(frozen=True)
class Order:
    """The arguments of `Scheduler.submit`, checked.

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
        # A value that is not a number would break the queue's ordering, in the shared drawing
        # thread.
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
        none: empty codes int64 [N, 0], to which those of its N images are added.

    Attributes:
        tokens: T, the codes of an image.
        future: gives the codes int64 [N, T], or the error that ended the request (`TimeoutError`
            when its time was up).
        prompts: the conditional prompt and, with guidance, the one to steer away from.
        rows: slots it takes.
        priority: higher ones are drawn first.
        deadline: when its time is up, on the scheduler's clock.
        overtaken: how often a later request went before it.
        entered: when it was admitted to its slots, on the scheduler's clock; None before.
        drawn: t, the codes drawn of each image so far.
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
        # In the pieces they were drawn in: copying each into place would cost one launch per
        # request and step. Any thread may read the list: pieces are only appended to it, and a
        # list that has grown long is replaced by a new one.
        self._pieces, self._pictures = [none], pictures
        self._every, self._on_partial = order.every, order.on_partial
        self._news, self._told = news, 0
        self.future: Future[Tensor] = Future()
        # Not a bound method: the request and its future would then keep each other alive until
        # the garbage collector runs.
        self.future.add_done_callback(lambda _: _notify(news))

    # --- for the submitter ----------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """N, the number of images."""
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

    def image(self, number: int, timeout: float | None = None) -> Image.Image:
        """Wait for one of the pictures, ``number`` of 0 … N − 1; raises as ``result`` does."""
        return self._pictures.decode(self.result(timeout)[number : number + 1])[0]

    def cancel(self) -> bool:
        """Cancel the drawing; its slots are free for the next step. False if it is already
        done."""
        return self.future.cancel()

    def partial(self) -> Partial:
        """What is drawn so far."""
        return self._part(self.drawn)

    def partials(self) -> Iterator[Partial]:
        """Yield what is drawn each time ``every`` more codes are, the whole images last. A slow
        reader skips some, and so does everyone when one step draws more than ``every``. Raises as
        ``result`` does if the drawing ends early."""
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
        """The sampler that draws its codes; dropped when the request ends."""
        assert self._sampler is not None, "it has ended"
        return self._sampler

    def put(self, codes: Tensor) -> None:
        """Keep the next codes of every image, int64 [N, n]; nobody may change them afterwards."""
        if len(self._pieces) == PIECES:
            self._pieces = [torch.cat(self._pieces, 1)]
        self._pieces.append(codes)
        self.drawn += codes.shape[1]

    def tell(self) -> None:
        """Tell the listeners of every partial result that is now due, unless the request was
        cancelled. Raises what ``on_partial`` raises."""
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
        """The message of its `TimeoutError`."""
        return f"the request timed out with {self.drawn} of {self.tokens} codes drawn"

    def codes(self) -> list[list[int]]:
        """The codes drawn of each image, as lists."""
        return self._kept(self.drawn).tolist()

    def whole(self) -> Tensor:
        """The codes of whole images, to pass to ``finish``."""
        return self._kept(self.tokens)

    def finish(self, codes: Tensor) -> bool:
        """Hand over the codes; False if it was already cancelled. Nothing here can fail, so a
        future that is marked as running always ends."""
        self._let_go()
        self._pieces = [codes]  # the others may be views of codes drawn for many requests
        if not self.future.set_running_or_notify_cancel():
            return False
        self.future.set_result(codes)
        return True

    def fail(self, error: BaseException) -> bool:
        """Hand over an error; False if it was already cancelled."""
        self._let_go()
        # Whoever keeps the error would keep what its frames hold, activations included: after
        # running out of memory, exactly the memory that is needed.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, StopIteration):  # await cannot raise it and would wait for ever
            told = RuntimeError(f"drawing ended with {type(error).__name__}: {error}")
            told.__cause__ = error
            error = told
        if not self.future.set_running_or_notify_cancel():
            return False
        self.future.set_exception(error)
        return True

    def _let_go(self) -> None:
        """Drop what only drawing needs: noise takes megabytes, and a request may be kept long."""
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
