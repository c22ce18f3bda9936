"""What is done for who asks over HTTP: pictures from the scheduler, boxes beside it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from echogen.engine.cycle import CycleResult, score
from echogen.engine.engine import Engine
from echogen.engine.http.wire import Drawing, Refused, Search, encoded, texts
from echogen.engine.scheduler import Scheduler
from echogen.engine.serving.partial import Partial
from echogen.engine.serving.request import Request
from echogen.engine.serving.waiting import QueueFull
from echogen.engine.serving.worker import SchedulerClosed

BEAT = 15.0
"""Seconds of silence after which a stream says that it is still there: proxies hang up on who says
nothing (nginx after 60)."""

T = TypeVar("T")


class Drawn(NamedTuple):
    """Pictures, and the cycle's scores where they were checked."""

    images: list[Image.Image]
    cycle: CycleResult | None
    seconds: float


class Service:
    """Draws and finds on an engine and its scheduler.

    Args:
        engine, scheduler: of one model; the scheduler's thread runs while this is used.
        model: name to tell who asks.
        limit: seconds that a request may take, waiting included.
        searches: that may wait for the one being made. One is made at a time: the memory is
            planned for the scheduler.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, model: str, limit: float, searches: int
    ) -> None:
        self.engine, self.scheduler, self.model, self.limit = engine, scheduler, model, limit
        self._finder = ThreadPoolExecutor(1, "echogen-finder")
        self._searches, self._searching = searches, 0

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
        """Draw and find what is asked for already, and end."""
        self._finder.shutdown()
        self.scheduler.shutdown()

    # --- drawing --------------------------------------------------------------------------------

    async def submit(self, body: Drawing, news: asyncio.Event | None = None) -> Request:
        """Queue what is asked for; ``news`` is set whenever more of it is drawn. Raises Refused."""
        timeout = self.limit if body.timeout is None else min(body.timeout, self.limit)
        loop = asyncio.get_running_loop()

        def tell(_: Partial) -> None:
            if news is not None:
                loop.call_soon_threadsafe(news.set)

        def submitted() -> Request:
            layout, negative = body.layouts()
            sampling = body.sampling(self.engine.sampling)
            return self.scheduler.submit(
                layout, body.seed, sampling, body.samples, body.draws, negative, body.priority,
                timeout, body.every, tell,
            )  # fmt: skip

        try:
            # Beside the event loop: prompts are tokenized, and noise is prepared.
            return await asyncio.to_thread(submitted)
        except (QueueFull, SchedulerClosed) as error:
            raise Refused(503, str(error)) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None

    async def answer(self, body: Drawing, request: Request, began: float) -> dict[str, Any]:
        """Wait for the pictures, and for what is found in them. Raises Refused."""
        drawn = await self._drawn(body, request, began)
        pictures = await asyncio.to_thread(texts, drawn.images, body.format)
        draws = body.draws or range(len(pictures))
        images: list[dict[str, Any]] = [
            {"draw": draw, "image": picture} for draw, picture in zip(draws, pictures, strict=True)
        ]
        told: dict[str, Any] = {"images": images}
        if drawn.cycle is not None:
            told["best"] = drawn.cycle.best
            for i, image in enumerate(images):
                found = drawn.cycle.to_dict(i)
                image |= {"reward": found["reward"], "objects": found["objects"]}
        return told | {
            "format": body.format,
            "seed": body.seed,
            "sampling": asdict(body.sampling(self.engine.sampling)),
            "seconds": round(drawn.seconds, 4),
        }

    async def picture(self, body: Drawing, request: Request, began: float, kind: str) -> bytes:
        """Wait for the picture, the best where several were checked, as the bytes of a file.
        Raises Refused."""
        drawn = await self._drawn(body, request, began)
        best = 0 if drawn.cycle is None else drawn.cycle.best
        return await asyncio.to_thread(encoded, drawn.images[best], kind)

    async def stream(
        self, body: Drawing, request: Request, began: float, news: asyncio.Event
    ) -> AsyncIterator[str]:
        """Partial pictures, each time ``news`` says that there is more (who is slow skips some),
        then the whole answer, as server-sent events."""
        loop = asyncio.get_running_loop()
        request.future.add_done_callback(lambda _: loop.call_soon_threadsafe(news.set))
        while not request.future.done():
            try:
                await asyncio.wait_for(news.wait(), BEAT)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            news.clear()
            part = request.partial()
            drawn = part.codes.shape[1]
            if request.future.done() or drawn in (0, part.tokens):
                continue
            pictures = await asyncio.to_thread(lambda p: texts(p.images(), body.format), part)
            yield event("partial", {"drawn": drawn, "codes": part.tokens, "images": pictures})
        try:
            yield event("done", await self.answer(body, request, began))
        except Refused as error:
            yield event("error", {"error": str(error), "status": error.status})
        except Exception as error:
            yield event("error", {"error": f"{type(error).__name__}: {error}", "status": 500})
            raise

    async def _drawn(self, body: Drawing, request: Request, began: float) -> Drawn:
        try:
            codes = await request
            images = await asyncio.to_thread(request.images)
        except TimeoutError as error:
            raise Refused(504, f"{error}; ask for less, or with a longer timeout") from None
        except SchedulerClosed as error:
            raise Refused(503, str(error)) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # this answer, not the drawing
                raise
            raise Refused(503, "the drawing was cancelled; ask again") from None
        cycle = None
        if body.check:
            layout = body.layouts()[0]
            asked = [[o.expr for o in layout.objects]] * len(images)
            boxes = await self._search(lambda: self.engine.ground_codes(codes, asked))
            took = time.perf_counter() - began
            cycle = CycleResult(layout, images, codes, boxes, *score(layout, boxes), seconds=took)
        return Drawn(images, cycle, time.perf_counter() - began)

    # --- finding --------------------------------------------------------------------------------

    async def find(self, body: Search, began: float) -> dict[str, Any]:
        """Boxes of what is asked for. Raises Refused."""

        def found() -> list[tuple[float, float, float, float]]:
            picture = body.picture(self.engine.image_size)
            return self.engine.ground(picture, body.expressions, body.features)

        boxes = await self._search(found)
        objects = [
            {"expr": expr, "box": list(box)}
            for expr, box in zip(body.expressions, boxes, strict=True)
        ]
        return {"objects": objects, "seconds": round(time.perf_counter() - began, 4)}

    async def _search(self, work: Callable[[], T]) -> T:
        """Find something when it is its turn. Raises Refused."""
        if self._searching > self._searches:
            raise Refused(503, f"{self._searches} searches wait, as many as may; try again later")
        self._searching += 1
        try:
            turn = asyncio.get_running_loop().run_in_executor(self._finder, work)
            return await asyncio.wait_for(turn, self.limit)
        except TimeoutError:
            raise Refused(504, f"nothing was found within {self.limit:g} seconds") from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        finally:
            self._searching -= 1


def event(name: str, data: dict[str, Any]) -> str:
    """A server-sent event (HTML Living Standard, 9.2)."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
