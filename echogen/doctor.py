"""Report what this installation has and lacks, and what that means for its user."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from echogen import __version__
from echogen.commands.options import Json, ModelOptions
from echogen.commands.output import print_json, show

# Distributions that bring a library (cupy has one per CUDA version), and what its absence means.
LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("torch",), "nothing runs"),
    "transformers": (("transformers",), "nothing runs"),
    "triton": (("triton",), "nothing runs: the operators are written in it"),
    "cupy": (
        ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"),
        "operators in CUDA C++ run on plain torch (pip install -e '.[cuda]')",
    ),
    "cuda-bindings": (("cuda-bindings",), "launches do not overlap: ECHOGEN_PDL=1 is refused"),
    "nvtx": (("nvtx",), "profiling ranges are left out"),
    "flash-attn": (("flash-attn",), "prompts run on PyTorch's own attention"),
    "fastapi": (("fastapi",), "no `echogen serve` (pip install -e '.[serve]')"),
    "tensorboard": (("tensorboard",), "training writes no curves for TensorBoard"),
    "peft": (("peft",), "no `echogen train --lora`"),
    "matplotlib": (("matplotlib",), "benchmarks draw no plots"),
}


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, models and which operators run where."""

    model: str | None = None
    """Load this model too, and show what it is."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        data = examine()
        if self.model is not None:
            data["model"] = describe(self.model)
        _show(data)
        if self.json:
            print_json(data)


def examine() -> dict[str, Any]:
    """Return everything but a model, as JSON-ready data."""
    return {
        "echogen": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "libraries": {name: version(name) for name in LIBRARIES},
        "devices": devices(),
        "threads": _threads(),
        "bf16_slowdown": bf16_slowdown(),
        "models": bundled(),
        "cpu_drawing": cpu_drawing(),
        "operators": operators(),
        "force_reference": os.environ.get("ECHOGEN_FORCE_REFERENCE") == "1",
        "cache": cache(),
    }


def version(library: str) -> str | None:
    """Return the version of a library; None where it is not installed."""
    for name in LIBRARIES[library][0]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device that PyTorch sees."""
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "cores": os.cpu_count()}]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": f"cuda:{i}",
                "is": p.name,
                "memory_gib": round(p.total_memory / 2**30, 1),
                "capability": f"{p.major}.{p.minor}",
            }
        )
    return found


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def bf16_slowdown() -> float:
    """Return how many times as long as in float32 products take in bfloat16 on this CPU."""
    from echogen.train.run.precision import bf16_slowdown

    return bf16_slowdown()


def bundled() -> dict[str, int]:
    """Return the bundled models and the bytes of each."""
    # The folder is found without importing the engine: a doctor must work where that fails.
    spec = find_spec("echogen.engine")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    return {
        config.parent.name: sum(f.stat().st_size for f in config.parent.iterdir() if f.is_file())
        for config in sorted(folder.glob("*/config.json"))
    }


def cpu_drawing() -> str:
    """Return what draws a small float32 model on this CPU, and why (`engine.cpu.native`). Compiles
    it if that was not done yet."""
    from echogen.engine.cpu import loader

    try:
        if loader.switched_off():
            return "PyTorch's operations: ECHOGEN_NATIVE=0"
        loader.library("transformer")
        tool = " ".join(loader.compiler() or ())
    except (loader.CompilerError, loader.SwitchError) as error:
        return f"PyTorch's operations, several times as slowly: {error}"
    return f"C++, compiled by {tool}"


def operators() -> dict[str, dict[str, str]]:
    """Return every operator with its module, and what runs it on a CPU and on CUDA. For an operator
    in CUDA C++, also say how it is loaded, or why its reference runs instead."""
    from echogen.kernels import dispatch

    spec = find_spec("echogen.kernels")  # a namespace: no __init__.py, by design
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for module in pkgutil.iter_modules(folders):
        if not module.ispkg:
            importlib.import_module(f"echogen.kernels.{module.name}")
    found = {}
    for name, operator in sorted(dispatch.OPERATORS.items()):
        where = {device: dispatch.implementation(name, device) for device in ("cpu", "cuda")}
        found[name] = {"module": operator.module.rpartition(".")[2]} | where
    return found


def cache() -> dict[str, Any]:
    """Return the cache folder, and whether it can be written to."""
    from echogen.engine.cache_folder import cache_folder

    try:
        folder = cache_folder()
    except OSError as error:
        return {"folder": os.environ.get("ECHOGEN_CACHE"), "error": error.strerror}
    return {"folder": str(folder), "writable": os.access(folder, os.W_OK)}


def describe(model: str) -> dict[str, Any]:
    """Load a model and describe it. Raises CheckpointError where it does not load."""
    engine = ModelOptions(model).load()
    parts = {"transformer": engine.transformer, "vq": engine.vq, "siglip": engine.siglip}
    return {
        "name": model,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()},
        "image_size": engine.image_size,
        "image_tokens": engine.transformer.config.image_tokens,
        "codec": engine.prompts.codec.name,
        "pixels_trained": engine.pixels_trained,
        "sampling": asdict(engine.sampling),
    }


def _show(data: dict[str, Any]) -> None:
    rows = [("python", data["python"], "")]
    for name, found in data["libraries"].items():
        rows.append((name, found or "absent", "" if found else LIBRARIES[name][1]))
    show(f"echogen {data['echogen']}", ("part", "version", "what that means"), rows)
    here = [(d["name"], _device(d)) for d in data["devices"]]
    if len(here) == 1:
        here.append(("cuda", "none: everything runs on the CPU"))
    here.append(("threads", str(data["threads"])))
    here.append(("bfloat16 on the CPU", f"{data['bf16_slowdown']:.1f} × the time of float32"))
    here.append(("drawing on the CPU", data["cpu_drawing"]))
    cache = data["cache"]
    state = f"cannot be made ({cache['error']})" if "error" in cache else ""
    state = state or ("" if cache["writable"] else "cannot be written to")
    here.append(("cache", " ".join(filter(None, (cache["folder"], state)))))
    models = [f"{name} ({size / 1e6:.1f} MB)" for name, size in data["models"].items()]
    here.append(("bundled models", ", ".join(models) or "none"))
    show("This machine", ("part", "found"), here)
    # A backward runs as its forward does.
    run_on = [
        (name, about["cpu"], about["cuda"])
        for name, about in data["operators"].items()
        if not name.endswith("_backward")
    ]
    show("Operators", ("operator", "on a CPU", "on CUDA"), run_on)
    if "model" in data:
        m = dict(data["model"])
        show(f"Model {m.pop('name')}", ("part", "value"), [(k, _plain(v)) for k, v in m.items()])


def _device(device: dict[str, Any]) -> str:
    if device["name"] == "cpu":
        return f"{device['cores']} cores"
    return f"{device['is']}, {device['memory_gib']} GiB, capability {device['capability']}"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items()
        )
    return str(value)
