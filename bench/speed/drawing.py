"""How near drawing is to what the machine allows: one image at a time (`latency`) and rollouts of
many in groups (`rollout`), beside the port's loop and plain eager PyTorch on the same weights.

A step must read the weights it multiplies by and the keys and values of its rows; how much that is
says `phases.step_floor`. A peer that does not run where this does is left out, with the reason.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from echogen.bench.harness import WrongResult, alternate, environment, quantiles, seconds
from echogen.bench.registry import OURS, Floor
from echogen.bench.roofline import Roofline
from echogen.bench.speed import stretches
from echogen.bench.speed.contestants import (
    CACHES,
    COMPILED,
    COPIES,
    PORT,
    Asked,
    Contestants,
    Draw,
    Told,
)
from echogen.bench.speed.held import held_mib
from echogen.bench.speed.models import GPU_ONLY, Subject, hollow, load

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
LEAST_SAME = 0.9
"""Share of images that must be code for code those of this engine: in a batch of hundreds two codes
of random weights stand within rounding of each other now and then."""
SLOW = 5.0
"""Seconds of a drawing on a GPU above which a peer is timed by one alone: the port's loop may take
half a minute for an image, which its launches decide and noise does not."""
ERRORS = "logits_error", "logits_error_plain"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """What one run times.

    Attributes:
        mode: "latency" draws the most likely codes of one prompt; "rollout" draws groups of GROUP
            at temperature 1, each provider with its own noise, after the most likely codes of all
            providers were compared.
        batches, scales: images at once, and guidance scales.
        peers: providers beside this engine.
        repeats: timed drawings of each.
        threads: of every provider on a CPU; None takes each one's quickest count, found by one
            drawing each at the first batch.
        most: seconds that one batch may take on a CPU, by what the one before it took.
        long: processor seconds that the smallest batch of a rollout may take on a CPU; a model
            that takes more is timed as `stretches` says.
        codes: of an image that peers draw; None: all. Set by ``run`` for such models.
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
        device, dtype: where, and of what type weights, keys and values are.
        seed: of random weights, prompts and noise.
        note: told of everything that is left out.
        progress: called with (cells done, cells in all); a cell is a model, a batch and a scale.

    Returns:
        ``results``, one object a model, batch, scale and provider: images and tokens a second, ms a
        step, and the step's floor: ``bytes_per_step`` by `step_floor`, and ``limit_share``, the
        share of the time that the floor would take at the rates of memory and of products that were
        measured in this run. ``ratio``: the port's time (dynamic cache) over this provider's,
        median over the pairs; None where the port did not run. ``peak_mib``: held beyond the
        weights (`held_mib`). ``overhead_us_per_token``, of this engine in mode latency: a step of a
        model of as many layers whose tensors hold a few numbers, which leaves Python and PyTorch's
        dispatch. ``codes_timed``: of an image, fewer than all where the rest is projected
        (`stretches`). ``logits_error``, ``logits_error_plain``, of this engine on a GPU in
        bfloat16: see `logits.errors`. ``left_out``: what was not run and why. ``refused``: cells of
        which nothing was timed, as a provider draws other codes. ``interrupted``: Ctrl-C (SIGINT)
        ended it, and this is what was measured until then.

    Raises:
        ValueError: an unknown model or dtype, a batch below 1, a batch of mode rollout that is no
            multiple of GROUP.
        CheckpointError: no such checkpoint.
    """
    check(plan, dtype)
    threads, rows, left = torch.get_num_threads(), list[dict[str, Any]](), list[str]()
    refused = list[str]()

    def leave(line: str) -> None:
        left.append(line)
        note(line)

    total, interrupted = len(models) * len(plan.batches) * len(plan.scales), False
    try:
        for place, name in enumerate(models):
            if name in GPU_ONLY and device == "cpu":
                leave(f"{name}: needs a GPU")
                continue
            done = place * len(plan.batches) * len(plan.scales)
            told = partial(_from, progress, done, total)
            for cell in _model(plan, name, device, dtype, seed, leave, told):
                if isinstance(cell, WrongResult):
                    refused.append(str(cell))
                    note(str(cell))
                else:
                    rows += cell
    except KeyboardInterrupt:  # whoever is out of time keeps what he has
        interrupted = True
        leave(f"interrupted at {name}, with {len(rows)} results")
    finally:
        torch.set_num_threads(threads)
    asked = {"mode": plan.mode, "dtype": dtype, "repeats": plan.repeats, "seed": seed}
    asked |= {"group": GROUP if plan.mode == "rollout" else 1}
    found = {"results": rows, "left_out": left, "refused": refused, "interrupted": interrupted}
    return asked | environment(device) | found


def _from(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def check(plan: Plan, dtype: str) -> None:
    """Raises ValueError, see ``run``."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}; choose one of {', '.join(DTYPES)}")
    least = GROUP if plan.mode == "rollout" else 1
    for batch in plan.batches:
        if batch < 1 or batch % least:
            raise ValueError(f"batch = {batch}; mode {plan.mode} takes multiples of {least}")
    if plan.repeats < 1:
        raise ValueError(f"repeats = {plan.repeats}; it must be at least 1")


