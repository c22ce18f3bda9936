"""What the operators take: memory, and on a GPU time."""

from __future__ import annotations

from echogen.bench.answers.part import Part, Result, measured, table

CELL = ("operator", "shape", "dtype", "mode")
"""The fields that identify what a time of an operator measures."""


def memory(results: list[Result]) -> Part | None:
    """One row per case that takes 100 MiB or more in eager PyTorch."""
    if not results:
        return None
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
    return Part(
        "How much memory do the operators save in training?",
        "Peak memory of forward and backward beyond the inputs, in MiB: every tensor that is made "
        "and held is counted, which needs no GPU. " + measured("`echogen bench memory`", results),
        table(headings, rows),
        {
            "eager, this": "plain PyTorch, and this project's operator; the gradients are in both. "
            "With few images they, and the float32 sum of the weight's gradient, are most of what "
            "is left."
        },
    )


def kernels(results: list[Result]) -> Part | None:
    """On a GPU: this project's time, share of the floor and ratio to every other provider."""
    cells = dict[tuple[str, ...], tuple[Result, list[str]]]()
    for result in results:
        for r in result["kernels"]:
            if r["provider"] != "echogen" or r["error"]:
                continue
            cell = tuple(r[name] for name in CELL)
            # Each ratio is within one run; the time shown is the first run's.
            cells.setdefault(cell, (r, []))[1].extend(
                f"{o['provider']} {o['ms'] / r['ms']:.2f}×"
                + " (no graph)" * (o.get("graph") is False and r.get("graph") is True)
                for o in result["kernels"]
                if o["provider"] != "echogen" and o["ms"] and tuple(o[n] for n in CELL) == cell
            )
    rows = [
        (
            f"`{r['operator']}`", *cell[1:], f"{r['ms']:.3f}",
            f"{r['percent_of_floor']:.0f} ({r['bound']})" if r["percent_of_floor"] else "",
            ", ".join(others),
        )
        for cell, (r, others) in cells.items()
    ]  # fmt: skip
    if not rows:
        return None
    headings = (
        "operator",
        "shape",
        "type",
        "mode",
        "ms",
        "% of the floor",
        "times as long: others",
    )
    return Part(
        "How fast are the operators?",
        measured("`echogen bench kernels --device cuda`", results),
        table(headings, rows),
        {
            "% of the floor": "the share of its time that no implementation can do without, at the "
            "rates of the device; in brackets what sets it.",
            "times as long: others": "each peer's time over this project's.",
        },
    )
