"""Serves clients over HTTP: draws pictures on the scheduler, and finds boxes beside it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from echogen.engine.cycle import CycleResult, score
from echogen.engine.decoding.parts import in_parts
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.ground import MOST_ASKED
from echogen.engine.http.wire import (
    GONE,
    LONGEST_EXPRESSION,
    MOST_EXPRESSIONS,
    Drawing,
    Refused,
    Search,
    encoded,
    in_base64,
)
from echogen.engine.layout import Box, Layout, LayoutError
from echogen.engine.serving.partial import Partial
from echogen.engine.serving.request import Request
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.waiting import QueueFull
from echogen.engine.serving.worker import SchedulerClosed

BEAT = 15.0
"""Seconds of silence after which a stream says that it is still alive: proxies hang up on a
silent one (nginx after 60)."""
ALIVE = ": waiting\n\n"
"""What it then sends: a comment (HTML Living Standard, 9.2.6)."""
POOLS = {"prompt": 2, "read": 2, "decode": 1, "encode": 4, "sketch": 1, "search": 1}
"""Threads beside the scheduler's. They build prompts, read pictures that clients send (drawings
must not wait for those), decode whole pictures, write those as files (Pillow lets other threads run
meanwhile), decode partial pictures (whole ones must not wait for those) and find objects. What
takes much memory has one thread: that of decoding is in the plan, and a search takes it from what
the plan leaves (`budget.SHARE`)."""

SOONER = "ask for less, or with a longer timeout"

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A drawing that was asked for; ``began`` and ``deadline`` are on the event loop's clock, and
    ``turns`` are what a check looks for in each picture."""

    body: Drawing
    layout: Layout
    turns: list[list[str]]
    sampling: Sampling
    request: Request
    began: float
    deadline: float


