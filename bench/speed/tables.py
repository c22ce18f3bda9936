"""Results of the benchmarks of operators, drawing and compilation as tables, CSV and plots."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
WIDE = 168
"""Columns of a table in a file, where no terminal gives a width."""


def console() -> Console:
    """Return a console for tables: as wide as the terminal, or as wide as they need."""
    made = Console()
    return made if made.is_terminal else Console(width=WIDE)


def kernels(result: dict[str, Any]) -> Table:
    """Show the result of `echogen.bench.speed.kernels.run`."""
    title = f"Operators on {result['device']}"
    if result["on"] != "cuda":
        title += f" ({result['on']}: these are not the kernels' times)"
    caption = "MiB: at the worst moment, beyond the inputs"
    if result["device"] == "cpu":
        caption += "; counted for the launchers, whatever ran"
    shown = Table(title=title, caption=caption)
    for heading in ("operator", "provider", "shape", "dtype", "mode"):
        shown.add_column(heading, overflow="fold")
    rows = result["kernels"]
    launched = any(r.get("host_ms") is not None for r in rows)
    headings = ["ms", "q20 … q80", *["host ms"] * launched, "GB/s or TFLOP/s", "% of floor", "MiB"]
    for heading in headings:
        shown.add_column(heading, justify="right")
    before = None
    for r in rows:
        if before not in (None, r["operator"]):
            shown.add_section()
        before = r["operator"]
        ms, spread, *others = _cells(r)
        host = "" if r.get("host_ms") is None else f"{r['host_ms']:.3f}"
        who = r["provider"] + ", no graph" * alone(r, rows)
        about = r["operator"], who, r["shape"], r["dtype"], r["mode"]
        shown.add_row(*about, ms, spread, *[host] * launched, *others)
    return shown


def alone(r: Row, rows: Sequence[Row]) -> bool:
    """Whether a time includes the host where others' times of the same case are a graph's. The two
    must not be compared without saying so."""
    same = ("operator", "shape", "dtype", "mode")
    others = (o for o in rows if o.get("graph") and all(o[k] == r[k] for k in same))
    return r.get("graph") is False and any(others)


def _cells(r: Row) -> tuple[str, str, str, str, str]:
    if r["error"]:
        return "refused", "", "", "", ""
    matrix = r["bound"] == "matrix"
    rate = f"{r['tflop_per_s']:.1f} T" if matrix else f"{r['gb_per_s']:.2f} G"
    share = "" if r["percent_of_floor"] is None else f"{r['percent_of_floor']:.0f} ({r['bound']})"
    spread = f"{r['ms_q20']:.3f} … {r['ms_q80']:.3f}"
    mib = "" if r["mib"] is None else f"{r['mib']:.3f}"
    return f"{r['ms']:.3f}", spread, rate, share, mib


def memory(rows: Sequence[Row]) -> Table:
    """Show the result of `echogen.bench.speed.memory.run`."""
    shown = Table(
        title="Peak memory of forward and backward beyond the inputs, MiB",
        caption="counted of every tensor that is made and held, on tensors without memory",
    )
    for heading in ("operator", "shape", "dtype"):
        shown.add_column(heading, overflow="fold")
    for heading in ("gradients alone", "eager", "echogen", "echogen / eager"):
        shown.add_column(heading, justify="right")
    for r in rows:
        numbers = [f"{r[f'{name}_mib']:.1f}" for name in ("gradients", "eager", "echogen")]
        numbers.append(f"{r['ratio']:.3f}")
        shown.add_row(r["operator"], r["shape"], r["dtype"], *numbers)
    return shown


def compiled(rows: Sequence[Row]) -> Table:
    """Show the result of `echogen.bench.speed.compile.run`."""
    shown = Table(title="Operators compiled ahead of time")
    for heading in ("kernel", "of", "dtype", "arch"):
        shown.add_column(heading, overflow="fold")
    for heading in ("registers", "shared", "spilled", "16-byte accesses"):
        shown.add_column(heading, justify="right")
    shown.add_column("error", overflow="fold")
    for r in rows:
        wide = r["wide_access_share"]
        numbers = [r["registers"], r["shared_bytes"], r["spill_bytes"]]
        shown.add_row(
            r["name"], r["operator"], r["dtype"], r["arch"],
            *("" if n is None else str(n) for n in numbers),
            "" if wide is None else f"{wide:.0%}",
            r["error"] or "",
            style="red" if r["error"] or r["spill_bytes"] else None,
        )  # fmt: skip
    return shown


def tuned(result: Row) -> Table:
    """Show the result of `echogen.bench.speed.tune.run`."""
    title = f"Launch constants and their candidates, {result['arch']}"
    if result["timed"]:
        title += f" on {result['device']}"
    else:
        title += ": compiled only, nothing was timed"
    shown = Table(title=title, caption="warps: that a multiprocessor holds at once")
    shown.add_column("operator", overflow="fold", max_width=48)
    for heading in ("constants", "kernel"):
        shown.add_column(heading, no_wrap=True)
    numbers = ("registers", "shared_bytes", "spill_bytes", "warps", "instructions")
    times = ("ms", "times_as_fast") if result["timed"] else ()
    for heading in (*numbers, *times):
        heading = heading.removesuffix("_bytes").replace("_", " ")
        shown.add_column(heading, justify="right")
    shown.add_column("", overflow="fold")
    for r in result["tuned"]:
        about = ""
        if r["now"]:
            shown.add_section()
            names = f"{r['choice']}({', '.join(r['constants'])})"
            about = f"{r['operator']}, {r['mode']}, {r['dtype']}, {r['shape']}: {names}"
        constants = ", ".join(map(str, r["constants"].values()))
        code = [[k[n] for k in r["kernels"]] for n in ("name", *numbers)]
        cells = ["\n".join("" if n is None else str(n) for n in column) for column in code]
        took = ["" if r[n] is None else f"{r[n]:.3f}" for n in times]
        told = r["error"] or ", ".join(word for word in ("now", "best") if r[word])
        style = "red" if r["error"] else "bold" if r["best"] else None
        shown.add_row(about, constants, *cells, *took, told, style=style)
    return shown


def drawing(result: Row) -> Table:
    """Show the result of `echogen.bench.speed.drawing.run`."""
    shown = Table(
        title=f"Drawing on {result['device']}, {result['dtype']}, mode {result['mode']}",
        caption="; ".join(result["left_out"]) or None,
    )
    for heading in ("model", "provider"):
        shown.add_column(heading, overflow="fold")
    for heading in ("batch", "cfg", "images/s", "tokens/s", "ms/step", "q20 … q80", "MB/step",
                    "% of the limit", "peak MiB", "times the port"):  # fmt: skip
        shown.add_column(heading, justify="right")
    before = None
    for r in result["results"]:
        cell = r["model"], r["batch"], r["cfg"]
        if before not in (None, cell):
            shown.add_section()
        before = cell
        shown.add_row(
            r["model"],
            r["provider"],
            str(r["batch"]),
            f"{r['cfg']:g}",
            f"{r['images_per_s']:.2f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['ms_per_step']:.3f}",
            f"{r['ms_per_step_q20']:.3f} … {r['ms_per_step_q80']:.3f}",
            f"{r['bytes_per_step'] / 1e6:.1f}",
            "" if r["limit_share"] is None else f"{100 * r['limit_share']:.1f} ({r['bound']})",
            "" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}",
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
        )
    return shown


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write all rows to one file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plot times of every operator, one picture each: bars by shape and mode, side by side by
    provider.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    written = []
    for operator in dict.fromkeys(r["operator"] for r in rows):
        mine = [r for r in rows if r["operator"] == operator and not r["error"]]
        if not mine:
            continue
        groups = list(dict.fromkeys(_group(r) for r in mine))
        providers = list(dict.fromkeys(r["provider"] for r in mine))
        figure = Figure(figsize=(2 + 1.2 * len(groups), 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            bars = [r for r in mine if r["provider"] == provider]
            places = [groups.index(_group(r)) + i * width for r in bars]
            heights = [r["ms"] for r in bars]
            around = [
                [r["ms"] - r["ms_q20"] for r in bars],
                [r["ms_q80"] - r["ms"] for r in bars],
            ]
            axes.bar(places, heights, width, yerr=around, label=provider)
        floors = {_group(r): r["floor_ms"] for r in mine if r["floor_ms"] is not None}
        if floors:
            left = [groups.index(group) - width / 2 for group in floors]
            axes.hlines(list(floors.values()), left, [x + 0.8 for x in left], "k", label="floor")
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(groups))], groups)
        axes.set_ylabel("ms (median, quantiles 0.2 and 0.8)")
        axes.set_title(f"{operator}: {mine[0]['shape']}")
        axes.legend()
        path = folder / f"{_file(operator)}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _group(r: Row) -> str:
    return f"{r['size']}\n{r['dtype']}\n{r['mode']}"


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
