"""Command lines of Nsight Systems and Nsight Compute for this project's work, and what to do where
they cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from echogen.engine.ranges import DOMAIN

Tool = Literal["nsys", "ncu"]
MOST_KERNELS = 50
INSTEAD = "--tool torch works everywhere"
MISSING = {
    "nsys": "nsys is not on PATH: install Nsight Systems (it comes with the CUDA toolkit)",
    "ncu": "ncu is not on PATH: install Nsight Compute (it comes with the CUDA toolkit)",
}
NO_COUNTERS = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler")
"""What Nsight Compute prints where it may not, or cannot, read the GPU's counters."""


class NsightError(RuntimeError):
    """A profiler that is missing, or that failed; the message says what to do."""


def command(tool: Tool, work: Sequence[str], out: Path, within: str | None = None) -> list[str]:
    """Return the command line that profiles ``work``. ``work`` is itself a command line, which
    calls the profiler's start and stop around the part that counts.

    Args:
        tool: nsys records a timeline of everything, kernels of CUDA graphs one by one; ncu reads
            the counters of single kernels.
        work: `echogen profile … --tool none`.
        out: path of the report, without its suffix.
        within: ncu only: innermost range (``step`` of ``engine/decode/step``) whose kernels are
            read; None: any. Only the first ``MOST_KERNELS`` are read, each of them several times.
    """
    if tool == "nsys":
        return [
            "nsys", "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--cpuctxsw=none",
            "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
            "--cuda-graph-trace=node", "--force-overwrite=true", f"--output={out}", *work,
        ]  # fmt: skip
    # Clocks are not locked: locked ones are slower than those that users run at.
    told = ["ncu", "--profile-from-start=off", "--clock-control=none", "--set=full", "--nvtx"]
    if within is not None:
        told += ["--nvtx-include", f"{DOMAIN}@{within}/"]
    return [*told, f"--launch-count={MOST_KERNELS}", "--force-overwrite", f"--export={out}", *work]


def run(tool: Tool, line: Sequence[str], out: Path) -> Path:
    """Run a command line made by `command`, and return the report's path.

    Raises:
        NsightError: the tool is missing, may not read counters, or left no report.
    """
    if shutil.which(tool) is None:
        raise NsightError(f"{MISSING[tool]}; {INSTEAD}")
    environment = os.environ | {"ECHOGEN_NVTX": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    sys.stderr.write(said)
    if any(word in said for word in NO_COUNTERS):
        raise NsightError(
            f"{tool} may not read this GPU's counters (an administrator can allow it: "
            f"NVreg_RestrictProfilingToAdminUsers=0); --tool nsys needs none, {INSTEAD}"
        )
    report = out.with_suffix(".nsys-rep" if tool == "nsys" else ".ncu-rep")
    if done.returncode or not report.exists():
        last = next(iter(reversed(said.strip().splitlines())), "it said nothing")
        why = f"exit code {done.returncode}: {last}"
        raise NsightError(f"{tool} left no {report.name} ({why}); {INSTEAD}")
    return report
