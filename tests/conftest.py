"""A local server that speaks as a language model's does, well or badly, as a test has scripted."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass(frozen=True)
class Reply:
    """What the server sends: a status, headers, and a body, perhaps late or cut short."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    torn: bool = False


class StubLLM:
    """Sends its ``script`` reply after reply, the last one for ever, and keeps what it was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.script: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []

    def say(self, text: str | None, reason: str = "stop", **how: Any) -> None:
        """Script a chat completion."""
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        self.script.append(Reply(json.dumps({"choices": [choice]}).encode(), **how))

    def layouts(self, *layouts: Any) -> None:
        """Script a completion that is a plain array."""
        self.say(json.dumps(layouts))

    def send(self, status: int, body: str = "", **how: Any) -> None:
        """Script anything."""
        self.script.append(Reply(body.encode(), status, **how))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubLLM]:
    """The server, on a port of its own."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            stub.requests.append(json.loads(sent))
            stub.headers.append(dict(self.headers))
            stub.paths.append(self.path)
            reply = stub.script.pop(0) if len(stub.script) > 1 else stub.script[0]
            time.sleep(reply.delay)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            body = reply.body[: len(reply.body) // 2] if reply.torn else reply.body
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)  # the client may have given up, as a test wanted
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = StubLLM(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield stub
    server.shutdown()
    thread.join()
    server.server_close()
