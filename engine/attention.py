"""Softmax attention over whole sequences, by the implementation that suits the device best.
Attention of one query per sequence over a cache is elsewhere: in `kernels.decode_attention`, and on
a CPU in `engine/cpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.engine.flex import BlockMask, blocked_attention

Mask = Tensor | BlockMask | Literal["causal"] | None
"""What a query sees: an additive mask in the query's type [B or 1, 1, L, S]; a FlexAttention block
mask; "causal": itself and everything before it (S = L); None: every key."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """softmax(q·kᵀ/√K + mask)·v for q [B, H, L, K], k and v [B, kv_heads, S, K].

    A causal mask runs on flash-attn where that is installed (`flash_attention`) and has a kernel
    (`flash_can`), else on the same algorithm in PyTorch, which an additive mask would rule out.
    """
    if isinstance(mask, BlockMask):
        return blocked_attention(query, key, value, mask)
    groups = query.shape[1] // key.shape[1]
    if isinstance(mask, str):
        flash = flash_attention() if flash_can(query) else None
        if flash is not None:
            tokens_first = (t.transpose(1, 2) for t in (query, key, value))
            return flash(*tokens_first, causal=True).transpose(1, 2)
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=groups > 1
        )
    if torch.is_grad_enabled() and query.device.type == "cpu":
        # Training on a CPU: the plain product is 4x faster than SDPA in bfloat16, forward and
        # backward (64 rows x 4 heads x 128 tokens on one core: 23 against 88 ms).
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
        if mask is not None:
            scores = scores + mask
        return torch.matmul(scores.softmax(-1), value)
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=groups > 1)


def flash_can(query: Tensor) -> bool:
    """Whether flash-attn has a kernel for these queries [..., K]: 16-bit, on a GPU of compute
    capability 8.0 or later, with K at most 256 and a multiple of 8."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@cache
def flash_attention() -> Callable[..., Tensor] | None:
    """Return flash-attn's function of q, k and v [B, L, heads, K] (Dao 2023), or None where the
    package is not installed.

    Raises:
        ImportError: it is installed but does not load, as happens with a build for another PyTorch.
    """
    if find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ImportError(
            f"flash-attn is installed and does not load ({error}): reinstall it for PyTorch "
            f"{torch.__version__}, or uninstall it, and PyTorch's own attention runs"
        ) from error
    found: Callable[..., Tensor] = flash_attn_func
    return found


def plan_no_shapes(device: torch.device) -> None:
    """On a GPU, keep torch's attention off cuDNN, for the whole process. On Hopper, torch 2.11 and
    later prefer cuDNN, which makes a plan for every new shape; the flash and the memory-efficient
    kernels need none. Prompts, growing caches and windows have many shapes, each run only a few
    times."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
