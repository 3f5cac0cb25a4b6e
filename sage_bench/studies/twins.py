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
from sage_bench.metrics.statistics import Interval, t_interval
from sage_bench.results.reader import Runs
from sage_bench.studies.findings import TableOf, number
from sage_bench.studies.points import Facts, at, cell, heading, plain, points
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
    """The table ``name``, or none where nothing ran live. headings: of the columns that ``facts`` gives.

    Raises :class:`DataError`, also where live runs of emulated and of real engines are mixed.
    """
    if not len(of.live) or not len(of.twins):
        return []
    source = of.live.source()
    simulated, live = points(of.twins, facts), points(of.live, facts)
    known = [
        (metric, kind) for metric, kind in compared if _known(live, metric, kind) and _known(simulated, metric, kind)
    ]
    rows = []
    errors: list[tuple[float, str]] = []
    for place in live[[*headings, "policy"]].drop_duplicates().to_dict("records"):
        row = [plain(value) if isinstance(value, float) else str(value) for value in place.values()]
        here = {str(name): value for name, value in place.items()}
        for metric, kind in known:
            model, real = _on_shared_seeds(at(simulated, kind, **here), at(live, kind, **here), metric)
            row += [cell(model, metric), cell(real, metric)]
            if METRICS[metric].better and real.n and real.mean:  # CPU times of two programs are not comparable
                error = model.mean / real.mean - 1
                errors.append((abs(error), METRICS[metric].label))
                row.append(f"{100 * error:+.1f}")
            else:
                row.append("–")
        rows.append(row)
    columns = [*headings.values(), "policy"]
    for metric, kind in known:
        columns += [f"{heading(metric, kind)}\nsimulated", "live", "error %"]
    return [
        TableOf(
            name,
            f"The same points simulated and run by the live half on {source} engines, {_runs(len(of.live))}, over the seeds that ran "
            f"both ways; the error is the simulation's against the live run{_worst(errors)}.",
            Sheet("Simulated and live", columns, rows),
            core=False,
        )
    ]


def _on_shared_seeds(simulated: pd.DataFrame, live: pd.DataFrame, metric: str) -> tuple[Interval, Interval]:
    """Of one place, over the seeds that both sides have: which live runs were valid must not choose what is compared."""
    one, two = (frame.groupby("seed")[metric].mean().dropna() for frame in (simulated, live))
    shared = one.index.intersection(two.index)
    return t_interval(one[shared].tolist()), t_interval(two[shared].tolist())


def _worst(errors: Sequence[tuple[float, str]]) -> str:
    """The largest error of what has a better and a worse, in words."""
    if not errors:
        return ""
    share, label = max(errors)
    return f", at most {number(100 * share, 2)} % ({label})"


def _known(frame: pd.DataFrame, metric: str, kind: str) -> bool:
    return metric in frame and bool(at(frame, kind)[metric].notna().any())


def _runs(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs"
