"""Compiles the C++ kernels for this machine's CPU at first use, into the cache folder.

They are built for this exact CPU (its vector instructions give half of the speed) with the compiler
that is installed. Nothing is built beforehand; without a compiler the callers use PyTorch instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from echogen.engine.cache_folder import HINT, cache_folder

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC",
)  # fmt: skip


class CompilerError(RuntimeError):
    """There is no usable library; the message says why, and what would help."""


class SwitchError(RuntimeError):
    """``ECHOGEN_NATIVE`` is neither 0 nor 1; the message says what to write."""


def switched_off() -> bool:
    """Whether ``ECHOGEN_NATIVE=0`` asks for PyTorch's operations instead.

    Raises:
        SwitchError: it is neither 0 nor 1.
    """
    asked = os.environ.get("ECHOGEN_NATIVE", "1")
    if asked not in ("0", "1"):
        raise SwitchError(
            f"ECHOGEN_NATIVE={asked}: write 0 to draw on a CPU by PyTorch's operations"
        )
    return asked == "0"


def compiler() -> list[str] | None:
    """Return the compiler command: ``$CXX``, which may have several words (``ccache g++``), or the
    first of ``COMPILERS`` on PATH; None where there is none."""
    asked = os.environ.get("CXX", "").strip()
    # First as a single name: a path may contain spaces.
    commands = [[asked], asked.split()] if asked else [[name] for name in COMPILERS]
    for name, *words in commands:
        if found := shutil.which(name):
            return [found, *words]
    return None


def library(source: str) -> ctypes.CDLL:
    """Return the library of ``source``, compiled unless the cache folder has it.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    found = _library(source)
    if isinstance(found, CompilerError):
        raise found
    return found


@cache  # what failed once is not tried again
def _library(source: str) -> ctypes.CDLL | CompilerError:
    code, tool = FOLDER / f"{source}.cpp", compiler()
    if tool is None:
        wanted = os.environ.get("CXX") or ", ".join(COMPILERS)
        return CompilerError(f"no C++ compiler ({wanted}) is on PATH; install g++ or clang++")
    options = (*OPTIONS, _for_this_cpu())
    try:
        about = (code.read_bytes(), options, tool, _run([*tool, "--version"]).stdout, _cpu())
        digest = hashlib.blake2b(repr(about).encode(), digest_size=8).hexdigest()
        folder = cache_folder() / "native"
        folder.mkdir(exist_ok=True)
        built = folder / f"{source}-{digest}.so"
        command = [*tool, *options, str(code)]
        importlib.import_module("torch")  # the library finds torch's OpenMP when it is loaded
        return _kept(built) or _loaded(_compile(command, built))
    except CompilerError as error:
        return error
    except OSError as error:
        return CompilerError(f"{error}; {HINT}")


def _kept(built: Path) -> ctypes.CDLL | None:
    """Load the library that was built earlier; None if there is none or it is damaged: a machine
    that crashes may keep a new file's name without its contents."""
    try:
        return _loaded(built) if built.exists() else None
    except CompilerError:
        return None


def _loaded(built: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:  # for example, the folder is mounted "noexec"
        hint = "name a folder that programs may be run from in ECHOGEN_CACHE"
        raise CompilerError(f"{error}; {hint}") from None


def _compile(command: list[str], built: Path) -> Path:
    """Compile in a folder beside ``built`` and rename, as another process may do the same."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        beside = Path(folder) / built.name
        done = _run([*command, "-o", str(beside)])
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = [line for line in lines if "error" in line] or lines or ["without a word"]
            raise CompilerError(f"{command[0]} failed: {reason[0]}; name another one in CXX")
        return beside.replace(built)


def _for_this_cpu() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:  # a file that is not a program
        reason = error.strerror
        raise CompilerError(f"{command[0]} failed: {reason}; name another one in CXX") from None


def _cpu() -> str:
    """Describe this CPU's instructions, as different machines may share a cache folder."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    wanted = ("flags", "Features", "model name")
    return repr([platform.machine(), *dict.fromkeys(x for x in lines if x.startswith(wanted))])
