"""Who draws in modes latency and rollout: this engine, variants of it (a copy of its prompt in
every row, weights or caches in 8 bits), plain eager PyTorch, and the port's loop (with either of
its caches, and compiled)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from echogen.bench.harness import WrongResult, one_line
from echogen.bench.peers.janus_port import CacheKind
from echogen.bench.registry import OURS, Floor
from echogen.bench.roofline import Roofline, measure
from echogen.bench.speed import logits
from echogen.bench.speed.models import Subject
from echogen.bench.speed.phases import Weights, step_floor
from echogen.engine.cpu.native import NativeTransformer
from echogen.engine.decoding.decode import Decoder, PlainDecoding, decode_image, left_padded
from echogen.engine.decoding.rollout import RecordingSampler
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import on_operators
from echogen.engine.gpu.device import DeviceTransformer

T = TypeVar("T")
Draw = Callable[[], Tensor]
Told = Callable[[], None] | None
"""Called when each code of a batch is drawn (for the port: when its logits are available)."""
EAGER, PORT = "eager", "transformers"
STATIC, COMPILED = "transformers:static", "transformers:compile"
COPIES = "echogen:copies"
FP8, FP8_CACHE = "echogen:fp8", "echogen:fp8-cache"
PEERS = (PORT, COPIES, FP8, FP8_CACHE, EAGER, STATIC, COMPILED)
"""In order of timing. The port is first, in case time runs out, because all are compared with it.
The last takes minutes to compile, and its graphs may disturb this engine's."""
CACHES: dict[str, CacheKind] = {PORT: "dynamic", STATIC: "static", COMPILED: "static"}


@dataclass(frozen=True)
class Asked:
    """One batch.

    Attributes:
        prompts: int64 [N, L].
        cfg: guidance scale.
        sample: draw at temperature 1, with log-probabilities; otherwise draw the most likely codes.
        seed: of the noise.
        codes: number after which eager and the port stop; None: a whole image. This engine draws
            whole images.
    """

    prompts: Tensor
    cfg: float
    sample: bool
    seed: int
    codes: int | None = None


