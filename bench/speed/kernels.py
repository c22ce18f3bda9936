"""Time and memory of every operator beside eager torch, torch.compile and its peers.

A contestant whose output or gradient is not the yardstick's is not timed. On a GPU inputs rotate
and caches are cleared between runs; on a CPU the plain-torch references run at a tiny size, which
says nothing about the kernels and is labelled so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from echogen.bench import harness
from echogen.bench.harness import WrongResult, alternate, environment, quantiles, version
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
)
from echogen.bench.roofline import Roofline, measure
from echogen.bench.speed import contest
from echogen.kernels import dispatch

Note = Callable[[str], None]
Row = dict[str, Any]
Measured = tuple[dict[str, float], int | None]
NUMBERS = ("ms", "ms_q20", "ms_q80", "ms_warm", "floor_ms", "bytes", "flops", "gb_per_s",
           "tflop_per_s", "percent_of_floor", "bound", "mib")  # fmt: skip
ROTATED_BYTES, MOST_COPIES = 256 << 20, 4


@dataclass(frozen=True)
class Contestant:
    """Who computes a case: its name, its call, the outputs it reaches."""

    name: str
    run: Run
    outputs: tuple[str, ...]


def choose(operators: Sequence[str], size: str | None, device: str) -> list[tuple[Case, str]]:
    """Cases and sizes to measure; by default every case, tiny on a CPU and the others on a GPU.

    Raises:
        ValueError: no such operator or size.
    """
    known = cases()
    for name in operators:
        if name not in {c.operator for c in known.values()} | known.keys():
            named = ", ".join(dict.fromkeys(c.operator for c in known.values()))
            raise ValueError(f"operator {name}: unknown; choose {named}")
    chosen = [c for c in known.values() if not operators or {c.operator, c.name} & set(operators)]
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
        device: "cpu" (on one thread: at a tiny size a second one, on a core that is taken, can make
            a call a hundred times as long) or "cuda".
        providers: names; none: all. This operator is always among them.
        repeats: timed runs of each on a CPU.
        note: told what is skipped or refused, a line each.
        progress: called with (cases done, cases in all).
        ceilings: of the device; measured where missing on CUDA, and else left out.

    Returns:
        ``kernels``, a row for each provider and mode (``error`` says why one was not timed; on
        CUDA ``ms`` is with a cold cache, ``ms_warm`` with the inputs in it), ``on``
        (what ran), ``peers`` (their versions, None where absent), ``rates`` of the device, and the
        environment.

    Raises:
        ValueError: no such operator, size or provider.
    """
    chosen = choose(operators, size, device)
    check_providers(providers)
    on = torch.device(device)
    rows: list[Row] = []
    peers = _versions([case for case, _ in chosen], providers, device, note)
    rates = dict(ceilings or {})
    total = len(chosen)
    with harness.threads(1 if on.type == "cpu" else None):
        for done, (case, name) in enumerate(chosen):
            for dtype in case.types(on.type):
                if on.type == "cuda" and dtype not in rates:
                    rates[dtype] = measure(on, dtype)
                rows += _case(case, name, dtype, on, providers, repeats, rates.get(dtype), note)
            progress(done + 1, total)
    return {
        "on": _what_ran(device),
        "kernels": rows,
        "peers": peers,
        "rates": {_short(dtype): rate.to_dict() for dtype, rate in rates.items()},
    } | environment(device)


def _what_ran(device: str) -> str:
    if device == "cpu":
        return "cpu, Triton interpreted" if dispatch.INTERPRETED else "cpu reference"
    return f"{device} reference (forced)" if dispatch.FORCE_REFERENCE else device


def _versions(
    chosen: Sequence[Case], providers: Sequence[str], device: str, note: Note
) -> dict[str, str | None]:
    """Versions of the peers' packages; says once which are absent."""
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
) -> list[Contestant]:
    made = [Contestant(OURS, case.run, case.outputs), Contestant(EAGER, case.eager, case.outputs)]
    if device.type == "cuda":
        compiled = torch.compile(case.eager, dynamic=False)
        made.append(Contestant(COMPILED, compiled, case.outputs))
    for peer in case.peers:
        runs_here = peer.on_cpu or device.type == "cuda"
        if not runs_here or version(peer.package) is None:
            continue
        try:
            made.append(Contestant(peer.name, peer.load(), peer.reaches or case.outputs))
        except ImportError as error:  # another version, without what is asked for
            note(f"{case.name}: {peer.name} is left out ({error})")
    return [c for c in made if not wanted or c.name in {OURS, *wanted}]


def _case(
    case: Case,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    providers: Sequence[str],
    repeats: int,
    rate: Roofline | None,
    note: Note,
) -> list[Row]:
    """Check every contestant, then time those that agree."""
    make = Drawn(torch.Generator(device).manual_seed(0))
    inputs = case.inputs(make, case.sizes[size], dtype)
    wanted = contest.results(case, case.eager, contest.raised(inputs), case.outputs)
    agreed, rows = [], []
    for one in _contestants(case, device, providers, note):
        reason = _refusal(case, one, dtype, inputs, wanted)
        if reason is None:
            agreed.append(one)
        else:
            note(reason)
            about = _about(case, size, dtype, one.name, "forward")
            rows.append(about | dict.fromkeys(NUMBERS) | {"error": reason})
    del wanted
    for mode in case.modes(size):
        measured = _measure(case, size, dtype, mode, agreed, inputs, device, repeats)
        cost = case.cost(case.sizes[size], dtype.itemsize, mode)
        for one in agreed:
            found = measured[one.name]
            if isinstance(found, str):
                note(found)
                numbers: Row = dict.fromkeys(NUMBERS) | {"error": found}
            else:
                ms, memory = found
                mib = None if memory is None else memory / 2**20
                numbers = _numbers(ms, cost, rate) | {"mib": mib, "error": None}
            rows.append(_about(case, size, dtype, one.name, mode) | numbers)
    return rows


