"""Peak memory of each operator that trains, beside eager torch.

On a GPU, `torch.cuda`'s allocator reports this (`echogen bench kernels`). Here, the tensors that
both make are counted at the shapes of training, without allocating them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from echogen.bench.harness import environment
from echogen.bench.memory import peak_bytes
from echogen.bench.registry import Case, Dims, Inputs, Run, ShapesOnly, short
from echogen.bench.speed import contest
from echogen.bench.speed.kernels import choose

SIZE, LARGE = "training", {"images": 64}
"""Shapes of training and, for those with a number of images, also those of a Cycle RL batch."""


def run(operators: Sequence[str] = ()) -> dict[str, Any]:
    """Count; JSON-ready.

    Args:
        operators: names of operators or cases; none: all that train.

    Returns:
        ``memory``, a row per case, shape and float type: MiB of forward and backward beyond the
        inputs, and the part of it that is gradients, which nothing can avoid; and the environment.

    Raises:
        ValueError: an operator is unknown, or does not train.
    """
    rows = [
        _row(case, dims, dtype)
        for case, size in choose(operators, None, "cuda")
        if size == SIZE and "backward" in case.modes(size)
        for dims in _shapes(case.sizes[size])
        for dtype in case.types("cuda")
    ]
    if not rows:
        raise ValueError(f"operator {' '.join(operators)}: has no gradient, so nothing to count")
    return {"memory": rows} | environment()


def _shapes(dims: Dims) -> list[Dims]:
    return [dims, {**dims, **LARGE}] if LARGE.keys() <= dims.keys() else [dims]


def _row(case: Case, dims: Dims, dtype: torch.dtype) -> dict[str, Any]:
    def fresh() -> Inputs:
        return contest.own(case, case.inputs(ShapesOnly(), dims, dtype), forget=True)

    def peak(run: Run) -> int:
        return peak_bytes(contest.once(case, run, case.outputs, "both", fresh()))

    inputs = fresh()
    eager, ours = peak(case.eager), peak(case.run)
    return {
        "operator": case.name,
        "shape": " ".join(f"{k}={v}" for k, v in dims.items()),
        "dtype": short(dtype),
        "gradients_mib": sum(inputs[name].nbytes for name in case.trains) / 2**20,
        "eager_mib": eager / 2**20,
        "echogen_mib": ours / 2**20,
        "ratio": ours / eager,
    }
