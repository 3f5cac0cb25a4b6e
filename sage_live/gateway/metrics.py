"""What ``/metrics`` says, in Prometheus' text format 0.0.4.

Names: OpenTelemetry's semantic conventions for GenAI servers where they have one (``gen_ai.server.*`` with the bucket
bounds they ask for, https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/), Prometheus' own for the process,
``sage_*`` for the rest. Labels are few and bounded: a tenant is none, a model is one up to ``SERIES_MAX`` of them.

Two kinds of number. What happens per request is counted here, by ``arrived`` and ``ended``: a few list items each, no lock,
no label lookup but one (prometheus_client takes 5.3 us for the same, measured, where this takes about 1.5). What *is*, such
as the length of the queue, is asked for when somebody scrapes: ``Sources``.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sage_core.units import SECOND, RequestKind
from sage_live.gateway.process import process_figures

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
PROVIDER: Final = "sage"
SERIES_MAX: Final = 128
"""Pairs of model and operation with series of their own; whatever comes later is counted as model ``_other``."""

OPERATIONS: Final[Mapping[int, str]] = {
    RequestKind.LLM_CHAT: "chat",
    RequestKind.LLM_GENERATE: "text_completion",
    RequestKind.EMBEDDING: "embeddings",
}
"""``gen_ai.operation.name``."""

# Bounds in seconds. The first three are the conventions'; they start at 10 ms per token, which is what they are.
DURATION_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
QUEUE_S: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DELAY_S: Final = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0)


class EngineState(NamedTuple):
    """One engine at the moment of a scrape. ``running`` and ``waiting``: as it reported itself; None before it did."""

    name: str
    pool: str
    healthy: bool
    in_flight: int
    running: int | None = None
    waiting: int | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom to ask when somebody scrapes. Called in the loop's thread."""

    policy: Callable[[], str]
    live_requests: Callable[[], int]
    queue_depth: Callable[[], Mapping[str, int]]  # pool: tasks queued in the plane
    engines: Callable[[], Iterable[EngineState]]
    steps: Callable[[], int]  # of the plane, since the start
    control_ns: Callable[[], int]  # CPU they took
    log_dropped: Callable[[], int]  # access log records that found the buffer full


class Histogram:
    """Counts per bucket. ``bounds_s``: ascending upper bounds, inclusive as Prometheus' are."""

    __slots__ = ("_bounds_ns", "_bounds_s", "_counts", "_sum_ns")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self._bounds_ns = [round(bound * SECOND) for bound in bounds_s]
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_ns = 0.0

    def observe(self, ns: float) -> None:
        """One more, of ``ns`` nanoseconds."""
        self._counts[bisect_left(self._bounds_ns, ns)] += 1
        self._sum_ns += ns

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """Its samples; ``labels`` without braces, may be empty."""
        separator = "," if labels else ""
        cumulative = 0
        for bound, count in zip((*self._bounds_s, "+Inf"), self._counts, strict=True):
            cumulative += count
            yield f'{name}_bucket{{{labels}{separator}le="{bound}"}} {cumulative}'
        yield f"{name}_sum{{{labels}}} {self._sum_ns / SECOND}"
        yield f"{name}_count{{{labels}}} {cumulative}"


class _Series:
    """All that is counted for one model and operation."""

    __slots__ = ("arrived", "durations", "ended", "first_token", "input_tokens", "labels", "output_tokens", "per_token", "queue")  # fmt: skip

    def __init__(self, model: str, kind: int) -> None:
        self.labels = _labels(
            gen_ai_operation_name=OPERATIONS[kind], gen_ai_provider_name=PROVIDER, gen_ai_request_model=model
        )
        self.arrived = 0
        self.ended: Counter[tuple[str, int]] = Counter()
        self.durations: dict[str, Histogram] = {"": Histogram(DURATION_S)}  # by error.type; "" is success
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.per_token = Histogram(PER_TOKEN_S)
        self.queue = Histogram(QUEUE_S)
        self.input_tokens = 0
        self.output_tokens = 0


