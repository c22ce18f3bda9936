"""Several codes per step: the steps they save, and what they cost."""

from __future__ import annotations

from echogen.bench.answers.part import Part, Result, measured, table


def jacobi(results: list[Result]) -> Part | None:
    """One row per setting: the steps that an image takes, and how much sooner it is finished."""
    if not results:
        return None
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
    headings = ("model", "T, CFG", "images at once", "layouts", "codes a step", "steps",
                "accepted: all, on objects", "times as fast",
                "crowded: steps, accepted, times as fast", "images that differ")  # fmt: skip
    return Part(
        "Is drawing several codes a step lossless, and is it faster?",
        "The noise is keyed, so a drawing is a function of its prompt, and Jacobi iteration over a "
        "window of codes ends in exactly what one code a step draws. Figures are medians of "
        f"drawings in turn, on {results[0]['threads']} thread. "
        + measured("`echogen bench engine --mode jacobi`", results),
        table(headings, rows),
        {
            "layouts": "of the test split, plus crowded ones: their boxes cover at least 60% of "
            "the canvas, and their figures are in a column of their own.",
            "steps": "of an image, beside those that one code a step takes.",
            "accepted": "share of codes taken over from a draft.",
            "times as fast": "the time of one code a step over that of several.",
            "images that differ": "from those that one code a step draws.",
        },
        (
            "With PyTorch's operations (here bfloat16) several codes a step are the default where "
            "they are faster; in C++ (float32) the default is one code a step.",
        ),
    )


def windows(results: list[Result]) -> Part | None:
    """One row per model: the cost of each window in one-code steps, and the projection."""
    if not results:
        return None
    widths = sorted({w["window"] for r in results for w in r["windows"]})
    rows = []
    for r in results:
        by = {w["window"]: w for w in r["windows"]}
        projected = [
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
                "; ".join(projected),
            )
        )
    headings = ("model", "batch, CFG", "threads", "one code, ms", *map(str, widths),
                "projected: an image")  # fmt: skip
    return Part(
        "What does a step of several codes cost?",
        "The cost depends on shapes alone, so weights may be random. Figures are medians of steps "
        "in turn at the middle of an image, sampling included. "
        + measured("`echogen bench engine --mode window`", results),
        table(headings, rows),
        {
            ", ".join(map(str, widths)): "a step of so many codes, in steps of one code.",
            "projected": "a projection and no measurement: what an image would take, and how many "
            "times as fast that is as code by code, if drafts were as good as those of the bundled "
            "model, measured at temperature 1 by `--mode jacobi`.",
        },
    )
