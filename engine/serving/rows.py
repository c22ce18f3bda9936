"""Runs the rows of a scheduler's cache (`engine.serving.slots`), each at its own place: on the
plain transformer, the GPU operators, C++ or packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from echogen.engine.cache import Prefix, WindowCache
from echogen.engine.cpu.native import NativeTransformer, Sequences
from echogen.engine.cpu.packed import Frame, PackedTransformer, Stream, attend
from echogen.engine.cpu.packed_decode import run_prompts
from echogen.engine.decoding.decode import left_padded
from echogen.engine.decoding.padded import run_padded
from echogen.engine.gpu.device import DeviceTransformer, Places
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.serving.prefixes import SharedPrefixes
from echogen.kernels.overlap import overlapping


class Runner(Protocol):
    """A transformer that runs over the rows of a cache."""

    def run_prompts(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """Run prompts in one forward. Alone, a prompt is not padded, and its prefix depends on
        nothing else."""
        ...

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """Append image codes int64 [R] at places ``at`` int64 [R] of the leading R rows, all below
        ``read``; return image logits [R, V], which the next step may overwrite."""
        ...


class Sharer(Protocol):
    """A `Runner` whose cache holds only the rows' own codes. Their prefixes lie elsewhere, each
    once for all rows that begin with the same `Prefix` object."""

    def hold(self, row: int, prefix: Prefix | None) -> None:
        """Let a row begin with a prefix from now on, or with nothing (None)."""
        ...

    def move(self, old: int, new: int) -> None:
        """Move the prefix of a row to another row, which holds nothing. The row's codes are in the
        cache, and are moved there."""
        ...


def run_plainly(
    model: UnifiedTransformer, table: Tensor, prompts: Sequence[Sequence[int]]
) -> list[Prefix]:
    """Run prompts on the plain transformer."""
    block, logits = run_padded(model, table, prompts)
    if len(prompts) == 1:
        return [Prefix(block[:, :, 0], logits[0])]
    # Copied, as a view would keep the keys and values of all of them, and of their pads.
    return [
        Prefix(block[:, :, i, :, : len(prompt)].clone(), logits[i])
        for i, prompt in enumerate(prompts)
    ]


class PlainRows:
    """`Runner` on the plain transformer, for any device and type."""

    def __init__(self, model: UnifiedTransformer, code_table: Tensor, cache: WindowCache) -> None:
        self._model, self._table, self._cache = model, code_table, cache
        self._slot = torch.arange(cache.capacity, device=code_table.device)

    def run_prompts(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """See `Runner`."""
        return run_plainly(self._model, self._table, prompts)

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`."""
        at = at[:, None]
        self._cache.open(at, read)
        embedded = self._table[codes].unsqueeze(1)
        mask = additive_mask((self._slot[:read] <= at).unsqueeze(1), embedded.dtype)
        return self._model.image_head(self._model(embedded, at, mask, self._cache)[:, 0])


