"""Profiling: the trace opens and holds the ranges, time is given out once, Nsight is called."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from echogen.bench.profile import nsight, subjects, trace
from echogen.bench.profile.stopwatch import OUTSIDE, Stopwatch
from echogen.cli import main
from echogen.engine.ranges import listening, span


def test_each_moment_counts_in_the_innermost_range():
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    watch = Stopwatch(lambda: now[0])
    spend(5)  # before the start
    with listening(watch):
        watch.start()
        spend(1)
        for step in range(2):
            with span("a", step=step, batch=4):
                spend(2)
                with span("a/b"):
                    spend(3)
                spend(4)
        wall = watch.stop()
    seconds = {name: row.seconds for name, row in watch.rows.items()}
    assert seconds == {OUTSIDE: 1, "a": 12, "a/b": 6} and wall == 19
    assert watch.rows["a"].count == 2 and watch.rows["a"].payload == {"step": 1, "batch": 8}


def work():
    x = torch.rand(60, 60)
    with span("engine/decode", batch=1):
        for step in range(3):
            with span("engine/decode/step", step=step):
                x = x @ x
    return x


def test_trace_ranges_and_kernels(tmp_path):
    result = trace.run(work, tmp_path, "work")
    assert json.loads(json.dumps(result)) == result
    found = json.loads((tmp_path / "work.trace.json").read_text())
    names = [e.get("name") for e in found["traceEvents"]]
    assert names.count("echogen:engine/decode/step") == 3 and "echogen:engine/decode" in names
    rows = {r["category"]: r for r in result["ranges"]}
    assert rows["engine/decode/step"]["count"] == 3
    assert sum(r["share"] for r in result["ranges"]) == pytest.approx(1, abs=1e-6)
    assert sum(r["ms"] for r in result["ranges"]) == pytest.approx(result["wall_ms"], rel=1e-6)
    kernels = {k["name"]: k for k in result["kernels"]}
    assert kernels["aten::mm"]["count"] == 3
    assert not any(name.startswith("echogen:") for name in kernels)


def test_on_a_gpu_a_kernel_counts_once():
    """Not for the operator that launched it too, nor for an annotation around it."""
    kinds = torch.autograd.DeviceType

    def event(key, kind, us, annotation=False):
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=annotation, count=2,
            self_device_time_total=us, self_cpu_time_total=7.0,
        )  # fmt: skip

    events = [
        event("aten::mm", kinds.CPU, 3000.0),
        event("cudaGraphLaunch", kinds.CPU, 0.0),
        event("nvjet_tst", kinds.CUDA, 3000.0),
        event("_rope_kernel", kinds.CUDA, 1000.0),
        event("Optimizer.step#AdamW.step", kinds.CUDA, 9000.0, annotation=True),
    ]
    found = trace._kernels(SimpleNamespace(key_averages=lambda: events), "cuda")
    assert found == [
        {"name": "nvjet_tst", "count": 2, "ms": 3.0, "share": 0.75},
        {"name": "_rope_kernel", "count": 2, "ms": 1.0, "share": 0.25},
    ]


def test_command_lines():
    bare = ["python", "-m", "echogen", "profile", "cycle", "--tool", "none"]
    line = nsight.command("nsys", bare, Path("out/cycle"))
    assert line[:2] == ["nsys", "profile"] and line[-len(bare) :] == bare
    assert {"--capture-range=cudaProfilerApi", "--cuda-graph-trace=node"} <= set(line)
    line = nsight.command("ncu", bare, Path("out/cycle"), "step")
    assert line[line.index("--nvtx-include") + 1] == "echogen@step/"
    assert {"--clock-control=none", "--profile-from-start=off"} <= set(line)
    assert "--nvtx-include" not in nsight.command("ncu", bare, Path("out/cycle"))


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """``tool("ncu", script)``: a stand-in on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def make(name, script):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


def test_a_report_is_found(tool, tmp_path):
    out = tmp_path / "cycle"
    tool("nsys", f'[ "$ECHOGEN_NVTX" = 1 ] && touch {out}.nsys-rep')
    assert nsight.run("nsys", ["nsys"], out) == tmp_path / "cycle.nsys-rep"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo ==ERROR== ERR_NVGPUCTRPERM; exit 1", "may not read this GPU's counters"),
        ("echo Importer error; exit 3", "left no cycle.ncu-rep (exit code 3: Importer error)"),
        ("exit 0", "left no cycle.ncu-rep (exit code 0: it said nothing)"),
    ],
)
def test_what_to_do_where_it_fails(tool, tmp_path, script, words):
    tool("ncu", script)
    with pytest.raises(nsight.NsightError) as raised:
        nsight.run("ncu", ["ncu"], tmp_path / "cycle")
    assert words in str(raised.value) and "--tool torch" in str(raised.value)


@pytest.mark.skipif(shutil.which("nsys") is not None, reason="nsys is installed")
def test_a_missing_tool_is_named(tmp_path):
    with pytest.raises(nsight.NsightError, match="nsys is not on PATH: install Nsight Systems"):
        nsight.run("nsys", ["nsys"], tmp_path / "cycle")


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", ["cuda:1"])])
def test_a_gpu_is_made_the_current_one(monkeypatch, device, chosen):
    asked, placed = [], []

    def warmed(what, it):
        asked.append((what, it.device))
        return SimpleNamespace(work=lambda: None)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", _numbered(placed))
    monkeypatch.setattr(subjects, "warmed", warmed)
    monkeypatch.setattr(subjects, "between_marks", lambda work: work())
    assert main(["profile", "generate", "--tool", "none", "--device", device]) == 0
    assert asked == [("generate", device)] and placed == chosen


def _numbered(placed):
    """`torch.cuda.set_device`, which refuses "cuda"."""

    def place(device):
        assert torch.device(device).index is not None
        placed.append(device)

    return place
