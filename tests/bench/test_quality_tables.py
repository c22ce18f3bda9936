"""What the tables of the quality experiments make of finished cells."""

from __future__ import annotations

import pytest

from echogen.bench.quality import report
from echogen.bench.quality.records import write_record

from .hand_made import hand_made

TWO, THREE = "ablation-stage2-seed0", "ablation-stage3-seed0"


def test_means_errors_and_differences_are_the_known_ones(tmp_path):
    for stem, values in {
        "ablation-stage1": (0.30, 0.40, 0.50),
        "ablation-stage2": (0.42, 0.50, 0.61),
        "ablation-samples": (0.25,),
        "synergy-l2i": (0.5, 0.7),
    }.items():
        for seed, value in enumerate(values):
            task = "l2i" if stem == "synergy-l2i" else "both"
            write_record(tmp_path, hand_made(f"{stem}-seed{seed}", value, task), None)
    tables = report.make(tmp_path, range(3))
    rows = {row["stem"]: row for row in tables["ablation"]["rows"]}
    ap = rows["ablation-stage1"]["measures"]["plain"]["AP"]
    assert ap["mean"] == pytest.approx(0.4)
    assert ap["stderr"] == pytest.approx(0.1 / 3**0.5)  # deviation 0.1 with n − 1
    assert rows["ablation-stage1"]["measures"]["best"]["AP"]["mean"] == pytest.approx(0.5)
    assert rows["ablation-samples"]["measures"]["plain"]["AP"]["stderr"] is None
    gain, alone, *_ = tables["ablation"]["differences"]
    assert gain["what"] == "stage 2 − stage 1" and gain["seeds"] == [0, 1, 2]
    paired = gain["measures"]["plain"]["AP"]
    assert paired["values"] == pytest.approx([0.12, 0.10, 0.11])
    assert paired["stderr"] == pytest.approx(0.01 / 3**0.5)
    assert alone["seeds"] == [0]
    assert "ablation-stage3-seed0" in tables["ablation"]["missing"]
    assert len(tables["mask"]["missing"]) == 6
    text = report.markdown(tables)
    assert "| stage 1 | 0, 1, 2 | 0.400 ± 0.058 |" in text
    assert "| stage 1, samples of + stage 2 | 0 | 0.250 (n = 1) |" in text
    assert "stage 2 − stage 1 | 0, 1, 2 | +0.110 ± 0.006 |" in text
    assert "on the true pictures judge acc50 is 0.990 ± 0.000" in text
    assert "Drawings of each test layout: 1." in text
    assert "Missing: ablation-stage3-seed0" in text and "012345678+" in text
    assert "judge within groups was 0.250, 0.250, 0.250." in text
    assert "| 900 | 28800 | 0 | 1000 | 900 |" in text
    assert "share one model of stage 1" in text
    alone_row = next(r for r in tables["synergy"]["rows"] if r["stem"] == "synergy-l2i")
    assert alone_row["measures"]["plain"]["mAcc"]["mean"] is None
    assert alone_row["measures"]["plain"]["AP"]["mean"] == pytest.approx(0.6)


def test_no_number_is_no_value(tmp_path):
    made = hand_made(TWO, 0.5)
    made["evaluation"]["plain"]["l2i"]["fd_vq"] = float("nan")
    write_record(tmp_path, made, None)
    row = report.make(tmp_path, [0])["ablation"]["rows"][1]
    assert row["measures"]["plain"]["fd_vq"]["mean"] is None
    assert row["measures"]["plain"]["AP"]["mean"] == 0.5


def test_cells_that_do_not_belong_together_are_named(tmp_path):
    write_record(tmp_path, hand_made(TWO, 0.5), None)
    other = hand_made(THREE, 0.6, start="another")
    write_record(tmp_path, other | {"scale": 0.1}, None)
    notes = report.make(tmp_path, [0])["ablation"]["notes"]
    assert any("several scales: 0.1, 1.0" in note for note in notes)
    assert any("scaled down" in note for note in notes)
    assert f"{THREE} began with another model than {TWO} is now" in notes


def test_a_cell_that_was_forced_to_begin_is_named(tmp_path):
    for seed, found in enumerate((0.235, 0.303)):
        made = hand_made(f"ablation-stage3-seed{seed}", 0.5)
        made["settings"]["config"] = {"loop": {"bf16": False}, "gate_bound": 0.3}
        made["before"] = {"rank_correlation": found, "rank_correlation_stderr": 0.051}
        write_record(tmp_path, made, None)
    tables = report.make(tmp_path, (0, 1))
    for name in ("ablation", "rl-data"):
        (note,) = (x for x in tables[name]["notes"] if "--force" in x)
        assert note.startswith(f"{THREE} was run") and "0.235 ± 0.051, below the 0.3 " in note
