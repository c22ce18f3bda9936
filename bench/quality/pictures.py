"""The tables as plots, and the stages side by side: each draws the same layouts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from echogen.bench.quality.cells import cells
from echogen.bench.quality.lab import Lab
from echogen.bench.quality.report import AT, Table
from echogen.bench.quality.run import recorded_model
from echogen.bench.quality.score import PLAIN
from echogen.engine.engine import Engine
from echogen.train.data.scenes import load_scenes, render
from echogen.train.eval.tables import layouts_of

PLOTTED = ("AP", "judge acc50", "mAcc")
STAGES = ("ablation-stage1", "ablation-stage2", "ablation-stage3")
COLUMNS, SIDE, EDGE, LEFT = 10, 64, 4, 72


def plot(name: str, table: Table, folder: Path) -> Path | None:
    """Plot the means and standard errors of a table's arms, at T = 1 and at the best settings.
    Return None where no cell is finished. Points rather than bars, as arms differ little compared
    with what they share.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in table["rows"] if row["seeds"]]
    if not rows:
        return None
    figure = Figure(figsize=(4.5 * len(PLOTTED), 1.5 + 0.5 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(PLOTTED), sharey=True)
    for axes, measure in zip(panels, PLOTTED, strict=True):
        for i, at in enumerate(AT):
            found = [row["measures"][at][measure] for row in rows]
            places = [j + 0.4 * i for j, f in enumerate(found) if f["mean"] is not None]
            means = [f["mean"] for f in found if f["mean"] is not None]
            errors = [f["stderr"] or 0.0 for f in found if f["mean"] is not None]
            label = "T = 1" if i == 0 else "best T, CFG"
            axes.errorbar(means, places, xerr=errors, fmt="os"[i], capsize=3, label=label)
        axes.set_title(measure)
        axes.grid(axis="x", alpha=0.4)
        axes.margins(0.1, 0.15)
    panels[0].set_yticks([j + 0.2 for j in range(len(rows))], [_label(row) for row in rows])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _label(row: dict[str, Any]) -> str:
    return f"{row['arm']} (n = {len(row['seeds'])})"


def contact_sheet(lab: Lab, path: Path) -> str | None:
    """Draw the first test layouts with stage 1, + 2 and + 3 of one seed, at T = 1 and CFG = 1 with
    the same noise, below the true pictures. Return why the sheet was not made, or None."""
    why = "no seed has all three stages finished"
    for seed in lab.seeds:
        models = _models(lab, seed)
        lost = [stem for stem, model in models.items() if model is None]
        if lost:
            why = f"of seed {seed} there are no models, as recorded, of {', '.join(lost)}"
            continue
        scenes = load_scenes("test", COLUMNS)
        layouts = layouts_of(scenes, seed)
        engines = {stem: model for stem, model in models.items() if model is not None}
        size = engines[STAGES[0]].image_size
        rows = {"true": [Image.fromarray(x) for x in render(scenes, size)]}
        for stem, engine in engines.items():
            codes = engine.generate_codes(layouts, seed, sampling=PLAIN)
            rows[lab.cells[f"{stem}-seed{seed}"].arm] = engine.decode(codes)
        _sheet(rows).save(path)
        return None
    return why


def _models(lab: Lab, seed: int) -> dict[str, Engine | None]:
    """Return the stages' models, each only if it is the recorded one."""
    found: dict[str, Engine | None] = {}
    for stem in STAGES:
        found[stem] = recorded_model(lab, cells([seed])[f"{stem}-seed{seed}"])
    return found


def _sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Arrange labelled rows of pictures, with small ones at twice their size."""
    side = max(2 * SIDE, next(iter(rows.values()))[0].width)
    wide = LEFT + COLUMNS * (side + EDGE) + EDGE
    sheet = Image.new("RGB", (wide, len(rows) * (side + EDGE) + EDGE), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, images) in enumerate(rows.items()):
        top = EDGE + i * (side + EDGE)
        pen.text((EDGE, top + side // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            large = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (LEFT + j * (side + EDGE), top))
    return sheet
