"""Stopping a run by a signal: it finishes its step, saves its state and exits with a code.

Batch systems send SIGTERM some seconds before they kill, and Ctrl-C is SIGINT. The exit code is the
one a shell gives for the signal, 128 + its number: 143 and 130.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Stopped(SystemExit):
    """A run was stopped by a signal; its ``message``, printed before, names what was saved.

    If uncaught, it ends the process with the signal's code and no traceback, as nothing went wrong.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _BrokenOff(BaseException):
    """Raised by the handler if the current work may be interrupted."""


class Stop:
    """Listens for SIGTERM and SIGINT within a block.

    The first signal is recorded; a SIGINT after it raises an ordinary `KeyboardInterrupt`, for
    those who do not want to wait for the step's end. A process that waits for others in a
    collective records a signal when the collective ends; if it never ends, the sender of SIGTERM
    sends SIGKILL later. Outside the main thread, where Python allows no handlers, signals are not
    handled here.
    """

    def __init__(self) -> None:
        self.number = 0
        self._may_break_off = False

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number != 0

    @property
    def name(self) -> str:
        """The name of the signal that came."""
        return signal.Signals(self.number).name

    @contextmanager
    def listening(self, *numbers: signal.Signals) -> Iterator[None]:
        """Record signals within the block (``numbers``, by default SIGTERM and SIGINT); afterwards
        the handlers are restored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = numbers or (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                # None: one that Python cannot put back, since it was not set from Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """The result of ``work``, or None if a signal came, which interrupts it at once."""
        if self.asked:
            return None
        try:
            try:
                self._may_break_off = True
                result = work()
                self._may_break_off = False
            finally:
                self._may_break_off = False
        except _BrokenOff:  # possibly raised in the lines around the work
            return None
        return result

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        if self._may_break_off:
            self._may_break_off = False
            raise _BrokenOff
