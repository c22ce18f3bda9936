"""Two runs side by side: ratios to a peer, noise told from change, files that are no use."""

from __future__ import annotations

import json

import pytest

from echogen.bench import compare
from echogen.bench.compare import CompareError


def run(ours, peer=1.0, spread=0.02, **about):
    row = {"operator": "swiglu", "size": "tiny", "dtype": "float32", "mode": "forward"} | about
    return {
        "kernels": [
            row
            | {"provider": name, "ms": ms, "ms_q20": ms * (1 - spread), "ms_q80": ms * (1 + spread)}
            for name, ms in (("echogen", ours), ("eager", peer))
        ]
    }


def test_a_machine_twice_as_slow_changes_nothing():
    (change,) = compare.compare(run(2.0), run(4.0, peer=2.0), "eager")
    assert change.case == "swiglu tiny float32 forward"
    assert change.ratio == pytest.approx(1) and not change.slower(1.15)
    (absolute,) = compare.compare(run(2.0), run(4.0, peer=2.0), None)
    assert absolute.ratio == pytest.approx(2) and absolute.slower(1.15)


def test_a_change_counts_beyond_threshold_and_noise():
    (slower,) = compare.compare(run(2.0), run(3.0), "eager")
    assert slower.ratio == pytest.approx(1.5) and slower.certain and slower.slower(1.4)
    assert not slower.slower(1.6)
    (noisy,) = compare.compare(run(2.0, spread=0.3), run(3.0, spread=0.3), "eager")
    assert noisy.ratio == pytest.approx(1.5) and not noisy.slower(1.15)
    (quicker,) = compare.compare(run(3.0), run(2.0), "eager")
    assert quicker.certain and not quicker.slower(1.0)


def test_cases_of_one_run_alone_and_refused_rows_are_left_out():
    before, after = run(1.0), run(1.0)
    after["kernels"] += run(9.0, mode="backward")["kernels"]
    before["kernels"].append(before["kernels"][0] | {"mode": "both", "ms": None, "error": "wrong"})
    assert [c.case for c in compare.compare(before, after, "eager")] == [
        "swiglu tiny float32 forward"
    ]
    assert compare.missing(before, after, "eager") == []
    assert compare.missing(after, before, "eager") == ["swiglu tiny float32 backward"]
    with pytest.raises(CompareError, match="no case in common with echogen and liger"):
        compare.compare(before, after, "liger")


def test_engine_results_take_what_they_share_from_the_top():
    data = {
        "model": "tiny", "batch": 1, "cfg": 5.0,
        "results": [{"provider": "echogen", "ms_per_step": 0.5},
                    {"provider": "transformers", "ms_per_step": 1.5}],
    }  # fmt: skip
    assert compare.usual_peer(data) == "transformers"
    found = compare.measured(data, "transformers")
    assert found["tiny 1 5.0"].value == pytest.approx(1 / 3)


def test_files(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("a table\n" + json.dumps(run(1.0)) + "\n")
    pretty = tmp_path / "pretty.json"
    pretty.write_text(json.dumps(run(1.0), indent=2))
    assert compare.load(log) == compare.load(pretty) == run(1.0)
    for text in ("", "a table\n", '{"kernels": 3}', "[1, 2]"):
        log.write_text(text)
        with pytest.raises(CompareError, match=r"log\.txt: holds no results"):
            compare.load(log)
    with pytest.raises(CompareError, match=r"gone\.json: cannot be read"):
        compare.load(tmp_path / "gone.json")
