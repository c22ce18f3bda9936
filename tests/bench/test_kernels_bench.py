"""The operators' benchmark: complete rows, memory as promised, no time for a wrong result."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from rich.console import Console

from echogen.bench import registry
from echogen.bench.registry import Drawn, Floor, Peer, cases
from echogen.bench.roofline import Roofline
from echogen.bench.speed import clock, kernels, memory, tables
from echogen.cli import main
from echogen.engine.gpu.graphs import CaptureError
from echogen.kernels import dispatch


def test_rows_are_complete():
    notes: list[str] = []
    seen: list[tuple[int, int]] = []
    result = kernels.run(
        ["grpo_loss", "swiglu"], repeats=2, note=notes.append, progress=lambda *d: seen.append(d)
    )
    assert json.loads(json.dumps(result)) == result
    assert "reference" in result["on"] or "interpreted" in result["on"]
    assert seen[-1] == (4, 4) and any("torch.compile is left out" in n for n in notes)
    rows = {(r["operator"], r["provider"], r["mode"]): r for r in result["kernels"]}
    for operator in ("grpo_loss", "grpo_loss:other sampler", "swiglu"):
        for provider in ("echogen", "eager"):
            for mode in ("forward", "backward", "both"):
                r = rows[operator, provider, mode]
                assert r["error"] is None and r["ms_q20"] <= r["ms"] <= r["ms_q80"]
                assert r["gb_per_s"] > 0 and r["mib"] > 0
    Console(quiet=True).print(tables.kernels(result))


def test_every_case_is_timed_and_counted():
    rows = kernels.run(repeats=1, device="cpu")["kernels"]
    assert {r["operator"] for r in rows} == cases().keys()
    assert [r["error"] for r in rows if r["error"]] == []
    uncounted = {r["operator"] for r in rows if r["mib"] is None and r["provider"] == "echogen"}
    assert not uncounted  # launchers know their sizes without the data


def test_a_wrong_result_is_not_timed(monkeypatch):
    case = cases()["swiglu"]
    wrong = dataclasses.replace(case, run=lambda i: (case.run(i)[0] * 1.001,))
    monkeypatch.setattr(registry, "cases", lambda: {"swiglu": wrong})
    notes: list[str] = []
    rows = kernels.run(["swiglu"], repeats=1, note=notes.append)["kernels"]
    ours = [r for r in rows if r["provider"] == "echogen"]
    assert len(ours) == 1 and ours[0]["ms"] is None
    assert "off by" in ours[0]["error"] and ours[0]["error"] in notes
    assert {r["mode"] for r in rows if r["provider"] == "eager"} == {"forward", "backward", "both"}


def test_csv_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = kernels.run(["group_advantage", "rms_norm"], repeats=1)["kernels"]
    tables.write_csv(rows, tmp_path / "kernels.csv")
    with (tmp_path / "kernels.csv").open() as file:
        assert [r["operator"] for r in csv.DictReader(file)] == [r["operator"] for r in rows]
    pictures = tables.plot(rows, tmp_path)
    names = {"rms-norm.png", "group-advantage.png", "group-advantage-rank.png"}
    assert {p.name for p in pictures} == names
    assert all(p.stat().st_size > 1000 for p in pictures)


def test_peak_memory_of_training_shapes():
    """What the fused operators are for: no more than the gradients and one chunk."""
    rows = {(r["operator"], r["shape"].split()[0], r["dtype"]): r for r in memory.run()["memory"]}
    for dtype in ("bfloat16", "float32"):
        given = rows["gumbel_st_embed", "rows=4608", dtype]
        assert given["ratio"] <= 1 / 4
        assert given["echogen_mib"] <= 1.01 * given["gradients_mib"]
    for name in ("head_gumbel_st_embed", "linear_logprob", "linear_logprob:guided",
                 "grpo_loss:with its head"):  # fmt: skip
        assert rows[name, "images=64", "bfloat16"]["ratio"] <= 1 / 10
        assert rows[name, "images=8", "bfloat16"]["ratio"] <= 1 / 3
    Console(quiet=True).print(tables.memory(list(rows.values())))


def test_what_does_not_train_has_no_memory_row():
    with pytest.raises(ValueError, match="operator cfg_sample: has no gradient"):
        memory.run(["cfg_sample"])


def test_the_floor_is_set_by_the_slowest_part():
    rate = Roofline(bytes_per_s=10, flops_per_s=100, issues_per_s=50, specials_per_s=5)
    floor = Floor(bytes=20, flops=100, issues=50, specials=5)
    assert (rate.seconds(floor), rate.bound(floor)) == (2, "memory")
    assert rate.bound(floor + Floor(0, specials=10)) == "special"


@pytest.mark.parametrize("name", cases())
def test_floors_are_positive_and_grow_with_the_pass(name):
    case = cases()[name]
    for size, dims in case.sizes.items():
        forward = case.cost(dims, 2, "forward")
        assert forward.bytes > 0
        if "both" in case.modes(size):
            both = case.cost(dims, 2, "both")
            assert both.bytes > forward.bytes and both.flops >= forward.flops


@pytest.mark.parametrize("name", [name for name in cases() if "linear:fp8" in name])
def test_a_layer_of_fp8_is_held_against_the_one_that_people_have(name):
    """Which multiplies by the same numbers, and reads nothing of 8 bits."""
    case, contest = cases()[name], kernels.contest
    make = Drawn(torch.Generator().manual_seed(0))
    inputs = case.inputs(make, case.sizes["tiny"], torch.bfloat16)
    wanted = contest.results(case, case.eager, contest.raised(inputs), case.outputs)
    (peer,) = case.peers
    del inputs["weight"], inputs["scale"]
    found = contest.results(case, peer.load(), inputs, case.outputs)
    contest.check(case, case.bounds[torch.bfloat16], peer.name, found, wanted)


def test_bad_arguments():
    with pytest.raises(ValueError, match="operator softmax: unknown; choose gumbel_noise"):
        kernels.run(["softmax"])
    with pytest.raises(ValueError, match="size huge: unknown here; choose tiny"):
        kernels.run(["swiglu"], "huge")
    with pytest.raises(ValueError, match="provider vllm: unknown; choose echogen, eager"):
        kernels.run(["swiglu"], providers=["vllm"])


def test_only_cpu_here_is_said():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    result = kernels.run(["swiglu"], providers=["eager"], repeats=1)
    assert {r["provider"] for r in result["kernels"]} == {"echogen", "eager"}
    assert result["rates"] == {} and all(r["bound"] is None for r in result["kernels"])


class Device:
    """What timing asks of torch.cuda: a queue that runs behind the host, and its clock in ms."""

    def __init__(self, monkeypatch):
        self.now, self.slept, device = 0.0, 0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def elapsed_time(self, end):
                return end.at - self.at

        def sleep(cycles):
            device.slept += 1
            device.now += 1.0

        zeros = torch.zeros
        for name, stub in {"Event": Event, "_sleep": sleep, "synchronize": lambda *_: None,
                           "empty_cache": lambda: None}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(clock, "CLEARED_BYTES", 4)
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))

    def call(self, ms):
        """Something that takes the device so long."""

        def run():
            self.now += ms

        return run


def test_a_gpu_is_timed_behind_a_lead_of_the_host(monkeypatch):
    device = Device(monkeypatch)
    found = clock.times(device.call(0.25), repeats=7)
    assert found["median"] == found["q20"] == found["q80"] == pytest.approx(0.25)
    assert device.slept == 7 and found["host"] >= 0
    assert clock.shared({"median": 0.5, "host": 0.1}, 10) == {"median": 0.05, "host": 0.01}


@pytest.mark.parametrize("name, waits", [("echogen", False), ("torch", True), ("echogen", True)])
def test_calls_of_decoding_share_a_graph(monkeypatch, name, waits):
    """And are timed each by itself, and said to be, where one of a peer waits for the device; this
    project's are not to wait."""
    device, case, graphs = Device(monkeypatch), kernels.cases()["rms_norm"], []
    inputs = {"x": torch.zeros(2, 8)}
    one = kernels.Contestant(name, lambda i: device.call(0.004)(), ())
    case = dataclasses.replace(case, run=one.run) if name == "echogen" else case

    def captured(calls):
        if waits:
            raise CaptureError("it waits")
        graphs.append(len(calls))
        return lambda: [call() for call in calls]

    monkeypatch.setattr(clock, "captured", captured)
    monkeypatch.setattr(kernels.contest, "own", lambda case, inputs, forget: dict(inputs))
    if waits and name == "echogen":
        told = kernels.on_gpu(case, "decoding", "forward", one, inputs)
        assert told == "rms_norm: echogen failed (CaptureError: it waits); not timed"
        return
    ms, graph = kernels._cuda_times(case, "decoding", "forward", one, inputs)
    assert [ms["median"], ms["warm"]] == pytest.approx([0.004] * 2) and graph == (not waits)
    assert graphs == ([] if waits else [kernels.MOST_CALLS] * 2)


