"""Softmax attention over whole sequences, the way that is best where it runs. One query a sequence
over a cache is another job: `kernels.decode_attention`, and on a CPU `engine/cpu`."""

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
"""What a query sees: additive in its type [B or 1, 1, L, S]; blocks of FlexAttention; "causal",
itself and what is before it (S = L); None: every key."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """softmax(q·kᵀ/√K + mask)·v for q [B, H, L, K], k and v [B, kv_heads, S, K].

    A causal one runs on flash-attn where that is installed and can (`flash_attention`), else on the
    same algorithm in PyTorch, which an additive mask would keep it from.
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
    """Whether flash-attn has a kernel for such queries [..., K]: 16 bits, on a GPU of compute
    capability 8.0 or later, heads of at most 256 in steps of 8."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@cache
def flash_attention() -> Callable[..., Tensor] | None:
    """flash-attn's function of q, k and v [B, L, heads, K] (Dao 2023), or None where the package is
    not installed.

    Raises:
        ImportError: it is installed and does not load, which its builds do beside another PyTorch.
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
    """On a GPU, keep torch's attention off cuDNN, for the whole process: on Hopper torch 2.11 and
    later take it first, and it makes a plan for every new shape, where the flash and the
    memory-efficient kernels need none. Prompts, growing caches and windows are of many shapes, each
    run a few times."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
