"""One drawing on packed weights: the prompts, then a step per code, its views made in advance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.engine.cache import Prefix
from echogen.engine.cpu.packed import Frame, PackedTransformer, Stream, attend
from echogen.engine.model import additive_mask
from echogen.engine.ranges import span

LANES = 32
"""bfloat16 numbers in a register; see PackedDecoding's ``_up_to_edge``."""


class PackedDecoding:
    """One drawing on packed weights: the cache, and everything a step needs, made in advance.

    The cache is one block [2, layers, R·kv_heads, S, K], keys first: a step writes one slot of it
    and reads views of what is filled, made for all layers at once.

    Args:
        model: the packed weights.
        code_table: [V, D], the embeddings of image codes, in the weights' type.
        ids, pads: prompts int64 [R, L], padded on the left by ``pads`` [R].
        steps: image tokens T.
        guided: the second half of the rows is unconditional; the prefixes of their prompts are kept
            in ``model.prefixes`` for later drawings.
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
        self._lanes = 1 if dtype == torch.float32 else LANES
        capacity = self._capacity(length + steps - 1)
        self._end = 0
        self._frame = Frame(c, rows, 1, dtype)
        self._stream = Stream(rows, c.width, c.norm_eps, dtype)
        block = torch.empty(2, c.layers, rows * c.kv_heads, capacity, c.head_dim, dtype=dtype)
        self._keys, self._values = block[0].transpose(-1, -2), block[1]
        self._block = block.view(2, c.layers, rows, c.kv_heads, capacity, c.head_dim)
        self._places = self._block.unbind(-2)

        self._tail: Tensor | None = None
        if self._lanes > 1:
            block.zero_()  # a weight of 0 on NaN would still be NaN
            self._tail = torch.zeros(capacity + LANES, dtype=dtype)
            self._tail[capacity:] = float("-inf")

        slot = torch.arange(capacity)
        ragged = any(self._pads)
        positions = (slot[length:] - pads[:, None]) if ragged else slot[None, length:]
        # Slots after the last code hold nothing that is read, but still need a valid position.
        positions = positions.clamp(max=c.max_positions - 1)
        # One [R or 1, 1, heads + kv_heads, K/2] per step.
        self._turns = model.turns(positions).unsqueeze(2).unbind(1)
        token = (slot >= pads[:, None])[:, None]
        self._mask = for_heads(token, c.kv_heads, dtype) if ragged else None

    def _capacity(self, tokens: int) -> int:
        """Slots of the cache for a prompt and its codes."""
        return self._up_to_edge(tokens)

    def _up_to_edge(self, keys: int) -> int:
        """How many keys are read. In bfloat16, softmax sums in a different order if the keys end
        within a register, so they are extended to its edge, with the additional ones masked."""
        return -(-keys // self._lanes) * self._lanes

    def prefill(self) -> Tensor:
        """Run the prompts, equal ones once; return the image logits [R, V] of their last tokens."""
        found = prefixes_of(self._model, self._ids, self._pads, self._conditional)
        self._end = self._ids.shape[1]
        for row, (pad, prefix) in enumerate(zip(self._pads, found, strict=True)):
            # Weights of 0 on uninitialised memory could still make NaN.
            self._block[:, :, row, :, :pad].zero_()
            self._block[:, :, row, :, pad : self._end].copy_(prefix.keys_values)
        return torch.stack([prefix.logits for prefix in found])

    def step(self, code: Tensor) -> Tensor:
        """Append image codes int64 [N] to R = N (with guidance 2N) rows; return logits [R, V]."""
        model, stream, frame, end = self._model, self._stream, self._frame, self._end
        embedded = self._table.index_select(0, code)
        stream.x.view(-1, *embedded.shape).copy_(embedded)
        turn, places = self._turns[end - self._ids.shape[1]], self._places[end].unbind(1)
        self._end = read = end = end + 1
        if self._tail is not None:
            read = self._up_to_edge(end)
        keys, values = self._keys[..., :read].unbind(0), self._values[:, :, :read].unbind(0)
        mask = None if self._mask is None else self._mask[..., :read]
        if self._tail is not None:
            first = len(self._tail) - LANES - end
            tail = self._tail[first : first + read]
            mask = tail if mask is None else mask + tail
        for block, place, key, value in zip(model.blocks, places, keys, values, strict=True):
            block.project(stream, frame, turn)
            place.copy_(frame.new)
            frame.query.copy_(frame.queries)
            attend(frame, key, value, mask)
            block.finish(stream, frame)
        return model.image_logits(stream)


def for_heads(visible: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Visibility [R or 1, L, S] → additive mask [R·kv_heads or 1, 1, L, S]."""
    mask = additive_mask(visible, dtype)
    return mask if len(mask) == 1 else mask.repeat_interleave(kv_heads, 0)


