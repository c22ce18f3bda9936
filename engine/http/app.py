"""The scheduler over HTTP: what a service puts behind its load balancer.

One process serves one model. Requests of any kind share the scheduler's batch; objects are found
one picture after another beside it. Whoever hangs up frees the slots of what he asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from echogen.engine.engine import Engine
from echogen.engine.http.middleware import Limited, Watched, failure
from echogen.engine.http.prometheus import Exposition
from echogen.engine.http.service import Service
from echogen.engine.http.wire import Drawing, Refused, Search, wanted, what_is_wrong
from echogen.engine.scheduler import Scheduler
from echogen.engine.serving.request import Request

GONE = 499
"""Status, as nginx writes it, of an answer that nobody waited for."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "refused; `error` says what to mend"},
    503: {"description": "the queue is full, or nothing more is drawn; try again later"},
    504: {"description": "the time is up"},
}

T = TypeVar("T")


def make_app(
    engine: Engine, scheduler: Scheduler, model: str = "", limit: float = 60.0, searches: int = 256
) -> FastAPI:
    """The application, for an ASGI server. It starts the scheduler's thread, and when it ends draws
    what is asked for already.

    Args:
        engine, scheduler, model, limit, searches: as of `Service`.
    """
    service = Service(engine, scheduler, model, limit, searches)
    exposition = Exposition(scheduler.metrics)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(service.shutdown)

    app = FastAPI(
        title="EchoGen",
        description="Draws images from layouts, and finds layouts in images.",
        lifespan=running,
    )
    app.add_middleware(Limited)
    app.add_middleware(Watched, exposition=exposition)
    _add_refusals(app)

    @app.post("/v1/images", responses=REFUSALS, response_model=None)
    async def images(body: Drawing, http: Http) -> Response:
        """Draw pictures of a layout.

        The answer is JSON with the pictures in base64; with `every`, server-sent events: `partial`
        ones, then `done` or `error`; with `Accept: image/png` (or jpeg, webp) the picture itself,
        of several samples, which takes `check`, the one with the highest reward.
        """
        began, kind = time.perf_counter(), wanted(http.headers.get("accept", ""))
        if kind is not None:
            _check_single(body, kind)
        if body.every > 0:
            news = asyncio.Event()
            request = await service.submit(body, news)
            return Events(service.stream(body, request, began, news), request)
        request = await service.submit(body)
        if kind is None:
            return JSONResponse(await heeded(http, request, service.answer(body, request, began)))
        picture = await heeded(http, request, service.picture(body, request, began, kind))
        return Response(picture, media_type=f"image/{kind}")

    @app.post("/v1/boxes", responses=REFUSALS)
    async def boxes(body: Search) -> dict[str, Any]:
        """Find objects in a picture: one box an expression, be it there or not."""
        return await service.find(body, time.perf_counter())

    @app.get("/v1/model")
    async def about() -> dict[str, Any]:
        """What the model is: its name, pictures and defaults, and how much is drawn at once."""
        return service.about()

    @app.get("/health", responses={503: {"description": "nothing more is drawn"}})
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        if scheduler.closed:
            raise Refused(503, scheduler.closed)
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters, in Prometheus's text format."""
        return Response(exposition.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _check_single(body: Drawing, kind: str) -> None:
    if body.every:
        raise Refused(400, f"every = {body.every}: parts come with Accept: text/event-stream")
    if body.samples > 1 and not body.check:
        raise Refused(
            400,
            f"samples = {body.samples}: image/{kind} is one picture; with check = true it is the "
            f"best of them, and application/json has them all",
        )


def _add_refusals(app: FastAPI) -> None:
    """One line of JSON for whatever goes wrong."""

    @app.exception_handler(Refused)
    async def refused(_: Http, error: Refused) -> Response:
        return failure(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Http, error: RequestValidationError) -> Response:
        kind = http.headers.get("content-type", "")
        return failure(400, what_is_wrong(error.errors(), kind))

    @app.exception_handler(HTTPException)
    async def known(http: Http, error: HTTPException) -> Response:
        if error.status_code == 404:
            return failure(404, f"there is no {http.url.path}; see /docs")
        return failure(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unknown(_: Http, error: Exception) -> Response:  # the server logs its traceback
        return failure(500, f"{type(error).__name__}: {error}")


async def heeded(http: Http, request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer unless who asked hangs up, which cancels the drawing. Raises Refused."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(answer), asyncio.create_task(left())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Refused(GONE, "who asked hung up")
        return answering.result()
    finally:  # of no effect on what is done
        answering.cancel()
        leaving.cancel()
        request.cancel()


class Events(StreamingResponse):
    """A stream of events about a request, which ends with it."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], request: Request) -> None:
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._request.cancel()
