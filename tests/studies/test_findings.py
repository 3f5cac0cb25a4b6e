"""What a claim may say: its bound decides only where the whole interval lies on one side, and its text has a number."""

from __future__ import annotations

import math

import pytest

from sage_bench.metrics.statistics import Interval, t_interval
from sage_bench.studies.findings import Claim, bounded
from sage_core.errors import DataError


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (Interval(1.30, 1.26, 1.34, 5), "holds"),
        (Interval(1.30, 1.20, 1.40, 5), "no significant difference"),
        (Interval(1.20, 1.15, 1.24, 5), "does not hold"),
        (Interval(1.25, 1.25, 1.25, 5), "no significant difference"),
        (t_interval([9.0]), "no significant difference"),
        (t_interval([]), "not measured"),
    ],
)
def test_a_bound_is_decided_where_the_interval_leaves_it_out(value: Interval, outcome: str) -> None:
    assert bounded(value, least=1.25) == outcome
    mirrored = Interval(-value.mean, -value.high, -value.low, value.n)
    assert bounded(mirrored, most=-1.25) == outcome


def test_between_two_bounds() -> None:
    assert bounded(Interval(1.0, 0.9, 1.1, 5), least=0.8, most=1.2) == "holds"
    assert bounded(Interval(1.0, 0.7, 1.1, 5), least=0.8, most=1.2) == "no significant difference"
    assert bounded(Interval(2.0, 1.9, 2.1, 5), least=0.8, most=1.2) == "does not hold"


@pytest.mark.parametrize("text", ["{:+.1f} points", "({:.1f})", "of {:.1f}%"])
def test_a_claim_without_its_number_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="number is missing"):
        Claim("c", 0, "more", text.format(math.nan), "holds", ("e",))
    Claim("c", 0, "more", "a nanosecond", "holds", ("e",))