def prefixes_of(
    model: PackedTransformer, ids: Tensor, pads: list[int], conditional: int
) -> list[Prefix]:
    """Return the prefixes of prompts int64 [R, L], padded on the left by ``pads``; equal ones run
    once. The first ``conditional`` rows are run together; the others, unconditional or negative,
    may be kept from earlier drawings (``model.prefixes``)."""
    cache = model.prefixes
    prompts = [tuple(row[pad:]) for row, pad in zip(ids.tolist(), pads, strict=True)]
    places = {prompt: row for row, prompt in reversed(list(enumerate(prompts[:conditional])))}
    held = list(places.values())
    drawn = dict(
        zip(
            places,
            run_prompts(model, ids[held], torch.tensor([pads[row] for row in held])),
            strict=True,
        )
    )
    found = [drawn[prompt] for prompt in prompts[:conditional]]
    for prompt in prompts[conditional:]:
        # Alone and unpadded: what is kept must not depend on the rest of a batch.
        prefix = cache.get(prompt)
        if prefix is None:
            prefix = run_prompts(model, torch.tensor([prompt]), torch.zeros(1))[0]
            cache.put(prompt, prefix)
        found.append(prefix)
    return found


def run_prompts(model: PackedTransformer, ids: Tensor, pads: Tensor) -> list[Prefix]:
    """Run prompts [U, L], padded on the left by ``pads`` [U]; return their prefixes."""
    with span("engine/prefill/run", rows=len(ids), tokens=ids.numel()):
        return _run(model, ids, pads)


def _run(model: PackedTransformer, ids: Tensor, pads: Tensor) -> list[Prefix]:
    c, embedded = model.config, model.embed_text(ids)
    (count, length), dtype = ids.shape, embedded.dtype
    block = torch.empty(2, c.layers, count, c.kv_heads, length, c.head_dim, dtype=dtype)
    keys, values = block.flatten(2, 3).unbind(0)
    frame = Frame(c, count, length, dtype)
    stream = Stream(count * length, c.width, c.norm_eps, dtype)
    stream.x.copy_(embedded.flatten(0, 1))
    visible = torch.ones(1, length, length, dtype=torch.bool).tril()
    slot, end_mask = torch.arange(length), None
    positions = slot
    if pads.any():
        token = slot >= pads[:, None]
        # A pad sees itself: a row of nothing but -inf would turn into NaN.
        visible = (visible & token[:, None]) | torch.eye(length, dtype=torch.bool)
        positions = (slot - pads[:, None]).clamp(min=0)
        end_mask = for_heads(token[:, None], c.kv_heads, dtype)
    turns = model.turns(positions)
    mask = for_heads(visible, c.kv_heads, dtype)
    last = len(model.blocks) - 1
    for i, packed in enumerate(model.blocks):
        packed.project(stream, frame, turns)
        block[:, i].copy_(frame.keys_values)
        if i < last:
            frame.query.copy_(frame.queries)
            attend(frame, keys[i].mT, values[i], mask)
            packed.finish(stream, frame)
    # Only the last token of the last layer is read.
    end, end_stream = Frame(c, count, 1, dtype), Stream(count, c.width, c.norm_eps, dtype)
    end_stream.x.copy_(stream.x.view(count, length, -1)[:, -1])
    end.query.copy_(frame.queries[..., -1:, :])
    attend(end, keys[last].mT, values[last], end_mask)
    model.blocks[last].finish(end_stream, end)
    logits = model.image_logits(end_stream)
    return [Prefix(block[:, :, i, :, pad:], logits[i]) for i, pad in enumerate(pads.int().tolist())]


LEAST = 4
"""Least number of codes in a window; see PackedWindows."""


