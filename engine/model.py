"""The unified transformer: one decoder that reads and writes text tokens and image codes.

Shape legend: B rows, L tokens, S cached tokens, D width, H heads, K head_dim, V codebook, C code.
The same module trains and infers; `engine/checkpoints/weights.py` maps it onto Janus checkpoints.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from echogen.engine.attention import Mask, attention
from echogen.engine.cache import KVCache
from echogen.engine.config import ModelConfig
from echogen.kernels.rope import rope
from echogen.kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """RoPE tables in the half-split convention of Llama, looked up by position."""

    def __init__(self, head_dim: int, positions: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.build(positions)

    def build(self, positions: int) -> None:
        """Fill the tables for ``positions`` positions (also after a load onto the meta device)."""
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), self.theta**-half)
        device = self.cos.device if self.cos.device.type != "meta" else None
        # sin carries the sign of rotate_half, so that a rotation is x*cos + roll(x)*sin.
        self.cos = torch.cat((angle.cos(), angle.cos()), -1).to(device)
        self.sin = torch.cat((-angle.sin(), angle.sin()), -1).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype, fused: bool) -> Rotation:
        """Return the rotation at positions [B, L] or [L], int64, in ``dtype``."""
        if positions.dim() == 1:
            positions = positions.unsqueeze(0)
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        if fused:
            below, above = sin.chunk(2, -1)
            return Rotation(cos, torch.cat((-below, above), -1), True)
        return Rotation(cos.unsqueeze(-2), sin.unsqueeze(-2), False)


class Rotation(NamedTuple):
    """The rotation of every token. For ``rotate``, cos and sin are [B or 1, L, 1, K]. If ``fused``,
    they are for the operator `kernels.rope.rope`: [B or 1, L, K], sin without the sign of
    rotate_half."""

    cos: Tensor
    sin: Tensor
    fused: bool


def trains_fused(x: Tensor) -> bool:
    """Whether a forward runs rotation and SwiGLU on the operators: on a GPU, with gradients. In
    plain torch they are most of the memory traffic there besides the matrix products. At Janus-Pro
    1B's width the traffic is 726 kB per token and layer, forward and backward, against 394 kB on
    the operators."""
    return x.is_cuda and torch.is_grad_enabled() and x.dtype != torch.float64


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [B, L, H, K] by position (RoFormer, Su et al. 2021)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    """One pre-norm decoder layer: fused qkv, attention, SwiGLU with a fused gate-up weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.attn_norm = RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.gate_up = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        B, L, _ = x.shape
        heads = self.qkv(self.attn_norm(x)).view(B, L, -1, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in self._rotated(heads, rotation))
        if cache is not None:
            key, value = cache.append(layer, key, value)
        attended = attention(query, key, value, mask).transpose(1, 2).reshape(B, L, -1)
        x = x + self.out(attended)
        gate_up = self.gate_up(self.mlp_norm(x))
        if rotation.fused:
            return x + self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def _rotated(self, heads: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """All heads [B, L, H + 2·kv_heads, K] → queries and keys, rotated, and values."""
        if rotation.fused:
            # Split once, so that backward joins the parts in one piece.
            query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
            return *rope(query, key, rotation.cos, rotation.sin), value
        turned = self.heads + self.kv_heads
        rotated = rotate(heads[:, :, :turned], rotation.cos, rotation.sin)
        return rotated[:, :, : self.heads], rotated[:, :, self.heads :], heads[:, :, turned:]


def run_again(
    block: nn.Module,
    x: Tensor,
    rotation: Rotation,
    mask: Mask,
    layer: int,
) -> Tensor:
    """Run a block and keep only its input; backward runs the block once more (activation
    checkpointing, Chen et al. 2016). There is no cache. A block draws no random numbers, so no
    random state is kept."""
    own, args = dict(block.named_parameters()), (x, rotation, mask, None, layer)
    if all(isinstance(p, nn.Parameter) for p in own.values()):
        kept = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    else:  # tensors that a functional_call put in; they are gone by the time of backward
        kept = checkpoint(
            functional_call, block, own, args, use_reentrant=False, preserve_rng_state=False
        )
    assert isinstance(kept, Tensor)
    return kept


class Projector(nn.Module):
    """``depth`` linear layers with GELU between them: codes or pixel features → residual width."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if i else x)
        return x


class UnifiedTransformer(nn.Module):
    """Text tokens and image codes in, text logits and image logits out.

    Two embeddings (text rows; code rows of width C lifted by a projector) feed one decoder, and
    two heads read it. The caller's mask decides what a token may see, so generation, grounding and
    the packed training sequence use the same forward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.text_embedding = nn.Embedding(c.vocab_size, c.width)
        self.code_embedding = nn.Embedding(c.codebook_size, c.code_dim)
        self.code_aligner = Projector(c.code_dim, c.width, c.aligner_depth)
        self.pixel_aligner = Projector(c.pixel_dim, c.width, c.pixel_aligner_depth)
        self.rotary = Rotary(c.head_dim, c.max_positions, c.rope_theta)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.checkpointing = False  # in training: see `run_again`
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.text_head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.image_head = nn.Sequential(
            nn.Linear(c.width, c.head_width), nn.GELU(), nn.Linear(c.head_width, c.codebook_size)
        )
        if c.tied:
            self.text_head.weight = self.text_embedding.weight

    def initialise(self, seed: int, std: float = 0.02) -> None:
        """Draw fresh weights from ``seed``: normal(0, std), projections into the residual stream
        scaled by 1/√(2·layers) (GPT-2), biases 0, gains 1. They are drawn on the model's device, so
        a GPU and a CPU give different weights."""
        generator = torch.Generator(self.norm.weight.device).manual_seed(seed)
        residual = std / (2 * self.config.layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 1.0 if name.endswith("norm.weight") else 0.0)
            else:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, 0, residual if into_residual else std, generator)
        # Codes are 8 numbers wide: at std 0.02 they would all look alike to the aligner.
        nn.init.normal_(self.code_embedding.weight, 0, 1.0, generator)
        first = self.code_aligner.get_parameter("layers.0.weight")
        nn.init.normal_(first, 0, first.shape[1] ** -0.5, generator)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Text ids [...] → [..., D]."""
        return self.text_embedding(ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Image codes [...] → [..., D]."""
        return self.code_aligner(self.code_embedding(codes))

    def embed_pixels(self, features: Tensor) -> Tensor:
        """SigLIP features [..., pixel_dim] → [..., D]."""
        return self.pixel_aligner(features)

    def code_table(self) -> Tensor:
        """All code embeddings [V, D]; in decoding a lookup replaces embedding and aligner."""
        return self.code_aligner(self.code_embedding.weight)

    def embed_mixed(self, ids: Tensor) -> Tensor:
        """Text ids, or ``vocab_size + code`` for image codes [...] → [..., D].

        One lookup in both tables: in a training batch the codebook is smaller than the number of
        image tokens, so lifting each code once is cheaper.
        """
        return F.embedding(ids, torch.cat((self.text_embedding.weight, self.code_table())))

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the decoder.

        Args:
            embeddings: [B, L, D].
            positions: [B, L] or [L], int64; RoPE positions.
            mask: see `attention.Mask`; S = cached + L, but blocks and "causal" cover only the L.
                None (every key) is right for a single decoded token.
            cache: keys and values of earlier tokens; extended by these L.

        Returns:
            Final hidden states [B, L, D], normed.
        """
        # In the precision of the matrix products, as in the port; with float32 tables, every
        # rotation under autocast would convert to float32 and back.
        kind = embeddings.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else embeddings.dtype
        rotation = self.rotary(positions, dtype, trains_fused(embeddings))
        x = embeddings
        again = self.checkpointing and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            if again:
                x = run_again(block, x, rotation, mask, i)
            else:
                x = block(x, rotation, mask, cache, i)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean visibility [B, L, S] → additive mask [B, 1, L, S] of 0 and -inf."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)


def tree_visibility(
    tree_q: Tensor, branch_q: Tensor, tree_k: Tensor, branch_k: Tensor, causal: Tensor
) -> Tensor:
    """Which key a query sees when each sequence is a trunk with branches.

    A token sees the earlier tokens of its own tree that lie on the trunk (branch 0) or on its own
    branch. ``tree`` numbers the trees packed into one row (-1: padding), ``branch`` is 0 on the
    trunk and k on branch k. All arguments are int64 [B, L] or [B, S]; ``causal`` is bool [L, S]
    or [B, L, S]; returns bool [B, L, S]. Padding sees itself only through ``causal``'s diagonal.
    """
    same_tree = tree_q.unsqueeze(-1) == tree_k.unsqueeze(-2)
    branch_k = branch_k.unsqueeze(-2)
    return causal & same_tree & ((branch_k == 0) | (branch_k == branch_q.unsqueeze(-1)))
