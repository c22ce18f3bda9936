"""A thread that steps while there is something to do, and its orderly end."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import Self


class SchedulerClosed(RuntimeError):
    """The scheduler takes no more requests; the message says why."""


class Worker(ABC):
    """Steps when told, in a thread of the caller's (``run``) or in its own (``start``, ``with``).

    ``_changed`` is held while something changes that other threads see, and is told of it;
    ``_closed`` says why nothing more is taken, ``_cancelling`` that the rest is not to be drawn.
    One thread steps at a time: it holds ``_turn``, and ``_stepping`` is its identity.
    """

    def __init__(self) -> None:
        self._changed, self._turn = threading.Condition(), threading.Lock()
        self._closed, self._cancelling = "", False
        self._thread: threading.Thread | None = None
        self._stepping: int | None = None
        self._began: float | None = None

    @property
    def closed(self) -> str:
        """Why nothing more is taken; empty while it is."""
        return self._closed

    @property
    def step_s(self) -> float:
        """Seconds that the step under way takes by now; 0 between steps."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @abstractmethod
    def _work(self) -> bool:
        """Do a piece of the work; False: nothing to do."""

    @abstractmethod
    def _busy(self) -> bool:
        """Whether there is work."""

    @abstractmethod
    def _abandon(self, error: BaseException) -> None:
        """The worker died of ``error``: tell everybody who waits for it. May come again, when
        nobody is left."""

    def step(self) -> bool:
        """Do a piece of the work, in the caller's thread; False: nothing to do.

        Raises:
            RuntimeError: called within a step, by what that calls back.
            BaseException: what no request answers for, Ctrl-C too. It is the end: everybody who
                waits is told (of what is no `Exception` as the cause of `SchedulerClosed`), and
                nothing more is taken.
        """
        if self._stepping == threading.get_ident():
            raise RuntimeError("step() was called within a step; a callback must not call it")
        with self._turn:
            self._stepping, self._began = threading.get_ident(), time.monotonic()
            try:
                return self._work()
            except BaseException as error:
                self._die(error)
                raise
            finally:
                self._stepping = self._began = None

    def run(self) -> None:
        """Step until ``shutdown``; for a thread of the caller's own (``start`` makes one). Raises
        as ``step`` does."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._busy() or self._closed)
                    if self._closed and not self._busy():
                        return
                self.step()
        except BaseException as error:  # Ctrl-C while it waits for work
            self._die(error)
            raise

    def start(self) -> Self:
        """Run in a thread of its own."""
        if self._thread is not None:
            raise RuntimeError("the scheduler was started already")
        thread = threading.Thread(target=self.run, name="echogen-scheduler", daemon=True)
        thread.start()
        self._thread = thread
        return self

    def shutdown(self, cancel: bool = False, timeout: float | None = None) -> bool:
        """Take no more requests, draw those there are (or ``cancel`` them), and end the thread.

        Waits for that, so in an event loop call ``await asyncio.to_thread(scheduler.shutdown)``;
        for ``timeout`` seconds at most where the thread is its own: False says that it has not
        ended by then (a device may never answer). From within a step, called back, it returns at
        once, and who steps goes on to the end.
        """
        self._cancelling = self._cancelling or cancel
        self._close("the scheduler was shut down; make a new one")
        if self._stepping == threading.get_ident():
            return False
        if self._thread is None:
            while self.step():
                pass
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _die(self, error: BaseException) -> None:
        reason = f"the scheduler died of {type(error).__name__}: {error}"
        self._close(reason)
        if not isinstance(error, Exception):  # another thread is not to end of this one's Ctrl-C
            told = SchedulerClosed(reason)
            told.__cause__ = error
            error = told
        self._abandon(error)

    def _close(self, reason: str) -> None:
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.shutdown(cancel=kind is not None)
