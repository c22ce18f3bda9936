"""The pages about quality say what the committed records and evaluations say."""

from __future__ import annotations

import json
from pathlib import Path

from echogen.bench.quality import fresh, report

ROOT = Path(__file__).parents[2]
RESULTS, SEEDS = ROOT / "bench" / "results" / "quality", range(3)

DRAWN = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "accuracy at IoU 0.5": "acc50",
    "accuracy at IoU 0.75": "acc75",
    "spatial": "spatial",
    "colour": "color",
    "texture": "texture",
    "shape": "shape",
}
FOUND = {"Acc0.5": "acc50", "Acc0.75": "acc75", "Acc0.9": "acc90", "mAcc": "macc"}
CYCLE = {
    "self-judged IoU": "self_iou",
    "IoU by the judge": "judge_iou",
    "gap, self − judge": "gap",
    "reward": "reward",
    "found by the model, of the objects that the judge misses": "missed_found",
}
ARMS = {
    "stage 2 − stage 1": "stage 2 − stage 1 at its plateau",
    "stage 2 − stage 1, continued for the same samples": "stage 2 − stage 1, samples of + stage 2",
    "stage 3 − stage 2": "stage 3, by ranks − stage 2",
    "stage 3 − stage 1": "stage 3, by ranks − stage 1 at its plateau",
    "stage 3 − stage 1, continued for the samples of stage 2": (
        "stage 3, by ranks − stage 1, samples of + stage 2"
    ),
    "stage 3 − stage 1, continued for the CPU seconds of stages 2 and 3": (
        "stage 3, by ranks − stage 1, seconds of + stages 2 and 3"
    ),
}


def rows(page: Path) -> dict[str, list[str]]:
    """The rows of a page's tables by their first cell."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def row(table: dict, name: str, ceiling: dict) -> list[str]:
    """Value, interval and ceiling as the pages write them."""
    low_high = table["interval95"].get(name)
    return [
        f"{table[name]:.3f}",
        " … ".join(f"{x:.3f}" for x in low_high) if low_high else "",
        f"{ceiling[name]:.3f}" if ceiling else "",
    ]


def bundled() -> dict[str, list[str]]:
    found = json.loads((ROOT / "engine/models/tiny/training/eval.json").read_text())
    ceiling = found["vq_ceiling"]
    return (
        {f"L2I {name}": row(found["l2i"], key, ceiling) for name, key in DRAWN.items()}
        | {f"I2L {name}": row(found["i2l"], key, {}) for name, key in FOUND.items()}
        | {f"cycle: {name}": row(found["cycle"], key, {}) for name, key in CYCLE.items()}
    )


def test_the_tables_of_the_results_are_those_of_the_records():
    page = report.markdown(report.make(RESULTS, SEEDS))
    page += f"\n{fresh.section(fresh.differences(RESULTS, SEEDS))}\n"
    assert page == (RESULTS / "README.md").read_text(), (
        "run `echogen bench quality --recipe tiny --seeds 3 --report`"
    )


def test_the_bundled_model_has_the_scores_of_its_evaluation():
    expected, shown = bundled(), rows(ROOT / "bench" / "QUALITY.md")
    assert {name: shown[name] for name in expected} == expected
    short = {
        "drawing: AP": "L2I AP",
        "drawing: AP50": "L2I AP50",
        "drawing: accuracy at IoU 0.5": "L2I accuracy at IoU 0.5",
        "finding, in true pictures: accuracy at IoU 0.5": "I2L Acc0.5",
        "cycle: IoU as the model finds its objects again": "cycle: self-judged IoU",
        "cycle: IoU as the judge finds them": "cycle: IoU by the judge",
    }
    first = rows(ROOT / "README.md")
    assert {name: first[name] for name in short} == {k: expected[v] for k, v in short.items()}


def test_what_each_stage_adds_is_what_the_records_say():
    def by_arms(differences):
        return {d["what"]: d["measures"] for d in differences}

    def written(measure):
        text = f"{measure['mean']:+.3f} ± {measure['stderr']:.3f}".replace("-", "−")
        return f"**{text}**" if measure["mean"] > 2 * measure["stderr"] else text

    first = by_arms(report.make(RESULTS, SEEDS)["plateau"]["differences"])
    further = by_arms(fresh.differences(RESULTS, SEEDS)["plateau"])
    shown = rows(ROOT / "bench" / "QUALITY.md")
    for name, arms in ARMS.items():
        plain, best = first[arms]["plain"], first[arms]["best"]
        values = [plain["AP"], further[arms]["AP"], plain["AP50"], best["AP"]]
        assert shown[name] == [written(value) for value in values], name


def test_what_lower_rates_add_is_what_the_records_say():
    """On the seeds that both arms have."""
    table = report.make(RESULTS, SEEDS)["plateau"]
    slow, usual = (
        next(d["measures"]["plain"]["AP"] for d in table["differences"] if d["what"] == what)
        for what in (
            "stage 3, a quarter of the rates, 500 steps − stage 2",
            "stage 3, by ranks − stage 2",
        )
    )
    both = usual["values"][: len(slow["values"])]
    fd_vq = next(
        row["measures"]["plain"]["fd_vq"] for row in table["rows"] if row["stem"] == "plateau-slow"
    )
    page = " ".join((ROOT / "bench" / "QUALITY.md").read_text().split())
    assert f"rises by {report.shown(slow)} over stage 2 (two seeds; on the same two by" in page
    assert f"by {sum(both) / len(both):.3f} at the recipe's rates" in page
    assert f"with fd_vq {report.shown(fd_vq)}." in page
