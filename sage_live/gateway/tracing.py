"""OpenTelemetry traces: one span a request, optional (``pip install sage-serving[otel]``).

The span continues the client's ``traceparent`` and gives the engine one of its own, so an engine that traces appears below
it. Its instants are those the driver recorded: nothing is measured twice. Attribute names: OpenTelemetry's conventions for
GenAI, https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/, and ``sage.*`` where they have none. Neither
prompts nor answers are recorded. A gateway without tracing has no ``Tracer`` and imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sage_core.errors import ConfigError
from sage_core.units import SECOND
from sage_live.gateway.metrics import PROVIDER
from sage_live.gateway.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

EXPORT_S: Final = 5.0
"""How long one export may take, and so how long closing may."""

MISSING: Final = "tracing: OpenTelemetry is not installed; pip install 'sage-serving[otel]', or leave tracing off"


def otlp_tracer(endpoint: str | None, origin_ns: int, version: str, sample: float = 1.0) -> Tracer:
    """Spans go to a collector over OTLP/HTTP.

    endpoint: e.g. ``http://127.0.0.1:4318/v1/traces``; None leaves it to the ``OTEL_EXPORTER_OTLP_*`` variables. sample:
    share of the requests that begin a trace here; one that continues a trace is sampled if that is. Raises ``ConfigError``.
    """
    if not 0 <= sample <= 1:
        raise ConfigError(f"tracing: expected a sample from 0 to 1, got {sample!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError:
        raise ConfigError(MISSING) from None
    resource = Resource.create({"service.name": "sage-gateway", "service.version": version})
    provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(sample))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)))
    return Tracer(provider, origin_ns)


class Tracer:
    """Spans of ``provider``. origin_ns: Unix time of the instant 0 of the records' clock."""

    def __init__(self, provider: TracerProvider, origin_ns: int) -> None:
        try:
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError(MISSING) from None
        self._provider = provider
        self._tracer = provider.get_tracer("sage_live.gateway")
        self._origin_ns = origin_ns
        self._extract = TraceContextTextMapPropagator().extract
        self._server = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def begin(self, operation: str, model: str, arrived_ns: int, headers: dict[bytes, bytes]) -> Span:
        """A request arrived; ``headers`` are the client's, of which ``traceparent`` and ``tracestate`` are continued."""
        context = None
        if b"traceparent" in headers:
            names = (b"traceparent", b"tracestate")
            context = self._extract(
                {name.decode(): headers[name].decode("latin-1") for name in names if name in headers}
            )
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
        }
        return self._tracer.start_span(
            f"{operation} {model}", context, self._server, attributes, start_time=self._origin_ns + arrived_ns
        )

    def traceparent(self, span: Span) -> bytes:
        """What the engine is sent (W3C Trace Context, 3.2)."""
        context = span.get_span_context()
        return b"00-%032x-%016x-%02x" % (context.trace_id, context.span_id, context.trace_flags)

    def ended(self, span: Span, record: RequestRecord) -> None:
        """The request is over."""
        if span.is_recording():
            self._describe(span, record)
        span.end(self._origin_ns + record.ended_ns)

    def close(self) -> None:
        """Send what waits; may take ``EXPORT_S``."""
        self._provider.shutdown()

    def _describe(self, span: Span, record: RequestRecord) -> None:
        arrived = record.arrived_ns
        span.set_attributes(
            {
                "gen_ai.request.stream": record.stream,
                "gen_ai.usage.input_tokens": record.input_tokens,
                "gen_ai.usage.output_tokens": record.output_tokens,
                "http.response.status_code": record.status,
                "sage.outcome": record.outcome,
                "sage.request_id": record.request_id,
                "sage.tenant": record.tenant,
            }
        )
        if record.engine is not None:
            span.set_attribute("sage.engine", record.engine)
        if record.dispatched_ns is not None:
            span.set_attribute("sage.queue_time", (record.dispatched_ns - arrived) / SECOND)
            span.add_event("dispatched", timestamp=self._origin_ns + record.dispatched_ns)
        if record.first_token_ns is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", (record.first_token_ns - arrived) / SECOND)
            span.add_event("first token", timestamp=self._origin_ns + record.first_token_ns)
        if record.outcome != "responded" or record.status >= 400:
            # As in the metrics. Only what is the server's fault makes a server's span an error (conventions for HTTP).
            span.set_attribute("error.type", "cancelled" if record.outcome == "cancelled" else str(record.status))
            if record.status >= 500:
                span.set_status(self._failed)
