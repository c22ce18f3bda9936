"""Wall time by range, each moment counted once: in the innermost range that was open."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

OUTSIDE = "(outside any range)"


@dataclass
class Row:
    """What one category took.

    Attributes:
        category: of the range.
        count: how often it was entered.
        seconds: within it and in no range inside it.
        payload: sums of its payloads by name, for rates.
    """

    category: str
    count: int = 0
    seconds: float = 0.0
    payload: dict[str, int] = field(default_factory=dict)


class Stopwatch:
    """A listener of ranges (`echogen.engine.ranges`) for one thread.

    Args:
        clock: seconds (`echogen.bench.profile.trace.clock`).
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._open = clock, [OUTSIDE]
        self.rows: dict[str, Row] = {OUTSIDE: Row(OUTSIDE)}
        self._began = self._since = 0.0

    def start(self) -> None:
        """Time counts from here."""
        self._began = self._since = self._clock()

    def stop(self) -> float:
        """Wall seconds since `start`: the sum of all rows."""
        self._count()
        return self._since - self._began

    @property
    def ranked(self) -> list[Row]:
        """The rows, the longest first."""
        return sorted(self.rows.values(), key=lambda row: -row.seconds)

    def begin(self, category: str, payload: dict[str, int]) -> None:
        """A range opens."""
        self._count()
        row = self.rows.setdefault(category, Row(category))
        row.count += 1
        for name, value in payload.items():
            row.payload[name] = row.payload.get(name, 0) + value
        self._open.append(category)

    def end(self) -> None:
        """The range opened last closes."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = self._clock()
        self.rows[self._open[-1]].seconds += now - self._since
        self._since = now
