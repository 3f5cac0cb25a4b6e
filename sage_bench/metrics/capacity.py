"""Goodput capacity: the largest offered rate at which requests still meet their objectives.

*Attainment* of a run is the least SLO attainment of its kinds of requests: a mix of many embeddings and few chats is not
served well by one that gives up the chats. The capacity of one seed lies between the last rate, from the lowest up, whose
attainment is at least :data:`ATTAINMENT_MIN` and the first whose is not, where the straight line between the two
attainments crosses it. The first failure ends it: a lucky rate above moves nothing. Where not even the lowest rate attains
it, or all do, the grid does not bracket the capacity, which is then only known to be below or above a rate.

Repetitions are seeds: the capacity of an arm is the mean over seeds of their capacities, with Student's t interval, and two
arms that saw the same seeds are compared by the ratio seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from sage_bench.metrics.statistics import Interval, t_interval
from sage_bench.results.reader import Run
from sage_core.errors import DataError

ATTAINMENT_MIN: Final = 0.95


class Capacity(NamedTuple):
    """Of one arm, requests/s. rates: by seed; NaN where the grid does not bracket it. below, above: seeds whose capacity is
    below the lowest rate, and above the highest; of either kind none or the mean is NaN. between: the rates of the grid around
    the seeds' capacities, which is how well it is known whatever the interval over seeds says; NaN like the mean."""

    rate: Interval
    rates: dict[int, float]
    below: int
    above: int
    between: tuple[float, float]

    @property
    def bracketed(self) -> bool:
        """Whether every seed's capacity is known."""
        return bool(self.rates) and not self.below and not self.above


def attainment(run: Run) -> float:
    """Least SLO attainment of the kinds of its counted requests. Raises :class:`DataError` if none counts."""
    requests = run.frame("requests", ("kind", "good", "warmup"))
    counted = requests[~requests["warmup"]]
    if counted.empty:
        raise DataError(
            f"{run.folder / 'requests.parquet'}: no request counts; make the run longer or its warm-up shorter"
        )
    return float(counted.groupby("kind", observed=True)["good"].mean().min())


def crossing(curve: Mapping[float, float], least: float = ATTAINMENT_MIN) -> float:
    """Capacity of one seed. curve: attainment by rate, at every rate of the grid: one that was cut off looks like ``inf``.
    ``-inf`` below the lowest rate, ``inf`` above the highest.

    Raises :class:`DataError` for a curve without a point.
    """
    if not curve:
        raise DataError("capacity: no run to read it from")
    last = math.nan
    for rate in sorted(curve):
        if curve[rate] < least:
            if math.isnan(last):
                return -math.inf
            share = (curve[last] - least) / (curve[last] - curve[rate])
            return last + share * (rate - last)
        last = rate
    return math.inf


def capacity(curves: Mapping[int, Mapping[float, float]], least: float = ATTAINMENT_MIN) -> Capacity:
    """Of one arm. curves: by seed, attainment by rate. Raises :class:`DataError`."""
    found = {seed: crossing(curve, least) for seed, curve in curves.items()}
    below, above = (sum(value == end for value in found.values()) for end in (-math.inf, math.inf))
    rates = {seed: value if math.isfinite(value) else math.nan for seed, value in found.items()}
    if below or above or not rates:
        nan = math.nan
        return Capacity(Interval(nan, nan, nan, 0), rates, below, above, (nan, nan))
    ends = [_around(curve, rates[seed]) for seed, curve in curves.items()]
    between = (min(low for low, _ in ends), max(high for _, high in ends))
    return Capacity(t_interval(list(rates.values())), rates, below, above, between)


def _around(curve: Mapping[float, float], rate: float) -> tuple[float, float]:
    """The rates of the grid on either side."""
    return max(each for each in curve if each <= rate), min(each for each in curve if each >= rate)


def ratio(one: Capacity, other: Capacity) -> Interval:
    """``one / other`` over the seeds that both have: geometric mean and its interval (Student's t of the logarithms, so that
    neither end is below zero and ``other / one`` is its inverse). NaN where a seed of either is not bracketed."""
    shared = sorted(one.rates.keys() & other.rates.keys())
    if not shared or not (one.bracketed and other.bracketed):
        return Interval(math.nan, math.nan, math.nan, 0)
    logs = t_interval([math.log(one.rates[seed] / other.rates[seed]) for seed in shared])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.n)
