"""The kernels in CUDA C++ as they are built: no spills, the names that launchers ask for, one
source for nvcc and NVRTC, no stale fatbin. What they compute: test_parse_boxes and
test_skinny_linear."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from echogen.kernels import aot, parse_boxes, skinny_linear
from echogen.kernels.cuda import loader, nvcc

ROOT = Path(__file__).parents[2]
COMPILER = nvcc.find()
needs_nvcc = pytest.mark.skipif(COMPILER is None, reason="nvcc is not installed")


def asked_for() -> dict[str, set[str]]:
    """Kernels that launchers name, by source."""
    found: dict[str, set[str]] = {}
    for module in (parse_boxes, skinny_linear):
        values = list(vars(module).values())
        values += [v for value in values if isinstance(value, dict) for v in value.values()]
        for kernel in values:
            if isinstance(kernel, loader.CudaKernel):
                found.setdefault(kernel.source, set()).add(kernel.__name__)
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", nvcc.sources())
def test_no_kernel_spills_and_all_that_launchers_name_are_there(source, arch):
    rows = nvcc.compile_source(source, arch, COMPILER)
    assert [r.error for r in rows if r.error] == []
    assert {r.name for r in rows} == asked_for()[source]
    assert all(r.spill_bytes == 0 and 0 < r.registers <= 255 for r in rows)
    if source == "skinny_linear":  # the weight is what costs: most copies are of 16 bytes
        assert all(r.wide_access_share > 0.3 for r in rows)


def test_what_is_compiled_to_be_looked_at_is_what_is_built():
    assert f"-fatbin {' '.join(nvcc.OPTIONS)} " in (ROOT / "CMakeLists.txt").read_text()


@needs_nvcc
def test_what_does_not_compile_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "FOLDER", tmp_path)
    (tmp_path / "broken.cu").write_text("__global__ void f() { missing(); }\n")
    (row,) = nvcc.compile_source("broken", "sm_90", COMPILER)
    assert row.name == "broken" and "missing" in row.error and row.registers is None
    (tmp_path / "spills.cu").write_text(
        'extern "C" __global__ void f(float* x, int i) {\n'
        "  float a[64];\n"
        "  for (int k = 0; k < 64; ++k) a[(k * i) & 63] = x[k];\n"
        "  x[0] = a[i & 63];\n}\n"
    )
    (row,) = nvcc.compile_source("spills", "sm_90", COMPILER)
    assert row.error is None and row.spill_bytes >= 256


@needs_nvcc
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_a_fatbin_a_source(monkeypatch, tmp_path):
    out = tmp_path / "fatbins"
    out.mkdir()
    options = [f"-DECHOGEN_CUDA_OUTPUT={out}", "-DECHOGEN_CUDA_ARCHITECTURES=100;90a"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path / "build", *options], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    assert sorted(p.stem for p in out.glob("*.fatbin")) == nvcc.sources()
    magic = {p.read_bytes()[:4] for p in out.glob("*.fatbin")}
    assert magic == {b"\x50\xed\x55\xba"}
    for built in out.glob("*.fatbin"):  # one PTX, for all later GPUs
        assert re.findall(r"sm_\w+", aot._run("cuobjdump", "-lptx", built)) == ["sm_90"]
    for path in (*loader.FOLDER.glob("*.cu"), *loader.FOLDER.glob("*.cuh")):
        shutil.copyfile(path, out / path.name)
    monkeypatch.setattr(loader, "FOLDER", out)
    assert all(loader.fatbin(name) is not None for name in nvcc.sources())


def built_of(folder: Path, source: str) -> None:
    """Write the digests that CMake writes beside a fatbin."""
    files = [folder / f"{source}.cu", *folder.glob("*.cuh")]
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    (folder / f"{source}.fatbin.sources").write_text("".join(lines))


def test_a_fatbin_of_other_sources_is_not_loaded(monkeypatch, tmp_path):
    """Whatever the files' times are."""
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.setattr(loader, "unloadable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("k.cu", "shared.cuh", "k.fatbin"):
        (tmp_path / name).touch()
    assert loader.fatbin("k") is None and "of other sources" in loader.status("k")
    built_of(tmp_path, "k")
    os.utime(tmp_path / "k.fatbin", (10**9, 10**9))
    assert loader.fatbin("k") == tmp_path / "k.fatbin"
    assert loader.status("k") == "CUDA C++, from its fatbin"
    for name in ("k.cu", "shared.cuh", "new.cuh"):
        built_of(tmp_path, "k")
        (tmp_path / name).write_text(f"// {name}\n")
        assert loader.fatbin("k") is None
    (tmp_path / "k.fatbin").unlink()
    assert loader.status("k") == "CUDA C++, by NVRTC at first use: no fatbin (make cuda)"


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A CuPy on one GPU, whose modules fail as told: ``fatbin`` and ``source`` hold errors."""
    fails: dict[str, str] = {}

    class Module:
        def __init__(self, path="", code="", options=()):
            self.kind = "fatbin" if path else "source"

        def get_function(self, name):
            if self.kind in fails:
                raise RuntimeError(fails[self.kind])
            return SimpleNamespace(kind=self.kind, shared_size_bytes=1024)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=Module))
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.setattr(loader, "NAMED", {"k": {"first", "second"}})
    monkeypatch.setattr(loader, "unloadable", lambda: None)
    monkeypatch.setattr(loader, "_properties", lambda device: loader.H200)
    for name in ("_load", "_loaded"):
        monkeypatch.setattr(loader, name, cache(getattr(loader, name).__wrapped__))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("k.cu", "k.fatbin"):
        (tmp_path / name).touch()
    built_of(tmp_path, "k")
    return fails


def test_a_fatbin_that_the_driver_takes(driver):
    assert loader.status("k") == "CUDA C++, from its fatbin"
    functions = loader._loaded("k", torch.device("cuda", 0)).functions
    assert functions.keys() == {"first", "second"}
    for function in functions.values():
        assert function.kind == "fatbin"
        assert function.max_dynamic_shared_size_bytes == loader.H200.shared_bytes - 1024


def test_a_fatbin_that_the_driver_refuses_is_compiled_from_its_source(driver):
    driver["fatbin"] = "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image\nand more"
    assert loader.status("k") == (
        "CUDA C++, by NVRTC: the fatbin cannot be loaded "
        "(CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image; make cuda)"
    )
    functions = loader._loaded("k", torch.device("cuda", 0)).functions
    assert {function.kind for function in functions.values()} == {"source"}


def test_of_a_source_that_fails_as_well_both_reasons_are_said(driver):
    driver |= {"fatbin": "invalid image", "source": "no libnvrtc"}
    why = "k.cu cannot be loaded (no libnvrtc; of its fatbin: invalid image)"
    assert loader.status("k") == f"reference: {why}"


def test_for_lack_of_memory_a_fatbin_is_not_given_up(driver):
    driver["fatbin"] = "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    assert "OUT_OF_MEMORY" in loader.status("k")
    driver.clear()
    assert loader.status("k") == "CUDA C++, from its fatbin"


def test_a_cupy_that_lacks_what_it_needs_is_none(monkeypatch, tmp_path):
    """It is installed, but its import fails: the reference runs, and says why."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("import missing_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    found = loader.unloadable.__wrapped__()
    assert found == "cupy cannot be imported (No module named 'missing_part')"
    monkeypatch.setattr(loader, "unloadable", lambda: found)
    assert loader.status("k") == f"reference: {found}"


def _nvrtc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("nvrtc")
    beside = [] if COMPILER is None else sorted(COMPILER.resolve().parents[1].rglob("libnvrtc.so*"))
    for path in filter(None, (name, *map(str, beside))):
        return ctypes.CDLL(path)
    return None


NVRTC = _nvrtc()


@pytest.mark.skipif(NVRTC is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("source", nvcc.sources())
def test_nvrtc_takes_the_same_source(source):
    """With the options that CuPy is given, and those that it adds."""
    assert NVRTC is not None
    program = ctypes.c_void_p()
    code = (loader.FOLDER / f"{source}.cu").read_bytes()
    made = NVRTC.nvrtcCreateProgram(ctypes.byref(program), code, b"k.cu", 0, None, None)
    options = [o.encode() for o in (*loader.NVRTC_OPTIONS, "-arch=sm_90", "-ftz=true")]
    array = (ctypes.c_char_p * len(options))(*options)
    done = NVRTC.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    NVRTC.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetProgramLog(program, log)
    assert (made, done) == (0, 0), log.value.decode()
