"""What another configuration would have made of a recorded load: :func:`what_if`.

The recorded requests are simulated as the run was configured (the base) and with each set of overrides (an arm). An arm is
held against the base, so that both are simulations and see the same requests; how far the base is from what was recorded
is the error of the simulation, and it stands beside every difference: one that is smaller is not to be trusted.

Simulations are runs like any other, in ``whatif/`` beside the recorded run unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sage_bench.core_speed import NAME as CORE_SPEED
from sage_bench.metrics.bootstrap import Measured, block_ns, bootstrap
from sage_bench.metrics.definitions import LATENCIES, METRICS
from sage_bench.metrics.measure import ALL, measure
from sage_bench.metrics.statistics import Paired, Verdict, holm, verdict
from sage_bench.results.manifest import Source
from sage_bench.results.reader import Run
from sage_bench.results.schema import KINDS
from sage_bench.run import RunResult, run
from sage_bench.validate.twin import describing, of_gateway, swept, twin
from sage_core.errors import DataError
from sage_core.rng import Streams
from sage_core.units import SECOND

FOLDER: Final = "whatif"

WHOLE: Final = ("goodput_rps", "throughput_rps", "cost_per_1k")
"""One number of a whole run each: they have no interval."""

PARTS: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}

_COLUMNS: Final = ("request", "kind", "scheduled_ns", "dispatched_ns", "outcome", "good", "warmup", *LATENCIES)


class BaseRow(msgspec.Struct, frozen=True):
    """A metric of the run. Values have the unit of ``metrics.definitions``; null where there is none.

    error_pct: of the simulation, against what was recorded.
    """

    kind: str
    metric: str
    recorded: float | None
    simulated: float | None
    error_pct: float | None


class ArmRow(msgspec.Struct, frozen=True):
    """The same metric of an arm. difference: to the simulated base, with its 95 % interval.

    p_adjusted: for the number of verdicts of the arm (Holm). verdict: null where there is no interval. doubtful: the
    simulation's own error is larger than the difference.
    """

    kind: str
    metric: str
    simulated: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_adjusted: float | None
    verdict: Verdict | None
    doubtful: bool


class Arm(msgspec.Struct, frozen=True):
    """A simulation with ``overrides``, in ``folder``."""

    overrides: list[str]
    policy: str
    folder: str
    digest: str
    rows: list[ArmRow]


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` writes. repeated: the base made the recorded decisions, byte for byte. block_s: length of the blocks
    that were resampled. notes: what a reader must know."""

    format: int = 1
    run: str
    source: Source
    requests: int
    base: str
    digest: str
    repeated: bool
    block_s: float
    rows: list[BaseRow]
    arms: list[Arm]
    notes: list[str]


def what_if(recorded: Path, overrides: Sequence[str], results: Path | None = None) -> WhatIf:
    """Simulate the run in folder ``recorded`` as it was, and once for every combination of choices in ``overrides``.

    results: a folder for the simulated runs, by default the one that ``recorded`` is in. Of a gateway's record
    ``cluster=`` or ``cluster.devices=`` describes the engines, for base and arms. Raises SageError.
    """
    engines = describing(overrides) if of_gateway(recorded) else []  # of the base too: nothing recorded says it
    arms = [each for each in swept([text for text in overrides if text not in engines]) if each]
    # Every configuration before the first run: a mistake in the last arm should not cost the others.
    given = [[*engines, *each] for each in ([], *arms)]
    configs = [twin(recorded, each, FOLDER, results or recorded.parent) for each in given]
    real = Run(recorded)
    base, *others = [_simulated(config, each) for config, each in zip(configs, given, strict=True)]
    requests = counted(base.folder)
    rows = _base_rows(measure(real), measure(Run(base.folder)))
    repeated = base.finish.digest.hex() == real.manifest.digest
    return WhatIf(
        run=str(recorded),
        source=real.manifest.source,
        requests=len(requests),
        base=str(base.folder),
        digest=base.finish.digest.hex(),
        repeated=repeated,
        block_s=block_ns(requests["scheduled_ns"].to_numpy()) / SECOND,
        rows=rows,
        arms=[
            Arm(
                each,
                Run(result.folder).manifest.policy.name,
                str(result.folder),
                result.finish.digest.hex(),
                _arm_rows(rows, requests, result),
            )
            for each, result in zip(arms, others, strict=True)
        ],
        notes=_notes(real, repeated, requests, [base, *others]),
    )


def _simulated(config: dict[str, Any], overrides: Sequence[str]) -> RunResult:
    result = run(config, overrides)
    if result.finish.interrupted:
        raise KeyboardInterrupt
    return result


def counted(folder: Path) -> pd.DataFrame:
    """Counted requests of the run in ``folder``, by scheduled instant."""
    frame = Run(folder).frame("requests", _COLUMNS)
    frame = frame[~frame["warmup"]].sort_values(["scheduled_ns", "request"]).set_index("request")
    if frame.empty:
        raise DataError(f"{folder}: no recorded request was scheduled after the warm-up; there is nothing to compare")
    return frame


