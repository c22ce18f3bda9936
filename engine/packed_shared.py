"""Drawing many images of few prompts on packed weights: a prompt's keys and values lie in memory
once and are multiplied by the queries of its whole group at a time.

In a rollout much of what a step reads would be copies of prompts: with 45 tokens of prompt and 64
codes nearly all keys and values at the start and two fifths at the end. 64 images of the tiny model
in groups of eight take 1.28 times as long on copies, and 70 MiB instead of 48 (one thread of an AMD
EPYC; bench/results/rollout-cpu.json, where ``echogen:copies`` draws on them).
`kernels.decode_attention` shares prefixes on CUDA; on a CPU it is the oracle of its tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from echogen.engine.config import ModelConfig
from echogen.engine.packed import Frame, PackedTransformer, Stream
from echogen.engine.packed_decode import prefixes_of

LEAST_ROWS, LEAST_SHARE, MOST_SECTIONS = 16, 4, 4
"""Rows from which, rows a different prompt from which, and sections up to which sharing pays."""


@dataclass(frozen=True)
class Section:
    """Rows from ``first`` on: ``groups`` times ``size`` neighbours with one prompt."""

    first: int
    groups: int
    size: int

    @property
    def end(self) -> int:
        """The first row behind it."""
        return self.first + self.groups * self.size

    @property
    def leaders(self) -> range:
        """The first row of each group."""
        return range(self.first, self.end, self.size)


def sections(ids: Tensor) -> list[Section]:
    """Rows [R, L] as sections of groups of equal size, in order."""
    sizes = [len(list(run)) for _, run in groupby(ids.tolist())]
    found, first = list[Section](), 0
    for size, alike in groupby(sizes):
        groups = len(list(alike))
        found.append(Section(first, groups, size))
        first = found[-1].end
    return found


def worth_sharing(ids: Tensor, dtype: torch.dtype) -> bool:
    """Whether prompts int64 [R, L] are to be drawn by `SharedDecoding`. In bfloat16 a code's sums
    are the same bits whatever is drawn beside it (see `PackedWindows`), and stay so."""
    if dtype != torch.float32 or len(ids) < LEAST_ROWS:
        return False
    found = sections(ids)
    groups = sum(section.groups for section in found)
    return len(found) <= MOST_SECTIONS and groups * LEAST_SHARE <= len(ids)


class _Shared:
    """The prompts of one section, and what attention over them needs."""

    def __init__(
        self, section: Section, c: ModelConfig, frame: Frame, pads: list[int], length: int
    ) -> None:
        self.section = section
        kv, dim, shared = c.kv_heads, c.head_dim, c.heads // c.kv_heads
        groups, size, rows = section.groups, section.size, slice(section.first, section.end)
        # A weight of 0 on what memory held before could make NaN.
        self.block = block = torch.zeros(2, c.layers, groups, kv, length, dim)
        flat = block.flatten(2, 3)
        self.keys, self.values = flat[0].transpose(-1, -2).unbind(0), flat[1].unbind(0)
        own = (groups, size, kv, shared, dim)
        query = torch.empty(groups, kv, size, shared, dim)
        # Of the frame, rows of this section, a group's beside each other head by head.
        self._asked = frame.query.squeeze(-2)[rows].view(own).transpose(1, 2)
        self._query, self._queries = query, query.view(groups * kv, size * shared, dim)
        self._mixed = frame.mixed.squeeze(-2)[rows].view(own).transpose(1, 2)
        self._shape = (groups, kv, size, shared, -1)
        starts = torch.tensor([pads[row] for row in section.leaders])
        self._mask: Tensor | None = None
        if starts.any():
            hidden = torch.arange(length) < starts[:, None]
            mask = torch.zeros(groups, length).masked_fill_(hidden, float("-inf"))
            self._mask = mask.repeat_interleave(kv, 0).unsqueeze(1)
        self._rows = slice(section.first * kv, section.end * kv)
        self._weights = torch.empty(groups * kv, size * shared, length)
        self._length = length

    def part(self, scores: Tensor) -> Tensor:
        """Of scores [R·kv, G, L + t] the section's prompts', [groups, kv, size, G, L]."""
        groups, kv, size, *_ = self._shape
        mine = scores[self._rows, :, : self._length]
        return mine.unflatten(0, (groups, size, kv)).transpose(1, 2)

    def score(self, layer: int, into: Tensor) -> None:
        """Scores of the frame's queries over the prompts, into a view by ``part``."""
        self._query.copy_(self._asked)
        found = torch.bmm(self._queries, self.keys[layer])
        if self._mask is not None:
            found.add_(self._mask)
        into.copy_(found.view(self._shape))

    def mix(self, layer: int, weights: Tensor) -> None:
        """The weighted values of the prompts, into the frame; ``weights``: a view by ``part``."""
        self._weights.view(self._shape).copy_(weights)
        self._mixed.copy_(torch.bmm(self._weights, self.values[layer]).view(self._shape))


