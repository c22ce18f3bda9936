"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the update of a matrix is
orthogonalised, so that all of its directions move by about as much.

`torch.optim.Muon` updates one matrix at a time and always multiplies in bfloat16. Here matrices of
one shape are updated together, in the dtype of the rest of the step: on a CPU without bfloat16
instructions, a step of the tiny model's 24 matrices took 7.0 s in bfloat16 and 0.38 s in float32
(AMD EPYC of 2021, one thread).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from echogen.train.parallel.whole import like, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's, of the quintic a·x + b·x³ + c·x⁵: steepest at 0 among those that keep (0, 1] below
1.3."""
ITERATIONS = 5
EPS = 1e-7


def orthogonalised(matrices: Tensor) -> Tensor:
    """Turn every matrix U·S·Vᵀ of [N, A, B] into about U·Vᵀ by the Newton–Schulz iteration:
    singular values above a hundredth of the matrix's Frobenius norm end up in 0.68 … 1.14.

    A matrix of zeros stays zero. The products have the dtype of ``matrices``.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, decoupled weight decay, and a rate that serves AdamW as well:
    an update's root mean square is about 0.2 (Liu et al. 2025, arXiv 2502.16982).

    Args:
        params: matrices. Sharded ones (DTensor) are gathered for their update, by all processes.
        lr: learning rate.
        weight_decay: λ; a step begins with W ← (1 − lr·λ)·W.
        momentum: share of the running mean that is kept.
        dtype: dtype of the iteration's products.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        params = list(params)
        for p in params:
            if p.dim() != 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)}; Muon is for matrices")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; no closure is accepted."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            same_shape = defaultdict[torch.Size, list[nn.Parameter]](list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, members in same_shape.items():
                wanted = [whole(self._direction(p, group["momentum"])) for p in members]
                updates = orthogonalised(torch.stack(wanted).to(self.dtype))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(like(update, p), alpha=-rate)

    def _direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)
