"""Ahead-of-time compilation: what it finds, says and refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import triton
import triton.language as tl
from rich.console import Console

from echogen.bench.registry import cases
from echogen.bench.speed import compile as ahead
from echogen.bench.speed import tables
from echogen.kernels import aot, dispatch
from echogen.kernels.cuda import nvcc
from echogen.kernels.cuda.loader import GPUS
from echogen.kernels.decode_attention import decode_attention

KEYS = {"name", "arch", "registers", "shared_bytes", "spill_bytes", "wide_access_share"}


@triton.jit
def _greedy_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Holds more of a row than there are registers."""
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    total = tl.zeros([SIZE], tl.float32)
    for k in range(8):
        total += tl.load(x_ptr + k * SIZE + i) * x
    tl.store(out_ptr + i, total + tl.flip(x, 0))


@pytest.fixture(autouse=True)
def compiled_not_interpreted():
    if dispatch.INTERPRETED:
        pytest.skip("an interpreted kernel cannot be compiled")


def test_an_operator_for_two_makers():
    seen, notes = [], []
    result = ahead.run(
        ["sm_90", "gfx942"], ["group_advantage"], 1, lambda *done: seen.append(done), notes.append
    )
    assert json.loads(json.dumps(result)) == result and not notes
    plain, ranks = result["kernels"][:2], result["kernels"][2:]
    assert [r["arch"] for r in ranks] == ["sm_90", "gfx942"] and not any(r["error"] for r in ranks)
    nvidia, amd = plain
    assert nvidia.keys() >= KEYS and seen[-1] == (4, 4)
    assert (nvidia["name"], nvidia["arch"], amd["arch"]) == ("group_advantage", "sm_90", "gfx942")
    assert nvidia["registers"] > 8 and nvidia["spill_bytes"] == 0 and nvidia["error"] is None
    assert 0 <= nvidia["wide_access_share"] <= 1
    assert amd["error"] is None and amd["registers"] is None
    assert ahead.failures(result["kernels"]) == []
    Console(quiet=True).print(tables.compiled(result["kernels"]))


def test_kernels_in_cuda_or_why_not(monkeypatch):
    notes: list[str] = []
    if shutil.which("nvcc"):
        rows = ahead.run(["sm_80", "gfx942"], ["parse_text_boxes"], 1, note=notes.append)["kernels"]
        assert {r["arch"] for r in rows} == {"sm_80"} and {r["operator"] for r in rows} == {
            "parse_boxes"
        }
        assert all(r.keys() >= KEYS and r["spill_bytes"] == 0 for r in rows) and not notes
    monkeypatch.setattr(nvcc, "find", lambda: None)
    assert ahead.run(["sm_80"], ["parse_text_boxes"], 1, note=notes.append)["kernels"] == []
    assert notes == [ahead.NO_NVCC]


@pytest.mark.parametrize("name", cases())
def test_every_case_launches_kernels_that_can_be_compiled(name):
    """Recorded at production shapes, without the memory they take."""
    case = cases()[name]
    cuda = dispatch.OPERATORS[case.operator].kind == "CUDA C++"
    for dtype in ahead.DTYPES if case.only is None else (case.only,):
        assert bool(ahead.sources(case, dtype)) != cuda


def test_numbers_that_a_kernel_is_not_compiled_anew_for_stay_arguments():
    """As Triton's own launcher has it, where they are 1 or divisible by 16 too."""
    query, keys = torch.empty(1, 1, 16), torch.empty(1, 1, 32, 16)
    found = aot.launches(lambda: decode_attention(query, keys, keys, torch.ones(1).long()))
    source = aot.Source.of(found[0])
    arguments = dict(zip(found[0].kernel.arg_names, found[0].arguments, strict=False))
    assert (arguments["apart"], arguments["parts"], arguments["capacity"]) == (0, 1, 32)
    places = {name: (i,) for i, name in enumerate(source.signature)}
    assert source.signature["apart"] == source.signature["parts"] == "i32"
    assert places["capacity"] in source.attributes
    assert not {places["apart"], places["parts"]} & (source.attributes | source.constants).keys()


def test_shared_memory_is_what_a_launch_asks_for():
    """Of Triton's kernels nearly all of it is dynamic, which the binary does not hold."""
    rows = ahead.run(["sm_90"], ["decode_attention:shared prefix"], 1)["kernels"]
    shared = {(r["name"], r["dtype"]): r["shared_bytes"] for r in rows}
    assert shared["decode_shared", "bfloat16"] > 48 << 10


def test_launches_are_those_of_the_architecture():
    """An A100 has fewer multiprocessors than an H200, and less shared memory in each."""
    case = cases()["wide_linear:residual"]
    found = {
        arch: [s.options["num_stages"] for s in ahead.sources(case, torch.bfloat16, on)]
        for arch, on in GPUS.items()
    }
    assert max(found["sm_80"]) < max(found["sm_90"])
    rows = ahead.run(["sm_80"], ["wide_linear:residual"], 1)["kernels"]
    assert rows and ahead.failures(rows) == []


def test_more_shared_memory_than_there_is_is_a_failure():
    row = {"name": "wide", "operator": "wide_linear", "error": None, "spill_bytes": 0}
    row |= {"arch": "sm_80", "shared_bytes": 180_224}
    assert ahead.failures([row]) == [
        "wide of wide_linear, sm_80: 180224 bytes of shared memory, a block may have 166912"
    ]
    assert ahead.failures([row | {"arch": "sm_90a"}, row | {"shared_bytes": 166_912}]) == []
    for arch in ("sm_86", "sm_89", "sm_120a"):
        (told,) = ahead.failures([row | {"arch": arch, "shared_bytes": 102_400}])
        assert told.endswith("102400 bytes of shared memory, a block may have 101376")


def test_a_spill_is_a_failure():
    with dispatch.recorded() as found:
        x = torch.zeros(1 << 15)
        dispatch.launch(_greedy_kernel, (1,), x, x, SIZE=1 << 12, num_warps=1)
    made = aot.Source.of(found[0]).compile("sm_90")
    row = made.to_dict() | {"operator": "greedy"}
    assert row["spill_bytes"] > 0
    assert "greedy of greedy, sm_90: " in ahead.failures([row])[0]
    # AMD's are reported, and held against nothing.
    assert ahead.failures([row | {"arch": "gfx942"}]) == []
    assert ahead.failures([row | {"spill_bytes": 0}]) == []
    assert "no such thing" in ahead.failures([row | {"error": "no such thing"}])[0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="arch = 'h100'"):
        ahead.run(["h100"], ["swiglu"])
    with pytest.raises(ValueError, match="operator softmax: unknown; choose gumbel_noise"):
        ahead.run(["sm_90"], ["softmax"])
