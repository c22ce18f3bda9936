"""Launch constants that have alternatives, and how a measurement tries the alternatives.

Nothing is tuned while a model runs: graphs, results that do not depend on the rest of the batch and
ahead-of-time compilation all need fixed constants. Launchers get theirs from `chosen`, which
returns those in the code; only `echogen bench kernels --tune` replaces them, in a `trial`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar


class Constants(Protocol):
    """Launch constants: a frozen dataclass, with its own type for each choice."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def candidates(self) -> Sequence[Self]:
        """The constants to measure against these, possibly including these. The measurement skips
        those that do not compile or that spill."""
        ...


@dataclass(frozen=True)
class Trial:
    """A measurement: the constants ``tried``, and in ``asked``, by type, the code's own constants
    as the first launch passed them to `chosen`."""

    tried: Constants | None
    asked: dict[type, Constants] = field(default_factory=dict)


C = TypeVar("C", bound=Constants)
# A global, not a context variable: on a GPU, backward runs in autograd's own threads.
_trial: Trial | None = None


def chosen(constants: C) -> C:
    """Return ``constants``, or in a trial the ones tried if they are of the same type."""
    if _trial is None:
        return constants
    _trial.asked.setdefault(type(constants), constants)
    return _trial.tried if type(_trial.tried) is type(constants) else constants


@contextmanager
def trial(tried: Constants | None = None) -> Iterator[Trial]:
    """Make launches within use ``tried`` in place of constants of its type, unless it is None."""
    global _trial
    before, _trial = _trial, Trial(tried)
    try:
        yield _trial
    finally:
        _trial = before