def test_what_was_measured_is_kept(monkeypatch, capsys):
    right, asked = kernels._on_cpu, []

    def on_cpu(case, *more):
        asked.append(case.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return right(case, *more)

    monkeypatch.setattr(kernels, "_on_cpu", on_cpu)
    command = ("bench", "kernels", "--operator", "swiglu", "--operator", "group_advantage")
    assert main([*command, "--repeats", "1", "--device", "cpu", "--json"]) == 130
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["interrupted"]
    assert result["ended"] == "interrupted" and {r["operator"] for r in result["kernels"]} == {
        asked[0]
    }


def test_peers_are_loaded_behind_this_operator_and_may_fail(monkeypatch):
    case, order = cases()["swiglu"], list[str]()

    def load():
        order.append("peer")
        raise RuntimeError("undefined symbol: cudaMalloc\nand a long trace")

    def ours(inputs):
        order.append("echogen")
        return case.run(inputs)

    peer = Peer("broken", "torch", load, on_cpu=True)
    monkeypatch.setattr(
        registry, "cases", lambda: {"swiglu": dataclasses.replace(case, run=ours, peers=(peer,))}
    )
    notes: list[str] = []
    rows = kernels.run(["swiglu"], repeats=1, note=notes.append)["kernels"]
    assert {r["provider"] for r in rows} == {"echogen", "eager"}
    assert order[0] == "echogen" and order.count("peer") == 1
    assert "swiglu: broken is left out (undefined symbol: cudaMalloc)" in notes
    kernels.run(["swiglu"], providers=["eager"], repeats=1)
    assert order.count("peer") == 1  # nobody asked for it


def test_on_a_gpu_no_reference_is_timed_in_an_operators_name(monkeypatch):
    case, cuda = cases()["skinny_linear"], torch.device("cuda")
    ours = kernels.Contestant("echogen", case.run, case.outputs)
    eager = kernels.Contestant("eager", case.eager, case.outputs)

    def runs(how):
        monkeypatch.setattr(dispatch, "implementation", lambda name, device: how)

    runs("reference: cupy is absent")
    told = "skinny_linear: echogen is its reference: cupy is absent; not timed"
    assert kernels.stand_in(case, ours, cuda) == told
    assert kernels.stand_in(case, eager, cuda) is None
    assert kernels.stand_in(case, ours, torch.device("cpu")) is None
    for how in ("CUDA C++, from its fatbin", "reference (forced)"):
        runs(how)
        assert kernels.stand_in(case, ours, cuda) is None


def test_an_error_of_the_device_keeps_the_rows_before_it(monkeypatch):
    """No call to the device answers from then on, not even what it is called."""
    broken = list[str]()

    def case(case, size, dtype, *more):
        if case.name == "add_rms_norm":
            broken.append(case.name)
            raise RuntimeError("an illegal memory access was encountered")
        yield {"operator": case.name, "size": size}

    def environment(device):
        assert not broken
        return {"device": "NVIDIA H200"}

    monkeypatch.setattr(kernels, "_case", case)
    monkeypatch.setattr(kernels, "environment", environment)
    notes: list[str] = []
    rates = dict.fromkeys((torch.bfloat16, torch.float32), Roofline(1, 1, 1, 1))
    names = ["rms_norm", "add_rms_norm", "swiglu"]
    result = kernels.run(names, "decoding", "cuda", note=notes.append, ceilings=rates)
    assert result["kernels"] == [{"operator": "rms_norm", "size": "decoding"}]
    assert result["device"] == "NVIDIA H200" and not result["interrupted"]
    assert result["ended"] == "RuntimeError: an illegal memory access was encountered"
    assert notes[-1] == f"{result['ended']}: 1 rows until then, at add_rms_norm"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_files_that_fail_keep_no_figures_back(monkeypatch, capsys, tmp_path, error):
    def fails(rows, path):
        raise error

    monkeypatch.setattr(tables, "write_csv", fails)
    monkeypatch.setattr(tables, "plot", lambda rows, folder: [])
    command = ["bench", "kernels", "--operator", "group_advantage", "--repeats", "1", "--json"]
    code = main([*command, "--device", "cpu", "--out", str(tmp_path)])
    out, told = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["kernels"]
    if isinstance(error, OSError):
        assert code == 0 and "kernels.csv: not written (No space left on device)" in told
    else:
        assert code == 130


def test_the_table_says_who_has_no_graph_and_what_the_host_takes(capsys):
    row = {"operator": "mask", "shape": "rows=2", "dtype": "float32", "mode": "forward",
           "error": None, "bound": "memory", "ms": 0.004, "ms_q20": 0.004, "ms_q80": 0.005,
           "gb_per_s": 5.0, "percent_of_floor": 9.0, "mib": 1.0}  # fmt: skip
    rows = [row | {"provider": "echogen", "graph": True, "host_ms": 0.002},
            row | {"provider": "eager", "graph": False, "host_ms": 0.731}]  # fmt: skip
    result = {"device": "NVIDIA H200", "on": "cuda", "kernels": rows}
    Console(width=tables.WIDE).print(tables.kernels(result))
    shown = capsys.readouterr().out
    assert "eager, no graph" in shown and "echogen, no graph" not in shown
    assert "host ms" in shown and "0.731" in shown
    training = [r | {"graph": False, "host_ms": None} for r in rows]
    Console(width=tables.WIDE).print(tables.kernels(result | {"kernels": training}))
    shown = capsys.readouterr().out
    assert "no graph" not in shown and "host ms" not in shown


@pytest.mark.parametrize("name, size, asked", [("cfg_sample", "decoding", {False}),
                                               ("swiglu", "training", {True})])  # fmt: skip
def test_what_is_checked_is_compiled_as_it_is_timed(monkeypatch, name, size, asked):
    """torch.compile compiles anew for calls with and without gradients."""
    Device(monkeypatch)
    case, modes = cases()[name], set[bool]()

    def run(inputs):
        modes.add(torch.is_grad_enabled())
        return case.run(inputs)

    def waits(calls):
        raise CaptureError("it waits")

    monkeypatch.setattr(clock, "captured", waits)
    monkeypatch.setattr(kernels, "MOST_CALLS", 2)
    monkeypatch.setattr(kernels, "FEWEST_CALLS", 2)
    one = kernels.Contestant("torch", run, case.outputs)
    inputs = case.inputs(Drawn(torch.Generator().manual_seed(0)), case.sizes["tiny"], torch.float32)
    wanted = kernels.contest.results(case, case.eager, inputs, case.outputs)
    assert kernels.refusal(case, size, one, torch.float32, inputs, wanted) is None
    kernels._cuda_times(case, size, "forward", one, inputs)
    assert modes == asked


@pytest.mark.parametrize("takes, lead", [(0.2, 1.0), (3.0, 6.0), (200.0, 50.0)])
def test_the_host_is_timed_apart_and_the_lead_fits_it(monkeypatch, takes, lead):
    """One that waits for the device does not wait for the lead while the host is timed."""
    device, host, leads = Device(monkeypatch), [0.0], list[float]()

    def sleep(cycles):
        leads.append(cycles / clock.LEAD_CYCLES)
        device.now = max(device.now, host[0]) + leads[-1]

    def waits():
        host[0] = max(host[0] + takes, device.now)

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: host[0] * 1e-3)
    assert clock.times(waits, repeats=4)["host"] == pytest.approx(takes)
    assert leads == pytest.approx([lead] * 4)
