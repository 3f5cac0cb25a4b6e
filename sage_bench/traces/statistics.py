"""What a trace is like: volume, burstiness, lengths. The figures by which two traces are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sage_bench.traces.reader import Trace
from sage_bench.traces.schema import KINDS

PERCENTILES = (50, 90, 95, 99)
FANO_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class LengthPercentiles:
    """Percentiles by name, ``p50`` .. ``p99``, in tokens."""

    prompt_tokens: Mapping[str, float]
    output_tokens: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """Figures of one trace file.

    duration_s: from the first arrival to the last. rate_mean: rows / duration, requests/s. gap_cv: standard deviation
    over mean of the gaps between arrivals (1 for Poisson). fano_10s: variance over mean of the counts in windows of 10 s
    (1 for Poisson). nan where a figure is not defined. with_prefix: rows with prefix blocks.
    """

    rows: int
    duration_s: float
    rate_mean: float
    gap_cv: float
    fano_10s: float
    lengths: LengthPercentiles
    lengths_of: Mapping[str, LengthPercentiles]  # by kind
    rows_of: Mapping[str, int]
    with_prefix: int
    metadata: Mapping[str, str]
    sha256: str


def statistics(path: str | Path) -> TraceStatistics:
    """Figures of the trace at ``path``. Every row is checked; DataError names the first broken one.

    Holds all rows: 10^7 of them take half a gigabyte.
    """
    trace = Trace(path)
    parts = list(trace.rows(prefix=True))
    arrival_s = np.concatenate([part.arrival_s for part in parts])
    prompt = np.concatenate([part.prompt_tokens for part in parts])
    output = np.concatenate([part.output_tokens for part in parts])
    kind = np.concatenate([part.kind for part in parts])
    rows_of = {name: int(np.count_nonzero(kind == k)) for k, name in enumerate(KINDS)}
    present = [name for name in KINDS if rows_of[name]]
    duration_s = float(arrival_s[-1] - arrival_s[0])
    gaps = np.diff(arrival_s)
    return TraceStatistics(
        rows=len(arrival_s),
        duration_s=duration_s,
        rate_mean=len(arrival_s) / duration_s if duration_s > 0 else float("nan"),
        gap_cv=float(gaps.std() / gaps.mean()) if duration_s > 0 else float("nan"),
        fano_10s=fano(arrival_s, FANO_WINDOW_S),
        lengths=LengthPercentiles(_percentiles(prompt), _percentiles(output)),
        lengths_of={
            name: LengthPercentiles(
                _percentiles(prompt[kind == KINDS.index(name)]), _percentiles(output[kind == KINDS.index(name)])
            )
            for name in present
        },
        rows_of={name: rows_of[name] for name in present},
        with_prefix=sum(int(np.count_nonzero(part.prefix)) for part in parts),
        metadata=trace.metadata,
        sha256=trace.sha256(),
    )


def fano(arrival_s: NDArray[np.float64], window_s: float, *, partial: bool = False) -> float:
    """Variance over mean of the counts in successive windows from the first arrival; nan below two windows.

    partial: count the incomplete window at the end too, as published tables often do. It looks like a lull: a Poisson
    trace of 102 windows and a fifth comes out at 1.37.
    """
    since_s = arrival_s - arrival_s[0]
    windows = int(np.ceil(since_s[-1] / window_s)) if partial else int(since_s[-1] // window_s)
    if windows < 2:
        return float("nan")
    counts = np.bincount((since_s / window_s).astype(np.int64), minlength=windows)[:windows]
    return float(counts.var() / counts.mean())


def _percentiles(values: NDArray[np.int64]) -> dict[str, float]:
    return {f"p{q}": float(value) for q, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
