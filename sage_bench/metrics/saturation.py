"""The highest offered load a system keeps up with, by a rule that needs no reading of curves.

*Flow balance*: in steady state as many requests are answered in a stretch of time as are offered in it. A rate is
*sustained* if the requests responded within the last three quarters of the arrival window are at least 95 % of those
scheduled in it. Beyond saturation the backlog grows and the ratio falls to capacity / offered load; a policy that keeps
its queue short by rejecting does not sustain the rate either. The first quarter is left out because a system that
starts empty answers less than it is offered until it has filled.

The *saturation point* is the highest rate below which every measured rate is sustained. It is a bracket: capacity lies
between it and the next rate measured. Latency at saturation is the latency at that rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from sage_bench.results.reader import Run
from sage_core.errors import DataError
from sage_core.units import SECOND

BALANCE_MIN: Final = 0.95
SKIPPED: Final = 0.25
"""Part of the arrival window left out at its start."""


class Flow(NamedTuple):
    """One run at one rate, over the measured stretch. rates in requests/s; balance is their ratio."""

    offered_rps: float
    responded_rps: float
    balance: float


class Saturation(NamedTuple):
    """rate_rps: the saturation point, NaN if not even the lowest rate is sustained. next_rps: the lowest rate that is not
    sustained, NaN if all are (capacity is then only bounded from below). throughput_rps: highest seen at any rate."""

    rate_rps: float
    next_rps: float
    throughput_rps: float


def flow(run: Run) -> Flow:
    """Flow of ``run``. Raises :class:`DataError` if its arrivals span no time."""
    requests = run.frame("requests", ("scheduled_ns", "ended_ns", "outcome", "warmup"))
    counted = requests.loc[~requests["warmup"], "scheduled_ns"]
    first, end = (int(counted.min()), int(counted.max())) if len(counted) else (0, 0)
    start = first + round(SKIPPED * (end - first))
    if end <= start:
        raise DataError(f"{run.folder / 'requests.parquet'}: its arrivals span no time; a saturation point needs many")
    offered = int(np.count_nonzero(requests["scheduled_ns"].between(start, end, inclusive="left")))
    ended = requests.loc[requests["outcome"] == "responded", "ended_ns"]
    responded = int(np.count_nonzero(ended.between(start, end, inclusive="left")))
    span_s = (end - start) / SECOND
    return Flow(offered / span_s, responded / span_s, responded / offered if offered else math.nan)


def saturation(flows: Mapping[float, Sequence[Flow]]) -> Saturation:
    """The saturation point of one arm. flows: the runs (seeds) at each nominal rate; a rate is judged by their mean."""
    sustained, unsustained = math.nan, math.nan
    for rate in sorted(flows):
        if np.mean([each.balance for each in flows[rate]]) < BALANCE_MIN:
            unsustained = rate
            break
        sustained = rate
    throughput = max(
        (float(np.mean([each.responded_rps for each in runs])) for runs in flows.values()), default=math.nan
    )
    return Saturation(sustained, unsustained, throughput)
