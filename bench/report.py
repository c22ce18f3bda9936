"""The tables of bench/README.md, written from the committed results and from nothing else.

Each part says on which machine and at which commit its figures were taken; `echogen bench report
--write` puts them between their marks, and a test fails where the page says something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- bench report -->", "<!-- end of bench report -->"
NO_GPU = (
    "No figure of a GPU is recorded yet: `make gpu` takes them on a machine that has one and "
    "leaves them under `bench/results/gpu/`, from where this page reads them."
)

STAGES = ("pmtp", "djo", "cycle-rl")

Result = dict[str, Any]


class ReportError(ValueError):
    """A page without the marks, or a result that cannot be read; the message names the file."""


def section(results: Path = RESULTS) -> str:
    """The tables as Markdown, without their marks."""
    gpu = results / "gpu"
    parts = [
        _engine(_read(results, "engine-*.json")),
        _drawing(_read(results, "latency-*.json") + _read(results, "rollout-*.json")),
        _jacobi(_read(results, "jacobi-*.json")),
        _windows(_read(results, "window-*.json")),
        _training(_read(results, "train-*.json")),
        _memory(_read(results, "memory.json")),
        _drawing(_read(gpu, "latency-*.json") + _read(gpu, "rollout-*.json")),
        _windows(_read(gpu, "window-*.json")),
        _training(_read(gpu, "train-*.json")),
        _kernels(_read(gpu, "kernels*.json")) or NO_GPU,
    ]
    return "\n\n".join(part for part in parts if part)


def placed(page: str, text: str) -> str:
    """The page with the tables between its marks.

    Raises:
        ReportError: the marks are not there, once each and in order.
    """
    head, found, rest = page.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ReportError(f"bench/README.md: lacks the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def _read(folder: Path, pattern: str) -> list[Result]:
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ReportError(f"{path}: not valid JSON ({error})") from None
    return found


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _taken(results: Sequence[Result]) -> str:
    """On which machine, with which versions and at which commit."""

    def all_of(read: Callable[[Result], object]) -> str:
        return ", ".join(dict.fromkeys(str(read(r)) for r in results))

    where = all_of(
        lambda r: r["device"] if r["device"] != "cpu" else f"{r['cpus']} cores of {r['cpu']}"
    )
    torch = all_of(lambda r: r["versions"]["torch"])
    commits = all_of(lambda r: (r["commit"] or "no commit")[:9] + ("+" if r["dirty"] else ""))
    return f"({where}; PyTorch {torch}; commit {commits})"


def _engine(results: list[Result]) -> str:
    if not results:
        return ""
    rows = []
    for r in results:
        by = {one["provider"]: one for one in r["results"]}
        ours, port = by["echogen"], by["transformers"]
        rows.append(
            (
                f"{r['model']}, {r['parameters'] / 1e6:.1f} M, {r['dtype']}",
                f"{r['batch']}, {r['cfg']:g}",
                *(
                    f"{o['tokens_per_s']:.0f} tokens/s, {o['ms_per_step']:.2f} ms"
                    for o in (ours, port)
                ),
                f"{r['ratio']:.2f}",
            )
        )
    return (
        "**Drawing against the port's generate loop**: greedy codes equal, each side at its own "
        f"best thread count, medians of alternating runs {_taken(results)}. This engine keeps the "
        "unconditional prompt's prefix and its packed weights between images; the port has "
        "neither.\n\n"
        + _table(("model", "batch, CFG", "this engine, a step", "port, a step", "ratio"), rows)
    )


def _drawing(results: list[Result]) -> str:
    """One row a batch: this engine, and how many times as long each of the others takes."""
    left, cells = list[str](), dict[tuple[Any, ...], list[Result]]()
    for result in results:
        left += result["left_out"]
        for r in result["results"]:
            cells.setdefault((r["model"], r["dtype"], r["batch"], r["cfg"]), []).append(r)
    models = list(dict.fromkeys(model for model, *_ in cells))
    rows, overheads = list[tuple[str, ...]](), list[str]()
    for cell in sorted(cells, key=lambda cell: (models.index(cell[0]), *cell[1:])):
        (model, dtype, batch, cfg), (ours, *others) = cell, cells[cell]
        if (spent := ours.get("overhead_us_per_token")) is not None:
            overheads.append(f"{spent:.0f} µs of {1e3 * ours['ms_per_step']:.0f} ({model})")
        rows.append(
            (
                f"{model}, {dtype}",
                f"{batch}, {cfg:g}",
                f"{ours['images_per_s']:.2f}",
                f"{ours['ms_per_step']:.2f}",
                f"{ours['bytes_per_step'] / 1e6:.0f}",
                ""
                if ours["limit_share"] is None
                else f"{100 * ours['limit_share']:.0f} ({ours['bound']})",
                f"{ours['peak_mib']:.0f}",
                ", ".join(f"{o['provider']} {_as_long(o, ours):.2f}×" for o in others),
            )
        )
    if not rows:
        return ""
    headings = ("model", "batch, CFG", "images/s", "ms a step", "MB a step", "% of the limit",
                "peak MiB", "times as long: others")  # fmt: skip
    calls = f" Of a step, calls without arithmetic take {', '.join(overheads)}." * bool(overheads)
    # What one run had no time for another may have.
    there = tuple(
        f"{r['model']}, batch {r['batch']}, cfg {r['cfg']:g}:"
        for result in results
        for r in result["results"]
    )
    left = [line for line in left if not line.startswith(there)]
    absent = f" Left out: {'; '.join(dict.fromkeys(left))}." * bool(left)
    return (
        "**Drawing, against the machine and everybody** (`echogen bench engine --mode latency` and "
        "`--mode rollout`): one picture, and groups of eight at temperature 1 with "
        "log-probabilities kept, medians of alternating runs "
        f"{_taken(results)}. The limit is a step's least traffic (weights once, every different "
        "prompt's keys and values once, each row's own) or arithmetic at the rates of a copy "
        "(on a CPU of reading, where that is quicker) and "
        f"of a product measured in the same run.{calls}{absent}\n\n" + _table(headings, rows)
    )


def _as_long(other: Result, ours: Result) -> float:
    """How many times as long another provider takes; where all of them drew in turn, as in results
    of old, it is not told."""
    told: float | None = other.get("times_as_long")
    return other["ms_per_step"] / ours["ms_per_step"] if told is None else told


def _jacobi(results: list[Result]) -> str:
    if not results:
        return ""
    rows = []
    for r in sorted(results, key=lambda r: r["batch"]):
        for s in r["settings"]:
            crowded = s["crowded"]
            rows.append(
                (
                    f"{r['model']}, {r['dtype']}",
                    f"{s['temperature']:g}, {s['cfg']:g}",
                    str(r["batch"]),
                    f"{r['layouts']} + {r['crowded_layouts']}",
                    str(s["window"]),
                    f"{s['steps_jacobi']:.1f} of {s['steps_sequential']}",
                    f"{s['acceptance']['all']:.2f}, {s['acceptance']['object']:.2f}",
                    f"{s['ratio']:.2f}",
                    f"{crowded['steps_jacobi']:.1f}, {crowded['acceptance']['all']:.2f}, "
                    f"{crowded['ratio']:.2f}",
                    f"{s['different']} of {s['images']}",
                )
            )
    first = results[0]
    headings = ("model", "T, CFG", "images at once", "layouts", "codes a step", "steps",
                "accepted: all, on objects", "times as fast",
                "crowded: steps, accepted, times as fast", "images that differ")  # fmt: skip
    return (
        "**Several codes a step, losslessly** (`echogen bench engine --mode jacobi`): the noise is "
        "keyed, so the drawing is a function of its prompt, and Jacobi iteration over a window of "
        "codes ends in exactly what one code a step draws. By PyTorch's operations (here bfloat16) "
        "that is the default where it is faster; in C++ (float32) one code a step is. "
        "Layouts of the test split and, apart, crowded ones, whose boxes cover at least 60% of the "
        f"canvas; {first['threads']} thread, medians of drawings in turn {_taken(results)}.\n\n"
        + _table(headings, rows)
    )


def _windows(results: list[Result]) -> str:
    """One row a model: how many times a step of one code every window takes, and the projection."""
    if not results:
        return ""
    widths = sorted({w["window"] for r in results for w in r["windows"]})
    rows = []
    for r in results:
        by = {w["window"]: w for w in r["windows"]}
        told = [
            f"{w['projection']['test']['ms_per_image'] / 1e3:.2f} s, "
            f"{w['projection']['test']['times_as_fast']:.2f}× "
            f"(crowded {w['projection']['crowded']['times_as_fast']:.2f}×), "
            f"{width} a step, as {w['projection']['from']}"
            for width, w in by.items()
            if w["projection"] is not None and w["projection"]["from"] != r["model"]
        ]
        rows.append(
            (
                f"{r['model']}, {r['dtype']}",
                f"{r['batch']}, {r['cfg']:g}",
                f"{r['threads']}" if r["device"] == "cpu" else "",
                f"{r['ms_sequential']:.2f}",
                *(f"{by[w]['ratio']:.2f}" if w in by else "" for w in widths),
                "; ".join(told),
            )
        )
    headings = ("model", "batch, CFG", "threads", "one code, ms", *map(str, widths),
                "projected: an image")  # fmt: skip
    return (
        "**What a step of several codes costs** (`echogen bench engine --mode window`), of any "
        "weights, in steps of one code, sampling included; medians of steps in turn at the middle "
        f"of an image {_taken(results)}. The last column is a projection and no measurement: what "
        "an image would take, and how many times as fast that is as code by code, if drafts were "
        "as good as the bundled model's were (temperature 1, table above).\n\n"
        + _table(headings, rows)
    )


def _training(results: list[Result]) -> str:
    """One row a stage of a recipe, and the phases that take most of its step; of older results,
    which name none, the innermost ranges."""
    if not results:
        return ""
    rows = []
    for r in sorted(results, key=lambda r: (r["recipe"], STAGES.index(r["stage"]))):
        prefix = f"train/{r['stage']}/"
        shares = [
            f"{name.removeprefix(prefix)} {100 * share:.0f}%"
            for name, share in (r["phases"] if "phases" in r else r["shares"]).items()
            if share >= 0.05
        ]
        rows.append(
            (
                f"{r['stage']}, {r['recipe']}",
                r["dtype"],
                f"{r['images']}",
                f"{r['ms_per_step']:.0f}",
                f"{r['images_per_s']:.1f}",
                f"{r['tokens_per_s']:.0f}",
                f"{100 * r['padding']:.1f}",
                f"{100 * r['utilisation']:.0f}",
                f"{r['peak_mib']:.0f}",
                ", ".join(shares),
            )
        )
    threads = ", ".join(dict.fromkeys(f"{r['threads']}" for r in results if r["device"] == "cpu"))
    on = f"threads: {threads}; " * bool(threads)
    older = ["phases" not in r for r in results]
    counted = "innermost range" if all(older) else "phase of the step that it lies in"
    if any(older) and not all(older):
        counted += " (in older results for the innermost range)"
    headings = ("stage, recipe", "type", "images a step", "ms a step", "images/s", "tokens/s",
                "padding, %", "utilisation, %", "peak MiB", "of the time")  # fmt: skip
    return (
        f"**Training** (`echogen bench train --stage S`; {on}medians) {_taken(results)}. Tokens "
        "are those of the trainer's own passes, without padding. Utilisation is the arithmetic of "
        "the decoder's weights for them, 6 operations a weight and token, over the rate of matrix "
        "products measured in the same run: heads, attention and rollouts are no part of it. On a "
        "GPU the memory is that of tensors, on a CPU the process's. Of the time, a moment counts "
        f"for the {counted}. A GPU is waited for at the ends of each to count it, so `data`, "
        "which is made beside backward, has a share here and takes no time of a step."
        "\n\n" + _table(headings, rows)
    )


def _memory(results: list[Result]) -> str:
    if not results:
        return ""
    rows = [
        (
            f"`{r['operator']}`",
            r["shape"],
            r["dtype"],
            *(f"{r[f'{name}_mib']:.0f}" for name in ("gradients", "eager", "echogen")),
            f"{r['ratio']:.3f}",
        )
        for r in results[0]["memory"]
        if r["eager_mib"] >= 100
    ]
    headings = ("operator", "shape", "type", "gradients alone", "eager", "this", "this / eager")
    return (
        "**Peak memory** of forward and backward beyond the inputs, MiB: every tensor that is made "
        f"and held, counted by `echogen bench memory` {_taken(results)}. The "
        "gradients are in both columns; with few images they, and the float32 sum of the weight's "
        "gradient, are most of what is left.\n\n" + _table(headings, rows)
    )


def _kernels(results: list[Result]) -> str:
    """Of a GPU: this project's time, share of the floor and ratio to every other provider."""
    rows = []
    for r in (row for result in results for row in result["kernels"]):
        if r["provider"] != "echogen" or r["error"]:
            continue
        same = ("operator", "shape", "dtype", "mode")
        others = [
            f"{o['provider']} {o['ms'] / r['ms']:.2f}×"
            + " (no graph)" * (o.get("graph") is False and r.get("graph") is True)
            for result in results
            for o in result["kernels"]
            if o["provider"] != "echogen" and o["ms"] and all(o[k] == r[k] for k in same)
        ]
        share = f"{r['percent_of_floor']:.0f} ({r['bound']})" if r["percent_of_floor"] else ""
        rows.append(
            (f"`{r['operator']}`", r["shape"], r["dtype"], r["mode"], f"{r['ms']:.3f}", share,
             ", ".join(others))
        )  # fmt: skip
    if not rows:
        return ""
    headings = (
        "operator",
        "shape",
        "type",
        "mode",
        "ms",
        "% of the floor",
        "times as long: others",
    )
    return f"**Operators** {_taken(results)}.\n\n" + _table(headings, rows)
