"""Plain-torch linear layer of large batches, which is that of few rows."""

from __future__ import annotations

from echogen.kernels.reference.skinny_linear import linear

__all__ = ["linear"]
