"""Arrival processes: the law of the gaps, the mean rate, the shape, and the coupling across rates."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest

from sage_bench.loads import Bulk, Constant, Gamma, Modulated, OnOff, Periodic, Poisson, Sinusoid
from sage_bench.loads.arrivals import ArrivalProcess
from sage_core.errors import ConfigError
from sage_core.rng import Streams
from sage_core.units import SECOND

RATE = 20.0


def take(process: ArrivalProcess, n: int, rate: float = RATE, seed: int = 7) -> NDArray[np.int64]:
    """The first ``n`` instants, ns."""
    chunks = []
    held = 0
    for chunk in process.instants(rate, Streams(seed).stream):
        chunks.append(chunk)
        held += len(chunk)
        if held >= n:
            return np.concatenate(chunks)[:n]
    raise AssertionError("an arrival process ended")


PROCESSES: dict[str, ArrivalProcess] = {
    "poisson": Poisson(),
    "gamma_bursty": Gamma(4.0),
    "gamma_regular": Gamma(0.25),
    "constant": Constant(),
    "bulk": Bulk(16),
    "bulk_large": Bulk(20_000, cv=0.1),
    "periodic": Periodic([1.0, 0.0, 5.0], step_s=3.0),
    "onoff": OnOff(2.0, 8.0, start_s=3.0),
    "onoff_leaky": OnOff(2.0, 8.0, start_s=8.0, off_share=0.3),
    "sinusoid": Sinusoid(60.0, 1.0, phase=0.5),
    "modulated": Modulated(0.3, 20.0, step_s=5.0, cv=2.0),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_in_order_and_at_the_nominal_rate(name: str) -> None:
    n = 400_000
    at = take(PROCESSES[name], n)
    assert at.dtype == np.int64
    assert at[0] >= 0
    assert np.all(np.diff(at) >= 0)
    # The worst of them, gamma with CV 4, has a standard error of 4 / sqrt(n) = 0.6 %; herds of 20,000 are 20 points,
    # of which the last one is counted whole.
    assert n / (at[-1] / SECOND) == pytest.approx(RATE, rel=0.1 if name == "bulk_large" else 0.02)


def test_poisson_gaps_are_exponential() -> None:
    gaps_s = np.diff(take(Poisson(), 20_000)) / SECOND
    assert kstest(gaps_s, "expon", args=(0, 1 / RATE)).pvalue > 0.01


def test_poisson_test_would_notice_another_law() -> None:
    gaps_s = np.diff(take(Gamma(1.2), 20_000)) / SECOND
    assert kstest(gaps_s, "expon", args=(0, 1 / RATE)).pvalue < 1e-6


@pytest.mark.parametrize("rate", [20.0, 3.0, 7.0])
def test_constant_gaps_have_no_variance(rate: float) -> None:
    at = take(Constant(), 50_000, rate)
    assert at[0] == 0
    assert np.diff(at).var() == 0


@pytest.mark.parametrize("cv", [0.3, 0.8, 1.5, 4.0])
def test_gamma_gaps_have_the_coefficient_of_variation_asked_for(cv: float) -> None:
    gaps = np.diff(take(Gamma(cv), 400_000))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


@pytest.mark.parametrize("cv", [0.2, 4.0])
def test_gamma_starts_in_equilibrium(cv: float) -> None:
    # From an ordinary first gap the expected count would be off by (cv^2 - 1) / 2: 7.5 arrivals at CV 4.
    until = 5 * SECOND
    counts = []
    for seed in range(3000):
        chunk = next(iter(Gamma(cv).instants(RATE, Streams(seed).stream)))
        counts.append(int(np.searchsorted(chunk, until)))
    error = float(np.std(counts)) / math.sqrt(len(counts))
    assert np.mean(counts) == pytest.approx(RATE * 5, abs=4 * error)


def test_bulk_arrives_in_herds_of_its_size() -> None:
    at = take(Bulk(16), 16 * 2000)
    instants, counts = np.unique(at, return_counts=True)
    assert len(instants) == 2000
    assert np.all(counts == 16)


def test_onoff_is_silent_between_bursts_and_dense_within() -> None:
    at_s = take(OnOff(2.0, 8.0, start_s=3.0), 100_000) / SECOND
    phase_s = at_s % 10.0
    assert phase_s.min() >= 3.0 - 1e-9
    assert phase_s.max() <= 5.0 + 1e-9
    first_burst = np.count_nonzero(at_s < 10.0)
    assert first_burst == pytest.approx(RATE * 10, rel=0.3)  # a whole period's requests in two seconds


def test_onoff_leaks_the_share_asked_for() -> None:
    phase_s = take(OnOff(2.0, 8.0, start_s=8.0, off_share=0.3), 200_000) / SECOND % 10.0
    assert np.mean(phase_s < 8.0) == pytest.approx(0.3, abs=0.01)


def test_sinusoid_peaks_where_its_phase_says() -> None:
    quarter = {
        phase: np.histogram(take(Sinusoid(60.0, 0.8, phase), 200_000) / SECOND % 60.0, bins=4)[0] / 200_000
        for phase in (0.0, 0.5)
    }
    assert quarter[0.0][:2].sum() == pytest.approx(0.5 + 0.8 / math.pi, abs=0.01)
    assert quarter[0.5][:2].sum() == pytest.approx(0.5 - 0.8 / math.pi, abs=0.01)


def test_modulated_rate_wanders_as_much_as_asked_for() -> None:
    rate, window_s = 200.0, 5.0
    at_s = take(Modulated(0.3, 50.0, step_s=window_s), 2_000_000, rate) / SECOND
    counts = np.bincount((at_s // window_s).astype(int))[:-1]
    # Variance of a mixed Poisson count: its mean plus the variance of the rate.
    rate_cv = math.sqrt(counts.var() - counts.mean()) / counts.mean()
    assert rate_cv == pytest.approx(0.3, rel=0.1)
    level = counts / counts.mean()
    lag = np.corrcoef(level[:-1], level[1:])[0, 1]
    assert lag == pytest.approx(math.exp(-window_s / 50.0), abs=0.04)


def test_modulated_with_a_steady_rate_is_its_renewal_process() -> None:
    steady, poisson = take(Modulated(0.0, 50.0), 20_000), take(Poisson(), 20_000)
    assert np.abs(steady - poisson).max() <= 1000  # ns; summed rounding


@pytest.mark.parametrize("name", ["poisson", "gamma_bursty", "bulk"])
def test_another_rate_stretches_the_same_pattern(name: str) -> None:
    slow, fast = take(PROCESSES[name], 5000, 2.0), take(PROCESSES[name], 5000, 8.0)
    assert np.abs(slow - 4 * fast).max() <= 4


def test_same_seed_same_instants_other_seed_others() -> None:
    for process in PROCESSES.values():
        assert np.array_equal(take(process, 1000), take(process, 1000))
        if not isinstance(process, Constant):
            assert not np.array_equal(take(process, 1000), take(process, 1000, seed=8))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gamma(0.0), "load.arrivals.cv"),
        (lambda: Gamma(math.nan), "load.arrivals.cv"),
        (lambda: Gamma("4"), "load.arrivals.cv"),  # type: ignore[arg-type]
        (lambda: Bulk(0), "load.arrivals.size"),
        (lambda: OnOff(0.0, 1.0), "load.arrivals.on_s"),
        (lambda: OnOff(1.0, -1.0), "load.arrivals.off_s"),
        (lambda: OnOff(1.0, 2.0, start_s=2.5), "load.arrivals.start_s"),
        (lambda: OnOff(1.0, 2.0, off_share=1.5), "load.arrivals.off_share"),
        (lambda: Sinusoid(10.0, 1.2), "load.arrivals.amplitude"),
        (lambda: Sinusoid(math.inf, 0.2), "load.arrivals.period_s"),
        (lambda: Modulated(-0.1, 10.0), "load.arrivals.rate_cv"),
        (lambda: Modulated(0.1, 0.0), "load.arrivals.correlation_s"),
        (lambda: Periodic([0.0, 0.0], 1.0), "load.arrivals.levels"),
        (lambda: Periodic([1.0, -1.0], 1.0), r"load.arrivals.levels\[1\]"),
    ],
)
def test_bad_arguments_name_the_key(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()  # type: ignore[operator]


def test_chunks_are_endless() -> None:
    flow = Poisson().instants(1000.0, Streams(1).stream)
    assert sum(len(chunk) for chunk in chain.from_iterable([next(flow)] for _ in range(30))) > 100_000
