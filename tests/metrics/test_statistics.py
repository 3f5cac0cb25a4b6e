"""Intervals cover, paired tests agree with SciPy, Holm with a worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sage_bench.metrics.statistics import holm, paired, t_interval, verdict
from sage_core.rng import Streams

VALUES = st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12)


@given(VALUES)
def test_paired_agrees_with_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(each) for each in zip(*pairs, strict=True))
    if np.std(b - a) < 1e-6:
        return
    found, expected = paired(a.tolist(), b.tolist()), stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    samples = Streams(9).stream("coverage").normal(3.0, 2.0, (4000, 5))
    covered = [each.low <= 3.0 <= each.high for each in map(t_interval, samples.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_one_run_has_no_interval_and_absent_values_do_not_count() -> None:
    assert t_interval([5.0])[0::3] == (5.0, 1) and math.isnan(t_interval([5.0]).low)
    assert t_interval([1.0, math.nan, 3.0])[0::3] == (2.0, 2)
    assert t_interval([]).n == 0
    assert math.isnan(paired([1.0], [2.0]).p)


def test_common_random_numbers_find_what_the_spread_hides() -> None:
    noise = Streams(3).stream("seeds").normal(0, 10, 8)
    a, b = (100 + noise).tolist(), (101 + noise + np.tile([0.01, -0.01], 4)).tolist()
    assert stats.ttest_ind(a, b).pvalue > 0.5
    assert verdict(paired(a, b).difference.mean, paired(a, b).p, "higher") == "better"


def test_equal_runs_are_no_difference_and_a_constant_one_is() -> None:
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired([1.0, 2.0], [2.0, 3.0]).p == 0.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.02, math.nan, 0.9, 0.9])
    assert adjusted[0] == pytest.approx(0.06) and math.isnan(adjusted[1]) and adjusted[2:] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("difference", "p", "better", "said"),
    [
        (1.0, 0.01, "higher", "better"),
        (1.0, 0.01, "lower", "worse"),
        (-1.0, 0.01, "lower", "better"),
        (9.0, 0.06, "higher", "no significant difference"),
        (9.0, math.nan, "higher", "too few seeds"),
    ],
)
def test_verdict(difference: float, p: float, better: str, said: str) -> None:
    assert verdict(difference, p, better) == said  # type: ignore[arg-type]
