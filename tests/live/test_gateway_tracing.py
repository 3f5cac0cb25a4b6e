"""A request's span: its parent, its instants, its attributes; with the SDK's own exporters."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest

pytest.importorskip("opentelemetry.sdk", reason="tracing is optional: pip install 'sage-serving[otel]'")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from sage_core.errors import ConfigError
from sage_core.units import SECOND
from sage_live.gateway.record import RequestRecord
from sage_live.gateway.tracing import Tracer, otlp_tracer

ORIGIN = 1_700_000_000 * SECOND
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
RECORD = RequestRecord(
    request_id="abc",
    operation="chat",
    model="m",
    tenant="alice",
    outcome="responded",
    status=200,
    arrived_ns=2 * SECOND,
    ended_ns=4 * SECOND,
    dispatched_ns=2 * SECOND + 500_000_000,
    first_token_ns=3 * SECOND,
    engine="e1",
    stream=True,
    input_tokens=10,
    output_tokens=20,
)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider, ORIGIN)
    yield tracer
    tracer.close()


def _trace(
    tracer: Tracer, exporter: InMemorySpanExporter, record: RequestRecord, headers: dict[bytes, bytes] | None = None
) -> ReadableSpan:
    span = tracer.begin("chat", "m", record.arrived_ns, headers or {})
    tracer.ended(span, record)
    (finished,) = exporter.get_finished_spans()
    return finished


def test_the_span_tells_what_was_recorded(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    span = _trace(tracer, exporter, RECORD)
    assert span.name == "chat m" and span.kind is SpanKind.SERVER and span.parent is None
    assert (span.start_time, span.end_time) == (ORIGIN + 2 * SECOND, ORIGIN + 4 * SECOND)
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sage",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.response.time_to_first_chunk": 1.0,
        "http.response.status_code": 200,
        "sage.engine": "e1",
        "sage.outcome": "responded",
        "sage.queue_time": 0.5,
        "sage.request_id": "abc",
        "sage.tenant": "alice",
    }
    assert [(event.name, event.timestamp) for event in span.events] == [
        ("dispatched", ORIGIN + 2 * SECOND + 500_000_000),
        ("first token", ORIGIN + 3 * SECOND),
    ]
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("outcome", "status", "error", "code"),
    [
        ("failed", 502, "502", StatusCode.ERROR),
        ("rejected", 429, "429", StatusCode.UNSET),
        ("cancelled", 499, "cancelled", StatusCode.UNSET),
    ],
)
def test_what_went_wrong_is_named(
    tracer: Tracer, exporter: InMemorySpanExporter, outcome: str, status: int, error: str, code: StatusCode
) -> None:
    record = msgspec.structs.replace(
        RECORD, outcome=outcome, status=status, dispatched_ns=None, first_token_ns=None, engine=None
    )
    span = _trace(tracer, exporter, record)
    assert (span.attributes or {})["error.type"] == error and span.status.status_code is code
    assert not span.events


def test_the_clients_trace_goes_on_to_the_engine(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    headers = {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode(), b"tracestate": b"vendor=1", b"host": b"x"}
    span = tracer.begin("chat", "m", 0, headers)
    version, trace, own, flags = tracer.traceparent(span).decode().split("-")
    tracer.ended(span, RECORD)
    (finished,) = exporter.get_finished_spans()
    assert finished.parent is not None and f"{finished.parent.span_id:016x}" == PARENT
    assert finished.context is not None and finished.context.trace_state["vendor"] == "1"
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert own == f"{finished.context.span_id:016x}" and own != PARENT


@pytest.mark.parametrize("value", [b"", b"00-0-0-01", b"\xff" * 55, f"00-{'0' * 32}-{PARENT}-01".encode()])
def test_a_broken_traceparent_begins_a_new_trace(tracer: Tracer, exporter: InMemorySpanExporter, value: bytes) -> None:
    assert _trace(tracer, exporter, RECORD, {b"traceparent": value}).parent is None


def test_a_trace_that_is_not_sampled_still_goes_on(exporter: InMemorySpanExporter) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider, ORIGIN)
    span = tracer.begin("chat", "m", 0, {b"traceparent": f"00-{TRACE}-{PARENT}-00".encode()})
    header = tracer.traceparent(span).decode()
    tracer.ended(span, RECORD)
    assert header.startswith(f"00-{TRACE}-") and header.endswith("-00")
    assert not exporter.get_finished_spans()


def test_spans_reach_a_collector() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        tracer = otlp_tracer(f"http://127.0.0.1:{server.server_port}/v1/traces", ORIGIN, "1.2.3")
        tracer.ended(tracer.begin("chat", "m", 0, {}), RECORD)
        tracer.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, body),) = received
    assert path == "/v1/traces" and b"chat m" in body and b"sage-gateway" in body


def test_without_opentelemetry_the_gateway_imports_and_the_user_is_told() -> None:
    program = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ImportError(name)
sys.meta_path.insert(0, Hide())
from sage_live.gateway.tracing import otlp_tracer
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
try:
    otlp_tracer(None, 0, "1")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("ConfigError tracing:") and "sage-serving[otel]" in done.stdout


def test_a_sample_is_a_share() -> None:
    with pytest.raises(ConfigError, match="sample"):
        otlp_tracer(None, 0, "1", sample=2)
