"""One drawing on packed weights: the prompts, then a step a code, its views cut beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.engine.cache import Prefix
from echogen.engine.model import additive_mask
from echogen.engine.packed import Frame, PackedTransformer, Stream, attend


class PackedDecoding:
    """One drawing on packed weights: the cache, and everything a step needs cut beforehand.

    The cache is one block [2, layers, R·kv_heads, S, K], keys first: a step writes one place of it
    and reads all layers' views of what is filled, cut in two operations.
    """

    def __init__(
        self,
        model: PackedTransformer,
        code_table: Tensor,
        ids: Tensor,
        pads: Tensor,
        steps: int,
        guided: bool,
    ) -> None:
        c = model.config
        self._model, self._table, self._ids, self._pads = model, code_table, ids, pads.tolist()
        self._conditional = len(ids) // 2 if guided else len(ids)
        (rows, length), dtype = ids.shape, code_table.dtype
        capacity = length + steps - 1
        self._end = 0
        self._frame = Frame(c, rows, 1, dtype)
        self._stream = Stream(rows, c.width, c.norm_eps, dtype)
        block = torch.empty(2, c.layers, rows * c.kv_heads, capacity, c.head_dim, dtype=dtype)
        self._keys, self._values = block[0].transpose(-1, -2), block[1]
        self._block = block.view(2, c.layers, rows, c.kv_heads, capacity, c.head_dim)
        self._places = self._block.unbind(-2)
        self._new = self._frame.keys_values.squeeze(-2)

        slot = torch.arange(capacity)
        ragged = any(self._pads)
        positions = (slot[length:] - pads[:, None]) if ragged else slot[None, length:]
        # One [R or 1, 1, heads + kv_heads, K/2] a step.
        self._turns = model.turns[positions].unsqueeze(2).unbind(1)
        self._mask = self._for_heads((slot >= pads[:, None])[:, None]) if ragged else None

    def _for_heads(self, visible: Tensor) -> Tensor:
        """Visibility [R or 1, L, S] → additive mask [R·kv_heads or 1, 1, L, S]."""
        mask = additive_mask(visible, self._table.dtype)
        heads = 1 if len(mask) == 1 else self._model.config.kv_heads
        return mask.repeat_interleave(heads, 0)

    def prefill(self) -> Tensor:
        """Run the prompts, each different one once; image logits [R, V] of their last tokens."""
        keys = [(pad, *row) for pad, row in zip(self._pads, self._ids.tolist(), strict=True)]
        kept, first = self._model.prefixes, dict[tuple[int, ...], int]()
        found = {key: prefix for key in keys if (prefix := kept.get(key)) is not None}
        for row, key in enumerate(keys):
            if key not in found:
                first.setdefault(key, row)
        fresh = self._run_prompts(list(first.values())) if first else []
        for (key, row), prefix in zip(first.items(), fresh, strict=True):
            found[key] = prefix
            if row >= self._conditional:
                kept.put(key, prefix)
        self._end = self._ids.shape[1]
        for row, key in enumerate(keys):
            self._block[:, :, row, :, : self._end].copy_(found[key].keys_values)
        return torch.stack([found[key].logits for key in keys])

    def _run_prompts(self, rows: list[int]) -> list[Prefix]:
        """The prompts of some rows, run from the start."""
        model, c, dtype = self._model, self._model.config, self._table.dtype
        ids, pads = self._ids[rows], torch.tensor([self._pads[i] for i in rows])
        count, length = ids.shape
        block = torch.empty(2, c.layers, count, c.kv_heads, length, c.head_dim, dtype=dtype)
        keys, values = block.flatten(2, 3).unbind(0)
        frame = Frame(c, count, length, dtype)
        stream = Stream(count * length, c.width, c.norm_eps, dtype)
        stream.x.copy_(model.embed_text(ids).flatten(0, 1))
        visible = torch.ones(1, length, length, dtype=torch.bool).tril()
        turns, end_mask = model.turns[:length], None
        if pads.any():
            kept = torch.arange(length) >= pads[:, None]
            # A pad sees itself: a row of nothing but -inf would turn into NaN.
            visible = (visible & kept[:, None]) | torch.eye(length, dtype=torch.bool)
            turns = model.turns[(torch.arange(length) - pads[:, None]).clamp(min=0)]
            end_mask = self._for_heads(kept[:, None])
        mask = self._for_heads(visible)
        last = len(model.blocks) - 1
        for i, packed in enumerate(model.blocks):
            packed.project(stream, frame, turns)
            block[:, i].copy_(frame.keys_values)
            if i < last:
                frame.query.copy_(frame.queries)
                attend(frame, keys[i].mT, values[i], mask)
                packed.finish(stream, frame)
        # Of the last layer only the last token is read.
        end, end_stream = Frame(c, count, 1, dtype), Stream(count, c.width, c.norm_eps, dtype)
        end_stream.x.copy_(stream.x.view(count, length, -1)[:, -1])
        end.query.copy_(frame.queries[..., -1:, :])
        attend(end, keys[last].mT, values[last], end_mask)
        model.blocks[last].finish(end_stream, end)
        logits = model.image_logits(end_stream)
        return [Prefix(block[:, :, i], logits[i]) for i in range(count)]

    def step(self, code: Tensor) -> Tensor:
        """Append image codes int64 [N] (to R = N or, with guidance, 2N rows); logits [R, V]."""
        model, frame, stream, end = self._model, self._frame, self._stream, self._end
        embedded = self._table.index_select(0, code)
        stream.x.view(-1, *embedded.shape).copy_(embedded)
        turn, places = self._turns[end - self._ids.shape[1]], self._places[end].unbind(1)
        self._end = end = end + 1
        keys, values = self._keys[..., :end].unbind(0), self._values[:, :, :end].unbind(0)
        mask = None if self._mask is None else self._mask[..., :end]
        for block, place, key, value in zip(model.blocks, places, keys, values, strict=True):
            block.project(stream, frame, turn)
            place.copy_(self._new)
            frame.query.copy_(frame.queries)
            attend(frame, key, value, mask)
            block.finish(stream, frame)
        return model.image_logits(stream)
