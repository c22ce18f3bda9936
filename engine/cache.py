"""Key-value caches: a static one for a decode, and the prefixes that many drawings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from echogen.engine.config import ModelConfig
from echogen.kernels.rope import scaled_heads

PREFIX_BYTES = 1 << 26
"""Default budget, in bytes, for the prefixes of recurring prompts."""


class KVCache:
    """Keys and values of every layer for a batch of rows of equal length.

    Args:
        config: shapes of the model.
        rows: sequences held (B).
        capacity: tokens per sequence (S).
        dtype, device: of the stored keys and values.

    Attributes:
        keys, values: for each layer [B, kv_heads, S, head_dim].
        length: tokens written so far; the next write goes after them.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (2 * config.layers, rows, config.kv_heads, capacity, config.head_dim)
        self._block = torch.empty(shape, dtype=dtype, device=device)
        self.keys, self.values = self._halves(self._block)
        self.capacity = capacity
        self.length = 0
        self._window = (-1, -1)

    @property
    def block(self) -> Tensor:
        """The whole cache as one tensor [2, layers, B, kv_heads, S, head_dim], keys first."""
        return self._block.unflatten(0, (2, -1))

    @staticmethod
    def _halves(block: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        layers = block.unbind(0)
        return layers[: len(layers) // 2], layers[len(layers) // 2 :]

    def _open(self, end: int) -> None:
        """Make all layers' views at once: of slots ``length`` … ``end``, and of everything up to
        ``end``. A step of a 6-layer model took 1.33 ms, against 1.38 ms with slices per layer."""
        if end > self.capacity:
            raise ValueError(
                f"cache of {self.capacity} tokens cannot hold {end}; make it with a larger capacity"
            )
        self._window = (self.length, end)
        self._new = self._halves(self._block[:, :, :, self.length : end])
        self._seen = self._halves(self._block[:, :, :, :end])

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``key`` and ``value`` [B, kv_heads, n, head_dim] after ``length`` and return views
        of everything up to and including them. ``advance`` moves ``length`` once every layer has
        written.

        Raises:
            ValueError: more tokens than the cache was made for.
        """
        end = self.length + key.shape[2]
        if self._window != (self.length, end):
            self._open(end)
        self._new[0][layer].copy_(key)
        self._new[1][layer].copy_(value)
        return self._seen[0][layer], self._seen[1][layer]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more per row as written."""
        self.length += tokens


class WindowCache(KVCache):
    """A cache whose rows are written at their own slots, repeatedly: a window of drafted codes
    overwrites what the previous one left.

    It starts at zero: slots not written yet are masked, but a weight of 0 on uninitialised memory
    could still give NaN.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, rows, capacity, dtype, device)
        self._block.zero_()
        self._rows = torch.arange(rows, device=device)[:, None]

    def open(self, slots: Tensor, end: int) -> None:
        """Set up the next forward: it runs the leading B rows, writes their n tokens at ``slots``
        int64 [B, n], and sees all slots below ``end``."""
        self._slots, self.length = slots, end

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache.append`; the slots are those of ``open``."""
        rows = len(self._slots)
        for held, new in ((self.keys[layer], key), (self.values[layer], value)):
            held[self._rows[:rows], :, self._slots] = new.transpose(1, 2)
        end = self.length
        return self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end]

    def advance(self, tokens: int) -> None:
        """Do nothing: ``open`` says where the next forward writes."""


@dataclass(frozen=True)
class Prefix:
    """The result of running a prompt: ``keys_values`` [2, layers, kv_heads, L, K], keys first, and
    the ``logits`` [V] after its last token."""

    keys_values: Tensor
    logits: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys_values.nbytes + self.logits.nbytes


def put_prefix(
    block: Tensor, scales: Tensor | None, places: Sequence[int | slice], keys_values: Tensor
) -> None:
    """Copy keys and values to the beginning of each of ``places`` in a ``block``
    [2, layers, B, kv_heads, S, K]. The places are either slices of n rows, for keys and values
    [2, layers, n, kv_heads, L, K], or single rows, for keys and values without n. An 8-bit block
    has ``scales`` [layers, 2, B, kv_heads, S]."""
    length = keys_values.shape[-2]
    if scales is None:
        for place in places:
            block[:, :, place, :, :length] = keys_values
        return
    # One layer at a time: float32 copies of all layers would take several times what 8 bits save.
    for layer, each in enumerate(keys_values.unbind(1)):
        held, factors = scaled_heads(each)
        for place in places:
            block[:, layer, place, :, :length] = held
            scales[layer, :, place, :, :length] = factors


class PrefixCache:
    """Prefixes by prompt; any thread may use it. Drawings share their unconditional prompts
    (Janus's is the same for all prompts of equal length); on the tiny model, running one takes as
    long as four steps.

    Args:
        budget: the most bytes held; above it, the least recently used prefixes are dropped.
    """

    def __init__(self, budget: int = PREFIX_BYTES) -> None:
        self._budget, self._held = budget, dict[tuple[int, ...], Prefix]()
        self._turn = Lock()

    def get(self, key: tuple[int, ...]) -> Prefix | None:
        """Return the prefix of a prompt, or None if it is not held."""
        with self._turn:
            found = self._held.pop(key, None)
            if found is not None:
                self._held[key] = found
            return found

    def put(self, key: tuple[int, ...], prefix: Prefix) -> None:
        """Store a copy of a prefix, unless it alone exceeds the budget."""
        if prefix.nbytes > self._budget:
            return
        copy = Prefix(prefix.keys_values.clone(), prefix.logits.clone())
        with self._turn:
            self._held[key] = copy
            held = sum(p.nbytes for p in self._held.values())
            while held > self._budget:
                held -= self._held.pop(next(iter(self._held))).nbytes
