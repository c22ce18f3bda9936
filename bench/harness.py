"""Tools that every benchmark needs: its environment, alternating timed runs, quantiles."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers


class WrongResult(RuntimeError):
    """The contestants compute different results, so comparing their speed means nothing."""


def one_line(error: BaseException) -> str:
    """Return an error in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the device and its state, processor, versions, set switches and commit, JSON-ready.

    ``commit`` and ``dirty`` are None outside git, unless ECHOGEN_COMMIT names the commit that a
    copy was taken from. ``gpu`` is None on a CPU. Changes in bench/results, where results go, do
    not make a checkout dirty.
    """
    commit = _git("rev-parse", "HEAD")
    apart = ("--", ":/", ":(top,exclude)bench/results")
    status = _git("status", "--porcelain", *apart) if commit else None
    if commit is None and (told := os.environ.get("ECHOGEN_COMMIT")):
        commit, status = told, ""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
            "cupy": next(filter(None, map(version, CUPY)), None),
            "flash-attn": version("flash-attn"),
        },
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "gpu": gpu_state(_card(device)) if device.startswith("cuda") else None,
        "commit": commit,
        "dirty": None if status is None else bool(status),
    }


CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
"""CuPy's distributions. Without one of them, no operator in CUDA C++ runs on a GPU."""
SWITCHES = ("ECHOGEN_EAGER", "ECHOGEN_FORCE_REFERENCE", "ECHOGEN_FUSED", "ECHOGEN_NATIVE",
            "ECHOGEN_PDL", "TRITON_INTERPRET")  # fmt: skip
"""Environment variables that decide what runs."""
GPU_STATE = ("driver_version", "power.draw", "power.limit", "clocks.sm", "clocks.mem",
             "temperature.gpu", "utilization.gpu")  # fmt: skip


def gpu_state(card: str = "0") -> dict[str, str] | None:
    """Return a card's current driver, power, clocks and temperature, in nvidia-smi's words; None
    where nvidia-smi does not run. ``card`` is its UUID, since nvidia-smi's indices also count the
    cards that CUDA_VISIBLE_DEVICES hides."""
    query = f"--query-gpu={','.join(GPU_STATE)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={card}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    found = [part.strip() for part in done.stdout.strip().split(",")]
    if done.returncode or len(found) != len(GPU_STATE):
        return None
    return dict(zip(GPU_STATE, found, strict=True))


def _card(device: str) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def version(package: str) -> str | None:
    """Return the version of an installed distribution; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, with its family and model where known. A virtual machine may be
    named "AMD EPYC" both on Zen 3 and on Zen 4, whose figures are not comparable."""
    lines = info.read_text().splitlines() if info.exists() else []
    about: dict[str, str] = {}  # of the first processor
    for line in lines:
        name, _, value = line.partition(":")
        about.setdefault(name.strip(), value.strip())
    if "model name" not in about:
        return platform.processor()
    kind = [f"{key.split()[-1]} {about[key]}" for key in ("cpu family", "model") if key in about]
    return about["model name"] + f" ({', '.join(kind)})" * bool(kind)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run a block with ``count`` CPU threads in PyTorch; None leaves the count unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call on the CPU."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def alternate(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    after: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time each call ``repeats`` times, in turn, so that a busy moment affects all of them.

    ``after`` is called after each timed call. The caller does the warm-up: every contestant has
    already run once, to have its result checked.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
            after()
    return times


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and the quantiles 0.2 and 0.8, linearly interpolated."""
    q = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return dict(zip(("median", "q20", "q80"), q.tolist(), strict=True))