class Metrics:
    """Counts requests and writes the exposition. One per gateway; everything in the loop's thread."""

    def __init__(self, version: str, sources: Sources) -> None:
        self._build = _labels(version=version, python=platform.python_version())
        self._sources = sources
        self._series: dict[tuple[str, int], _Series] = {}
        self._refused: Counter[tuple[int, str]] = Counter()
        self.idle_dispatch = Histogram(DELAY_S)
        """From the arrival of a request that finds an idle engine until it is on its way there."""
        self.loop_lag = Histogram(DELAY_S)
        """How late the event loop runs what is due (``process.LoopLag``)."""

    def arrived(self, model: str, kind: int) -> None:
        """A request for a served model was handed to the plane."""
        self._of(model, kind).arrived += 1

    def ended(
        self,
        model: str,
        kind: int,
        outcome: str,
        status: int,
        queue_ns: int,
        ttft_ns: int | None,
        e2e_ns: int,
        input_tokens: int,
        output_tokens: int,
    ) -> None:
        """The same request is over.

        outcome: one of ``responded, rejected, cancelled, failed``. status: what the client got, 499 if it left before.
        ttft_ns: None where there was no stream to see a first token in. Spans count from arrival at the gateway.
        """
        series = self._of(model, kind)
        series.ended[outcome, status] += 1
        series.queue.observe(queue_ns)
        series.input_tokens += input_tokens
        series.output_tokens += output_tokens
        if outcome == "responded" and status < 400:
            series.durations[""].observe(e2e_ns)
            if ttft_ns is not None:
                series.first_token.observe(ttft_ns)
                if output_tokens > 1:
                    series.per_token.observe((e2e_ns - ttft_ns) / (output_tokens - 1))
        else:
            error = outcome if outcome == "cancelled" else str(status)
            durations = series.durations.get(error)
            if durations is None:
                durations = series.durations[error] = Histogram(DURATION_S)
            durations.observe(e2e_ns)

    def refused(self, status: int, code: str | None) -> None:
        """The gateway itself said no before there was anything to plan: a bad body, key, model, or a limit."""
        self._refused[status, code or ""] += 1

    def render(self) -> bytes:
        """The whole exposition."""
        lines: list[str] = []
        self._render_requests(lines)
        self._render_gateway(lines)
        self._render_engines(lines)
        for name, kind, text, value in process_figures():
            _family(lines, name, kind, text, [("", value)])
        return "\n".join(lines).encode() + b"\n"

    def _of(self, model: str, kind: int) -> _Series:
        series = self._series.get((model, kind))
        if series is None:
            if len(self._series) >= SERIES_MAX and model != "_other":
                return self._of("_other", kind)
            series = self._series[model, kind] = _Series(model, kind)
        return series

    def _render_requests(self, lines: list[str]) -> None:
        every = self._series.values()
        name = "gen_ai_server_request_duration_seconds"
        lines += _head(name, "histogram", "Arrival at the gateway to the last byte or token.")
        for series in every:
            for error, histogram in series.durations.items():
                lines += histogram.lines(name, series.labels + ("," + _labels(error_type=error) if error else ""))
        name = "gen_ai_server_time_to_first_token_seconds"
        lines += _head(
            name, "histogram", "Arrival at the gateway to the first token, of streamed answers that succeeded."
        )
        for series in every:
            lines += series.first_token.lines(name, series.labels)
        name = "gen_ai_server_time_per_output_token_seconds"
        lines += _head(name, "histogram", "Time per output token after the first, of streamed answers that succeeded.")
        for series in every:
            lines += series.per_token.lines(name, series.labels)
        name = "sage_queue_time_seconds"
        lines += _head(name, "histogram", "Time queued in the control plane.")
        for series in every:
            lines += series.queue.lines(name, series.labels)
        text = "Requests handed to the control plane."
        _family(lines, "sage_requests_arrived_total", "counter", text, [(s.labels, s.arrived) for s in every])
        text = "Requests that are over, by outcome (responded, rejected, cancelled, failed) and status."
        ended = [
            (f'{series.labels},outcome="{outcome}",status="{status}"', count)
            for series in every
            for (outcome, status), count in series.ended.items()
        ]
        _family(lines, "sage_requests_ended_total", "counter", text, ended)
        text = "Tokens of the inputs of ended requests."
        _family(lines, "sage_input_tokens_total", "counter", text, [(s.labels, s.input_tokens) for s in every])
        text = "Tokens generated for ended requests."
        _family(lines, "sage_output_tokens_total", "counter", text, [(s.labels, s.output_tokens) for s in every])

    def _render_gateway(self, lines: list[str]) -> None:
        ask = self._sources
        refused = [(_labels(status=str(status), code=code), n) for (status, code), n in self._refused.items()]
        text = "Requests refused before there was anything to plan, by status and error code."
        _family(lines, "sage_requests_refused_total", "counter", text, refused)
        _family(lines, "sage_live_requests", "gauge", "Requests that are not over.", [("", ask.live_requests())])
        depth = [(_labels(pool=pool), count) for pool, count in ask.queue_depth().items()]
        _family(lines, "sage_queue_depth", "gauge", "Tasks queued in the control plane.", depth)
        text = "Decision rounds of the control plane."
        _family(lines, "sage_decision_rounds_total", "counter", text, [("", ask.steps())])
        text = "CPU time of those rounds, with log and rows."
        cpu_s = ask.control_ns() / SECOND
        _family(lines, "sage_control_plane_cpu_seconds_total", "counter", text, [("", cpu_s)])
        name = "sage_idle_dispatch_seconds"
        lines += _head(name, "histogram", "Arrival to dispatch of requests that found an idle engine.")
        lines += self.idle_dispatch.lines(name, "")
        name = "sage_loop_lag_seconds"
        lines += _head(name, "histogram", "How late the event loop runs what is due.")
        lines += self.loop_lag.lines(name, "")
        text = "Access log records that found the buffer full."
        _family(lines, "sage_access_log_dropped_total", "counter", text, [("", ask.log_dropped())])
        _family(lines, "sage_policy_info", "gauge", "The active policy.", [(_labels(policy=ask.policy()), 1)])
        _family(lines, "sage_build_info", "gauge", "What runs.", [(self._build, 1)])

    def _render_engines(self, lines: list[str]) -> None:
        engines = [(_labels(engine=engine.name, pool=engine.pool), engine) for engine in self._sources.engines()]
        text = "1 if the engine is given work."
        _family(lines, "sage_engine_healthy", "gauge", text, [(labels, int(e.healthy)) for labels, e in engines])
        text = "Tasks sent to the engine and not finished, counted here."
        _family(lines, "sage_engine_in_flight", "gauge", text, [(labels, e.in_flight) for labels, e in engines])
        running = [(labels, e.running) for labels, e in engines if e.running is not None]
        _family(lines, "sage_engine_running", "gauge", "Sequences running, as the engine last reported.", running)
        waiting = [(labels, e.waiting) for labels, e in engines if e.waiting is not None]
        _family(lines, "sage_engine_waiting", "gauge", "Sequences waiting, as the engine last reported.", waiting)


def _family(lines: list[str], name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
    lines += _head(name, kind, text)
    lines += [f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in samples]


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _labels(**values: str) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in values.items())


def _escaped(value: str) -> str:
    # What the format asks for; a lone surrogate (from a badly encoded argument) could not be sent as UTF-8.
    value = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return value.encode("utf-8", "replace").decode()
