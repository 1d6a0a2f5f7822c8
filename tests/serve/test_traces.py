"""Requests as spans: what lies in what, how long, and where they are sent."""

from __future__ import annotations

import http.server
import threading

import pytest

from modicum.errors import ConfigError
from modicum.serve.metrics import Observed
from modicum.serve.traces import Traces

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SEEN = Observed(
    tenant="ada",
    outcome="ok",
    began=1_700_000_000_000_000_000,
    seconds=2.0,
    request_id="cmpl-1",
    model="ada/notes",
    load=(0.25, 0.5),
    first_token=1.0,
    prompt_tokens=7,
    generated_tokens=3,
    prompt="my secret",
)


@pytest.fixture
def recorded():
    """A function that gives the spans of a request by their names."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider)

    def record(seen):
        exporter.clear()
        traces(seen)
        return {span.name: span for span in exporter.get_finished_spans()}

    yield record
    traces.close()


def changed(**values):
    return Observed(**{name: getattr(SEEN, name) for name in SEEN.__dataclass_fields__} | values)


def test_a_request_is_loaded_queued_and_generated(recorded):
    spans = recorded(SEEN)
    times = {
        name: ((span.start_time - SEEN.began) / 1e9, (span.end_time - SEEN.began) / 1e9)
        for name, span in spans.items()
    }
    assert times == {
        "request": (0.0, 2.0),
        "load": (0.25, 0.5),
        "queue": (0.5, 1.0),
        "generate": (1.0, 2.0),
    }
    root = spans["request"]
    assert root.parent is None
    assert {span.parent.span_id for name, span in spans.items() if name != "request"} == {
        root.context.span_id
    }
    assert root.attributes["modicum.tenant"] == "ada"
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert root.status.is_ok


def test_no_prompt_is_in_a_trace(recorded):
    for span in recorded(SEEN).values():
        assert "secret" not in span.to_json()


def test_without_a_load_or_a_token_there_is_no_span_of_them(recorded):
    spans = recorded(changed(load=None, first_token=None, outcome="timeout"))
    assert set(spans) == {"request", "queue"}
    assert spans["queue"].end_time == spans["request"].end_time
    assert not spans["request"].status.is_ok
    assert spans["request"].status.description == "timeout"


@pytest.mark.parametrize("given", [f"00-{TRACE}-{SPAN}-01", "nonsense"])
def test_a_callers_trace_goes_on_here(recorded, given):
    root = recorded(changed(traceparent=given))["request"]
    goes_on = given != "nonsense"
    assert (f"{root.context.trace_id:032x}" == TRACE) == goes_on
    assert (root.parent is not None and f"{root.parent.span_id:016x}" == SPAN) == goes_on


def test_spans_reach_a_collector(monkeypatch):
    trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, body, self.headers.get("Content-Encoding")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
        traces = Traces.open("otlp")
        traces(SEEN)
        traces.close()
        server.shutdown()
        thread.join()
    ((path, body, encoding),) = received
    assert (path, encoding) == ("/v1/traces", None)
    (sent,) = trace_service.ExportTraceServiceRequest.FromString(body).resource_spans
    assert {span.name for scope in sent.scope_spans for span in scope.spans} == {
        "request",
        "load",
        "queue",
        "generate",
    }
    assert {one.value.string_value for one in sent.resource.attributes if one.key == "service.name"} == {
        "front"
    }


def test_other_exporters_are_refused():
    with pytest.raises(ConfigError, match="must be otlp"):
        Traces.open("jaeger")