def _model(
    plan: Plan,
    name: str,
    device: str,
    dtype: str,
    seed: int,
    leave: Note,
    progress: Callable[[int], None],
) -> Iterator[list[dict[str, Any]] | WrongResult]:
    """The cells of one model, or why one was refused."""
    group = GROUP if plan.mode == "rollout" else 1
    wanted = any(peer in CACHES for peer in plan.peers)
    most = max(plan.batches) // group
    subject = load(name, most, seed, wanted, device).to(device, DTYPES[dtype])
    about = {"mode": plan.mode, "model": name, "dtype": dtype, "device": device}
    contestants = Contestants(subject, plan.peers, f"{name}: ", leave)

    def asked_for(batch: int, cfg: float) -> Asked:
        prompts = subject.prompts[: batch // group].repeat_interleave(group, 0)
        return Asked(prompts, cfg, plan.mode == "rollout", seed, plan.codes)

    if plan.mode == "rollout" and device == "cpu":
        least = asked_for(plan.batches[0], plan.scales[0])
        plan = _suited(plan, contestants, least, lambda line: leave(f"{name}: {line}"))
    overhead = _overhead_us(subject) if plan.mode == "latency" else None
    done, last, threads = 0, dict[float, tuple[int, float]](), dict[str, int]()
    for batch in plan.batches:
        for cfg in plan.scales:
            progress(done := done + 1)
            before, took = last.get(cfg, (batch, 0.0))
            if device == "cpu" and took * batch / before > plan.most:
                took *= batch / before
                leave(f"{name}, batch {batch}, cfg {cfg:g}: would take {took:.0f} s on this CPU")
                last[cfg] = batch, took
                continue
            began = time.perf_counter()
            contestants.release()
            try:
                cell = [about | r for r in _cell(plan, contestants, asked_for(batch, cfg), threads)]
            except torch.OutOfMemoryError:
                leave(f"{name}, batch {batch}, cfg {cfg:g}: needs more memory than there is")
                continue
            except WrongResult as error:
                yield WrongResult(f"{name}, batch {batch}, cfg {cfg:g}: {error}")
                continue
            last[cfg] = batch, time.perf_counter() - began
            for row in cell:
                if row["provider"] == OURS and overhead is not None:
                    row["overhead_us_per_token"] = overhead
            yield cell


def _suited(plan: Plan, contestants: Contestants, least: Asked, leave: Note) -> Plan:
    """The plan, shortened where the smallest batch takes longer than ``plan.long``."""
    torch.set_num_threads(plan.threads or 1)
    took = stretches.busy_seconds(contestants.greedy(OURS, least))
    if took <= plan.long:
        return plan
    peers = tuple(peer for peer in plan.peers if peer != COPIES)
    repeats = min(plan.repeats, stretches.REPEATS)
    codes = min(stretches.CODES, contestants.image_tokens)
    leave(
        f"{len(least.prompts)} images, cfg {least.cfg:g}, take {took:.1f} s on this CPU, so each "
        f"batch is drawn {repeats} times, of peers the first {codes} of "
        f"{contestants.image_tokens} codes (the rest is taken to go as fast), without {COPIES}"
    )
    return replace(plan, peers=peers, repeats=repeats, codes=codes)


def _cell(
    plan: Plan, contestants: Contestants, asked: Asked, threads: dict[str, int]
) -> list[dict[str, Any]]:
    """One batch at one scale: results compared, then drawn in turn. ``threads``: of each provider,
    as known so far."""
    on_gpu = asked.prompts.is_cuda
    torch.set_num_threads(plan.threads or 1)
    wanted, most_held = _first(contestants.greedy(OURS, asked), on_gpu)
    errors = contestants.check_logits(asked)
    same, peaks = {OURS: 1.0}, {OURS: most_held}
    for name in [name for name in contestants.names(asked) if name in plan.peers]:
        first = contestants.attempt(name, partial(_first, contestants.greedy(name, asked), on_gpu))
        if first is not None:
            codes, peaks[name] = first
            same[name] = _same(name, codes, wanted[:, : asked.codes], contestants.exact)
    draws = {name: contestants.timed(name, asked) for name in same}
    counts = range(1, 1 + (1 if on_gpu else os.cpu_count() or 1))
    for name in [name for name in draws if name not in threads]:
        threads[name] = plan.threads or _quickest(draws[name], counts)

    def at_best(name: str, told: Told = None) -> None:
        torch.set_num_threads(threads[name])
        contestants.timed(name, asked, told)()

    watched = {name: partial(at_best, name) for name in draws}
    steps = wanted.shape[1]
    if on_gpu:
        times = _on_gpu(watched, plan.repeats)
    elif asked.codes is None:
        times = alternate(watched, plan.repeats)
    else:
        times = stretches.in_turn(watched, plan.repeats, steps)
    ceiling = contestants.ceiling(threads[OURS])
    return [
        _row(name, times, asked, wanted.shape, contestants.floor(asked, name), ceiling)
        | {
            "threads": threads[name],
            "same_images": same[name],
            "repeats": len(times[name]),
            "codes_timed": steps if name == OURS else asked.codes or steps,
            "peak_mib": peaks[name] if on_gpu else _peak_mib(name, draws[name], asked),
        }
        | (dict(zip(ERRORS, errors, strict=True)) if errors and name == OURS else {})
        for name in draws
    ]


def _first(draw: Draw, on_gpu: bool) -> tuple[Tensor, float | None]:
    """What a provider draws first, and on a GPU MiB held meanwhile: what it keeps for its next
    drawing it makes now."""
    if not on_gpu:
        return draw(), None
    drawn = list[Tensor]()
    mib = held_mib(lambda: drawn.append(draw()), "cuda")
    return drawn[0], mib


def _on_gpu(draws: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every provider. The first drawing compiles and records what is timed; of a peer
    that takes longer than ``SLOW`` it is the only one."""
    first = {name: seconds(draw) for name, draw in draws.items()}
    slow = {name for name, took in first.items() if took > SLOW and not name.startswith(OURS)}
    times = alternate({name: draw for name, draw in draws.items() if name not in slow}, repeats)
    return {name: times.get(name, [first[name]]) for name in draws}


def _peak_mib(name: str, draw: Draw, asked: Asked) -> float | None:
    """None where it is not known: counting would be compiled too, and a few codes fill no cache."""
    if name == COMPILED or (name != OURS and asked.codes is not None):
        return None
    return held_mib(draw, str(asked.prompts.device))


def _same(name: str, codes: Tensor, wanted: Tensor, exact: bool) -> float:
    """Share of images that are code for code this engine's. In bfloat16 the first rounding parts
    them, so there it is told and not asked for."""
    if codes.shape != wanted.shape:
        shapes = f"{tuple(codes.shape)}, not {tuple(wanted.shape)}"
        raise WrongResult(f"{name} drew codes of shape {shapes}; nothing was timed")
    same = float((codes == wanted).all(1).double().mean())
    if exact and same < LEAST_SAME:
        raise WrongResult(
            f"{name} drew {1 - same:.0%} of {len(wanted)} images otherwise than this engine; "
            "nothing was timed"
        )
    return same


def _quickest(draw: Callable[[], object], counts: Sequence[int]) -> int:
    """The thread count that draws quickest, by one drawing each."""
    spent = {}
    for count in counts:
        torch.set_num_threads(count)
        spent[count] = seconds(draw) if len(counts) > 1 else 0.0
    return min(spent, key=spent.__getitem__)


def _row(
    name: str,
    times: dict[str, list[float]],
    asked: Asked,
    shape: torch.Size,
    floor: Floor,
    ceiling: Roofline,
) -> dict[str, Any]:
    images, steps = shape
    spread = quantiles(times[name])
    step = spread["median"] / steps
    pairs = [port / own for port, own in zip(times.get(PORT, []), times[name], strict=False)]
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
        "limit_share": ceiling.seconds(floor) / step,
        "bound": ceiling.bound(floor),
        "ratio": statistics.median(pairs) if pairs else None,
    }


def _overhead_us(subject: Subject) -> float:
    """Microseconds a step of this engine takes on a model without arithmetic; the least of some
    drawings, as a busy machine adds to them."""
    empty = hollow(subject)
    asked = Asked(empty.prompts[:1], 5.0, False, 0)
    draw = Contestants(empty, (), "", lambda line: None).greedy(OURS, asked)
    draw()
    return 1e6 * min(seconds(draw) for _ in range(7)) / empty.transformer.config.image_tokens
