"""Times of calls on a GPU: the device's time and, separately, the host's time to launch.

Events around a call that is shorter than its launch would time the host. So the device is first
delayed for as long as the host needs to get ahead. Calls of some microseconds, as in decoding, are
captured one after another in one graph, and share the time of its replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from echogen.bench.harness import quantiles
from echogen.engine.gpu.graphs import CudaGraphs

Call = Callable[[], object]
CLEARED_BYTES = 256 << 20
"""Bytes read before a call that must find nothing in the cache: four times Hopper's cache."""
LEAD_CYCLES = 2_000_000
"""A millisecond at Hopper's 2 GHz: the shortest delay of the device. A call gets twice its launch
time if that is longer."""
MOST_LEAD_MS = 50.0
WARM_UPS, REPEATS = 3, 50


def times(call: Call, cold: bool = True, repeats: int = REPEATS) -> dict[str, float]:
    """Return milliseconds of a call: ``median``, ``q20`` and ``q80`` on the device, and ``host``,
    the median time of its launch.

    Args:
        cold: the second-level cache holds none of its inputs; otherwise it holds what the last call
            left.
    """
    cleared = torch.zeros(CLEARED_BYTES // 4 if cold else 1, device="cuda")
    for _ in range(WARM_UPS):
        call()
    launching = _host_ms(call, repeats)
    lead = int(LEAD_CYCLES * min(MOST_LEAD_MS, max(1.0, 2 * launching)))
    torch.cuda.synchronize()
    events = []
    for _ in range(repeats):
        if cold:
            cleared.sum()  # by reading, as written lines would be written back during the call
        torch.cuda._sleep(lead)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    found = quantiles([begin.elapsed_time(end) for begin, end in events])
    return found | {"host": launching}


def _host_ms(call: Call, repeats: int) -> float:
    """Return the median time of launching a call on an idle device. After a delay, a call that
    waits for the device would wait for the delay too. So would one that finds the launch queue full
    (it holds about a thousand)."""
    host = list[float]()
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - began))
    return quantiles(host)["median"]


def captured(calls: Sequence[Call]) -> Call:
    """Return one graph of all calls, one after another, without gradients.

    Raises:
        CaptureError: one of them waits for the device; calls outside the graph still work.
    """

    @torch.no_grad()
    def step() -> None:
        for call in calls:
            call()

    return CudaGraphs(torch.device("cuda", torch.cuda.current_device())).record(step)


def shared(found: dict[str, float], calls: int) -> dict[str, float]:
    """Return the times of one of ``calls`` calls that were timed together."""
    return {name: ms / calls for name, ms in found.items()}
