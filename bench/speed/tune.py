"""Launch constants beside their candidates: the compiled code of each and, on a GPU, its time.

This only measures. People read its table, change the constants in the kernels, and commit its JSON
under ``bench/results/`` with the change. If a program wrote figures beside the kernels, they would
be a second place for constants, out of date as soon as a kernel changes.

A candidate replaces the constants of its type in every launch of a case, while all others stay as
they are. So for an operator with two choices, the two best need not be the best pair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from echogen.bench.harness import environment, one_line
from echogen.bench.registry import Case, Drawn, Mode
from echogen.bench.speed import compile as ahead
from echogen.bench.speed import contest, kernels
from echogen.kernels import aot
from echogen.kernels.constants import Constants, trial
from echogen.kernels.cuda import loader
from echogen.kernels.cuda.loader import H200, Gpu
from echogen.kernels.dispatch import Launch

Note = Callable[[str], None]
Row = dict[str, Any]
REGISTERS, AT_ONCE, BLOCKS, RESERVED = 65536, 256, 32, 1024
"""Of a multiprocessor (compute capability 8.0 to 12.0): its registers, the unit in which a warp
gets them, the most blocks (16 or 24 on an 8.6, 8.9 and 12.0, where it counts for blocks of one or
two warps alone), and the bytes of shared memory that the driver reserves per block."""
TIMES = ("ms", "ms_q20", "ms_q80", "times_as_fast")


@dataclass(frozen=True)
class Choice:
    """One choice of a case: the current constants, and the pass that requests them."""

    case: Case
    size: str
    dtype: torch.dtype
    mode: Mode
    now: Constants


@dataclass(frozen=True)
class Candidate:
    """Constants for a choice, possibly the current ones, and the launches that depend on them."""

    choice: Choice
    constants: Constants
    launches: tuple[Launch, ...]


def run(
    operators: Sequence[str] = (),
    size: str | None = None,
    device: str = "cpu",
    arch: str = "sm_90",
    processes: int | None = None,
    note: Note = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compile every candidate and, on a GPU, check and time it; JSON-ready.

    Args:
        operators: names of operators or cases; none: all.
        size: a named size; None: those for a GPU.
        device: "cuda", or "cpu" to compile only.
        arch: architecture to compile for on a CPU; on a GPU its own is used.
        processes: how many compile in parallel; None: one per core.
        note: called with what is left out, one line each.
        progress: called with (candidates compiled or timed, in all).

    Returns:
        ``tuned``, a row for each candidate of each choice of each case, with the current one
        (``now``) first. A row has its ``constants``; the ``kernels`` that depend on them
        (`echogen.kernels.aot.Compiled`, with ``warps``, the most that a multiprocessor holds at
        once); ``error`` (why it must not be launched, or was wrong); the time of the pass that
        depends on them; and whether it is ``best``. Also ``timed`` (whether anything was),
        ``ended`` as in `kernels.run`, and the environment.

    Raises:
        ValueError: an operator, size or architecture is unknown.
        RuntimeError: kernels are interpreted in this process.
    """
    timed, taken_on = device == "cuda", environment(device)
    on = loader.gpu(torch.device(device)) if timed else aot.gpu_of(arch)
    arch = _arch() if timed else arch
    aot.target_of(arch)
    found = list(_candidates(operators, size, arch, on or H200, note))
    sources = {repr(s): s for one in found for s in map(aot.Source.of, one.launches)}
    total = len(sources) + timed * len(found)
    compiled = aot.compile_all(
        [(source, arch) for source in sources.values()],
        os.cpu_count() or 1 if processes is None else processes,
        lambda done, _: progress(done, total),
    )
    code = dict(zip(sources, compiled, strict=True))
    rows = [_row(one, code, on) for one in found]
    ended = ""
    if timed:
        ended = _time(
            found, rows, torch.device(device), note, lambda n: progress(len(sources) + n, total)
        )
    return {"arch": arch, "timed": timed, "ended": ended, "tuned": rows} | taken_on


def _arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _candidates(
    operators: Sequence[str], size: str | None, arch: str, on: Gpu, note: Note
) -> Iterator[Candidate]:
    """Yield the candidates of every choice of the requested cases, choice by choice, with the
    current one first. Candidates whose types an architecture lacks are left out."""
    for case, name in kernels.choose(operators, size, "cuda"):
        choices = [c for dtype in case.types("cuda") for c in _choices(case, name, dtype, on)]
        made = [one for choice in choices for one in _of_choice(choice, on)]
        if operators and not made:
            note(f"{case.name}: no launch constants have candidates")
        here = [one for one in made if _runs_on(one, arch)]
        if len(here) < len(made):
            note(f"{case.name}: left out, as {arch} has no float8_e4m3fn")
        yield from here


def _runs_on(one: Candidate, arch: str) -> bool:
    return all(aot.Source.of(launch).runs_on(arch) for launch in one.launches)


