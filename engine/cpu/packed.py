"""Drawing on a CPU with PyTorch's operations: the transformer's weights laid out for them, and a
step made of few of them. This is for bfloat16, for large models on many threads, and for
machines without a compiler; `echogen.engine.cpu.native` draws the others.

Making a view costs as much as using it, so buffers and their views are made once per drawing, and
the norms' gains and scales are multiplied into the weights. The packed weights are a copy: its
owner must make a new one after the weights change. Measured by `echogen bench engine --peer
transformers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echogen.engine.cache import PrefixCache
from echogen.engine.config import ModelConfig
from echogen.engine.model import Block, RMSNorm, UnifiedTransformer


class PackedLinear:
    """A linear layer on a copy of its weight in oneDNN's blocked layout, which streams from memory
    faster than MKL reads a plain one (36 GB/s against 9 on a 4096×768 float32 weight) and is twice
    as fast at a prompt's 90 rows. Every call costs 10 µs, which matters only for a small model.
    (AMD EPYC, Zen 5, one thread, torch 2.13. The oneDNN operators are those that torch.compile's
    freezing emits.)

    Args:
        weight: [outputs, inputs], on the CPU, in float32 or bfloat16.
        bias: [outputs] or None.
        rows: input rows the layout is chosen for; others work too (one made for 2 rows is as fast
            at 120 as one made for 120).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._bias = None if bias is None else bias.detach().clone()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        # The overload itself: looking it up by name costs 2 µs a call.
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, inputs] → [N, outputs]."""
        return self._product(x, self._weight, self._bias, "none", [], "none")


def pairs_beside(qkv: Tensor, block: Block) -> Tensor:
    """Reorder a weight [(heads + 2·kv_heads)·K, D] of queries, keys and values so that the two
    numbers of each pair that RoPE rotates are adjacent, which leaves every dot product of a query
    with a key unchanged."""
    dim, turned = block.head_dim, block.heads + block.kv_heads
    heads = qkv.view(-1, dim, qkv.shape[1]).clone()
    beside = torch.arange(dim).view(2, dim // 2).t().flatten()
    heads[:turned] = heads[:turned, beside]
    return heads.flatten(0, 1)


def _gain_folded(norm: RMSNorm, layer: nn.Linear) -> tuple[Callable[[Stream], Tensor], Tensor]:
    """A norm without its gain, and the weight of the layer after it with the gain multiplied in.

    F.rms_norm is seven operations on a CPU, 7 µs on two rows; one norm over the stream including
    its floor column, and one division, take 2 µs. In bfloat16 ‖x‖ would be rounded, so norm and
    weight stay as they are.
    """
    if norm.weight.dtype != torch.float32:
        gain = norm.weight.detach().clone()
        return lambda stream: F.rms_norm(stream.x, norm.shape, gain, norm.eps), layer.weight

    def run(stream: Stream) -> Tensor:
        return stream.x.div(torch.linalg.vector_norm(stream.with_floor, dim=-1, keepdim=True))

    return run, layer.weight * (norm.weight * norm.weight.numel() ** 0.5)


class Stream:
    """The residual stream ``x`` [N, D], with √(D·eps) as a further column of the same buffer: the
    Euclidean norm of a whole row is √D times the root mean square with eps."""

    def __init__(self, count: int, width: int, eps: float, dtype: torch.dtype) -> None:
        self.with_floor = torch.full((count, width + 1), (width * eps) ** 0.5, dtype=dtype)
        self.x = self.with_floor[:, :width]


class Frame:
    """Buffers and views for L tokens of R rows on their way through a layer.

    RoPE is a product of complex numbers: the packed weights make the two numbers of a rotated pair
    adjacent, which leaves every dot product of a query with a key unchanged.
    """

    def __init__(self, c: ModelConfig, rows: int, tokens: int, dtype: torch.dtype) -> None:
        self.tokens = tokens
        heads = c.heads + 2 * c.kv_heads
        self.qkv = torch.empty(rows * tokens, heads * c.head_dim, dtype=dtype)
        # Complex numbers are float32; in bfloat16 the rotation runs on a copy.
        wide = self.qkv if dtype == torch.float32 else self.qkv.float()
        self.wide = None if wide is self.qkv else wide
        split = wide.view(rows, tokens, heads, c.head_dim)
        turned = split[:, :, : c.heads + c.kv_heads].unflatten(-1, (c.head_dim // 2, 2))
        self.pairs = torch.view_as_complex(turned)
        # [2, R, kv_heads, L, K], and [R, kv, G, L, K] with the query heads of a group together.
        self.keys_values = split[:, :, c.heads :].unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)
        self.new = self.keys_values.squeeze(-2) if tokens == 1 else self.keys_values
        groups = c.heads // c.kv_heads
        self.queries = split[:, :, : c.heads].unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4)
        self.query = torch.empty(rows, c.kv_heads, groups, tokens, c.head_dim, dtype=dtype)
        self.query_rows = self.query.view(rows * c.kv_heads, groups * tokens, c.head_dim)
        self.mixed = torch.empty_like(self.query)
        self.mixed_rows = self.mixed.view(self.query_rows.shape)
        self.attended = torch.empty(rows, tokens, c.kv_heads, groups, c.head_dim, dtype=dtype)
        self.attended_rows = self.attended.view(rows * tokens, c.heads * c.head_dim)
        if tokens == 1:  # then both orders are the same
            self.attended_rows = self.mixed.view(self.attended_rows.shape)
        self.gate_up = torch.empty(rows * tokens, 2 * c.mlp_width, dtype=dtype)
        self.gate, self.up = self.gate_up.chunk(2, -1)


class PackedBlock:
    """`model.Block` in evaluation, on packed weights: ``project``, attention, ``finish``."""

    def __init__(self, block: Block, rows: int) -> None:
        self._attn_norm, qkv = _gain_folded(block.attn_norm, block.qkv)
        self._qkv = PackedLinear(pairs_beside(qkv, block), None, rows)
        self._out = PackedLinear(block.out.weight, None, rows)
        self._mlp_norm, gate_up = _gain_folded(block.mlp_norm, block.gate_up)
        self._gate_up = PackedLinear(gate_up, None, rows)
        self._down = PackedLinear(block.down.weight, None, rows)

    def project(self, stream: Stream, frame: Frame, turn: Tensor) -> None:
        """Fill the frame with the rotated queries and keys, and the values, of the stream."""
        frame.qkv.copy_(self._qkv(self._attn_norm(stream)))
        if frame.wide is not None:
            frame.wide.copy_(frame.qkv)
        frame.pairs.mul_(turn)

    def finish(self, stream: Stream, frame: Frame) -> None:
        """Add attention's output and the MLP to the stream, in place."""
        stream.x.add_(self._out(frame.attended_rows))
        frame.gate_up.copy_(self._gate_up(self._mlp_norm(stream)))
        stream.x.add_(self._down(F.silu(frame.gate, inplace=True).mul_(frame.up)))


