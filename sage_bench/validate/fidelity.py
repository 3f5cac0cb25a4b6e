"""Replay a measured run, compare, and write what was found: :func:`validate`.

The simulation is a run like any other (:func:`sage_bench.run.run`): the same driver, plane, policy code and engine, so
what is validated is what every experiment uses. In front of the engine stands a plain router with no queue of its own
and a network without delay; time in the engine is all there is. Latencies count from the instant that the simulation
takes for the arrival, in the measured run and in the simulated one.

Files of ``out``::

    fidelity.json              settings, checksums, every error
    fidelity_requests.parquet  one row per request: measured and simulated latencies
    fidelity_series.parquet    one row per tick, where a time series was given
    run/                       the simulated run itself, as `sage run` writes it

The figures of ``sage validate`` lie beside them. Whatever an earlier call left there, but its ``run/``, goes first, so
that a call that fails leaves no files of another one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from omegaconf import OmegaConf

from sage_bench.config import composed
from sage_bench.results.manifest import FileFact, file_fact
from sage_bench.results.reader import Run
from sage_bench.results.writer import output_error
from sage_bench.run import RunResult, run
from sage_bench.validate.compare import Compared, Latency, Series, at_ticks, compared, latency, series, tpot_s
from sage_bench.validate.load import MeasuredLoad, order
from sage_bench.validate.measured import SERIES, MeasuredRun, MeasuredSeries, check_series, read_run, read_series
from sage_bench.validate.setup import Asked, Setup, resolve
from sage_core.errors import DataError
from sage_sim.profile import load_profile

FIDELITY: Final = "fidelity.json"
REQUESTS: Final = "fidelity_requests.parquet"
SERIES_FILE: Final = "fidelity_series.parquet"
LATENCY_FIGURE: Final = "fidelity_latency"
SERIES_FIGURE: Final = "fidelity_series"
"""Names of the figures, without their suffixes."""

Columns: TypeAlias = dict[str, NDArray[Any]]
"""(n,) each, by name: a table to be written."""

LATENCIES: Final = ("ttft", "tpot", "e2e")

SAMPLES_PER_TICK: Final = 10
"""Reports of the simulated engine per tick of the measured series: the one taken is at most a tenth of a tick old."""

REPORT_INTERVAL_S: Final = 1.0
"""Between reports where there is no measured series."""


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What ``fidelity.json`` holds.

    engine: keys of the simulated engine's configuration, defaults included. latencies: by name of :data:`LATENCIES`; one that no request has
    (TPOT of single tokens) is left out. makespan_s: first arrival to last token. series: by name of
    ``measured.SERIES``; null without a time series. run: folder of the simulated run below ``out``. warnings: what a
    reader of the errors must know. load_average: of the machine when the comparison was made, over 1, 5 and 15 minutes.
    """

    format: int = 1
    measured: FileFact
    timeseries: FileFact | None
    prefix_trace: FileFact | None
    profile: str
    engine: dict[str, Any]
    replicas: int
    arrivals: str
    requests: int
    latencies: dict[str, Latency]
    makespan_s: Compared
    series: dict[str, Series] | None
    run: str
    digest: str
    cpu_s: float
    warnings: list[str]
    load_average: tuple[float, ...]


def validate(measured: Path, asked: Asked, out: Path, timeseries: Path | None = None) -> Fidelity:
    """Replay ``measured`` and write the files of the module's docstring into ``out``. Raises SageError."""
    _clear(out)
    found = read_run(measured)
    ticks = None if timeseries is None else read_series(timeseries)
    setup, notes = resolve(asked, found, load_profile(asked.profile))
    if ticks is not None:
        notes += check_series(ticks, found, setup.arrivals)
    result = _simulate(found, ticks, setup, out)
    requests = _requests(found, setup, Run(result.folder))
    columns = None if ticks is None else _ticks(found, ticks, setup, Run(result.folder))
    start_s = found.start_s(setup.arrivals)
    latencies = {
        name: each
        for name in LATENCIES
        if (each := latency(requests[f"measured_{name}_s"], requests[f"simulated_{name}_s"])) is not None
    }
    fidelity = Fidelity(
        measured=file_fact(measured),
        timeseries=None if timeseries is None else file_fact(timeseries),
        prefix_trace=None if setup.prefix_trace is None else file_fact(setup.prefix_trace),
        profile=asked.profile,
        engine=msgspec.to_builtins(result.config.cluster.devices[0].llm),
        replicas=setup.replicas,
        arrivals=setup.arrivals,
        requests=len(found),
        latencies=latencies,
        makespan_s=compared(
            float(found.last_token_s.max() - start_s.min()),
            float((start_s + requests["simulated_e2e_s"]).max() - start_s.min()),
        ),
        series=None
        if columns is None
        else {name: series(columns[f"measured_{name}"], columns[f"simulated_{name}"]) for name in SERIES},
        run=str(result.folder.relative_to(out)),
        digest=result.finish.digest.hex(),
        cpu_s=result.finish.total_s,
        warnings=notes + result.warnings,
        load_average=os.getloadavg(),
    )
    _write(out, fidelity, requests, columns)
    return fidelity


