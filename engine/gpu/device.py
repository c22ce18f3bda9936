"""A step of the transformer on the project's GPU operators, which use its live weights.

A layer is at most seven launches for a step of up to 16 rows in bfloat16, regardless of guidance
and sharing:

1. ``skinny_linear``: the norm, and the product with the fused query-key-value weight;
2. ``rope_cache``: queries and keys rotated, keys and values written to their places in the cache;
3. ``decode_attention``: partial softmaxes of the shared prefixes and of every row's own codes;
4. ``decode_attention``: the partial softmaxes merged;
5. ``skinny_linear``: the output product, added to the residual stream;
6. ``skinny_linear``: the norm, the product with gate and up, and SwiGLU;
7. ``skinny_linear``: the product with down, added to the residual stream.

With more rows, or in another type, torch does the matrix products: ``rms_norm`` and ``swiglu`` are
then separate launches and a layer takes ten (counting a torch product as one). With fp8 weights, or
in bfloat16 with ``ECHOGEN_FUSED=1``, more rows use ``wide_linear`` in place of ``skinny_linear``,
and a layer is seven launches again. In bfloat16 this is off until it has been timed against torch's
product on a GPU (`echogen bench kernels --operator wide_linear`). Whatever the number of rows, a
step adds the lookup of its rotations, the image head, sampling and one addition to its counters.

On request, caches hold 8 bits per number, with a scale for every head of a token: launch 2 rounds
what it writes, and launch 3 multiplies by the scales.

Only derived data is copied: the code table, the rotations and, on request, the fp8 weights.
``refresh`` renews code table and fp8 weights in place, so that recorded steps stay valid.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echogen.engine.gpu.graphs import ONE, Recorder, StepCache, recorder
from echogen.engine.model import Block, RMSNorm, UnifiedTransformer
from echogen.kernels import decode_attention as attention
from echogen.kernels import rms_norm as norms
from echogen.kernels.decode_attention import decode_attention
from echogen.kernels.decode_members import MOST_SHARED
from echogen.kernels.dispatch import implementation
from echogen.kernels.rms_norm import rms_norm
from echogen.kernels.rope import rope_cache
from echogen.kernels.skinny_linear import MAX_ROWS, fp8_weight, skinny_linear
from echogen.kernels.swiglu import swiglu
from echogen.kernels.wide_linear import wide_linear

TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Prefixes:
    """Prompts that rows continue.

    Attributes:
        keys, values: [layers, P, Hk, Sp, K], each prompt stored once.
        lengths: int64 [P].
        groups: int64 [R], which prompt each row continues; −1: none.
        order: `kernels.decode_members.decode_members` of the groups.
        scales: float32 [layers, 2, P, Hk, Sp] of 8-bit keys and values; None: they are not 8-bit.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    groups: Tensor
    order: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class Places:
    """Where the rows of a step are, known only on the device.

    A row is a token. Each of C sequences has one row, or W adjacent ones: R = C·W.

    Attributes:
        slots: int64 [R], the cache slot that a row's token is written to; a slot outside the cache
            is not written (an idle row).
        lengths: int64 [R], tokens of its own sequence that a row then sees.
        positions: int64 [R], RoPE positions.
        keys, values: [layers, C, Hk, S, K], the sequences' own caches.
        prefixes: the prompts that the rows see before their own tokens.
        scales: float32 [layers, 2, C, Hk, S] of 8-bit caches; None: they are not 8-bit.
    """

    slots: Tensor
    lengths: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    prefixes: Prefixes | None = None
    scales: Tensor | None = None

    def attended(self, query: Tensor, layer: int) -> Tensor:
        """[R, H, K] → [R, H, K]: attention of every row's query over everything it sees."""
        keys, values, scales = self.keys[layer], self.values[layer], _of_layer(self.scales, layer)
        p = self.prefixes
        if p is None:
            return decode_attention(query, keys, values, self.lengths, scales=scales)
        return decode_attention(
            query, keys, values, self.lengths, None, p.keys[layer], p.values[layer], p.lengths,
            p.groups, p.order, scales, _of_layer(p.scales, layer),
        )  # fmt: skip


