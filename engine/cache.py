"""Static key-value cache: one allocation per decode, written in place, read as a view."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.engine.config import ModelConfig


class KVCache:
    """Keys and values of every layer for a batch of rows of equal length.

    Args:
        config: shapes of the model.
        rows: sequences held (B).
        capacity: tokens per sequence (S).
        dtype, device: of the stored keys and values.

    Attributes:
        keys, values: lists over layers of [B, kv_heads, S, head_dim].
        length: tokens written so far; the next write goes behind them.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, rows, config.kv_heads, capacity, config.head_dim)
        # One block for all layers; unbound once, since indexing it per layer and step costs time.
        self.keys = list(torch.empty(shape, dtype=dtype, device=device).unbind(0))
        self.values = list(torch.empty(shape, dtype=dtype, device=device).unbind(0))
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``key`` and ``value`` [B, kv_heads, n, head_dim] behind ``length`` and return views
        of everything up to and including them. ``advance`` moves ``length`` once all layers wrote.
        """
        end = self.length + key.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more per row as written.

        Raises:
            ValueError: more tokens than the cache was made for.
        """
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"cache of {self.capacity} tokens cannot hold {self.length} + {tokens}; "
                "make it with a larger capacity"
            )
        self.length += tokens
