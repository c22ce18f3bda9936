"""Drawing: prefill the prompts once, then draw one image code per step for every row. The
interfaces that steps run on are here too, for one code per step and for several
(`echogen.engine.decoding.jacobi`), with their implementations on the plain transformer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from echogen.engine.attention import Mask
from echogen.engine.cache import KVCache, WindowCache
from echogen.engine.cpu.loader import CompilerError
from echogen.engine.cpu.native import NativeDecoding, NativeTransformer, why_not_native
from echogen.engine.cpu.packed import PackedTransformer, packable
from echogen.engine.cpu.packed_decode import PackedDecoding, PackedWindows
from echogen.engine.decoding.sampler import Sampler
from echogen.engine.gpu.decode import DeviceDecoding
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.layout import LayoutError
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.ranges import span

Progress = Callable[[int, int], None]
"""Called with (codes drawn of an image, codes in all)."""
Packed = NativeTransformer | PackedTransformer
"""A copy of the weights for a CPU: for C++, or for PyTorch's operations."""
Decoder = UnifiedTransformer | Packed | DeviceTransformer
"""The transformer as drawing runs it: unchanged, packed for a CPU, or on the GPU operators."""


class Decoding(Protocol):
    """One drawing of R rows: the prompts first, then code after code."""

    def prefill(self) -> Tensor:
        """Run the prompts; return the image logits [R, V] of their last tokens."""
        ...

    def step(self, code: Tensor) -> Tensor:
        """Append image codes int64 [N] (with guidance, to both halves of R = 2N rows); return the
        next image logits [R, V]."""
        ...


class Windows(Protocol):
    """One drawing of R rows whose steps take several codes of each image."""

    def prefill(self) -> Tensor:
        """Run the prompts; return the image logits [R, V] of their last tokens."""
        ...

    def window(self, codes: Tensor, first: list[int]) -> Tensor:
        """Run image codes int64 [N, W], those of image n from position ``first[n]`` on; return the
        image logits [R, W, V] after each, which depend on no later code. Everything before
        ``first[n]`` must have been run; what an earlier call left from there on is overwritten."""
        ...


