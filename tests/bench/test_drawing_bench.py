"""Modes latency and rollout: complete results, peers that fail are named, nothing wrong timed."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from rich.console import Console

from echogen.bench import harness, report
from echogen.bench.harness import WrongResult
from echogen.bench.peers.janus_port import JanusPort
from echogen.bench.roofline import Roofline
from echogen.bench.speed import cell, contestants, drawing, logits, stretches, tables
from echogen.bench.speed.contestants import (
    COMPILED,
    COPIES,
    EAGER,
    FP8,
    FP8_CACHE,
    PORT,
    STATIC,
    Contestants,
)
from echogen.bench.speed.held import held_mib
from echogen.bench.speed.models import RANDOM, hollow, load
from echogen.bench.speed.phases import Weights, step_floor
from echogen.cli import main
from echogen.engine.config import ModelConfig
from echogen.engine.decoding.decode import decode_image
from echogen.engine.gpu.device import DeviceTransformer

MICRO = "random:micro"


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Measuring the machine takes seconds, and says nothing about the code."""
    rates = Roofline(1e12, 1e14, 1e12, 1e12)
    monkeypatch.setattr(contestants, "measure", lambda *_: rates)


def plan(mode: drawing.Mode = "latency", **other) -> drawing.Plan:
    usual = drawing.Plan(mode, drawing.BATCHES[mode][:2], drawing.SCALES[mode], (PORT, EAGER), 1, 1)
    return dataclasses.replace(usual, **other)


def test_latency_reports_everybody():
    threads, seen = torch.get_num_threads(), []
    asked = plan(peers=(PORT, STATIC, EAGER))
    result = drawing.run(
        asked, [MICRO, "janus_pro_1b"], note=seen.append, progress=lambda *done: seen.append(done)
    )
    assert torch.get_num_threads() == threads
    assert seen == [(1, 2), "janus_pro_1b: needs a GPU"]
    assert result["left_out"] == ["janus_pro_1b: needs a GPU"]
    assert json.loads(json.dumps(result)) == result
    assert result["mode"] == "latency" and {"commit", "cpu", "versions"} <= result.keys()
    rows = result["results"]
    assert [r["provider"] for r in rows] == ["echogen", PORT, EAGER, STATIC]
    for r in rows:
        assert (r["mode"], r["model"], r["batch"], r["cfg"]) == ("latency", MICRO, 1, 5.0)
        assert r["tokens_per_s"] == pytest.approx(16 * r["images_per_s"])
        assert r["ms_per_step"] == pytest.approx(1e3 / r["tokens_per_s"])
        assert r["ms_per_step_q20"] <= r["ms_per_step"] <= r["ms_per_step_q80"]
        assert 0 < r["limit_share"] < 1 and r["bound"] == "memory" and r["peak_mib"] > 0
        assert r["same_images"] == 1 and r["threads"] == 1
        assert r["ratio"] == pytest.approx(rows[1]["times_as_long"] / r["times_as_long"])
        assert (r["times_as_long"] == 1) == (r is rows[0])
        assert ("overhead_us_per_token" in r) == (r is rows[0])
    assert rows[0]["overhead_us_per_token"] > 0
    Console(quiet=True).print(tables.drawing(result))


def test_rollouts_draw_groups_with_and_without_guidance():
    result = drawing.run(plan("rollout", peers=(PORT, EAGER, COPIES)), [MICRO])
    cells = [(r["batch"], r["cfg"], r["provider"], r["ratio"] is None) for r in result["results"]]
    unguided = [(b, 1.0, name, True) for b in (8, 16) for name in ("echogen", EAGER)]
    guided = [(b, 5.0, name, False) for b in (8, 16) for name in ("echogen", PORT, EAGER)]
    # Groups keep their prompts once, and copies are another way to draw.
    copies = [(b, cfg, COPIES, cfg == 1.0) for b in (8, 16) for cfg in (1.0, 5.0)]
    assert sorted(cells) == sorted(unguided + guided + copies)
    assert result["group"] == 8
    by = {(r["batch"], r["cfg"]): r for r in result["results"] if r["provider"] == "echogen"}
    assert by[8, 1.0]["bytes_per_step"] < by[8, 5.0]["bytes_per_step"]


