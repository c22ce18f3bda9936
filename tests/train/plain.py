"""The unified transformer written out from its formulas, one sequence at a time.

On a state dict and in its type (float64 in tests), with torch alone: no module, operator, mask or
table of the project, so that an error in one of those cannot be on both sides of a comparison.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019)."""
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: Tensor, theta: float) -> Tensor:
    """RoPE (Su et al. 2021) of [L, H, K], token l at position l: numbers i and K/2 + i are a point
    in the plane, turned by l·θ^(−2i/K). Angles are float32 numbers, as Llama's are."""
    length, _, width = x.shape
    speed = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(length, dtype=torch.float32)[:, None, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, query [L, H, K] over key and value [L, H', K], of which H/H' query heads
    in a row share one."""
    shared = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        q, k, v = query[:, h], key[:, h // shared], value[:, h // shared]
        scores = q @ k.T / q.shape[-1] ** 0.5
        later = torch.arange(len(q))[None, :] > torch.arange(len(q))[:, None]
        heads.append(torch.where(later, -torch.inf, scores).softmax(-1) @ v)
    return torch.cat(heads, -1)


def hidden(w: Weights, c: Any, x: Tensor) -> Tensor:
    """The decoder on the embeddings [L, D] of one sequence; ``c`` has heads, kv_heads, head_dim,
    layers, rope_theta and norm_eps."""
    for i in range(c.layers):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items()}
        y = norm(x, block["attn_norm.weight"], c.norm_eps) @ block["qkv.weight"].T
        parts = y.view(len(x), -1, c.head_dim).split((c.heads, c.kv_heads, c.kv_heads), 1)
        query, key = (rotated(part, c.rope_theta) for part in parts[:2])
        x = x + attended(query, key, parts[2]) @ block["out.weight"].T
        y = norm(x, block["mlp_norm.weight"], c.norm_eps) @ block["gate_up.weight"].T
        gate, up = y.chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ block["down.weight"].T
    return norm(x, w["norm.weight"], c.norm_eps)


def two_layers(w: Weights, first: str, second: str, x: Tensor) -> Tensor:
    """Linear layers of these names with GELU between them."""
    x = F.gelu(x @ w[f"{first}.weight"].T + w[f"{first}.bias"])
    return x @ w[f"{second}.weight"].T + w[f"{second}.bias"]


def lifted(w: Weights, codes: Tensor) -> Tensor:
    """Rows [..., C] of the codebook, or mixtures of them → [..., D]."""
    return two_layers(w, "code_aligner.layers.0", "code_aligner.layers.1", codes)


def text_logits(w: Weights, x: Tensor) -> Tensor:
    """Of hidden states [L, D]."""
    return x @ w["text_head.weight"].T


def image_logits(w: Weights, x: Tensor) -> Tensor:
    """Of hidden states [L, D]."""
    return two_layers(w, "image_head.0", "image_head.2", x)
