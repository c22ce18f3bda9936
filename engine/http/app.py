"""The scheduler over HTTP: what a service puts behind its load balancer.

One process serves one model. Requests of any kind share the scheduler's batch; objects are found
one picture after another beside it. A client that disconnects frees its slots, unless it has sent
another request on the same connection: then the server notices only when that one's turn comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from echogen.engine.engine import Engine
from echogen.engine.http.middleware import ASKED, ENDED, NAME, Limited, Watched, failure
from echogen.engine.http.prometheus import Exposition
from echogen.engine.http.service import Service
from echogen.engine.http.wire import (
    EVENTS,
    EXAMPLES,
    GONE,
    JSON,
    MEDIA,
    Boxes,
    Drawing,
    Pictures,
    Refusal,
    Refused,
    Search,
    preferred,
    read,
)
from echogen.engine.serving.request import Request
from echogen.engine.serving.scheduler import Scheduler

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus's text format."""
STALLED = 30.0
"""Seconds after which a step counts as stalled. Steps take well below one second; those that
compile for requests of a new kind take several."""

T = TypeVar("T")


def make_app(
    engine: Engine, scheduler: Scheduler, model: str = "", limit: float = 60.0, searches: int = 16
) -> FastAPI:
    """Make the application for an ASGI server. It starts the scheduler's thread, and at its end
    finishes what is already asked for.

    Args:
        engine, scheduler, model, limit, searches: as for `Service`.
    """
    exposition = Exposition(scheduler.metrics, lambda: dict(service.busy), limit)

    def timed(part: str, seconds: float) -> None:
        exposition.parts.labels(part).observe(seconds)

    service = Service(engine, scheduler, model, limit, searches, timed)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.shutdown)

    app = FastAPI(
        title="EchoGen",
        description="Draws images from layouts, and finds layouts in images.",
        lifespan=running,
        redirect_slashes=False,  # behind a proxy the place would be wrong
    )
    app.add_middleware(Limited)
    app.add_middleware(Watched, exposition=exposition)
    _add_refusals(app)

    @app.post(
        "/v1/images", response_model=Pictures, openapi_extra=_takes(Drawing),
        responses=_answers(400, 406, 408, 413, 415, 500, 503, 504) | {200: {
            "description": "the pictures; a single one as it is; or events",
            "content": {kind: {} for kind in (*MEDIA, EVENTS)},
        }},
    )  # fmt: skip
    async def images(http: Http) -> Response:
        """Draw pictures of a layout.

        The answer is JSON with the pictures in base64. With `every` it is server-sent events:
        `partial` ones, then `done` or `error`. With `Accept: image/png` (or jpeg, webp) it is the
        picture itself; several samples then need `check`, and the one with the highest reward is
        sent.
        """
        body = await read(http, Drawing)
        kind = preferred(http.headers.get("accept", ""), [EVENTS] if body.every else [JSON, *MEDIA])
        if kind in MEDIA and body.samples > 1 and not body.check:
            raise Refused(
                400,
                f"samples = {body.samples}: {kind} is one picture; with check = true it is the "
                f"best of them, and {JSON} has them all",
            )
        if kind == EVENTS:
            news = asyncio.Event()
            job = await service.submit(body, news)

            def ended(status: int) -> None:
                http.scope[ENDED] = status

            return Events(service.stream(job, news, ended), job.request)
        job = await service.submit(body)
        try:
            if kind == JSON:
                return JSONResponse(await heeded(http, service.answer(job)))
            picture = await heeded(http, service.picture(job, MEDIA[kind]))
            return Response(picture, media_type=kind)
        finally:
            job.request.cancel()  # no effect if it is done

    @app.post(
        "/v1/boxes", response_model=Boxes, openapi_extra=_takes(Search),
        responses=_answers(400, 408, 413, 415, 500, 503, 504),
    )  # fmt: skip
    async def boxes(http: Http) -> Response:
        """Find objects in a picture: one box per expression, whether it is there or not."""
        body = await read(http, Search)
        return JSONResponse(await heeded(http, service.find(body)))

    @app.get("/v1/model")
    async def about() -> dict[str, Any]:
        """What the model is: its name, pictures and defaults, and how much is drawn at once."""
        return service.about()

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_answers(503))
    async def health() -> dict[str, str]:
        """Whether requests are accepted, and drawing makes progress."""
        if scheduler.closed:
            raise Refused(503, scheduler.closed)
        if (seconds := scheduler.step_s) > STALLED:
            raise Refused(503, f"a step takes {seconds:.0f} s so far; if it never ends, restart")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {PLAIN: {}}}})
    async def metrics() -> Response:
        """Counters, in Prometheus's text format."""
        return Response(exposition.text(), media_type=PLAIN)

    return app


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of a body that `read` reads."""
    content = {JSON: {"schema": kind.model_json_schema(), "example": EXAMPLES[kind]}}
    return {"requestBody": {"required": True, "content": content}}


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of refusals."""
    return {status: {"model": Refusal} for status in statuses}


def _add_refusals(app: FastAPI) -> None:
    """Answer with one line of JSON whatever goes wrong."""

    @app.exception_handler(Refused)
    async def refused(_: Http, error: Refused) -> Response:
        return failure(error)

    @app.exception_handler(HTTPException)
    async def known(http: Http, error: HTTPException) -> Response:
        where, told = http.url.path, str(error.detail)
        if error.status_code == 404:
            told = f"there is no {where}; see /docs"
        if error.status_code == 405:
            told = f"{where} takes no {http.method}; see /docs"
        answer = failure(Refused(error.status_code, told))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unknown(http: Http, error: Exception) -> Response:  # the server logs its traceback
        answer = failure(Refused(500, f"{type(error).__name__}: {error}"))
        answer.headers[ASKED] = http.scope[NAME]  # this answer is made outside of all middleware
        return answer


async def heeded(http: Http, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer unless the client hangs up. Raises Refused."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(answer), asyncio.create_task(left())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Refused(GONE, "the client hung up")
        return answering.result()
    finally:  # no effect on what is done
        answering.cancel()
        leaving.cancel()


class Events(StreamingResponse):
    """A stream of events about a request, which is cancelled when the stream ends."""

    media_type = EVENTS

    def __init__(self, content: AsyncGenerator[str, None], request: Request) -> None:
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._content, self._request = content, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._content.aclose()
            self._request.cancel()
