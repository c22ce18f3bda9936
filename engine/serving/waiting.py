"""Who is drawn next: first come, first served, with bounded exceptions, so that nobody starves."""

from __future__ import annotations

from typing import Protocol, TypeVar


class QueueFull(RuntimeError):
    """The queue is full; the message names the limit and the fix."""


class Waits(Protocol):
    """What the queue needs to know of a request.

    Attributes:
        rows: slots it takes, all at once.
        priority: higher ones go first.
        overtaken: how often a later request went before it.
    """

    rows: int
    priority: int
    overtaken: int


R = TypeVar("R", bound=Waits)


class Waiting(list[R]):
    """Requests in the order they came.

    The next one is the first of the highest priority or, if that needs more slots than are free,
    the next that fits. Each request that came before it is then counted as overtaken once more. A
    request that has been overtaken ``patience`` times goes before all others, and until there are
    slots for it none goes. So a request waits for those before it and for at most ``patience`` of
    those after it: images end, a request that fits in all the slots gets them, and nobody starves.

    Args:
        limit: requests that may wait.
        patience: 0 is strictly first come, first served, whatever the priority.
    """

    def __init__(self, limit: int, patience: int) -> None:
        super().__init__()
        self.limit, self.patience = limit, patience

    def put(self, request: R) -> None:
        """Queue a request after the others. Raises QueueFull at the limit."""
        if len(self) >= self.limit:
            raise QueueFull(
                f"{len(self)} requests are waiting and the queue holds {self.limit}; submit again "
                f"when some are drawn"
            )
        self.append(request)

    def take(self, free: int) -> R | None:
        """Remove and return the next request for ``free`` slots; None if none fits or may go."""
        chosen = self._choose(free)
        if chosen is not None:
            for before in self[: self.index(chosen)]:
                before.overtaken += 1
            self.remove(chosen)
        return chosen

    def _choose(self, free: int) -> R | None:
        # No request has been overtaken more often than those before it: if any is at the end of
        # its patience, the first is.
        if self and self[0].overtaken >= self.patience:
            return self[0] if self[0].rows <= free else None
        fitting = (request for request in self if request.rows <= free)
        return max(fitting, key=lambda request: request.priority, default=None)  # the first of them
