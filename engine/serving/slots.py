"""The rows that a scheduler fills: one static cache, each row with a sequence of its own length.

A slot is a row of the cache. A prompt is run by itself, and from then on a step runs all rows
together, each at its own place. In C++ and on a GPU's operators rows share a prompt's keys and
values (`rows.Sharer`). SDPA and PyTorch's products read one cache a row: there the prompt is copied
into every slot that continues it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echogen.engine.cache import PREFIX_BYTES, Prefix, PrefixCache, WindowCache, put_prefix
from echogen.engine.cpu.native import NativeTransformer
from echogen.engine.cpu.packed import PackedTransformer
from echogen.engine.decoding.decode import Decoder
from echogen.engine.decoding.jacobi import default_window
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import bucket
from echogen.engine.ranges import span
from echogen.engine.serving.rows import (
    DeviceRows,
    NativeRows,
    PackedRows,
    PlainRows,
    Runner,
    Sharer,
)
from echogen.kernels.checks import FP8

EDGE = 32
"""Keys are read up to a multiple of this, and a cache ends at one: a row's sums then end where a
register does (see `packed_decode.LANES`) and every row's cache begins alike in memory."""
WINDOW_ROWS = 16
"""Rows up to which steps of several codes win; twice as many as in one drawing
(`jacobi.MOST_ROWS`), for an image that ends leaves and makes room: 1.41 times as fast with all 16
full (`ECHOGEN_NATIVE=0 echogen bench serving --arrivals 0`)."""