class Contestants:
    """Providers on one set of weights.

    Args:
        subject: the weights.
        peers: names from PEERS.
        about: prefix of the lines passed to ``leave``.
        leave: called once for each peer that does not run here, with the first line of its error.
        fail: called once, with the error, if such a peer is a variant of this engine. A ValueError,
            with which the engine refuses what a device cannot do, goes to ``leave``.
    """

    def __init__(
        self,
        subject: Subject,
        peers: Sequence[str],
        about: str,
        leave: Callable[[str], None],
        fail: Callable[[str, Exception], None],
    ) -> None:
        self._subject, self._peers, self._about = subject, peers, about
        self._leave, self._fail = leave, fail
        self._broken, self._ceilings = set[str](), dict[int, Roofline]()
        self._models = dict[tuple[bool, bool], Decoder]()

    def _model(self, name: str = OURS) -> Decoder:
        """Return the model that this engine draws with, made at first use."""
        eight = name == FP8, name == FP8_CACHE  # weights, caches
        if eight not in self._models:
            s = self._subject
            with torch.inference_mode():
                self._models[eight] = on_operators(s.transformer, s.code_table, *eight)
        return self._models[eight]

    def forget_steps(self) -> None:
        """Free this engine's steps and caches on a GPU; its next drawing records them again."""
        for model in self._models.values():
            if isinstance(model, DeviceTransformer):
                model.release()

    def release(self) -> None:
        """Free what drawings on a GPU keep for the next one. With large batches, memory holds that
        of only one provider."""
        self.forget_steps()
        if self._subject.port is not None and self._subject.code_table.is_cuda:
            self._subject.port.release()

    def check_logits(self, asked: Asked) -> tuple[float, float] | None:
        """Return the errors of this engine's logits and of plain torch's (`logits.errors`). None
        unless this engine draws with a GPU's operators in a type in which codes are no evidence.

        Raises:
            WrongResult: this engine's are too far off.
        """
        model = self._model()
        if self.exact or not isinstance(model, DeviceTransformer):
            return None
        return logits.errors(model, self._rows(asked), asked.cfg != 1, self._subject.pad)

    @property
    def exact(self) -> bool:
        """Whether codes must be equal to the last one."""
        return self._subject.code_table.dtype == torch.float32

    @property
    def image_tokens(self) -> int:
        """Codes T of an image."""
        return self._subject.transformer.config.image_tokens

    def names(self, asked: Asked) -> list[str]:
        """Return this engine, and the peers that can draw such a batch, in the order of PEERS. The
        port draws only with cfg above 1."""
        there = {EAGER} | ({COPIES} if self._shares(asked) else set())
        there |= set(CACHES) if asked.cfg > 1 else set()
        rounded = isinstance(self._model(), DeviceTransformer) and not self.exact
        there |= {FP8, FP8_CACHE} if rounded else set()
        return [OURS, *(p for p in PEERS if p in self._peers and p in there - self._broken)]

    def _shares(self, asked: Asked) -> bool:
        """Whether rows share a prompt that this engine keeps only once."""
        rows = self._rows(asked)
        keeps_once = isinstance(self._model(), NativeTransformer | DeviceTransformer)
        return keeps_once and len({*map(tuple, rows)}) < len(rows)

    def greedy(self, name: str, asked: Asked) -> Draw:
        """Return the call that draws the most likely codes, for comparison."""
        return self._draw(name, asked, Sampling(temperature=0, cfg=asked.cfg))

    def timed(self, name: str, asked: Asked, told: Told = None) -> Draw:
        """Return the call to time; it returns when the device is done."""
        sampling = Sampling(temperature=float(asked.sample), cfg=asked.cfg)
        return partial(waited, self._draw(name, asked, sampling, told))

    def attempt(self, name: str, call: Callable[[], T]) -> T | None:
        """Return the result of a peer's ``call``. If it raises, return None and leave the peer out
        from now on, or only this time if memory was short.

        Raises:
            WrongResult: the call raises it.
        """
        try:
            return call()
        except WrongResult:
            raise
        except torch.OutOfMemoryError:
            self._leave(f"{self._about}{name}: no room beside the others")
            return None
        except Exception as error:  # the reason may come from a compiler or another version
            self._broken.add(name)
            if name.startswith(OURS) and not isinstance(error, ValueError):
                self._fail(f"{self._about}{name}", error)
            else:
                self._leave(f"{self._about}{name}: {one_line(error)}")
            return None

    def _draw(self, name: str, asked: Asked, sampling: Sampling, told: Told = None) -> Draw:
        if name in CACHES:
            port = self._subject.port
            assert port is not None, "loaded wherever a peer of it is asked for"
            return partial(
                port.generate, asked.prompts, asked.cfg, CACHES[name], sampling.temperature > 0,
                name == COMPILED, asked.codes, told,
            )  # fmt: skip
        if name == EAGER:
            return partial(self._eager, asked, sampling, told)
        return partial(self._own, name, asked, sampling, told)

    def _rows(self, asked: Asked) -> list[list[int]]:
        return self._subject.rows(asked.prompts, asked.cfg)

    def _sampler(self, asked: Asked, sampling: Sampling) -> Sampler:
        """Return a sampler; in rollouts it keeps log-probabilities."""
        c, device = self._subject.transformer.config, asked.prompts.device
        made = RecordingSampler if asked.sample and sampling.temperature > 0 else Sampler
        draws = torch.arange(len(asked.prompts), device=device)
        return made(sampling, asked.seed, draws, c.codebook_size, c.image_tokens)

    def _own(self, name: str, asked: Asked, sampling: Sampling, told: Told) -> Tensor:
        sampler, s = self._sampler(asked, sampling), self._subject
        rows, progress = self._rows(asked), None if told is None else lambda *_: told()
        model, share = self._model(name), name != COPIES
        return decode_image(model, s.code_table, rows, sampler, s.pad, progress, share)

    @torch.inference_mode()
    def _eager(self, asked: Asked, sampling: Sampling, told: Told) -> Tensor:
        """Draw with the plain transformer and a cache, and nothing else."""
        s, sampler = self._subject, self._sampler(asked, sampling)
        steps = s.transformer.config.image_tokens
        device = s.code_table.device
        ids, pads = (t.to(device) for t in left_padded(self._rows(asked), s.pad))
        decoding = PlainDecoding(s.transformer, s.code_table, ids, pads, steps)
        steps = steps if asked.codes is None else asked.codes
        codes = torch.empty(len(asked.prompts), steps, dtype=torch.int64, device=device)
        logits = decoding.prefill()
        for step in range(steps):
            code = codes[:, step] = sampler(logits, step)
            if told is not None:
                told()
            if step + 1 < steps:
                logits = decoding.step(code)
        return codes

    def ceiling(self, threads: int) -> Roofline | None:
        """Return the machine's rates, measured once, with this engine's threads on a CPU. There,
        the copy is as large as the weights, which may lie in a cache that is faster than memory.
        None where rates cannot be measured; the timings do not need them."""
        if threads not in self._ceilings:
            torch.set_num_threads(threads)
            weights, table = Weights.of(self._subject.transformer.config), self._subject.code_table
            held = table.element_size() * (weights.body + weights.image_head)
            try:
                self._ceilings[threads] = measure(table.device, table.dtype, held)
            except Exception as error:
                self._leave(f"{self._about}rates of the machine: {one_line(error)}")
                return None
        return self._ceilings[threads]

    def floor(self, asked: Asked, name: str = OURS) -> Floor:
        """Return the least cost of a step of such a batch. What a provider stores in 8 bits counts
        as 8 bits."""
        rows = self._rows(asked)
        different = len({tuple(row) for row in rows})
        c, itemsize = self._subject.transformer.config, self._subject.code_table.element_size()
        eight = name == FP8, name == FP8_CACHE
        return step_floor(c, len(rows), different, len(rows[0]), itemsize, *eight)


def waited(draw: Draw) -> Tensor:
    """Return the codes of a drawing once its device is done."""
    codes = draw()
    if codes.is_cuda:
        torch.cuda.synchronize()
    return codes
