"""Drawing on a CPU: the transformer's weights laid out for it, and a step made of few operations.

Two things cost time there. A step of a small model is a hundred operations of a microsecond each,
as long as their views are not cut anew every time: here buffers and views are made once for a
drawing, results are written in place, and the norms' gains lie in the weights. A step of a large
model is its weights' bytes: see `PackedLinear`. The packed weights are a copy: whoever holds one
makes a new one after the weights changed. `benchmark: echogen bench engine --peer transformers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echogen.engine.model import Block, RMSNorm, UnifiedTransformer, additive_mask

BLOCKED_FROM = 1 << 20
"""Numbers in a weight from which oneDNN's blocked layout is the faster one (see PackedLinear)."""


class PackedLinear:
    """A linear layer on a copy of its weight in the layout that a few rows read fastest.

    Decoding multiplies every weight by two rows, conditional and unconditional. A small weight is
    kept transposed for a plain product: oneDNN's own dispatch, 10 µs a call, costs more than the
    product. A large one is kept in oneDNN's blocked layout, which streams from memory faster than
    MKL reads any plain one. Those operators are what torch.compile's freezing emits.

    Args:
        weight: [outputs, inputs], on the CPU, in float32 or bfloat16.
        bias: [outputs] or None.
        rows: input rows a blocked layout is chosen for; others work too (one made for 2 rows is
            as fast at 120 as one made for 120).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._bias = None if bias is None else bias.detach()
        self._blocked = weight.numel() >= BLOCKED_FROM or weight.dtype != torch.float32
        if self._blocked:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        else:
            self._weight = weight.detach().t().contiguous()
        # The overload itself: looking it up by name costs 2 µs a call.
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [N, inputs] → [N, outputs], written into ``out`` where it is given."""
        if self._blocked:
            y: Tensor = self._product(x, self._weight, self._bias, "none", [], "none")
            return y if out is None else out.copy_(y)
        if self._bias is None:
            return torch.mm(x, self._weight, out=out)
        return torch.addmm(self._bias, x, self._weight, out=out)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """``total`` [N, outputs] += the layer's value at x, in place (no bias)."""
        if self._blocked:
            total.add_(self(x))
        else:
            total.addmm_(x, self._weight)


def _into(norm: RMSNorm, layer: nn.Linear) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A norm without its gain, and the weight of the layer behind it with the gain multiplied in.

    ‖x‖ and √(D·eps) are the legs of the root mean square. F.rms_norm is seven operations on a CPU,
    7 µs on two rows; this is 3 µs. In bfloat16 ‖x‖ would be rounded: the norm stays what it is.
    """
    if norm.weight.dtype != torch.float32:
        return norm.forward, layer.weight
    width = norm.weight.numel()
    floor = torch.tensor((width * norm.eps) ** 0.5)

    def run(x: Tensor) -> Tensor:
        return x.div(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor))

    return run, layer.weight * (norm.weight * width**0.5)


class _Frame:
    """Buffers and views for L tokens of R rows on their way through a layer.

    RoPE is a product of complex numbers: the packed weights put the two numbers of a rotated pair
    beside each other, which leaves every dot product of a query with a key as it was.
    """

    def __init__(self, model: PackedTransformer, rows: int, tokens: int, dtype: torch.dtype):
        c = model.config
        self.tokens = tokens
        heads = c.heads + 2 * c.kv_heads
        self.qkv = torch.empty(rows * tokens, heads * c.head_dim, dtype=dtype)
        # Complex numbers are float32; in bfloat16 the rotation runs on a copy.
        wide = self.qkv if dtype == torch.float32 else self.qkv.float()
        self.wide = None if wide is self.qkv else wide
        split = wide.view(rows, tokens, heads, c.head_dim)
        turned = split[:, :, : c.heads + c.kv_heads].unflatten(-1, (c.head_dim // 2, 2))
        self.pairs = torch.view_as_complex(turned)
        # [2, R, kv_heads, L, K] and, a query head beside the others of its group, [R, kv, G, L, K].
        self.keys_values = split[:, :, c.heads :].unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)
        groups = c.heads // c.kv_heads
        self.queries = split[:, :, : c.heads].unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4)
        self.query = torch.empty(rows, c.kv_heads, groups, tokens, c.head_dim, dtype=dtype)
        self.query_rows = self.query.view(rows * c.kv_heads, groups * tokens, c.head_dim)
        self.attended = torch.empty(rows, tokens, c.heads, c.head_dim, dtype=dtype)
        self.attended_rows = self.attended.view(rows * tokens, c.heads * c.head_dim)
        self.gate_up = torch.empty(rows * tokens, 2 * c.mlp_width, dtype=dtype)
        self.gate, self.up = self.gate_up.chunk(2, -1)


class _PackedBlock:
    """`model.Block` in evaluation, on packed weights: ``project``, attention, ``finish``."""

    def __init__(self, block: Block, rows: int) -> None:
        dim = block.head_dim
        self._attn_norm, qkv = _into(block.attn_norm, block.qkv)
        heads = qkv.view(-1, dim, qkv.shape[1]).clone()
        rotated = block.heads + block.kv_heads
        beside = torch.arange(dim).view(2, dim // 2).t().flatten()
        heads[:rotated] = heads[:rotated, beside]
        self._qkv = PackedLinear(heads.flatten(0, 1), None, rows)
        self._out = PackedLinear(block.out.weight, None, rows)
        self._mlp_norm, gate_up = _into(block.mlp_norm, block.gate_up)
        self._gate_up = PackedLinear(gate_up, None, rows)
        self._down = PackedLinear(block.down.weight, None, rows)

    def project(self, x: Tensor, frame: _Frame, turn: Tensor) -> None:
        """Fill the frame with rotated queries and keys, and values, of x [R·L, D]."""
        self._qkv(self._attn_norm(x), frame.qkv)
        if frame.wide is not None:
            frame.wide.copy_(frame.qkv)
        frame.pairs.mul_(turn)

    def finish(self, x: Tensor, frame: _Frame) -> None:
        """Add attention's output and the MLP to x [R·L, D], in place."""
        self._out.add_to(x, frame.attended_rows)
        self._gate_up(self._mlp_norm(x), frame.gate_up)
        self._down.add_to(x, F.silu(frame.gate, inplace=True).mul_(frame.up))


