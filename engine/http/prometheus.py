"""A service's counters as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from echogen.engine.serving.metrics import Metrics

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
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
OUTCOMES = ("refused", "finished", "cancelled", "expired", "failed")


class Exposition(Collector):
    """What ``GET /metrics`` tells: counters read as they are asked for, and the time of answers.

    Args:
        metrics: of the scheduler.
        busy: how much waits or is done beside it, by kind.

    Attributes:
        seconds: histogram of answers by route and status, to ``observe`` in.
    """

    def __init__(
        self, metrics: Callable[[], Metrics], busy: Callable[[], Mapping[str, int]]
    ) -> None:
        self._metrics, self._busy, self._registry = metrics, busy, CollectorRegistry()
        self.seconds = Histogram(
            "echogen_http_request_seconds", "From a request's head to the end of its answer",
            ("route", "status"), buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
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
        for outcome in OUTCOMES:
            ended.add_metric((outcome,), getattr(now, outcome))
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
