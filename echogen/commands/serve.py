"""The command that serves a model over HTTP."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass, field

from echogen.commands.options import ModelOptions, check_range
from echogen.commands.output import InputError

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def check_installed(command: str) -> None:
    """Refuse a command that serves where what that takes is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{command} needs {', '.join(missing)}; install them: pip install 'echogen[serve]'"
        )


@dataclass(frozen=True)
class Serve:
    """Draw and find over HTTP: POST /v1/images and /v1/boxes, GET /v1/model, /health, /metrics, and
    /docs, which describes them. SIGTERM: what is asked for is finished, nothing more taken."""

    host: str = "127.0.0.1"
    """Address to listen on; whoever reaches it may draw: there are no keys."""
    port: int = 8000
    """0 takes a free one; the log says which."""
    slots: int | None = None
    """Rows that are drawn at once, two an image with guidance; what the memory holds, at most 16 on
    a CPU and 256 on a GPU, if left out."""
    prompt_tokens: int | None = None
    """Tokens of the longest layout; the model's room, at most 1024, if left out."""
    queue: int = 256
    """Requests that may wait; who comes when as many do is told 503."""
    timeout: float = 60.0
    """Seconds that a request may take, waiting included."""
    invariant: bool = False
    """A request draws the same codes, bit for bit, alone and in any crowd; images alone take
    longer."""
    engine: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("queue", self.queue, 1, 1_000_000)
        for name, value in (("slots", self.slots), ("prompt-tokens", self.prompt_tokens)):
            if value is not None:
                check_range(name, value, 1, 1_000_000)
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout {self.timeout}: it must be above 0 seconds")
        check_installed("serve")
        with self._listen() as listening:
            self._serve(listening)

    def _listen(self) -> socket.socket:
        """Taken before the model is loaded, so that a port in use is told at once."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise InputError(
                f"--host {self.host} --port {self.port}: cannot listen there ({error.strerror}); "
                f"choose another, or --port 0 for a free one"
            ) from None

    def _serve(self, listening: socket.socket) -> None:
        import uvicorn

        from echogen.engine.http.app import make_app
        from echogen.engine.scheduler import Scheduler

        engine = self.engine.load()
        try:
            scheduler = Scheduler(
                engine,
                self.slots,
                self.queue,
                prompt_tokens=self.prompt_tokens,
                invariant=self.invariant,
            )
        except ValueError as error:  # of the budget, or rows that round by their place
            raise InputError(str(error)) from None
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {self.engine.model} on http://{shown}:{port}: {scheduler.plan.slots} slots, "
            f"prompts up to {scheduler.plan.prompt_tokens} tokens; /docs describes it",
            flush=True,
        )
        app = make_app(engine, scheduler, self.engine.model, self.timeout, self.queue)
        uvicorn.Server(uvicorn.Config(app)).run([listening])
