"""A service's counters as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from echogen.engine.serving.metrics import Metrics

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Buckets of times in seconds. Those below an answer's limit are used; the limit is the last."""
GAUGES = {
    "slots": "Rows that can be drawn at once; an image with guidance takes two",
    "live_slots": "Rows held now",
    "live": "Requests being drawn",
    "waiting": "Requests in the queue",
}
COUNTERS = {
    "steps": "Batched steps of the transformer",
    "codes": "Image codes drawn",
    "busy_seconds": "Time spent drawing, prompts included",
}
OUTCOMES = ("full", "refused", "finished", "cancelled", "expired", "failed")
"""What became of requests to draw. ``full``: refused because the queue was full; ``refused``: for
another reason."""


class Exposition(Collector):
    """What ``GET /metrics`` reports: counters read at that moment, the times of answers, and what
    the process uses (memory, open files).

    Args:
        metrics: gives the scheduler's.
        busy: gives how many jobs wait or run beside it, by kind.
        limit: seconds that an answer may take.

    Attributes:
        seconds: histogram of answers by route and status, to ``observe`` in.
        parts: the same for requests to draw, by part: ``waiting`` for slots, and ``drawing`` from
            there to their end.
    """

    def __init__(
        self,
        metrics: Callable[[], Metrics],
        busy: Callable[[], Mapping[str, int]],
        limit: float,
    ) -> None:
        self._metrics, self._busy, self._registry = metrics, busy, CollectorRegistry()
        buckets = [*(s for s in SECONDS if s < limit), limit]
        self.seconds = Histogram(
            "echogen_http_request_seconds", "From a request's head to the end of its answer",
            ("route", "status"), buckets=buckets, registry=self._registry,
        )  # fmt: skip
        self.parts = Histogram(
            "echogen_request_seconds", "Of requests to draw, by part: waiting for slots, drawing",
            ("part",), buckets=buckets, registry=self._registry,
        )  # fmt: skip
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        now = self._metrics()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"echogen_{name}", text, getattr(now, name))
        counts = {"steps": now.steps, "codes": now.codes, "busy_seconds": now.busy_s}
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"echogen_{name}", text, counts[name])
        ended = CounterMetricFamily(
            "echogen_requests", "What became of requests to draw", labels=("outcome",)
        )
        counted = {outcome: getattr(now, outcome) for outcome in OUTCOMES}
        counted["refused"] -= now.full
        for outcome, count in counted.items():
            ended.add_metric((outcome,), count)
        yield ended
        beside = GaugeMetricFamily(
            "echogen_beside", "What waits or is done beside the drawing", labels=("kind",)
        )
        for kind, count in self._busy().items():
            beside.add_metric((kind,), count)
        yield beside

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
