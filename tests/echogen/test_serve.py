"""`echogen serve`, as an operator starts, asks and stops it."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from echogen.commands.options import ModelOptions

from .conftest import LAYOUT


@pytest.fixture
def log(tmp_path) -> Path:
    """The file that the process of ``served`` writes its log to."""
    return tmp_path / "log"


@pytest.fixture
def served(request, log) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves the bundled model, and its port; its --timeout is the parameter."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "echogen", "serve", "--model", "tiny", "--port", "0"),
                *("--timeout", str(request.param)),
            ],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        told = re.search(r"on http://127\.0\.0\.1:(\d+): 16 slots", line)
        assert told, line
        yield process, int(told[1])
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("served", [60], indirect=True)
def test_it_draws_and_ends_on_sigterm_with_what_was_begun(served, log):
    process, port = served
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"layout": LAYOUT, "samples": 8, "every": 1})
    connection.request("POST", "/v1/images", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline() == b"event: partial\n", "it is being drawn"
    process.send_signal(signal.SIGTERM)
    rest = answer.read().decode()
    assert "event: done" in rest and "event: error" not in rest
    process.wait(60)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    name, line = answer.headers["X-Request-ID"], r"\d{4}-\d\d-\d\d [\d:,]+ +INFO: +127.0.0.1 POST "
    assert re.findall(rf"^{line}/v1/images 200 \d+\.\d{{3}} s {name}$", log.read_text(), re.M)
    assert log.read_text().count("/v1/images") == 1, "uvicorn's own line would be a second"


@pytest.mark.parametrize("served", [1], indirect=True)
def test_who_sends_half_a_body_does_not_hold_the_end(served):
    process, port = served
    with socket.create_connection(("127.0.0.1", port)) as stalled:
        head = "POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        stalled.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_sigterm_while_the_model_loads_ends_with_143(run, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ModelOptions, "load", lambda self: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        run("serve", "--model", "tiny", "--port", "0")
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_port_in_use_is_told_before_the_model_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("serve", "--model", "nothing-there", "--port", port).refused(
            f"--port {port}", "--port 0 for a free one"
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", 70000), ("--port 70000", "65535")),
        (("--queue", 0), ("--queue 0",)),
        (("--searches", -1), ("--searches -1",)),
        (("--keep-alive", 0), ("--keep-alive 0",)),
        (("--slots", 0), ("--slots 0",)),
        (("--timeout", 0), ("--timeout 0.0", "above 0 seconds")),
        (("--timeout", "nan"), ("--timeout nan",)),
        (("--host", "256.0.0.1", "--port", 0), ("--host 256.0.0.1",)),
        (("--port", 0, "--model", "nothing-there"), ("nothing-there",)),
        (("--port", 0, "--prompt-tokens", 100_000), ("--prompt-tokens = 100000",)),
        (("--port", 0, "--prompt-tokens", 1), ("--prompt-tokens 1", "give more")),
        (("--port", 0, "--slots", 999_999), ("999999 slots", "give fewer --slots")),
    ],
    ids=lambda value: str(value[0]),
)
def test_bad_options_are_refused(run, model, options, words):
    given = options if "--model" in options else ("--model", model, *options)
    assert run("serve", *given).refused(*words)


def test_memory_is_named_where_the_system_does_not_say(run, model, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    for source in ("_available", "_container"):
        monkeypatch.setattr(f"echogen.engine.serving.budget.{source}", lambda: None)
    serve = ("serve", "--model", model, "--port", 0)
    assert run(*serve).refused("--memory = None", "say how much")
    assert run(*serve, "--memory", 0.5).code == 0
    assert run(*serve, "--memory", 0.001).refused("only 1.0 MiB may be used", "more --memory")
    assert run(*serve, "--memory", 0).refused("--memory 0.0")


def test_slots_that_draw_nothing_by_default_are_warned_of(run, model, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    alone = run("serve", "--model", model, "--port", 0, "--slots", 1)
    assert alone.code == 0 and len(alone.err.splitlines()) == 1
    assert "1 slot draws nothing at the model's own cfg = 1.5" in alone.err
    assert run("serve", "--model", model, "--port", 0, "--slots", 2).err == ""


@pytest.mark.parametrize(("files", "most"), [(1 << 20, 2 * 732 + 100), (1000, 1000 - 164)])
def test_whoever_may_wait_may_connect(run, model, monkeypatch, files, most):
    """As long as there are files to open for all of them; a soft limit is raised for that."""
    made, raised = [], []
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, files))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: made.append(self.config))
    options = ("--slots", 2, "--queue", 700, "--searches", 30)
    found = run("serve", "--model", model, "--port", 0, *options)
    assert found.code == 0 and made[0].limit_concurrency == most
    assert raised == [(most + 164, files)]
    assert ("ulimit -n" in found.err) == (files == 1000)


def test_what_it_needs_is_named(run, model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "uvicorn" else find(n))
    found = run("serve", "--model", model)
    assert found.refused("serve needs uvicorn", "pip install -e '.[serve]'")
