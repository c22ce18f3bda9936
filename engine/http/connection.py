"""Limits the time and the number of connections. uvicorn waits without limit for a head to arrive
and for an answer to be read, and counts a connection only once its head has arrived."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from echogen.engine.http.middleware import SLOWEST

SPARE = 64
"""Connections beyond ``limit_concurrency`` whose requests uvicorn answers with 503. Any more are
hung up on, because each holds an open file."""


class Connection(H11Protocol):
    """Hangs up on a client that sends no complete request head, or reads nothing of an answer, for
    ``SLOWEST`` seconds, and on every new client when there are ``SPARE`` more than may be answered.
    (`middleware.Limited` limits a body's time, and uvicorn itself the time between requests.)"""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`, as for the methods below."""
        self._timers = dict[str, asyncio.TimerHandle]()
        super().connection_made(transport)
        most = self.limit_concurrency
        if most is not None and len(self.connections) > most + SPARE:
            transport.abort()
            return
        transport.set_write_buffer_limits(0)  # anything not read yet pauses writing
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop("asking")
        self._stop("reading")

    def _await_head(self) -> None:
        """Limit the time of the next head, from its first byte on; that of a connection's first
        head, from the beginning."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("asking")
        elif "asking" not in self._timers:
            self._timers["asking"] = self.loop.call_later(SLOWEST, self.transport.close)

    def _await_reader(self) -> None:
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._await_reader()  # slowly, but it is read
            else:
                self.transport.abort()

        self._timers["reading"] = self.loop.call_later(SLOWEST, look)

    def _stop(self, timer: str) -> None:
        if timer in self._timers:
            self._timers.pop(timer).cancel()
