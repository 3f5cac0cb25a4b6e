"""How uncertain the difference of two systems is that served the same requests once.

Requests of one run are not independent: they share queues, and bursts make neighbours alike. What is resampled are
therefore stretches of time (moving blocks, wrapped around at the end of the run), with all requests that were scheduled
in them, the same ones for both systems. Of the resampled differences only the standard error is taken; with as many
degrees of freedom as there are blocks less one it gives Student's t interval and p-value. Sources: Künsch, 1989; Politis
and Romano, 1992 (the wrapping).

What it knows nothing of: how another such load would have differed (one seed, one recorded hour), and dependence over
more than a block, as in a queue that grows through the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sage_bench.metrics.statistics import CONFIDENCE, Interval, Paired

Column = NDArray[np.float64]

BLOCKS: Final = 20
"""Stretches that a run is cut into: few enough to be longer than most queues last, enough for a standard error."""

RESAMPLES: Final = 500


class Measured(NamedTuple):
    """A column of both systems, (n,) each, NaN where a request has no value, and what is wanted of it.

    parts: percentiles (nearest rank) in (0, 1), None for the mean.
    """

    baseline: Column
    other: Column
    parts: Sequence[float | None]


def bootstrap(
    scheduled_ns: NDArray[np.int64], measured: Sequence[Measured], draws: np.random.Generator
) -> list[list[Paired]]:
    """``other - baseline`` of every part of every column; bounds and p are NaN where they cannot be known.

    scheduled_ns: (n,) when each request was scheduled, sorted; the columns have the same order.
    """
    sides = [(_Column(each.baseline), _Column(each.other)) for each in measured]

    def differences(counts: NDArray[np.int64]) -> list[float]:
        return [
            after - before
            for each, (baseline, other) in zip(measured, sides, strict=True)
            for before, after in zip(baseline.of(counts, each.parts), other.of(counts, each.parts), strict=True)
        ]

    resampled = np.array([differences(counts) for counts in _resamples(scheduled_ns, draws)], np.float64)
    whole = differences(np.ones(len(scheduled_ns), np.int64))
    resampled = resampled.reshape(-1, len(whole))
    found = iter([_paired(each, resampled[:, i]) for i, each in enumerate(whole)])
    return [[next(found) for _ in each.parts] for each in measured]


def block_ns(scheduled_ns: NDArray[np.int64]) -> int:
    """Length of a block of these requests; 0 where they were scheduled at one instant."""
    return int(scheduled_ns[-1] - scheduled_ns[0]) // BLOCKS


class _Column:
    """A column whose statistics are wanted again and again, each request counted so many times."""

    def __init__(self, values: Column) -> None:
        order = np.argsort(values, kind="stable")
        self._order = order[: len(values) - int(np.count_nonzero(np.isnan(values)))]  # NaN comes last
        self._sorted = values[self._order]

    def of(self, counts: NDArray[np.int64], parts: Sequence[float | None]) -> list[float]:
        """The parts with request i counted ``counts[i]`` times; NaN of none."""
        weights = counts[self._order]
        upto = np.cumsum(weights)
        total = int(upto[-1]) if len(upto) else 0
        if not total:
            return [math.nan] * len(parts)
        return [
            float(weights @ self._sorted) / total
            if q is None
            else float(self._sorted[np.searchsorted(upto, math.ceil(q * total))])
            for q in parts
        ]


def _resamples(scheduled_ns: NDArray[np.int64], draws: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """(n,) how often each request is in a resample."""
    n, length = len(scheduled_ns), block_ns(scheduled_ns)
    if not length:
        return
    first, last = int(scheduled_ns[0]), int(scheduled_ns[-1])
    for _ in range(RESAMPLES):
        begins = draws.integers(first, last, BLOCKS, endpoint=True)
        ends = begins + length
        wrapped = ends > last
        ends = np.where(wrapped, ends - (last - first), ends)
        change = np.bincount(np.searchsorted(scheduled_ns, begins), minlength=n + 1) - np.bincount(
            np.searchsorted(scheduled_ns, ends), minlength=n + 1
        )
        yield np.cumsum(change[:n]) + int(wrapped.sum())


def _paired(difference: float, resampled: Column) -> Paired:
    known = resampled[~np.isnan(resampled)]
    if math.isnan(difference) or len(known) < 2:
        return Paired(Interval(difference, math.nan, math.nan, 0), math.nan)
    # Around their own mean the blocks scatter a little less than around the true one.
    error = float(np.std(known, ddof=1)) * math.sqrt(BLOCKS / (BLOCKS - 1))
    if error == 0.0:  # the same in every resample
        return Paired(Interval(difference, difference, difference, BLOCKS), 1.0 if difference == 0.0 else 0.0)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, BLOCKS - 1)) * error
    p = float(2 * stats.t.sf(abs(difference) / error, BLOCKS - 1))
    return Paired(Interval(difference, difference - half, difference + half, BLOCKS), p)