def _simulate(found: MeasuredRun, ticks: MeasuredSeries | None, setup: Setup, out: Path) -> RunResult:
    config: Any = OmegaConf.to_container(composed(["policy=least_in_flight", "slo=none"]), resolve=True)
    interval_s = REPORT_INTERVAL_S
    if ticks is not None and len(ticks.t) > 1:
        interval_s = max(float(np.median(np.diff(ticks.t))) / SAMPLES_PER_TICK, 0.001)
    config |= {
        "name": "run",
        "results": str(out),
        "load": {
            "_target_": f"{MeasuredLoad.__module__}.{MeasuredLoad.__qualname__}",
            "path": str(found.path),
            "arrivals": setup.arrivals,
            "prefix_trace": None if setup.prefix_trace is None else str(setup.prefix_trace),
        },
        "cluster": {
            "network": {"delay_s": 0.0, "jitter_s": 0.0},
            "report_interval_s": interval_s,
            "devices": [{"node": "measured", "count": setup.replicas, "llm": setup.llm}],
        },
    }
    result = run(config)
    if result.finish.interrupted:
        raise KeyboardInterrupt
    return result


def _requests(found: MeasuredRun, setup: Setup, simulated: Run) -> Columns:
    """Columns of ``fidelity_requests.parquet``, by row of the measured file. DataError if a request was not served."""
    frame = simulated.frame("requests", ("request", "outcome", "reason", "ttft_ns", "e2e_ns", "tpot_ns"))
    frame = frame.sort_values("request")
    rows = order(found, setup.arrivals)
    unserved = np.flatnonzero((frame["outcome"] != "responded").to_numpy())
    if len(unserved):
        row = int(rows[unserved[0]])
        raise DataError(
            f"{found.path}: row {row} (from 0) ended in the simulation as {frame['outcome'].iloc[unserved[0]]}: "
            f"{frame['reason'].iloc[unserved[0]]} ({len(unserved):,} of {len(found):,} requests); the measured engine served it, "
            "so check the engine settings"
        )
    by_row = np.argsort(rows)  # id of each row's request
    ns = {name: frame[f"{name}_ns"].to_numpy(np.float64)[by_row] / 1e9 for name in LATENCIES}
    start_s = found.start_s(setup.arrivals)
    return {
        "row": np.arange(len(found)),
        "request": by_row,
        "start_s": start_s,
        "prompt_tokens": found.prompt_tokens,
        "output_tokens": found.output_tokens,
        "measured_ttft_s": found.first_token_s - start_s,
        "simulated_ttft_s": ns["ttft"],
        "measured_tpot_s": tpot_s(found.first_token_s, found.last_token_s, found.output_tokens),
        "simulated_tpot_s": ns["tpot"],
        "measured_e2e_s": found.last_token_s - start_s,
        "simulated_e2e_s": ns["e2e"],
    }


def _ticks(found: MeasuredRun, ticks: MeasuredSeries, setup: Setup, simulated: Run) -> Columns:
    """Columns of ``fidelity_series.parquet``: sums over replicas of sequences, mean over replicas of KV usage."""
    frame = simulated.frame("replicas", ("at_ns", "replica", "running", "waiting", "kv_blocks_free"))
    ticks_ns = np.rint((ticks.t - found.origin_s(setup.arrivals)) * 1e9).astype(np.int64)
    totals = {name: np.zeros(len(ticks_ns)) for name in SERIES}
    for _, reports in frame.groupby("replica"):
        at_ns = reports["at_ns"].to_numpy(np.int64)
        of = {
            "running": reports["running"].to_numpy(np.float64),
            "waiting": reports["waiting"].to_numpy(np.float64),
            "kv_cache_pct": 100
            * (1 - reports["kv_blocks_free"].to_numpy(np.float64) / setup.kv_blocks)
            / setup.replicas,
        }
        for name in SERIES:
            values = at_ticks(ticks_ns, at_ns, of[name])
            # The run ends with its last request: after that every replica is empty.
            totals[name] += np.where(ticks_ns <= simulated.manifest.duration_ns, values, 0.0)
    columns: Columns = {"t_s": ticks.t}
    for name in SERIES:
        columns |= {f"measured_{name}": getattr(ticks, name), f"simulated_{name}": totals[name]}
    return columns


def _clear(out: Path) -> None:
    figures = [f"{name}{suffix}" for name in (LATENCY_FIGURE, SERIES_FIGURE) for suffix in (".pdf", ".png")]
    try:
        for name in (FIDELITY, REQUESTS, SERIES_FILE, *figures):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(out, error) from error


def _write(
    out: Path,
    fidelity: Fidelity,
    requests: Columns,
    columns: Columns | None,
) -> None:
    try:
        pq.write_table(_table(requests), out / REQUESTS, compression="zstd")
        if columns is not None:
            pq.write_table(_table(columns), out / SERIES_FILE, compression="zstd")
        (out / FIDELITY).write_bytes(msgspec.json.format(msgspec.json.encode(fidelity), indent=2) + b"\n")
    except OSError as error:
        raise output_error(out, error) from error


def _table(columns: Columns) -> pa.Table:
    """NaN becomes null: a TPOT that is not defined is not a number anybody measured."""
    return pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
