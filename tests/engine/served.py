"""A server in a thread and its clients, for tests over real sockets."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from echogen.bench.speed.http import running
from echogen.engine.engine import Engine
from echogen.engine.http.app import make_app
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.serving.scheduler import Scheduler

TWO = Layout(
    "the left of the two green stars",
    (
        LayoutObject("the left of the two green stars", (0.0, 0.25, 0.5, 0.75)),
        LayoutObject("a blue square", (0.5, 0.0, 1.0, 0.5)),
    ),
)
LAYOUT = TWO.to_dict()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """A client of a server, with a new connection for each request."""

    port: int
    scheduler: Scheduler

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = self.connect()
        send(connection, method, path, body, **headers)
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def draw(self, **fields: Any) -> Answer:
        return self.ask("POST", "/v1/images", {"layout": LAYOUT} | fields)

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not true():
            assert time.monotonic() < end, self.scheduler.metrics()
            time.sleep(0.01)


def send(connection: HTTPConnection, method: str, path: str, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, data, kind | named)


def begin(
    client: Client, path: str, length: int, sent: bytes, kind: str = "application/json", **more: str
) -> HTTPConnection:
    """Make a request of whose body only the beginning is sent; ``more`` are headers."""
    connection = client.connect()
    connection.putrequest("POST", path)
    for name, value in ({"Content-Type": kind, "Content-Length": str(length)} | more).items():
        connection.putheader(name, value)
    connection.endheaders(sent)
    return connection


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Client]:
    """Run a server; the options are those of `Scheduler` and `make_app`."""
    limits = {k: options.pop(k) for k in ("limit", "searches") if k in options}
    scheduler = Scheduler(engine, **{"slots": 8, "prompt_tokens": 100} | options)
    with running(make_app(engine, scheduler, "small", **limits)) as port:
        yield Client(port, scheduler)


def hang_up(connection: HTTPConnection) -> None:
    assert connection.sock is not None, "it is being answered"
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def next_event(answer: HTTPResponse) -> tuple[str, Any]:
    """The next server-sent event; comments are skipped."""
    fields: dict[str, str] = {}
    while True:
        line = answer.readline().decode()
        assert line, "the stream ended"
        name, _, value = line.rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "data" in fields:
            return fields["event"], json.loads(fields["data"])


def opened(data: str | bytes) -> np.ndarray:
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def picture(width: int, height: int, kind: str = "png") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def counters(client: Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = client.ask("GET", "/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(found.body.decode())
        for sample in family.samples
    }


def beside(client: Client, kind: str) -> float:
    return counters(client)["echogen_beside", (("kind", kind),)]
