"""What memory tests share."""

from __future__ import annotations

import torch

from echogen.bench.memory import peak_bytes

__all__ = ["peak_bytes", "untouched"]


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An argument for `peak_bytes`, with a gradient where the type can have one."""
    made = torch.zeros(shape, dtype=dtype, device="meta")
    return made.requires_grad_(dtype.is_floating_point)
