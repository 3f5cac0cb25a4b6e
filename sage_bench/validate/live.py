"""A live run against its simulated twin: :func:`validate_run`.

The twin is the run's own configuration under the simulator with the run's own requests (:mod:`sage_bench.validate.twin`).
Both wrote rows of the same schema, so a latency is the same thing on both sides: what the plane saw of requests that
counted and were answered in both. What the load generator saw beside it (``client.parquet``), and how far a second live
run of the same load is from the first, tell how much of an error is not the simulation's.

Files of ``out``::

    fidelity.json              every error
    fidelity_requests.parquet  one row per compared request: measured and simulated latencies
    fidelity_against.parquet   one row per request of the second run, where one was given
    run/                       the simulated run itself, as `sage run` writes it

The figures of ``sage validate`` lie beside them. Whatever an earlier call left there, but its ``run/``, goes first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.config import checked
from sage_bench.core_speed import CoreSpeed, Reference, probes_of
from sage_bench.metrics.percentile import percentile
from sage_bench.results.manifest import Source
from sage_bench.results.reader import Run, read_table
from sage_bench.results.schema import KINDS
from sage_bench.results.writer import output_error
from sage_bench.run import run
from sage_bench.validate.compare import STATISTICS, Column, Compared, Latency, compared, latency
from sage_bench.validate.twin import twin
from sage_core.errors import ConfigError, DataError
from sage_core.units import SECOND
from sage_live.loadgen.schema import CLIENT
from sage_sim.profile import load_profile

FIDELITY: Final = "fidelity.json"
REQUESTS: Final = "fidelity_requests.parquet"
AGAINST: Final = "fidelity_against.parquet"
FIGURE: Final = "fidelity_latency_"
"""Names of the figures, followed by the kind."""

LATENCIES: Final = ("ttft", "tpot", "e2e", "queue")

_COLUMNS: Final = (
    *("request", "kind", "scheduled_ns", "ended_ns", "input_tokens", "output_tokens", "outcome", "warmup"),
    *(f"{name}_ns" for name in LATENCIES),
)

_SAME: Final = ("load", "policy", "cluster", "seed")
"""What a second run must share with the first to be a repetition of it."""


class Spread(msgspec.Struct, frozen=True):
    """Statistics of one side, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


class ClientView(msgspec.Struct, frozen=True):
    """What the load generator measured of the requests of a kind that were answered well. send_lag: from scheduled to
    sent; the other latencies count from scheduled, as everywhere."""

    answered: int
    failed: int
    latencies: dict[str, Spread]


class RunFidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What ``fidelity.json`` holds.

    requests: counted ones of the live run; compared: those answered in both. outcomes: of the counted requests,
    ``recorded`` and ``simulated``. kinds: errors by kind and latency. noise_pct: 100 (second run - first) / first, by kind, latency and
    statistic, null where the first is 0; null without a second run. client: by kind; null without ``client.parquet``.
    slowness: seconds over work time of the watched core, over the half seconds of the run; null where there was none.
    """

    format: int = 1
    recorded: str
    source: Source
    overrides: list[str]
    requests: int
    compared: int
    outcomes: dict[str, dict[str, int]]
    kinds: dict[str, dict[str, Latency]]
    makespan_s: Compared
    against: str | None
    noise_pct: dict[str, dict[str, dict[str, float | None]]] | None
    client: dict[str, ClientView] | None
    run: str
    digest: str
    slowness: Spread | None
    warnings: list[str]
    load_average: tuple[float, ...]


def validate_run(recorded: Path, out: Path, overrides: Sequence[str] = (), against: Path | None = None) -> RunFidelity:
    """Simulate the twin of the run in folder ``recorded`` and write the files of the module's docstring into ``out``.

    overrides: changes to the twin, such as a newly calibrated profile. against: a second run of the same load. Raises
    SageError.
    """
    real = Run(recorded)
    again = None if against is None else _repetition(real, Run(against))
    config = twin(recorded, overrides, "run", out)
    speed, doubts = _core_speed(recorded, config)
    if speed is not None:
        config["load"] |= {"probe_us": speed.reference.us, "probe_power": speed.reference.power}
    _clear(out)
    result = run(config, overrides)
    if result.finish.interrupted:
        raise KeyboardInterrupt
    measured, simulated = _counted(real), _counted(Run(result.folder), everything=speed is not None)
    if speed is not None:
        simulated = _in_seconds(simulated.loc[simulated.index.intersection(measured.index)], speed)
    both = _paired(measured, simulated)
    if both.empty:
        raise DataError(f"{recorded}: no counted request was answered both in this run and in its simulation")
    noise = None if again is None else _noise(_served(measured), _served(_counted(again)))
    fidelity = RunFidelity(
        recorded=str(recorded),
        source=real.manifest.source,
        overrides=list(overrides),
        requests=len(measured),
        compared=len(both),
        outcomes={"recorded": _outcomes(measured), "simulated": _outcomes(simulated)},
        kinds=_errors(both),
        makespan_s=compared(_makespan_s(measured), _makespan_s(simulated)),
        against=None if against is None else str(against),
        noise_pct=noise,
        client=_client(recorded / "client.parquet"),
        run=str(result.folder.relative_to(out)),
        digest=result.finish.digest.hex(),
        slowness=None if speed is None else _slowness(speed),
        warnings=[*doubts, *_doubts(real, measured, simulated, both), *result.warnings],
        load_average=os.getloadavg(),
    )
    _write(out, fidelity, both, None if again is None else _served(_counted(again)))
    return fidelity


def _core_speed(recorded: Path, config: dict[str, Any]) -> tuple[CoreSpeed | None, list[str]]:
    """Of the run, where its core was watched and a profile of its cluster is in work time; and what to know if only one is."""
    parts, _ = checked(config)
    names = {engine.profile for group in parts.cluster.devices for engine in group.engines}
    hardware = [load_profile(name).hardware for name in names]
    references = {None if each.probe_us is None else Reference(each.probe_us, each.probe_power) for each in hardware}
    if references <= {None}:
        return None, []
    probes = probes_of(recorded)
    if probes is None:
        return None, [
            "the profile counts work time of a watched core, and in this run none was watched (driver.watch_core): its times "
            "are taken as seconds"
        ]
    (reference, *others) = references
    if reference is None or others:
        raise ConfigError(
            "cluster.devices: a core was watched in this run, and its profiles are in different times; expected one profile, or "
            f"several of one probe_us and probe_power, got {', '.join(sorted(names))}"
        )
    return CoreSpeed(probes, reference), []


def _in_seconds(simulated: pd.DataFrame, speed: CoreSpeed) -> pd.DataFrame:
    """What was simulated in work time, as it would have been in the seconds of the run. Waiting counts as if it had been
    before everything else: of a request of several stages, that is near enough."""
    frame = simulated.copy()
    scheduled = frame["scheduled_ns"].to_numpy(np.float64)
    origin = speed.real(scheduled)

    def instant(name: str) -> Column:
        """NaN where there is none."""
        return np.asarray(speed.real(scheduled + frame[f"{name}_s"].to_numpy() * SECOND))

    first, end = instant("ttft"), instant("e2e")
    generating = ((frame["e2e_s"] - frame["ttft_s"]) * SECOND).to_numpy()  # NaN or 0 where there is no TPOT
    frame["tpot_s"] *= np.divide(end - first, generating, out=np.ones(len(frame)), where=generating > 0)
    for name in ("queue", "ttft", "e2e"):
        frame[f"{name}_s"] = (instant(name) - origin) / SECOND
    frame["ended_ns"] = speed.real(frame["ended_ns"].to_numpy(np.float64))
    frame["scheduled_ns"] = origin
    return frame


def _slowness(speed: CoreSpeed) -> Spread:
    found = _spread(speed.slowness)
    assert found is not None
    return found


def _counted(run: Run, *, everything: bool = False) -> pd.DataFrame:
    """Counted requests by id, or all; latencies in seconds."""
    frame = run.frame("requests", _COLUMNS)
    frame = (frame if everything else frame[~frame["warmup"]]).set_index("request").sort_index()
    if frame.empty:
        raise DataError(f"{run.folder / 'requests.parquet'}: no request was scheduled after the warm-up")
    for name in LATENCIES:
        frame[f"{name}_s"] = frame[f"{name}_ns"].to_numpy(np.float64) / SECOND
    return frame


def _served(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["outcome"] == "responded"]


def _paired(measured: pd.DataFrame, simulated: pd.DataFrame) -> pd.DataFrame:
    """Columns of ``fidelity_requests.parquet``, of the requests that were answered on both sides."""
    measured, simulated = _served(measured), _served(simulated)
    ids = measured.index.intersection(simulated.index)
    measured, simulated = measured.loc[ids], simulated.loc[ids]
    columns: dict[str, Any] = {
        "request": ids.to_numpy(),
        "kind": measured["kind"].astype(str).to_numpy(),
        "scheduled_s": measured["scheduled_ns"].to_numpy() / SECOND,
        "input_tokens": measured["input_tokens"].to_numpy(),
        "output_tokens": measured["output_tokens"].to_numpy(),
    }
    for name in LATENCIES:
        columns[f"measured_{name}_s"] = measured[f"{name}_s"].to_numpy()
        columns[f"simulated_{name}_s"] = simulated[f"{name}_s"].to_numpy()
    return pd.DataFrame(columns)


def _errors(both: pd.DataFrame) -> dict[str, dict[str, Latency]]:
    kinds: dict[str, dict[str, Latency]] = {}
    for kind in KINDS:
        rows = both[both["kind"] == kind]
        found = {}
        for name in LATENCIES:
            measured, simulated = rows[f"measured_{name}_s"].to_numpy(), rows[f"simulated_{name}_s"].to_numpy()
            there = ~np.isnan(measured) & ~np.isnan(simulated)  # an answer that came at once has no TPOT
            if (each := latency(measured[there], simulated[there])) is not None:
                found[name] = each
        if found:
            kinds[kind] = found
    return kinds


def _noise(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """Between two live runs, by distribution: their requests may have arrived in another order."""
    kinds = {}
    for kind in KINDS:
        found = {}
        for name in LATENCIES:
            of_first, of_second = (
                _spread(each.loc[each["kind"] == kind, f"{name}_s"].to_numpy()) for each in (first, second)
            )
            if of_first is not None and of_second is not None:
                found[name] = {
                    statistic: compared(getattr(of_first, statistic), getattr(of_second, statistic)).error_pct
                    for statistic in STATISTICS
                }
        if found:
            kinds[kind] = found
    return kinds


def _spread(values: Column) -> Spread | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    return Spread(float(values.mean()), *(percentile(values, q) for q in (0.50, 0.95, 0.99)))


def _client(path: Path) -> dict[str, ClientView] | None:
    if not path.exists():
        return None
    frame: pd.DataFrame = read_table(
        path, CLIENT, ("kind", "scheduled_ns", "sent_ns", "first_token_ns", "ended_ns", "error", "chunks", "warmup")
    ).to_pandas()
    views = {}
    for kind in KINDS:
        rows = frame[(frame["kind"] == kind) & ~frame["warmup"]]
        well = rows[rows["error"].isna()]
        s = {
            name: well[f"{name}_ns"].to_numpy(np.float64) / SECOND
            for name in ("scheduled", "sent", "first_token", "ended")
        }
        spans = {
            "send_lag": s["sent"] - s["scheduled"],
            "ttft": s["first_token"] - s["scheduled"],
            "e2e": s["ended"] - s["scheduled"],
        }
        found = {name: each for name, span in spans.items() if (each := _spread(span)) is not None}
        if len(rows):
            views[kind] = ClientView(len(well), len(rows) - len(well), found)
    return views


def _repetition(first: Run, second: Run) -> Run:
    for key in _SAME:
        if first.manifest.config.get(key) != second.manifest.config.get(key):
            raise ConfigError(
                f"--against: {second.folder} is not a repetition of {first.folder}: its {key} is another; give a second "
                "run of the same configuration and seed"
            )
    return second


def _doubts(real: Run, measured: pd.DataFrame, simulated: pd.DataFrame, both: pd.DataFrame) -> list[str]:
    notes = []
    if real.manifest.source == "simulation":
        notes.append(f"{real.folder} was simulated: what is compared are two simulations")
    if real.manifest.status != "complete":
        notes.append(f"{real.folder}: the run is {real.manifest.status}, so its load is partial")
    if left_out := len(measured) - len(both):
        notes.append(f"{left_out:,} of {len(measured):,} requests were not answered on both sides and are not compared")
    if len(simulated) != len(measured):
        notes.append(f"the simulation counts {len(simulated):,} requests, the run {len(measured):,}")
    return notes


def _outcomes(frame: pd.DataFrame) -> dict[str, int]:
    return {str(name): int(count) for name, count in frame["outcome"].value_counts().items() if count}


def _makespan_s(frame: pd.DataFrame) -> float:
    return float(frame["ended_ns"].max() - frame["scheduled_ns"].min()) / SECOND


def _clear(out: Path) -> None:
    figures = [f"{FIGURE}{kind}{suffix}" for kind in KINDS for suffix in (".pdf", ".png")]
    try:
        for name in (FIDELITY, REQUESTS, AGAINST, *figures):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(out, error) from error


def _write(out: Path, fidelity: RunFidelity, both: pd.DataFrame, again: pd.DataFrame | None) -> None:
    try:
        pq.write_table(pa.Table.from_pandas(both, preserve_index=False), out / REQUESTS, compression="zstd")
        if again is not None:
            second = again[["kind", *(f"{name}_s" for name in LATENCIES)]].astype({"kind": str})
            second = second.rename(columns={f"{name}_s": f"measured_{name}_s" for name in LATENCIES})
            pq.write_table(pa.Table.from_pandas(second, preserve_index=False), out / AGAINST, compression="zstd")
        (out / FIDELITY).write_bytes(msgspec.json.format(msgspec.json.encode(fidelity), indent=2) + b"\n")
    except OSError as error:
        raise output_error(out, error) from error
