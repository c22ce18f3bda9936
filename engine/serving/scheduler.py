"""Continuous batching: requests of any length, seed and sampling share the steps of one batch.

An image takes hundreds of steps, so a batch that waited for its last image, or for its next
request, would run mostly empty. Here every step runs whatever is being drawn, each row at its own
position. When an image ends or is cancelled, its slots (`engine.serving.slots`) go to waiting
requests at the very next step, a few prompts at a time. Noise is keyed by (seed, draw, position),
so what is drawn depends on the request alone; the rest of the batch can change it only by rounding,
and in batch-invariant mode not at all.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from echogen.engine.cache import Prefix
from echogen.engine.cpu.packed import PackedTransformer
from echogen.engine.decoding.decode import Packed
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.images.vision import decoding_bytes
from echogen.engine.layout import Layout
from echogen.engine.ranges import span
from echogen.engine.serving.budget import plan
from echogen.engine.serving.crowd import Drawer, Live, Pace, drawers, warm_up
from echogen.engine.serving.intake import Intake
from echogen.engine.serving.metrics import Metrics
from echogen.engine.serving.partial import Partial
from echogen.engine.serving.prefill import PROMPTS, Prompt
from echogen.engine.serving.request import Order, Request
from echogen.engine.serving.slots import Slots
from echogen.engine.serving.waiting import QueueFull, Waiting
from echogen.engine.serving.windows import Windowed
from echogen.engine.serving.worker import SchedulerClosed, Worker

OUTDATED = "the engine's weights were refreshed; make a new scheduler"


class Scheduler(Worker):
    """Draws many requests at once.

    ::

        with Scheduler(engine) as scheduler:  # a thread of its own; or call step() yourself
            request = scheduler.submit(layout, seed=1, samples=4)
            images = request.images()  # or await request, or for part in request.partials()

    Args:
        engine: the scheduler uses its weights as they are now. After ``engine.refresh()`` it takes
            no more requests: make a new one. On a CPU, where it draws from a packed copy, it
            finishes what it has; elsewhere an image would mix two models, so all its requests fail
            with `SchedulerClosed`.
        slots: rows drawn at once, two per image with guidance; None: as many as the memory holds,
            at most `serving.budget.MOST`.
        queue: requests that may wait.
        memory: bytes to plan with; None: most of what is free (`serving.budget.SHARE`).
        prompt_tokens: the longest prompt; None: what the model has room for, at most
            `serving.budget.PROMPT_TOKENS`. Every slot has room for it, and batch-invariant steps
            read all of that.
        invariant: batch-invariant mode: a request draws the same codes, bit for bit, alone or in
            any batch of this scheduler. In C++ (`echogen.engine.cpu.native`) that holds in any mode
            and at no cost. Elsewhere every step then has one shape, all slots at full length, since
            the shape decides how sums are rounded; the constructor checks that this suffices
            (`Slots.rows_agree`), and a prompt runs alone. In the usual mode a step runs only the
            rows and positions it needs, prompts admitted in one step run together
            (`serving.prefill`), and codes that are equally likely up to rounding may differ between
            batches.
        windows: with weights packed for PyTorch's operations, draw several codes of an image a step
            while at most `slots.WINDOW_ROWS` are in use and half of the rows can be drafted well
            (`jacobi.foreseeable`). False: always code by code, as batch-invariant mode does.
        patience: how often a request may be overtaken, see `Waiting`.
        clock: seconds; for tests.

    Raises:
        BudgetError: what is asked for does not fit the memory or the model.
        ValueError: a queue without places; batch-invariant mode with a number of slots for which it
            does not hold on this machine.
        CaptureError: on a GPU, steps that cannot be recorded (`echogen.engine.gpu.graphs`).
    """

    def __init__(
        self,
        engine: Engine,
        slots: int | None = None,
        queue: int = 256,
        memory: int | None = None,
        prompt_tokens: int | None = None,
        invariant: bool = False,
        windows: bool = True,
        patience: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if queue < 1 or patience < 0:
            raise ValueError(
                f"queue = {queue}, patience = {patience}; they must be at least 1 and at least 0"
            )
        super().__init__()
        decoder, table = engine.decoder, engine.code_table
        self._copied = isinstance(decoder, Packed)
        windows = windows and isinstance(decoder, PackedTransformer) and not invariant
        self._together = not (self._copied or invariant)
        self.plan = plan(
            decoder.config, table.dtype, table.device,
            decoding_bytes(engine.vq, engine.image_size), slots, memory, prompt_tokens,
            fp8_cache=isinstance(decoder, DeviceTransformer) and decoder.fp8_cache, windows=windows,
            together=self._together,
        )  # fmt: skip
        self._sampling, self._clock = engine.sampling, clock
        self._intake = Intake(engine, self.plan)
        self._on_operators = isinstance(decoder, DeviceTransformer)
        self._slots = Slots(
            decoder, table, self.plan.slots, self.plan.capacity, invariant, self.plan.prefix_bytes,
            windows, self._together,
        )  # fmt: skip
        with torch.inference_mode():
            logits = self._slots.warm_up(self.plan.prompt_tokens, engine.prompts.pad)
            warm_up(logits, self._on_operators)
            if self._on_operators:  # the first picture would wait for cuDNN to load and plan
                engine.decode(torch.zeros(1, decoder.config.image_tokens, dtype=torch.int64))
            if invariant and not self._slots.rows_agree([engine.prompts.bos, *range(16)]):
                raise ValueError(
                    f"slots = {self.plan.slots}: here products of so many rows round a row by its "
                    f"place in the batch, so they are not batch-invariant; take another number "
                    f"(4 or more usually works)"
                )
        self._waiting, self._live = Waiting[Request](queue, patience), list[Live]()
        self._cancelled = threading.Event()  # set: somebody who may be waiting was cancelled
        self._earliest = math.inf  # no deadline of those who wait is before it
        self._drawers: list[Drawer] | None = None  # of all live requests; None: one came or went
        self._pace = Pace(table.device)
        self._metrics = Metrics(slots=self.plan.slots)

    # --- submitting -----------------------------------------------------------------------------

    def submit(
        self,
        layout: Layout,
        seed: int = 0,
        sampling: Sampling | None = None,
        samples: int = 1,
        draws: Sequence[int] | None = None,
        negative: Layout | None = None,
        priority: int = 0,
        timeout: float | None = None,
        every: int = 0,
        on_partial: Callable[[Partial], None] | None = None,
    ) -> Request:
        """Queue a request; from any thread.

        Args:
            layout, seed, sampling, negative: as for `Engine.generate_codes`.
            samples: number of images; they are drawn together, and their prompt is run once.
            draws: the number of each image's noise; None: 0 … samples − 1.
            priority: higher ones go first (within ``patience``).
            timeout: seconds from now after which it fails with `TimeoutError`, whether it waits or
                is partly drawn.
            every: give a partial result whenever this many more codes are drawn (several after a
                step that drew more); 0: only the finished images.
            on_partial: called with each partial result in the drawing thread, so all requests wait
                for it. (In an event loop let it call ``loop.call_soon_threadsafe``.) If it raises,
                only this request fails.

        Raises:
            QueueFull: the queue is full.
            LayoutError: a prompt too long for the slots, or with reserved tokens.
            ValueError: more rows than there are slots, or values out of range.
            SchedulerClosed: after ``shutdown`` or ``engine.refresh()``, or when a step died of an
                error.
        """
        if self._intake.outdated:
            self._close(OUTDATED)
        try:
            order = Order(
                layout, seed, sampling or self._sampling, samples, draws, negative,
                priority, timeout, every, on_partial,
            )  # fmt: skip
            request = self._intake.request(order, self._clock())
            # Not a bound method: a request that is kept would then keep the scheduler.
            request.future.add_done_callback(partial(_note_cancelled, self._cancelled))
            self._drop()
            with self._changed:
                if self._closed:
                    raise SchedulerClosed(self._closed)
                self._waiting.put(request)
                self._earliest = min(self._earliest, _deadline(request))
                self._metrics.submitted += 1
                self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self._metrics.refused += 1
                self._metrics.full += isinstance(error, QueueFull)
            raise
        return request

    # --- drawing --------------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> bool:
        """Free what ended, admit what fits, draw the next codes of every image; False: nothing to
        do.

        An error of one request fails that request; it is not raised here.
        """
        began = time.perf_counter()
        self._drop()
        self._leave()
        if self._mixed():
            self._close(OUTDATED)
            self._abandon(SchedulerClosed(OUTDATED))
        waiting = len(self._waiting)
        if not waiting and not self._live:
            return False
        with span("engine/serve/step", waiting=waiting, live=len(self._live)):
            self._admit()
            self._draw()
        self._count(busy_s=time.perf_counter() - began)
        return True

    def _mixed(self) -> bool:
        """Whether images being drawn would continue with other weights than they began with."""
        return self._intake.outdated and not self._copied

    def _drop(self) -> None:
        """Remove from the queue the requests that were cancelled or ran out of time. The queue is
        walked only when there may be some: many steps are made while it is long."""
        with self._changed:
            late = self._clock() >= self._earliest
            if not (late or self._cancelled.is_set() or self._cancelling):
                return
            self._cancelled.clear()
            gone = [request for request in self._waiting if self._gone(request)]
            for request in gone:
                self._waiting.remove(request)
            self._earliest = min(map(_deadline, self._waiting), default=math.inf)
        for request in gone:
            self._bury(request)

    def _leave(self) -> None:
        """Free the slots of requests that were cancelled or ran out of time."""
        for live in list(self._live):
            if self._gone(live.request):
                self._release(live)
                self._bury(live.request)

    def _gone(self, request: Request) -> bool:
        return self._late(request) or self._cancelling or request.future.cancelled()

    def _late(self, request: Request) -> bool:
        return request.deadline is not None and self._clock() >= request.deadline

    def _bury(self, request: Request) -> None:
        """Tell a request that it is no longer drawn; never under a lock, as its future runs
        callbacks."""
        if self._cancelling:
            request.cancel()
        # During a long step, whoever waits may notice the time limit first, and cancel.
        told = request.fail(TimeoutError(request.late()))
        self._count_outcome("expired", told or self._late(request))

    def _count(self, **more: float) -> None:
        with self._changed:
            for name, value in more.items():
                setattr(self._metrics, name, getattr(self._metrics, name) + value)

    def _count_outcome(self, outcome: str, told: bool) -> None:
        """Count what became of a request; one that was cancelled before it was ``told`` counts as
        cancelled."""
        self._count(**{outcome if told else "cancelled": 1})

    def _release(self, live: Live) -> None:
        # In this order: on a lost device the release fails, and all live requests are told so.
        self._slots.release(live.held)
        self._remove(live)

    def _remove(self, live: Live) -> None:
        self._live.remove(live)
        self._drawers = None

    def _admit(self) -> None:
        """Run the prompts of requests that fit, in turn, until ``PROMPTS`` tokens are reached or
        passed, and draw their first codes."""
        ran = 0
        while ran < PROMPTS:
            self._leave()  # prompts take time: a request that left meanwhile gives slots back,
            if not self._slots.free:
                return
            self._drop()  # or needs none
            lives, tokens = self._next(PROMPTS - ran)
            if not lives:
                return
            rows = sum(live.request.rows for live in lives)
            with span("engine/serve/admit", rows=rows, requests=len(lives), tokens=tokens):
                self._enter(lives)
            ran += tokens

    def _next(self, most: int) -> tuple[list[Live], int]:
        """Admit the next request, or all that enter ``together``, until ``most`` tokens of prompts
        are reached or passed; return them, and the number of tokens to be run."""
        lives, new, free = list[Live](), set[Prompt](), self._slots.free
        while free and sum(map(len, new)) < most and (self._together or not lives):
            with self._changed:
                request = self._waiting.take(free)
                if request is None:
                    break
                self._live.append(live := Live(request))
                self._metrics.admitted += 1
            request.entered = self._clock()
            lives.append(live)
            new |= {p for p in map(tuple, request.prompts) if not self._slots.prompts.keeps(p)}
            free -= request.rows
        return lives, sum(map(len, new))

    def _enter(self, lives: list[Live]) -> None:
        """Run the prompts of requests, put these in slots, and draw their first codes."""
        keep = dict[Prompt, bool]()
        for live in lives:
            for i, prompt in enumerate(live.request.prompts):
                # What guidance steers away from is usually the same for many requests.
                keep[tuple(prompt)] = i > 0 or keep.get(tuple(prompt), False)
        found, logits = self._slots.prompts.run_all(keep), dict[int, Tensor]()
        for live in lives:
            try:
                logits |= self._fill(live, found)
            except Exception as error:
                self._fail([live], error)
        found.clear()  # whoever keeps an error keeps this frame
        self._drawers, filled = None, [live for live in lives if live.rows is not None]
        try:
            first = [
                (drawer, torch.stack([logits[row] for row in drawer.rows.numbers]))
                for drawer in drawers(filled, self._on_operators)
            ]
        except Exception as error:
            self._fail(filled, error)
            return
        for drawer, rows in first:
            self._advance(drawer, rows)

    def _fill(self, live: Live, found: Mapping[Prompt, Prefix | Exception]) -> dict[int, Tensor]:
        """Put a request in slots, and return the logits [V] that its prompts leave for each."""
        prefixes = list[Prefix]()
        for prompt in live.request.prompts:
            prefix = found[tuple(prompt)]
            if isinstance(prefix, Exception):
                raise prefix
            prefixes += [prefix] * live.request.samples
        live.rows = self._slots.take(prefixes)
        return {row: x.logits for row, x in zip(live.rows.numbers, prefixes, strict=True)}

    def _draw(self) -> None:
        """Run one batched step, and draw from its logits the next code of every image, or
        several."""
        if not self._live:
            return
        try:
            if self._drawers is None:
                self._drawers = self._who_draws()
            if windowed := [each for each in self._drawers if isinstance(each, Windowed)]:
                width = self._slots.width
                logits = self._slots.window(each.ahead(width) for each in windowed)
            else:
                logits = self._slots.step()
            self._pace()
        except Exception as error:  # of no particular request
            self._fail(list(self._live), error)
            return
        self._count(steps=1)
        for drawer in self._drawers:
            self._advance(drawer, logits[drawer.rows.index])

    def _who_draws(self) -> list[Drawer]:
        """The drawers of all live requests, moved to the lowest slots; for windows, where those are
        faster for half of the rows."""
        places = self._slots.gather([live.held for live in self._live])
        for live, place in zip(self._live, places, strict=True):
            live.rows = place
        rows = sum(live.request.rows for live in self._live)
        well = sum(live.request.rows for live in self._live if live.request.foreseeable)
        if self._slots.width and 2 * well >= rows:
            return [Windowed(live) for live in self._live]
        for live in self._live:
            live.drafts = None
        return drawers(self._live, self._on_operators)

    def _advance(self, drawer: Drawer, logits: Tensor) -> None:
        """Draw the next codes of some requests from the logits of their rows, then feed and keep
        them."""
        steps = min(live.request.drawn for live in drawer.lives)
        try:
            with span("engine/sample", rows=logits[..., 0].numel(), step=steps):
                drawn = drawer.draw(logits)
            self._slots.feed(drawer.rows, drawn[0] if len(drawn) == 1 else torch.cat(drawn))
        except Exception as error:
            self._fail(drawer.lives, error)
            return
        self._count(codes=sum(codes.numel() for codes in drawn))
        for live, codes in zip(drawer.lives, drawn, strict=True):
            self._take(live, codes)

    def _take(self, live: Live, codes: Tensor) -> None:
        """Keep the codes drawn for a request; hand them over once all are drawn."""
        request = live.request
        try:
            request.put(codes)
            request.tell()
            if request.drawn < request.tokens:
                return
            if self._mixed():  # refreshed during this very step
                raise SchedulerClosed(OUTDATED)
            whole = request.whole()
        except Exception as error:
            self._fail([live], error)
            return
        self._release(live)
        self._count_outcome("finished", request.finish(whole))

    def _fail(self, lives: list[Live], error: BaseException) -> None:
        """Hand an error to requests being drawn. All get it before any slot is freed, since on a
        lost device freeing fails as well, with another error."""
        for live in lives:
            self._remove(live)
            self._count_outcome("failed", live.request.fail(error))
        for live in lives:
            if live.rows is not None:
                self._slots.release(live.rows)

    # --- for the worker ---------------------------------------------------------------------------

    def _busy(self) -> bool:
        return bool(self._waiting or self._live)

    def _abandon(self, error: BaseException) -> None:
        """Hand an error to all requests that are left."""
        with self._changed:
            left = [live.request for live in self._live] + self._waiting
            self._live, self._waiting[:], self._drawers = [], [], None
        for request in left:
            self._count_outcome("failed", request.fail(error))

    def metrics(self) -> Metrics:
        """A copy of the counters."""
        with self._changed:
            return replace(
                self._metrics,
                waiting=len(self._waiting),
                live=len(self._live),
                live_slots=sum(live.request.rows for live in self._live),
            )


def _note_cancelled(cancelled: threading.Event, future: Future[Tensor]) -> None:
    if future.cancelled():
        cancelled.set()


def _deadline(request: Request) -> float:
    return math.inf if request.deadline is None else request.deadline