def _base_rows(recorded: pd.DataFrame, simulated: pd.DataFrame) -> list[BaseRow]:
    rows = []
    kinds = [kind for kind in KINDS if _values(simulated, kind) is not None]
    for kind in (ALL, *kinds):
        before, after = _values(recorded, kind), _values(simulated, kind)
        assert after is not None
        names = ["slo_attainment", *WHOLE] if kind == ALL else [f"{of}_{part}" for of in LATENCIES for part in PARTS]
        for name in names:
            was = math.nan if before is None else float(before.get(name, math.nan))
            now = float(after.get(name, math.nan))
            if not (math.isnan(was) and math.isnan(now)):
                error = 100 * (now - was) / was if was else math.nan
                rows.append(BaseRow(kind, name, _known(was), _known(now), _known(error)))
    return rows


def _arm_rows(base: Sequence[BaseRow], requests: pd.DataFrame, result: RunResult) -> list[ArmRow]:
    """The rows of an arm, in the order of the base's."""
    of_arm = measure(Run(result.folder))
    pairs = differences(requests, counted(result.folder).reindex(requests.index), result.config.seed)
    adjusted = dict(zip(pairs, holm([pair.p for pair in pairs.values()]), strict=True))
    rows = []
    for each in base:
        values = _values(of_arm, each.kind)
        now = math.nan if values is None else float(values.get(each.metric, math.nan))
        difference = now - (math.nan if each.simulated is None else each.simulated)
        pair = pairs.get((each.kind, each.metric))
        p = adjusted.get((each.kind, each.metric), math.nan)
        if math.isnan(difference):  # refused on one side: too few samples
            pair, p = None, math.nan
        error = None if each.recorded is None or each.simulated is None else abs(each.simulated - each.recorded)
        rows.append(
            ArmRow(
                each.kind,
                each.metric,
                _known(now),
                _known(difference),
                None if pair is None else _known(pair.difference.low),
                None if pair is None else _known(pair.difference.high),
                _known(p),
                None if math.isnan(p) else verdict(difference, p, METRICS[each.metric].better or "higher"),
                error is not None and abs(difference) < error,
            )
        )
    return rows


def differences(base: pd.DataFrame, arm: pd.DataFrame, seed: int) -> dict[tuple[str, str], Paired]:
    """``arm - base`` of what is counted request by request, by (kind, metric), as uncertain as one run leaves it. base, arm: of
    :func:`counted`, with the same rows. seed: of the resampling."""
    draws = Streams(seed).stream("whatif/bootstrap")
    scheduled_ns = base["scheduled_ns"].to_numpy()
    names: list[list[tuple[str, str]]] = [[(ALL, "slo_attainment")]]
    columns = [Measured(base["good"].to_numpy(np.float64), arm["good"].to_numpy(np.float64), [None])]
    for kind in base["kind"].unique():
        inside = (base["kind"] == kind).to_numpy()
        for name in LATENCIES:
            names.append([(str(kind), f"{name}_{part}") for part in PARTS])
            columns.append(Measured(_latency(base, name, inside), _latency(arm, name, inside), list(PARTS.values())))
    found = bootstrap(scheduled_ns, columns, draws)
    return {key: pair for keys, pairs in zip(names, found, strict=True) for key, pair in zip(keys, pairs, strict=True)}


def _latency(frame: pd.DataFrame, name: str, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n,) of the requests ``inside`` that have it: those dispatched for the queue time, those responded for the others."""
    there = frame["dispatched_ns"].notna() if name == "queue_ns" else frame["outcome"] == "responded"
    return np.where(inside & there.to_numpy(), frame[name].to_numpy(np.float64), np.nan)


def _notes(real: Run, repeated: bool, requests: pd.DataFrame, results: Sequence[RunResult]) -> list[str]:
    notes = list(dict.fromkeys(warning for result in results for warning in result.warnings))
    if real.manifest.status != "complete":
        notes.append(f"{real.folder}: the recorded run is {real.manifest.status}, so its load is partial")
    if real.manifest.source == "simulation" and not repeated:
        notes.append(
            "the recorded run was simulated, and simulating it again made other decisions: another native build, or the "
            "log does not hold all of its load (see the other notes)"
        )
    if (real.folder / CORE_SPEED).exists():
        notes.append(
            "the core of the recorded run was watched; what is simulated here runs at the speed of the profile's reference, "
            "so differences between policies hold for that speed (sage validate simulates at the core's)"
        )
    length = block_ns(requests["scheduled_ns"].to_numpy())
    slowest = float(requests["e2e_ns"].quantile(0.99))
    if slowest > length:
        notes.append(
            f"the slowest requests take longer than a block of the bootstrap ({slowest / SECOND:.2f} s, {length / SECOND:.2f} s): "
            "the intervals are too narrow; record a longer run"
        )
    return notes


def _values(frame: pd.DataFrame, kind: str) -> pd.Series[Any] | None:
    """The row of ``measure`` of all requests of a kind."""
    rows = frame[(frame["kind"] == kind) & (frame["tenant"] == ALL) & (frame["priority"] == ALL)]
    return None if rows.empty else rows.iloc[0]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