def attend(frame: Frame, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """softmax(q·kᵀ + mask)·v into ``frame.attended_rows``, for the frame's queries (scaled already,
    see ``turns``), keys [R·kv_heads, K, S], values [R·kv_heads, S, K] and mask
    [R·kv_heads or 1, 1, L, S] or None. Plain products: for two rows of 45 tokens SDPA takes 250 µs
    on a CPU, these 40."""
    scores = torch.bmm(frame.query_rows, key)
    if mask is not None:
        scores.view(len(scores), -1, frame.tokens, scores.shape[-1]).add_(mask)
    torch.bmm(scores.softmax(-1), value, out=frame.mixed_rows)
    if frame.tokens > 1:
        frame.attended.copy_(frame.mixed.permute(0, 3, 1, 2, 4))


class PackedTransformer:
    """A copy of `UnifiedTransformer`'s weights for drawing on a CPU.

    Args:
        model: on the CPU; ``packable`` says whether it can be packed.
        rows: rows the layout is chosen for; others work too.
    """

    def __init__(self, model: UnifiedTransformer, rows: int = 2) -> None:
        self.config, self._text = model.config, model.text_embedding.weight.detach().clone()
        self.blocks = [PackedBlock(b, rows) for b in model.blocks if isinstance(b, Block)]
        into, _, out = model.image_head
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        self._norm, weight = _gain_folded(model.norm, into)
        # GELU(h) = √½·(y + y·erf y) at y = √½·h. With both factors in the weights this is two
        # operations, 3 µs on two rows; F.gelu goes through oneDNN and takes 16 µs. (float32 only:
        # bfloat16 would round the sum.)
        self._plain_gelu = weight.dtype != torch.float32
        root = 1.0 if self._plain_gelu else 0.5**0.5
        self._into = PackedLinear(weight * root, into.bias * root, rows)
        self._out = PackedLinear(out.weight * root, out.bias, rows)
        c, half = model.config, model.config.head_dim // 2
        cos, sin = model.rotary.cos[:, :half], model.rotary.sin[:, half:]
        self._rope = torch.complex(cos.float(), sin.float())[:, None]
        self._scale = torch.tensor([c.head_dim**-0.5] * c.heads + [1.0] * c.kv_heads)[:, None]
        self.prefixes = PrefixCache()

    def embed_text(self, ids: Tensor) -> Tensor:
        """Text ids [...] → [..., D]."""
        return F.embedding(ids, self._text)

    def turns(self, positions: Tensor) -> Tensor:
        """RoPE at positions [...] as complex numbers [..., heads + kv_heads, K/2]; those of the
        queries include attention's 1/√K."""
        return self._rope[positions] * self._scale

    def image_logits(self, stream: Stream) -> Tensor:
        """Residual stream [R, D] → image logits [R, V]."""
        y = self._into(self._norm(stream))
        return self._out(F.gelu(y) if self._plain_gelu else torch.addcmul(y, y, y.erf()))


def packable(model: UnifiedTransformer) -> bool:
    """Whether oneDNN can run the model's products here."""
    weight = model.norm.weight
    return weight.device.type == "cpu" and packs(weight.dtype)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of such a type for this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
