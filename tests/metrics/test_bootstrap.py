"""The block bootstrap: its statistics against plain ones, and intervals that hold the truth as often as they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sage_bench.metrics import bootstrap as module
from sage_bench.metrics.bootstrap import BLOCKS, Measured, block_ns, bootstrap
from sage_bench.metrics.percentile import percentile

PARTS = (None, 0.5, 0.95, 0.99)


def autoregressive(rng: np.random.Generator, n: int, phi: float) -> np.ndarray:
    """A series of mean 0 whose neighbours are alike, as latencies in a queue are."""
    x = np.empty(n)
    x[0] = rng.normal() / math.sqrt(1 - phi * phi)
    for i, noise in enumerate(rng.normal(size=n - 1), start=1):
        x[i] = phi * x[i - 1] + noise
    return x


def test_weighted_statistics_are_those_of_the_repeated_samples() -> None:
    rng = np.random.default_rng(1)
    values = rng.exponential(size=300)
    values[rng.random(300) < 0.2] = np.nan
    column = module._Column(values)
    for _ in range(20):
        counts = rng.integers(0, 4, 300)
        samples = np.repeat(values, counts)
        samples = samples[~np.isnan(samples)]
        expected = [samples.mean(), *(percentile(samples, q) for q in PARTS[1:] if q is not None)]
        assert column.of(counts, PARTS) == pytest.approx(expected)
    assert all(math.isnan(value) for value in column.of(np.zeros(300, np.int64), PARTS))


def test_every_resample_is_blocks_of_neighbours_and_favours_nobody() -> None:
    rng = np.random.default_rng(2)
    at = np.sort(rng.integers(0, 10**12, 2000))
    total = np.zeros(2000)
    for counts in module._resamples(at, rng):
        assert counts.min() >= 0
        assert np.count_nonzero(np.diff(counts)) <= 2 * BLOCKS  # it changes where a block begins or ends
        total += counts
    assert total.mean() / module.RESAMPLES == pytest.approx(1.0, abs=0.02)
    assert total[:100].mean() == pytest.approx(total[900:1000].mean(), rel=0.25)  # the ends are no rarer


@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_intervals_hold_the_truth(phi: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 95 % nominal; with independent requests assumed, neighbours this alike (phi 0.9) would make it 35 %."""
    monkeypatch.setattr(module, "RESAMPLES", 100)
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = autoregressive(rng, 2000, phi)
        (((difference, _),),) = bootstrap(np.arange(2000) * 1000, [Measured(np.ones(2000), 1 + x, [None])], rng)
        held += difference.low <= 0 <= difference.high
    assert 85 <= held <= 100


def test_a_difference_is_paired() -> None:
    """What moves both systems alike does not blur how they differ."""
    rng = np.random.default_rng(3)
    both = 10 + autoregressive(rng, 1000, 0.95)
    ((pair,),) = bootstrap(
        np.arange(1000) * 1000, [Measured(both, both + 0.1 + 0.01 * rng.normal(size=1000), [None])], rng
    )
    assert pair.difference.mean == pytest.approx(0.1, abs=0.002)
    assert 0.08 < pair.difference.low < pair.difference.high < 0.12 and pair.p < 1e-6


def test_what_is_the_same_or_cannot_be_known() -> None:
    rng = np.random.default_rng(4)
    at, x = np.arange(200) * 1000, rng.random(200)
    (same,), (shifted,), (nothing,) = bootstrap(
        at,
        [
            Measured(x, x, [0.5]),
            Measured(np.zeros(200), np.ones(200), [None]),
            Measured(x, np.full(200, np.nan), [0.5]),
        ],
        rng,
    )
    assert same.difference[:3] == (0.0, 0.0, 0.0) and same.p == 1.0
    assert shifted.difference[:3] == (1.0, 1.0, 1.0) and shifted.p == 0.0
    assert math.isnan(nothing.p) and math.isnan(nothing.difference.low)
    # All scheduled at one instant: no stretches of time to resample.
    ((herd,),) = bootstrap(np.zeros(200, np.int64), [Measured(x, x + 1, [None])], rng)
    assert herd.difference.mean == pytest.approx(1) and math.isnan(herd.p)
    assert block_ns(np.array([0, 2_000])) == 100
