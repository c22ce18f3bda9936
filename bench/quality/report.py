"""The tables: mean ± standard error over seeds, what every arm spent, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from echogen.bench.answers.part import bullets, short_commit
from echogen.bench.answers.part import table as grid
from echogen.bench.quality.cells import COMPARED, RENAMED, ROWS, Cell, cells
from echogen.bench.quality.records import Record, clock, device, pace, precision, read_record

TITLES = {
    "ablation": "Ablation: does each stage help?",
    "plateau": "Ablation from stage 1 at its plateau",
    "mask": "Mask: `isolated` or `shared`",
    "synergy": "Synergy: one task or both, equal steps",
    "rl-data": "Cycle RL's layouts: real, random, LLM-written",
}
AT = {"plain": "At T = 1, CFG = 1", "best": "At each run's own validation-best T and CFG"}

# name in a table → (its place in an evaluation, the task that must be learnt for it)
MEASURES: dict[str, tuple[tuple[str, str], str]] = {
    "AP": (("l2i", "ap"), "l2i"),
    "AP50": (("l2i", "ap50"), "l2i"),
    "AP75": (("l2i", "ap75"), "l2i"),
    "judge acc50": (("l2i", "acc50"), "l2i"),
    "spatial": (("l2i", "spatial"), "l2i"),
    "colour": (("l2i", "color"), "l2i"),
    "texture": (("l2i", "texture"), "l2i"),
    "shape": (("l2i", "shape"), "l2i"),
    "fd_vq": (("l2i", "fd_vq"), "l2i"),
    "codes of 4": (("diversity", "distinct_codes"), "l2i"),
    "pixel distance": (("diversity", "pixel_distance"), "l2i"),
    "Acc0.5": (("i2l", "acc50"), "i2l"),
    "Acc0.75": (("i2l", "acc75"), "i2l"),
    "Acc0.9": (("i2l", "acc90"), "i2l"),
    "mAcc": (("i2l", "macc"), "i2l"),
    "self IoU": (("cycle", "self_iou"), "both"),
    "gap": (("cycle", "gap"), "both"),
}
TYPES = ("bfloat16", "float32")
DIFFERING = ("AP", "AP50", "judge acc50", "mAcc")

Table = dict[str, Any]
READING = """\
Made by `echogen bench quality --report` from the cells in this folder, each with its metrics log.

- Figures are the mean ± standard error over seeds: the standard deviation (with n − 1) over √n. One
  seed has no standard error, and is marked n = 1.
- **AP**, **judge acc50** and the accuracies **spatial** (place), **colour**, **texture** and
  **shape** are the exact judge's, on drawn test layouts.
- **Acc** and **mAcc** are those of free-running grounding in true test images.
- Where a test layout is drawn several times, the measures from AP to shape are means over the
  drawings; fd_vq, self IoU and gap are of the first.
- **fd_vq** is a Fréchet distance of VQ features; lower is better.
- **codes of 4** and **pixel distance** say how varied pictures are. Of four pictures of one layout,
  the first counts the different codes at a place; the second is the mean absolute difference of two
  of them.
- **gap** is self-judged IoU less independently judged IoU.
- Checkpoints, T and CFG are chosen on validation scenes: a checkpoint by the judge's IoU of 64
  drawings at T = 0.7, one of each layout; Cycle RL's, and that of the arm that spends the seconds
  of stages 2 and 3 from the plateau, by `val_drawings` of each of 256 layouts at T = 1.
- Stage 1 continued (by the samples or the seconds of stage 2) is stage 2 without its loop: the same
  batches, schedule and optimizer. At its plateau it is stage 1 continued for the seconds of stages
  2 and 3; the arms that begin there see the first batches of that run again.
- **CPU seconds** are those of the steps alone, on one thread."""


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "stderr", "values"}; stderr is None for one value, and both are None for none."""
    n = len(values)
    if n == 0:
        return {"mean": None, "stderr": None, "values": []}
    mean = math.fsum(values) / n
    spread = math.fsum((v - mean) ** 2 for v in values)
    error = math.sqrt(spread / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "stderr": error, "values": list(values)}


def make(results: Path, seeds: Iterable[int]) -> dict[str, Table]:
    """Make all tables from the finished cells of these seeds, JSON-ready.

    Raises:
        QualityError: a record cannot be read.
    """
    known = cells(seeds)
    found = {name: read_record(results, name) for name in known}
    records = {name: r for name, r in found.items() if r is not None}
    return {table: _table(table, known, records) for table in ROWS}


