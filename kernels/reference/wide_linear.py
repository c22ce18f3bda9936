"""Plain-torch linear layer for large batches, the same as that for few rows."""

from __future__ import annotations

from echogen.kernels.reference.skinny_linear import linear

__all__ = ["linear"]
