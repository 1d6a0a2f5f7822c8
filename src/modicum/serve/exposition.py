"""The metrics of a server in the text format of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from modicum.errors import MissingExtraError
from modicum.serve.timeline import Spread, bounds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modicum.serve.metrics import Metrics

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: from 100 µs to 1,000 s
_BOUNDS = bounds(-4, 3)


@final
class Exposition:
    """What `/metrics` answers, from a registry that holds this server and nothing else.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, metrics: Metrics) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise MissingExtraError("metrics need prometheus-client: pip install 'modicum[serve]'") from error
        self._metrics = metrics
        self._client = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_Collector(metrics))

    def text(self) -> tuple[bytes, str]:
        """The metrics as of now, and their content type."""
        return self._client.generate_latest(self._registry), _CONTENT_TYPE


@final
class _Collector:
    """A collector, as prometheus_client calls what is asked at every scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        yield from self._engine()
        yield from self._durations()
        yield from self._tenants()
        yield from self._process()

    def _engine(self) -> Iterator[Any]:
        stats, totals = self._metrics.stats, self._metrics.totals
        pool = stats.pool
        yield _gauge("requests_running", "Requests in the batch", stats.running)
        yield _gauge("requests_waiting", "Requests that wait for a place in the batch", stats.waiting)
        yield _gauge("step_tokens_last", "Tokens of the last step", stats.last_batch)
        yield _gauge("cache_used_ratio", "Share of the key/value cache that requests hold", stats.cache_used)
        yield _gauge("pool_slots", "Adapters that there is room for", pool.slots)
        yield _gauge("pool_slots_used", "Adapters in memory", pool.used)
        yield _gauge("pool_slots_pinned", "Adapters that stay in memory", pool.pinned)
        yield _gauge("pool_bytes", "Bytes of the pool of adapters", pool.bytes)
        yield _counter("pool_hits", "Requests whose adapter was in memory", pool.hits)
        yield _counter("pool_misses", "Requests whose adapter had to be loaded", pool.misses)
        yield _counter("pool_evictions", "Adapters that made room for another one", pool.evictions)
        yield _counter("pool_failures", "Adapters that could not be loaded", pool.failures)
        yield _counter(
            "engine_prompt_tokens", "Tokens of prompts that the engine was given", stats.prompt_tokens
        )
        yield _counter("engine_cached_tokens", "Of these, found in the prefix cache", stats.cached_tokens)
        yield _counter("engine_generated_tokens", "Tokens that the engine generated", stats.generated_tokens)
        yield _counter("steps", "Steps of the engine", totals.step.count)
        yield _counter(
            "step_sequences", "Sequences, summed over steps: the batch is this per step", totals.sequences
        )
        yield _counter("step_tokens", "Tokens, summed over steps", totals.step_tokens)

    def _durations(self) -> Iterator[Any]:
        spreads = self._metrics.durations()
        yield _histogram(
            "time_to_first_token_seconds", "From the request to its first token", spreads["first_token"]
        )
        yield _histogram("time_per_token_seconds", "Between two tokens of an answer", spreads["per_token"])
        yield _histogram("request_seconds", "From the request to its end", spreads["duration"])
        yield _histogram("adapter_load_seconds", "Loading an adapter that was not in memory", spreads["load"])
        yield _histogram("step_seconds", "One step of the engine", spreads["step"])

    def _tenants(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        requests = CounterMetricFamily(
            "modicum_requests", "Requests that have ended", labels=["tenant", "outcome"]
        )
        tokens = CounterMetricFamily(
            "modicum_tokens", "Tokens; cached ones are among those of prompts", labels=["tenant", "kind"]
        )
        cost = CounterMetricFamily("modicum_cost", "Cost in the tariff's currency", labels=["tenant"])
        for tenant, usage in self._metrics.labelled().items():
            for outcome, count in usage.requests.items():
                requests.add_metric([tenant, outcome], count)
            tokens.add_metric([tenant, "prompt"], usage.prompt_tokens)
            tokens.add_metric([tenant, "cached"], usage.cached_tokens)
            tokens.add_metric([tenant, "generated"], usage.generated_tokens)
            cost.add_metric([tenant], usage.cost)
        errors = CounterMetricFamily("modicum_errors", "Requests that failed, by kind", labels=["kind"])
        for kind, count in tuple(self._metrics.totals.errors.items()):
            errors.add_metric([kind], count)
        yield requests
        yield tokens
        yield errors
        if self._metrics.tariff.currency:
            yield cost
            yield _counter("cost_idle", "Cost of the machine while nobody used it", self._metrics.idle_cost)

    def _process(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        memory = GaugeMetricFamily("modicum_memory_bytes", "Bytes that the process holds", labels=["kind"])
        for kind, held in self._metrics.memory().items():
            memory.add_metric([kind], held)
        yield memory
        yield _gauge("start_time_seconds", "When the server started, since 1970", self._metrics.started)


def _gauge(name: str, what: str, value: float) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"modicum_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"modicum_{name}", what, value=value)


def _histogram(name: str, what: str, spread: Spread) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    buckets = [(bound, spread.below(cell)) for bound, cell in _BOUNDS]
    return HistogramMetricFamily(
        f"modicum_{name}", what, buckets=[*buckets, ("+Inf", spread.count)], sum_value=spread.sum
    )
