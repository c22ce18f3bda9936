"""How fast the stages train."""

from __future__ import annotations

from echogen.bench.answers.part import Part, Result, measured, table

STAGES = ("pmtp", "djo", "cycle-rl")


def training(results: list[Result]) -> Part | None:
    """One row per stage and recipe, with the phases that take most of its step. Older results name
    no phases and show the innermost ranges."""
    if not results:
        return None
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
    older = ["phases" not in r for r in results]
    counted = "innermost range" if all(older) else "phase of the step that it lies in"
    if any(older) and not all(older):
        counted += " (in older results for the innermost range)"
    headings = ("stage, recipe", "type", "images a step", "ms a step", "images/s", "tokens/s",
                "padding, %", "utilisation, %", "peak MiB", "of the time")  # fmt: skip
    return Part(
        "How fast is training, and where does its time go?",
        f"Figures are medians of steps{f' (threads: {threads})' * bool(threads)}. "
        + measured("`echogen bench train --stage S`", results),
        table(headings, rows),
        {
            "tokens/s": "of the trainer's own passes, without padding.",
            "utilisation": "the arithmetic of the decoder's weights for these tokens, 6 operations "
            "a weight and token, over the rate of matrix products measured in the same run. Heads, "
            "attention and rollouts are not counted.",
            "peak MiB": "on a GPU of tensors, on a CPU of the process.",
            "of the time": f"a moment counts for the {counted}. A GPU is waited for at the ends of "
            "each to count it, so `data`, which is made beside backward, has a share here and "
            "takes no time of a step.",
        },
    )
