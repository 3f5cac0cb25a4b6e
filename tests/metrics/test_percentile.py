"""Percentiles are exact, and a p99 of too few samples is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.metrics.percentile import P99_SAMPLES_MIN, distribution, percentile, refusal, samples_min
from sage_core.rng import Streams


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_percentile_is_the_smallest_sample_that_enough_do_not_exceed(samples: list[int], q: float) -> None:
    found = percentile(np.array(samples), q)
    enough = [x for x in samples if sum(y <= x for y in samples) >= q * len(samples) - 1e-9]
    assert found == min(enough)


def test_known_values() -> None:
    hundred = np.arange(1, 101)
    assert [percentile(hundred, q) for q in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert math.isnan(percentile(np.array([]), 0.5))


@pytest.mark.parametrize(("q", "n"), [(0.99, 662), (0.95, 130), (0.5, 11)])
def test_samples_min_is_wilkss_second_order_formula(q: float, n: int) -> None:
    assert samples_min(q) == n


def test_samples_min_by_experiment() -> None:
    uniform = Streams(5).stream("percentile").random((20_000, P99_SAMPLES_MIN))
    assert np.mean(np.sum(uniform > 0.99, axis=1) >= 2) == pytest.approx(0.99, abs=0.003)


def test_p99_is_refused_below_its_minimum_and_says_why() -> None:
    few, enough = (distribution(np.arange(n, dtype=float)) for n in (P99_SAMPLES_MIN - 1, P99_SAMPLES_MIN))
    assert math.isnan(few.p99) and few.p95 > 0
    assert enough.p99 == 655
    assert refusal(661) == "p99 needs 662 samples, there are 661" and refusal(662) is None


def test_nulls_do_not_count() -> None:
    assert distribution(np.array([1.0, np.nan, 3.0]))[:2] == (2, 2.0)
    assert distribution(np.array([np.nan])).samples == 0
