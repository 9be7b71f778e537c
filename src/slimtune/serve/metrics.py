"""What is counted, for Prometheus; docs/serving/grafana.json is a dashboard of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Gauge = tuple[str, str, float]
"""A name without the prefix, what it is, and its value."""

_SHORT = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms of one gateway, apart from those of other libraries in the process."""

    def __init__(self) -> None:
        # Not the library's global one, in which two gateways of one process would collide.
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "slimtune_requests", "Requests that were answered", ["tenant", "model", "status"], registry=self.registry
        )
        self.tokens = Counter(
            "slimtune_tokens", "Tokens of prompts and of answers", ["tenant", "model", "kind"], registry=self.registry
        )
        self.cancelled = Counter(
            "slimtune_cancelled",
            "Answers that were broken off: the client has gone, or the adapter",
            registry=self.registry,
        )
        self.queue_seconds = self._histogram("queue", "From a request to its turn", _LONG)
        self.first_token_seconds = self._histogram("time_to_first_token", "From a request to its first token", _SHORT)
        self.between_tokens_seconds = self._histogram("between_tokens", "From a token to the next", _SHORT)
        self.request_seconds = self._histogram("request", "From a request to its last token", _LONG)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"slimtune_{name}_seconds", text, buckets=bounds, registry=self.registry)

    def watch(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Add what is read at each scrape."""
        self.registry.register(_Gauges(read))

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self.read = read

    def collect(self) -> Iterator[Metric]:
        """The gauges as they stand now."""
        for name, text, value in self.read():
            yield GaugeMetricFamily(f"slimtune_{name}", text, value=value)
