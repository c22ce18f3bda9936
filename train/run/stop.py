"""A run that is asked to stop: it finishes its step, saves its state and leaves with a code.

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
    """A run that stopped because a signal asked it to; its ``message``, said before, names what was
    kept.

    Uncaught it ends the process with the signal's code and no traceback: nothing went wrong.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _BrokenOff(BaseException):
    """Raised by the handler where the work under way may be broken off."""


class Stop:
    """Listens for SIGTERM and SIGINT within a block.

    The first signal is noted; a second SIGINT is an ordinary `KeyboardInterrupt` for those who do
    not want to wait for the step's end. A process that waits for others in a collective notes it
    when that ends; where it never does, who has sent SIGTERM sends SIGKILL later. Outside the main
    thread, where Python allows no handlers, nothing is listened for.
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
        """Of the signal that came."""
        return signal.Signals(self.number).name

    @contextmanager
    def listening(self, *numbers: signal.Signals) -> Iterator[None]:
        """Note signals within the block, of these ``numbers`` where any are given; behind it
        handlers are as before."""
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
        """What ``work`` gives, or None where a signal came, which breaks it off at once."""
        if self.asked:
            return None
        try:
            try:
                self._may_break_off = True
                result = work()
                self._may_break_off = False
            finally:
                self._may_break_off = False
        except _BrokenOff:  # be it in the lines around the work
            return None
        return result

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        if self._may_break_off:
            self._may_break_off = False
            raise _BrokenOff
