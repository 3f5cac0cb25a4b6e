"""Figures of comparisons say what is wrong with what they are given, and draw what is right."""

from __future__ import annotations

import pandas as pd
import pytest

from sage_bench.figures.attainment_rate import attainment_rate
from sage_bench.figures.latency_throughput import latency_throughput
from sage_bench.figures.verdict_matrix import verdict_matrix
from sage_bench.metrics.compare import against
from sage_core.errors import DataError

CURVES = pd.DataFrame(
    [
        {
            "arm": arm,
            "rate": rate,
            "seed": seed,
            "attainment": 1 - rate / 400,
            "served_rps": rate,
            "ttft_ns_p99": 1e9 * rate,
        }
        for arm in ("a", "b")
        for rate in (10.0, 20.0)
        for seed in (1, 2)
    ]
)


def test_curves_are_drawn_with_the_objective_and_rings() -> None:
    figure = attainment_rate({"one": CURVES, "two": CURVES}, {"one": {"a": 15.0}}, ["a", "b"], "simulation")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["one", "two"]
    ring = figure.axes[0].lines[-1]
    assert ring.get_xdata()[0] == 15.0 and ring.get_ydata()[0] == 95.0  # type: ignore[index]
    drawn = latency_throughput({"one": CURVES}, ["a", "b"], "ttft_ns_p99", "chat", "simulation")
    assert list(drawn.axes[0].lines[0].get_ydata()) == [10.0, 20.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("frame", [CURVES.iloc[:0], CURVES[CURVES["rate"] == 10.0]], ids=["empty", "one rate"])
def test_a_curve_needs_two_rates(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="two rates or more"):
        attainment_rate({"one": frame}, {}, ["a"], "simulation")
    with pytest.raises(DataError, match="two rates or more"):
        latency_throughput({"one": frame}, ["a"], "ttft_ns_p99", "chat", "simulation")
    with pytest.raises(DataError, match="two rates or more"):
        attainment_rate({}, {}, ["a"], "simulation")


def test_a_dot_marks_what_is_significant() -> None:
    noise = [0.0, 0.01, -0.01, 0.02]
    table = pd.DataFrame(
        {"ours": [0.9 + e for e in noise], "far": [0.5 + 0.9 * e for e in noise], "near": [0.9 - e for e in noise]}
    )
    rows = against({"cell": table}, "ours")
    figure = verdict_matrix(rows, "points", 30.0)
    (dots,) = figure.axes[0].lines
    assert list(dots.get_ydata()) == [list(rows["other"]).index("far")]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="two arms"):
        verdict_matrix(rows.iloc[:0], "points", 30.0)
