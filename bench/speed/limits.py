"""The machine's ceilings, and how close this project comes to them: single operators, and the
phases of drawing and grounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from echogen.bench.harness import environment, threads
from echogen.bench.profile.stopwatch import Stopwatch
from echogen.bench.profile.subjects import Asked, warmed
from echogen.bench.profile.trace import clock
from echogen.bench.registry import OURS, Floor, cases, short
from echogen.bench.roofline import Roofline, measure
from echogen.bench.speed import kernels, phases
from echogen.engine.ranges import listening

Note = Callable[[str], None]
Progress = Callable[[int, int], None]
DTYPES = (torch.float32, torch.bfloat16)
PHASES = ("generate", "ground")
REPEATS = 5


def run(
    device: str = "cpu",
    model: str = "tiny",
    batch: int = 1,
    dtype: str = "float32",
    note: Note = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure ceilings, then operators and phases; JSON-ready.

    Args:
        device: "cpu" or "cuda". On a CPU everything runs on one thread, and the operators are their
            references, at the shapes of decoding where they have some (those of training would take
            minutes), else tiny.
        model: the model whose phases are timed.
        batch: pictures at once.
        dtype: of its weights, "float32" or "bfloat16".
        note: called with what is left out.
        progress: called with (steps done, steps in all).

    Returns:
        ``ceilings`` by float type; ``operators`` and ``phases``, each with its time, its floor, the
        floor's share of the time, and what bounds it; and the environment.
    """
    with threads(1 if device == "cpu" else None):
        return _run(Asked(model, device, batch, dtype=getattr(torch, dtype)), note, progress)


def _run(asked: Asked, note: Note, progress: Progress) -> dict[str, Any]:
    device = asked.device
    on = torch.device(device)
    ceilings = {dtype: measure(on, dtype) for dtype in DTYPES}
    progress(1, 4)
    operators: list[dict[str, Any]] = []
    for size, names in _sizes(device).items():
        timed = kernels.run(names, size, device, [OURS], 10, note, ceilings=ceilings)["kernels"]
        operators += [r for r in timed if r["provider"] == OURS and not r["error"]]
    progress(2, 4)
    drawn: list[dict[str, Any]] = []
    for done, what in enumerate(PHASES):
        drawn += _phases(what, asked, ceilings[asked.dtype])
        progress(3 + done, 4)
    return {
        "ceilings": {short(k): v.to_dict() for k, v in ceilings.items()},
        "operators": operators,
        "phases": drawn,
        "model": asked.model,
        "dtype": short(asked.dtype),
        "batch": asked.batch,
        "threads": torch.get_num_threads(),
    } | environment(device)


def _sizes(device: str) -> dict[str | None, list[str]]:
    """Return cases by the size at which they are timed; on CUDA every case at its usual ones
    (None).
    """
    if device == "cuda":
        return {None: []}
    found: dict[str | None, list[str]] = {}
    for name, case in cases().items():
        found.setdefault("decoding" if "decoding" in case.sizes else "tiny", []).append(name)
    return found


def _phases(what: str, asked: Asked, ceiling: Roofline) -> list[dict[str, Any]]:
    """Return the ranges of one piece of work, each with the median of several runs."""
    work, config, _ = warmed(what, asked)
    # The tiny model's weights fit in a cache.
    size = asked.dtype.itemsize
    held = size * (phases.Weights.of(config).body + phases.Weights.of(config).image_head)
    own = partial(measure, torch.device("cpu"), asked.dtype, held)
    if asked.device == "cpu":
        ceiling = own()
    runs = []
    for _ in range(REPEATS):
        watch = Stopwatch(clock(asked.device))
        with listening(watch):
            watch.start()
            work()
            watch.stop()
        runs.append(watch.rows)
    if asked.device == "cpu":  # the machine may have been slower before
        ceiling = ceiling.or_higher(own())
    rows = []
    for category, row in runs[0].items():
        seconds = float(torch.tensor([r[category].seconds for r in runs]).median())
        cost = phases.floor(config, row, size)
        rows.append(
            {"work": what, "phase": category, "count": row.count, "ms": 1e3 * seconds}
            | _against(cost, seconds, ceiling)
        )
    return rows


def _against(cost: Floor | None, seconds: float, ceiling: Roofline) -> dict[str, Any]:
    if cost is None:
        return dict.fromkeys(("floor_ms", "percent_of_floor", "bound", "bytes", "flops"))
    least = ceiling.seconds(cost)
    return {
        "floor_ms": 1e3 * least,
        "percent_of_floor": 100 * least / seconds,
        "bound": ceiling.bound(cost),
        "bytes": cost.bytes,
        "flops": cost.flops,
    }


Shown = tuple[str, Sequence[str], Sequence[Sequence[object]]]


def tables(result: dict[str, Any]) -> list[Shown]:
    """Return titles, headings and rows, for people."""
    ceilings = [
        (dtype, c["bytes_per_s"] / 1e9, c["flops_per_s"] / 1e9, c["issues_per_s"] / 1e9,
         c["specials_per_s"] / 1e9)
        for dtype, c in result["ceilings"].items()
    ]  # fmt: skip
    operators = [
        (r["operator"], r["size"], r["mode"], r["dtype"], r["ms"], _share(r), r["bound"])
        for r in result["operators"]
    ]
    drawn = [
        (r["work"], r["phase"], r["count"], r["ms"], _share(r), r["bound"] or "")
        for r in result["phases"]
    ]
    return [
        (f"Ceilings of {_where(result)}",
         ("type", "memory, GB/s", "product, GFLOP/s", "additions, G/s", "exponentials, G/s"),
         ceilings),
        ("Operators: share of the floor", ("operator", "size", "mode", "type", "ms", "%", "bound"),
         operators),
        (f"Phases of {result['model']}, batch {result['batch']}: share of the floor",
         ("work", "phase", "entered", "ms", "%", "bound"), drawn),
    ]  # fmt: skip


def _where(result: dict[str, Any]) -> str:
    count = result["threads"]
    return result["device"] + (f", {count} thread{'s' * (count > 1)}" * (result["device"] == "cpu"))


def _share(row: dict[str, Any]) -> str:
    share = row["percent_of_floor"]
    return "" if share is None else f"{share:.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot achieved against possible rates: a roofline of memory and matrix products, with a dot
    per operator and phase.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    x = torch.logspace(-1, 3, 100)
    for dtype, c in result["ceilings"].items():
        roof = (x * c["bytes_per_s"]).clamp(max=c["flops_per_s"])
        axes.loglog(x, roof / 1e9, label=f"{dtype}: memory, then product")
    for row, name in _dots(result):
        intensity, rate = row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e3
        axes.loglog(intensity, rate / 1e9, "o", markersize=4)
        axes.annotate(name, (intensity, rate / 1e9), fontsize=6)
    axes.set_xlabel("operations a byte of the floor")
    axes.set_ylabel("GFLOP/s of matrix products")
    axes.set_title(_where(result))
    axes.legend()
    figure.savefig(path, dpi=120)


def _dots(result: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return what multiplies matrices; nothing else fits on an axis of operations per byte."""
    found = [(r, f"{r['operator']} {r['mode']}") for r in result["operators"]]
    found += [(r, f"{r['work']}: {r['phase']}") for r in result["phases"]]
    return [(row, name) for row, name in found if row["flops"]]
