"""The counters of a replica, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histograms' buckets, in seconds."""


class Metrics:
    """The counters of one application, in a registry of their own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "rayjobs_requests", "Requests that have been answered.", ["route", "status"], registry=registry
        )
        self.ongoing = Gauge("rayjobs_ongoing_requests", "Requests that are being answered.", registry=registry)
        self.prompt_tokens = Counter("rayjobs_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("rayjobs_generated_tokens", "Tokens that were generated.", registry=registry)
        self.cancelled = Counter(
            "rayjobs_cancelled_requests", "Requests whose client left before the answer was whole.", registry=registry
        )
        self.first_token_s = Histogram(
            "rayjobs_first_token_seconds",
            "Time from a request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.request_s = Histogram(
            "rayjobs_request_seconds", "Time from a request to its whole answer.", buckets=SECONDS, registry=registry
        )

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is asked for whenever the metrics are read."""
        Gauge(f"rayjobs_{name}", meaning, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
