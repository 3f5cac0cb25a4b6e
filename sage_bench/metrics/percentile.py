"""Exact percentiles of raw rows, and when there are too few rows for one.

A percentile is the smallest sample that at least the fraction ``q`` of the samples do not exceed (nearest rank), so it is
a latency that somebody had. The p99 is refused below :data:`P99_SAMPLES_MIN`: with fewer samples it is not certain, at 99 %
confidence, that even two of them lie above the true p99, and the number would be one request's bad luck (Wilks's
second-order formula).
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[Any]


class Distribution(NamedTuple):
    """NaN where there are no samples, or too few."""

    samples: int
    mean: float
    p50: float
    p95: float
    p99: float


def samples_min(q: float, confidence: float = 0.99) -> int:
    """Fewest samples of which at least two exceed the true ``q``-quantile with probability ``confidence``.

    q, confidence: within (0, 1).
    """
    n = 2
    while q**n + n * (1 - q) * q ** (n - 1) > 1 - confidence:
        n += 1
    return n


P99_SAMPLES_MIN: Final = samples_min(0.99)  # 662


def percentile(samples: Samples, q: float) -> float:
    """The ``q``-quantile of ``samples`` by nearest rank; NaN if there are none. Reorders nothing."""
    n = len(samples)
    if n == 0:
        return math.nan
    rank = max(math.ceil(q * n) - 1, 0)
    return float(np.partition(samples, rank)[rank])


def distribution(samples: Samples) -> Distribution:
    """Mean and percentiles of ``samples`` without nulls (NaN)."""
    samples = np.asarray(samples)
    if samples.dtype.kind == "f":
        samples = samples[~np.isnan(samples)]
    n = len(samples)
    if n == 0:
        return Distribution(0, math.nan, math.nan, math.nan, math.nan)
    p99 = percentile(samples, 0.99) if refusal(n) is None else math.nan
    return Distribution(n, float(np.mean(samples)), percentile(samples, 0.5), percentile(samples, 0.95), p99)


def refusal(samples: int) -> str | None:
    """Why there is no p99 of so many samples; ``None`` if there is."""
    return None if samples >= P99_SAMPLES_MIN else f"p99 needs {P99_SAMPLES_MIN} samples, there are {samples}"
