"""What stands before every route: a limit of bodies, and a watch of answers."""

from __future__ import annotations

import time

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echogen.engine.http.prometheus import Exposition

BODY = 16 << 20
"""Bytes of the largest body: a picture to find objects in, in base64."""


def failure(status: int, message: str) -> JSONResponse:
    """An answer that says in one line what is wrong."""
    later = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": message}, status, later)


class Limited:
    """Refuses bodies above ``BODY`` bytes before they are held."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, told = 0, f"the body is larger than {BODY >> 20} MiB; send a smaller picture"

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > BODY:
                raise HTTPException(413, told)
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY:
            await failure(413, told)(scope, receive, send)
        else:
            await self._app(scope, limited, send)


class Watched:
    """Counts answers, and how long they took, by route and status."""

    def __init__(self, app: ASGIApp, exposition: Exposition) -> None:
        self._app, self._exposition = app, exposition

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # paths anybody can make up
            took = time.perf_counter() - began
            self._exposition.seconds.labels(route, str(status)).observe(took)
