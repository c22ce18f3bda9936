"""FlexAttention: attention that skips the blocks which a mask leaves empty (torch's own, fused by
its compiler). Packed training batches run on it on a GPU, where a dense mask would be most of the
work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Side of a block of the mask; rows are best a multiple of it."""


VARIANTS = 32
"""Of the compiled operator; torch's limit is 8, and some seven have been counted in one run: types,
with and without gradients, and rows of the first shape, of any other, and a single one. Behind the
limit torch would go on unfused, with all scores in memory (5.9 GB a layer for Janus-Pro 1B)."""


@cache
def _compiled() -> Any:
    """The operator, made at first use: on a machine without a GPU it never is."""
    return torch.compile(flex_attention)


def _fused() -> Any:
    """The compiled operator, with its limit raised in this thread: torch's settings are a thread's
    own, and where activations are checkpointed autograd's thread runs a forward again."""
    config: Any = torch._dynamo.config
    if config.recompile_limit < VARIANTS or not config.fail_on_recompile_limit_hit:
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        config.fail_on_recompile_limit_hit = True
    return _compiled()


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q·kᵀ/√K) over what ``mask`` shows, times v; for q [B, H, L, K], k and v
    [B, kv_heads, L, K].

    On a CPU it runs unfused, over all scores, and has no gradient: there it serves as a check.
    """
    run = _fused() if query.is_cuda else flex_attention
    out: Tensor = run(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    return out
