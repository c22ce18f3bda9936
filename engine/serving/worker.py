"""A thread that steps while there is work, and its orderly shutdown."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import Self


class SchedulerClosed(RuntimeError):
    """The scheduler takes no more requests; the message says why."""


class Worker(ABC):
    """Makes steps in a thread of the caller's (``step``, ``run``) or its own (``start``, ``with``).

    ``_changed`` is held while state that other threads see changes, and notifies them of it.
    ``_closed`` says why no more work is taken; ``_cancelling`` says that what is left is to be
    cancelled. One thread steps at a time: it holds ``_turn``, and ``_stepping`` is its identity.
    """

    def __init__(self) -> None:
        self._changed, self._turn = threading.Condition(), threading.Lock()
        self._closed, self._cancelling = "", False
        self._thread: threading.Thread | None = None
        self._stepping: int | None = None
        self._began: float | None = None

    @property
    def closed(self) -> str:
        """Why no more work is taken; empty while it is."""
        return self._closed

    @property
    def step_s(self) -> float:
        """Seconds that the current step has taken so far; 0 between steps."""
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
        """The worker died of ``error``: tell everyone who waits for it. May be called again, when
        nobody is left."""

    def step(self) -> bool:
        """Do a piece of the work, in the caller's thread; False: nothing to do.

        Raises:
            RuntimeError: called within a step, from one of its callbacks.
            BaseException: an error that belongs to no request, including Ctrl-C. It ends the
                worker: everyone who waits is told of it (as the cause of `SchedulerClosed` if it is
                no `Exception`), and no more work is taken.
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
        """Step until ``shutdown``, in the caller's thread (``start`` makes one instead). Raises as
        ``step`` does."""
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

        This waits for the end, so in an event loop call
        ``await asyncio.to_thread(scheduler.shutdown)``. For a thread made by ``start`` it waits at
        most ``timeout`` seconds and returns False if the thread has not ended by then (a device may
        never answer). Called back from within a step, it returns at once, and the stepping thread
        goes on to the end.
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
        if not isinstance(error, Exception):  # this thread's Ctrl-C must not end another thread
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
