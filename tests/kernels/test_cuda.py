"""The kernels in CUDA C++ as they are built: no spills, the names that launchers ask for, one
source for nvcc and NVRTC, no stale fatbin. What they compute: test_parse_boxes and
test_skinny_linear."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_cmake_builds_a_fatbin_a_source(tmp_path):
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


def test_a_fatbin_older_than_its_source_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.setattr(loader, "unloadable", lambda: None)
    for name in ("k.cu", "shared.cuh", "k.fatbin"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "k.fatbin", (10**9, 10**9))
    assert loader.fatbin("k") is None and "older than the source" in loader.status("k")
    for name in ("k.cu", "shared.cuh"):
        os.utime(tmp_path / name, (10**9, 10**9))
    assert loader.fatbin("k") == tmp_path / "k.fatbin"
    assert loader.status("k") == "CUDA C++, from its fatbin"
    os.utime(tmp_path / "shared.cuh")
    assert loader.fatbin("k") is None
    (tmp_path / "k.fatbin").unlink()
    assert loader.status("k") == "CUDA C++, by NVRTC at first use: no fatbin (make cuda)"


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
