"""The prompts that a scheduler's rows continue on the GPU operators, each kept once.

The samples of a request continue one prompt, and guided images of many requests continue the same
unconditional one. Each prompt takes one place and is read once a step, whichever rows continue it.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from echogen.engine.cache import Prefix, put_prefix
from echogen.engine.gpu.device import DeviceTransformer, Prefixes
from echogen.kernels.checks import FP8
from echogen.kernels.decode_members import decode_members


class SharedPrefixes:
    """Prefixes at places of a static cache, and which of them each row holds.

    A step of the leading ``count`` rows is given the leading ``count`` places, as those rows hold
    no more. If it were given all places, the prompt of a lone row in a large scheduler would be cut
    into few parts, because many prefixes fill the device without being cut
    (`decode_attention.SPLITS`). So a prefix takes the lowest free place, and moves down when a step
    is about to run fewer rows.

    The host knows which row holds what. The device is told once, before the next step.

    Args:
        model: what runs the steps.
        counts: the numbers of rows that steps have; the largest is also the number of places.
        capacity: tokens of the longest prefix.
    """

    def __init__(self, model: DeviceTransformer, counts: Sequence[int], capacity: int) -> None:
        c, table, rows = model.config, model.table, max(counts)
        held, kind = (rows, c.kv_heads, capacity), FP8 if model.fp8_cache else table.dtype
        # Nothing past the end of a prefix is read, so it need not be written.
        self._block = torch.empty(2, c.layers, *held, c.head_dim, dtype=kind, device=table.device)
        self._scales: Tensor | None = None
        if model.fp8_cache:
            self._scales = torch.empty(c.layers, 2, *held, dtype=torch.float32, device=table.device)
        self._place = [-1] * rows  # of each row's prefix; −1: none
        # The prefix at each place, weakly: the copy here needs no other one. A place that no row
        # holds keeps its prefix until another takes the place.
        self._prefix: list[ReferenceType[Prefix] | None] = [None] * rows
        self._length = [0] * rows
        # Where each row's own codes start and which place it holds; tokens at each place.
        self._about = torch.zeros(3, rows, dtype=torch.int64, device=table.device)
        self._about[1] = -1
        self._query = table.new_empty(1, 1, 1).expand(rows, c.heads, c.head_dim)  # for its shape
        self._orders = {count: self._order(count) for count in counts}
        self._ready = 0  # rows of the step that the device is ready for

    def hold(self, row: int, prefix: Prefix | None) -> None:
        """Let a row begin with a prefix from now on, or with nothing (None)."""
        self._place[row], self._ready = -1, 0
        if prefix is not None:
            self._place[row] = self._place_of(prefix)

    def move(self, old: int, new: int) -> None:
        """Move the prefix of a row to another row."""
        self._place[new], self._place[old], self._ready = self._place[old], -1, 0

    def starts(self, count: int) -> Tensor:
        """Tokens before the leading rows' own codes, int64 [count]; 0 where a row has no prefix."""
        return self._about[0, :count]

    def of(self, count: int) -> Prefixes:
        """The prefixes that the leading rows continue, always in the same tensors."""
        keys, values = self._block[:, :, :count].unbind(0)
        _, groups, lengths = self._about[:, :count].unbind(0)
        scales = None if self._scales is None else self._scales[:, :, :count]
        return Prefixes(keys, values, lengths, groups, self._orders[count], scales)

    def get_ready(self, count: int) -> None:
        """Tell the device what a step of ``count`` rows is about to read; no row after them holds
        anything."""
        if self._ready == count:
            return
        for old in {place for place in self._place if place >= count}:
            self._move_down(old)
        held = set(self._place)
        starts = [self._length[place] if place >= 0 else 0 for place in self._place]
        lengths = [length if place in held else 0 for place, length in enumerate(self._length)]
        self._about.copy_(torch.tensor([starts, self._place, lengths]))
        self._orders[count].copy_(self._order(count))
        self._ready = count

    def _place_of(self, prefix: Prefix) -> int:
        """The place of a prefix; a new one is copied to a free place first."""
        for place, there in enumerate(self._prefix):
            if there is not None and there() is prefix:
                return place
        place = self._free()
        self._prefix[place] = None  # in case the copy fails
        put_prefix(self._block, self._scales, [place], prefix.keys_values)
        self._prefix[place], self._length[place] = ref(prefix), prefix.keys_values.shape[-2]
        return place

    def _free(self) -> int:
        """The lowest place that no row holds."""
        held = set(self._place)
        return next(place for place in range(len(self._place)) if place not in held)

    def _move_down(self, old: int) -> None:
        new, length = self._free(), self._length[old]
        self._prefix[new] = None
        for each in (self._block,) if self._scales is None else (self._block, self._scales):
            each[:, :, new, :, :length] = each[:, :, old, :, :length]
        self._prefix[new], self._prefix[old] = self._prefix[old], None
        self._length[new] = length
        self._place = [new if place == old else place for place in self._place]

    def _order(self, count: int) -> Tensor:
        return decode_members(
            self._about[1, :count], self._query[:count], self._block[0, 0, :count]
        )
