"""The counters of a replica, and those of several together, in Prometheus' text format."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

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


def merge_texts(texts: Mapping[str, bytes]) -> bytes:
    """Merge the texts of several replicas into one, in which each value has the label `replica`.

    texts: {id of the replica: its text}.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged:
    """A collector of the metrics of several replicas."""

    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """The metrics, each sample with the replica that it is of."""
        families: dict[str, Metric] = {}
        for replica in sorted(self._texts):
            for one in text_string_to_metric_families(self._texts[replica].decode()):
                family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    family.add_sample(sample.name, {"replica": replica, **sample.labels}, sample.value)
        return iter(families.values())