def _table(table: str, known: dict[str, Cell], records: dict[str, Record]) -> Table:
    mine = {stem: [c for c in known.values() if c.stem == stem] for stem in ROWS[table]}
    there = {
        stem: {c.seed: records[c.name] for c in group if c.name in records}
        for stem, group in mine.items()
    }
    arms = {stem: RENAMED.get((table, stem), group[0].arm) for stem, group in mine.items()}
    some = [r for by_seed in there.values() for r in by_seed.values()]
    return {
        "title": TITLES[table],
        "rows": [_row(stem, arms[stem], there[stem]) for stem in mine],
        "differences": [
            _difference(less(arms[a], arms[b]), there[a], there[b]) for a, b in COMPARED[table]
        ],
        "judge_ceiling": mean_and_error([_ceiling(r)["judge_ceiling"] for r in some]),
        "vq_ceiling": {
            name: mean_and_error([_ceiling(r)["vq_ceiling"][where[1]] for r in some])
            for name, (where, _) in MEASURES.items()
            if where[0] == "l2i" and where[1] != "fd_vq"
        },
        "missing": [c.name for group in mine.values() for c in group if c.name not in records],
        "drawings": sorted({r["settings"]["evaluation"].get("drawings", 1) for r in some}),
        "notes": _notes(some, records) + _forced(some) + _paces(some, known, records),
    }


def _ceiling(record: Record) -> dict[str, Any]:
    return dict(record["evaluation"]["plain"])


def _value(record: Record, at: str, measure: str) -> float | None:
    """Return a measure of a record; None where the cell did not learn its task, or where the
    measure has no value."""
    (part, name), needs = MEASURES[measure]
    task = record["settings"]["task"]
    if task not in ("both", needs):
        return None
    value = record["evaluation"][at][part][name]
    return None if value is None else float(value)


def _row(stem: str, arm: str, by_seed: dict[int, Record]) -> dict[str, Any]:
    records = list(by_seed.values())
    return {
        "stem": stem,
        "arm": arm,
        "seeds": list(by_seed),
        "measures": {
            at: {
                name: mean_and_error([v for r in records if (v := _value(r, at, name)) is not None])
                for name in MEASURES
            }
            for at in AT
        },
        "spent": {
            name: mean_and_error([float(r[name]) for r in records if name not in _not_counted(r)])
            for name in ("steps", "samples", "drawn", "seconds", "cpu_seconds")
        },
        "sampling": [r["evaluation"]["best"]["sampling"] for r in records],
        "checkpoints": [r["checkpoint"]["step"] for r in records if "checkpoint" in r],
        "before": [r["before"] for r in records if r.get("before")],
        "commits": [
            short_commit(place)
            for r in records
            for place in r.get("trained_in", [r["environment"]])
        ],
    }


def _not_counted(record: Record) -> tuple[str, ...]:
    """Return what is left out of a cell's compute because it would mean nothing."""
    return () if clock(record) == "cpu_seconds" else ("cpu_seconds",)


def _difference(what: str, a: dict[int, Record], b: dict[int, Record]) -> dict[str, Any]:
    """The first arm minus the second, over the seeds that both have."""
    seeds = [seed for seed in a if seed in b]
    measures: dict[str, dict[str, Any]] = {at: {} for at in AT}
    for at in AT:
        for name in DIFFERING:
            pairs = [(_value(a[s], at, name), _value(b[s], at, name)) for s in seeds]
            rows = [x - y for x, y in pairs if x is not None and y is not None]
            measures[at][name] = mean_and_error(rows)
    return {"what": what, "seeds": seeds, "measures": measures}


def _notes(some: list[Record], records: dict[str, Record]) -> list[str]:
    """List what makes the rows of a table incomparable."""
    notes = []
    for what, seen in {
        "recipes": {r["settings"]["recipe"] for r in some},
        "scales": {r["scale"] for r in some},
        "numbers of test scenes": {r["settings"]["evaluation"]["test"] for r in some},
        "numbers of drawings": {r["settings"]["evaluation"].get("drawings", 1) for r in some},
    }.items():
        if len(seen) > 1:
            notes.append(f"the cells are of several {what}: {', '.join(map(str, sorted(seen)))}")
    types = {kind: [r["cell"] for r in some if precision(r) == kind] for kind in TYPES}
    if all(types.values()):
        fewer = min(TYPES, key=lambda kind: len(types[kind]))
        notes.append(f"trained in {fewer}, unlike the others: {', '.join(types[fewer])}")
    away = [(device(r), r["cell"]) for r in some if clock(r) == "seconds"]
    for name in dict.fromkeys(name for name, _ in away):
        cells = ", ".join(cell for other, cell in away if other == name)
        notes.append(
            f"trained on {name}, where compute is counted in seconds of steps (wall), since CPU "
            f"seconds say nothing of it: {cells}"
        )
    if any(r["scale"] != 1 for r in some):
        notes.append("scaled down, to try the experiments out: the figures mean nothing")
    for r in some:
        parent = records.get(r["start"]["cell"] or "")
        if parent is not None and parent["model"] != r["start"]["fingerprint"]:
            notes.append(f"{r['cell']} began with another model than {parent['cell']} is now")
    starts = {r["start"]["fingerprint"] for r in some if r["stage"] == "none"}
    if len(starts) == 1 and len([r for r in some if r["stage"] == "none"]) > 1:
        notes.append(
            "the seeds share one model of stage 1: its errors come from drawing alone, those of "
            "the other arms from what follows it"
        )
    return notes


