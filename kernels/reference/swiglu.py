"""Plain-torch SwiGLU: the oracle of every test and the CPU path. Rows are taken in chunks, so that
float32 memory is bounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.kernels.reference.precision import widen

CHUNK = 1024


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up for gate and up [N, F]; [N, F], contiguous."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for i in range(0, len(gate), CHUNK):
        rows = slice(i, i + CHUNK)
        out[rows] = (F.silu(widen(gate[rows])) * up[rows]).to(out.dtype)
    return out


def backward_into(d_gate: Tensor, d_up: Tensor, d_out: Tensor, gate: Tensor, up: Tensor) -> None:
    """Write the gradients of gate and up [N, F]."""
    for i in range(0, len(gate), CHUNK):
        rows = slice(i, i + CHUNK)
        g, d = widen(gate[rows]), widen(d_out[rows])
        sigmoid = g.sigmoid()
        d_gate[rows] = (d * up[rows] * sigmoid * (1 + g * (1 - sigmoid))).to(d_gate.dtype)
        d_up[rows] = (d * g * sigmoid).to(d_up.dtype)