def up_to_edge(keys: int) -> int:
    """The next multiple of ``EDGE``."""
    return -(-keys // EDGE) * EDGE


def row_counts(
    rows: int, invariant: bool, recorded: bool = False, any_number: bool = False
) -> list[int]:
    """The numbers of rows that steps are made for: one shape for all in batch-invariant mode, else
    1 to 4 and multiples of 4, so that a step runs at most three rows behind the last one held; the
    fewer `graphs.bucket` knows where each is ``recorded``, and all where nothing is made for a
    number."""
    if invariant:
        return [rows]
    if any_number:
        return list(range(1, rows + 1))
    if recorded:
        return sorted({min(bucket(count), rows) for count in range(1, rows + 1)})
    return sorted({*range(1, min(rows, 4) + 1), *range(4, rows, 4), rows})


def widths(counts: Sequence[int], tokens: int) -> dict[int, int]:
    """Codes of the windows of so many rows, for images of ``tokens``; the last code of an image is
    drawn and never run. Where there are more rows there are none."""
    found = {rows: min(default_window(rows), tokens - 1) for rows in counts if rows <= WINDOW_ROWS}
    return {rows: codes for rows, codes in found.items() if codes > 1}


@dataclass(frozen=True)
class Ahead:
    """What a window runs of the images of one request.

    Attributes:
        rows: their slots.
        codes: for each row the W codes to run.
        offsets: for each row how many places before (below 0) or behind the next token's the first
            of them stands.
    """

    rows: list[int]
    codes: list[list[int]]
    offsets: list[int]


@dataclass(frozen=True)
class Rows:
    """Slots that somebody holds: their ``numbers`` on the host, and as an ``index`` int64 [N] on
    the device, which nobody then waits for."""

    numbers: list[int]
    index: Tensor


class Slots:
    """A static cache and who holds which of its rows.

    Args:
        model: the transformer as drawing runs it, ``Engine.decoder``.
        code_table: [V, D].
        rows: slots.
        capacity: tokens a slot holds, a multiple of ``EDGE``.
        invariant: every step runs all rows and reads all places, whatever they hold; in C++ there
            is no need to, as no row's sums regard another's (`echogen.engine.cpu.native`).
        prefix_bytes: kept of prompts that come again (``run_prompt(keep=True)``).
        windows: there shall be steps of several codes, where there are few rows; on packed weights,
            and in steps that may have any shape.

    Attributes:
        cache: made here, once; nothing else of its size is made later. Where rows share prompts it
            has their own codes alone, and the prompts have the rest of the capacity.
        scales: float32 [layers, 2, rows, Hk, …] of its keys and values in 8 bits; None: they are
            not (``DeviceTransformer.fp8_cache``).
    """

    def __init__(
        self,
        model: Decoder,
        code_table: Tensor,
        rows: int,
        capacity: int,
        invariant: bool = False,
        prefix_bytes: int = PREFIX_BYTES,
        windows: bool = False,
    ) -> None:
        c, dtype, device = model.config, code_table.dtype, code_table.device
        native, on_device = (
            isinstance(model, NativeTransformer),
            isinstance(model, DeviceTransformer),
        )
        self.rows, self.capacity = rows, capacity
        self.invariant = invariant and not native
        # Prompts that are shared take no more memory than slots would have had for them.
        before = capacity - c.image_tokens + 1
        own = max(1, capacity - before) if native or on_device else capacity  # no sum needs an edge
        self.scales: Tensor | None = None
        if isinstance(model, DeviceTransformer) and model.fp8_cache:
            held = c.layers, 2, rows, c.kv_heads, own
            self.scales, dtype = torch.zeros(held, device=device), FP8
        self.cache = WindowCache(c, rows, own, dtype, device)
        self._counts = row_counts(rows, self.invariant, recorded=on_device, any_number=native)
        self._widths = dict[int, int]()
        self._packed: PackedRows | None = None
        self._sharer: Sharer | None = None
        self._runner: Runner
        if isinstance(model, PackedTransformer):
            if windows and not invariant:
                self._widths = widths(self._counts, c.image_tokens)
            shapes = [(count, 1) for count in self._counts] + list(self._widths.items())
            self._runner = self._packed = PackedRows(model, code_table, self.cache, shapes)
        elif isinstance(model, NativeTransformer):
            self._runner = self._sharer = NativeRows(model, code_table, self.cache)
        elif isinstance(model, DeviceTransformer):
            self._runner = self._sharer = DeviceRows(
                model, self.cache, self.scales, self._counts, before
            )
        else:
            self._runner = PlainRows(model, code_table, self.cache)
        # Unconditional prompts come again and again; see `PrefixCache`.
        self._prefixes = PrefixCache(prefix_bytes)
        self._free = list(range(rows))
        self._ends = [0] * rows  # tokens of each slot, as the host knows them
        self._at = torch.zeros(rows, dtype=torch.int64, device=device)
        self._held = torch.zeros(rows, dtype=torch.int64, device=device)
        self._codes = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def tokens(self) -> int:
        """Tokens held, over all slots."""
        return sum(self._ends)

    def warm_up(self, prompt_tokens: int, token: int) -> Tensor:
        """Run the longest prompt and the largest step: memory that is not there is missed now, and
        an allocator that keeps what it has (CUDA's) has enough from here on. Logits [R, V]."""
        self._runner.run_prompt([token] * prompt_tokens)
        logits = self._runner.step(self._codes, self._at, self.capacity)
        for count, width in self._widths.items():
            assert self._packed is not None
            codes = self._codes[:count, None].expand(-1, width)
            self._packed.window(codes, self._at[:count], self.capacity)
        return logits

    def rows_agree(self, prompt: list[int]) -> bool:
        """Whether a sequence has the same logits in every slot, bit for bit, for a few steps, and
        whoever shares its prompt; all slots are free before and after. It is what batch-invariant
        mode stands on: in one shape libraries round a row without regard to what the others hold,
        and mostly, but not in every shape, without regard to its place (MKL's products of 2 and 3
        rows do regard it)."""
        prefix, wanted, agreed = self.run_prompt(prompt), list[Tensor](), True
        # Shared by all, by every other one, and by none; where there are copies, it is one case.
        for apart in (1, 2, self.rows) if self._sharer is not None else (1,):
            prefixes = [replace(prefix) for _ in range(apart)]
            rows = self.take([prefixes[row % apart] for row in range(self.rows)])
            for code in range(8):
                self.feed(rows, torch.tensor([[code]], device=rows.index.device))
                logits = self.step()
                if len(wanted) == code:
                    wanted.append(logits[:1].clone())
                agreed = agreed and torch.equal(logits, wanted[code].expand_as(logits))
            self.release(rows)
        return agreed

    def run_prompt(self, prompt: list[int], keep: bool = False) -> Prefix:
        """What a prompt leaves behind; ``keep`` remembers it for the next time."""
        key = tuple(prompt)
        found = self._prefixes.get(key)
        if found is None:
            found = self._runner.run_prompt(prompt)
            if keep:
                self._prefixes.put(key, found)
                found = self._prefixes.get(key) or found  # what is to be shared is one object
        return found

    def take(self, prefixes: list[Prefix]) -> Rows:
        """Fill a free slot with each of ``prefixes``; the slots.

        The lowest are taken: a step runs the leading rows up to the last one held. Where this fails
        they are as free as before.
        """
        assert len(prefixes) <= self.free, "the scheduler admits what fits"
        rows = self._free[: len(prefixes)]
        lengths = [prefix.keys_values.shape[-2] for prefix in prefixes]
        try:
            for row, prefix in zip(rows, prefixes, strict=True):
                self._begin(row, prefix)
        except BaseException:
            self._forget(rows)
            raise
        taken = torch.tensor(rows, device=self._at.device)
        self._at[taken] = torch.tensor(lengths, device=taken.device)
        self._held[taken] = 1
        self._free = self._free[len(rows) :]
        for row, length in zip(rows, lengths, strict=True):
            self._ends[row] = length
        return Rows(rows, taken)

    def _begin(self, row: int, prefix: Prefix) -> None:
        """Let a slot begin with a prefix, or with a copy of it."""
        if self._sharer is not None:
            self._sharer.hold(row, prefix)
            return
        block, held = self.cache.block, prefix.keys_values
        put_prefix(block, None, [row], held)
        # What the last holder left is masked, but a weight of 0 on its NaN would be NaN.
        block[:, :, row, :, held.shape[-2] :].zero_()

    def _forget(self, rows: Iterable[int]) -> None:
        """Let go of what free rows began with, where it is not a copy."""
        if self._sharer is not None:
            for row in rows:
                self._sharer.hold(row, None)

    def release(self, rows: Rows) -> None:
        """Give slots back."""
        for row in rows.numbers:
            self._ends[row] = 0
            self._free.append(row)
        self._forget(rows.numbers)
        self._free.sort()
        for held in (self._at, self._held, self._codes):
            held[rows.index] = 0

    def gather(self, held: Sequence[Rows]) -> list[Rows]:
        """Move what stands behind free slots into those, if the next step then runs fewer rows (or
        may be a ``window``): what everybody's slots ``held`` are now. Where this fails they are
        what they were."""
        live = self.rows - self.free
        if self._runs(live) == self._count():
            return list(held)
        behind = [row for row in range(live, self.rows) if self._ends[row]]
        moved = dict(zip(behind, self._free, strict=False))
        with span("engine/serve/gather", rows=len(moved)):
            device, block = self._at.device, self.cache.block
            for old, new in moved.items():  # with what a window ran ahead of the end
                block[:, :, new].copy_(block[:, :, old])
                if self.scales is not None:
                    self.scales[:, :, new].copy_(self.scales[:, :, old])
            numbers = [[moved.get(row, row) for row in rows.numbers] for rows in held]
            now = [Rows(each, torch.tensor(each, device=device)) for each in numbers]
            source, target = (torch.tensor(list(e), device=device) for e in (moved, moved.values()))
            for of_row in (self._at, self._held, self._codes):
                of_row[target] = of_row[source]
                of_row[source] = 0
        for old, new in moved.items():
            self._ends[new], self._ends[old] = self._ends[old], 0
            if self._sharer is not None:
                self._sharer.move(old, new)
        self._free = [row for row, end in enumerate(self._ends) if not end]
        return now

    def feed(self, rows: Rows, codes: Tensor) -> None:
        """Image codes int64 [N, n] that come next in slots ``rows``, once round for each half of 2N
        rows with guidance: the last, which the next step appends, and before it those that a
        ``window`` ran already."""
        self._codes[rows.index] = codes[:, -1].repeat(len(rows.numbers) // len(codes))
        if (ran := codes.shape[1] - 1) > 0:
            self._at[rows.index] += ran
            for row in rows.numbers:
                self._ends[row] += ran

    def step(self) -> Tensor:
        """Append the codes fed, a token to every slot held; image logits [R, V] of the leading R.
        Rows between that nobody holds run along and overwrite a place that is not read."""
        count, read = self._count(), self._reads(max(self._ends) + 1)
        live = self.rows - self.free
        tokens = self.tokens + live
        with span("engine/decode/step", rows=count, tokens=live, held=tokens, read=read):
            logits = self._runner.step(self._codes[:count], self._at[:count], read)
        self._appended()
        return logits

    @property
    def width(self) -> int:
        """Codes that ``window`` runs of each row; 0: none, as others than the first ``WINDOW_ROWS``
        slots are held, too (see ``gather``), or there shall be no windows."""
        return self._widths.get(self._count(), 0) if self._widths else 0

    def window(self, drafts: Iterable[Ahead]) -> Tensor:
        """Run ``width`` codes of every image; image logits [R, W, V] of the leading R rows, those
        behind each code. The code fed is appended as by ``step``. What is run behind it stays for a
        next window, and ``feed`` says how much of it is kept; a ``step`` overwrites it."""
        assert self._packed is not None, "width is 0"
        count, width = self._count(), self.width
        codes, at = [[0] * width] * count, [0] * count
        for draft in drafts:
            for row, run, offset in zip(draft.rows, draft.codes, draft.offsets, strict=True):
                codes[row], at[row] = run, self._ends[row] + offset
        read = self._reads(max(at) + width)
        live = self.rows - self.free
        ran, held = live * width, self.tokens + live
        with span("engine/decode/window", rows=count * width, tokens=ran, held=held, read=read):
            logits = self._packed.window(torch.tensor(codes), torch.tensor(at), read)
        self._appended()
        return logits

    def _count(self) -> int:
        """Rows of the next step."""
        return self._runs(max((row + 1 for row, end in enumerate(self._ends) if end), default=1))

    def _runs(self, needed: int) -> int:
        """Rows of a step that shall run so many leading ones."""
        return next(n for n in self._counts if n >= needed)

    def _reads(self, end: int) -> int:
        """Places that a step reads whose last token stands before ``end``."""
        return self.capacity if self.invariant else min(self.capacity, up_to_edge(end))

    def _appended(self) -> None:
        """A token more in every slot held."""
        self._at += self._held
        self._ends = [end + 1 if end else 0 for end in self._ends]
