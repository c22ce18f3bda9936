"""What nvcc makes of the CUDA C++ kernels, with no GPU present: registers, spills, accesses.

The counterpart of `echogen.kernels.aot`, which compiles the Triton kernels. nvcc comes with the
CUDA toolkit and not with a Python package, so its absence is normal: it is reported, not an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from echogen.kernels.aot import Compiled, disassembly, instructions, wide_access_share
from echogen.kernels.cuda.loader import FOLDER

ARCHES = {"sm_90": "sm_90a"}
"""What CMakeLists.txt builds in place of an architecture; all others keep their names."""
OPTIONS = ("-std=c++17", "-ftz=true")
"""Those options of CMakeLists.txt that shape the code, and so its registers."""


def find() -> Path | None:
    """nvcc on PATH, under CUDA_HOME, or where the toolkit installs itself; None if not found."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return None if found is None else Path(found)


def sources() -> list[str]:
    """Every source, by its name without ``.cu``."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


def compile_source(source: str, arch: str, nvcc: Path) -> list[Compiled]:
    """Compile a source for one NVIDIA architecture, and read every kernel from ptxas's report.

    Args:
        source: as `sources` names it.
        arch: ``sm_NN``.
        nvcc: path from `find`.

    Returns:
        One entry per kernel; ``spill_bytes`` is its stack frame, which includes spills. If the
        source does not compile, a single entry named after it, with the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        done = subprocess.run(
            [nvcc, "-cubin", *OPTIONS, f"-arch={ARCHES.get(arch, arch)}", "-Xptxas", "-v",
             "-o", cubin, FOLDER / f"{source}.cu"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = [line for line in lines if "error" in line] or ["nvcc failed without a word"]
            return [Compiled(source, arch, error=reason[0])]
        return _read(done.stderr, disassembly(cubin), arch)


def _read(report: str, assembly: str, arch: str) -> list[Compiled]:
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", assembly, flags=re.MULTILINE)
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:
        name = re.match(r"'(\w+)'", entry)
        frame = re.search(r"(\d+) bytes stack frame", entry)
        used = re.search(r"Used (\d+) registers", entry)
        if name is None or frame is None or used is None:
            raise RuntimeError(f"ptxas reports in a form that is not known: {entry[:200]!r}")
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            Compiled(
                name[1],
                arch,
                registers=int(used[1]),
                shared_bytes=int(shared[1]) if shared else 0,  # the launch adds its own
                spill_bytes=int(frame[1]),
                wide_access_share=wide_access_share(code[name[1]]),
                instructions=instructions(code[name[1]]),
            )
        )
    return found
