"""Time and memory of every operator beside eager torch, torch.compile and other libraries.

A contestant whose output or gradient differs from the yardstick's is not timed. On a GPU, inputs
rotate and caches are cleared between runs. On a CPU, the plain-torch references run at a tiny size;
their times do not describe the kernels, and are labelled accordingly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from echogen.bench import harness
from echogen.bench.harness import WrongResult, alternate, environment, one_line, quantiles, version
from echogen.bench.memory import peak_bytes
from echogen.bench.registry import (
    COMPILED,
    EAGER,
    OURS,
    Case,
    Drawn,
    Floor,
    Inputs,
    Mode,
    Run,
    ShapesOnly,
    cases,
    named,
    short,
)
from echogen.bench.roofline import Roofline, measure
from echogen.bench.speed import clock, contest
from echogen.bench.speed.held import cuda_peak
from echogen.engine.gpu.graphs import CaptureError
from echogen.kernels import dispatch

Note = Callable[[str], None]
Row = dict[str, Any]
Measured = tuple[dict[str, float], int | None, bool]
"""Milliseconds (median and quantiles), peak bytes, and whether a graph was replayed."""
NUMBERS = ("ms", "ms_q20", "ms_q80", "ms_warm", "host_ms", "floor_ms", "bytes", "flops", "gb_per_s",
           "tflop_per_s", "percent_of_floor", "bound", "mib")  # fmt: skip
ROTATED_BYTES, MOST_COPIES = 256 << 20, 4
FEWEST_CALLS, MOST_CALLS = 32, 64
"""Calls in one graph: enough that its launch and the events around it are a small part of each."""


@dataclass(frozen=True)
class Contestant:
    """A provider of a case: its name, its call, the outputs it computes."""

    name: str
    run: Run
    outputs: tuple[str, ...]


def choose(operators: Sequence[str], size: str | None, device: str) -> list[tuple[Case, str]]:
    """Return the cases and sizes to measure; by default every case, tiny on a CPU and the others on
    a GPU.

    Raises:
        ValueError: the operator or size is unknown.
    """
    chosen = named(operators)
    usual = [(c, s) for c in chosen for s in c.sizes if (s == "tiny") == (device == "cpu")]
    found = usual if size is None else [(c, size) for c in chosen if size in c.sizes]
    if not found:
        sizes = dict.fromkeys(s for c in chosen for s in c.sizes)
        raise ValueError(f"size {size}: unknown here; choose {', '.join(sizes)}")
    return found


def check_providers(providers: Sequence[str]) -> None:
    """Raises ValueError for a provider that no case has."""
    peers = (peer.name for case in cases().values() for peer in case.peers)
    known = dict.fromkeys((OURS, EAGER, COMPILED, *peers))
    for name in providers:
        if name not in known:
            raise ValueError(f"provider {name}: unknown; choose {', '.join(known)}")


def run(
    operators: Sequence[str] = (),
    size: str | None = None,
    device: str = "cpu",
    providers: Sequence[str] = (),
    repeats: int = 20,
    note: Note = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ceilings: Mapping[torch.dtype, Roofline] | None = None,
) -> dict[str, Any]:
    """Measure; JSON-ready.

    Args:
        operators: names of operators or cases; none: all.
        size: a named size; None: tiny on a CPU, the others on a GPU.
        device: "cuda", or "cpu" (on one thread: at a tiny size, a second thread on a busy core can
            make a call a hundred times slower).
        providers: names; none: all. This project's operator is always included.
        repeats: timed runs of each on a CPU.
        note: called with what is skipped or refused, one line each.
        progress: called with (cases done, cases in all).
        ceilings: of the device; missing ones are measured on CUDA, and otherwise left out.

    Returns:
        ``kernels``, a row for each provider and mode (``error`` says why one was not timed; on CUDA
        ``ms`` is with a cold cache, ``ms_warm`` with the inputs in the cache, ``host_ms`` the
        host's time to launch; ``graph``: a graph was replayed), ``on`` (what ran), ``ended`` (why
        not everything was run: "interrupted", or an error of the device), ``interrupted`` (Ctrl-C
        ended it), ``peers`` (their versions, None where absent), ``rates`` of the device, and the
        environment as it was before anything ran.

    Raises:
        ValueError: an operator, size or provider is unknown.
    """
    chosen = choose(operators, size, device)
    check_providers(providers)
    on = torch.device(device)
    rows: list[Row] = []
    peers = _versions([case for case, _ in chosen], providers, device, note)
    rates = dict(ceilings or {})
    taken_on = environment(device)  # now, as after an illegal access no call to the device works
    total, ended = len(chosen), ""
    try:
        with harness.threads(1 if on.type == "cpu" else None):
            for done, (case, name) in enumerate(chosen):
                for dtype in case.types(on.type):
                    if on.type == "cuda":
                        torch._dynamo.reset()  # several cases compile one eager function
                        if dtype not in rates:
                            rates[dtype] = measure(on, dtype)
                    rate = rates.get(dtype)
                    for row in _case(case, name, dtype, on, providers, repeats, rate, note):
                        rows.append(row)
                progress(done + 1, total)
    except KeyboardInterrupt:  # what was measured until then is kept
        ended = "interrupted"
    except Exception as error:
        if on.type == "cpu":
            raise
        # On a GPU, everything after an illegal access fails.
        ended = f"{type(error).__name__}: {error}"
    if ended:
        note(f"{ended}: {len(rows)} rows until then, at {case.name}")
    return {
        "on": _what_ran(device),
        "ended": ended,
        "interrupted": ended == "interrupted",
        "kernels": rows,
        "peers": peers,
        "rates": {short(dtype): rate.to_dict() for dtype, rate in rates.items()},
    } | taken_on


def _what_ran(device: str) -> str:
    if device == "cpu":
        return "cpu, Triton interpreted" if dispatch.INTERPRETED else "cpu reference"
    return f"{device} reference (forced)" if dispatch.FORCE_REFERENCE else device


def _versions(
    chosen: Sequence[Case], providers: Sequence[str], device: str, note: Note
) -> dict[str, str | None]:
    """Return the versions of the peers' packages, and note once which are absent."""
    wanted = [p for c in chosen for p in c.peers if not providers or p.name in providers]
    found = {peer.package: version(peer.package) for peer in wanted}
    for package, installed in found.items():
        if installed is None:
            note(f"{package} is not installed; its operators are left out")
    if device == "cpu" and (not providers or COMPILED in providers):
        note("torch.compile is left out on a CPU: it compiles for longer than all else runs")
    return found


