"""Ahead-of-time compilation of every Triton operator, with no GPU present.

The operators themselves run at production shapes on tensors without memory (on the meta device; CPU
tensors that are never touched work as well), with their launches recorded instead of made. What
they would have launched is then compiled for each architecture, and its properties are read from
the binary. So nothing about a kernel is written down twice.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from echogen.kernels.cuda.loader import GPUS, H200, CudaKernel, Gpu
from echogen.kernels.dispatch import INTERPRETED, Launch, recorded

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl")


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture.

    Attributes:
        name, arch: names of the kernel and the architecture.
        registers, shared_bytes, spill_bytes: per thread, per block and per thread; None where
            unknown (outside NVIDIA only shared_bytes is known).
        wide_access_share: the share of global loads and stores that move 16 bytes per thread.
        instructions: machine instructions, each counted once however often it runs.
        error: first line of the compiler's error; None if it compiled.
    """

    name: str
    arch: str
    registers: int | None = None
    shared_bytes: int | None = None
    spill_bytes: int | None = None
    wide_access_share: float | None = None
    instructions: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


def target_of(arch: str) -> GPUTarget:
    """Return Triton's target for an architecture such as ``sm_90`` or ``gfx942``.

    Raises:
        ValueError: no such architecture.
    """
    if re.fullmatch(r"sm_\d{2,3}a?", arch):
        return GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32)
    if re.fullmatch(r"gfx\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"arch = {arch!r}; write sm_NN for NVIDIA, gfxNNN for AMD")


def gpu_of(arch: str) -> Gpu | None:
    """The GPU that an architecture is compiled for; None if launchers know of none."""
    return GPUS.get(arch.removesuffix("a"))


class OnAnyDevice(TorchDispatchMode):
    """Runs an operator's CPU kernel whatever its tensors' device, and so on meta tensors too, where
    neither its library calls nor its memory cost anything."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "echogen":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.dtype_out:  # torch 2.11 has no rule for it on meta
            return (kwargs or {})["out"]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Source:
    """A launch in the form that the compiler takes, specialised as Triton's own launcher would. It
    can be sent to another process, which imports the kernel by its name."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @staticmethod
    def of(launch: Launch) -> Source:
        """Return what would be compiled for this launch."""
        kernel = launch.kernel
        values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, parameter in enumerate(kernel.params):
            value = values.get(parameter.name, parameter.default)
            aligned = isinstance(value, Tensor)
            special = not parameter.do_not_specialize  # numbers of 1, and those divisible by 16
            one = type(value) is int and value == 1
            if parameter.is_constexpr or value is None or (one and special):
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            elif isinstance(value, bool):
                signature[parameter.name] = "i1"
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0 and special
            else:
                signature[parameter.name] = "fp32"
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        options = {k: v for k, v in launch.constants.items() if k in OPTIONS}
        return Source(kernel.__module__, kernel.__name__, signature, constants, attributes, options)

    def runs_on(self, arch: str) -> bool:
        """Whether ``arch`` has the launch's types: only NVIDIA's from sm_89 on have
        float8_e4m3fn."""
        target = target_of(arch)
        has = target.backend == "cuda" and target.arch >= 89
        return has or "*fp8e4nv" not in self.signature.values()

    def compile(self, arch: str) -> Compiled:
        """Compile for one architecture.

        Raises:
            ValueError: no such architecture.
            RuntimeError: kernels are interpreted in this process.
        """
        if INTERPRETED:
            raise RuntimeError(
                "TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled"
            )
        target, name = target_of(arch), self.kernel.strip("_").removesuffix("_kernel")
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        try:
            made = triton.compile(source, target=target, options=self.options)
        except Exception as error:  # the compiler raises many kinds of its own; all are reported
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return Compiled(name, arch, error=f"{type(error).__name__}: {reason}")
        if "cubin" not in made.asm:
            return Compiled(name, arch, shared_bytes=made.metadata.shared)
        read = _read_cubin(made.asm["cubin"])
        return Compiled(name, arch, shared_bytes=made.metadata.shared, **read)


def launches(call: Callable[[], Any], on: Gpu = H200) -> list[Launch]:
    """Return what ``call`` launches in Triton on a GPU when it runs operators on meta or CPU
    tensors, backward included. Launches of a kernel that compile to the same code are kept once."""
    entered: AbstractContextManager[Any] = OnAnyDevice()
    with recorded(on) as found, entered:
        call()
    unique: dict[str, Launch] = {}
    for launch in found:
        if not isinstance(launch.kernel, CudaKernel):
            unique.setdefault(repr(Source.of(launch)), launch)
    return list(unique.values())


def compile_all(
    asked: Sequence[tuple[Source, str]],
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compiled]:
    """Compile every source for its paired architecture, in up to ``processes`` processes."""
    found: dict[int, Compiled] = {}
    if processes < 2 or len(asked) < 2:
        for i, (source, arch) in enumerate(asked):
            found[i] = source.compile(arch)
            progress(len(found), len(asked))
        return [found[i] for i in range(len(asked))]
    # Not forked: a fork would leave torch's threads behind in the middle of their work.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(asked)), fresh) as pool:
        jobs = {pool.submit(source.compile, arch): i for i, (source, arch) in enumerate(asked)}
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            progress(len(found), len(asked))
    return [found[i] for i in range(len(asked))]


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        assembly = disassembly(path)
    sizes = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": sizes["REG"],
        "spill_bytes": sizes["STACK"] + sizes["LOCAL"],
        "wide_access_share": wide_access_share(assembly),
        "instructions": instructions(assembly),
    }


def disassembly(cubin: Path) -> str:
    """Disassemble a cubin's instructions with the disassembler in Triton's wheel."""
    return _run("nvdisasm", "-c", cubin)


def wide_access_share(assembly: str) -> float:
    """The share of global loads and stores that move 16 bytes per thread (or a whole block)."""
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS|UBLKCP)[.\w]*", assembly)
    wide = [a for a in accesses if ".128" in a or a.startswith("UBLKCP")]
    return len(wide) / len(accesses) if accesses else 0.0


def instructions(assembly: str) -> int:
    """Count the instructions of a kernel, without NOPs."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w+)", assembly, re.MULTILINE)
    return sum(name != "NOP" for name in found)


def _run(tool: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
