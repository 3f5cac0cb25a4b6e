"""Live runs of a study and the simulations of the very same points, side by side.

A live size of an experiment sweeps ``driver: sim,live``: each of its points is run both ways. Those simulations are reduced like
the live runs, so they are no points of the study's own sweep; the override ``driver=sim`` tells them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import pandas as pd

from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL
from sage_bench.results.reader import Runs
from sage_bench.studies.findings import TableOf, number
from sage_bench.studies.points import Facts, at, cell, heading, mean, plain, points
from sage_bench.studies.study import Experiments
from sage_bench.tables import Sheet
from sage_core.errors import DataError

TWIN: Final = "driver=sim"
"""The override of a simulation that stands beside a live run; the sweeps of the other sizes have none."""

COMPARED: Final = (
    ("slo_attainment", ALL),
    ("throughput_rps", ALL),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p50", "chat"),
    ("e2e_ns_p95", "embedding"),
)
"""(metric, kind) of the table where the study does not choose."""


class Sides(NamedTuple):
    """Runs of one experiment. sweep: the simulations that answer the study's question. twins: those of the points of ``live``."""

    sweep: Runs
    twins: Runs
    live: Runs


def sides(experiments: Experiments, name: str) -> Sides:
    """Raises :class:`DataError` where every simulation is a twin: the study itself has not been run."""
    simulated, live = experiments.simulated[name], experiments.live.get(name, Runs([]))
    sweep = simulated.where(lambda m: TWIN not in m.overrides)
    if not len(sweep):
        raise DataError(f"experiment {name}: only its live size has been run; run `sage run experiment={name}` too")
    return Sides(sweep, simulated.where(lambda m: TWIN in m.overrides), live)


def side_by_side(
    name: str, of: Sides, facts: Facts, headings: dict[str, str], compared: Sequence[tuple[str, str]] = COMPARED
) -> list[TableOf]:
    """The table ``name``, or none where nothing ran live. headings: of the columns that ``facts`` gives."""
    if not len(of.live) or not len(of.twins):
        return []
    simulated, live = points(of.twins, facts), points(of.live, facts)
    known = [
        (metric, kind) for metric, kind in compared if _known(live, metric, kind) and _known(simulated, metric, kind)
    ]
    rows = []
    for place in live[[*headings, "policy"]].drop_duplicates().to_dict("records"):
        row = [plain(value) if isinstance(value, float) else str(value) for value in place.values()]
        for metric, kind in known:
            here = {str(name): value for name, value in place.items()}
            model, real = mean(at(simulated, kind, **here), metric), mean(at(live, kind, **here), metric)
            comparable = (
                METRICS[metric].better and real.n and model.n and real.mean
            )  # CPU times of two programs are not
            off = 100 * (model.mean / real.mean - 1) if comparable else None
            row += [cell(model, metric), cell(real, metric), "–" if off is None else f"{off:+.1f}"]
        rows.append(row)
    columns = [*headings.values(), "policy"]
    for metric, kind in known:
        columns += [f"{heading(metric, kind)}\nsimulated", "live", "error %"]
    (source,) = set(live["source"])
    worst = _worst(simulated, live, list(headings), known)
    return [
        TableOf(
            name,
            f"The same points simulated and run by the live half on {source} engines, {_runs(len(of.live))}; the error is the "
            f"simulation's against the live run{worst}.",
            Sheet("Simulated and live", columns, rows),
            core=False,
        )
    ]


def _worst(simulated: pd.DataFrame, live: pd.DataFrame, names: list[str], known: Sequence[tuple[str, str]]) -> str:
    """The largest error of what has a better and a worse, in words."""
    found = []
    for place in live[[*names, "policy"]].drop_duplicates().to_dict("records"):
        here = {str(name): value for name, value in place.items()}
        for metric, kind in known:
            model, real = mean(at(simulated, kind, **here), metric), mean(at(live, kind, **here), metric)
            if METRICS[metric].better and model.n and real.n and real.mean:
                found.append((abs(model.mean / real.mean - 1), METRICS[metric].label))
    if not found:
        return ""
    share, label = max(found)
    return f", at most {number(100 * share, 2)} % ({label})"


def _known(frame: pd.DataFrame, metric: str, kind: str) -> bool:
    return metric in frame and bool(at(frame, kind)[metric].notna().any())


def _runs(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs"