def _contestants(
    case: Case, device: torch.device, wanted: Sequence[str], note: Note
) -> Iterator[Contestant]:
    """Yield contestants one by one, this operator first: it is measured before others are even
    loaded.
    """
    yield Contestant(OURS, case.run, case.outputs)
    if not wanted or EAGER in wanted:
        yield Contestant(EAGER, case.eager, case.outputs)
    if device.type == "cuda" and (not wanted or COMPILED in wanted):
        if case.uncompiled:
            note(f"{case.name}: torch.compile is left out ({case.uncompiled})")
        else:
            compiled = torch.compile(case.eager, dynamic=False)
            yield Contestant(COMPILED, compiled, case.outputs)
    for peer in case.peers:
        runs_here = peer.on_cpu or device.type == "cuda"
        if not runs_here or version(peer.package) is None or (wanted and peer.name not in wanted):
            continue
        try:
            run = peer.load()
        except Exception as error:  # another version, or one that breaks with this torch or driver
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            note(f"{case.name}: {peer.name} is left out ({reason})")
        else:
            yield Contestant(peer.name, run, peer.reaches or case.outputs)


def _case(
    case: Case,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    providers: Sequence[str],
    repeats: int,
    rate: Roofline | None,
    note: Note,
) -> Iterator[Row]:
    """Check the contestants and time those that agree. On a CPU they are timed in turn. On a GPU
    they are timed one after another, this operator first, so that it has its times before anything
    is compiled."""
    make = Drawn(torch.Generator(device).manual_seed(0))
    inputs = case.inputs(make, case.sizes[size], dtype)
    wanted = contest.results(case, case.eager, contest.raised(inputs), case.outputs)
    agreed = list[Contestant]()
    for one in _contestants(case, device, providers, note):
        reason = stand_in(case, one, device) or refusal(case, size, one, dtype, inputs, wanted)
        if reason is not None:
            note(reason)
            about = labels(case, size, dtype, one.name, "forward")
            yield about | dict.fromkeys(NUMBERS) | {"error": reason}
        elif device.type == "cpu":
            agreed.append(one)
        else:
            for mode in case.modes(size):
                measured = on_gpu(case, size, mode, one, inputs)
                yield _row(case, size, dtype, mode, one, measured, rate, note)
    for mode in case.modes(size) if agreed else ():
        found = _on_cpu(case, size, dtype, mode, agreed, inputs, repeats)
        for one in agreed:
            yield _row(case, size, dtype, mode, one, found[one.name], rate, note)


def _row(
    case: Case,
    size: str,
    dtype: torch.dtype,
    mode: Mode,
    one: Contestant,
    measured: Measured | str,
    rate: Roofline | None,
    note: Note,
) -> Row:
    about = labels(case, size, dtype, one.name, mode)
    if isinstance(measured, str):
        note(measured)
        return about | dict.fromkeys(NUMBERS) | {"error": measured}
    ms, memory, graph = measured
    numbers = _numbers(ms, case.cost(case.sizes[size], dtype.itemsize, mode), rate)
    mib = None if memory is None else memory / 2**20
    return about | {"graph": graph} | numbers | {"mib": mib, "error": None}


def stand_in(case: Case, one: Contestant, device: torch.device) -> str | None:
    """Return why this operator has no time: on a GPU its reference would be timed under its name,
    because CuPy is absent or its code does not load. None where the operator itself runs, or where
    the reference was requested."""
    if one.name != OURS or device.type != "cuda":
        return None
    runs = dispatch.implementation(case.operator, "cuda")
    return (
        f"{case.name}: {OURS} is its {runs}; not timed" if runs.startswith("reference: ") else None
    )


