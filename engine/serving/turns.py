"""A lock that is given to threads in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque
from typing import Self


class Turns:
    """One thread at a time, first come, first served.

    ::

        with turns:  # waits for those who asked before
            ...

    A `threading.Lock` is not fair: a thread that releases it and asks again at once usually gets it
    before those that wait.
    """

    def __init__(self) -> None:
        self._changed, self._line = threading.Condition(), deque[object]()

    def __enter__(self) -> Self:
        place = object()
        with self._changed:
            self._line.append(place)
            try:
                self._changed.wait_for(lambda: self._line[0] is place)
            except BaseException:  # Ctrl-C: who leaves the line must not hold up the others
                self._line.remove(place)
                self._changed.notify_all()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()