class SharedDecoding:
    """One drawing on packed float32 weights whose rows keep their own codes alone; see `Decoding`
    and, for the arguments, `PackedDecoding`."""

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
        rows, self._length = ids.shape
        self._frame = Frame(c, rows, 1, torch.float32)
        self._stream = Stream(rows, c.width, c.norm_eps, torch.float32)
        self._shared = [
            _Shared(section, c, self._frame, self._pads, self._length) for section in sections(ids)
        ]
        self._done, own = 0, max(1, steps - 1)
        block = torch.empty(2, c.layers, rows * c.kv_heads, own, c.head_dim)
        self._keys, self._values = block[0].transpose(-1, -2), block[1]
        self._places = block.view(2, c.layers, rows, c.kv_heads, own, c.head_dim).unbind(-2)
        positions = torch.arange(self._length, self._length + own)
        starts = pads[:, None] if any(self._pads) else pads[:1, None]
        self._turns = model.turns(positions - starts).unsqueeze(2).unbind(1)
        self._scores = torch.empty(rows * c.heads * (self._length + own))

    @property
    def held(self) -> int:
        """Tokens of prompts in the cache, each prompt's once."""
        return self._length * sum(shared.section.groups for shared in self._shared)

    def prefill(self) -> Tensor:
        """See `Decoding`."""
        found = prefixes_of(self._model, self._ids, self._pads, self._conditional)
        for shared in self._shared:
            for group, row in enumerate(shared.section.leaders):
                pad, prefix = self._pads[row], found[row]
                shared.block[:, :, group, :, pad:].copy_(prefix.keys_values)
        return torch.stack([prefix.logits for prefix in found])

    def step(self, code: Tensor) -> Tensor:
        """See `Decoding`."""
        model, frame, stream = self._model, self._frame, self._stream
        embedded = self._table.index_select(0, code)
        stream.x.view(-1, *embedded.shape).copy_(embedded)
        turn, places = self._turns[self._done], self._places[self._done].unbind(1)
        self._done = done = self._done + 1
        keys, values = self._keys[..., :done].unbind(0), self._values[:, :, :done].unbind(0)
        rows, shared_heads, _ = frame.query_rows.shape
        width = self._length + done
        scores = self._scores[: rows * shared_heads * width].view(rows, shared_heads, width)
        parts = [shared.part(scores) for shared in self._shared]
        own = scores[..., self._length :]
        for layer, (block, place) in enumerate(zip(model.blocks, places, strict=True)):
            block.project(stream, frame, turn)
            place.copy_(frame.new)
            frame.query.copy_(frame.queries)
            own.copy_(torch.bmm(frame.query_rows, keys[layer]))
            for shared, part in zip(self._shared, parts, strict=True):
                shared.score(layer, part)
            torch.softmax(scores, -1, out=scores)
            for shared, part in zip(self._shared, parts, strict=True):
                shared.mix(layer, part)
            frame.mixed_rows.baddbmm_(own, values[layer])
            block.finish(stream, frame)
        return model.image_logits(stream)
