"""A scheduler's counters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Metrics:
    """Counters since the scheduler was made.

    Attributes:
        slots, live_slots: slots in all, and slots held now.
        live, waiting: requests being drawn (or whose prompts run), and requests in the queue.
        submitted, refused: requests taken, and turned away (queue full, can never fit, closed).
        full: requests turned away because the queue was full.
        admitted, finished, cancelled, expired, failed: what became of those taken; expired ones
            ran out of time.
        steps: batched forwards.
        codes: image codes drawn.
        busy_s: seconds spent drawing them, prompts included.
    """

    slots: int = 0
    live_slots: int = 0
    live: int = 0
    waiting: int = 0
    submitted: int = 0
    refused: int = 0
    full: int = 0
    admitted: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    steps: int = 0
    codes: int = 0
    busy_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Image codes per second of drawing."""
        return self.codes / self.busy_s if self.busy_s else 0.0
