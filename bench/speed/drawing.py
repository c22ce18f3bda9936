"""How near drawing is to the machine's limit, for single images (`latency`) and for rollouts of
many in groups (`rollout`), beside the port's loop and plain eager PyTorch on the same weights.

A step must read the weights it multiplies by and the keys and values of its rows;
`phases.step_floor` computes how much that is. A peer that does not run here is left out, with the
reason.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from echogen.bench.harness import WrongResult, environment, one_line, seconds
from echogen.bench.registry import OURS
from echogen.bench.speed import stretches
from echogen.bench.speed.cell import Cell, Row
from echogen.bench.speed.contestants import CACHES, COPIES, PORT, Asked, Contestants
from echogen.bench.speed.models import GPU_ONLY, Subject, dtype_of, hollow, load

Mode = Literal["latency", "rollout"]
Note = Callable[[str], None]
MODELS = ("tiny", "random:100m", "janus_pro_1b")
BATCHES: dict[Mode, tuple[int, ...]] = {
    "latency": (1,),
    "rollout": (8, 16, 32, 64, 128, 256, 512),
}
SCALES: dict[Mode, tuple[float, ...]] = {"latency": (5.0,), "rollout": (1.0, 5.0)}
GROUP = 8
"""Images of one prompt in a rollout."""


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    Attributes:
        mode: "latency" draws the most likely codes of one prompt. "rollout" draws groups of GROUP
            at temperature 1, each provider with its own noise; before that, each one's most likely
            codes are compared with this engine's.
        batches, scales: images at once, and guidance scales.
        peers: providers beside this engine.
        repeats: timed drawings of each.
        threads: of every provider on a CPU; None: the fastest count of each, found by one drawing
            per count at the first batch.
        most: seconds that one batch may take on a CPU, estimated from the batch before.
        long: processor seconds that the smallest batch of a rollout may take on a CPU; a slower
            model is timed as described in `stretches`.
        codes: number of an image's codes that peers draw; None: all. ``run`` sets it for such
            models.
    """

    mode: Mode
    batches: Sequence[int]
    scales: Sequence[float]
    peers: Sequence[str]
    repeats: int = 5
    threads: int | None = None
    most: float = 120.0
    long: float = 2.0
    codes: int | None = None

    @property
    def group(self) -> int:
        """Images of one prompt."""
        return GROUP if self.mode == "rollout" else 1

    @property
    def cells(self) -> int:
        """Number of batches and scales of a model."""
        return len(self.batches) * len(self.scales)


@dataclass
class Found:
    """What a run has found so far; see ``run`` for the names.

    Args:
        note: called with every line as it is added.
    """

    note: Note
    results: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False

    def leave(self, line: str) -> None:
        """Record that something is not run."""
        self.left_out.append(line)
        self.note(line)

    def refuse(self, line: str) -> None:
        """Record that a result is wrong."""
        self.refused.append(line)
        self.note(line)

    def fail(self, where: str, error: Exception) -> None:
        """Record that the measurement at ``where`` ended in an error."""
        traceback.print_exception(error)
        self.failed.append(f"{where}: {one_line(error)}")
        self.note(self.failed[-1])

    def to_dict(self) -> dict[str, Any]:
        """Return the results, JSON-ready, and add every ``ratio``: the port's time over a
        provider's. Each of the two times is relative to this engine's, as the median over the pairs
        drawn in turn."""
        port = {_of_cell(r): r["times_as_long"] for r in self.results if r["provider"] == PORT}
        rows = [
            row
            | {
                "ratio": port[_of_cell(row)] / row["times_as_long"]
                if _of_cell(row) in port
                else None
            }
            for row in self.results
        ]
        return {
            "results": rows,
            "left_out": self.left_out,
            "refused": self.refused,
            "failed": self.failed,
            "interrupted": self.interrupted,
        }


def _of_cell(row: Row) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["cfg"]