def test_a_batch_that_would_take_too_long_is_named():
    result = drawing.run(plan("rollout", scales=(1.0,), peers=(), most=0.0), [MICRO])
    assert {r["batch"] for r in result["results"]} == {8}
    (line,) = result["left_out"]
    assert line.startswith("random:micro, batch 16, cfg 1: would take ")


def test_a_peer_that_does_not_run_is_named_and_left_out(monkeypatch):
    right = JanusPort.generate

    def without_compiler(self, prompts, cfg, cache, sample, compiled, *more):
        if compiled:
            raise RuntimeError("no compiler here\nand more")
        return right(self, prompts, cfg, cache, sample, False, *more)

    monkeypatch.setattr(JanusPort, "generate", without_compiler)
    result = drawing.run(plan("rollout", scales=(5.0,), peers=(PORT, COMPILED)), [MICRO])
    assert {r["provider"] for r in result["results"]} == {"echogen", PORT}
    wanted = f"{MICRO}: {COMPILED}: RuntimeError: no compiler here"
    assert result["left_out"] == [wanted]  # once, though two batches asked


def test_of_a_large_model_peers_draw_the_first_codes(monkeypatch):
    monkeypatch.setattr(stretches, "CODES", 5)
    asked = plan("rollout", batches=(8,), peers=(PORT, EAGER, COPIES), repeats=9, long=0.0)
    result = drawing.run(asked, [MICRO])
    (line,) = result["left_out"]
    assert line.startswith(f"{MICRO}: 8 images, cfg 1, take ")
    assert "drawn 2 times, peers draw only the first 5 of 16 codes" in line and COPIES in line
    rows = {(r["cfg"], r["provider"]): r for r in result["results"]}
    assert sorted(rows) == [(1.0, EAGER), (1.0, "echogen"), (5.0, EAGER), (5.0, "echogen"),
                            (5.0, PORT)]  # fmt: skip
    for (_, name), r in rows.items():
        assert r["repeats"] == 2 and r["same_images"] == 1
        assert r["codes_timed"] == (16 if name == "echogen" else 5)
        assert (r["peak_mib"] is None) == (name != "echogen")
        assert r["tokens_per_s"] == pytest.approx(16 * r["images_per_s"])
    assert rows[5.0, "echogen"]["ratio"] > 0
    Console(quiet=True).print(tables.drawing(result))


def test_the_first_codes_are_those_of_the_whole_image():
    subject = load(MICRO, 2, 0, with_port=True)
    made = Contestants(subject, (PORT, STATIC, EAGER), "", pytest.fail, pytest.fail)
    asked = contestants.Asked(subject.prompts, 5.0, False, 0)
    wanted = made.greedy("echogen", asked)()
    few = dataclasses.replace(asked, codes=3)
    for name in (PORT, STATIC, EAGER):
        seen = []
        assert torch.equal(made.timed(name, few, lambda: seen.append(1))(), wanted[:, :3])  # noqa: B023
        assert len(seen) == 3
        assert torch.equal(made.greedy(name, asked)(), wanted)  # nothing of it stays


def test_the_rest_of_an_image_goes_as_its_first_codes():
    assert stretches.whole(10.0, [12.0, 12.5, 13.0], 3) == 3.0
    assert stretches.whole(10.0, [12.0, 12.5, 13.0], 101) == 2.0 + 100 * 0.5
    with pytest.raises(ValueError, match="1 codes were drawn"):
        stretches.whole(0.0, [1.0], 16)


