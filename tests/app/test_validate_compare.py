"""The statistics of a comparison, against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.metrics.percentile import P99_SAMPLES_MIN
from sage_bench.validate.compare import STATISTICS, at_ticks, compared, latency, series, tpot_s

seconds = st.floats(1e-3, 1e3)


@given(st.lists(seconds, min_size=1, max_size=60), st.floats(0.1, 10.0))
def test_a_simulation_that_is_slower_by_a_factor_is_off_by_it_everywhere(times: list[float], factor: float) -> None:
    measured = np.array(times)
    found = latency(measured, measured * factor)
    assert found is not None and found.samples == len(times)
    for name in STATISTICS:
        assert getattr(found, name).error_pct == pytest.approx(100 * (factor - 1), abs=1e-6)
    assert found.by_request_mape_pct == pytest.approx(100 * abs(factor - 1), abs=1e-6)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=60))
def test_statistics_are_of_the_whole_and_errors_of_each(pairs: list[tuple[float, float]]) -> None:
    measured, simulated = np.array(pairs).T
    found = latency(measured, simulated)
    assert found is not None
    assert found.mean == compared(float(measured.mean()), float(simulated.mean()))
    rank = sorted(measured)[math.ceil(0.95 * len(pairs)) - 1]
    assert found.p95.measured == rank
    expected = np.mean([100 * abs(s - m) / m for m, s in pairs])
    assert found.by_request_mape_pct == pytest.approx(expected)


def test_a_permutation_is_right_on_average_and_wrong_about_everybody() -> None:
    found = latency(np.array([1.0, 2.0, 4.0]), np.array([4.0, 1.0, 2.0]))
    assert found is not None
    assert all(getattr(found, name).error_pct == 0 for name in STATISTICS)
    assert found.by_request_mape_pct == pytest.approx((300 + 50 + 50) / 3)


def test_what_is_not_defined_is_left_out() -> None:
    nan = math.nan
    found = latency(np.array([nan, 2.0]), np.array([nan, 3.0]))
    assert found is not None and (found.samples, found.mean.error_pct) == (1, 50.0)
    assert latency(np.array([nan]), np.array([nan])) is None
    assert compared(0.0, 1.0).error_pct is None
    assert np.isnan(tpot_s(np.array([1.0]), np.array([1.0]), np.array([1])))[0]
    assert tpot_s(np.array([1.0]), np.array([2.0]), np.array([5]))[0] == 0.25


@pytest.mark.parametrize(("samples", "certain"), [(P99_SAMPLES_MIN - 1, False), (P99_SAMPLES_MIN, True)])
def test_a_p99_of_few_samples_is_marked(samples: int, certain: bool) -> None:
    found = latency(np.ones(samples), np.ones(samples))
    assert found is not None and found.p99_certain is certain


def test_bias_has_a_sign_and_absolute_error_none() -> None:
    found = series(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 6.0]))
    assert (found.ticks, found.bias) == (3, 1.0)
    assert found.mean_abs_error == pytest.approx(5 / 3)


@given(
    st.lists(st.integers(0, 50), max_size=12).map(sorted),
    st.lists(st.integers(-5, 60), min_size=1, max_size=12),
)
def test_a_tick_sees_the_last_report_before_it(at_ns: list[int], ticks: list[int]) -> None:
    values = np.arange(1.0, len(at_ns) + 1)
    found = at_ticks(np.array(ticks, np.int64), np.array(at_ns, np.int64), values)
    for tick, value in zip(ticks, found.tolist(), strict=True):
        told = [v for at, v in zip(at_ns, values.tolist(), strict=True) if at <= tick]
        assert value == (told[-1] if told else 0.0)
