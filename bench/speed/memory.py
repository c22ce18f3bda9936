"""How much memory each operator that trains holds at its worst, beside eager torch.

`torch.cuda`'s allocator answers this on a GPU (`echogen bench kernels`); here the tensors that both
make are counted, of the shapes of training and without making them.
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
"""Shapes of training, and where they say how many images, those of a batch of Cycle RL too."""


def run(operators: Sequence[str] = ()) -> dict[str, Any]:
    """Count; JSON-ready.

    Args:
        operators: names of operators or cases; none: all that train.

    Returns:
        ``memory``, a row a case, shape and float type: MiB of forward and backward beyond the
        inputs, and of it the gradients, which nothing can do without; and the environment.

    Raises:
        ValueError: no such operator, or one that does not train.
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
