"""Intervals cover, paired tests agree with SciPy, Holm with a worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sage_bench.metrics.statistics import effect_size, holm, paired, paired_bootstrap, t_interval, verdict
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


@given(VALUES)
def test_a_bootstrap_interval_lies_within_the_differences(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    found = paired_bootstrap(a, b, Streams(1).stream("draws"))
    differences = [y - x for x, y in pairs]
    assert min(differences) - 1e-9 <= found.low <= found.high <= max(differences) + 1e-9
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-9)


def test_few_seeds_are_enumerated_and_many_drawn() -> None:
    few = [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 10.0]
    assert paired_bootstrap(*few, Streams(1).stream("a")) == paired_bootstrap(*few, Streams(2).stream("b"))
    assert paired_bootstrap([0.0, 0.0], [1.0, 3.0], Streams(1).stream("a"))[:3] == (2.0, 1.0, 3.0)
    other = [float(i) for i in range(12)]
    found = paired_bootstrap([0.0] * 12, other, Streams(1).stream("a"))
    expected = stats.bootstrap((other,), np.mean, method="percentile", rng=3).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.15)
    assert math.isnan(paired_bootstrap([1.0], [2.0], Streams(1).stream("a")).low)


def test_over_five_seeds_the_bootstrap_covers_less_than_it_says() -> None:
    """What its docstring promises, and why verdicts rest on t."""
    samples = Streams(9).stream("coverage").normal(3.0, 2.0, (400, 5))
    found = [paired_bootstrap([0.0] * 5, each, Streams(1).stream("draws")) for each in samples.tolist()]
    assert np.mean([each.low <= 3.0 <= each.high for each in found]) == pytest.approx(0.83, abs=0.05)


def test_effect_size_is_unbiased() -> None:
    """Mean 1 and standard deviation 2 in the population: 0.5, which the plain ratio overstates over five pairs."""
    samples = Streams(5).stream("effect").normal(1.0, 2.0, (4000, 5))
    assert np.mean([effect_size([0.0] * 5, each) for each in samples.tolist()]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(samples.mean(axis=1) / samples.std(axis=1, ddof=1)) > 0.58


def test_effect_size_at_the_edges() -> None:
    assert effect_size([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.0
    assert effect_size([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == -math.inf
    assert math.isnan(effect_size([1.0, 2.0], [2.0, 9.0]))
    assert effect_size([0.0] * 4, [1.0, 2.0, 3.0, math.nan]) == effect_size([0.0] * 3, [1.0, 2.0, 3.0])
