"""Goodput capacity: read off made-up curves, and found where theory puts it."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.metrics.capacity import ATTAINMENT_MIN, attainment, capacity, crossing, ratio
from sage_bench.results.reader import load_runs
from sage_core.errors import DataError
from sage_core.slo import Slo, SloTable
from sage_core.units import RequestKind

CURVES = st.dictionaries(st.floats(1, 1000), st.floats(0, 1), min_size=1, max_size=8)


def test_between_two_rates_by_a_straight_line() -> None:
    assert crossing({100.0: 1.0, 200.0: 0.9}) == pytest.approx(150.0)
    assert crossing({100.0: 0.95, 200.0: 0.5}) == pytest.approx(100.0), "exactly enough is enough"
    assert crossing({200.0: 0.90, 100.0: 1.0}) == pytest.approx(150.0), "in any order"


def test_what_the_grid_does_not_bracket_is_an_end_and_no_number() -> None:
    assert crossing({100.0: 0.9, 200.0: 0.8}) == -math.inf
    assert crossing({100.0: 1.0, 200.0: 0.96}) == math.inf
    with pytest.raises(DataError, match="no run"):
        crossing({})


def test_the_first_failure_ends_it() -> None:
    assert crossing({100.0: 1.0, 200.0: 0.9, 300.0: 1.0}) == pytest.approx(150.0)


@given(CURVES)
def test_it_lies_where_the_curve_says(curve: dict[float, float]) -> None:
    found = crossing(curve)
    failed = [rate for rate in sorted(curve) if curve[rate] < ATTAINMENT_MIN]
    if not failed:
        assert found == math.inf
    elif failed[0] == min(curve):
        assert found == -math.inf
    else:
        below = max(rate for rate in curve if rate < failed[0])
        assert below <= found <= failed[0]


@given(st.integers(2, 9), st.floats(0.5, 2.0))
def test_a_ratio_is_the_inverse_of_its_inverse(seeds: int, factor: float) -> None:
    one = capacity({s: {100.0: 1.0, 200.0 + s: 0.9} for s in range(seeds)})
    other = capacity({s: {100.0 * factor: 1.0, (200.0 + s * s) * factor: 0.8} for s in range(seeds)})
    a, b = ratio(one, other), ratio(other, one)
    assert a.mean * b.mean == pytest.approx(1.0) and a.low * b.high == pytest.approx(1.0)
    assert a.low <= a.mean <= a.high and a.n == seeds


def test_one_seed_off_the_grid_makes_the_arm_unknown() -> None:
    arm = capacity({1: {100.0: 1.0, 200.0: 0.9}, 2: {100.0: 0.5, 200.0: 0.4}, 3: {100.0: 1.0, 200.0: 1.0}})
    assert (arm.below, arm.above, arm.bracketed) == (1, 1, False)
    assert math.isnan(arm.rate.mean) and arm.rates[1] == pytest.approx(150.0)
    whole = capacity({1: {100.0: 1.0, 200.0: 0.9}, 2: {100.0: 1.0, 150.0: 0.96, 200.0: 0.96, 300.0: 0.1}})
    assert whole.between == (100.0, 300.0)
    assert whole.bracketed and ratio(arm, whole).n == 0 and math.isnan(ratio(whole, arm).mean)


def test_attainment_is_that_of_the_kind_served_worse(tmp_path: Path, queueing: ModuleType) -> None:
    chats = queueing.Class(share=0.1, priority=1)
    embeddings = queueing.Class(RequestKind.EMBEDDING, share=0.9, output_tokens=0)
    slo = SloTable({"chat": Slo(ttft_s=0.05), "chat/1": Slo(ttft_s=0.05), "embedding": Slo(e2e_s=100.0)})
    queue = queueing.Queue(45, 0.02, 3000, order="priority", classes=(chats, embeddings), slo=slo)
    queueing.run(tmp_path, queue)
    run = load_runs(tmp_path)[0]
    rows = run.frame("requests", ("kind", "good"))
    assert rows.loc[rows["kind"] == "embedding", "good"].mean() == 1.0
    assert attainment(run) == rows.loc[rows["kind"] == "chat", "good"].mean() < 0.9 < rows["good"].mean()


def test_a_run_of_warm_up_alone_has_none(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(40, 0.01, 20), warmup_s=100.0)
    with pytest.raises(DataError, match="no request counts"):
        attainment(load_runs(tmp_path)[0])


def test_it_is_where_theory_puts_it_in_a_poisson_queue(tmp_path: Path, queueing: ModuleType) -> None:
    """M/M/1: a request's time in the system is exponential with rate mu - lambda, so that 95 % of them take less than d where
    lambda = mu - ln(20) / d."""
    mu, due_s = 100.0, 0.1
    theory = mu - math.log(20) / due_s  # 70.0
    slo = SloTable({"embedding": Slo(e2e_s=due_s)})
    classes = (queueing.Class(RequestKind.EMBEDDING, output_tokens=0),)
    curves: dict[int, dict[float, float]] = {}
    for rate in (62.0, 68.0, 74.0, 82.0):
        for seed in (1, 2):
            folder = tmp_path / f"{rate}-{seed}"
            queueing.run(folder, queueing.Queue(rate, 1 / mu, 6000, seed, classes=classes, slo=slo))
            curves.setdefault(seed, {})[rate] = attainment(load_runs(folder)[0])
    found = capacity(curves)
    assert found.bracketed and found.rate.mean == pytest.approx(theory, rel=0.05)