def test_another_picture_is_refused_before_timing(monkeypatch):
    monkeypatch.setattr(
        contestants, "decode_image", lambda *a, **k: (decode_image(*a, **k) + 1) % 64
    )
    right = cell.alternate
    monkeypatch.setattr(
        cell, "alternate",
        lambda draws, n: pytest.fail("timed a wrong result") if PORT in draws else right(draws, n),
    )  # fmt: skip
    result = drawing.run(plan(), [MICRO])
    # Of two that draw different codes either may be wrong, so this engine's time goes as well.
    assert result["results"] == [] and len(result["refused"]) == 1
    assert result["refused"][0].startswith(f"{MICRO}, batch 1, cfg 5: ")
    assert "drew 100% of 1 images otherwise" in result["refused"][0]
    assert result["refused"][0].endswith("no time is kept")


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), torch.OutOfMemoryError("no room"), RuntimeError("illegal\nor so")],
)
def test_what_was_measured_is_kept(monkeypatch, error):
    right, cells = cell.Cell._own, []

    def own(self):
        cells.append(1)
        if len(cells) == 2:
            raise error
        return right(self)

    monkeypatch.setattr(cell.Cell, "_own", own)
    interrupted = isinstance(error, KeyboardInterrupt)
    result = drawing.run(plan("rollout", batches=(8, 16, 24), scales=(1.0,), peers=()), [MICRO])
    assert [r["batch"] for r in result["results"]] == ([8] if interrupted else [8, 24])
    assert result["interrupted"] == interrupted
    said = result["left_out"] + result["failed"]
    why = {
        KeyboardInterrupt: [f"interrupted at {MICRO}, with 1 results"],
        torch.OutOfMemoryError: [f"{MICRO}, batch 16, cfg 1: needs more memory than there is"],
        RuntimeError: [f"{MICRO}, batch 16, cfg 1: RuntimeError: illegal"],
    }
    assert said == why[type(error)]
    assert bool(result["failed"]) == (type(error) is RuntimeError)


def in_timed_runs(monkeypatch, name, error):
    """The peer draws as it should to be compared, and not to be timed."""
    right = Contestants.timed

    def timed(self, who, asked, told=None):
        def raises():
            raise error

        return raises if who == name else right(self, who, asked, told)

    monkeypatch.setattr(Contestants, "timed", timed)


def test_an_interrupt_within_a_cell_keeps_the_rows_before_it(monkeypatch, capsys):
    in_timed_runs(monkeypatch, EAGER, KeyboardInterrupt())
    result = drawing.run(plan(peers=(PORT, EAGER, STATIC)), [MICRO])
    assert [r["provider"] for r in result["results"]] == ["echogen", PORT]
    assert result["results"][0]["ratio"] == result["results"][1]["times_as_long"]
    assert result["interrupted"]
    assert result["left_out"] == [f"interrupted at {MICRO}, with 2 results"]
    options = ["--mode", "latency", "--model", MICRO, "--repeats", "1", "--threads", "1", "--json"]
    assert main(["bench", "engine", *options]) == 130
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["interrupted"] and printed["results"][0]["provider"] == "echogen"


def test_a_peer_that_fails_when_it_is_timed_is_left_out(monkeypatch):
    in_timed_runs(monkeypatch, PORT, RuntimeError("launch failed\nand more"))
    result = drawing.run(plan(peers=(PORT, EAGER)), [MICRO])
    assert [r["provider"] for r in result["results"]] == ["echogen", EAGER]
    assert result["left_out"] == [f"{MICRO}: {PORT}: RuntimeError: launch failed"]
    assert [r["ratio"] for r in result["results"]] == [None, None]
    assert result["results"][1]["times_as_long"] > 0 and not result["failed"]


def test_a_fault_of_this_engine_otherwise_set_fails_the_command(monkeypatch):
    """As one of a peer would not."""
    in_timed_runs(monkeypatch, COPIES, RuntimeError("launch failed"))
    asked = plan("rollout", batches=(8,), scales=(5.0,), peers=(COPIES, PORT, EAGER))
    result = drawing.run(asked, [MICRO])
    assert [r["provider"] for r in result["results"]] == ["echogen", PORT, EAGER]
    assert result["failed"] == [f"{MICRO}: {COPIES}: RuntimeError: launch failed"]
    in_timed_runs(monkeypatch, COPIES, ValueError("8 bits need compute capability 8.9"))
    result = drawing.run(asked, [MICRO])
    assert not result["failed"] and "compute capability" in result["left_out"][0]