class PackedTransformer:
    """A copy of `UnifiedTransformer`'s weights for drawing on a CPU.

    Args:
        model: on the CPU; ``packable`` says whether it can be packed.
        rows: rows the layout is chosen for; others work too.
    """

    def __init__(self, model: UnifiedTransformer, rows: int = 2) -> None:
        self.config, self.embed_text = model.config, model.embed_text
        self.blocks = [_PackedBlock(b, rows) for b in model.blocks if isinstance(b, Block)]
        into, _, out = model.image_head
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        self._norm, weight = _into(model.norm, into)
        # GELU(h) = √½·(y + y·erf y) at y = √½·h: with both factors in the weights two operations,
        # 3 µs on two rows, where F.gelu goes through oneDNN and takes 16 (float32 only: bfloat16
        # would round the sum).
        self._plain_gelu = weight.dtype != torch.float32
        root = 1.0 if self._plain_gelu else 0.5**0.5
        self._into = PackedLinear(weight * root, into.bias * root, rows)
        self._out = PackedLinear(out.weight * root, out.bias, rows)
        # RoPE as complex numbers; those of the queries carry attention's 1/√K.
        c, half = model.config, model.config.head_dim // 2
        cos, sin = model.rotary.cos[:, :half], model.rotary.sin[:, half:]
        scale = torch.tensor([c.head_dim**-0.5] * c.heads + [1.0] * c.kv_heads)
        self.turns = torch.complex(cos.float(), sin.float())[:, None] * scale[:, None]

    def image_logits(self, x: Tensor) -> Tensor:
        """Residual stream [R, D] → image logits [R, V]."""
        y = self._into(self._norm(x))
        return self._out(F.gelu(y) if self._plain_gelu else torch.addcmul(y, y, y.erf()))

    def decoding(self, code_table: Tensor, ids: Tensor, pads: Tensor, steps: int) -> PackedDecoding:
        """Start a drawing; see `decode.Decoding`."""
        return PackedDecoding(self, code_table, ids, pads, steps)


