"""Launches that begin while the one before still runs: which take part, and what they do first.

No GPU has run them; what is checked is the code that one would be given."""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from triton.compiler import ASTSource

from echogen.kernels import aot, dispatch, overlap
from echogen.kernels.cuda import loader
from echogen.kernels.decode_attention import decode_attention
from echogen.kernels.decode_members import decode_members
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.rms_norm import rms_norm
from echogen.kernels.rope import rope_cache
from echogen.kernels.sampling import cfg_sample
from echogen.kernels.skinny_linear import skinny_linear
from echogen.kernels.swiglu import swiglu
from echogen.kernels.wide_linear import wide_linear


@pytest.fixture
def on(monkeypatch):
    """Overlap as on a GPU that has it."""
    monkeypatch.setattr(overlap, "available", lambda device: True)
    return torch.device("cpu")


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


ROWS = torch.zeros(3, dtype=torch.int64)
ORDER = decode_members(ROWS, zeros(3, 4, 64), zeros(2, 2, 64, 64))


def attend(prefixes):
    whole, before = zeros(3, 2, 70, 64), ()
    if prefixes:
        before = (zeros(2, 2, 64, 64), zeros(2, 2, 64, 64), None, ROWS, ORDER)
    return decode_attention(zeros(3, 4, 64), whole, whole, ROWS, None, *before)


def sample():
    count, one = torch.zeros(3, dtype=torch.int64), torch.ones(1)
    seed, table = torch.zeros(1, dtype=torch.int64), zeros(90, 64)
    return cfg_sample(zeros(6, 90), seed, count, count, one, one, 5, one, "blocked", table)


def rotate():
    x, table, cache = zeros(3, 1, 4, 64), zeros(1, 1, 64), zeros(3, 4, 70, 64)
    slots = torch.zeros(3, 1, dtype=torch.int64)
    return rope_cache(x, x, x, table, table, cache, cache.clone(), slots)


STEP = {
    "rms_norm": lambda: rms_norm(zeros(3, 64), zeros(64)),
    "swiglu": lambda: swiglu(zeros(3, 128)),
    "rope_cache": rotate,
    "decode_attention": lambda: attend(False),
    "decode_attention, shared": lambda: attend(True),
    "cfg_sample": sample,
    "wide_linear": lambda: wide_linear(zeros(30, 64), zeros(32, 64), gain=zeros(64)),
    "skinny_linear": lambda: skinny_linear(zeros(3, 64), zeros(32, 64)),
}
"""What a step of drawing launches."""


@pytest.mark.parametrize("name", STEP)
def test_every_launch_of_a_step_takes_part(name, on):
    with dispatch.recorded() as plain:
        STEP[name]()
    with dispatch.recorded() as found, overlap.overlapping(on):
        STEP[name]()
    assert found and len(found) == len(plain)
    assert all(one.constants["DEPENDENT"] and one.constants["launch_pdl"] for one in found)
    assert not any("DEPENDENT" in one.constants for one in plain)


def test_other_launches_do_not(on):
    count = torch.zeros(2, dtype=torch.int64)
    with dispatch.recorded() as found, overlap.overlapping(on):
        gumbel_noise(5, count, count, 8)
    assert found and not any("DEPENDENT" in one.constants for one in found)


def test_it_is_off_where_it_is_not_asked_for(monkeypatch):
    monkeypatch.delenv("ECHOGEN_PDL", raising=False)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert not overlap.available(cuda)
    monkeypatch.setenv("ECHOGEN_PDL", "1")
    assert not overlap.available(cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not overlap.available(cuda), "the hardware has it from 9.0 on"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(overlap, "find_spec", lambda name: None)
    monkeypatch.setattr(loader, "unloadable", lambda: None)
    with pytest.raises(RuntimeError, match="pip install cuda-bindings"):
        overlap.available(cuda)


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("name", [n for n in STEP if n != "skinny_linear"])
def test_nothing_is_read_or_written_before_the_wait(name, on):
    """But weights, which a step does not write: the gain of rms_norm."""
    with dispatch.recorded() as found, overlap.overlapping(on):
        STEP[name]()
    for launch in found:
        code = ptx(launch)
        assert code.count("griddepcontrol.wait") == 1
        before, _ = code.split("griddepcontrol.wait")
        reached = re.findall(r"\b(?:ld|st|cp\.async\S*|red|atom)\.(?:\w+\.)*global\S*", before)
        assert len(reached) <= (1 if name == "rms_norm" else 0), reached
        assert not re.search(r"\bret;|\bbra\b", before), "every block waits"


def ptx(launch) -> str:
    source = aot.Source.of(launch)
    kernel = getattr(importlib.import_module(source.module), source.kernel)
    asked = ASTSource(kernel, source.signature, source.constants, source.attributes)
    return triton.compile(asked, target=aot.target_of("sm_90"), options=source.options).asm["ptx"]


@pytest.mark.parametrize(("made_for", "early"), [(80, False), (90, True), (120, True)])
def test_code_that_does_not_wait_is_not_launched_early(made_for, early, monkeypatch):
    """That of sm_80 has no such instruction, and a newer GPU runs it where nothing else fits."""
    launched = []
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(Stream=SimpleNamespace(from_external=nullcontext))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(loader, "_launch_dependent", lambda *_: launched.append("early"))

    class Function:
        ptx_version = made_for

        def __call__(self, *_, **__):
            launched.append("in its turn")

    loaded = loader.Loaded({"skinny_linear_bf16_1": Function()})
    monkeypatch.setattr(loader, "_loaded", lambda *_: loaded)
    kernel = loader.CudaKernel("skinny_linear", "skinny_linear_bf16_1", overlaps=True)
    kernel[(1,)](torch.zeros(1), block=256, DEPENDENT=True, launch_pdl=True)
    assert launched == ["early" if early else "in its turn"]


def test_a_launch_in_cuda_cpp_says_that_it_may_begin_early(monkeypatch):
    launched = []
    names = ("CUlaunchAttribute", "CUlaunchAttributeValue", "CUlaunchConfig")
    attribute = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    result = SimpleNamespace(CUDA_SUCCESS=0)
    driver = SimpleNamespace(
        **dict.fromkeys(names, SimpleNamespace), CUlaunchAttributeID=attribute, CUresult=result,
        CUfunction=lambda pointer: pointer,
        cuLaunchKernelEx=lambda *told: launched.append(told) or (answer,),
    )  # fmt: skip
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    function = SimpleNamespace(kernel=SimpleNamespace(ptr=77))
    stream = SimpleNamespace(cuda_stream=99)
    values = (np.uint64(1 << 40), np.int64(-3), np.float32(0.5))
    answer = 0
    loader._launch_dependent(function, stream, (5,), 256, 1024, values)
    config, pointer, (passed, kinds), extra = launched[0]
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (5, 1, 1)
    assert (config.blockDimX, config.sharedMemBytes, config.hStream) == (256, 1024, 99)
    assert config.numAttrs == 1 and config.attrs[0].id == 6
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert (pointer, passed, extra) == (77, (1 << 40, -3, 0.5), 0)
    assert kinds == (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_float)
    answer = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        loader._launch_dependent(function, stream, (5,), 256, 1024, values)
