"""What runs the rows of a scheduler's cache (`engine.serving.slots`), each at its own place: the
transformer as it is, a GPU's operators, or packed weights."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from echogen.engine.cache import KVCache, Prefix, WindowCache
from echogen.engine.cpu.native import NativeTransformer, Sequences
from echogen.engine.cpu.packed import Frame, PackedTransformer, Stream, attend
from echogen.engine.cpu.packed_decode import run_prompts
from echogen.engine.gpu.device import DeviceTransformer, Places
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.ranges import span
from echogen.engine.serving.prefixes import SharedPrefixes
from echogen.kernels.overlap import overlapping


class Runner(Protocol):
    """A transformer over the rows of a cache."""

    def run_prompt(self, prompt: list[int]) -> Prefix:
        """Run a prompt alone and unpadded: what it leaves does not depend on any other."""
        ...

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """Append image codes int64 [R] at places ``at`` int64 [R] of the leading R rows, all below
        ``read``; image logits [R, V], which the next step may overwrite."""
        ...


class Sharer(Protocol):
    """A `Runner` whose cache has the rows' own codes alone: what they begin with lies elsewhere,
    once for all rows that begin with the same `Prefix` object."""

    def hold(self, row: int, prefix: Prefix | None) -> None:
        """From now on a row begins with a prefix, or (None) with nothing."""
        ...

    def move(self, old: int, new: int) -> None:
        """What a row begins with to another one, which holds nothing; its codes are the cache's."""
        ...


def run_plainly(model: UnifiedTransformer, table: Tensor, prompt: list[int]) -> Prefix:
    """Run a prompt by the transformer as it is."""
    device, length = table.device, len(prompt)
    ids, slot = torch.tensor([prompt], device=device), torch.arange(length, device=device)
    cache = KVCache(model.config, 1, length, table.dtype, device)
    with span("engine/prefill/run", rows=1, tokens=length):
        hidden = model(model.embed_text(ids), slot, "causal", cache)
        return Prefix(cache.block[:, :, 0], model.image_head(hidden[:, -1])[0])


class PlainRows:
    """`Runner` on the transformer as it is, for any device and type."""

    def __init__(self, model: UnifiedTransformer, code_table: Tensor, cache: WindowCache) -> None:
        self._model, self._table, self._cache = model, code_table, cache
        self._slot = torch.arange(cache.capacity, device=code_table.device)

    def run_prompt(self, prompt: list[int]) -> Prefix:
        """See `Runner`."""
        return run_plainly(self._model, self._table, prompt)

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`."""
        at = at[:, None]
        self._cache.open(at, read)
        embedded = self._table[codes].unsqueeze(1)
        mask = additive_mask((self._slot[:read] <= at).unsqueeze(1), embedded.dtype)
        return self._model.image_head(self._model(embedded, at, mask, self._cache)[:, 0])


class DeviceRows:
    """`Runner` and `Sharer` whose steps run on a GPU's operators, each recorded and replayed.

    They are recorded at once, for every number of rows: later a request would wait for it, and
    memory that is not there is to be missed now. The largest comes first, so that the others find
    all they need in what it took.

    Args:
        model: what runs the layers.
        cache, scales: of the rows' own codes, see `Slots`.
        counts: the numbers of rows steps come in.
        prompt_tokens: of the longest prompt.
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

        # It refers to no part of this object, as steps that are not recorded would keep that.
        def launch(count: int) -> None:
            codes, at = every[:, :count].unbind(0)
            keys, values = cache.block[:, :, :count].unbind(0)
            own = None if scales is None else scales[:, :, :count]
            with overlapping(device):  # from the lookup on, which takes no part
                embedded = table.index_select(0, codes)
                slots, prefixes = at - shared.starts(count), shared.of(count)
                places = Places(slots, slots + 1, at, keys, values, prefixes, own)
                logits[:count] = model.logits(embedded, places)

        # Drawings of the same model run between these steps, in the memory of its own recorder.
        recorder = model.recorder.apart()
        # In the weights' own type, as a step recorded under autocast would stay under it.
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

    def run_prompt(self, prompt: list[int]) -> Prefix:
        """See `Runner`."""
        return run_plainly(self._model.plain, self._model.table, prompt)

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`; a row reads what it holds, whatever ``read`` is."""
        count = len(codes)
        self._shared.get_ready(count)
        self._codes[:count], self._at[:count] = codes, at
        self._runs[count]()
        return self._logits[:count]


class NativeRows:
    """`Runner` and `Sharer` in C++; a row reads what it holds, whatever ``read`` is. A prompt's
    keys and values are read where they lie, by all that ``hold`` them."""

    def __init__(self, model: NativeTransformer, code_table: Tensor, cache: WindowCache) -> None:
        self._model = model
        self._rows = Sequences(model, code_table, [(own, None) for own in cache.block.unbind(2)])
        self._row = torch.arange(cache.block.shape[2], device=code_table.device)
        self._lengths = torch.zeros_like(self._row)  # of what stands before a row's codes

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

    def run_prompt(self, prompt: list[int]) -> Prefix:
        """See `Runner`."""
        return self._model.run_prompts([tuple(prompt)])[0]

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`."""
        count = len(codes)
        return self._rows.run(codes, self._row[:count], at - self._lengths[:count])


class PackedRows:
    """`Runner` by PyTorch's operations; see `packed_decode.PackedDecoding`, whose steps it
    makes with a place of its own for each row.

    Args:
        shapes: rows and codes of the steps that will be run; their buffers are made beforehand.
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

    def run_prompt(self, prompt: list[int]) -> Prefix:
        """See `Runner`."""
        return run_prompts(self._model, torch.tensor([prompt]), torch.zeros(1))[0]

    def step(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """See `Runner`."""
        return self._run(codes[:, None], at[:, None], read)

    def window(self, codes: Tensor, at: Tensor, read: int) -> Tensor:
        """Write image codes int64 [R, W] at places ``at`` int64 [R] and on of the leading R rows,
        all below ``read``; the image logits [R, W, V] behind each."""
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
