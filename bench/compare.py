"""Compare two runs of a benchmark by their ratios to a peer timed in the same run.

The machine's state changes the times of a run. It changes the ratio of two contestants timed
alternately less. Where quantiles record how much a time varied, a change is certain only if the
spreads of both runs do not overlap.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echogen.bench.registry import OURS

KEYS = ("model", "operator", "size", "dtype", "mode", "batch", "cfg", "decoding", "stage", "recipe")
TIMES = ("ms", "ms_per_step")


class CompareError(ValueError):
    """Files cannot be compared: unreadable, without results, or without a case in common."""


@dataclass(frozen=True)
class Measured:
    """A time relative to the peer's in the same run (or in ms, without a peer), and its spread:
    ``low`` is this time's 0.2 quantile over the peer's 0.8 quantile, ``high`` the reverse."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One case in both runs.

    Attributes:
        case: what was measured.
        before, after: ratios to the peer (below one: faster than the peer).
        ratio: after over before; above one is slower.
        certain: the spreads do not overlap.
    """

    case: str
    before: Measured
    after: Measured
    ratio: float
    certain: bool

    def slower(self, threshold: float) -> bool:
        """Whether the ratio exceeds ``threshold`` and the spreads do not overlap."""
        return self.certain and self.ratio > threshold

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def load(path: Path) -> dict[str, Any]:
    """Read results from the last line of a benchmark's output, or from a file that holds nothing
    else.

    Raises:
        CompareError: no such file, no JSON, or no results in it.
    """
    try:
        lines = path.read_text().strip().splitlines()
    except OSError as error:
        raise CompareError(f"{path}: cannot be read ({error.strerror})") from None
    for text in ("\n".join(lines), lines[-1] if lines else ""):
        try:
            data = json.loads(text)
        except ValueError:
            continue
        if isinstance(data, dict) and any(isinstance(data.get(k), list) for k in ROWS):
            return data
    raise CompareError(f"{path}: holds no results of `echogen bench kernels` or `bench engine`")


ROWS = ("kernels", "results")


def measured(data: dict[str, Any], peer: str | None) -> dict[str, Measured]:
    """Map each case to this project's time over the peer's, or in ms where ``peer`` is None."""
    rows = next(data[k] for k in ROWS if isinstance(data.get(k), list))
    times: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in rows:
        field = next((name for name in TIMES if row.get(name) is not None), None)
        if field is None or row.get("error"):
            continue
        about = data | row
        case = " ".join(str(about[k]) for k in KEYS if about.get(k) is not None)
        middle = row[field]
        low, high = row.get(f"{field}_q20", middle), row.get(f"{field}_q80", middle)
        times.setdefault(case, {})[row["provider"]] = (middle, low, high)
    found = {}
    for case, by in times.items():
        if OURS not in by or (peer is not None and peer not in by):
            continue
        middle, low, high = by[OURS]
        other = by[peer] if peer is not None else (1.0, 1.0, 1.0)
        found[case] = Measured(middle / other[0], low / other[2], high / other[1])
    return found


def missing(before: dict[str, Any], after: dict[str, Any], peer: str | None) -> list[str]:
    """Return the cases of ``before`` without a time in ``after``: absent, or refused as wrong."""
    there = measured(after, peer)
    return [case for case in measured(before, peer) if case not in there]


def usual_peer(data: dict[str, Any]) -> str:
    """Return the peer that a benchmark's results are compared with by default."""
    return "eager" if isinstance(data.get("kernels"), list) else "transformers"


def compare(before: dict[str, Any], after: dict[str, Any], peer: str | None) -> list[Change]:
    """Compare the cases that both runs have, the most slowed first.

    Args:
        before, after: as `load` gives them.
        peer: provider to take ratios to; None: compare times, of one quiet machine.

    Raises:
        CompareError: no case in common.
    """
    old, new = measured(before, peer), measured(after, peer)
    changes = [
        Change(
            case,
            old[case],
            new[case],
            new[case].value / old[case].value,
            new[case].low > old[case].high or new[case].high < old[case].low,
        )
        for case in old
        if case in new
    ]
    if not changes:
        to = f" with {OURS} and {peer}" if peer else ""
        raise CompareError(f"the two files have no case in common{to}")
    return sorted(changes, key=lambda change: -change.ratio)
