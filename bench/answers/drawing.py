"""How fast drawing is: against the port, the machine's limit and every peer."""

from __future__ import annotations

import re
from typing import Any

from echogen.bench.answers.part import Part, Result, measured, table

_PEERS = {
    "transformers": "the port with its dynamic cache",
    "transformers:static": "the port with its static cache",
    "transformers:compile": "the port with its static cache, compiled",
    "eager": "plain PyTorch",
    "echogen:copies": "this engine with a copy of its prompt in every row",
    "echogen:fp8": "this engine with weights in 8 bits",
    "echogen:fp8-cache": "this engine with keys and values in 8 bits",
}
_OLD_WORDS = re.compile(
    r"of peers the first (\d+ of \d+ codes) \(the rest is taken to go as fast\), without (\S+)"
)
_NEW_WORDS = r"peers draw only the first \1 (the rest is assumed to go as fast) and \2 is not timed"
"""How `echogen.bench.speed.drawing` reports a run that it shortens; older results use other words.
"""


def engine(results: list[Result]) -> Part | None:
    """One row per model: this engine and the port, per step."""
    if not results:
        return None
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
    return Part(
        "How fast is drawing, against the transformers port?",
        "The port draws with its own generate loop and must arrive at the same greedy codes. Each "
        "side runs at its best thread count. Figures are medians of alternating runs. "
        + measured("`echogen bench engine --peer transformers --model M`", results),
        table(("model", "batch, CFG", "this engine, a step", "port, a step", "ratio"), rows),
        {"ratio": "the port's time over this engine's."},
        (
            "This engine keeps the unconditional prompt's prefix and its packed weights between "
            "images; the port has neither.",
        ),
    )


def drawing(results: list[Result]) -> Part | None:
    """One row per batch: this engine, and how many times as long each of the others takes."""
    cells = dict[tuple[Any, ...], list[Result]]()
    for r in (row for result in results for row in result["results"]):
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
        return None
    headings = ("model", "batch, CFG", "images/s", "ms a step", "MB a step", "% of the limit",
                "peak MiB", "times as long: others")  # fmt: skip
    drawn = {row["provider"] for result in results for row in result["results"]}
    peers = "".join(f"; `{peer}` is {what}" for peer, what in _PEERS.items() if peer in drawn)
    calls = f"Of a step, calls without arithmetic take {', '.join(overheads)}."
    return Part(
        "How near is drawing to the machine's limit, and how do its peers compare?",
        "One picture, and groups of eight drawn at temperature 1 with log-probabilities kept. "
        "Figures are medians of alternating runs. "
        + measured("`echogen bench engine --mode latency` and `--mode rollout`", results),
        table(headings, rows),
        {
            "MB a step": "the least that a step must move: the weights once, the keys and values "
            "of every different prompt once, and each row's own.",
            "% of the limit": "the share of a step that this traffic, or the step's arithmetic, "
            "would take at rates measured in the same run; in brackets the slower of the two. The "
            "rate of memory is that of a copy, or of reading where that is quicker; the rate of "
            "arithmetic is that of a matrix product.",
            "peak MiB": "held beyond the weights.",
            "times as long: others": f"each peer's time over this engine's{peers}.",
        },
        (calls,) if overheads else (),
        _left_out(results),
    )


def _left_out(results: list[Result]) -> list[str]:
    """Return what was not drawn, except for batches that another run did draw."""
    there = tuple(
        f"{r['model']}, batch {r['batch']}, cfg {r['cfg']:g}:"
        for result in results
        for r in result["results"]
    )
    lines = (_OLD_WORDS.sub(_NEW_WORDS, line) for result in results for line in result["left_out"])
    return [line.rstrip(".") + "." for line in dict.fromkeys(lines) if not line.startswith(there)]


def _as_long(other: Result, ours: Result) -> float:
    """Return how many times as long another provider takes. Older results do not record this: in
    their runs, all providers drew in turn."""
    recorded: float | None = other.get("times_as_long")
    return other["ms_per_step"] / ours["ms_per_step"] if recorded is None else recorded