def refusal(
    case: Case,
    size: str,
    one: Contestant,
    dtype: torch.dtype,
    inputs: Inputs,
    wanted: contest.Results,
) -> str | None:
    """Return why a contestant is not timed; None where its results agree."""
    try:
        # Gradients as in the timing, since torch.compile compiles again for the other setting.
        with torch.set_grad_enabled(bool(case.trains) or size not in case.graphed):
            found = contest.results(case, one.run, inputs, one.outputs)
        contest.check(case, case.bounds[dtype], one.name, found, wanted)
    except WrongResult as error:
        return str(error)
    except Exception as error:  # of a compiler or a peer; the others continue
        return _failure(case, one, error)
    return None


def _failure(case: Case, one: Contestant, error: Exception) -> str:
    return f"{case.name}: {one.name} failed ({one_line(error)}); not timed"


def _on_cpu(
    case: Case,
    size: str,
    dtype: torch.dtype,
    mode: Mode,
    agreed: Sequence[Contestant],
    inputs: Inputs,
    repeats: int,
) -> dict[str, Measured]:
    """Return times and peak of each contestant, timed in turn."""
    mine = {one.name: [contest.own(case, inputs, forget=True)] for one in agreed}
    calls = {
        one.name: contest.call(case, one.run, one.outputs, mode, mine[one.name]) for one in agreed
    }
    for warm in calls.values():
        warm()
    times, found = alternate(calls, repeats), dict[str, Measured]()
    for one in agreed:
        shapes = case.inputs(ShapesOnly(), case.sizes[size], dtype)
        ms = quantiles([1e3 * t for t in times[one.name]])
        found[one.name] = ms, _counted_peak(_once(case, mode, one, shapes)), False
    return found


def on_gpu(case: Case, size: str, mode: Mode, one: Contestant, inputs: Inputs) -> Measured | str:
    """Return the times and peak of a contestant, or why there are none."""
    try:
        ms, graph = _cuda_times(case, size, mode, one, inputs)
        with torch.set_grad_enabled(size not in case.graphed):  # as it was compiled to be timed
            measured = ms, cuda_peak(_once(case, mode, one, inputs)), graph
        torch.cuda.empty_cache()
    except Exception as error:  # running out of memory must not end the table
        return _failure(case, one, error)
    return measured


def _once(case: Case, mode: Mode, one: Contestant, inputs: Inputs) -> Callable[[], object]:
    mine = contest.own(case, inputs, forget=True)
    return contest.once(case, one.run, one.outputs, mode, mine)


def _counted_peak(call: Callable[[], object]) -> int | None:
    try:
        return peak_bytes(call)
    except NotImplementedError:  # a size depends on data, which shapes alone do not have
        return None


def _cuda_times(
    case: Case, size: str, mode: Mode, one: Contestant, inputs: Inputs
) -> tuple[dict[str, float], bool]:
    """Return the times, and whether they are those of a graph."""
    from torch._functorch import config

    graphed = size in case.graphed
    held = sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    least, most = (FEWEST_CALLS, MOST_CALLS) if graphed else (2, MOST_COPIES)
    count = max(least, min(most, ROTATED_BYTES // max(1, held)))
    copies = [contest.own(case, inputs, forget=True) for _ in range(count)]
    # torch.compile would free what its backward reads, but here backward is called repeatedly.
    with config.patch(donated_buffer=False):
        calls = [contest.call(case, one.run, one.outputs, mode, [mine]) for mine in copies]
        if graphed:
            try:
                # Cold: every copy once after clearing the cache. Warm: one copy repeatedly.
                cold = clock.shared(clock.times(clock.captured(calls)), count)
                again = clock.captured(calls[:1] * count)
                warm = clock.shared(clock.times(again, cold=False), count)
                return cold | {"warm": warm["median"]}, True
            except CaptureError:  # a peer that waits for the device is timed with its waiting
                if one.run is case.run:
                    raise
        turns = cycle(calls)
        with torch.set_grad_enabled(not graphed):
            found = clock.times(lambda: next(turns)())
            warm = clock.times(calls[0], cold=False, repeats=20)
    return found | {"warm": warm["median"]}, False


def labels(case: Case, size: str, dtype: torch.dtype, provider: str, mode: Mode) -> Row:
    """Return the columns that identify a row."""
    return {
        "operator": case.name,
        "provider": provider,
        "size": size,
        "shape": " ".join(f"{k}={v}" for k, v in case.sizes[size].items()),
        "dtype": short(dtype),
        "mode": mode,
        "graph": size in case.graphed,
    }


def _numbers(ms: dict[str, float], cost: Floor, rate: Roofline | None) -> Row:
    seconds = ms["median"] * 1e-3
    return {
        "ms": ms["median"],
        "ms_q20": ms["q20"],
        "ms_q80": ms["q80"],
        "ms_warm": ms.get("warm"),
        "host_ms": ms.get("host"),
        "floor_ms": None if rate is None else 1e3 * rate.seconds(cost),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "percent_of_floor": None if rate is None else 100 * rate.seconds(cost) / seconds,
        "bound": None if rate is None else rate.bound(cost),
    }
