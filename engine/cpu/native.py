"""Drawing on a CPU in C++: a float32 model's weights packed for the kernel, and the kernel calls,
each from codes to logits. The computation itself is in `engine/cpu/transformer.cpp`.

In PyTorch a step of two rows of the bundled model is a hundred operations, each of which costs more
to call than to compute (`engine.cpu.packed`, which runs where there is no compiler).
A token's logits depend only on its own sequence, to the last bit: not on what else is in the batch,
nor on how many codes a step runs, nor on threads. So a drawing alone, in a batch, in windows and
among a scheduler's requests has the same codes by construction, not within rounding.
`echogen bench engine` measures this code, with ``--mode peer`` against the port.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echogen.engine.cache import Prefix, PrefixCache
from echogen.engine.cpu import loader
from echogen.engine.cpu.packed import pairs_beside
from echogen.engine.model import Block, UnifiedTransformer
from echogen.engine.ranges import span
from echogen.kernels import philox

SOURCE = "transformer"
CACHED_BYTES = 64 << 20
"""Most bytes of layers and image head that a CPU's caches may hold. Threads divide the rows of a
smaller model's step among themselves, and wait for each other only at its end. A larger model's
weights come from memory at every step, so its threads divide every product and read them once. For
one row of a model of 110 million parameters two threads then take half of one's time (an Intel Xeon
with AMX; `echogen bench engine --mode latency --model random:100m --cfg 1 --peer none`, with
``--threads`` 1 and 2). A small model's threads would wait for each other every few microseconds,
and its steps would take milliseconds whenever another process has one of their cores."""
FEW_THREADS = 2
"""On up to this many threads such a model is drawn here, 1.7 times as fast as by PyTorch's
operations (the same Xeon; the command above with ``--threads 2`` and both values of
ECHOGEN_NATIVE). More have not been measured."""
THREAD_TOKENS = 4
"""Least number of tokens per thread of a small model: from there on a further thread pays. A step
of 8 rows of the bundled model takes 1.20 ms on two threads and 1.38 ms on one, with
log-probabilities (Zen 4; `echogen bench engine --mode rollout --model tiny --batch 8 --cfg 1 --peer
none`, with ``--threads`` 1 and 2)."""

Address = ctypes.c_void_p
CPU = torch.device("cpu")  # where tensors passed by address are made, whatever torch's default is


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [(name, Address) for name in ("qkv", "out", "gate_up", "down")]


class _Model(ctypes.Structure):
    _fields_: ClassVar = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, Address) for name in ("into", "into_bias", "out", "out_bias", "rope")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "depth", "width", "heads", "kv_heads", "head_dim", "mlp", "head_width", "codes",
                "positions",
            )
        ),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_: ClassVar = [
        ("table", Address), ("ids_known", ctypes.c_int64),
        ("ids", Address), ("row", Address), ("at", Address), ("tokens", ctypes.c_int64),
        ("rows", Address), ("rows_known", ctypes.c_int64),
        ("logits", Address), ("last_only", ctypes.c_int64),
        ("threads", ctypes.c_int64), ("together", ctypes.c_int64),
    ]  # fmt: skip


REFUSED = {
    1: "an id that the embedding does not have",
    2: "a row that the cache does not have",
    3: "a place beyond the cache's end or the model's last position",
}


def why_not_native(model: UnifiedTransformer) -> str | loader.CompilerError | None:
    """Why a model is not drawn in C++, as an error if only the compiler prevents it; None if it is.

    Raises:
        SwitchError: ``ECHOGEN_NATIVE`` is neither 0 nor 1.
    """
    weight, c = model.norm.weight, model.config
    if loader.switched_off():
        return "ECHOGEN_NATIVE=0"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"it is {weight.dtype} on {weight.device.type}, not float32 on a CPU"
    try:
        library = loader.library(SOURCE)
    except loader.CompilerError as error:
        return error
    if not library.echogen_fits(ctypes.c_int64(c.head_dim)):
        return f"heads of {c.head_dim} numbers are not among the kernel's"
    size, threads = weights_read(model), torch.get_num_threads()
    if size > CACHED_BYTES and threads > FEW_THREADS:
        return (
            f"its layers are {size >> 20} MiB, more than the {CACHED_BYTES >> 20} a cache may "
            f"hold, and there are more than {FEW_THREADS} threads"
        )
    return None


def weights_read(model: UnifiedTransformer) -> int:
    """Bytes of the weights that a step reads: those of the layers and of the image head."""
    return sum(p.nbytes for part in (model.blocks, model.image_head) for p in part.parameters())


def gumbel_noise(seed: int, draw: Tensor, position: Tensor, columns: int) -> Tensor:
    """`kernels.philox.gumbel_noise`, bit for bit. On a CPU, C++ makes its integers where possible:
    PyTorch makes them in a hundred passes over the numbers.

    Args:
        seed, draw, position, columns: as for `kernels.philox.gumbel_noise`.
    """
    known = draw.dtype == position.dtype == torch.int64 and 0 <= seed < 1 << 63 and columns > 0
    if not known or draw.device.type != "cpu" or loader.switched_off():
        return philox.gumbel_noise(seed, draw, position, columns)
    try:
        library = loader.library(SOURCE)
    except loader.CompilerError:  # drawing reports it, see `decode.packed`
        return philox.gumbel_noise(seed, draw, position, columns)
    draw, position = (t.contiguous() for t in torch.broadcast_tensors(draw, position))
    noise = torch.empty(*draw.shape, columns, dtype=torch.float32, device=CPU)
    library.echogen_uniform(
        ctypes.c_uint64(seed), Address(draw.data_ptr()), Address(position.data_ptr()),
        ctypes.c_int64(draw.numel()), ctypes.c_int64(columns), Address(noise.data_ptr()),
    )  # fmt: skip
    return noise.log_().neg_().log_().neg_()


class NativeTransformer:
    """A copy of `UnifiedTransformer`'s weights as the library reads them.

    Args:
        model: a model for which ``why_not_native`` returns None.
    """

    def __init__(self, model: UnifiedTransformer) -> None:
        self.config = c = model.config
        self._bytes = weights_read(model)
        self._library = loader.library(SOURCE)
        self._lanes, self._block = self._library.echogen_lanes(), self._library.echogen_block()
        self.prefixes = PrefixCache()
        self._text = model.text_embedding.weight.detach().clone()
        self._kept = list[Tensor]()  # tensors whose addresses the library has
        blocks = [self._layer(b) for b in model.blocks if isinstance(b, Block)]
        into, _, out = model.image_head
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        half = c.head_dim // 2
        rope = torch.stack((model.rotary.cos[:, :half], model.rotary.sin[:, half:]), -1).float()
        self._model = _Model(
            (_Layer * len(blocks))(*blocks),
            self._packed(into.weight * model.norm.weight), self._filled(into.bias),
            self._packed(out.weight), self._filled(out.bias), self._keep(rope),
            c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width, c.head_width,
            c.codebook_size, len(rope), c.norm_eps,
        )  # fmt: skip

    def _layer(self, block: Block) -> _Layer:
        """Pack a layer; the norms' gains are multiplied into the weights after them."""
        qkv = pairs_beside(block.qkv.weight * block.attn_norm.weight, block)
        gate, up = (block.gate_up.weight * block.mlp_norm.weight).chunk(2)
        gate_up = torch.cat((self._more_rows(gate), self._more_rows(up)))
        weights = (qkv, block.out.weight, gate_up, block.down.weight)
        return _Layer(*map(self._packed, weights))

    def _more_rows(self, weight: Tensor) -> Tensor:
        """Pad [outputs, …] with rows of zeros to a multiple of the numbers in a register."""
        return F.pad(weight.T, (0, -len(weight) % self._lanes)).T

    def _packed(self, weight: Tensor) -> int:
        """Pack [outputs, inputs] in blocks of outputs, each [inputs, block]; return the address."""
        rows = self._more_rows(weight.detach())
        whole = len(rows) // self._block * self._block
        blocks = rows[:whole].unflatten(0, (-1, self._block)).mT
        return self._keep(torch.cat((blocks.flatten(), rows[whole:].T.flatten())))

    def _filled(self, bias: Tensor) -> int:
        return self._keep(self._more_rows(bias.detach()[:, None]))

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.clone(memory_format=torch.contiguous_format))
        return self._kept[-1].data_ptr()

    def run(self, call: _Call, outputs: int) -> Tensor:
        """Run a call and return its logits [``outputs``, V].

        Raises:
            IndexError: a token is outside what the call describes; no token was run.
            MemoryError: no room for the buffers; no token was run.
        """
        width = self.config.codebook_size
        padded = width + -width % self._lanes
        logits = torch.empty(outputs, padded, dtype=torch.float32, device=CPU)
        call.logits = logits.data_ptr()
        threads = torch.get_num_threads() if self._library.echogen_threaded() else 1
        call.together = self._bytes > CACHED_BYTES
        if not call.together:
            threads = max(1, min(threads, call.tokens // THREAD_TOKENS))
        call.threads = threads
        result = self._library.echogen_run(ctypes.byref(self._model), ctypes.byref(call))
        if result:
            if result in REFUSED:
                raise IndexError(f"{call.tokens} tokens with {REFUSED[result]}")
            raise MemoryError(f"no room for the buffers of {call.tokens} tokens")
        return logits[:, :width]

    def run_prompts(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """Run prompts in one call; return their prefixes."""
        c, lengths = self.config, [len(prompt) for prompt in prompts]
        blocks = [
            torch.empty(2, c.layers, c.kv_heads, n, c.head_dim, dtype=torch.float32, device=CPU)
            for n in lengths
        ]
        ids = torch.tensor([code for prompt in prompts for code in prompt], device=CPU)
        rows = Sequences(self, self._text, [(block, None) for block in blocks])
        number = torch.arange(len(prompts), device=CPU)
        row = number.repeat_interleave(torch.tensor(lengths, device=CPU))
        at = torch.cat([torch.arange(n, device=CPU) for n in lengths])
        with span("engine/prefill/run", rows=len(prompts), tokens=len(ids)):
            logits = rows.run(ids, row, at, last_only=True)
        return [Prefix(block, each) for block, each in zip(blocks, logits, strict=True)]


class Sequences:
    """Sequences in a cache, and calls on them.

    Args:
        model: runs them.
        table: float32 [ids, D], the embeddings of the tokens that are run.
        caches: for each row, its own keys and values, a view [2, layers, kv_heads, capacity, K]
            whose last two dimensions are contiguous, and the prefix before them: contiguous
            [2, layers, kv_heads, L, K], which many rows may share, or None.
    """

    def __init__(
        self,
        model: NativeTransformer,
        table: Tensor,
        caches: Sequence[tuple[Tensor, Tensor | None]],
    ) -> None:
        self._model, self._table = model, table.detach().contiguous()
        described = list[list[int]]()
        for own, _ in caches:
            assert own.dtype == table.dtype == torch.float32
            assert own.stride()[-2:] == (own.shape[-1], 1)
            described.append([own.data_ptr(), *own.stride()[:3], own.shape[-2], 0, 0])
        self._rows = torch.tensor(described, device=CPU)
        self._own = [own for own, _ in caches]
        self._before: list[Tensor | None] = [None] * len(caches)
        for row, (_, prefix) in enumerate(caches):
            self.put_before(row, prefix)
        self._call = _Call(
            table=self._table.data_ptr(), ids_known=len(table),
            rows=self._rows.data_ptr(), rows_known=len(described),
        )  # fmt: skip

    def before(self, row: int) -> Tensor | None:
        """The prefix before a row's own keys and values, or None."""
        return self._before[row]

    def put_before(self, row: int, prefix: Tensor | None) -> None:
        """Set the prefix before a row's own keys and values, see ``caches``.

        Raises:
            ValueError: a prefix of another shape, type or memory layout.
        """
        held = (0, 0)
        if prefix is not None:
            own, length = self._own[row].shape, prefix.shape[-2]
            wanted = (*own[:3], length, own[-1])
            if (
                prefix.shape != wanted
                or prefix.dtype != torch.float32
                or not prefix.is_contiguous()
            ):
                raise ValueError(
                    f"{prefix.dtype} {list(prefix.shape)} before a row; it must be float32 "
                    f"{list(wanted)} in one piece"
                )
            held = prefix.data_ptr(), length
        self._rows[row, -2:] = torch.tensor(held, device=CPU)
        self._before[row] = prefix

    def run(self, ids: Tensor, row: Tensor, at: Tensor, last_only: bool = False) -> Tensor:
        """Append tokens to their rows and return the logits after them.

        Args:
            ids, row, at: int64 [N], each token's id, row and place after the row's prefix. Tokens
                of a row must be adjacent and in order, and all tokens before the first of them must
                be in the cache.
            last_only: return the logits of each row's last token only.

        Returns:
            Logits [N, V], or with ``last_only`` one for every run of tokens of one row.

        Raises:
            IndexError, MemoryError: see `NativeTransformer.run`.
        """
        ids, row, at = (tensor.contiguous() for tensor in (ids, row, at))
        assert ids.dtype == row.dtype == at.dtype == torch.int64
        assert ids.shape == row.shape == at.shape
        call = self._call
        call.ids, call.row, call.at = ids.data_ptr(), row.data_ptr(), at.data_ptr()
        call.tokens, call.last_only = len(ids), last_only
        outputs = len(row.unique_consecutive()) if last_only else len(ids)
        return self._model.run(call, outputs)


class NativeDecoding:
    """One drawing in C++, code by code (`decode.Decoding`) or in windows (`decode.Windows`). A
    prompt's keys and values are in memory once, however many rows have it.

    Args:
        model: the packed weights.
        code_table: [V, D], the embeddings of image codes.
        ids, pads: prompts int64 [R, L], padded on the left by ``pads`` [R].
        steps: image tokens T.
        guided: the second half of the rows is unconditional; the prefixes of their prompts are kept
            in ``model.prefixes`` for later drawings.
        share: False stores a copy of its prompt for each row, for comparisons.

    Attributes:
        held: tokens of prompts in the cache.
    """

    def __init__(
        self,
        model: NativeTransformer,
        code_table: Tensor,
        ids: Tensor,
        pads: Tensor,
        steps: int,
        guided: bool,
        share: bool = True,
    ) -> None:
        c = model.config
        self._model, self._table, self._share = model, code_table, share
        self._prompts = [
            tuple(row[pad:]) for row, pad in zip(ids.tolist(), pads.tolist(), strict=True)
        ]
        distinct = dict.fromkeys(self._prompts)
        self._away = set(self._prompts[len(ids) // 2 :]) if guided else set()
        self.held = sum(map(len, distinct if share else self._prompts))
        shape = len(ids), 2, c.layers, c.kv_heads, steps, c.head_dim
        self._block = torch.empty(shape, dtype=torch.float32, device=CPU)
        self._row = torch.arange(len(ids), device=CPU)
        self._ids, self._at = torch.zeros_like(self._row), torch.zeros_like(self._row)

    def prefill(self) -> Tensor:
        """Run the prompts; return the image logits [R, V] of their last tokens."""
        model = self._model
        found = {prompt: model.prefixes.get(prompt) for prompt in self._away}
        missing = [prompt for prompt in dict.fromkeys(self._prompts) if found.get(prompt) is None]
        if missing:
            found |= zip(missing, model.run_prompts(missing), strict=True)
        for prompt in self._away.intersection(missing):
            model.prefixes.put(prompt, _there(found[prompt]))
        prefixes = [_there(found[prompt]) for prompt in self._prompts]
        caches = [
            (own, prefix.keys_values if self._share else prefix.keys_values.clone())
            for own, prefix in zip(self._block.unbind(0), prefixes, strict=True)
        ]
        self._rows = Sequences(model, self._table, caches)
        return torch.stack([prefix.logits for prefix in prefixes])

    def step(self, code: Tensor) -> Tensor:
        """Append image codes int64 [N] (with guidance, to both halves of R = 2N rows); return the
        next image logits [R, V]."""
        self._ids.view(-1, len(code)).copy_(code)
        logits = self._rows.run(self._ids, self._row, self._at)
        self._at.add_(1)
        return logits

    def window(self, codes: Tensor, first: list[int]) -> Tensor:
        """See `decode.Windows`."""
        rows, (images, width) = len(self._row), codes.shape
        at = torch.tensor(first, device=CPU)[:, None] + torch.arange(width, device=CPU)
        ids, at = (t.repeat(rows // images, 1).flatten() for t in (codes, at))
        logits = self._rows.run(ids, self._row.repeat_interleave(width), at)
        return logits.view(rows, width, -1)


def _there(prefix: Prefix | None) -> Prefix:
    assert prefix is not None
    return prefix
