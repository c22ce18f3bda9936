"""Wall time by range; each moment counts once, for the innermost range that is open."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

OUTSIDE = "(outside any range)"


@dataclass
class Row:
    """What one category took.

    Attributes:
        category: name of the range.
        count: how often it was entered.
        seconds: time within the range, but in no range inside it.
        payload: sums of its payloads by name, for rates.
    """

    category: str
    count: int = 0
    seconds: float = 0.0
    payload: dict[str, int] = field(default_factory=dict)


class Stopwatch:
    """A listener of ranges (`echogen.engine.ranges`) for one thread.

    Args:
        clock: returns seconds (`echogen.bench.profile.trace.clock`).
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._open = clock, [OUTSIDE]
        self.rows: dict[str, Row] = {OUTSIDE: Row(OUTSIDE)}
        self._began = self._since = 0.0

    def start(self) -> None:
        """Start counting time."""
        self._began = self._since = self._clock()

    def stop(self) -> float:
        """Stop, and return the wall seconds since `start`: the sum of all rows."""
        self._count()
        return self._since - self._began

    @property
    def ranked(self) -> list[Row]:
        """The rows, the longest first."""
        return sorted(self.rows.values(), key=lambda row: -row.seconds)

    def begin(self, category: str, payload: dict[str, int]) -> None:
        """Open a range."""
        self._count()
        row = self.rows.setdefault(category, Row(category))
        row.count += 1
        for name, value in payload.items():
            row.payload[name] = row.payload.get(name, 0) + value
        self._open.append(category)

    def end(self) -> None:
        """Close the range that was opened last."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = self._clock()
        self.rows[self._open[-1]].seconds += now - self._since
        self._since = now