def run(
    plan: Plan,
    models: Sequence[str] = MODELS,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    note: Note = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time drawings; JSON-ready.

    Args:
        models: what ``Engine.from_pretrained`` takes, or random models (``models.RANDOM``).
        device, dtype: the device, and the type of weights, keys and values.
        seed: of random weights, prompts and noise.
        note: called with everything that is left out.
        progress: called with (cells done, cells in all); a cell is a model, a batch and a scale.

    Returns:
        ``results``, one object per model, batch, scale and provider: images and tokens per second,
        ms per step, and the step's floor: ``bytes_per_step`` by `step_floor`, and ``limit_share``,
        the share of the time that the floor would take at the rates of memory and of products that
        were measured in this run (None where they could not be). This engine is timed alone first,
        then each peer in turn with it: ``times_as_long`` is the peer's time over this engine's,
        median over the pairs. ``ratio``: the port's (dynamic cache) ``times_as_long`` over this
        provider's; None where the port was not timed. ``peak_mib``: memory beyond the weights
        (`held_mib`). ``overhead_us_per_token``, for this engine in mode latency: a step of a model
        with as many layers whose tensors hold only a few numbers, which leaves Python and PyTorch's
        dispatch. ``codes_timed``: codes of an image; fewer than all where the rest is projected
        (`stretches`). ``logits_error``, ``logits_error_plain``, for this engine on a GPU in
        bfloat16: see `logits.errors`. ``left_out``: what was not run, and why. ``refused``: cells
        whose times are discarded because a provider draws other codes. ``failed``: cells that an
        error of this engine ended, with their results until then. ``interrupted``: Ctrl-C (SIGINT)
        ended the run, and these are the results until then.

    Raises:
        ValueError: an unknown model or dtype, a batch below 1, or in mode rollout a batch that is
            no multiple of GROUP.
        CheckpointError: there is no such checkpoint.
    """
    check(plan, dtype)
    threads, found, cells = torch.get_num_threads(), Found(note), plan.cells
    taken_on = environment(device)  # now, as after an illegal access no call to the device works
    try:
        for place, name in enumerate(models):
            if name in GPU_ONLY and device == "cpu":
                found.leave(f"{name}: needs a GPU")
                continue
            told = partial(_from, progress, place * cells, len(models) * cells)
            try:
                _model(plan, name, device, dtype, seed, found, told)
            except RuntimeError as error:  # of the device: the weights may not even have loaded
                found.fail(name, error)
    except KeyboardInterrupt:  # what was measured until then is kept
        found.interrupted = True
        found.leave(f"interrupted at {name}, with {len(found.results)} results")
    finally:
        torch.set_num_threads(threads)
    asked = {"mode": plan.mode, "dtype": dtype, "repeats": plan.repeats, "seed": seed}
    asked |= {"group": plan.group}
    return asked | taken_on | found.to_dict()


def _from(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def check(plan: Plan, dtype: str) -> None:
    """Check the arguments of ``run``. Raises ValueError."""
    dtype_of(dtype)
    for batch in plan.batches:
        if batch < 1 or batch % plan.group:
            raise ValueError(f"batch = {batch}; mode {plan.mode} takes multiples of {plan.group}")
    if plan.repeats < 1:
        raise ValueError(f"repeats = {plan.repeats}; it must be at least 1")


def _model(
    plan: Plan,
    name: str,
    device: str,
    dtype: str,
    seed: int,
    found: Found,
    progress: Callable[[int], None],
) -> None:
    """Run the cells of one model."""
    group = plan.group
    wanted = max(plan.scales) > 1 and any(peer in CACHES for peer in plan.peers)
    most = max(plan.batches) // group
    subject = load(name, most, seed, wanted, device).to(device, dtype_of(dtype))
    about = {"mode": plan.mode, "model": name, "dtype": dtype, "device": device}
    contestants = Contestants(subject, plan.peers, f"{name}: ", found.leave, found.fail)

    def asked_for(batch: int, cfg: float) -> Asked:
        prompts = subject.prompts[: batch // group].repeat_interleave(group, 0)
        return Asked(prompts, cfg, plan.mode == "rollout", seed, plan.codes)

    if plan.mode == "rollout" and device == "cpu":
        least = asked_for(plan.batches[0], plan.scales[0])
        plan = _suited(plan, contestants, least, lambda line: found.leave(f"{name}: {line}"))
    done, last, threads = 0, dict[float, tuple[int, float]](), dict[str, int]()
    for batch in plan.batches:
        for cfg in plan.scales:
            progress(done := done + 1)
            before, took = last.get(cfg, (batch, 0.0))
            where = f"{name}, batch {batch}, cfg {cfg:g}"
            if device == "cpu" and took * batch / before > plan.most:
                took *= batch / before
                found.leave(f"{where}: would take {took:.0f} s on this CPU")
                last[cfg] = batch, took
                continue
            began, kept = time.perf_counter(), len(found.results)
            cell = Cell(contestants, asked_for(batch, cfg), plan.repeats, plan.threads, threads)
            try:
                for row in cell.rows(plan.peers):
                    found.results.append(about | row)
            except torch.OutOfMemoryError:
                found.leave(f"{where}: needs more memory than there is")
            except WrongResult as error:
                del found.results[kept:]
                found.refuse(f"{where}: {error}")
            except Exception as error:  # the next may succeed, and what is measured is kept
                found.fail(where, error)
            else:
                last[cfg] = batch, time.perf_counter() - began
    own = [r for r in found.results if r["model"] == name and r["provider"] == OURS]
    if plan.mode == "latency" and own:  # last, as on a GPU it compiles its own kernels
        torch.set_num_threads(threads[OURS])
        overhead = _overhead_us(subject, name, found)
        for row in own:
            row |= overhead


def _suited(plan: Plan, contestants: Contestants, least: Asked, leave: Note) -> Plan:
    """Return the plan, shortened if the smallest batch takes longer than ``plan.long``."""
    torch.set_num_threads(plan.threads or 1)
    took = stretches.busy_seconds(contestants.greedy(OURS, least))
    if took <= plan.long:
        return plan
    peers = tuple(peer for peer in plan.peers if peer != COPIES)
    repeats = min(plan.repeats, stretches.REPEATS)
    codes = min(stretches.CODES, contestants.image_tokens)
    leave(
        f"{len(least.prompts)} images, cfg {least.cfg:g}, take {took:.1f} s on this CPU, so each "
        f"batch is drawn {repeats} times, peers draw only the first {codes} of "
        f"{contestants.image_tokens} codes (the rest is assumed to go as fast) and {COPIES} is not "
        f"timed"
    )
    return replace(plan, peers=peers, repeats=repeats, codes=codes)


def _overhead_us(subject: Subject, name: str, found: Found) -> dict[str, float]:
    """Return the microseconds per step of this engine on a model without arithmetic. It is the
    minimum of some drawings, as a busy machine only adds time."""
    try:
        empty = hollow(subject)
        asked = Asked(empty.prompts[:1], 5.0, False, 0)
        draw = Contestants(empty, (), "", found.leave, found.fail).greedy(OURS, asked)
        draw()
        least = min(seconds(draw) for _ in range(7))
    except Exception as error:  # e.g. of a compiler; it must not lose the other figures
        found.leave(f"{name}: its step without arithmetic: {one_line(error)}")
        return {}
    return {"overhead_us_per_token": 1e6 * least / empty.transformer.config.image_tokens}
