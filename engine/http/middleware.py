"""What runs before every route: limits on bodies, and a line of log and statistics of answers."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from contextlib import suppress
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echogen.engine.http.prometheus import Exposition
from echogen.engine.http.wire import Refused

BODIES = {"/v1/boxes": 4 << 20}
"""Bytes of the largest body of a route: a picture in base64."""
BODY = 128 << 10
"""The same for other routes: a layout takes a few thousand."""
HELD = 64 << 20
"""Most bytes that the bodies of all requests may take together, for each route of ``BODIES``, and
again for all others: pictures that are sent leave room for drawings."""
ENDED = "echogen.status"
"""Key of the scope under which a stream leaves its final status."""
ASKED = "X-Request-ID"
"""Header of a request's name, which a client or proxy may give, and of its answer."""
NAME = "echogen.request"
"""Key of the scope under which it lies."""
PROBES = ("/health", "/metrics")
"""Asked for every few seconds; as long as these succeed they are only logged for debugging."""
SLOWEST = 30.0
"""Seconds within which a whole body must arrive."""

log = logging.getLogger("echogen.http")


def failure(error: Refused) -> JSONResponse:
    """An answer that says in one line what is wrong."""
    later = {"Retry-After": "1"} if error.again else None
    return JSONResponse({"error": str(error)}, error.status, later)


class Limited:
    """Refuses bodies that are too large, too slow or too many, before they are held."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._held = app, Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, size, whole = BODIES.get(scope["path"], BODY), 0, False
        due = asyncio.get_running_loop().time() + SLOWEST
        share = scope["path"] if scope["path"] in BODIES else ""

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # the next message is that the client hung up
                return await receive()
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408, f"only {size} bytes of the body arrived in time; send it without pauses"
                ) from None
            more = len(message.get("body", b""))
            self._held[share] += more
            size += more
            whole = not message.get("more_body", False)
            self._check(size, most, share)
            return message

        async def answered(message: Message) -> None:
            # An answer given before the body's end is ended only when the body is. Once it has
            # ended uvicorn may hang up, and a client that still sends is reset and never reads it.
            nonlocal whole
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                if not whole:
                    await send({**message, "more_body": True})
                    message = {"type": "http.response.body"}
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        while not whole:
                            whole = not (await receive()).get("more_body", False)
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit():
                self._check(int(length), most, share)
        except Refused as error:
            await failure(error)(scope, receive, answered)
            return
        try:
            await self._app(scope, limited, answered)
        finally:
            self._held[share] -= size

    def _check(self, size: int, most: int, share: str) -> None:
        if size > most:
            raise Refused(413, f"the body is larger than {most >> 10} KiB; send a smaller one")
        if self._held[share] > HELD:
            raise Refused(503, "other requests' bodies fill the memory; try later", again=True)


class Watched:
    """Names every request, and logs and counts its answer by route and status, with its time. Its
    status is the final one, also of a stream, whose head is sent before it is known."""

    def __init__(self, app: ASGIApp, exposition: Exposition) -> None:
        self._app, self._exposition = app, exposition

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        scope[NAME] = name = _name(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (ASKED.lower().encode(), name.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            error.add_note(f"while answering request {name}")  # the server logs its traceback
            raise
        finally:
            status, took = scope.get(ENDED, status), time.perf_counter() - began
            self._tell(scope, name, status, took)

    def _tell(self, scope: Scope, name: str, status: int, took: float) -> None:
        # By path, since some are refused before routing; unknown paths, which anybody can make up,
        # count as one.
        path, method = scope["path"], scope["method"]
        known = {getattr(route, "path", None) for route in scope["app"].routes}
        route = path if path in known else "other"
        self._exposition.seconds.labels(route, str(status)).observe(took)
        level = logging.DEBUG if path in PROBES and status < 400 else logging.INFO
        # Behind a proxy on this machine, uvicorn takes it from a header that clients may send too.
        client = quote((scope.get("client") or ("-",))[0], safe=":.-")
        log.log(level, "%s %s %s %d %.3f s %s", client, method, quote(path), status, took, name)


def _name(scope: Scope) -> str:
    """The name that a request came with, if it is fit for a log, or a new one."""
    given = dict(scope["headers"]).get(ASKED.lower().encode(), b"").decode("latin-1")
    return given if re.fullmatch("[!-~]{1,128}", given) else uuid.uuid4().hex
