"""Event-exact queue measures, against brute force and against queueing theory."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.metrics.fairness import jain
from sage_bench.metrics.measure import measure
from sage_bench.metrics.queueing import blocked, busy_ns, depth, overtaken
from sage_bench.results.reader import load_runs
from sage_core.units import SECOND

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=25)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    began = np.array([row[0] for row in rows], np.int64)
    return began, began + np.array([row[1] for row in rows], np.int64)


@given(INTERVALS, st.integers(0, 20), st.integers(1, 25))
def test_depth_and_busy_time_agree_with_counting_instants(rows: list[tuple[int, int]], start: int, span: int) -> None:
    began, ended = columns(rows)
    inside = [sum(a <= t < b for a, b in zip(began, ended, strict=True)) for t in range(start, start + span)]
    mean, most = depth(began, ended, start, start + span)
    assert mean == pytest.approx(sum(inside) / span)
    assert most == max(inside)
    assert busy_ns(began, ended, start, start + span) == sum(count > 0 for count in inside)


TASKS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 8), st.integers(0, 2), st.integers(0, 1)), max_size=20)


@given(TASKS)
def test_blocking_agrees_with_looking_at_every_pair(rows: list[tuple[int, int, int, int]]) -> None:
    queued, dispatched = columns([row[:2] for row in rows])
    priority = np.array([row[2] for row in rows], np.int64)
    pool = np.array([row[3] for row in rows], np.int64)

    def victims(later: bool) -> list[bool]:
        return [
            any(
                pool[j] == pool[i]
                and priority[j] > priority[i]
                and queued[i] <= dispatched[j] < dispatched[i]
                and (not later or queued[j] > queued[i])
                for j in range(len(rows))
            )
            for i in range(len(rows))
        ]

    assert blocked(queued, dispatched, priority, pool).tolist() == victims(later=False)
    assert overtaken(queued, dispatched, priority, pool).tolist() == victims(later=True)


def test_an_empty_window_has_no_average() -> None:
    assert math.isnan(depth(np.array([1]), np.array([2]), 5, 5)[0])


def test_jain() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([1, 3]) == pytest.approx(16 / 20)
    assert math.isnan(jain([1.0])) and math.isnan(jain([0, 0]))


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (3, 0.8)])
def test_metrics_agree_with_theory_of_the_poisson_queue(
    tmp_path: Path, queueing: ModuleType, servers: int, load: float
) -> None:
    service_s = 0.01
    rate = load * servers / service_s
    for seed in (1, 2, 3, 4):
        queue = queueing.Queue(rate, service_s, 20_000, seed, servers)
        queueing.run(tmp_path / str(seed), queue, warmup_s=2.0)
    rows = [measure(run).iloc[0] for run in load_runs(tmp_path)]

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    offered = load * servers
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - load)
    waits = last / (sum(terms) + last)  # Erlang C: the chance to wait
    wait_s = waits * service_s / (servers * (1 - load))
    assert mean("queue_ns_mean") / SECOND == pytest.approx(wait_s, rel=0.06)
    assert mean("e2e_ns_mean") / SECOND == pytest.approx(wait_s + service_s, rel=0.05)
    assert mean("queue_depth_mean") == pytest.approx(rate * wait_s, rel=0.07)
    assert mean("utilisation") == pytest.approx(load, rel=0.02)
    assert mean("throughput_rps") == pytest.approx(rate, rel=0.02)
    for row in rows:  # Little's law holds in each run, not only on average
        assert row["queue_depth_mean"] == pytest.approx(row["throughput_rps"] * row["queue_ns_mean"] / SECOND, rel=0.02)
    if servers == 1:  # the time in an M/M/1 system is exponential
        assert mean("e2e_ns_p95") / SECOND == pytest.approx(math.log(20) * service_s / (1 - load), rel=0.08)
