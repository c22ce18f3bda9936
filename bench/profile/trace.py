"""Run work under PyTorch's profiler: a Chrome trace, kernels by time, time by range."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from echogen.bench.harness import environment
from echogen.bench.profile.stopwatch import Stopwatch
from echogen.engine.ranges import DOMAIN, TorchRanges, listening

MOST_KERNELS = 20


def run(work: Callable[[], object], folder: Path, name: str, device: str = "cpu") -> dict[str, Any]:
    """Profile ``work``, which has run before.

    Writes ``NAME.trace.json`` into ``folder``, for chrome://tracing or ui.perfetto.dev.

    Args:
        work: what is profiled; it is called twice, without and with the profiler.
        folder: existing folder for the trace.
        name: of the work and of its trace.
        device: "cpu", or a CUDA device that is the current one.

    Returns:
        JSON-ready. ``wall_ms`` and ``ranges`` are of a run without the profiler, whose own work
        would otherwise be included. Each moment counts for the innermost range, so shares sum to
        one; on CUDA a range ends when the device is done, which loses any overlap. ``kernels`` are,
        by time, those of a run with the profiler: kernels on the device or, on a CPU, operators.
        ``trace`` is the path of the trace.
    """
    ranges, wall = _by_range(work, device)
    trace = folder / f"{name}.trace.json"
    activities = [ProfilerActivity.CPU]
    on_cuda = device.startswith("cuda")
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with listening(TorchRanges()), profile(activities=activities) as profiled:
        work()
        if on_cuda:
            torch.cuda.synchronize()
    profiled.export_chrome_trace(str(trace))
    return {
        "what": name,
        "wall_ms": 1e3 * wall,
        "ranges": ranges,
        "kernels": _kernels(profiled, device),
        "trace": str(trace),
    } | environment(device)


def clock(device: str) -> Callable[[], float]:
    """Return a clock in seconds. On CUDA it waits until the device is done, so that the device's
    work counts for the range it belongs to."""

    def waited() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return waited if device.startswith("cuda") else time.perf_counter


def _by_range(work: Callable[[], object], device: str) -> tuple[list[dict[str, Any]], float]:
    watch = Stopwatch(clock(device))
    with listening(watch):
        watch.start()
        work()
        wall = watch.stop()
    rows = watch.ranked
    return [
        {
            "category": row.category,
            "count": row.count,
            "ms": 1e3 * row.seconds,
            "share": row.seconds / wall,
            "payload": row.payload,
        }
        for row in rows
    ], wall


def _kernels(profiled: profile, device: str) -> list[dict[str, Any]]:
    """Return the longest kernels, by their own time. On CUDA only what ran on the device counts:
    the profiler counts a kernel's time again for the operator that launched it, and for ranges
    around both."""
    found, on_cuda = [], device.startswith("cuda")
    for event in profiled.key_averages():
        if event.key.startswith((f"{DOMAIN}:", "ProfilerStep")):
            continue
        if on_cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if own > 0:
            found.append({"name": event.key, "count": event.count, "ms": own / 1e3})
    found.sort(key=lambda row: -float(row["ms"]))
    total = sum(float(row["ms"]) for row in found)
    return [row | {"share": float(row["ms"]) / total} for row in found[:MOST_KERNELS]]
