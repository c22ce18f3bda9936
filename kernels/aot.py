"""Ahead-of-time compilation of every Triton operator, with no GPU present.

The operators themselves are run at production shapes on CPU tensors that are never touched, with
their launches recorded instead of made; what they would have launched is then compiled for each
architecture and read back out of the binary. So nothing about a kernel is written down twice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from echogen.kernels.dispatch import INTERPRETED, Launch, recorded

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Compiled:
    """One kernel as one architecture runs it.

    Attributes:
        name, arch: kernel and architecture.
        registers, shared_bytes, spill_bytes: of one thread, block, thread (None: not NVIDIA's).
        wide_access_share: global loads and stores of 16 bytes a thread over all.
        error: first line of the compiler's complaint; None where it compiled.
    """

    name: str
    arch: str
    registers: int | None = None
    shared_bytes: int | None = None
    spill_bytes: int | None = None
    wide_access_share: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def target_of(arch: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton names it.

    Raises:
        ValueError: no such architecture.
    """
    if re.fullmatch(r"sm_\d{2,3}a?", arch):
        return GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32)
    if re.fullmatch(r"gfx\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"arch = {arch!r}; write sm_NN for NVIDIA, gfxNNN for AMD")


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` launches when it runs operators on CPU tensors, backward included; launches of
    a kernel that compile to the same code are kept once."""
    with recorded() as found:
        call()
    unique: dict[str, Launch] = {}
    for launch in found:
        source, options = _source(launch)
        unique.setdefault(f"{launch.kernel.__name__} {source.hash()} {options}", launch)
    return list(unique.values())


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """A launch as the compiler wants it, specialised as Triton's own launcher would."""
    options = {k: v for k, v in launch.constants.items() if k in OPTIONS}
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        aligned = isinstance(value, Tensor)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile what was recorded for one architecture."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled")
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    source, options = _source(launch)
    try:
        made = triton.compile(source, target=target_of(arch), options=options)
    except Exception as error:  # the compiler raises of its own many kinds; all are reported
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Compiled(name, arch, error=f"{type(error).__name__}: {reason}")
    if "cubin" not in made.asm:
        return Compiled(name, arch, shared_bytes=made.metadata.shared)
    return Compiled(name, arch, **_read_cubin(made.asm["cubin"]))


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", path)
        assembly = _run(tools / "nvdisasm", "-c", path)
    sizes = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS|UBLKCP)[.\w]*", assembly)
    wide = [a for a in accesses if ".128" in a or a.startswith("UBLKCP")]
    return {
        "registers": sizes["REG"],
        "shared_bytes": sizes["SHARED"],
        "spill_bytes": sizes["STACK"] + sizes["LOCAL"],
        "wide_access_share": len(wide) / len(accesses) if accesses else 0.0,
    }


def _run(tool: Path, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
