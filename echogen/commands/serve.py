"""The command that serves a model over HTTP."""

from __future__ import annotations

import copy
import importlib.util
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echogen.commands.options import ModelOptions, check_range, flagged
from echogen.commands.output import InputError, warn

if TYPE_CHECKING:
    from echogen.engine.engine import Engine

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def check_installed(command: str) -> None:
    """Refuse a command that serves if a package for serving is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{command} needs {', '.join(missing)}; install them: pip install -e '.[serve]'"
        )


@dataclass(frozen=True)
class Serve:
    """Draw and find over HTTP: POST /v1/images and /v1/boxes; GET /v1/model, /health, /metrics and
    /docs, which describes them. On SIGTERM, finish accepted requests and take no new ones."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication: whoever can reach it can draw."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the line printed at start-up names."""
    slots: int | None = None
    """Rows drawn at once, two per guided image (left out: by memory, at most 16, on a GPU 256)."""
    prompt_tokens: int | None = None
    """Tokens of the longest prompt (left out: what the model has room for, at most 1024)."""
    memory: float | None = None
    """GiB to plan with (left out: most of the free memory, if the system reports it)."""
    queue: int = 256
    """Requests that may wait to be drawn; further ones are answered with 503."""
    searches: int = 16
    """Pictures that may wait for grounding, one at a time; those with "check" count too."""
    timeout: float = 60.0
    """Seconds that an answer may take, time in the queue included."""
    keep_alive: int = 75
    """Seconds that an idle connection stays open; set it longer than the load balancer's."""
    invariant: bool = False
    """Draw bit-identical codes alone and in any batch: slower for a few images. C++ always does."""
    engine: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("queue", self.queue, 1, 1_000_000)
        check_range("searches", self.searches, 0, 1_000_000)
        check_range("keep-alive", self.keep_alive, 1, 86_400)
        check_range("slots", self.slots, 1, 1_000_000)
        check_range("prompt-tokens", self.prompt_tokens, 1, 1_000_000)
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout {self.timeout}: it must be above 0 seconds")
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise InputError(f"--memory {self.memory}: it must be above 0 GiB")
        check_installed("serve")
        with self._bound() as place, _exiting_on_sigterm():
            self._serve(place)

    def _bound(self) -> socket.socket:
        """Return a socket bound to the address. This happens before the model is loaded, so that an
        address in use is reported at once. The socket listens only once requests can be answered.
        """
        place = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((self.host, self.port))
        except OSError as error:
            place.close()
            raise InputError(
                f"--host {self.host} --port {self.port}: cannot listen there ({error.strerror}); "
                f"choose another, or --port 0 for a free one"
            ) from None
        return place

    def _check_prompts(self, engine: Engine) -> None:
        """Refuse a prompt length that has room for no layout."""
        from echogen.engine.layout import Layout, LayoutObject

        shortest = len(engine.prompts.l2i(Layout("a", (LayoutObject("a", (0, 0, 1, 1)),))))
        if self.prompt_tokens is not None and self.prompt_tokens < shortest:
            raise InputError(
                f"--prompt-tokens {self.prompt_tokens}: a layout of one object with a name of one "
                f"letter takes {shortest}; give more, or leave it out"
            )

    def _serve(self, place: socket.socket) -> None:
        import uvicorn

        from echogen.engine.http.app import make_app
        from echogen.engine.http.connection import Connection
        from echogen.engine.serving.budget import NoRoom
        from echogen.engine.serving.scheduler import Scheduler

        engine = self.engine.load()
        self._check_prompts(engine)
        try:
            scheduler = Scheduler(
                engine,
                self.slots,
                self.queue,
                None if self.memory is None else int(self.memory * 2**30),
                prompt_tokens=self.prompt_tokens,
                invariant=self.invariant,
            )
        except NoRoom as error:
            raise InputError(
                f"{error.what}; give fewer --slots, a smaller --prompt-tokens than "
                f"{error.prompt_tokens}, or more --memory"
            ) from None
        except ValueError as error:  # a setting: a prompt too long, or memory that must be given
            raise InputError(flagged(error)) from None
        if engine.sampling.guided and scheduler.plan.slots < 2:
            warn(
                f"1 slot draws nothing at the model's own cfg = {engine.sampling.cfg:g}, which "
                f"takes two; requests must say cfg = 1, or give --slots 2"
            )
        app = make_app(engine, scheduler, self.engine.model, self.timeout, self.searches)
        host, port = place.getsockname()[:2]
        line = (
            f"serving {self.engine.model} on http://{f'[{host}]' if ':' in host else host}:{port}: "
            f"{scheduler.plan.slots} slots, prompts up to {scheduler.plan.prompt_tokens} tokens"
        )

        class Server(uvicorn.Server):
            """Prints a line when it listens."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                print(line, flush=True)

        # Shutdown waits no longer than an answer may take. Otherwise a body that never comes, or an
        # answer that is never read, would block it for ever.
        graceful = math.ceil(self.timeout) + 5
        # Twice as many connections as requests accepted at once, and some for monitoring; requests
        # beyond those are answered with 503.
        most = _connections(100 + 2 * (scheduler.plan.slots + self.queue + self.searches))
        config = uvicorn.Config(
            app, http=Connection, ws="none", limit_concurrency=most,
            timeout_keep_alive=self.keep_alive, timeout_graceful_shutdown=graceful,
            access_log=False, log_config=_logging(),  # `middleware.Watched` logs every answer
        )  # fmt: skip
        Server(config).run([place])


def _logging() -> dict[str, Any]:
    """Return uvicorn's own logging, with the time, and with EchoGen's beside it."""
    import uvicorn

    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["formatters"]["default"]["fmt"] = "%(asctime)s %(levelprefix)s %(message)s"
    config["loggers"]["echogen"] = {
        "handlers": ["default"], "level": "INFO", "propagate": False
    }  # fmt: skip
    return config


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """End with 143 on SIGTERM, also as a container's first process, which gets no signal without a
    handler: neither one that arrives while the model loads, nor the one that uvicorn raises after
    its own shutdown."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which cannot handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


OTHER_FILES = 100
"""Open files besides connections, with some to spare."""


def _connections(wanted: int) -> int:
    """Return the wanted number of connections, or as many as this process's limit of open files
    allows."""
    import resource

    from echogen.engine.http.connection import SPARE

    needed, (soft, hard) = wanted + SPARE + OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        warn(
            f"only {hard} files may be open, too few for the connections that --queue and "
            f"--searches allow; raise the limit (ulimit -n {needed}), or lower those options"
        )
    return max(1, allowed - SPARE - OTHER_FILES)
