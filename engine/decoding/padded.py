"""Prompts of any lengths in one forward of the plain transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echogen.engine.cache import KVCache
from echogen.engine.model import UnifiedTransformer
from echogen.engine.ranges import span


def run_padded(
    model: UnifiedTransformer, table: Tensor, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Run prompts padded on the right, where causal attention never looks: no mask is needed, and
    what a prompt leaves does not depend on what its pads hold.

    Args:
        model: runs them.
        table: the code table, for its type and device.
        prompts: P of at most L tokens.

    Returns:
        Keys and values [2, layers, P, kv_heads, L, K], keys first, and the image logits [P, V] of
        each prompt's last token.
    """
    longest, device = max(map(len, prompts)), table.device
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    slot, row = torch.arange(longest, device=device), torch.arange(len(prompts), device=device)
    ends = torch.tensor([len(p) - 1 for p in prompts], device=device)
    with span("engine/prefill/run", rows=len(ids), tokens=ids.numel()):
        cache = KVCache(model.config, len(ids), longest, table.dtype, device)
        hidden = model(model.embed_text(ids), slot, "causal", cache)
        return cache.block, model.image_head(hidden[row, ends])