def _of_layer(scales: Tensor | None, layer: int) -> Tensor | None:
    return None if scales is None else scales[layer]


class DeviceLinear:
    """``x·Wᵀ``, preceded by a norm if one is given.

    Args:
        weight: [N, K], used in place.
        norm: the norm before it.
        bias: [N] or None.
        fp8: multiply by a copy in fp8; ``refresh`` renews it.
    """

    def __init__(
        self, weight: Tensor, norm: RMSNorm | None = None, bias: Tensor | None = None,
        fp8: bool = False,
    ) -> None:  # fmt: skip
        self._live = weight.detach()
        self._gain = None if norm is None else norm.weight.detach()
        self._eps = 1e-6 if norm is None else norm.eps
        self._bias = None if bias is None else bias.detach()
        self._weight: Tensor = self._live
        self._scale: Tensor | None = None
        if fp8:
            self._weight, self._scale = fp8_weight(self._live)
        self._few = MAX_ROWS if self._fits_skinny() else 0
        self._fused = self._fits_wide() and (fp8 or os.environ.get("ECHOGEN_FUSED") == "1")

    def _fits_skinny(self) -> bool:
        on_gpu = self._live.is_cuda
        if on_gpu and not implementation("skinny_linear", "cuda").startswith("CUDA C++"):
            return False
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (self._weight, self._gain))
        return aligned and self._fits()

    def _fits_wide(self) -> bool:
        eight = self._scale is not None and self._live.is_cuda
        if eight and torch.cuda.get_device_capability(self._live.device) < (8, 9):
            return False
        return self._fits()

    def _fits(self) -> bool:
        if self._live.is_cuda and self._live.dtype != torch.bfloat16:
            return False
        return self._weight.shape[1] % (16 if self._scale is not None else 8) == 0

    def refresh(self) -> None:
        """Renew what is derived from the weight."""
        if self._scale is not None:
            made, scale = fp8_weight(self._live)
            self._weight.copy_(made)
            self._scale.copy_(scale)

    def __call__(self, x: Tensor, residual: Tensor | None = None, gated: bool = False) -> Tensor:
        """x [R, K] → [R, N], added to ``residual`` [R, N] (perhaps in place) where there is one, or
        [R, N/2] with SwiGLU where ``gated``."""
        if len(x) <= self._few or self._fused:
            if self._bias is not None:
                # A product rather than a copy, as a copy of one row is not a kernel, and only after
                # a kernel can the next launch begin early (`kernels.overlap`).
                residual = self._bias.expand(len(x), -1) * 1
            product = skinny_linear if len(x) <= self._few else wide_linear
            return product(x, self._weight, self._scale, self._gain, self._eps, residual, gated)
        if self._gain is not None:
            x = rms_norm(x, self._gain, self._eps)
        if self._scale is not None:
            y = F.linear(x, self._weight.to(x.dtype)).mul_(self._scale)
            if self._bias is not None:
                y += self._bias
            return swiglu(y) if gated else y if residual is None else residual.add_(y)
        if residual is not None:
            return residual.addmm_(x, self._weight.t())
        y = F.linear(x, self._weight, self._bias)
        return swiglu(y) if gated else y


class DeviceBlock:
    """`model.Block` for few tokens of each sequence; the module's docstring lists its launches."""

    def __init__(self, block: Block, fp8: bool) -> None:
        self._heads, self._kv_heads, self._dim = block.heads, block.kv_heads, block.head_dim
        self._qkv = DeviceLinear(block.qkv.weight, block.attn_norm, fp8=fp8)
        self._out = DeviceLinear(block.out.weight, fp8=fp8)
        self._gate_up = DeviceLinear(block.gate_up.weight, block.mlp_norm, fp8=fp8)
        self._down = DeviceLinear(block.down.weight, fp8=fp8)
        self.linears = (self._qkv, self._out, self._gate_up, self._down)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, places: Places, layer: int
    ) -> Tensor:
        """Residual stream x [R, D] → residual stream, perhaps in place; cos and sin are [C, W, K],
        and ``slots`` are those of ``places`` as [C, W]."""
        rows, h, kv = len(x), self._heads, self._kv_heads
        heads = self._qkv(x).view(*slots.shape, h + 2 * kv, self._dim)
        query = rope_cache(
            heads[:, :, :h], heads[:, :, h : h + kv], heads[:, :, h + kv :], cos, sin,
            places.keys[layer], places.values[layer], slots, _of_layer(places.scales, layer),
        )  # fmt: skip
        attended = places.attended(query.flatten(0, 1), layer)
        x = self._out(attended.view(rows, h * self._dim), residual=x)
        return self._down(self._gate_up(x, gated=True), residual=x)