class PlainDecoding:
    """A drawing on the plain transformer, for any device and type.

    Args:
        model: the transformer.
        code_table: [V, D], ``model.code_table()``; an image code's embedding is one lookup.
        ids, pads: ``left_padded`` prompts, int64 [R, L] and [R].
        steps: image tokens T.
    """

    def __init__(
        self, model: UnifiedTransformer, code_table: Tensor, ids: Tensor, pads: Tensor, steps: int
    ) -> None:
        self._model, self._table, self._ids = model, code_table, ids
        rows, length = ids.shape
        device, dtype = code_table.device, code_table.dtype
        self._cache = KVCache(model.config, rows, length + steps - 1, dtype, device)
        slot = torch.arange(length + steps - 1, device=device)
        ragged = bool(pads.any())
        self._positions = (slot - pads[:, None]).clamp(min=0) if ragged else slot
        self._mask: Mask = "causal"
        self._step_mask: Tensor | None = None
        if ragged:
            causal = slot[None, :length, None] >= slot[None, None, :length]
            kept = slot[None, None, :] >= pads[:, None, None]
            # A pad sees itself: a row of nothing but -inf would turn into NaN.
            itself = torch.eye(length, dtype=torch.bool, device=device)
            self._mask = additive_mask((causal & kept[:, :, :length]) | itself, dtype)
            self._step_mask = additive_mask(kept, dtype)

    def prefill(self) -> Tensor:
        """See `Decoding`."""
        with span("engine/prefill/run", rows=len(self._ids), tokens=self._ids.numel()):
            embedded = self._model.embed_text(self._ids)
            positions = self._positions[..., : self._ids.shape[1]]
            hidden = self._model(embedded, positions, self._mask, self._cache)
            return self._model.image_head(hidden[:, -1])

    def step(self, code: Tensor) -> Tensor:
        """See `Decoding`."""
        end = self._cache.length
        embedded = self._table[code].repeat(len(self._ids) // len(code), 1).unsqueeze(1)
        mask = None if self._step_mask is None else self._step_mask[..., : end + 1]
        positions = self._positions[..., end : end + 1]
        return self._model.image_head(self._model(embedded, positions, mask, self._cache)[:, 0])


class PlainWindows:
    """`Windows` on the plain transformer, for any device and type; see PlainDecoding."""

    def __init__(
        self, model: UnifiedTransformer, code_table: Tensor, ids: Tensor, pads: Tensor, steps: int
    ) -> None:
        self._model, self._table, self._ids = model, code_table, ids
        (rows, length), device = ids.shape, code_table.device
        capacity = length + steps - 1
        self._cache = WindowCache(model.config, rows, capacity, code_table.dtype, device)
        self._slot, self._starts = torch.arange(capacity, device=device), pads[:, None]

    def prefill(self) -> Tensor:
        """See `Windows`."""
        rows, length = self._ids.shape
        slots = self._slot[:length].expand(rows, length)
        with span("engine/prefill/run", rows=rows, tokens=self._ids.numel()):
            hidden = self._run(self._model.embed_text(self._ids), slots, length)
            return self._model.image_head(hidden[:, -1])

    def window(self, codes: Tensor, first: list[int]) -> Tensor:
        """See `Windows`."""
        (images, width), (rows, length) = codes.shape, self._ids.shape
        begins = torch.tensor(first * (rows // images), device=codes.device) + length
        slots = begins[:, None] + self._slot[:width]
        embedded = self._table[codes].repeat(rows // images, 1, 1)
        return self._model.image_head(self._run(embedded, slots, length + max(first) + width))

    def _run(self, embedded: Tensor, slots: Tensor, end: int) -> Tensor:
        """Tokens [R, n, D] at ``slots`` [R, n], all below ``end`` → hidden states [R, n, D]."""
        slot, at = self._slot[:end], slots[..., None]
        # A pad sees itself: a row of nothing but -inf would turn into NaN.
        seen = (slot <= at) & ((slot >= self._starts[..., None]) | (slot == at))
        self._cache.open(slots, end)
        positions = (slots - self._starts).clamp(min=0)
        mask = additive_mask(seen, embedded.dtype)
        return self._model(embedded, positions, mask, self._cache)


def left_padded(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids int64 [B, L], padded on the left, and each row's number of pads, int64 [B]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    return ids, torch.tensor([longest - len(p) for p in prompts])


def check_drawing(model: Decoder, prompts: list[list[int]], sampler: Sampler) -> None:
    """Refuse arguments that cannot be drawn as requested.

    Raises:
        LayoutError: a prompt that leaves no room for the image.
        ValueError: the number of prompts does not match the images that the sampler draws.
    """
    c, images, each = model.config, len(sampler.draws), 1 + sampler.sampling.guided
    if len(prompts) != images * each:
        raise ValueError(
            f"{len(prompts)} prompts for {images} draws; an image takes one of each"
            f"{', and with guidance two prompts' if each > 1 else ''}"
        )
    longest = max(map(len, prompts), default=0)
    if longest + c.image_tokens > c.max_positions:
        raise LayoutError(
            f"the layout takes {longest} tokens; this model has room for "
            f"{c.max_positions - c.image_tokens}, so shorten its texts or name fewer objects"
        )


def prepared(
    model: Decoder, code_table: Tensor, prompts: list[list[int]], pad: int
) -> tuple[UnifiedTransformer | Packed, Tensor, Tensor]:
    """Return the model, packed if possible, and ``left_padded`` prompts on its weights' device."""
    ids, pads = (t.to(code_table.device) for t in left_padded(prompts, pad))
    if isinstance(model, DeviceTransformer):
        return model.plain, ids, pads
    if isinstance(model, UnifiedTransformer):
        return packed(model, len(ids)), ids, pads
    return model, ids, pads


def packed(model: UnifiedTransformer, rows: int = 2) -> UnifiedTransformer | Packed:
    """Return a copy of the weights for drawing ``rows`` rows on a CPU, or the model itself if none
    can be made. Warns if only the compiler keeps a small float32 model from being drawn in C++."""
    why = why_not_native(model)
    if why is None:
        return NativeTransformer(model)
    if isinstance(why, CompilerError):
        warnings.warn(
            f"drawing goes through PyTorch's operations, several times as slowly: {why} "
            f"(ECHOGEN_NATIVE=0: without this warning)",
            stacklevel=2,
        )
    return PackedTransformer(model, rows) if packable(model) else model


def open_windows(
    model: Decoder, code_table: Tensor, prompts: list[list[int]], pad: int, guided: bool
) -> Windows:
    """Open a drawing of ``prompts`` whose steps take several codes; see `decode_image`."""
    model, ids, pads = prepared(model, code_table, prompts, pad)
    steps = model.config.image_tokens
    if isinstance(model, UnifiedTransformer):
        return PlainWindows(model, code_table, ids, pads, steps)
    if isinstance(model, NativeTransformer):
        return NativeDecoding(model, code_table, ids, pads, steps, guided)
    return PackedWindows(model, code_table, ids, pads, steps, guided)


@torch.inference_mode()
def decode_image(
    model: Decoder,
    code_table: Tensor,
    prompts: list[list[int]],
    sampler: Sampler,
    pad: int,
    progress: Progress | None = None,
    share: bool = True,
) -> Tensor:
    """Draw one image for each prompt.

    Args:
        model: the transformer; a plain one is packed for this call if possible, so a caller that
            draws often should pack it once.
        code_table: [V, D], ``model.code_table()``.
        prompts: N prompts ending in begin-of-image; with guidance 2N, conditional ones first.
        sampler: made for N samples; decides whether rows are guided.
        pad: id that fills shorter prompts on the left, where nothing attends to it.
        progress: called after every step.
        share: store a prompt that many rows have once, in C++ and on the GPU operators; False
            stores a copy per row, for comparisons. Other ways of drawing always store copies.

    Returns:
        Image codes int64 [N, T].

    Raises:
        LayoutError: a prompt that leaves no room for the image.
        ValueError: the number of prompts does not match the images that the sampler draws.
        RuntimeError: on a GPU, called within another drawing of the same thread.
    """
    check_drawing(model, prompts, sampler)
    guided = sampler.sampling.guided
    if isinstance(model, DeviceTransformer):
        # In the weights' own type, without autocast: a step recorded under it would keep its types.
        with model.lock, torch.autocast(code_table.device.type, enabled=False):
            own = sampler if sampler.on_device else None
            on_device = DeviceDecoding(model, prompts, guided, share, own)
            if own is not None:
                return on_device.draw(progress)
            return _code_by_code(on_device, len(prompts), on_device.held, model, sampler, progress)
    model, ids, pads = prepared(model, code_table, prompts, pad)
    rows, steps = len(ids), model.config.image_tokens
    held = ids.numel()
    decoding: Decoding
    if isinstance(model, UnifiedTransformer):
        decoding = PlainDecoding(model, code_table, ids, pads, steps)
    elif isinstance(model, NativeTransformer):
        decoding = native = NativeDecoding(model, code_table, ids, pads, steps, guided, share)
        held = native.held
    else:
        decoding = PackedDecoding(model, code_table, ids, pads, steps, guided)
    return _code_by_code(decoding, rows, held, model, sampler, progress)


def _code_by_code(
    decoding: Decoding,
    rows: int,
    held: int,
    model: Decoder,
    sampler: Sampler,
    progress: Progress | None,
) -> Tensor:
    """Run a drawing of ``rows`` rows; ``held`` counts the tokens of its prompts in the cache."""
    steps = model.config.image_tokens
    with span("engine/prefill", rows=rows):
        logits = decoding.prefill()
    images = rows // 2 if sampler.sampling.guided else rows
    codes = torch.empty(images, steps, dtype=torch.int64, device=logits.device)
    for step in range(steps):
        with span("engine/sample", rows=rows, step=step):
            code = codes[:, step] = sampler(logits, step)
        if progress is not None:
            progress(step + 1, steps)
        if step + 1 < steps:
            held += rows
            with span("engine/decode/step", rows=rows, tokens=rows, held=held, step=step):
                logits = decoding.step(code)
    return codes
