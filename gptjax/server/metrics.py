"""GET /metrics, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gptjax.server.errors import ApiError
from gptjax.server.generating import Running
from gptjax.server.models import Models

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of a server since its start. Tokens per second: rate(gptjax_generated_tokens_total[1m])."""

    def __init__(self, models: Models):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self._requests = Counter("gptjax_requests", "answered requests", ["model"], **own)
        self._errors = Counter("gptjax_errors", "requests not answered", ["status", "type", "code"], **own)
        self._prompt = Counter("gptjax_prompt_tokens", "tokens of prompts", ["model"], **own)
        self._cached = Counter("gptjax_cached_tokens", "prompt tokens from the prefix cache", ["model"], **own)
        self._written = Counter("gptjax_generated_tokens", "tokens of answers", ["model"], **own)
        self._first = Histogram(
            "gptjax_time_to_first_token_seconds",
            "from the request to its first token",
            ["model"],
            buckets=SECONDS,
            **own,
        )
        self.registry.register(_Loads(models))

    def answered(self, running: Running) -> None:
        """Counts a request that has its answer."""
        name = running.model.name
        self._requests.labels(name).inc()
        self._prompt.labels(name).inc(sum(map(len, running.prompts)))
        for stream in running.streams:
            self._written.labels(name).inc(stream.completion_tokens)
            self._cached.labels(name).inc(stream.cached_tokens)
            if stream.first_token_at is not None:
                self._first.labels(name).observe(stream.first_token_at - stream.submitted_at)

    def failed(self, error: ApiError) -> None:
        self._errors.labels(str(error.status), error.kind, error.code or "").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Loads(Collector):
    """Load of the engines, read when /metrics is requested."""

    def __init__(self, models: Models):
        self._models = models

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        names = {
            "gptjax_waiting_requests": "requests waiting for a slot",
            "gptjax_used_slots": "slots in use",
            "gptjax_slots": "slots",
        }
        for place, (name, meaning) in enumerate(names.items()):
            family = GaugeMetricFamily(name, meaning, labels=["model"])
            for model in self._models:
                family.add_metric([model.name], model.load[place])
            yield family
