"""Drawing: prefill the prompts once, then one image code a step for every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from echogen.engine.cache import KVCache
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.packed import PackedTransformer, packable
from echogen.engine.packed_decode import PackedDecoding
from echogen.engine.sampler import Sampler

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class Decoding(Protocol):
    """One drawing of R rows: the prompts first, then code after code."""

    def prefill(self) -> Tensor:
        """Run the prompts; image logits [R, V] of their last tokens."""
        ...

    def step(self, code: Tensor) -> Tensor:
        """Append image codes int64 [N], to both halves of R = 2N rows with guidance; the next
        image logits [R, V]."""
        ...


class PlainDecoding:
    """A drawing on the transformer as it is, for any device and type.

    Args:
        model: the transformer.
        code_table: [V, D], ``model.code_table()``; an image code's embedding is one lookup.
        ids, pads: ``left_padded`` prompts, int64 [R, L] and [R].
        steps: image tokens T.
    """

    def __init__(
        self, model: UnifiedTransformer, code_table: Tensor, ids: Tensor, pads: Tensor, steps: int
    ) -> None:
        self._model, self._table, self._ids = model, code_table, ids
        rows, length = ids.shape
        device, dtype = code_table.device, code_table.dtype
        self._cache = KVCache(model.config, rows, length + steps - 1, dtype, device)
        slot = torch.arange(length + steps - 1, device=device)
        ragged = bool(pads.any())
        self._positions = (slot - pads[:, None]).clamp(min=0) if ragged else slot
        causal = slot[None, :length, None] >= slot[None, None, :length]
        kept = slot[None, None, :] >= pads[:, None, None]
        # A pad sees itself: a row of nothing but -inf would turn into NaN.
        seen = (causal & kept[:, :, :length]) | torch.eye(length, dtype=torch.bool, device=device)
        self._mask = additive_mask(seen if ragged else causal, dtype)
        self._step_mask = additive_mask(kept, dtype) if ragged else None

    def prefill(self) -> Tensor:
        """See `Decoding`."""
        embedded = self._model.embed_text(self._ids)
        positions = self._positions[..., : self._ids.shape[1]]
        hidden = self._model(embedded, positions, self._mask, self._cache)
        return self._model.image_head(hidden[:, -1])

    def step(self, code: Tensor) -> Tensor:
        """See `Decoding`."""
        end = self._cache.length
        embedded = self._table[code].repeat(len(self._ids) // len(code), 1).unsqueeze(1)
        mask = None if self._step_mask is None else self._step_mask[..., : end + 1]
        positions = self._positions[..., end : end + 1]
        return self._model.image_head(self._model(embedded, positions, mask, self._cache)[:, 0])


def left_padded(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, L], padded on the left, and how many pads each row has, int64 [B]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    return ids, torch.tensor([longest - len(p) for p in prompts])


@torch.inference_mode()
def decode_image(
    model: UnifiedTransformer | PackedTransformer,
    code_table: Tensor,
    prompts: list[list[int]],
    sampler: Sampler,
    pad: int,
    progress: Progress | None = None,
) -> Tensor:
    """Draw one image for each prompt.

    Args:
        model: the transformer; a plain one is packed for this call where it can be, so a caller
            that draws often packs it once.
        code_table: [V, D], ``model.code_table()``.
        prompts: N prompts ending in begin-of-image; with guidance 2N, conditional ones first.
        sampler: made for N samples; decides whether rows are guided.
        pad: id that fills shorter prompts on the left, where nothing attends to it.
        progress: called after every step.

    Returns:
        Image codes int64 [N, T].
    """
    ids, pads = (t.to(code_table.device) for t in left_padded(prompts, pad))
    rows, steps, guided = len(ids), model.config.image_tokens, sampler.sampling.cfg != 1
    if isinstance(model, UnifiedTransformer) and packable(model):
        model = PackedTransformer(model, rows)
    decoding: Decoding = (
        PlainDecoding(model, code_table, ids, pads, steps)
        if isinstance(model, UnifiedTransformer)
        else PackedDecoding(model, code_table, ids, pads, steps, guided)
    )
    images = rows // 2 if guided else rows
    codes = torch.empty(images, steps, dtype=torch.int64, device=code_table.device)
    logits = decoding.prefill()
    for step in range(steps):
        code = codes[:, step] = sampler(logits, step)
        if progress is not None:
            progress(step + 1, steps)
        if step + 1 < steps:
            logits = decoding.step(code)
    return codes
