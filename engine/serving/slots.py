"""The rows that a scheduler fills: one static cache, each row with a sequence of its own length.

A slot is a row of the cache. Its prompt is run elsewhere (`engine.serving.prefill`); from then on
each step runs all rows together, each at its own place. In C++ and on the GPU operators, rows share
a prompt's keys and values (`rows.Sharer`). SDPA and PyTorch's products read one cache per row, so
there the prompt is copied into every slot that continues it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echogen.engine.cache import PREFIX_BYTES, Prefix, WindowCache, put_prefix
from echogen.engine.cpu.native import NativeTransformer
from echogen.engine.cpu.packed import PackedTransformer
from echogen.engine.decoding.decode import Decoder
from echogen.engine.decoding.jacobi import default_window
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import bucket
from echogen.engine.ranges import span
from echogen.engine.serving.prefill import Prefill
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
"""Keys are read up to a multiple of this, and a cache's capacity is a multiple of it: a row's sums
then end where a register does (see `packed_decode.LANES`), and all rows' caches are aligned
alike."""
WINDOW_ROWS = 16
"""Most rows at which steps of several codes win. That is twice as many as in one drawing
(`jacobi.MOST_ROWS`), because an image that ends makes room for another. With all 16 full, drawing
is 1.41 times as fast (`ECHOGEN_NATIVE=0 echogen bench serving --arrivals 0`)."""


def up_to_edge(keys: int) -> int:
    """The next multiple of ``EDGE``."""
    return -(-keys // EDGE) * EDGE


def row_counts(
    rows: int, invariant: bool, recorded: bool = False, any_number: bool = False
) -> list[int]:
    """The numbers of rows that steps are made for.

    In batch-invariant mode, all steps have one number. Otherwise it is 1 to 4 or a multiple of 4,
    so that a step runs at most three rows past the last one held. Where each step is ``recorded``,
    there are only the numbers of `graphs.bucket`; where nothing is prepared for a number
    (``any_number``), all are used."""
    if invariant:
        return [rows]
    if any_number:
        return list(range(1, rows + 1))
    if recorded:
        return sorted({min(bucket(count), rows) for count in range(1, rows + 1)})
    return sorted({*range(1, min(rows, 4) + 1), *range(4, rows, 4), rows})


def widths(counts: Sequence[int], tokens: int) -> dict[int, int]:
    """Codes per window for each number of rows up to ``WINDOW_ROWS``; more rows have no windows.
    An image has ``tokens`` codes, of which the last is drawn and never run."""
    found = {rows: min(default_window(rows), tokens - 1) for rows in counts if rows <= WINDOW_ROWS}
    return {rows: codes for rows, codes in found.items() if codes > 1}


@dataclass(frozen=True)
class Ahead:
    """What a window runs for the images of one request.

    Attributes:
        rows: their slots.
        codes: for each row, the W codes to run.
        offsets: for each row, the place of the first of them, relative to that of the next token
            (below 0: before it).
    """

    rows: list[int]
    codes: list[list[int]]
    offsets: list[int]


@dataclass(frozen=True)
class Rows:
    """Slots that are held: their ``numbers`` on the host, and the same as an ``index`` int64 [N]
    kept on the device, so that no step waits for a copy."""

    numbers: list[int]
    index: Tensor


class Slots:
    """A static cache, and which of its rows are held.

    Args:
        model: the transformer as drawing runs it, ``Engine.decoder``.
        code_table: [V, D].
        rows: slots.
        capacity: tokens a slot holds, a multiple of ``EDGE``.
        invariant: every step runs all rows and reads all places, whatever they hold. C++ does not
            need this, as no row's sums depend on another's (`echogen.engine.cpu.native`).
        prefix_bytes: memory for the prefixes of prompts that recur.
        windows: run steps of several codes while there are few rows; only on packed weights, and
            not with ``invariant``.
        together: run several prompts in one forward; not with ``invariant``.

    Attributes:
        cache: allocated here, once; nothing else of its size is allocated later. Where rows share
            prompts it holds only their own codes, and the prompts have the rest of the capacity.
        scales: float32 [layers, 2, rows, Hk, …] of keys and values held in 8 bits; None where they
            are not (``DeviceTransformer.fp8_cache``).
        prompts: runs the prompts that slots begin with.
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
        together: bool = False,
    ) -> None:
        c, dtype, device = model.config, code_table.dtype, code_table.device
        native, on_device = (
            isinstance(model, NativeTransformer),
            isinstance(model, DeviceTransformer),
        )
        self.rows, self.capacity = rows, capacity
        self.invariant = invariant and not native
        # Shared prompts take no more memory than the slots would have set aside for them.
        before = capacity - c.image_tokens + 1
        own = max(1, capacity - before) if native or on_device else capacity  # sums need no EDGE
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
        self.prompts = Prefill(self._runner, prefix_bytes, together and not self.invariant)
        self._free = list(range(rows))
        self._ends = [0] * rows  # tokens of each slot, as the host knows them
        self._at = torch.zeros(rows, dtype=torch.int64, device=device)
        self._held = torch.zeros(rows, dtype=torch.int64, device=device)
        self._codes = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @property
    def tokens(self) -> int:
        """Tokens held, over all slots."""
        return sum(self._ends)

    def warm_up(self, prompt_tokens: int, token: int) -> Tensor:
        """Run the largest prompts and the largest step; return logits [R, V]. A lack of memory
        shows now, and an allocator that keeps what it has (CUDA's) has enough from here on."""
        self.prompts.warm_up(prompt_tokens, token)
        logits = self._runner.step(self._codes, self._at, self.capacity)
        for count, width in self._widths.items():
            assert self._packed is not None
            codes = self._codes[:count, None].expand(-1, width)
            self._packed.window(codes, self._at[:count], self.capacity)
        return logits

    def rows_agree(self, prompt: list[int]) -> bool:
        """Whether a sequence has the same logits, bit for bit, in every slot for a few steps,
        whichever rows share its prompt. All slots are free before and after.

        Batch-invariant mode rests on this. Within one shape, libraries round a row independently of
        what the other rows hold; in most shapes, but not all, also independently of its place (in
        MKL's products of 2 and 3 rows the place matters)."""
        prefix, wanted, agreed = self.prompts.run(prompt), list[Tensor](), True
        # Shared by all rows, by every other one, and by none; with copies, these are one case.
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

    def take(self, prefixes: list[Prefix]) -> Rows:
        """Fill a free slot with each of ``prefixes``, and return the slots.

        The lowest are taken, because a step runs the leading rows up to the last one held. If this
        fails, they are as free as before.
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
        # What the last holder left is masked, but 0 times a NaN in it would still be NaN.
        block[:, :, row, :, held.shape[-2] :].zero_()

    def _forget(self, rows: Iterable[int]) -> None:
        """Drop the prefixes that free rows began with, where they are shared."""
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
        """Move held rows into free slots before them if the next step then runs fewer rows (or may
        be a ``window``), and return where each of ``held`` is now. If this fails, all are where
        they were."""
        live = self.rows - self.free
        if self._runs(live) == self._count():
            return list(held)
        behind = [row for row in range(live, self.rows) if self._ends[row]]
        moved = dict(zip(behind, self._free, strict=False))
        with span("engine/serve/gather", rows=len(moved)):
            device, block = self._at.device, self.cache.block
            for old, new in moved.items():  # including what a window ran past the end
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
        """Take the next image codes int64 [N, n] of slots ``rows``; with guidance, both halves of
        the 2N rows get the same. The next step appends the last code; those before it were already
        run by a ``window``."""
        self._codes[rows.index] = codes[:, -1].repeat(len(rows.numbers) // len(codes))
        if (ran := codes.shape[1] - 1) > 0:
            self._at[rows.index] += ran
            for row in rows.numbers:
                self._ends[row] += ran

    def step(self) -> Tensor:
        """Append the codes fed, one token to every held slot; return image logits [R, V] of the
        leading R rows. Free rows among them run along and overwrite a place that is not read."""
        count, read = self._count(), self._reads(max(self._ends) + 1)
        live = self.rows - self.free
        tokens = self.tokens + live
        with span("engine/decode/step", rows=count, tokens=live, held=tokens, read=read):
            logits = self._runner.step(self._codes[:count], self._at[:count], read)
        self._appended()
        return logits

    @property
    def width(self) -> int:
        """Codes that ``window`` runs of each row. 0: no window can run, because slots past the
        first ``WINDOW_ROWS`` are held (see ``gather``), or because windows are off."""
        return self._widths.get(self._count(), 0) if self._widths else 0

    def window(self, drafts: Iterable[Ahead]) -> Tensor:
        """Run ``width`` codes of every image; return image logits [R, W, V] of the leading R rows,
        after each code. The code fed is appended as by ``step``. What is run after it stays for the
        next window: ``feed`` says how much of it is kept, and a ``step`` overwrites it."""
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
        """Rows of a step that has to run the ``needed`` leading ones."""
        return next(n for n in self._counts if n >= needed)

    def _reads(self, end: int) -> int:
        """Places that a step reads when its last token is before ``end``."""
        return self.capacity if self.invariant else min(self.capacity, up_to_edge(end))

    def _appended(self) -> None:
        """Count one more token in every held slot."""
        self._at += self._held
        self._ends = [end + 1 if end else 0 for end in self._ends]
