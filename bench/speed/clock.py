"""Times of calls on a GPU: what the device takes, and apart from it what the host takes to ask.

Events around a call that is shorter than its launch would time the host. So the device is held up
first, for as long as the host needs to be ahead; calls of some microseconds, as decoding makes
them, are captured in one graph, one after another, and share its replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from echogen.bench.harness import quantiles
from echogen.engine.gpu.graphs import CudaGraphs

Call = Callable[[], object]
CLEARED_BYTES = 256 << 20
"""Read before a call that shall find nothing in the cache: four times what Hopper's holds."""
LEAD_CYCLES = 2_000_000
"""A millisecond at the 2 GHz of Hopper: the shortest lead. A call that takes the host longer gets
twice what it takes."""
MOST_LEAD_MS = 50.0
WARM_UPS, REPEATS = 3, 50


def times(call: Call, cold: bool = True, repeats: int = REPEATS) -> dict[str, float]:
    """Milliseconds of a call: ``median``, ``q20`` and ``q80`` on the device, and ``host``, the
    median of what launching it takes.

    Args:
        cold: the second-level cache holds nothing of its inputs; else what the last call left.
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
            cleared.sum()  # by reading: written lines would have to be written back meanwhile
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
    """Median of launching a call on an idle device: after a lead, a call that waits for the device
    would wait for the lead too, and so would one that finds the queue of launches full (it holds
    about a thousand)."""
    host = list[float]()
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - began))
    return quantiles(host)["median"]


def captured(calls: Sequence[Call]) -> Call:
    """One graph of all calls, one after the other, without gradients.

    Raises:
        CaptureError: one of them waits for the device; calls outside go on as before.
    """

    @torch.no_grad()
    def step() -> None:
        for call in calls:
            call()

    return CudaGraphs(torch.device("cuda", torch.cuda.current_device())).record(step)


def shared(found: dict[str, float], calls: int) -> dict[str, float]:
    """Times of one of so many calls that were timed together."""
    return {name: ms / calls for name, ms in found.items()}