class PackedWindows(PackedDecoding):
    """A drawing on packed weights whose steps take several codes, anywhere after the prompt.

    A code's logits do not depend on the rows that are run with it, to the last bit. oneDNN's
    blocked products give a row the same numbers among 1 row as among 64, and MKL's batched products
    of attention among 4 or more, so windows shorter than ``LEAST`` are padded to it. A masked key
    has a weight of exactly 0. Windows of one code are therefore sequential decoding in the same
    arithmetic: in bfloat16 that of `PackedDecoding`, which in float32 rounds differently. All this
    was observed, not promised (AMD EPYC, Zen 5, torch 2.13). Where a library's rounding of a row
    depends on its neighbours, as in torch 2.11 in float32 among 16 or more rows, or in bfloat16 on
    a CPU with AMX, codes are the same except those within rounding.
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
        super().__init__(model, code_table, ids, pads, steps, guided)
        # Slots not written yet are masked; a weight of 0 on NaN would still be NaN.
        self._block.zero_()
        (rows, self._length), c = ids.shape, model.config
        capacity = self._block.shape[-2]
        slot, starts = torch.arange(capacity), pads[:, None] if any(self._pads) else pads[:1, None]
        # For every slot, its rotation and what it sees. Rows without pads share one of each.
        self._turn = model.turns((slot - starts).clamp(0, c.max_positions - 1))
        seen = (slot <= slot[:, None]) & (slot >= starts[..., None])
        self._seen = additive_mask(seen, code_table.dtype).squeeze(1)
        self._slot, self._row = slot, torch.arange(len(starts))[:, None]
        self._head_slot = torch.arange(rows * c.kv_heads).view(rows, c.kv_heads, 1) * capacity
        self._flat = self._block.view(2, c.layers, -1, c.head_dim).unbind(1)
        self._buffers = dict[int, tuple[Frame, Stream]]()

    def window(self, codes: Tensor, first: list[int]) -> Tensor:
        """See `Windows`. If all rows are at the same position (as for a single image), they write a
        view of the cache and read views of the tables; otherwise they use indices."""
        model, rows, asked = self._model, len(self._ids), codes.shape[1]
        width = max(asked, LEAST)
        if width > asked:
            codes = F.pad(codes, (0, width - asked))
        frame, stream = self._buffers_for(width)
        embedded = self._table.index_select(0, codes.flatten())
        stream.x.view(-1, *embedded.shape).copy_(embedded)
        begin, end = self._length + min(first), self._length + max(first) + width
        read = self._up_to_edge(end)
        together = end - begin == width
        if together:
            turn, seen = self._turn[:, begin:end], self._seen[:, begin:end, :read]
            places = self._block[..., begin:end, :].unbind(1)
        else:
            begins = torch.tensor(first * (rows // len(first)))[:, None] + self._length
            slots = begins + self._slot[:width]
            turn, seen = self._turn[self._row, slots], self._seen[self._row, slots, :read]
            places, index = self._flat, (self._head_slot + slots[:, None]).flatten()
        mask = seen.unsqueeze(1)
        if len(mask) > 1:
            mask = mask.repeat_interleave(model.config.kv_heads, 0)
        keys, values = self._keys[..., :read].unbind(0), self._values[:, :, :read].unbind(0)
        for block, place, key, value in zip(model.blocks, places, keys, values, strict=True):
            block.project(stream, frame, turn)
            if together:
                place.copy_(frame.keys_values)
            else:
                place.index_copy_(1, index, frame.keys_values.flatten(1, 3).to(place.dtype))
            frame.query.copy_(frame.queries)
            attend(frame, key, value, mask)
            block.finish(stream, frame)
        return model.image_logits(stream).view(rows, width, -1)[:, :asked]

    def _capacity(self, tokens: int) -> int:
        """As in `PackedDecoding`, with room for a padded window at the end."""
        return self._up_to_edge(tokens + LEAST)

    def _buffers_for(self, width: int) -> tuple[Frame, Stream]:
        """Return the buffers for a width, made once: the window's own, or a narrower one at the
        image's end."""
        if width not in self._buffers:
            c, rows, dtype = self._model.config, len(self._ids), self._table.dtype
            frame = Frame(c, rows, width, dtype)
            self._buffers[width] = frame, Stream(rows * width, c.width, c.norm_eps, dtype)
        return self._buffers[width]