def _refusal(
    case: Case, one: Contestant, dtype: torch.dtype, inputs: Inputs, wanted: contest.Results
) -> str | None:
    """Why a contestant is not timed; None where it computes the same."""
    try:
        found = contest.results(case, one.run, inputs, one.outputs)
        contest.check(case, case.bounds[dtype], one.name, found, wanted)
    except WrongResult as error:
        return str(error)
    except Exception as error:  # of compilers and peers; the others go on
        return _failure(case, one, error)
    return None


def _failure(case: Case, one: Contestant, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"{case.name}: {one.name} failed ({type(error).__name__}: {reason}); not timed"


def _measure(
    case: Case,
    size: str,
    dtype: torch.dtype,
    mode: Mode,
    agreed: Sequence[Contestant],
    inputs: Inputs,
    device: torch.device,
    repeats: int,
) -> dict[str, Measured | str]:
    """Milliseconds (median and quantiles) and peak bytes of each contestant, or why there are
    none."""
    found: dict[str, Measured | str] = {}
    if device.type == "cpu":
        mine = {one.name: [contest.own(case, inputs, forget=True)] for one in agreed}
        calls = {
            one.name: contest.call(case, one.run, one.outputs, mode, mine[one.name])
            for one in agreed
        }
        for warm in calls.values():
            warm()
        times = alternate(calls, repeats)
        for one in agreed:
            shapes = case.inputs(ShapesOnly(), case.sizes[size], dtype)
            ms = quantiles([1e3 * t for t in times[one.name]])
            found[one.name] = ms, _counted_peak(_once(case, mode, one, shapes))
        return found
    for one in agreed:
        try:
            ms = _cuda_times(case, size, mode, one, inputs)
            found[one.name] = ms, _cuda_peak(_once(case, mode, one, inputs))
        except Exception as error:  # one that runs out of memory must not end the table
            found[one.name] = _failure(case, one, error)
        torch.cuda.empty_cache()
    return found


def _once(case: Case, mode: Mode, one: Contestant, inputs: Inputs) -> Callable[[], object]:
    mine = contest.own(case, inputs, forget=True)
    return contest.once(case, one.run, one.outputs, mode, mine)


def _counted_peak(call: Callable[[], object]) -> int | None:
    try:
        return peak_bytes(call)
    except NotImplementedError:  # a size that depends on data, which shapes alone do not give
        return None


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cuda_times(
    case: Case, size: str, mode: Mode, one: Contestant, inputs: Inputs
) -> dict[str, float]:
    from torch._functorch import config
    from triton.testing import do_bench

    held = sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    count = max(2, min(MOST_COPIES, ROTATED_BYTES // max(1, held)))
    copies = [contest.own(case, inputs, forget=True) for _ in range(count)]
    # torch.compile would free what its backward reads, which is called again and again here.
    with config.patch(donated_buffer=False):
        if size in case.graphed:
            run = _replayed([contest.call(case, one.run, one.outputs, mode, [c]) for c in copies])
        else:
            run = contest.call(case, one.run, one.outputs, mode, copies)
        # do_bench clears the second-level cache before each run, and the inputs rotate: cold.
        middle, low, high = do_bench(run, quantiles=[0.5, 0.2, 0.8])
        if size in case.graphed:
            again = _replayed([contest.call(case, one.run, one.outputs, mode, copies[:1])])
        else:
            again = contest.call(case, one.run, one.outputs, mode, copies[:1])
        warm = _warm_ms(again)
    return {"median": middle, "q20": low, "q80": high, "warm": warm}


def _warm_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Median of runs on the same inputs, queued one behind the other: what fits the cache is in it,
    and the host is ahead of the device but for calls shorter than their launch."""
    events = []
    for _ in range(3 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return quantiles([begin.elapsed_time(end) for begin, end in events[3:]])["median"]


def _replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A CUDA graph of each call, replayed in turn: the host's time is no part of decoding."""
    graphs = []
    for one in calls:
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                one()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one()
        graphs.append(graph)
    turns = cycle(graphs)
    return lambda: next(turns).replay()


def _about(case: Case, size: str, dtype: torch.dtype, provider: str, mode: Mode) -> Row:
    return {
        "operator": case.name,
        "provider": provider,
        "size": size,
        "shape": " ".join(f"{k}={v}" for k, v in case.sizes[size].items()),
        "dtype": _short(dtype),
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
        "floor_ms": None if rate is None else 1e3 * rate.seconds(cost),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "percent_of_floor": None if rate is None else 100 * rate.seconds(cost) / seconds,
        "bound": None if rate is None else rate.bound(cost),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