class Turn:
    """A lock that refuses the thread that holds it, instead of admitting it again or deadlocking: a
    drawing's callback (``progress``) would draw into the caches of that very drawing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        if self._holder == get_ident():
            raise RuntimeError(
                "a drawing is under way in this thread, in memory that is all drawings'; draw, "
                "refresh or release when it has ended, not from its progress"
            )
        self._lock.acquire()
        self._holder = get_ident()

    def __exit__(self, *error: object) -> None:
        self._holder = None
        self._lock.release()


class DeviceTransformer:
    """A step of `UnifiedTransformer` on the project's operators.

    Args:
        plain: the transformer; its weights are used in place. ``why_not_operators`` says whether
            the operators can run it.
        code_table: [V, D], ``plain.code_table()``; copied.
        fp8: multiply the layers' and the image head's weights in fp8 (see ``fp8_weight``).
        fp8_cache: keep keys and values in fp8, a scale for each head of a token.
        record: how steps are recorded; None: `graphs.recorder`.

    Attributes:
        config, plain: the model's configuration, and the model.
        table: [V, D], the code table, always at the same address.
        memory, steps: the memory and the recorded steps of drawings (`echogen.engine.gpu.step`).
        lock: held while a drawing uses that memory, and by ``refresh`` and ``release``.
    """

    def __init__(
        self,
        plain: UnifiedTransformer,
        code_table: Tensor,
        fp8: bool = False,
        fp8_cache: bool = False,
        record: Recorder | None = None,
    ) -> None:
        self.config, self.plain, self.lock = plain.config, plain, Turn()
        self.fp8, self.fp8_cache = fp8, fp8_cache
        self.recorder = record or recorder(code_table.device)
        self.memory = Memory(code_table.device)
        self.steps = StepCache[Any]()
        into, out = plain.image_head[0], plain.image_head[2]
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        with torch.inference_mode():
            self.table = code_table.clone()
            self._rope = self._rotations()
            self.blocks = [DeviceBlock(b, fp8) for b in plain.blocks if isinstance(b, Block)]
            self._into = DeviceLinear(into.weight, plain.norm, into.bias, fp8)
            self._out = DeviceLinear(out.weight, None, out.bias, fp8)
        self._seen = self._where()

    def _rotations(self) -> Tensor:
        """cos and sin [2, positions, K] in the type of the matrix products, as the plain forward
        uses them, but sin without the sign that `Rotary` includes."""
        rotary, half = self.plain.rotary, self.config.head_dim // 2
        sin = torch.cat((-rotary.sin[:, :half], rotary.sin[:, half:]), -1)
        return torch.stack((rotary.cos, sin)).to(self.table.dtype)

    def _where(self) -> list[tuple[int, torch.dtype]]:
        """Address and type of every tensor of the model."""
        tensors = (*self.plain.parameters(), self.plain.rotary.cos)
        return [(t.data_ptr(), t.dtype) for t in tensors]

    def linears(self) -> Iterator[DeviceLinear]:
        """All products of a step."""
        for block in self.blocks:
            yield from block.linears
        yield from (self._into, self._out)

    def refresh(self, code_table: Tensor) -> bool:
        """Renew in place what is derived from the weights. Return False if the weights themselves
        have moved: then nothing here is valid any more."""
        if self._where() != self._seen or code_table.dtype != self.table.dtype:
            return False
        with self.lock, torch.inference_mode():
            self.table.copy_(code_table)
            for linear in self.linears():
                linear.refresh()
        return True

    def release(self) -> None:
        """Drop the recorded steps and free the memory of drawings; the next drawing records anew.
        Dropping this object is not enough: its steps refer to it, so it would stay until Python
        collects cycles."""
        with self.lock:
            self.steps.clear()
            self.memory.release()
            if self.table.is_cuda:
                # If the memory stayed in torch's cache, lasting tensors would be allocated from it,
                # and there would be no room for a block of that size again. The cache cannot be
                # emptied while any thread records a step: torch refuses.
                with ONE:
                    torch.cuda.empty_cache()

    def logits(self, x: Tensor, places: Places) -> Tensor:
        """Run one token per row, [R, D] (overwritten) → image logits [R, V]; writes the cache."""
        slots = places.slots.view(places.keys.shape[1], -1)
        rotation = self._rope.index_select(1, places.positions).view(2, *slots.shape, -1)
        cos, sin = rotation.unbind(0)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, slots, places, i)
        return self._out(F.gelu(self._into(x)))


class Piece(NamedTuple):
    """Shape and type of a tensor to be placed in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up so that the next piece begins at a multiple of 16."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 16) * 16


