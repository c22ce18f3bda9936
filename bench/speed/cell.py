"""One batch at one scale of modes latency and rollout: this engine is timed and told first, then
one peer after another in turn with it, so that whatever ends a run leaves what was measured."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from echogen.bench.harness import WrongResult, alternate, quantiles, seconds
from echogen.bench.registry import OURS
from echogen.bench.roofline import Roofline
from echogen.bench.speed import stretches
from echogen.bench.speed.contestants import COMPILED, Asked, Contestants, Told, waited
from echogen.bench.speed.held import held_mib

Row = dict[str, Any]
LEAST_SAME = 0.9
"""Share of images that must be code for code those of this engine: in a batch of hundreds two codes
of random weights are within rounding of each other now and then."""
SLOW = 5.0
"""Seconds of a drawing on a GPU above which the one that a peer is compared by is its time: the
port's loop may take half a minute for an image, which its launches decide and noise does not."""
WARM_UP = 8
"""Codes that a peer draws before: they load what it runs, compile it, and record its graphs."""
ERRORS = "logits_error", "logits_error_plain"


class Cell:
    """Who draws one batch, and how long it takes them.

    Args:
        contestants: those who may.
        asked: the batch.
        repeats: timed drawings of each.
        fixed: the threads of all on a CPU; None: those that draw quickest.
        threads: of each provider, as known so far; added to.
    """

    def __init__(
        self,
        contestants: Contestants,
        asked: Asked,
        repeats: int,
        fixed: int | None,
        threads: MutableMapping[str, int],
    ) -> None:
        self._contestants, self._asked, self._repeats = contestants, asked, repeats
        self._fixed, self._threads = fixed, threads
        self._on_gpu = asked.prompts.is_cuda
        self._wanted = torch.empty(0)
        self._ceiling: Roofline | None = None

    def rows(self, peers: Sequence[str]) -> Iterator[Row]:
        """This engine's row, and one of each peer that runs here, each as soon as it is there.

        Raises:
            WrongResult: this engine's logits are off, or a peer draws other codes; then none of the
                rows is worth anything.
            RuntimeError: this engine does not draw here.
        """
        self._contestants.release()
        yield self._own()
        for name in [name for name in self._contestants.names(self._asked) if name in peers]:
            row = self._contestants.attempt(name, partial(self._peer, name))
            if row is not None:
                yield row

    def _own(self) -> Row:
        self._wanted, _, held = self._first(OURS)
        errors = self._contestants.check_logits(self._asked)
        peak = self._prepare(OURS, held)
        self._ceiling = self._contestants.ceiling(self._threads[OURS])
        if self._on_gpu:
            self._at_best(OURS)  # records what is timed
        row = self._row(OURS, self._in_turn(OURS)[OURS], 1.0, peak, 1.0)
        return row | (dict(zip(ERRORS, errors, strict=True)) if errors else {})

    def _peer(self, name: str) -> Row:
        if self._on_gpu:
            self._contestants.release()
        codes, took, held = self._first(name)
        wanted = self._wanted[:, : self._asked.codes]
        same = _same(name, codes, wanted, self._contestants.exact)
        peak = self._prepare(name, held)
        times = self._beside(name, took) if self._on_gpu else self._in_turn(OURS, name)
        pairs = [theirs / ours for ours, theirs in zip(times[OURS], times[name], strict=True)]
        return self._row(name, times[name], same, peak, statistics.median(pairs))

    def _first(self, name: str) -> tuple[Tensor, float, float | None]:
        """The most likely codes of a provider, the seconds they took, and on a GPU MiB held: what
        it keeps for its next drawing it makes now."""
        greedy = self._contestants.greedy
        torch.set_num_threads(self._fixed or 1)
        drawn, took, held = list[Tensor](), list[float](), None

        def first() -> None:
            if self._on_gpu and not name.startswith(OURS):
                waited(greedy(name, replace(self._asked, codes=WARM_UP)))
            took.append(seconds(lambda: drawn.append(waited(greedy(name, self._asked)))))

        if self._on_gpu:
            held = held_mib(first, "cuda")
        else:
            first()
        return drawn[0], took[0], held

    def _prepare(self, name: str, held: float | None) -> float | None:
        """Find out a provider's threads on a CPU; its peak memory in MiB."""
        draw = self._contestants.timed(name, self._asked)
        if name not in self._threads:
            counts = range(1, 1 + (1 if self._on_gpu else os.cpu_count() or 1))
            self._threads[name] = self._fixed or _quickest(draw, counts)
        # Counting would be compiled too, and a few codes fill no cache.
        uncounted = name == COMPILED or (name != OURS and self._asked.codes is not None)
        return held if self._on_gpu or uncounted else held_mib(draw)

    def _at_best(self, name: str, told: Told = None) -> None:
        torch.set_num_threads(self._threads[name])
        self._contestants.timed(name, self._asked, told)()

    def _in_turn(self, *names: str) -> dict[str, list[float]]:
        draws = {name: partial(self._at_best, name) for name in names}
        if self._asked.codes is None:
            return alternate(draws, self._repeats)
        return stretches.in_turn(draws, self._repeats, self._wanted.shape[1])

    def _beside(self, name: str, took: float) -> dict[str, list[float]]:
        """On a GPU: seconds of this engine and of a peer in turn, where the one that was compared
        took so long."""
        ours, theirs = (partial(self._at_best, one) for one in (OURS, name))
        ours()  # records again
        if took > SLOW and not name.startswith(OURS):
            return {name: [took], OURS: [seconds(ours)]}
        theirs()  # records what is timed
        if name != COMPILED:
            return self._in_turn(OURS, name)
        times: dict[str, list[float]] = {name: [], OURS: []}
        for _ in range(self._repeats):
            times[name].append(seconds(theirs))
            # Where Inductor records a graph it frees cuBLAS's workspaces, whose addresses are in
            # this engine's graphs: they are recorded again before they run again.
            self._contestants.forget_steps()
            ours()
            times[OURS].append(seconds(ours))
        return times

    def _row(
        self, name: str, times: list[float], same: float, peak: float | None, as_long: float
    ) -> Row:
        (images, steps), asked, ceiling = self._wanted.shape, self._asked, self._ceiling
        spread, floor = quantiles(times), self._contestants.floor(asked, name)
        step = spread["median"] / steps
        return {
            "provider": name,
            "batch": images,
            "cfg": asked.cfg,
            "images_per_s": images / spread["median"],
            "tokens_per_s": images * steps / spread["median"],
            "ms_per_step": step * 1e3,
            "ms_per_step_q20": spread["q20"] / steps * 1e3,
            "ms_per_step_q80": spread["q80"] / steps * 1e3,
            "bytes_per_step": floor.bytes,
            "limit_share": None if ceiling is None else ceiling.seconds(floor) / step,
            "bound": None if ceiling is None else ceiling.bound(floor),
            "times_as_long": as_long,
            "threads": self._threads[name],
            "same_images": same,
            "repeats": len(times),
            "codes_timed": steps if name == OURS else asked.codes or steps,
            "peak_mib": peak,
        }


def _same(name: str, codes: Tensor, wanted: Tensor, exact: bool) -> float:
    """Share of images that are code for code this engine's. In bfloat16 the first rounding parts
    them, so there it is told and not asked for."""
    if codes.shape != wanted.shape:
        shapes = f"{tuple(codes.shape)}, not {tuple(wanted.shape)}"
        raise WrongResult(f"{name} drew codes of shape {shapes}; no time is kept")
    same = float((codes == wanted).all(1).double().mean())
    if exact and same < LEAST_SAME:
        raise WrongResult(
            f"{name} drew {1 - same:.0%} of {len(wanted)} images otherwise than this engine; "
            "no time is kept"
        )
    return same


def _quickest(draw: Callable[[], object], counts: Sequence[int]) -> int:
    """The thread count that draws quickest, by one drawing each."""
    spent = {}
    for count in counts:
        torch.set_num_threads(count)
        spent[count] = seconds(draw) if len(counts) > 1 else 0.0
    return min(spent, key=spent.__getitem__)
