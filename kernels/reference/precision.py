"""The precision in which references calculate, and all implementations keep sums."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The float type to calculate in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """The tensor in its `wide_type`."""
    return x.to(wide_type(x.dtype))
