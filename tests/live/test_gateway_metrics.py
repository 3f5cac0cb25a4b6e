"""``/metrics`` is what Prometheus' own parser reads, and the numbers are those that were counted."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sage_core.units import MILLISECOND, SECOND, RequestKind
from sage_live.gateway.metrics import DURATION_S, SERIES_MAX, EngineState, Histogram, Metrics, Sources
from sage_live.gateway.process import INTERVAL_S, LoopLag

CHAT, EMBEDDING = RequestKind.LLM_CHAT, RequestKind.EMBEDDING
_ENGINES = (EngineState("a", "m", True, 3, 2, 1), EngineState("b", "m", False, 0))


def _metrics(policy: str = "hybrid", engines: Iterable[EngineState] = _ENGINES) -> Metrics:
    return Metrics(
        "1.2",
        Sources(
            policy=lambda: policy,
            live_requests=lambda: 5,
            queue_depth=lambda: {"m": 4},
            engines=lambda: engines,
            steps=lambda: 7,
            control_ns=lambda: 3 * MILLISECOND,
            log_dropped=lambda: 0,
        ),
    )


def _read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels; a duplicate is an error, as it is for Prometheus."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def _value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [v for (n, ls), v in _read(metrics).items() if n == name and labels.items() <= dict(ls).items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_a_streamed_request_is_in_every_series() -> None:
    metrics = _metrics()
    metrics.arrived("m", CHAT)
    metrics.ended("m", CHAT, "responded", 200, 2 * MILLISECOND, 30 * MILLISECOND, 130 * MILLISECOND, 100, 11)
    labels = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "m", "gen_ai_provider_name": "sage"}
    assert _value(metrics, "sage_requests_arrived_total", **labels) == 1
    assert _value(metrics, "sage_requests_ended_total", **labels, outcome="responded", status="200") == 1
    duration, first = "gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds"
    assert _value(metrics, duration + "_sum", **labels) == pytest.approx(0.13)
    assert _value(metrics, duration + "_bucket", **labels, le="0.08") == 0
    assert _value(metrics, duration + "_bucket", **labels, le="0.16") == 1
    assert _value(metrics, duration + "_bucket", **labels, le="+Inf") == 1
    assert _value(metrics, first + "_sum", **labels) == pytest.approx(0.03)
    assert _value(metrics, "gen_ai_server_time_per_output_token_seconds_sum", **labels) == pytest.approx(0.01)
    assert _value(metrics, "sage_queue_time_seconds_sum", **labels) == pytest.approx(0.002)
    assert _value(metrics, "sage_input_tokens_total", **labels) == 100
    assert _value(metrics, "sage_output_tokens_total", **labels) == 11


def test_failures_are_apart_from_successes() -> None:
    metrics = _metrics()
    for outcome, status in (
        ("responded", 200),
        ("failed", 502),
        ("failed", 502),
        ("cancelled", 499),
        ("responded", 400),
    ):
        metrics.ended("m", CHAT, outcome, status, 0, 5, 10, 1, 2)
    count = "gen_ai_server_request_duration_seconds_count"
    assert {
        dict(labels).get("error_type"): value for (name, labels), value in _read(metrics).items() if name == count
    } == {None: 1, "502": 2, "cancelled": 1, "400": 1}
    assert _value(metrics, "gen_ai_server_time_to_first_token_seconds_count") == 1


def test_what_has_no_first_token_counts_none() -> None:
    metrics = _metrics()
    metrics.ended("e", EMBEDDING, "responded", 200, 0, None, 10, 9, 0)
    metrics.ended("m", CHAT, "responded", 200, 0, 10, 10, 9, 1)
    assert _value(metrics, "gen_ai_server_time_to_first_token_seconds_count", gen_ai_request_model="e") == 0
    assert _value(metrics, "gen_ai_server_time_to_first_token_seconds_count", gen_ai_request_model="m") == 1
    assert _value(metrics, "gen_ai_server_time_per_output_token_seconds_count", gen_ai_request_model="m") == 0


def test_what_is_is_asked_for() -> None:
    metrics = _metrics()
    metrics.refused(404, "model_not_found")
    metrics.refused(400, None)
    assert _value(metrics, "sage_requests_refused_total", status="404", code="model_not_found") == 1
    assert _value(metrics, "sage_requests_refused_total", status="400", code="") == 1
    assert _value(metrics, "sage_live_requests") == 5
    assert _value(metrics, "sage_queue_depth", pool="m") == 4
    assert _value(metrics, "sage_decision_rounds_total") == 7
    assert _value(metrics, "sage_control_plane_cpu_seconds_total") == pytest.approx(0.003)
    assert _value(metrics, "sage_policy_info", policy="hybrid") == 1
    assert _value(metrics, "sage_build_info", version="1.2") == 1
    assert _value(metrics, "sage_engine_healthy", engine="b") == 0
    assert _value(metrics, "sage_engine_in_flight", engine="a", pool="m") == 3
    assert _value(metrics, "sage_engine_running") == 2 and _value(metrics, "sage_engine_waiting") == 1
    assert _value(metrics, "process_resident_memory_bytes") > 10_000_000
    assert 0 < _value(metrics, "process_open_fds") <= _value(metrics, "process_max_fds")
    assert _value(metrics, "process_cpu_seconds_total") <= sum(os.times()[:2])


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_any_name_survives_as_a_label(name: str) -> None:
    metrics = _metrics(policy=name)
    metrics.arrived(name, CHAT)
    sent = name.encode("utf-8", "replace").decode()
    assert _value(metrics, "sage_policy_info", policy=sent) == 1
    assert _value(metrics, "sage_requests_arrived_total", gen_ai_request_model=sent) == 1


def test_models_without_end_do_not_make_series_without_end() -> None:
    metrics = _metrics()
    for n in range(10 * SERIES_MAX):
        metrics.arrived(f"model {n}", CHAT)
        metrics.arrived(f"model {n}", EMBEDDING)
    arrived = {
        labels: value for (name, labels), value in _read(metrics).items() if name == "sage_requests_arrived_total"
    }
    assert len(arrived) <= SERIES_MAX + 2 and sum(arrived.values()) == 20 * SERIES_MAX


@given(st.lists(st.integers(0, 200 * SECOND) | st.sampled_from([round(b * SECOND) for b in DURATION_S]), max_size=30))
def test_a_histogram_counts_what_is_at_most_each_bound(values: list[int]) -> None:
    histogram = Histogram(DURATION_S)
    for value in values:
        histogram.observe(value)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines("h", 'a="b"'))
    for bound in DURATION_S:
        assert int(lines[f'h_bucket{{a="b",le="{bound}"}}']) == sum(value <= round(bound * SECOND) for value in values)
    assert int(lines['h_count{a="b"}']) == int(lines['h_bucket{a="b",le="+Inf"}']) == len(values)
    assert float(lines['h_sum{a="b"}']) == pytest.approx(sum(values) / SECOND)


def test_a_loop_that_is_held_up_is_seen_to_lag() -> None:
    async def run() -> list[float]:
        seen: list[float] = []
        done = asyncio.Event()

        def observe(lag_ns: float) -> None:
            seen.append(lag_ns)
            if len(seen) == 1:
                time.sleep(3 * INTERVAL_S)  # the thing measured: a callback that holds the loop
            else:
                done.set()

        lag = LoopLag(asyncio.get_running_loop(), observe)
        await asyncio.wait_for(done.wait(), 10)
        lag.stop()
        return seen

    assert asyncio.run(run())[1] > 1.5 * INTERVAL_S * SECOND


def test_the_documented_table_is_what_is_served() -> None:
    metrics = _metrics()
    metrics.ended("m", CHAT, "responded", 200, 0, 5, 10, 1, 2)
    served = set(re.findall(r"^# TYPE (\S+) ", metrics.render().decode(), re.MULTILINE))
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    documented = set(re.findall(r"^\| `((?:gen_ai|sage|process)_\w+)`", page, re.MULTILINE))
    assert documented == served
