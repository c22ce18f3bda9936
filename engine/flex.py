"""FlexAttention: torch's attention that skips the empty blocks of a mask, fused by its compiler.
On a GPU, packed training batches use it, because a dense mask would be most of the work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Side of a block of the mask; a row's length is best a multiple of it."""


VARIANTS = 32
"""Most variants of the compiled operator. Torch's limit is 8, and about seven have been counted in
one run: for each type, with and without gradients, for rows of the first shape, of any other shape,
and a single row. Beyond the limit torch would continue unfused, with all scores in memory (5.9 GB
per layer for Janus-Pro 1B)."""


@cache
def _compiled() -> Any:
    """Return the compiled operator, made at first use; a machine without a GPU never makes it."""
    return torch.compile(flex_attention)


def _fused() -> Any:
    """Return the compiled operator, after raising its limit in this thread: torch's settings are
    per thread, and with activation checkpointing autograd's thread runs a forward again."""
    config: Any = torch._dynamo.config
    if config.recompile_limit < VARIANTS or not config.fail_on_recompile_limit_hit:
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        config.fail_on_recompile_limit_hit = True
    return _compiled()


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q·kᵀ/√K) over the keys that ``mask`` shows, times v; for q [B, H, L, K], k and v
    [B, kv_heads, L, K].

    On a CPU it runs unfused, over all scores, and has no gradient: there it serves as a check.
    """
    run = _fused() if query.is_cuda else flex_attention
    out: Tensor = run(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    return out