class PackedDecoding:
    """One drawing on packed weights: the cache, and everything a step needs cut beforehand.

    The cache is one block [2, layers, R·kv_heads, S, K], keys first: a step writes one place of it
    and reads all layers' views of what is filled, cut in two operations.
    """

    def __init__(
        self, model: PackedTransformer, code_table: Tensor, ids: Tensor, pads: Tensor, steps: int
    ) -> None:
        c = model.config
        self._model, self._table, self._ids = model, code_table, ids
        rows, length = ids.shape
        capacity = length + steps - 1
        dtype = code_table.dtype
        self._rows, self._end = rows, 0
        self._frame = _Frame(model, rows, 1, dtype)
        block = torch.empty(2, c.layers, rows * c.kv_heads, capacity, c.head_dim, dtype=dtype)
        self._keys, self._values = block[0].transpose(-1, -2), block[1]
        self._slots = block.view(2, c.layers, rows, c.kv_heads, capacity, c.head_dim)
        self._x = torch.empty(rows, c.width, dtype=dtype)

        slot = torch.arange(capacity)
        ragged = bool(pads.any())
        positions = (slot - pads[:, None]).clamp(min=0) if ragged else slot[None]
        self._turns = model.turns[positions]  # [R or 1, S, heads + kv_heads, K/2]
        self._kept = slot >= pads[:, None]  # [R, S]
        self._mask: Tensor | None = None
        if ragged:
            rows_of_mask = additive_mask(self._kept.unsqueeze(1), dtype).squeeze(1)
            self._mask = rows_of_mask.repeat_interleave(c.kv_heads, 0)  # [R·kv_heads, 1, S]

    def prefill(self) -> Tensor:
        """Run the prompts; image logits [R, V] of their last tokens."""
        model, rows, length = self._model, self._rows, self._ids.shape[1]
        frame = _Frame(model, rows, length, self._table.dtype)
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        # A pad sees itself: a row of nothing but -inf would turn into NaN.
        visible = (visible & self._kept[:, None, :length]) | torch.eye(length, dtype=torch.bool)
        shared = self._mask is None
        mask = additive_mask(visible[:1] if shared else visible, self._table.dtype)
        x = model.embed_text(self._ids).flatten(0, 1)
        turns = self._turns[:, :length]
        self._end = length
        for i, block in enumerate(model.blocks):
            block.project(x, frame, turns)
            self._slots[:, i, :, :, :length].copy_(frame.keys_values)
            if i + 1 == len(model.blocks):
                break
            frame.query.copy_(frame.queries)
            key, value = self._slots[:, i, :, :, :length].unbind(0)
            query, grouped = frame.query.flatten(1, 2), frame.query.shape[2] > 1
            attended = F.scaled_dot_product_attention(
                query, key, value, mask, scale=1.0, enable_gqa=grouped
            )
            frame.attended.copy_(attended.transpose(1, 2))
            block.finish(x, frame)
        # Of the last layer only the last token is read.
        self._x.copy_(x.view(rows, length, -1)[:, -1])
        self._frame.query.copy_(frame.queries[..., -1:, :])
        self._attend(self._keys[-1, :, :, :length], self._values[-1, :, :length])
        model.blocks[-1].finish(self._x, self._frame)
        return model.image_logits(self._x)

    def step(self, code: Tensor) -> Tensor:
        """Append image codes int64 [N] (to R = N or, with guidance, 2N rows); logits [R, V]."""
        model, frame, x, end = self._model, self._frame, self._x, self._end
        x.view(-1, len(code), x.shape[-1]).copy_(self._table.index_select(0, code))
        turn = self._turns[:, end : end + 1]
        slots = self._slots[..., end : end + 1, :].unbind(1)
        self._end = end = end + 1
        keys, values = self._keys[..., :end].unbind(0), self._values[:, :, :end].unbind(0)
        for block, slot, key, value in zip(model.blocks, slots, keys, values, strict=True):
            block.project(x, frame, turn)
            slot.copy_(frame.keys_values)
            frame.query.copy_(frame.queries)
            self._attend(key, value)
            block.finish(x, frame)
        return model.image_logits(x)

    def _attend(self, key: Tensor, value: Tensor) -> None:
        """One token's attention, keys [R·kv_heads, K, S], values [R·kv_heads, S, K]: three plain
        products take 7 µs where SDPA takes 8, and its views as much again."""
        frame = self._frame
        scores = torch.bmm(frame.query_rows, key)
        if self._mask is not None:
            scores.add_(self._mask[..., : scores.shape[-1]])
        out = frame.attended.view(frame.query_rows.shape)
        torch.bmm(scores.softmax(-1), value, out=out)


def packable(model: UnifiedTransformer) -> bool:
    """Whether oneDNN can run the model's products here (a CPU, a type the CPU has products for)."""
    weight = model.norm.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