def test_rates_that_cannot_be_measured_leave_the_times(monkeypatch, tmp_path):
    def measure(*_):
        raise AttributeError("no attribute 'clock_rate'")

    monkeypatch.setattr(contestants, "measure", measure)
    result = drawing.run(plan(peers=(EAGER,)), [MICRO])
    ours, eager = result["results"]
    assert ours["ms_per_step"] > 0 and eager["times_as_long"] > 0
    assert ours["limit_share"] is ours["bound"] is eager["limit_share"] is None
    wanted = f"{MICRO}: rates of the machine: AttributeError: no attribute 'clock_rate'"
    assert result["left_out"] == [wanted]
    Console(quiet=True).print(tables.drawing(result))
    (tmp_path / "latency-x.json").write_text(json.dumps(result))
    assert f"| {MICRO}, float32 | 1, 5 |" in report.section(tmp_path)


def test_overhead_that_cannot_be_measured_leaves_the_times(monkeypatch):
    class CompilationError(Exception):
        """As Triton's: no RuntimeError."""

    def fails(subject):
        raise CompilationError("K must be at least 32")

    monkeypatch.setattr(drawing, "hollow", fails)
    result = drawing.run(plan(peers=()), [MICRO])
    assert [r["provider"] for r in result["results"]] == ["echogen"] and not result["failed"]
    wanted = f"{MICRO}: its step without arithmetic: CompilationError: K must be at least 32"
    assert result["left_out"] == [wanted]


