"""Kernels in CUDA C++ as this machine's CPU runs them, for tests: see emulator.h."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from echogen.kernels.cuda import loader

HERE = Path(__file__).parent
RUN = """
extern "C" int run_{name}(long long blocks, int threads, long long shared, int early,
                          const uint64_t* values, const uint64_t* arrays, int count) {{
    emulator::early = early;
    emulator::arrays.clear();
    for (int i = 0; i < count; ++i) {{
        const auto* begin = reinterpret_cast<const unsigned char*>(arrays[2 * i]);
        emulator::arrays.push_back({{begin, begin + arrays[2 * i + 1]}});
    }}
    return emulator::launch(blocks, threads, shared, [=] {{ emulator::call({name}, values); }});
}}
"""
MARGIN = 1024  # bytes
BUILD = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra",
         "-Wno-unknown-pragmas", "-Werror")  # fmt: skip


@cache
def _library(source: str, folder: Path) -> ctypes.CDLL:
    path = loader.FOLDER / f"{source}.cu"
    names = re.findall(r"__global__[^(]*\([^)]*\)\s*(\w+)\(", path.read_text())
    names += re.findall(r"^[A-Z_]+\((\w+), ", path.read_text(), re.MULTILINE)
    body = "".join(RUN.format(name=name) for name in names if name != "NAME")
    made = folder / f"{source}.cpp"
    made.write_text(f'#include "{path}"\n{body}')
    library = made.with_suffix(".so")
    subprocess.run(["g++", *BUILD, f"-I{HERE}", made, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Emulated:
    """What `loader.CudaKernel` is, on the CPU. ``early``: copies land as they are made, and each
    warp, the last one first, runs ahead of the others."""

    def __init__(self, kernel: loader.CudaKernel, folder: Path, early: bool = False) -> None:
        self._run = getattr(_library(kernel.source, folder), f"run_{kernel.__name__}")
        self.__name__, self._early = kernel.__name__, early

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, block: int, shared: int = 0) -> None:
        values, arrays, guarded = [], [], []
        for a in arguments:
            if isinstance(a, torch.Tensor):
                guarded.append(Guarded(a))
                a = guarded[-1].address
                arrays += [a, guarded[-1].size]
            values.append(struct.pack("=fi", a, 0) if isinstance(a, float) else _word(a))
        faults = self._run(
            ctypes.c_longlong(grid[0]), block, ctypes.c_longlong(shared), self._early,
            b"".join(values), struct.pack(f"={len(arrays)}Q", *arrays), len(arrays) // 2,
        )  # fmt: skip
        assert faults >= 0, "threads of the kernel wait for one another for ever"
        assert faults == 0, f"{faults} faults (what those are: emulator.h)"
        for array in guarded:
            array.give_back()


class Guarded:
    """A tensor's memory amid bytes that nothing may write, and that read as NaN."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.view(-1).view(torch.uint8)
        self.size = len(self._tensor)
        whole = torch.full((self.size + 3 * MARGIN,), 0xFF, dtype=torch.uint8)
        begin = MARGIN + (tensor.data_ptr() - whole.data_ptr()) % MARGIN  # aligned as the tensor is
        self._around = whole[:begin], whole[begin + self.size :]
        self._inside = whole[begin : begin + self.size].copy_(self._tensor)
        self.address = whole.data_ptr() + begin

    def give_back(self) -> None:
        """What the kernel made of it."""
        assert all((part == 0xFF).all() for part in self._around), "written outside an array"
        self._tensor.copy_(self._inside)


def _word(value: int | None) -> bytes:
    return struct.pack("=q", value or 0)


def emulate(
    module: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    early: bool = False,
) -> None:  # fmt: skip
    """Replace the kernels of an operator's module; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.getbasetemp() / "emulated"
    folder.mkdir(exist_ok=True)
    for name, kernel in list(vars(module).items()):
        if isinstance(kernel, loader.CudaKernel):
            monkeypatch.setattr(module, name, Emulated(kernel, folder, early))
        elif isinstance(kernel, dict) and kernel:
            values = {
                k: Emulated(v, folder, early) if isinstance(v, loader.CudaKernel) else v
                for k, v in kernel.items()
            }
            monkeypatch.setattr(module, name, values)