def _forced(some: list[Record]) -> list[str]:
    """List the cells of Cycle RL whose reward agreed with the judge less than they require."""
    notes = []
    for r in some:
        before, config = r.get("before") or {}, r["settings"].get("config", {})
        found, error = before.get("rank_correlation"), before.get("rank_correlation_stderr")
        if found is not None and error is not None and found < config.get("gate_bound", found):
            notes.append(
                f"{r['cell']} was run with --force: at its start the rank correlation of "
                f"self-reward and judge was {found:.3f} ± {error:.3f}, below the "
                f"{config['gate_bound']:g} that Cycle RL asks for"
            )
    return notes


def _paces(some: list[Record], known: dict[str, Cell], records: dict[str, Record]) -> list[str]:
    """Say whose pace converted a budget of seconds into steps. A cell's own pace cannot, where it
    ran on another machine than the cell that set the budget."""
    of: dict[str, list[str]] = {}
    for r in some:
        cell = known[r["cell"]]
        if cell.budget and (by := pace(cell, known, records.get)) is not None:
            of.setdefault(by["cell"], []).append(r["cell"])
    return [
        f"the seconds that {', '.join(names)} had to spend were turned into steps at the pace of "
        f"{by}, since their own pace depends on the machine they ran on"
        for by, names in of.items()
    ]


# --- Markdown -------------------------------------------------------------------------------------


def markdown(tables: dict[str, Table]) -> str:
    """All tables as one page."""
    parts = ["# Quality experiments", READING]
    for table in tables.values():
        parts += _section(table)
    return "\n\n".join(parts) + "\n"


def _section(table: Table) -> list[str]:
    parts = [f"## {table['title']}"]
    rows = [row for row in table["rows"] if row["seeds"]]
    if table["missing"]:
        parts.append("Missing: " + ", ".join(table["missing"]) + ".")
    if not rows:
        return parts
    parts.append(
        f"Ceilings: on the true pictures judge acc50 is {shown(table['judge_ceiling'])}. After a "
        f"round trip through the image tokenizer it is "
        f"{shown(table['vq_ceiling']['judge acc50'])}, and AP is "
        f"{shown(table['vq_ceiling']['AP'])}. Drawings of each test layout: "
        f"{_list(table['drawings'])}."
    )
    if table["notes"]:
        parts.append("Notes:\n\n" + bullets(f"{note}." for note in table["notes"]))
    for at, title in AT.items():
        measures = [(r, r["measures"][at]) for r in rows]
        parts.append(f"### {title}")
        parts.append(
            grid(
                ["arm", "seeds", *MEASURES],
                [[r["arm"], _list(r["seeds"]), *(shown(m[k]) for k in MEASURES)]
                 for r, m in measures],
            )
        )  # fmt: skip
    differences = [d for d in table["differences"] if d["seeds"]]
    if differences:
        parts.append("### Differences, seed by seed")
        parts.append(_differences(differences))
    parts += ["### What was spent", _spent(rows)]
    for row in rows:
        known = [b["rank_correlation"] for b in row["before"] if "rank_correlation" in b]
        if known:
            parts.append(
                f"Before the first step of {row['arm']} the self-reward's rank correlation with "
                f"the judge within groups was {_list([f'{x:.3f}' for x in known])}."
            )
    return parts


def _differences(differences: list[dict[str, Any]]) -> str:
    columns = [f"{name}, {'T = 1' if at == 'plain' else 'best'}" for at in AT for name in DIFFERING]
    lines = []
    for d in differences:
        numbers = [d["measures"][at][name] for at in AT for name in DIFFERING]
        lines.append([d["what"], _list(d["seeds"]), *(shown(n, sign=True) for n in numbers)])
    return grid(["first less second", "seeds", *columns], lines)


def _spent(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        spent = [r["spent"][k]["mean"] for k in
                 ("steps", "samples", "drawn", "seconds", "cpu_seconds")]  # fmt: skip
        settings = [f"{s['temperature']:g}, {s['cfg']:g}" for s in r["sampling"]]
        commits = sorted(set(r["commits"]))
        numbers = ["–" if x is None else f"{x:.0f}" for x in spent]
        lines.append([r["arm"], *numbers, _list(r["checkpoints"]), "; ".join(settings),
                      ", ".join(commits)])  # fmt: skip
    return grid(
        ["arm", "steps", "true images", "drawn images", "seconds of steps", "CPU seconds",
         "checkpoints", "best T, CFG", "commits"],
        lines,
    )  # fmt: skip


def less(first: str, second: str) -> str:
    """Name the difference of two arms, whose names may begin with "+ "."""
    return f"{first.removeprefix('+ ')} − {second.removeprefix('+ ')}"


def shown(estimate: dict[str, Any], sign: bool = False) -> str:
    """Format a mean with its standard error, or with a note that it has none."""
    if estimate["mean"] is None:
        return "–"
    mean = f"{estimate['mean']:{'+' if sign else ''}.3f}".replace("-", "−")
    error = estimate["stderr"]
    return f"{mean} (n = 1)" if error is None else f"{mean} ± {error:.3f}"


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values)) or "–"
