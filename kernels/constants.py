"""Launch constants that were chosen among several, and how a measurement tries the others.

Nothing is tuned while a model runs: graphs, a batch's independence of its neighbours and
compilation ahead of time all need constants that stay. Launchers ask `chosen` for theirs, and get
what the code says; only `echogen bench kernels --tune` puts others in their place, in a `trial`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar


class Constants(Protocol):
    """Launch constants: a frozen dataclass, of a type of its own for each choice."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def candidates(self) -> Sequence[Self]:
        """What to measure against these, which may be among them; what does not compile or spills
        is skipped by whoever measures."""
        ...


@dataclass(frozen=True)
class Trial:
    """A measurement: what is ``tried``, and ``asked``, the constants of the code by their type, as
    the first launch to ask had them."""

    tried: Constants | None
    asked: dict[type, Constants] = field(default_factory=dict)


C = TypeVar("C", bound=Constants)
# A global and no context variable: on a GPU backward runs in threads of autograd's own.
_trial: Trial | None = None


def chosen(constants: C) -> C:
    """These, or in a trial the ones tried, where they are of the same type."""
    if _trial is None:
        return constants
    _trial.asked.setdefault(type(constants), constants)
    return _trial.tried if type(_trial.tried) is type(constants) else constants


@contextmanager
def trial(tried: Constants | None = None) -> Iterator[Trial]:
    """Launches within use these constants wherever they ask for ones of their type; None: the
    code's own."""
    global _trial
    before, _trial = _trial, Trial(tried)
    try:
        yield _trial
    finally:
        _trial = before
