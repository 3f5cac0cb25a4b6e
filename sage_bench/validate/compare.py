"""How far simulated times are from measured ones: statistics of each, and the error of the simulation in per cent.

An error is ``100 (simulated - measured) / measured``: positive where the simulation is slower. Percentiles are by
nearest rank (:mod:`sage_bench.metrics.percentile`). A p99 of fewer than 662 samples is given all the same, because the
two runs share their requests, and marked, because it is one or two requests' luck.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from sage_bench.metrics.percentile import percentile, refusal

Column = NDArray[np.float64]

STATISTICS: Final = ("mean", "p50", "p95", "p99")


class Compared(msgspec.Struct, frozen=True):
    """One statistic; error_pct is null where the measured one is 0."""

    measured: float
    simulated: float
    error_pct: float | None


class Latency(msgspec.Struct, frozen=True):
    """A latency over the requests that have it, in seconds. p99_certain: there are samples enough for a p99.

    by_request_mape_pct: mean over requests of the absolute error of each, for a simulation may be right on average and
    wrong about everybody.
    """

    samples: int
    mean: Compared
    p50: Compared
    p95: Compared
    p99: Compared
    p99_certain: bool
    by_request_mape_pct: float | None


class Series(msgspec.Struct, frozen=True):
    """A quantity at the ticks of the measured series. bias: mean of simulated - measured, in the unit of the series."""

    ticks: int
    measured_mean: float
    simulated_mean: float
    mean_abs_error: float
    bias: float


def compared(measured: float, simulated: float) -> Compared:
    """Two values of one statistic."""
    return Compared(measured, simulated, 100 * (simulated - measured) / measured if measured else None)


def latency(measured: Column, simulated: Column) -> Latency | None:
    """measured, simulated: (n,) seconds of the same requests, NaN where the latency is not defined; None if nowhere."""
    there = ~np.isnan(measured)
    measured, simulated = measured[there], simulated[there]
    if not len(measured):
        return None
    positive = measured > 0
    shares = np.abs(simulated[positive] - measured[positive]) / measured[positive]
    parts: dict[str, Any] = {"mean": compared(float(measured.mean()), float(simulated.mean()))}
    for name, q in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99)):
        parts[name] = compared(percentile(measured, q), percentile(simulated, q))
    return Latency(
        samples=len(measured),
        p99_certain=refusal(len(measured)) is None,
        by_request_mape_pct=float(100 * shares.mean()) if len(shares) else None,
        **parts,
    )


def series(measured: Column, simulated: Column) -> Series:
    """measured, simulated: (n,) values at the same ticks, n at least 1."""
    difference = simulated - measured
    return Series(
        len(measured),
        float(measured.mean()),
        float(simulated.mean()),
        float(np.abs(difference).mean()),
        float(difference.mean()),
    )


def tpot_s(first_token_s: Column, last_token_s: Column, output_tokens: NDArray[np.int64]) -> Column:
    """(n,) (last - first) / (output tokens - 1); NaN where there is one token."""
    gaps = output_tokens - 1
    return np.asarray(np.divide(last_token_s - first_token_s, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0))


def at_ticks(ticks_ns: NDArray[np.int64], at_ns: NDArray[np.int64], values: Column) -> Column:
    """(n,) the last of ``values`` (told at ``at_ns``, sorted) at or before each tick; 0 before the first."""
    last = np.searchsorted(at_ns, ticks_ns, side="right") - 1
    return np.where(last >= 0, values[np.maximum(last, 0)], 0.0) if len(values) else np.zeros(len(ticks_ns))
