"""The metrics of one run, from its raw rows: for all requests, per kind, and per (kind, tenant, priority).

Only counted rows are measured: those scheduled before the end of warm-up or after the start of cool-down are in the file
but not here (they still occupy queues and replicas). Latencies are those of responded requests, so they flatter a policy
that rejects; read them beside SLO attainment, whose denominator is everything offered.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from sage_bench.metrics.definitions import LATENCIES
from sage_bench.metrics.devices import device_metrics
from sage_bench.metrics.energy import energy
from sage_bench.metrics.fairness import jain
from sage_bench.metrics.percentile import distribution
from sage_bench.metrics.queueing import blocked, depth, overtaken
from sage_bench.results.reader import Run
from sage_bench.results.schema import KINDS, OUTCOMES
from sage_core.errors import DataError
from sage_core.units import SECOND

ALL: Final = "all"
"""Value of the class columns where they are not told apart."""

CLASS: Final = ("kind", "tenant", "priority")

_COLUMNS: Final = (
    *CLASS,
    *("request", "scheduled_ns", "arrived_ns", "dispatched_ns", "ended_ns", "input_tokens", "output_tokens"),
    *("outcome", "queue_ns", "ttft_ns", "tpot_ns", "e2e_ns", "good", "warmup"),
)


PARALLEL_MIN: Final = 64
"""Runs from which on other processes are worth their start, a second or two."""

_measured: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()
"""A report asks for the metrics of a run again and again, and a run that is there does not change."""


class Window(NamedTuple):
    """Instants (ns) between which a run is measured: first and last scheduled arrival, last end, of counted rows."""

    start_ns: int
    arrivals_end_ns: int
    end_ns: int

    @property
    def makespan_s(self) -> float:
        """First counted arrival to last counted end; NaN if nothing ended."""
        return (self.end_ns - self.start_ns) / SECOND if self.end_ns > self.start_ns else math.nan


def measure(run: Run) -> pd.DataFrame:
    """One row per class of requests; columns :data:`CLASS`, the names in ``definitions.METRICS``, and ``<latency>_samples``.

    The first row is of all requests and alone has the metrics in ``definitions.OVERALL`` (NaN where the run has no
    ``tasks.parquet``, one tenant, no price, or devices of unknown power). Raises :class:`DataError` if no row counts.
    """
    if run not in _measured:
        _measured[run] = _measure(run)
    return _measured[run].copy()


def measure_all(runs: Iterable[Run]) -> None:
    """Measure these on all cores, so that :func:`measure` has them at hand. Raises what it raises."""
    left = [run for run in dict.fromkeys(runs) if run not in _measured]
    cores = len(os.sched_getaffinity(0))
    if len(left) < PARALLEL_MIN or cores < 2:
        return
    frames = Parallel(cores)(delayed(_measure_folder)(run.folder) for run in left)
    _measured.update(zip(left, frames, strict=True))


def _measure_folder(folder: Path) -> pd.DataFrame:
    return _measure(Run(folder))


def _measure(run: Run) -> pd.DataFrame:
    requests = run.frame("requests", _COLUMNS)
    counted = requests[~requests["warmup"]]
    window = window_of(run, counted)
    rows = [{"kind": ALL, "tenant": ALL, "priority": ALL, **_class(counted, window), **_overall(run, requests, window)}]
    for by in (["kind"], list(CLASS)):
        for key, part in sorted(counted.groupby(by, observed=True), key=_class_order):
            names = dict(zip(by, map(str, key), strict=True))
            rows.append({**dict.fromkeys(CLASS, ALL), **names, **_class(part, window)})
    return pd.DataFrame(rows)


def window_of(run: Run, counted: pd.DataFrame) -> Window:
    """The window of the counted rows of ``run``. Raises :class:`DataError` if there are none."""
    if counted.empty:
        raise DataError(
            f"{run.folder / 'requests.parquet'}: no request was scheduled after the warm-up; "
            "make the run longer or the warm-up shorter"
        )
    start, arrivals_end = int(counted["scheduled_ns"].min()), int(counted["scheduled_ns"].max())
    ended = counted["ended_ns"].max()
    return Window(start, arrivals_end, arrivals_end if math.isnan(ended) else int(ended))


def _class(rows: pd.DataFrame, window: Window) -> dict[str, float]:
    responded = rows[rows["outcome"] == "responded"]
    good = int(rows["good"].sum())
    span_s = window.makespan_s
    output = int(responded["output_tokens"].sum())
    outcomes = rows["outcome"].value_counts()
    row: dict[str, float] = {
        "offered": len(rows),
        **{outcome: int(outcomes.get(outcome, 0)) for outcome in OUTCOMES},
        "slo_attainment": good / len(rows),
        "throughput_rps": len(responded) / span_s,
        "goodput_rps": good / span_s,
        "output_tokens_per_s": output / span_s,
        "tokens_per_s": (output + int(responded["input_tokens"].sum())) / span_s,
        "wait_ns_max": _wait_max(rows),
    }
    for column in LATENCIES:
        of = rows[rows["dispatched_ns"].notna()] if column == "queue_ns" else responded
        for part, value in distribution(of[column].to_numpy())._asdict().items():
            row[f"{column}_{part}"] = value
    return row


def _wait_max(rows: pd.DataFrame) -> float:
    """Dispatched requests waited ``queue_ns``; of the others, all but the rejected waited until they ended."""
    undispatched = rows[rows["dispatched_ns"].isna() & (rows["outcome"] != "rejected")]
    waits = [rows["queue_ns"].max(), (undispatched["ended_ns"] - undispatched["arrived_ns"]).max()]
    return float(np.nanmax(np.array(waits, np.float64)))


def _overall(run: Run, requests: pd.DataFrame, window: Window) -> dict[str, float]:
    counted = requests[~requests["warmup"]]
    tenants = counted.groupby("tenant", observed=True)
    served = counted["ended_ns"].le(window.arrivals_end_ns) & (counted["outcome"] == "responded")
    row = {
        "jain_service": jain(served.groupby(counted["tenant"], observed=True).mean().to_numpy()),
        "jain_slo": jain(tenants["good"].mean().to_numpy()),
    }
    control_ns = run.manifest.control_s * 1e9 / len(requests)
    row["control_ns_per_request"] = control_ns
    row["control_overhead"] = control_ns / float(counted["e2e_ns"].mean())  # NaN where nothing was responded
    row |= _host(run, window)
    price, duration_s = run.manifest.price_per_h, run.manifest.duration_ns / SECOND
    row |= _per_work("cost", math.nan if price is None else price * window.makespan_s / 3600, counted)
    # What engines did is known of the run as a whole, so its work is that of all rows, warm-up and cool-down included.
    joules = energy(run.manifest).joules
    row |= _per_work("energy_j", joules, requests)
    row["power_w"] = joules / duration_s if duration_s else math.nan
    if run.has("tasks"):
        row |= _tasks(run, requests, window)
    return row


def _host(run: Run, window: Window) -> dict[str, float]:
    """Shares of CPU time from the samples of a live run, NaN where there are none."""
    host = run.frame("host", ("at_ns", "what", "cpu_cores")) if run.has("host") else None
    row: dict[str, float] = {}
    for what in ("machine", "gateway", "generator"):
        mean = most = math.nan
        if host is not None:
            during = host["at_ns"].between(window.start_ns, window.arrivals_end_ns)
            shares = host[during & (host["what"] == what)]["cpu_cores"]
            if len(shares):
                whole = run.manifest.hardware.cores if what == "machine" else 1
                mean, most = float(shares.mean()) / whole, float(shares.max()) / whole
        row |= {f"{what}_cpu_mean": mean, f"{what}_cpu_max": most}
    return row


def _per_work(name: str, spent: float, rows: pd.DataFrame) -> dict[str, float]:
    """``spent`` (NaN: not known) per 1,000 responded requests and per million of their tokens; NaN where there are none."""
    responded = rows[rows["outcome"] == "responded"]
    output = int(responded["output_tokens"].sum())
    work = {
        f"{name}_per_1k": len(responded) / 1e3,
        f"{name}_per_1m_tokens": (output + int(responded["input_tokens"].sum())) / 1e6,
        f"{name}_per_1m_output_tokens": output / 1e6,
    }
    return {key: spent / amount if amount else math.nan for key, amount in work.items()}


def _tasks(run: Run, requests: pd.DataFrame, window: Window) -> dict[str, float]:
    tasks = run.frame("tasks", ("request", "pool", "replica", "queued_ns", "dispatched_ns", "ended_ns"))
    queued, dispatched = tasks["queued_ns"].to_numpy(), tasks["dispatched_ns"].to_numpy()
    # A request that was never dispatched has no task row, but stood in the queue until it ended.
    left = requests[requests["dispatched_ns"].isna() & requests["ended_ns"].gt(requests["arrived_ns"])]
    mean, most = depth(
        np.concatenate([queued, left["arrived_ns"].to_numpy()]),
        np.concatenate([dispatched, left["ended_ns"].to_numpy(np.int64)]),
        window.start_ns,
        window.arrivals_end_ns,
    )
    # Requests are written as they end and tasks refer to them by id.
    by_id = requests["priority"].to_numpy()[np.argsort(requests["request"].to_numpy(), kind="stable")]
    ids = np.sort(requests["request"].to_numpy())
    priority = by_id[np.searchsorted(ids, tasks["request"].to_numpy())]
    pool = tasks["pool"].cat.codes.to_numpy()
    during = (queued >= window.start_ns) & (queued <= window.arrivals_end_ns)
    return {
        "queue_depth_mean": mean,
        "queue_depth_max": most,
        "hol_blocked": int(np.count_nonzero(blocked(queued, dispatched, priority, pool) & during)),
        "overtaken": int(np.count_nonzero(overtaken(queued, dispatched, priority, pool) & during)),
        **device_metrics(run, tasks, window.start_ns, window.arrivals_end_ns),
    }


def _class_order(group: tuple[Any, pd.DataFrame]) -> tuple[Any, ...]:
    kind, *rest = group[0]
    return KINDS.index(kind), *rest
