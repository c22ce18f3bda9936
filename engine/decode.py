"""Drawing: prefill the prompts once, then one image code a step for every row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echogen.engine.cache import KVCache
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.packed import PackedTransformer, packable
from echogen.engine.sampler import Sampler

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


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
        model: the transformer; a plain one is packed for this call where it can be (on the tiny
            model 13 ms of 110), so a caller that draws often packs it once.
        code_table: [V, D], ``model.code_table()``; an image code's embedding is one lookup.
        prompts: N prompts ending in begin-of-image; with guidance 2N, conditional ones first.
        sampler: made for N samples; decides whether rows are guided.
        pad: id that fills shorter prompts on the left, where nothing attends to it.

    Returns:
        Image codes int64 [N, T].
    """
    device, dtype = code_table.device, code_table.dtype
    ids, pads = left_padded(prompts, pad)
    ids, pads = ids.to(device), pads.to(device)
    rows, length = ids.shape
    steps = model.config.image_tokens
    cache = KVCache(model.config, rows, length + steps - 1, dtype, device)
    ragged = bool(pads.any())

    slot = torch.arange(length + steps - 1, device=device)
    positions = (slot - pads[:, None]).clamp(min=0) if ragged else slot
    causal = slot[None, :length, None] >= slot[None, None, :length]
    kept = slot[None, None, :] >= pads[:, None, None]
    # A pad sees itself: a row of nothing but -inf would turn into NaN.
    seen = (causal & kept[:, :, :length]) | torch.eye(length, dtype=torch.bool, device=device)
    mask = additive_mask(seen if ragged else causal, dtype)
    step_mask = additive_mask(kept, dtype) if ragged else None

    run = model
    if isinstance(model, UnifiedTransformer) and packable(model):
        run = PackedTransformer(model, rows)
    hidden = run(run.embed_text(ids), positions[..., :length], mask, cache)[:, -1]
    codes = torch.empty(rows if sampler.sampling.cfg == 1 else rows // 2, steps, dtype=torch.int64)
    codes = codes.to(device)
    for step in range(steps):
        code = sampler(run.image_head(hidden), step)
        codes[:, step] = code
        if progress is not None:
            progress(step + 1, steps)
        if step + 1 == steps:
            break
        end = length + step
        embedded = code_table[code] if len(code) == rows else code_table[code.repeat(2)]
        hidden = run(
            embedded.unsqueeze(1),
            positions[..., end : end + 1],
            None if step_mask is None else step_mask[..., : end + 1],
            cache,
        )[:, 0]
    return codes
