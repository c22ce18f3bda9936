"""Compile every operator for given architectures, at the shapes of training and decoding.

This needs no GPU: Triton includes its compiler, and the CUDA C++ kernels are compiled where nvcc is
installed. A kernel that spills registers, or does not compile, is found here rather than by a user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from echogen.bench.harness import environment
from echogen.bench.registry import Case, Mode, ShapesOnly, named, short
from echogen.bench.speed import contest
from echogen.kernels import aot
from echogen.kernels.cuda import nvcc
from echogen.kernels.cuda.loader import H200, Gpu
from echogen.kernels.dispatch import OPERATORS, Launch

DTYPES = (torch.float32, torch.bfloat16)
NO_NVCC = "nvcc is not installed; the kernels in CUDA C++ were not compiled"


def run(
    arches: Sequence[str],
    operators: Sequence[str] = (),
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compile; JSON-ready.

    Args:
        arches: such as ``sm_90`` or ``gfx942`` (AMD, which runs only the Triton kernels).
        operators: names of operators or cases; none: all.
        processes: how many compile in parallel; None: one per core.
        progress: called with (Triton kernels compiled, to compile).
        note: called with what is left out.

    Returns:
        ``kernels``, one object per kernel and architecture: `echogen.kernels.aot.Compiled`, with
        the operator and float type where it was found, and the environment. Equal code is compiled
        once.

    Raises:
        ValueError: an architecture or operator is unknown.
        RuntimeError: kernels are interpreted in this process.
    """
    for arch in arches:
        aot.target_of(arch)
    if aot.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled")
    asked = named(operators)
    gpus: dict[Gpu, list[str]] = {}
    for arch in arches:
        gpus.setdefault(aot.gpu_of(arch) or H200, []).append(arch)
    found: dict[str, tuple[aot.Source, dict[str, str], set[str]]] = {}
    for case in asked:
        for dtype in DTYPES if case.only is None else (case.only,):
            about = {"operator": case.name, "dtype": short(dtype)}
            for on, its in gpus.items():
                for source in sources(case, dtype, on):
                    wanted = found.setdefault(repr(source), (source, about, set()))[2]
                    wanted.update(arch for arch in its if source.runs_on(arch))
    each = [(s, a, about) for s, about, wanted in found.values() for a in arches if a in wanted]
    processes = os.cpu_count() or 1 if processes is None else processes
    compiled = aot.compile_all([(s, a) for s, a, _ in each], processes, progress)
    rows = [one.to_dict() | about for one, (*_, about) in zip(compiled, each, strict=True)]
    rows += _in_cuda({case.operator for case in asked}, arches, note)
    return {"arches": list(arches), "kernels": rows} | environment()


def _in_cuda(
    operators: set[str], arches: Sequence[str], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return rows of the CUDA C++ kernels; their types are fixed, in the kernels' names."""
    asked = {
        operator.module.rpartition(".")[2]
        for operator in OPERATORS.values()
        if operator.name in operators and operator.kind == "CUDA C++"
    }
    compiler = nvcc.find()
    if asked and compiler is None:
        note(NO_NVCC)
    if compiler is None:
        return []
    return [
        one.to_dict() | {"operator": source, "dtype": ""}
        for source in nvcc.sources()
        for arch in arches
        if source in asked and arch.startswith("sm_")
        for one in nvcc.compile_source(source, arch, compiler)
    ]


def sources(case: Case, dtype: torch.dtype, on: Gpu = H200) -> list[aot.Source]:
    """What a case launches on a GPU, forward and backward, at every size but the tiny one."""
    found: dict[str, aot.Source] = {}
    for size in case.sizes:
        if size == "tiny":
            continue
        mode: Mode = "both" if "backward" in case.modes(size) else "forward"
        for launch in launches(case, size, dtype, mode, on):
            source = aot.Source.of(launch)
            found.setdefault(repr(source), source)
    return list(found.values())


def launches(case: Case, size: str, dtype: torch.dtype, mode: Mode, on: Gpu = H200) -> list[Launch]:
    """Return what one pass over a case, and whatever must precede it, launches on a GPU."""

    def call() -> None:
        inputs = case.inputs(ShapesOnly(), case.sizes[size], dtype)
        mine = contest.own(case, inputs, forget=True)
        contest.once(case, case.run, case.outputs, mode, mine)()

    return aot.launches(call, on)


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each kernel that spills, does not compile or needs more shared memory than
    there is. AMD's are reported but do not fail the run, since no test has ever run there."""
    return [
        f"{r['name']} of {r['operator']}, {r['arch']}: {fault}"
        for r in rows
        if r["arch"].startswith("sm_") and (fault := fault_of(r, aot.gpu_of(r["arch"])))
    ]


def fault_of(row: dict[str, Any], on: Gpu | None) -> str | None:
    """Return why a kernel must not be launched on a GPU; None where it may be."""
    if row["error"] or row["spill_bytes"]:
        return row["error"] or f"{row['spill_bytes']} bytes of registers spilled"
    shared = row["shared_bytes"]
    if on is not None and shared is not None and shared > on.shared_bytes:
        return f"{shared} bytes of shared memory, a block may have {on.shared_bytes}"
    return None