def _choices(case: Case, size: str, dtype: torch.dtype, on: Gpu) -> list[Choice]:
    """Return the choices that a case depends on. Launchers request them while their launches are
    recorded; a choice belongs to the first pass that requests it."""
    found: dict[type, Choice] = {}
    for mode in case.modes(size)[:2]:
        with trial() as launched:
            ahead.launches(case, size, dtype, mode, on)
        for kind, now in launched.asked.items():
            found.setdefault(kind, Choice(case, size, dtype, mode, now))
    return list(found.values())


def _of_choice(choice: Choice, on: Gpu) -> list[Candidate]:
    """Return the candidates whose launches differ, each with the kernels in which they differ."""
    made: dict[str, tuple[Constants, list[Launch]]] = {}
    for constants in (choice.now, *choice.now.candidates()):
        with trial(constants):
            launches = ahead.launches(choice.case, choice.size, choice.dtype, choice.mode, on)
        made.setdefault("".join(map(_written, launches)), (constants, launches))
    if len(made) == 1:
        return []
    every = [{_written(launch) for launch in launches} for _, launches in made.values()]
    shared = set.intersection(*every)
    return [
        Candidate(choice, constants, tuple(x for x in launches if _written(x) not in shared))
        for constants, launches in made.values()
    ]


def _written(launch: Launch) -> str:
    return f"{aot.Source.of(launch)!r} {launch.grid}"


def _row(one: Candidate, code: dict[str, aot.Compiled], on: Gpu | None) -> Row:
    """Return what is known without a launch."""
    choice, compiled = one.choice, []
    for launch in one.launches:
        made = code[repr(aot.Source.of(launch))]
        warps = resident_warps(made, launch.constants["num_warps"], on)
        compiled.append(made.to_dict() | {"warps": warps})
    faults = [f"{k['name']}: {fault}" for k in compiled if (fault := ahead.fault_of(k, on))]
    return kernels.labels(choice.case, choice.size, choice.dtype, "echogen", choice.mode) | {
        "choice": type(choice.now).__name__,
        "constants": asdict(one.constants),
        "now": one.constants == choice.now,
        "best": False,
        "kernels": compiled,
        "error": "; ".join(faults) or None,
    } | dict.fromkeys(TIMES)  # fmt: skip


def resident_warps(made: aot.Compiled, warps: int, on: Gpu | None) -> int | None:
    """Return how many warps a multiprocessor holds at once, by registers and shared memory, of a
    kernel with ``warps`` warps per block. None where either is unknown."""
    if on is None or not made.registers or made.shared_bytes is None:
        return None
    each = -(-32 * made.registers // AT_ONCE) * AT_ONCE
    by_registers = 4 * (REGISTERS // 4 // each)  # each quarter of it has its own warps
    by_shared = (on.shared_bytes + RESERVED) // (made.shared_bytes + RESERVED)
    return warps * min(min(by_registers, on.warps) // warps, by_shared, BLOCKS)


def _time(
    found: Sequence[Candidate],
    rows: Sequence[Row],
    device: torch.device,
    note: Note,
    progress: Callable[[int], None],
) -> str:
    """Fill in times. Return why this ended before all were taken, or an empty string."""
    done = 0
    try:
        for choice, group in groupby(zip(found, rows, strict=True), lambda pair: pair[0].choice):
            for _ in _time_choice(choice, list(group), device, note):
                done += 1
                progress(done)
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as error:  # on a GPU, everything after an illegal access fails
        note(f"{one_line(error)}: {done} candidates until then")
        return one_line(error)
    return ""


def _time_choice(
    choice: Choice, mine: Sequence[tuple[Candidate, Row]], device: torch.device, note: Note
) -> Iterator[None]:
    """Check and time, as the operators' benchmark does, the candidates that may be launched, one
    per step."""
    case, size, dtype = choice.case, choice.size, choice.dtype
    inputs = case.inputs(Drawn(torch.Generator(device).manual_seed(0)), case.sizes[size], dtype)
    wanted = contest.results(case, case.eager, contest.raised(inputs), case.outputs)
    for one, row in mine:
        if row["error"] is None:
            contestant = kernels.Contestant(repr(one.constants), case.run, case.outputs)
            with trial(one.constants):
                wrong = kernels.refusal(case, size, contestant, dtype, inputs, wanted)
                found = wrong or kernels.on_gpu(case, size, choice.mode, contestant, inputs)
            if isinstance(found, str):
                note(found)
                row["error"] = found
            else:
                ms, _, row["graph"] = found
                row.update(ms=ms["median"], ms_q20=ms["q20"], ms_q80=ms["q80"])
        yield
    timed, now = [row for _, row in mine if row["ms"] is not None], mine[0][1]["ms"]
    for row in timed:
        row["times_as_fast"] = now / row["ms"] if now else None
    if timed:
        min(timed, key=lambda row: row["ms"])["best"] = True
