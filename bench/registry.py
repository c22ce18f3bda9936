"""One entry per operator: inputs, implementations, accepted error and minimum cost.

The benchmark, ahead-of-time compilation and the tests of both read these entries, so that a shape,
a yardstick or a floor is written down once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Pass = Literal["forward", "backward"]
Mode = Literal["forward", "backward", "both"]
Dims = Mapping[str, int]
Inputs = dict[str, Any]
Outputs = Sequence[Tensor]
Run = Callable[[Inputs], Outputs]

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Error that rounding explains: a few units in the last place of sums as long as a row."""
OURS, EAGER, COMPILED = "echogen", "eager", "compile"
MODULES = ("noise", "heads", "rewards", "transformer", "decoding", "windows", "grammar")
"""Modules of `echogen.bench.speed.cases`, in the order of the table."""

NO_CASE = {
    "codebook_grad": "a part of the backward of gumbel_st_embed and of its head form",
    "decode_members": "a part of decode_attention with prefixes, done once for many calls",
    "swiglu_pair": "the kernel of swiglu, fed by two projections instead of a fused one",
}
"""Operators without an entry, and why. A backward is measured with its forward."""


class Make(Protocol):
    """Makes inputs: random ones for measuring, or shapes alone for compiling and counting."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal."""
        ...

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1), float32."""
        ...

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in low … high − 1."""
        ...


@dataclass(frozen=True)
class Drawn:
    """Random inputs, drawn on the device that uses them."""

    generator: torch.Generator

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        on = self.generator.device
        return torch.randint(low, high, shape, generator=self.generator, device=on)


@dataclass(frozen=True)
class ShapesOnly:
    """Tensors on the meta device: of any size at once, without memory."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def uniform(self, *shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")


@dataclass(frozen=True)
class Floor:
    """The least cost of any implementation; the slowest of the four sets the time.

    Attributes:
        bytes: least traffic to and from device memory.
        flops: of matrix products.
        issues: per-thread instructions outside matrix products (128 per clock and multiprocessor).
        specials: logarithms, exponentials and square roots (16 per clock and multiprocessor).
    """

    bytes: int
    flops: int = 0
    issues: int = 0
    specials: int = 0

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.issues + other.issues,
            self.specials + other.specials,
        )


@dataclass(frozen=True)
class Peer:
    """Another library's operator.

    Attributes:
        name: as the table shows it.
        package: distribution, as pip names it.
        load: imports it and returns the call; raises ImportError where it is absent.
        reaches: outputs it computes, in its order, including all graded ones; empty: all.
        on_cpu: it also runs on a CPU.
    """

    name: str
    package: str
    load: Callable[[], Run]
    reaches: tuple[str, ...] = ()
    on_cpu: bool = False


@dataclass(frozen=True)
class Case:
    """How one operator is measured.

    Attributes:
        operator: its name, as registered.
        sizes: named shapes: "tiny" for a CPU, the others for a GPU.
        inputs: makes the arguments of one size in one float type.
        run: this project's operator.
        eager: the same in plain torch, as one would write it without the operator. With float64
            inputs it is the yardstick, so it computes in no lower precision than its inputs.
        outputs: names of what both return, in order.
        floor: the least cost of a forward or a backward, from dims and bytes per float.
        variant: distinguishes several cases of one operator.
        trains: inputs that get a gradient; none: forward only.
        graded: outputs whose gradient is taken.
        dtypes: float types measured on a GPU; on a CPU it is float32.
        only: the only float type that can be measured, on a CPU too; None: any.
        bounds: largest accepted ‖found − yardstick‖ / ‖yardstick‖, by float type.
        mismatches: share of an integer output that may differ (ties within rounding).
        forgotten: inputs replaced by None once results are checked, such as noise that is only
            needed to compare them.
        graphed: sizes timed as replays of a CUDA graph and forward only, as decoding runs them.
        uncompiled: why torch.compile is not timed; empty: it is.
        peers: other libraries.
    """

    operator: str
    sizes: Mapping[str, Dims]
    inputs: Callable[[Make, Dims, torch.dtype], Inputs]
    run: Run
    eager: Run
    outputs: tuple[str, ...]
    floor: Callable[[Dims, int, Pass], Floor]
    variant: str = ""
    trains: tuple[str, ...] = ()
    graded: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    only: torch.dtype | None = None
    bounds: Mapping[torch.dtype, float] = field(default_factory=lambda: dict(BOUNDS))
    mismatches: float = 1e-3
    forgotten: tuple[str, ...] = ()
    graphed: tuple[str, ...] = ("decoding",)
    uncompiled: str = ""
    peers: tuple[Peer, ...] = ()

    @property
    def name(self) -> str:
        """Operator and variant."""
        return f"{self.operator}:{self.variant}" if self.variant else self.operator

    def types(self, device: str) -> tuple[torch.dtype, ...]:
        """Float types measured on "cpu" or "cuda"."""
        if self.only is not None:
            return (self.only,)
        return self.dtypes if device == "cuda" else (torch.float32,)

    def modes(self, size: str) -> tuple[Mode, ...]:
        """Modes measured at a size."""
        trained = self.trains and size not in self.graphed
        return ("forward", "backward", "both") if trained else ("forward",)

    def cost(self, dims: Dims, itemsize: int, mode: Mode) -> Floor:
        """Return the floor of a mode; that of "both" is the sum of both passes."""
        if mode != "both":
            return self.floor(dims, itemsize, mode)
        return self.floor(dims, itemsize, "forward") + self.floor(dims, itemsize, "backward")


def cases() -> dict[str, Case]:
    """Return every entry by name, in the table's order. Registers the operators."""
    modules = [importlib.import_module(f"echogen.bench.speed.cases.{name}") for name in MODULES]
    return {case.name: case for module in modules for case in module.CASES}


def named(operators: Sequence[str]) -> list[Case]:
    """Return the cases that match names of operators or cases, or all cases if there are no names.
    Raises ValueError."""
    known = cases()
    for name in operators:
        if name not in {c.operator for c in known.values()} | known.keys():
            there = ", ".join(dict.fromkeys(c.operator for c in known.values()))
            raise ValueError(f"operator {name}: unknown; choose {there}")
    return [c for c in known.values() if not operators or {c.operator, c.name} & set(operators)]


def short(dtype: torch.dtype) -> str:
    """A type's name without "torch."."""
    return str(dtype).removeprefix("torch.")
