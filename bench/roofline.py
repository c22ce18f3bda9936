"""The peak rates of a device, measured where possible, as a yardstick for operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from echogen.bench.harness import seconds
from echogen.bench.registry import Floor
from echogen.bench.speed import clock
from echogen.engine.cpu.packed import packs

NUMBERS, SIDE = 1 << 28, 8192
"""Of what a GPU copies and reads, and of the matrices that it multiplies."""
LANES, SPECIAL_LANES = 128, 16
"""Instructions and special functions per clock and multiprocessor (NVIDIA, sm_80 to sm_100)."""


@dataclass(frozen=True)
class Roofline:
    """Rates of one device for one float type.

    Attributes:
        bytes_per_s: of a large copy, read and written, or of reading alone, whichever is higher;
            measured.
        flops_per_s: of a large matrix product, measured.
        issues_per_s, specials_per_s: on CUDA, multiprocessors × lanes × nominal clock. On a CPU,
            measured float32 additions, and exponentials or reciprocals, in the cache; of the last
            two the faster counts, since a floor may be too low but never too high.
    """

    bytes_per_s: float
    flops_per_s: float
    issues_per_s: float
    specials_per_s: float

    def seconds(self, floor: Floor) -> float:
        """Return the least time: that of the slowest resource, with all others overlapped."""
        return max(self._times(floor).values())

    def bound(self, floor: Floor) -> str:
        """Return the resource that sets the least time."""
        times = self._times(floor)
        return max(times, key=times.__getitem__)

    def _times(self, floor: Floor) -> dict[str, float]:
        return {
            "memory": floor.bytes / self.bytes_per_s,
            "matrix": floor.flops / self.flops_per_s,
            "issue": floor.issues / self.issues_per_s,
            "special": floor.specials / self.specials_per_s,
        }

    def or_higher(self, other: Roofline) -> Roofline:
        """Return the higher of each rate: a busy machine is measured too low, never too high."""
        rates = zip(astuple(self), astuple(other), strict=True)
        return Roofline(*(max(pair) for pair in rates))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def measure(device: torch.device, dtype: torch.dtype, working_set: int = 1 << 29) -> Roofline:
    """Measure the rates of a device, in a second or two.

    Args:
        device, dtype: the device, and the type of the matrix products.
        working_set: bytes that the copy reads and writes on a CPU. Data that is read repeatedly,
            such as a small model's weights, may lie in a cache that is faster than memory.
    """
    return _of_cuda(device, dtype) if device.type == "cuda" else _of_cpu(dtype, working_set)


def _of_cuda(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure as operators are timed, each call after a pause. Back to back, large products make a
    GPU lower its clock to keep within its power, and would give a ceiling too low for operators."""

    def seconds_of(call: clock.Call) -> float:
        return 1e-3 * clock.times(call, repeats=20)["median"]

    source = torch.zeros(NUMBERS, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    read = source.nbytes / seconds_of(source.sum)
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    multiplied = seconds_of(lambda: torch.mm(a, b))
    about = torch.cuda.get_device_properties(device)
    clocks = about.multi_processor_count * about.clock_rate * 1e3  # nominal, in kHz
    return Roofline(
        bytes_per_s=max(copied, read),
        flops_per_s=2 * SIDE**3 / multiplied,
        issues_per_s=clocks * LANES,
        specials_per_s=clocks * SPECIAL_LANES,
    )


def _of_cpu(dtype: torch.dtype, working_set: int) -> Roofline:
    """Measure with PyTorch's current number of threads, as the best of several runs."""
    source, side = torch.ones(working_set // 8), 1024
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    product = torch.empty(side, side, dtype=dtype)
    small, out = torch.rand(1 << 15), torch.empty(1 << 15)  # 128 KiB, in any second-level cache
    again = range(200)

    def best(call: Callable[[], object], runs: int = 7) -> float:
        taken = [seconds(call)]
        while len(taken) < runs and sum(taken) < 1:
            taken.append(seconds(call))
        return min(taken)

    def rate(function: Callable[..., Tensor], *arguments: Any) -> float:
        return 200 * len(small) / best(lambda: [function(*arguments, out=out) for _ in again])

    target.copy_(source)
    # Both layouts: without bfloat16 instructions, one is four times as fast as the other.
    ways: list[Callable[[], object]] = [partial(torch.mm, a, w, out=product) for w in (b, b.t())]
    if packs(dtype):  # oneDNN's layout is a tenth quicker than MKL's on an AMD EPYC (Zen 4)
        blocked = torch.ops.mkldnn._reorder_linear_weight(b, side)
        linear = torch.ops.mkldnn._linear_pointwise.default
        ways.append(lambda: linear(a, blocked, None, "none", [], "none"))
    multiplied = min(map(best, ways))
    copied = 2 * source.nbytes / best(lambda: target.copy_(source), 15)
    both = torch.ones(working_set // 4)
    return Roofline(
        bytes_per_s=max(copied, both.nbytes / best(both.sum, 15)),
        flops_per_s=2 * side**3 / multiplied,
        issues_per_s=rate(torch.add, small, 1),
        specials_per_s=max(rate(torch.exp, small), rate(torch.reciprocal, small)),
    )