class Memory:
    """One block of memory for the caches of all drawings, one drawing at a time: as large as the
    largest one needs, not as the sum of all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.release()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._held.nbytes

    def fits(self, *pieces: Piece) -> bool:
        """Whether the pieces fit in the block side by side."""
        return sum(piece.nbytes for piece in pieces) <= self.nbytes

    def grow(self, *pieces: Piece) -> None:
        """Make room for the pieces; previous contents are lost."""
        size = sum(piece.nbytes for piece in pieces)
        self.release()  # first, as the old and the new block may not both fit
        self._held = torch.empty(size, dtype=torch.uint8, device=self._device)

    def release(self) -> None:
        """Free the block."""
        self._held = torch.empty(0, dtype=torch.uint8, device=self._device)

    def views(self, *pieces: Piece) -> list[Tensor]:
        """Return the pieces as tensors, side by side from the beginning of the block."""
        found, begin = list[Tensor](), 0
        for piece in pieces:
            size = math.prod(piece.shape) * piece.dtype.itemsize
            found.append(self._held[begin : begin + size].view(piece.dtype).view(piece.shape))
            begin += piece.nbytes
        return found


def why_not_operators(model: UnifiedTransformer) -> str | None:
    """Why the operators cannot run this model's step; None where they can."""
    c, weight = model.config, model.norm.weight
    if weight.dtype not in TYPES:
        return f"its weights are {weight.dtype}; the operators take {', '.join(map(str, TYPES))}"
    plain = {nn.Parameter, torch.Tensor}
    for name, parameter in model.named_parameters():
        if type(parameter) not in plain or type(parameter.data) is not torch.Tensor:
            return f"{name} is a {type(parameter.data).__name__}; the operators take plain tensors"
        used = name.startswith(("blocks.", "norm.", "image_head."))
        if used and (parameter.dtype != weight.dtype or not parameter.is_contiguous()):
            return (
                f"{name} is {parameter.dtype} with strides {parameter.stride()}; the operators "
                f"take {weight.dtype}, contiguous"
            )
    for name, module in model.named_modules():
        if name.startswith("blocks.") and type(module) not in (Block, RMSNorm, nn.Linear):
            return f"{name} is a {type(module).__name__}, of which the operators know nothing"
    if [type(m) for m in model.image_head] != [nn.Linear, nn.GELU, nn.Linear]:
        return "its image head is not two linear layers with GELU between them"
    limits = {
        "width": (c.width, norms.MAX_WIDTH),
        "head_dim": (c.head_dim, attention.MOST_WIDE),
        "heads for one of keys": (c.heads // c.kv_heads, MOST_SHARED),
    }
    for what, (value, most) in limits.items():
        if value > most:
            return f"its {what} is {value}; the operators take up to {most}"
    return None
