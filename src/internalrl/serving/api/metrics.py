"""Figures for Prometheus; their labels are few and known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import Scope

from internalrl.players.engine.engine import Stats
from internalrl.serving.registry.live import Live

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts requests and tokens, and asks engine, audit and registry for theirs when it is read.

    Args:
        stats: of the engine.
        recorded: segments that the audit has written and stored.
        live: what follows the registry.
        lost: by use, whether a database cannot be reached.
    """

    def __init__(
        self,
        stats: Callable[[], Stats],
        recorded: Callable[[], Mapping[str, int]],
        live: Live,
        lost: Callable[[], Mapping[str, bool]],
    ):
        self._stats, self._recorded, self._live, self._lost = stats, recorded, live, lost
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "internalrl_http_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "internalrl_http_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "internalrl_first_token_seconds",
            "From a request's body to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "internalrl_tokens", "Tokens read and generated.", ("model", "kind"), registry=self._registry
        )
        self._registry.register(self)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """A request has ended; status 0 is one whose client left before an answer began."""
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(route, str(status) if status else "gone").inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """A request for `model`, a live version or the base, got its first token."""
        self._first.labels(model).observe(seconds)

    def tokens(self, model: str, prompt: int, completion: int) -> None:
        """Tokens of a request that has ended, in any way."""
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "completion").inc(completion)

    def collect(self) -> Iterable[Metric]:
        """What engine, audit and registry count, in Prometheus' form."""
        stats = self._stats()
        for name, value, text in (
            ("slots_running", stats.running, "Sequences being decoded."),
            ("queue_waiting", stats.waiting, "Sequences waiting for a slot."),
            ("cache_bytes", stats.memory, "Keys and values of the sequences."),
            ("adapters_live", len(self._live.routing.versions), "Versions of adapters that answer."),
            ("adapters_failed", len(self._live.routing.failed), "Adapters whose live versions cannot be loaded."),
        ):
            yield GaugeMetricFamily(f"internalrl_{name}", text, value)
        lost = GaugeMetricFamily("internalrl_database_lost", "1 while a database cannot be reached.", labels=["of"])
        for use, missing in self._lost().items():
            lost.add_metric([use], missing)
        yield lost
        counts = {
            "sequences": (stats.requests, "Sequences that ended."),
            "segments": (stats.segments, "Segments that ended."),
            "violations": (stats.violations, "Segments to which the limits objected."),
            "errors": (stats.errors, "Sequences that ended with an error."),
            "registry_errors": (self._live.errors, "Looks at the registry, or loads of a version, that failed."),
            **{f"audit_{name}": (value, f"Segments {name} by the audit.") for name, value in self._recorded().items()},
        }
        for name, (value, text) in counts.items():
            yield CounterMetricFamily(f"internalrl_{name}", text, value)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
