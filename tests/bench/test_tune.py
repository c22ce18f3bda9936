"""Tuning: what candidates compile to, which of them may be timed, and which is best."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from echogen.bench.registry import cases
from echogen.bench.speed import kernels, tables, tune
from echogen.cli import main
from echogen.kernels import dispatch
from echogen.kernels.aot import Compiled
from echogen.kernels.constants import chosen
from echogen.kernels.cuda.loader import GPUS, H200
from echogen.kernels.logprob import FORWARD, ForwardTile, Tile

NAME = "linear_logprob:cross entropy"


@pytest.fixture(autouse=True)
def compiled_not_interpreted():
    if dispatch.INTERPRETED:
        pytest.skip("an interpreted kernel cannot be compiled")


@pytest.fixture
def few(monkeypatch):
    """One other candidate a choice, and one that launches the same."""
    monkeypatch.setattr(Tile, "candidates", lambda now: [type(now)(512, 4), now])


def test_without_a_gpu_candidates_are_compiled(few):
    seen: list[tuple[int, int]] = []
    result = tune.run([NAME], processes=1, progress=lambda *done: seen.append(done))
    assert json.loads(json.dumps(result)) == result
    assert (result["arch"], result["timed"], result["ended"]) == ("sm_90", False, "")
    assert seen[-1] == (4, 4)
    rows = result["tuned"]
    assert [(r["mode"], r["choice"], r["now"]) for r in rows] == [
        ("forward", "ForwardTile", True), ("forward", "ForwardTile", False),
        ("backward", "BackwardTile", True), ("backward", "BackwardTile", False),
    ]  # fmt: skip
    for r in rows:
        (kernel,) = r["kernels"]
        assert kernel["name"] == f"logprob_{r['mode']}"
        assert kernel["registers"] > 8 and kernel["instructions"] > 50 and kernel["warps"] >= 4
        assert r["error"] is None and r["ms"] is None and not r["best"]
    assert rows[1]["constants"] == {"columns": 512, "warps": 4}
    assert rows[1]["kernels"][0]["instructions"] < rows[0]["kernels"][0]["instructions"]


def test_splits_change_grids_and_no_code():
    """Of the same code each is a candidate nevertheless; kernels that are left as they are are
    not shown."""
    case = cases()["decode_attention:window"]
    splits, tiles = sorted(
        tune._choices(case, "decoding", torch.bfloat16, H200), key=lambda c: type(c.now).__name__
    )
    found = tune._of_choice(splits, H200)
    assert len(found) > 2 and len({launch.grid for one in found for launch in one.launches}) > 2
    assert {k.kernel.__name__ for one in found for k in one.launches} == {"_decode_shared_kernel"}
    assert tiles.mode == "forward" and len(tune._of_choice(tiles, H200)) > 9


def test_every_operator_with_choices_is_found():
    found = {
        case.operator
        for case, size in kernels.choose((), None, "cuda")
        for dtype in case.types("cuda")
        if tune._choices(case, size, dtype, H200)
    }
    assert found >= {"decode_attention", "wide_linear", "cfg_sample", "gumbel_st_embed",
                     "head_gumbel_st_embed", "linear_logprob"}  # fmt: skip


def test_what_has_no_candidates_is_said():
    notes: list[str] = []
    assert tune.run(["group_advantage"], note=notes.append)["tuned"] == []
    cases = ("group_advantage", "group_advantage:rank")
    assert notes == [f"{case}: no launch constants have candidates" for case in cases]


def test_what_an_architecture_has_no_types_for_is_left_out(monkeypatch):
    """It is no fault of the constants of now."""
    monkeypatch.setattr(tune.aot, "compile_all", lambda each, *_: [
        Compiled(source.kernel, arch, 40, 0, 0) for source, arch in each])  # fmt: skip
    for arch, has in (("sm_80", False), ("sm_90", True)):
        notes: list[str] = []
        rows = tune.run(["wide_linear"], arch=arch, note=notes.append)["tuned"]
        assert {r["operator"] for r in rows} >= {"wide_linear"}
        assert any("fp8" in r["operator"] for r in rows) == has
        assert all("fp8" in n and "sm_80 has no float8_e4m3fn" in n for n in notes)
        assert bool(notes) != has


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "wanted"),
    [
        (32, 0, 4, 64),
        (80, 16, 4, 24),  # 16,384 of a quarter's registers hold 6 warps of 2,560
        (255, 0, 4, 8),
        (64, 100 << 10, 4, 8),  # two blocks of 101 KiB
        (32, 0, 1, 32),  # as many blocks
        (128, 0, 32, 0),  # may not be launched
        (None, 0, 4, None),
    ],
)
def test_warps_of_a_multiprocessor(registers, shared, warps, wanted):
    made = Compiled("some", "sm_90", registers=registers, shared_bytes=shared)
    assert tune.resident_warps(made, warps, GPUS["sm_90"]) == wanted
    assert tune.resident_warps(made, warps, None) is None


def timed(monkeypatch, wrong=(), error=None):
    """Rows of a forward choice, on a device that takes a millisecond for 1,024 columns."""
    case = dataclasses.replace(
        cases()[NAME],
        run=lambda i: (cases()[NAME].run(i)[0] * (2 if chosen(FORWARD).columns in wrong else 1),),
    )
    tried: list[int] = []

    def on_gpu(case, size, mode, one, inputs):
        columns = chosen(FORWARD).columns
        tried.append(columns)
        if error is not None and len(tried) == 2:
            raise error
        ms = columns / 1024
        return {"median": ms, "q20": ms, "q80": ms}, 0, False

    monkeypatch.setattr(kernels, "on_gpu", on_gpu)
    choice = tune.Choice(case, "tiny", torch.float32, "forward", FORWARD)
    each = [FORWARD, ForwardTile(512), ForwardTile(256), ForwardTile(4096)]
    found = [tune.Candidate(choice, constants, ()) for constants in each]
    rows = [tune._row(one, {}, H200) for one in found]
    rows[2]["error"] = "logprob_forward: 8 bytes of registers spilled"
    notes: list[str] = []
    ended = tune._time(found, rows, torch.device("cpu"), notes.append, lambda done: None)
    return rows, tried, notes, ended


def test_the_best_is_timed_and_right(monkeypatch):
    rows, tried, notes, ended = timed(monkeypatch)
    assert tried == [2048, 512, 4096] and not notes and not ended
    assert [r["times_as_fast"] for r in rows] == [1.0, 4.0, None, 0.5]
    assert [r["best"] for r in rows] == [False, True, False, False]
    result = {"arch": "sm_90", "timed": True, "device": "NVIDIA H200", "tuned": rows}
    Console(quiet=True).print(tables.tuned(result))


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    rows, tried, notes, _ = timed(monkeypatch, wrong=(512,))
    assert tried == [2048, 4096] and rows[0]["best"]
    assert notes == [rows[1]["error"]] and "ForwardTile(columns=512, warps=4) is off by" in notes[0]


@pytest.mark.parametrize(
    ("error", "ended"),
    [(KeyboardInterrupt(), "interrupted"), (RuntimeError("illegal"), "RuntimeError: illegal")],
)
def test_what_was_measured_is_kept(monkeypatch, error, ended):
    rows, *_, why = timed(monkeypatch, error=error)
    assert why == ended and [r["ms"] for r in rows] == [2.0, None, None, None]


def test_the_command(monkeypatch, capsys, few):
    assert main(["bench", "kernels", "--tune", "--provider", "eager"]) == 2
    assert "--provider: not used by --tune" in capsys.readouterr().err
    assert main(["bench", "kernels", "--arch", "sm_90"]) == 2
    assert "--arch sm_90: only --tune takes it" in capsys.readouterr().err
    asked = ["bench", "kernels", "--tune", "--device", "cpu", "--operator"]
    assert main([*asked, "softmax"]) == 2
    assert main([*asked, NAME, "--arch", "h100"]) == 2
    monkeypatch.setattr(tune.aot, "compile_all", lambda each, *_: [
        Compiled(source.kernel, arch, 40, 0, 8) for source, arch in each])  # fmt: skip
    assert main([*asked, NAME, "--json"]) == 1
    told = capsys.readouterr()
    assert "nothing was timed" in told.out and "8 bytes of registers spilled" in told.err
    assert len(json.loads(told.out.splitlines()[-1])["tuned"]) == 4
