"""One batch at one scale in modes latency and rollout. This engine is timed and reported first.
Then each peer is timed in turn with it, so that whatever ends a run leaves what was measured."""

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
"""Share of images that must equal this engine's, code for code. In a batch of hundreds, two codes
of random weights are now and then within rounding of each other."""
SLOW = 5.0
"""If a peer's drawing for comparison takes longer than this many seconds on a GPU, that drawing is
also its time. The port's loop may take half a minute per image; launches decide that, and noise
does not."""
WARM_UP = 8
"""Codes that a peer draws first, to load what it runs, compile it, and record its graphs."""
ERRORS = "logits_error", "logits_error_plain"


class Cell:
    """Times one batch with every provider.

    Args:
        contestants: the providers.
        asked: the batch.
        repeats: timed drawings of each.
        fixed: the thread count of all on a CPU; None: the fastest one for each.
        threads: thread counts of the providers known so far; extended here.
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
        """Yield this engine's row, and one of each peer that runs here, each as soon as it is
        measured.

        Raises:
            WrongResult: this engine's logits are off, or a peer draws other codes; then none of the
                rows is valid.
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
            self._at_best(OURS)  # records the graphs to time
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
        """Return a provider's most likely codes, the seconds they took and, on a GPU, the MiB held.
        This run also creates what the provider keeps for its next drawing."""
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
        """Find a provider's thread count on a CPU, and return its peak memory in MiB."""
        draw = self._contestants.timed(name, self._asked)
        if name not in self._threads:
            counts = range(1, 1 + (1 if self._on_gpu else os.cpu_count() or 1))
            self._threads[name] = self._fixed or _quickest(draw, counts)
        # torch.compile would also compile the counting, and a few codes do not fill a cache.
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
        """On a GPU: seconds of this engine and of a peer in turn, but only one drawing of each if
        the peer's drawing for comparison took long."""
        ours, theirs = (partial(self._at_best, one) for one in (OURS, name))
        ours()  # records again
        if took > SLOW and not name.startswith(OURS):
            return {name: [took], OURS: [seconds(ours)]}
        theirs()  # records the graphs to time
        if name != COMPILED:
            return self._in_turn(OURS, name)
        times: dict[str, list[float]] = {name: [], OURS: []}
        for _ in range(self._repeats):
            times[name].append(seconds(theirs))
            # When Inductor records a graph, it frees cuBLAS's workspaces, whose addresses are in
            # this engine's graphs. So these are recorded again before they run again.
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
    """Return the share of images that equal this engine's, code for code. In bfloat16 the first
    rounding makes them differ, so there the share is reported but not required."""
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
    """Return the thread count that draws fastest, by one drawing each."""
    spent = {}
    for count in counts:
        torch.set_num_threads(count)
        spent[count] = seconds(draw) if len(counts) > 1 else 0.0
    return min(spent, key=spent.__getitem__)
