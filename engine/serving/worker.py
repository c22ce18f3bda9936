"""A thread that steps while there is something to do, and its orderly end."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class SchedulerClosed(RuntimeError):
    """The scheduler takes no more requests; the message says why."""


class Worker(ABC):
    """Steps when told, in a thread of the caller's (``run``) or in its own (``start``, ``with``).

    ``_changed`` is held while something changes that other threads see, and is told of it;
    ``_closed`` says why nothing more is taken, ``_cancelling`` that the rest is not to be drawn.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed, self._cancelling = "", False
        self._thread: threading.Thread | None = None

    @abstractmethod
    def step(self) -> bool:
        """Do a piece of the work; False: nothing to do."""

    @abstractmethod
    def _busy(self) -> bool:
        """Whether there is work."""

    @abstractmethod
    def _abandon(self, error: BaseException) -> None:
        """The worker died of ``error``: tell everybody who waits for it."""

    def run(self) -> None:
        """Step until ``shutdown``; for a thread of the caller's own (``start`` makes one)."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._busy() or self._closed)
                    if self._closed and not self._busy():
                        return
                self.step()
        except BaseException as error:
            self._close(f"the scheduler died of {type(error).__name__}: {error}")
            self._abandon(error)
            raise

    def start(self) -> Self:
        """Run in a thread of its own."""
        if self._thread is not None:
            raise RuntimeError("the scheduler was started already")
        self._thread = threading.Thread(target=self.run, name="echogen-scheduler", daemon=True)
        self._thread.start()
        return self

    def shutdown(self, cancel: bool = False) -> None:
        """Take no more requests, draw those there are (or ``cancel`` them), and end the thread."""
        self._cancelling = self._cancelling or cancel
        self._close("the scheduler was shut down; make a new one")
        if self._thread is None:
            while self.step():
                pass
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def _close(self, reason: str) -> None:
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown(cancel=kind is not None)
