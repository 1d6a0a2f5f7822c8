"""Traces of requests by OpenTelemetry, the extra `otel`: request → load → queue → generate, and no prompt in any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from modicum.serve.metrics import Observed

_NANO = 1_000_000_000


@final
class Traces:
    """Records every request that has ended as spans; `provider` is an OpenTelemetry `TracerProvider`.

    Names of attributes are those of OpenTelemetry's conventions for generative models, where they have one.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._trace = provider, trace
        self._tracer = provider.get_tracer("modicum.serve")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def open(cls, exporter: str) -> Traces:
        """Traces that go where `exporter` says: `otlp` (over HTTP, to what `OTEL_EXPORTER_OTLP_ENDPOINT` names).

        Raises:
            ConfigError: there is no such exporter.
            MissingExtraError: OpenTelemetry is not installed.
        """
        if exporter != "otlp":
            raise ConfigError(f"traces = {exporter!r}, must be otlp")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingExtraError("traces need OpenTelemetry: pip install 'modicum[otel]'") from error
        # what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before it
        named = Resource.create({"service.name": "modicum"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=named, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def close(self) -> None:
        """Returns when everything was sent, or cannot be."""
        self._provider.shutdown()

    def __call__(self, seen: Observed) -> None:
        """Returns when the spans of a request are on their way."""
        carrier = {"traceparent": seen.traceparent} if seen.traceparent else {}
        parent = self._propagator.extract(carrier)
        root = self._tracer.start_span(
            "request",
            context=parent,
            start_time=seen.began,
            kind=self._trace.SpanKind.SERVER,
            attributes=_attributes(seen),
        )
        if seen.outcome in {"error", "timeout"}:
            root.set_status(self._trace.StatusCode.ERROR, seen.error or seen.outcome)
        inside = self._trace.set_span_in_context(root, parent)
        for name, begin, end in _parts(seen):
            part = self._tracer.start_span(name, context=inside, start_time=_at(seen, begin))
            part.end(_at(seen, end))
        root.end(_at(seen, seen.seconds))


def _parts(seen: Observed) -> list[tuple[str, float, float]]:
    """(name, begin, end) of what a request went through, one after the other."""
    parts = [] if seen.load is None else [("load", *seen.load)]
    waited = seen.seconds if seen.first_token is None else seen.first_token
    parts.append(("queue", 0.0 if seen.load is None else seen.load[1], waited))
    if seen.first_token is not None:
        parts.append(("generate", seen.first_token, seen.seconds))
    return parts


def _attributes(seen: Observed) -> dict[str, Any]:
    said = {
        "gen_ai.operation.name": "generate",
        "gen_ai.request.model": seen.model,
        "gen_ai.response.id": seen.request_id or None,
        "gen_ai.usage.input_tokens": seen.prompt_tokens,
        "gen_ai.usage.output_tokens": seen.generated_tokens,
        "error.type": seen.error,
        "modicum.cached_tokens": seen.cached_tokens,
        "modicum.outcome": seen.outcome,
        "modicum.tenant": seen.tenant,
        "modicum.version": seen.version,
    }
    return {name: value for name, value in said.items() if value is not None}


def _at(seen: Observed, seconds: float) -> int:
    return seen.began + int(seconds * _NANO)
