"""How an operator reaches its implementations: through PyTorch's dispatcher alone.

An operator is `torch.ops.echogen.<name>`, with a CPU kernel (the plain-torch reference), a CUDA
kernel (the launcher of Triton or CUDA C++ code), a fake rule, and, if it is differentiable, an
autograd rule. Two environment variables, read once, change what is registered:

- ``TRITON_INTERPRET=1`` (Triton's own): the launcher becomes the CPU kernel too, so that the same
  tests run the Triton code in the interpreter, through the public name;
- ``ECHOGEN_FORCE_REFERENCE=1``: the reference becomes the CUDA kernel too, for debugging.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import CustomOpDef
from triton.runtime.jit import KernelInterface

from echogen.kernels import overlap
from echogen.kernels.cuda import loader

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORCE_REFERENCE = os.environ.get("ECHOGEN_FORCE_REFERENCE") == "1"

LAUNCHED: Counter[str] = Counter()
"""How often each kernel was launched; tests check with it that they ran the code under test."""


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made: the kernel, its grid, arguments and constants
    (``num_warps`` and ``num_stages`` among them)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel on the current stream; every launch of the project goes through here.

    An empty grid launches nothing, because CUDA refuses it. Where overlap is on
    (`echogen.kernels.overlap`), kernels that take part in it overlap with the previous launch.
    """
    if overlap.active() and "DEPENDENT" in getattr(kernel, "arg_names", ()):
        constants |= {"DEPENDENT": True, "launch_pdl": True}
    if isinstance(kernel, KernelInterface):
        # Triton's default up to 3.9. The next version does not fuse, but the code that is checked
        # ahead of time for spills, and in the tests for its rounding, is fused.
        constants.setdefault("enable_fp_fusion", True)
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants))
        return
    if 0 in grid:
        return
    LAUNCHED[kernel.__name__] += 1
    device = next((a.device for a in arguments if isinstance(a, torch.Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(device):  # Triton launches on the current device, not the tensors'
        kernel[grid](*arguments, **constants)


@contextmanager
def recorded(on: loader.Gpu = loader.H200) -> Iterator[list[Launch]]:
    """Record launches instead of making them, including those of operators called on CPU tensors:
    for ahead-of-time compilation, and for measuring without a GPU what a launcher allocates.
    Launchers see ``on`` as their GPU. The operators' results are then uninitialised memory."""
    global _recorded
    before, _recorded = _recorded, []
    told = loader.RECORDED_FOR.set(on)
    try:
        yield _recorded
    finally:
        _recorded = before
        loader.RECORDED_FOR.reset(told)


@dataclass(frozen=True)
class Operator:
    """One registered operator, as `doctor` and the tests see it."""

    name: str
    kind: str
    module: str


OPERATORS: dict[str, Operator] = {}
"""Every operator registered so far, by name; importing an operator's module registers it."""


def operator(
    name: str,
    launcher: Callable[..., Any],
    kind: str = "Triton",
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: register a plain-torch function as ``echogen::<name>`` with its launcher.

    The decorated function's annotations are the operator's schema; it must not return an argument
    or a view of one. The fake rule and autograd are added to what the decorator returns
    (``register_fake``, ``register_autograd``).

    Args:
        name: name of the operator, the reference, the test file and the benchmark.
        launcher: same signature; allocates the outputs and launches the kernel.
        kind: what the launcher launches, "Triton" or "CUDA C++"; shown to users, and decides
            whether the interpreter runs it and whether it can fall back to the reference.
        mutates: arguments that are written to. None of them may have a default: torch 2.11 records
            the write even for an argument that is left out (IndexError).
    """

    def register(reference: Callable[..., Any]) -> CustomOpDef:
        interpreted = INTERPRETED and kind == "Triton"

        def on_cpu(*arguments: Any) -> Any:
            launching = interpreted or _recorded is not None
            return launcher(*arguments) if launching else _exactly(reference, "cpu", arguments)

        made = torch.library.custom_op(
            f"echogen::{name}",
            on_cpu,
            mutates_args=mutates,
            device_types="cpu",
            schema=torch.library.infer_schema(reference, mutates_args=mutates),
        )
        made.register_kernel("cuda")(_on_cuda(name, reference, launcher, kind))
        OPERATORS[name] = Operator(name, kind, reference.__module__)
        return made

    return register


def _exactly(reference: Callable[..., Any], device: str, arguments: tuple[Any, ...]) -> Any:
    """Run a reference in its arguments' types, without autocast: launchers ignore autocast, and
    both must give the same result."""
    if not torch.is_autocast_enabled(device):
        return reference(*arguments)
    with torch.autocast(device, enabled=False):
        return reference(*arguments)


def _on_cuda(
    name: str, reference: Callable[..., Any], launcher: Callable[..., Any], kind: str
) -> Callable[..., Any]:
    """Return the CUDA kernel of an operator. One in CUDA C++ falls back to its reference if it
    cannot be loaded, and warns once: a service then runs slower, but it runs."""
    source = _source(reference.__module__)

    def in_torch(*arguments: Any) -> Any:
        return _exactly(reference, "cuda", arguments)

    if FORCE_REFERENCE:
        return in_torch
    if kind == "Triton":
        return launcher

    def on_cuda(*arguments: Any) -> Any:
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        why = loader.unusable(source, device)
        if why is None:
            return launcher(*arguments)
        mend = f" ({loader.INSTALL})" if loader.unloadable() else ""
        # Python shows a warning once per place in the code and text.
        warnings.warn(f"{name} runs on plain torch: {why}{mend}", stacklevel=2)
        return in_torch(*arguments)

    return on_cuda


def implementation(name: str, device: str) -> str:
    """Describe in words what runs operator ``name`` on ``device`` ("cpu" or "cuda")."""
    operator = OPERATORS[name]
    kind = operator.kind
    if device == "cpu":
        return f"{kind}, interpreted" if INTERPRETED and kind == "Triton" else "reference"
    if FORCE_REFERENCE:
        return "reference (forced)"
    return kind if kind == "Triton" else loader.status(_source(operator.module))


def _source(module: str) -> str:
    """The CUDA C++ file that an operator's module launches, which has the module's name."""
    return module.rpartition(".")[2]