class Service:
    """Draws pictures and finds objects with an engine and its scheduler.

    Args:
        engine, scheduler: of one model; the scheduler's thread runs while this is used.
        model: its name, for clients.
        limit: seconds that an answer may take, waiting included.
        searches: how many may wait for the one that runs, checks of drawings included.
        timed: called for every request to draw with the seconds it was ``waiting``, and then with
            those it was ``drawing``.

    Attributes:
        busy: how many jobs run or wait in each of ``POOLS``.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        model: str,
        limit: float,
        searches: int,
        timed: Callable[[str, float], None],
    ) -> None:
        self.engine, self.scheduler, self.model, self.limit = engine, scheduler, model, limit
        self.busy, self._counting = Counter(dict.fromkeys(POOLS, 0)), threading.Lock()
        self._searches, self._finding, self._timed = searches, 0, timed
        self._doing = set[Future[Any]]()
        self._pools = {n: ThreadPoolExecutor(k, f"echogen-{n}") for n, k in POOLS.items()}

    def about(self) -> dict[str, Any]:
        """What the model is, and how much is drawn at once."""
        plan, config = self.scheduler.plan, self.engine.transformer.config
        return {
            "model": self.model,
            "image_size": self.engine.image_size,
            "codes": config.image_tokens,
            "sampling": asdict(self.engine.sampling),
            "pixels_trained": self.engine.pixels_trained,
            "slots": plan.slots,
            "prompt_tokens": plan.prompt_tokens,
            "timeout": self.limit,
        }

    def shutdown(self) -> None:
        """Finish what is already asked for, and end; after ``limit`` seconds at the latest, even if
        a device hangs."""
        end = time.monotonic() + self.limit
        self.scheduler.shutdown(timeout=self.limit)  # after it no request waits any more
        with self._counting:
            doing = tuple(self._doing)
        wait(doing, max(0.0, end - time.monotonic()))
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    # --- drawing --------------------------------------------------------------------------------

    async def submit(self, body: Drawing, news: asyncio.Event | None = None) -> Job:
        """Queue a drawing; ``news`` is set whenever more of it is drawn. Raises Refused."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        seconds = self.limit if body.timeout is None else min(body.timeout, self.limit)
        if not seconds > 0:
            raise Refused(400, f"timeout = {body.timeout}; it must be above 0 seconds")

        def tell(_: Partial) -> None:
            if news is not None:
                loop.call_soon_threadsafe(news.set)

        def submitted() -> Job:
            layout, negative = body.layouts()
            sampling = body.sampling(self.engine.sampling)
            turns = self._turns(o.expr for o in layout.objects) if body.check else []
            left = max(1e-9, began + seconds - loop.time())
            request = self.scheduler.submit(
                layout, body.seed, sampling, body.samples, body.draws, negative, body.priority,
                left, body.every, tell,
            )  # fmt: skip
            return Job(body, layout, turns, sampling, request, began, began + seconds)

        try:
            return await self._do("prompt", submitted, began + seconds)
        except QueueFull as error:
            raise Refused(503, str(error), again=True) from None
        except SchedulerClosed as error:
            raise Refused(503, str(error)) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None

    async def answer(self, job: Job) -> dict[str, Any]:
        """Wait for the pictures, and for what is found in them. Raises Refused."""
        body, codes = job.body, await self._drawn(job)
        decoding = [partial(job.request.image, i) for i in range(len(codes))]
        images = await self._each("decode", decoding, job.deadline)
        boxes = await self._recovered(job, codes) if body.check else None
        writing = [partial(in_base64, image, body.format) for image in images]
        files = await self._each("encode", writing, job.deadline)
        pictures: list[dict[str, Any]] = [
            {"draw": draw, "image": file}
            for draw, file in zip(body.draws or range(len(files)), files, strict=True)
        ]
        told: dict[str, Any] = {"images": pictures}
        seconds = _since(job.began)
        if boxes is not None:
            cycle = CycleResult(
                job.layout, images, codes, boxes, *score(job.layout, boxes), seconds=seconds
            )
            told["best"] = cycle.best
            for i, picture in enumerate(pictures):
                found = cycle.to_dict(i)
                picture |= {"reward": found["reward"], "objects": found["objects"]}
        return told | {
            "format": body.format,
            "seed": body.seed,
            "sampling": asdict(job.sampling),
            "seconds": seconds,
        }

    async def picture(self, job: Job, kind: str) -> bytes:
        """Wait for the picture, the best one if there are several, and return it as the bytes of a
        file. A check reads codes, so only that one is decoded. Raises Refused."""
        codes, best = await self._drawn(job), 0
        if len(codes) > 1:
            _, _, reward, _ = score(job.layout, await self._recovered(job, codes))
            best = int(reward.argmax())
        image = await self._do("decode", partial(job.request.image, best), job.deadline)
        return await self._do("encode", partial(encoded, image, kind), job.deadline)

    async def stream(
        self, job: Job, news: asyncio.Event, ended: Callable[[int], None]
    ) -> AsyncGenerator[str, None]:
        """Yield server-sent events: partial pictures each time ``news`` says that there is more (a
        slow client skips some), then the whole answer. ``ended`` is called with the final
        status."""
        answer, sent, status = asyncio.create_task(self.answer(job)), 0, GONE
        try:
            while not answer.done():
                more = asyncio.create_task(news.wait())
                try:
                    while not await _soon(answer, more):
                        yield ALIVE
                finally:
                    more.cancel()
                if answer.done():
                    break
                news.clear()
                part = job.request.partial()
                drawn = part.codes.shape[1]
                if job.request.future.done() or drawn == part.tokens or drawn == sent:
                    continue  # a step that drew several codes sets the news for each
                sent = drawn
                work = partial(_sketched, part, job.body.format)
                sketch = asyncio.create_task(self._do("sketch", work))
                try:
                    while not await _soon(answer, sketch):
                        yield ALIVE
                    if not answer.done():  # else it holds the whole, or says why there is none
                        told = {"drawn": drawn, "codes": part.tokens, "images": sketch.result()}
                        yield event("partial", told)
                finally:
                    sketch.cancel()
            yield event("done", answer.result())
            status = 200
        except Refused as error:
            status = error.status
            yield event("error", {"error": str(error), "status": error.status})
        except Exception as error:
            status = 500
            said = " ".join(f"{type(error).__name__}: {error}".split())
            yield event("error", {"error": said, "status": status})
            raise
        finally:
            answer.cancel()
            ended(status)

    async def _drawn(self, job: Job) -> Tensor:
        """Wait for the codes, int64 [N, T]. Raises Refused."""
        try:
            return await _in_time(job.request.future, job.deadline, job.request.late)
        except TimeoutError as error:
            raise Refused(504, f"{error}; {SOONER}") from None
        except SchedulerClosed as error:
            raise Refused(503, str(error)) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # this answer was, not the drawing
                raise
            raise Refused(503, "the drawing was cancelled; ask again", again=True) from None
        finally:
            self._time(job)

    def _time(self, job: Job) -> None:
        """Report how long a request waited and was drawn, whether or not it was finished."""
        entered, now = job.request.entered, asyncio.get_running_loop().time()
        self._timed("waiting", (now if entered is None else entered) - job.began)
        if entered is not None:
            self._timed("drawing", now - entered)

    async def _recovered(self, job: Job, codes: Tensor) -> list[list[Box]]:
        """Find a layout's objects in the pictures of codes [N, T]. Raises Refused."""
        boxes = list[list[Box]]()
        self._finding += 1  # it counts as a search, but is not refused: its pictures are drawn
        try:
            for picture in codes.split(1):
                found = list[Box]()
                for turn in job.turns:
                    find = partial(self.engine.ground_codes, picture, [turn])
                    found += (await self._do("search", find, job.deadline))[0]
                boxes.append(found)
        finally:
            self._finding -= 1
        return boxes

    # --- finding --------------------------------------------------------------------------------

    async def find(self, body: Search) -> dict[str, Any]:
        """Find the boxes of the expressions asked for. Raises Refused."""
        if self._finding > self._searches:
            raise Refused(
                503,
                f"{self._searches} searches wait, the most allowed; try again later",
                again=True,
            )
        self._finding += 1
        try:
            return await self._found(body)
        finally:
            self._finding -= 1

    async def _found(self, body: Search) -> dict[str, Any]:
        began = asyncio.get_running_loop().time()
        deadline = began + self.limit

        def read() -> tuple[list[list[str]], Image.Image]:
            return self._turns(body.expressions), body.picture(self.engine.image_size)

        try:
            turns, picture = await self._do("read", read, deadline)
            boxes = list[Box]()
            for turn in turns:
                find = partial(self.engine.ground, picture, turn, body.features)
                boxes += await self._do("search", find, deadline)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        objects = [
            {"expr": expr, "box": list(box)}
            for expr, box in zip(body.expressions, boxes, strict=True)
        ]
        return {"objects": objects, "seconds": _since(began)}

    def _turns(self, expressions: Iterable[str]) -> list[list[str]]:
        """Split what to find in a picture into turns, each of at most ``MOST_EXPRESSIONS`` and of
        ``MOST_ASKED`` tokens in all. Between turns others get theirs, and no more are taken once
        the client has left.

        Raises:
            LayoutError: an expression that is too long or cannot be used.
        """
        prompts = self.engine.prompts
        most = min(LONGEST_EXPRESSION, self.scheduler.plan.prompt_tokens)

        def share(expr: str) -> int:
            tokens, least = prompts.fewest(expr), "at least "
            if tokens <= most:  # else it is not tokenised: meanwhile no other text could be
                tokens, least = len(prompts.branch(expr)), ""
            if tokens > most:
                raise LayoutError(
                    f"an expression takes {least}{tokens} tokens; at most {most} can be looked "
                    f"for, so shorten it ({expr[:30]!r}...)"
                )
            return max(tokens + prompts.codec.steps, MOST_ASKED // MOST_EXPRESSIONS)

        return list(in_parts(expressions, share, MOST_ASKED))

    async def _each(self, pool: str, works: Iterable[Callable[[], T]], deadline: float) -> list[T]:
        """Do several pieces of work, never more at once than a pool has threads: they take turns
        with the work of other requests. Raises as ``_do`` does."""
        threads = asyncio.Semaphore(POOLS[pool])

        async def one(work: Callable[[], T]) -> T:
            async with threads:
                return await self._do(pool, work, deadline)

        doing = [asyncio.create_task(one(work)) for work in works]
        try:
            return await asyncio.gather(*doing)
        finally:
            for task in doing:
                task.cancel()  # no effect if it is done

    async def _do(self, pool: str, work: Callable[[], T], deadline: float | None = None) -> T:
        """Do some work in a thread of a pool when its turn comes; work that nobody waits for any
        more is not begun. Raises Refused."""

        def ended(done: Future[T]) -> None:
            with self._counting:
                self.busy[pool] -= 1
                self._doing.discard(done)

        with self._counting:
            self.busy[pool] += 1
            doing = self._pools[pool].submit(work)
            self._doing.add(doing)
        doing.add_done_callback(ended)
        late = f"the request timed out before its turn to {pool} was over"
        return await _in_time(doing, deadline, lambda: late)


async def _in_time(future: Future[T], deadline: float | None, late: Callable[[], str]) -> T:
    """Wait for a thread's result; cancel it if it is late or no client waits for it any more.
    Raises Refused, and what the thread raises."""
    turn, now = asyncio.wrap_future(future), asyncio.get_running_loop().time()
    try:
        left = None if deadline is None else max(0.0, deadline - now)
        if not (await asyncio.wait((turn,), timeout=left))[0]:
            raise Refused(504, f"{late()}; {SOONER}")
        return turn.result()
    finally:
        turn.cancel()  # no effect if it is done


async def _soon(*tasks: asyncio.Task[Any]) -> bool:
    """Whether one of the tasks is done within ``BEAT`` seconds."""
    done, _ = await asyncio.wait(tasks, timeout=BEAT, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def _sketched(part: Partial, kind: str) -> list[str]:
    return [in_base64(image, kind) for image in part.images()]


def _since(began: float) -> float:
    return round(asyncio.get_running_loop().time() - began, 4)


def event(name: str, data: dict[str, Any]) -> str:
    """A server-sent event (HTML Living Standard, 9.2)."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