class DeviceRows:
    """`Runner` and `Sharer` whose steps run on the GPU operators, each recorded and replayed.

    Steps of every number of rows are recorded at once: later, a request would wait for it, and a
    lack of memory should show now. The largest comes first, so that the memory it took is enough
    for the others.

    Args:
        model: what runs the layers.
        cache, scales: of the rows' own codes, see `Slots`.
        counts: the numbers of rows that steps have.
        prompt_tokens: tokens of the longest prompt.
    """

    def __init__(
        self,
        model: DeviceTransformer,
        cache: WindowCache,
        scales: Tensor | None,
        counts: list[int],
        prompt_tokens: int,
    ) -> None:
        rows, device, table = max(counts), model.table.device, model.table
        every = torch.zeros(2, rows, dtype=torch.int64, device=device)
        logits = table.new_zeros(rows, model.config.codebook_size)
        shared = SharedPrefixes(model, counts, prompt_tokens)
        self._model, self._shared = model, shared
        (self._codes, self._at), self._logits = every.unbind(0), logits

        # It does not refer to this object: steps that are not recorded would keep it alive.
        def launch(count: int) -> None:
            codes, at = every[:, :count].unbind(0)
            keys, values = cache.block[:, :, :count].unbind(0)
            own = None if scales is None else scales[:, :, :count]
            with overlapping(device):  # from the lookup on, which itself does not overlap
                embedded = table.index_select(0, codes)
                slots, prefixes = at - shared.starts(count), shared.of(count)
                places = Places(slots, slots + 1, at, keys, values, prefixes, own)
                logits[:count] = model.logits(embedded, places)

        # Drawings of the same model run between these steps, in the memory of the model's recorder.
        recorder = model.recorder.apart()
        # In the weights' own type: a step recorded under autocast would stay under it.
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            self._runs = {
                count: recorder.record(partial(launch, count))
                for count in sorted(counts, reverse=True)
            }

    def hold(self, row: int, prefix: Prefix | None) -> None:
        """See `Sharer`."""
        self._shared.hold(row, prefix)

    def move(self, old: int, new: int) -> None:
        """See `Sharer`."""
        self._shared.move(old, new)

    def run_prompts(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """See `Runner`."""
        return run_plainly(self._model.plain, self._model.table, prompts)

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`; a row reads what it holds, whatever ``read`` is."""
        count = len(codes)
        self._shared.get_ready(count)
        self._codes[:count], self._at[:count] = codes, at
        self._runs[count]()
        return self._logits[:count]


class NativeRows:
    """`Runner` and `Sharer` in C++; a row reads what it holds, whatever ``read`` is. All rows that
    ``hold`` a prefix read its keys and values where they lie."""

    def __init__(self, model: NativeTransformer, code_table: Tensor, cache: WindowCache) -> None:
        self._model = model
        self._rows = Sequences(model, code_table, [(own, None) for own in cache.block.unbind(2)])
        self._row = torch.arange(cache.block.shape[2], device=code_table.device)
        self._lengths = torch.zeros_like(self._row)  # tokens before each row's own codes

    def hold(self, row: int, prefix: Prefix | None) -> None:
        """See `Sharer`."""
        held = None if prefix is None else prefix.keys_values
        self._rows.put_before(row, held)
        self._lengths[row] = 0 if held is None else held.shape[-2]

    def move(self, old: int, new: int) -> None:
        """See `Sharer`."""
        self._rows.put_before(new, self._rows.before(old))
        self._lengths[new] = self._lengths[old]
        self.hold(old, None)

    def run_prompts(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """See `Runner`."""
        return self._model.run_prompts([tuple(prompt) for prompt in prompts])

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`."""
        count = len(codes)
        return self._rows.run(codes, self._row[:count], at - self._lengths[:count])


class PackedRows:
    """`Runner` by PyTorch's operations. It makes the steps of `packed_decode.PackedDecoding`, but
    with a place of its own for each row.

    Args:
        shapes: (rows, codes) of the steps that will be run, for which buffers are allocated here.
    """

    def __init__(
        self,
        model: PackedTransformer,
        code_table: Tensor,
        cache: WindowCache,
        shapes: list[tuple[int, int]],
    ) -> None:
        c, dtype = model.config, code_table.dtype
        self._model, self._table, block = model, code_table, cache.block
        self._keys, self._values = block.flatten(2, 3).unbind(0)
        self._places = block.view(2, c.layers, -1, c.head_dim).unbind(1)
        heads = torch.arange(block.shape[2] * c.kv_heads).view(-1, c.kv_heads)
        self._head_slot, self._slot = heads * cache.capacity, torch.arange(cache.capacity)
        self._buffers = {
            (rows, codes): (
                Frame(c, rows, codes, dtype),
                Stream(rows * codes, c.width, c.norm_eps, dtype),
            )
            for rows, codes in shapes
        }

    def run_prompts(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """See `Runner`."""
        return run_prompts(self._model, *left_padded([list(prompt) for prompt in prompts], 0))

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`."""
        return self._run(codes[:, None], at[:, None], read)

    def window(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """Write image codes int64 [R, W] of the leading R rows at the places from ``at`` int64 [R]
        on, all below ``read``; return the image logits [R, W, V] after each."""
        logits = self._run(codes, at[:, None] + self._slot[: codes.shape[1]], read)
        return logits.view(*codes.shape, -1)

    def _run(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """Codes and their places [R, W] → logits [R·W, V]."""
        model, (rows, width) = self._model, codes.shape
        kv_heads = model.config.kv_heads
        frame, stream = self._buffers[rows, width]
        stream.x.copy_(self._table.index_select(0, codes.flatten()))
        turn = model.turns(at)
        index = (self._head_slot[:rows, :, None] + at[:, None]).flatten()
        mask = additive_mask(self._slot[:read] <= at[..., None], self._table.dtype)
        mask = mask.repeat_interleave(kv_heads, 0)
        held = rows * kv_heads
        keys = self._keys[:, :held, :read].mT.unbind(0)
        values = self._values[:, :held, :read].unbind(0)
        for block, place, key, value in zip(model.blocks, self._places, keys, values, strict=True):
            block.project(stream, frame, turn)
            place.index_copy_(1, index, frame.keys_values.flatten(1, 3).to(place.dtype))
            frame.query.copy_(frame.queries)
            attend(frame, key, value, mask)
            block.finish(stream, frame)
        return model.image_logits(stream)
