"""A client for a language model with an OpenAI-compatible API, on the standard library alone.

Writing layouts needs three things of it: an answer's text, patience with a busy server, and one
clear line when patience will not help.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATH = "/chat/completions"
MOST_WAIT = 300.0  # seconds; if a server asks for more, the user has to run again later
MOST_BYTES = 1 << 24  # of an answer
_PASSING = frozenset({408, 425, 429})  # and 500 and above: worth a retry
_MISSPELT = "is it the base of an OpenAI-compatible API, as http://localhost:8000/v1 ?"


class LLMError(RuntimeError):
    """An endpoint that cannot be used; the message is one line with the address and the fix."""


class Answer(NamedTuple):
    """What the model wrote, and whether it was cut off at its length limit."""

    text: str
    cut: bool


class _Passing(Exception):
    """A failure that a retry may fix; ``wait`` is the wait that the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: one would repeat the request as a GET, and send its key to whoever it
    names."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """One model at one address, usable from any number of threads.

    Args:
        url: base of the API (``…/v1``), or the whole address of its chat completions.
        model: the model's name there.
        key: sent as a bearer token; None: none is sent.
        temperature: None: the server's own.
        timeout: seconds without a byte before a try is given up.
        tries: the most tries of one request.
        pause: seconds before the second try, doubled before each further one.
        per_minute: the most requests started per minute.
        wait: waits a number of seconds (replaced in tests).

    Raises:
        LLMError: the address is not a valid one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        temperature: float | None = None,
        timeout: float = 120.0,
        tries: int = 5,
        pause: float = 1.0,
        per_minute: float = 60.0,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        if not _is_address(url):
            raise LLMError(f"{url}: no address; write http://… or https://…")
        base = url.rstrip("/")
        self.address = base if base.endswith(PATH) else base + PATH
        self.model, self.seeded = model, True
        self._key, self._temperature, self._timeout = key, temperature, timeout
        self._tries, self._pause, self._gap = tries, pause, 60.0 / per_minute
        self._wait, self._began, self._reached = wait, float("-inf"), False
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._turns = threading.Lock()

    def ask(self, messages: Sequence[dict[str, str]], seed: int) -> Answer:
        """Return the model's answer to a conversation. If the server is busy, slow or failing, it
        is asked again, after the wait that it asks for, else after a pause that doubles each time.

        Args:
            messages: ``role`` and ``content`` each.
            seed: sent along; a server that rejects seeds is asked again without one (``seeded`` is
                then False).

        Raises:
            LLMError: refused, unreachable, no chat completion, or still failing at the last try.
        """
        for number in range(1, self._tries + 1):
            self._pace()
            try:
                answer = self._once(messages, seed)
            except _Passing as problem:
                if number == self._tries:
                    raise LLMError(
                        f"{self.address}: {problem}, at the last of {self._tries} tries; run again "
                        f"later, what came so far is kept"
                    ) from None
                self._wait(self._pause * 2 ** (number - 1) if problem.wait is None else
                           problem.wait)  # fmt: skip
                continue
            self._reached = True
            return answer
        raise AssertionError("the last try returns or raises")

    def _pace(self) -> None:
        with self._turns:  # a thread that waits here makes the others wait too
            early = self._began + self._gap - time.monotonic()
            if early > 0:
                self._wait(early)
            self._began = time.monotonic()

    def _once(self, messages: Sequence[dict[str, str]], seed: int) -> Answer:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if self._temperature is not None:
            body["temperature"] = self._temperature
        if seeded := self.seeded:
            body["seed"] = seed
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                data, due = (
                    response.read(MOST_BYTES + 1),
                    response.headers.get("Content-Length", ""),
                )
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, seeded) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreached(error) from None
        if len(data) > MOST_BYTES:
            raise LLMError(f"{self.address}: answers with more than {MOST_BYTES} bytes")
        if due.isdecimal() and int(due) > len(data):
            raise _Passing(f"the answer broke off after {len(data)} of {due} bytes")
        return self._read(data)

    def _unreached(self, error: Exception) -> Exception:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return _Passing(f"no answer within {self._timeout:g} s")
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        passing = (ConnectionResetError, http.client.HTTPException)
        broken = isinstance(cause, passing) and not isinstance(cause, http.client.InvalidURL)
        if self._reached or broken:
            return _Passing(f"the connection broke ({reason})")
        return LLMError(f"{self.address}: cannot be reached ({reason}); is a server running there?")

    def _refusal(self, error: urllib.error.HTTPError, seeded: bool) -> Exception:
        """The error for a status; ``seeded``: whether this request had a seed (others may have
        dropped it by now)."""
        try:
            said = _said(error.read(MOST_BYTES))
        except (OSError, http.client.HTTPException):  # only the status is known
            said = ""
        what, told = f"HTTP {error.code}", f" ({said})" if said else ""
        if error.code in _PASSING or error.code >= 500:
            wait = _asked_wait(error.headers.get("Retry-After"))
            if wait is not None and wait > MOST_WAIT:
                return LLMError(
                    f"{self.address}: {what}, asks to wait {wait:.0f} s; run again then, what came "
                    f"so far is kept"
                )
            return _Passing(what + told, wait)
        if error.code in (400, 422) and seeded and "seed" in said.lower():
            self.seeded = False
            return _Passing(what + told, 0.0)
        mend = {
            401: "name the variable that holds a valid key with --api-key-env",
            403: "name the variable that holds a key with this right with --api-key-env",
            404: f"is {self.model!r} a model there? And the address: {_MISSPELT}",
        }
        if 300 <= error.code < 400:
            told = f" to {error.headers.get('Location')}; name that address instead"
        usual = "see what the server says"
        return LLMError(f"{self.address}: {what}{told}; {mend.get(error.code, usual)}")

    def _read(self, data: bytes) -> Answer:
        try:
            choice = json.loads(data)["choices"][0]
            text, why = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = " ".join(data[:60].decode("utf-8", "replace").split())
            raise LLMError(
                f"{self.address}: answers, but with no chat completion ({shown!r}…); {_MISSPELT}"
            ) from None
        return Answer(text if isinstance(text, str) else "", why == "length")


def _is_address(url: str) -> bool:
    """Whether a request can be sent to this address."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # wrong brackets or port
        return False
    sendable = url.isprintable() and " " not in url and parts.path.isascii()
    return parts.scheme in ("http", "https") and named and sendable


def _said(body: bytes) -> str:
    """What a server says about its refusal, in one line."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found.get("message", found.get("detail", found)))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError, RecursionError):
        pass  # plain text, then
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def _asked_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header (a number, or a date); None if it gives none."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass  # a date, then
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
