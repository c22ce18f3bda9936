"""Finished cells on test layouts of no table, so that no decision was based on these layouts.

Arms of a seed share layouts and noise. The tables' errors are over seeds, which all draw the same
400 layouts. These errors therefore miss whatever those layouts happen to favour; a second set of
layouts reveals it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from echogen.bench.answers.part import table as grid
from echogen.bench.quality import score
from echogen.bench.quality.cells import COMPARED, RENAMED, Cell, cells
from echogen.bench.quality.lab import Lab
from echogen.bench.quality.records import QualityError, read_record, write_json
from echogen.bench.quality.report import TITLES, less, mean_and_error, shown
from echogen.bench.quality.run import recorded_model
from echogen.commands.output import finite
from echogen.train.data.samples import module_hash
from echogen.train.data.scenes import load_scenes
from echogen.train.eval.tables import layouts_of

DRAWINGS = 2
MEASURES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "judge acc50": "acc50",
            "judge IoU": "judge_iou"}  # fmt: skip


def measure(lab: Lab, cell: Cell, count: int) -> str | None:
    """Draw ``count`` test layouts that follow those of the tables, ``DRAWINGS`` times each, at T =
    1 and CFG = 1. Write what the judge finds to ``fresh/`` in the results.

    Returns:
        Why nothing was drawn, or None.
    """
    path = lab.results / "fresh" / f"{cell.name}.json"
    first = lab.sizes(cell).test
    if cell.task == "i2l":
        return f"{cell.name}: left out, it does not draw"
    if read_record(lab.results, cell.name) is None:
        return f"{cell.name}: left out, it is not finished"
    done = _read(lab.results, cell.name)
    if done is not None and (done["first"], done["count"]) == (first, count):
        return f"{cell.name}: drawn already"
    engine = recorded_model(lab, cell)
    if engine is None:
        return f"{cell.name}: left out, its model, as recorded, is not in {lab.models}"
    scenes = load_scenes("test", first + count)[first:]
    layouts = layouts_of(scenes, cell.seed)
    found = [
        score.drawing(engine, scenes, layouts, cell.seed, score.PLAIN, i) for i in range(DRAWINGS)
    ]
    record = {
        "cell": cell.name,
        "model": module_hash(engine.transformer),
        "first": first,
        "count": count,
        "l2i": score.over_drawings(found),
        "environment": lab.environment,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, finite(record))
    return None


def differences(results: Path, seeds: Iterable[int]) -> dict[str, list[dict[str, Any]]]:
    """Return, by table, the differences between the arms that it compares, first minus second. They
    are over the seeds for which both arms were measured on the same layouts, with the models that
    are recorded now.

    Raises:
        QualityError: a file is not as it was written.
    """
    known = cells(seeds)
    found = {name: r for name in known if (r := _read(results, name)) is not None}
    tables: dict[str, list[dict[str, Any]]] = {}
    for table, pairs in COMPARED.items():
        for a, b in pairs:
            arms = [{c.seed: c for c in known.values() if c.stem == stem} for stem in (a, b)]
            both = [
                (found[one.name], found[two.name])
                for seed, one in arms[0].items()
                if one.name in found and (two := arms[1][seed]).name in found
            ]
            both = [(x, y) for x, y in both if _layouts(x) == _layouts(y)]
            if not both:
                continue
            names = [
                RENAMED.get((table, stem), next(iter(arm.values())).arm)
                for stem, arm in zip((a, b), arms, strict=True)
            ]
            tables.setdefault(table, []).append(
                {
                    "what": less(*names),
                    "seeds": len(both),
                    "layouts": sorted({_layouts(x) for x, _ in both}),
                    "measures": {
                        name: mean_and_error([x["l2i"][key] - y["l2i"][key] for x, y in both])
                        for name, key in MEASURES.items()
                    },
                }
            )
    return tables


def _read(results: Path, name: str) -> dict[str, Any] | None:
    path = results / "fresh" / f"{name}.json"
    record = read_record(results, name)
    if record is None or not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        model, _ = found["model"], _layouts(found)
        _ = [float(found["l2i"][key]) for key in MEASURES.values()]
    except (ValueError, KeyError, TypeError) as error:
        raise QualityError(f"{path}: not as it was written ({error!r}); remove it") from None
    return found if model == record["model"] else None


def _layouts(found: dict[str, Any]) -> tuple[int, int]:
    """The first and the last test layout that were drawn."""
    return int(found["first"]), int(found["first"]) + int(found["count"]) - 1


def section(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Return the differences as a part of the page; empty where nothing was measured."""
    if not tables:
        return ""
    parts = [
        "## Differences on further test layouts",
        "Made by `echogen bench quality --fresh N`: of test layouts that lie behind those of the "
        f"tables above, each drawn {DRAWINGS} times at T = 1, CFG = 1. Errors are over seeds, all "
        "of which draw the same layouts: what holds on both sets is no accident of one.",
    ]
    for table, rows in tables.items():
        drawn = sorted({pair for row in rows for pair in row["layouts"]})
        told = ", ".join(f"{first} … {last}" for first, last in drawn)
        parts.append(f"### {TITLES[table]} (test layouts {told})")
        lines = [
            [row["what"], str(row["seeds"]),
             *(shown(row["measures"][name], sign=True) for name in MEASURES)]
            for row in rows
        ]  # fmt: skip
        parts.append(grid(["first less second", "seeds", *MEASURES], lines))
    return "\n\n".join(parts)
