"""The page's figures are those of the committed results, and say where they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from echogen.bench import report
from echogen.cli import main

PAGE = Path(__file__).parents[2] / "bench" / "README.md"


def test_the_page_says_what_the_results_say():
    text = PAGE.read_text()
    assert text == report.placed(text, report.section()), (
        "bench/README.md differs from bench/results: run `echogen bench report --write`"
    )


def test_every_part_names_machine_and_commit(tmp_path):
    engine = {
        "model": "tiny", "parameters": 3_200_000, "dtype": "float32", "batch": 1, "cfg": 5.0,
        "device": "cpu", "cpu": "Some CPU", "cpus": 2, "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef", "dirty": False, "ratio": 3.125,
        "results": [{"provider": "echogen", "tokens_per_s": 2000.0, "ms_per_step": 0.5},
                    {"provider": "transformers", "tokens_per_s": 640.0, "ms_per_step": 1.5625}],
    }  # fmt: skip
    (tmp_path / "engine-tiny.json").write_text(json.dumps(engine))
    text = report.section(tmp_path)
    assert "2 cores of Some CPU" in text
    assert "PyTorch 2.13.0; commit 012345678)." in text
    assert (
        "| tiny, 3.2 M, float32 | 1, 5 | 2000 tokens/s, 0.50 ms | 640 tokens/s, 1.56 ms | 3.12 |"
        in text
    )
    assert report.NO_GPU.about in text


def test_every_question_is_in_the_index_and_has_one_part():
    index, *parts = re.split(r"^### ", report.section(), flags=re.M)
    links = re.findall(r"^- \[(.+)\]\(#.+\)$", index, re.M)
    assert links == [part.partition("\n")[0] for part in parts]
    assert len(set(links)) == len(links) > 1 and all(link.endswith("?") for link in links)


def test_latency_and_rollouts_stand_in_one_table(tmp_path):
    row = {"model": "tiny", "dtype": "float32", "batch": 1, "cfg": 5.0, "bytes_per_step": 13e6,
           "limit_share": 0.123, "bound": "memory", "peak_mib": 3.1}  # fmt: skip
    latency = {
        "device": "cpu", "cpu": "Some CPU", "cpus": 2, "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef", "dirty": False, "left_out": ["janus_pro_1b: needs a GPU"],
        "results": [
            row | {"provider": "echogen", "images_per_s": 30.0, "ms_per_step": 0.5,
                   "overhead_us_per_token": 112.4},
            row | {"provider": "transformers", "images_per_s": 8.0, "ms_per_step": 2.0},
            row | {"provider": "eager", "images_per_s": 15.0, "ms_per_step": 1.0},
        ],
    }  # fmt: skip
    (tmp_path / "latency-cpu.json").write_text(json.dumps(latency))
    alone = [r | {"batch": 8} for r in latency["results"][:1]]
    (tmp_path / "rollout-cpu.json").write_text(json.dumps(latency | {"results": alone}))
    text = report.section(tmp_path)
    assert (
        "| tiny, float32 | 1, 5 | 30.00 | 0.50 | 13 | 12 (memory) | 3 | "
        "transformers 4.00×, eager 2.00× |" in text
    )
    assert "| tiny, float32 | 8, 5 | 30.00 | 0.50 | 13 | 12 (memory) | 3 |  |" in text
    assert "calls without arithmetic take 112 µs of 500 (tiny)" in text
    assert text.count("- janus_pro_1b: needs a GPU.") == 1
    late = [f"tiny, batch {n}, cfg 5: would take 169 s on this CPU" for n in (8, 64)]
    (tmp_path / "rollout-more-cpu.json").write_text(
        json.dumps(latency | {"results": [], "left_out": late})
    )
    text = report.section(tmp_path)
    assert late[0] not in text and late[1] in text  # the first was taken by another run


def test_a_shortened_run_is_told_in_the_same_words_whenever_it_was_taken(tmp_path):
    result = {
        "device": "cpu", "cpu": "Some CPU", "cpus": 2, "versions": {"torch": "2.13.0"},
        "commit": None, "dirty": False,
        "left_out": ["tiny: 8 images, cfg 5, take 4.0 s on this CPU, so each batch is drawn 2 "
                     "times, of peers the first 17 of 64 codes (the rest is taken to go as fast), "
                     "without echogen:copies"],
        "results": [{"provider": "echogen", "model": "tiny", "dtype": "float32", "batch": 8,
                     "cfg": 5.0, "images_per_s": 30.0, "ms_per_step": 0.5, "bytes_per_step": 13e6,
                     "limit_share": None, "bound": None, "peak_mib": 3.1}],
    }  # fmt: skip
    (tmp_path / "rollout-cpu.json").write_text(json.dumps(result))
    assert (
        "Left out:\n\n- tiny: 8 images, cfg 5, take 4.0 s on this CPU, so each batch is drawn 2 "
        "times, peers draw only the first 17 of 64 codes (the rest is assumed to go as fast) and "
        "echogen:copies is not timed." in report.section(tmp_path)
    )


def test_a_projection_is_named_one(tmp_path):
    row = {"ms_per_step": 1.0, "projection": None}
    told = {"from": "tiny", "test": {"ms_per_image": 1440.0, "times_as_fast": 4.0},
            "crowded": {"times_as_fast": 2.0}}  # fmt: skip
    result = {
        "model": "janus_pro_1b", "dtype": "bfloat16", "batch": 1, "cfg": 5.0, "threads": 2,
        "ms_sequential": 10.0, "device": "cpu", "cpu": "Some CPU", "cpus": 2, "commit": None,
        "versions": {"torch": "2.13.0"}, "dirty": False,
        "windows": [row | {"window": 1, "ratio": 1.01},
                    row | {"window": 16, "ratio": 2.0, "projection": told}],
    }  # fmt: skip
    (tmp_path / "window-janus.json").write_text(json.dumps(result))
    text = report.section(tmp_path)
    assert "| model | batch, CFG | threads | one code, ms | 1 | 16 | projected: an image |" in text
    assert (
        "| janus_pro_1b, bfloat16 | 1, 5 | 2 | 10.00 | 1.01 | 2.00 | 1.44 s, 4.00× (crowded "
        "2.00×), 16 a step, as tiny |" in text
    )
    assert "a projection and no measurement" in text


def test_training_says_what_a_stage_takes(tmp_path):
    row = {
        "stage": "pmtp", "recipe": "tiny", "dtype": "float32", "images": 32, "ms_per_step": 1400.4,
        "images_per_s": 22.86, "tokens_per_s": 5713.2, "padding": 0.0123, "utilisation": 0.434,
        "peak_mib": 1234.5, "threads": 1, "device": "cpu", "cpu": "Some CPU", "cpus": 2,
        "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "dirty": False,
        "shares": {"train/pmtp/backward": 0.61, "train/pass": 0.3, "train/pmtp/data": 0.004},
    }  # fmt: skip
    (tmp_path / "train-pmtp-tiny.json").write_text(json.dumps(row))
    later = row | {"stage": "cycle-rl", "shares": {}}
    (tmp_path / "train-cycle-rl-tiny.json").write_text(json.dumps(later))
    text = report.section(tmp_path)
    told = "float32 | 32 | 1400 | 22.9 | 5713 | 1.2 | 43 | 1234 |"
    assert f"| pmtp, tiny | {told} backward 61%, train/pass 30% |" in text
    assert text.index("| pmtp, tiny |") < text.index(f"| cycle-rl, tiny | {told}")
    assert "medians of steps (threads: 1)" in text
    assert "(2 cores of Some CPU; PyTorch 2.13.0; commit 012345678)" in text
    assert "a moment counts for the innermost range. A GPU" in text
    newer = later | {"phases": {"rollout": 0.31, "grounding": 0.252, "update": 0.4, "reward": 0.01}}
    (tmp_path / "train-cycle-rl-tiny.json").write_text(json.dumps(newer))
    text = report.section(tmp_path)
    assert f"| pmtp, tiny | {told} backward 61%, train/pass 30% |" in text
    assert f"| cycle-rl, tiny | {told} rollout 31%, grounding 25%, update 40% |" in text
    assert "phase of the step that it lies in (in older results for the innermost range)" in text


def test_a_gpu_changes_what_is_said(tmp_path):
    (tmp_path / "gpu").mkdir()
    row = {"operator": "swiglu", "shape": "rows=16", "dtype": "bfloat16", "mode": "forward",
           "error": None, "bound": "memory"}  # fmt: skip
    kernels = {
        "device": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "commit": None, "dirty": True,
        "kernels": [row | {"provider": "echogen", "ms": 0.1, "percent_of_floor": 92.4},
                    row | {"provider": "eager", "ms": 0.25, "percent_of_floor": 37.0}],
    }  # fmt: skip
    (tmp_path / "gpu" / "kernels.json").write_text(json.dumps(kernels))
    text = report.section(tmp_path)
    assert report.NO_GPU.question not in text
    assert "### On a GPU: how fast are the operators?" in text
    assert "(NVIDIA H200; PyTorch 2.11.0; commit no commit+)" in text
    assert "| `swiglu` | rows=16 | bfloat16 | forward | 0.100 | 92 (memory) | eager 2.50× |" in text
    ours, eager = kernels["kernels"]
    # Another run, of a slower moment: ratios are of one run, and an operator has one row.
    again = [ours | {"ms": 0.2}, row | {"provider": "compile", "ms": 0.3, "percent_of_floor": 30}]
    path = tmp_path / "gpu" / "kernels-compile.json"
    path.write_text(json.dumps(kernels | {"kernels": again}))
    text = report.section(tmp_path)
    assert text.count("| `swiglu` |") == 1 and "eager 2.50×, compile 1.50× |" in text
    path.unlink()
    graphed = [ours | {"graph": True}, eager | {"graph": False}]
    (tmp_path / "gpu" / "kernels.json").write_text(json.dumps(kernels | {"kernels": graphed}))
    assert "| 92 (memory) | eager 2.50× (no graph) |" in report.section(tmp_path)
    ours = {"provider": "echogen", "model": "janus_pro_1b", "dtype": "bfloat16", "batch": 1,
            "cfg": 5.0, "images_per_s": 2.5, "ms_per_step": 0.7, "bytes_per_step": 2.6e9,
            "limit_share": 0.81, "bound": "memory", "peak_mib": 300.0}  # fmt: skip
    drawn = kernels | {"results": [ours], "left_out": []}
    (tmp_path / "gpu" / "latency-janus.json").write_text(json.dumps(drawn))
    text = report.section(tmp_path)
    assert "| janus_pro_1b, bfloat16 | 1, 5 | 2.50 | 0.70 | 2600 | 81 (memory) | 300 |  |" in text


def test_each_machine_has_tables_of_its_own(tmp_path):
    (tmp_path / "xeon").mkdir()
    record = json.loads((report.RESULTS / "engine-tiny-cpu.json").read_text())
    (tmp_path / "engine-tiny-cpu.json").write_text(json.dumps(record | {"ratio": 9.0}))
    slower = record | {"ratio": 4.0, "cpu": "Xeon"}
    (tmp_path / "xeon" / "engine-tiny-cpu.json").write_text(json.dumps(slower))
    text = report.section(tmp_path)
    _, first, second = re.split("### (?:On an Intel Xeon: h|H)ow fast is drawing", text)
    assert "[On an Intel Xeon: how fast is drawing" in text
    assert "| 9.00 |" in first and "cores of Xeon" not in first
    assert "| 4.00 |" in second and "cores of Xeon" in second


def test_what_cannot_be_placed_or_read_is_refused(tmp_path):
    with pytest.raises(report.ReportError, match="lacks the marks"):
        report.placed("no marks here", "text")
    (tmp_path / "engine-x.json").write_text("{")
    with pytest.raises(report.ReportError, match=r"engine-x\.json: not valid JSON"):
        report.section(tmp_path)


def test_an_installed_package_has_no_results_to_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert main(["bench", "report"]) == 2
    assert capsys.readouterr().err.endswith(f"no {tmp_path / 'results'}; run it in a checkout\n")