def test_a_failed_cell_fails_the_command(monkeypatch, capsys):
    def own(self):
        raise RuntimeError("an illegal access")

    monkeypatch.setattr(cell.Cell, "_own", own)
    assert main(["bench", "engine", "--mode", "latency", "--model", MICRO, "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["results"] == []
    assert told.err.splitlines()[-1].endswith("cfg 5: RuntimeError: an illegal access")


def test_a_peer_without_room_is_tried_again_at_the_next_batch(monkeypatch):
    right, tried = Contestants._eager, []

    def eager(self, asked, *more):
        tried.append(len(asked.prompts))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no room")
        return right(self, asked, *more)

    monkeypatch.setattr(Contestants, "_eager", eager)
    result = drawing.run(plan("rollout", scales=(1.0,), peers=(EAGER,)), [MICRO])
    assert {(r["batch"], r["provider"]) for r in result["results"]} == {
        (8, "echogen"), (16, "echogen"), (16, EAGER),
    }  # fmt: skip
    assert result["left_out"] == [f"{MICRO}: {EAGER}: no room beside the others"]


class OnGpu:
    """Contestants whose drawings take so many seconds, by a clock of their own."""

    exact = False

    def __init__(self, monkeypatch, spent):
        self.spent, self.seen, self.now = spent, [], 0.0
        monkeypatch.setattr(cell, "seconds", self.seconds)
        monkeypatch.setattr(harness, "seconds", self.seconds)
        monkeypatch.setattr(cell, "held_mib", lambda draw, device: draw() or 1.0)

    def seconds(self, call):
        began = self.now
        call()
        return self.now - began

    def draw(self, kind, name, asked):
        self.seen.append((kind, name) if asked.codes is None else ("warm up", name))
        self.now += self.spent[name] if asked.codes is None else 0.0
        return torch.zeros(1, 16, dtype=torch.int64)

    def greedy(self, name, asked):
        return partial(self.draw, "greedy", name, asked)

    def timed(self, name, asked, told=None):
        return partial(self.draw, "timed", name, asked)

    def release(self):
        self.seen.append("release")

    def forget_steps(self):
        self.seen.append("forget")

    def names(self, asked):
        return list(self.spent)

    def attempt(self, name, call):
        return call()

    def check_logits(self, asked):
        return None

    def ceiling(self, threads):
        return None

    def floor(self, asked, name):
        return step_floor(load(MICRO, 1, 0, False).transformer.config, 2, 2, 60, 2)


@pytest.mark.parametrize("took", [1.0, 60.0])
@pytest.mark.parametrize("name", [FP8, PORT, COMPILED])
def test_on_a_gpu_this_engine_comes_first_and_then_in_turn(monkeypatch, name, took):
    made = OnGpu(monkeypatch, {"echogen": 0.5, name: took})
    prompts = torch.zeros(1, 60, dtype=torch.int64)
    one = cell.Cell(made, contestants.Asked(prompts, 5.0, False, 0), 2, None, {})
    one._on_gpu = True
    rows = one.rows((name,))
    own, ours, theirs = next(rows), ("timed", "echogen"), ("timed", name)
    assert own["ms_per_step"] == 500 / 16 and own["repeats"] == 2 and own["peak_mib"] == 1
    assert made.seen == ["release", ("greedy", "echogen"), ours, ours, ours]
    made.seen.clear()
    (row,) = rows
    assert row["times_as_long"] == took / 0.5
    warm = [] if name == FP8 else [("warm up", name)]
    assert made.seen[: 3 + len(warm)] == ["release", *warm, ("greedy", name), ours]
    found, slow = made.seen[3 + len(warm) :], took > cell.SLOW and name != FP8
    assert row["repeats"] == (1 if slow else 2)
    if slow:  # the drawing that was compared is the one timed
        assert found == [ours]
    elif name == COMPILED:  # whose graphs may have taken the memory of this engine's
        assert found == [theirs] + [theirs, "forget", ours, ours] * 2
    else:
        assert found == [theirs] + [ours, theirs] * 2


def test_copies_of_prompts_are_offered_on_a_gpu_too():
    subject = load(MICRO, 2, 0, with_port=False).to("cpu", torch.bfloat16)
    made = Contestants(subject, contestants.PEERS, "", pytest.fail, pytest.fail)
    with torch.inference_mode():
        made._models[False, False] = DeviceTransformer(subject.transformer, subject.code_table)
    groups = contestants.Asked(subject.prompts.repeat_interleave(8, 0), 1.0, True, 0)
    assert made.names(groups) == ["echogen", COPIES, FP8, FP8_CACHE, EAGER]
    assert COPIES not in made.names(contestants.Asked(subject.prompts, 1.0, True, 0))


def test_compiled_steps_draw_the_same_in_a_cache_that_stays(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, mode: compiled.append(mode) or f)
    subject = load(MICRO, 2, 0, with_port=True)
    made = Contestants(subject, (STATIC, COMPILED), "", pytest.fail, pytest.fail)
    asked = contestants.Asked(subject.prompts, 5.0, False, 0)
    wanted = made.greedy(STATIC, asked)()
    assert torch.equal(made.greedy(COMPILED, asked)(), wanted)
    kept = subject.port._kept
    made.greedy(COMPILED, dataclasses.replace(asked, codes=3))()  # leaves a part of it full
    assert torch.equal(made.greedy(COMPILED, asked)(), wanted)
    assert subject.port._kept is kept and compiled == ["reduce-overhead"]
    fewer = dataclasses.replace(asked, prompts=subject.prompts[:1])
    assert torch.equal(made.greedy(COMPILED, fewer)(), wanted[:1])
    subject.port.release()
    assert torch.equal(made.greedy(COMPILED, asked)(), wanted) and len(compiled) == 2


def test_logits_of_the_operators_are_held_against_float32(monkeypatch):
    subject = load(MICRO, 4, 0, with_port=False).to("cpu", torch.bfloat16)
    rows = subject.prompts.tolist()
    rows += [[subject.bos, *[subject.pad] * (len(rows[0]) - 2), subject.begin_image]] * len(rows)
    with torch.inference_mode():
        made = DeviceTransformer(subject.transformer, subject.code_table)
    own, plain = logits.errors(made, rows, True, subject.pad)
    assert 0 < own < 2 * plain < 0.1
    right = DeviceTransformer.logits
    monkeypatch.setattr(DeviceTransformer, "logits", lambda *a: right(*a) * 1.1)
    with pytest.raises(WrongResult, match=r"logits of the operators are .* nothing was timed"):
        logits.errors(made, rows, True, subject.pad)


@pytest.mark.parametrize(
    "wrong", [{"batches": (12,)}, {"batches": (0,)}, {"repeats": 0}, {"dtype": "int8"}]
)
def test_bad_plans_are_refused(wrong):
    dtype = wrong.pop("dtype", "float32")
    with pytest.raises(ValueError, match=r"batch = |repeats = |dtype = "):
        drawing.run(plan("rollout", **wrong), [MICRO], dtype=dtype)


def test_the_floor_counts_a_prompt_once_and_every_rows_codes():
    subject = load(MICRO, 2, 0, with_port=False)
    c = subject.transformer.config
    weights = Weights.of(c)
    floor = step_floor(c, rows=8, prompts=2, length=60, itemsize=2)
    held = 2 * 60 + sum(8 * codes for codes in range(c.image_tokens)) / c.image_tokens
    assert floor.bytes == 2 * (weights.body + weights.image_head + held * weights.cached)
    assert floor.flops > 2 * 8 * (weights.body + weights.image_head)
    rounded = step_floor(c, rows=8, prompts=2, length=60, itemsize=2, fp8=True)
    assert floor.bytes - rounded.bytes == weights.body + weights.image_head
    assert rounded.flops == floor.flops
    cached = step_floor(c, rows=8, prompts=2, length=60, itemsize=2, fp8_cache=True)
    saved = held * weights.cached * (1 - 4 / c.head_dim)  # a byte of two, less a scale a head
    assert floor.bytes - cached.bytes == pytest.approx(saved, abs=1)
    made = Contestants(subject, (), "", pytest.fail, pytest.fail)
    four = contestants.Asked(subject.prompts.repeat_interleave(2, 0), 5.0, False, 0)
    # Two prompts, and one that is unconditional for all.
    assert made.floor(four) == step_floor(c, 8, 3, 60, 4)


def test_prompts_are_as_long_as_the_model_says():
    assert load(MICRO, 1, 0, with_port=False).prompts.shape == (1, 60)
    # What the limits of rollouts on a GPU are told for.
    assert RANDOM["janus_pro_1b"].prompt_tokens == 128


def test_prompts_of_the_bundled_model_differ_and_fit_together():
    prompts = load("tiny", 6, 0, with_port=False).prompts
    assert len(prompts.unique(dim=0)) == 6
    assert torch.equal(prompts[:1], load("tiny", 1, 0, with_port=False).prompts)


def test_a_hollow_model_has_the_layers_and_nothing_in_them():
    subject = load(MICRO, 1, 0, with_port=False)
    empty = hollow(subject)
    assert empty.transformer.config.layers == subject.transformer.config.layers
    assert isinstance(empty.transformer.config, ModelConfig)
    most = max(p.numel() for p in empty.transformer.blocks.parameters())
    assert most <= 3 * 16 * 16


def test_held_memory_is_what_was_there_at_once():
    kept = torch.zeros(1 << 18)

    def work() -> None:
        first = kept + 1  # 1 MiB
        second = first * 2
        del first
        third = second[: 1 << 10].clone()
        third.add_(1)
        torch.add(second, 1, out=kept)

    assert held_mib(work) == pytest.approx(2.0)


def test_from_the_command_line(capfd):
    options = ["bench", "engine", "--model", MICRO, "--repeats", "1", "--threads", "1"]
    assert main([*options, "--mode", "rollout", "--batch", "8", "--peer", "none", "--json"]) == 0
    data = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [r["cfg"] for r in data["results"]] == [1.0, 5.0]
    for wrong in (["--batch", "12", "--mode", "rollout"], ["--window", "4", "--mode", "latency"]):
        assert main([*options, *wrong]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1
