"""Runs of a sweep as a table, a row for each run and kind of request, and what a study says of such rows.

Columns: what the study tells points apart by, then policy, source, seed and kind, then ``served_rps`` and the metrics. What is
served is the flow of answers (requests/s) within the last three quarters of the arrivals: unlike responded / makespan it does not
depend on how long the last request took, which in a run of a minute or two says more about the run than about the system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL, measure
from sage_bench.metrics.saturation import flow
from sage_bench.metrics.statistics import Interval, Paired, paired, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import number
from sage_core.errors import DataError

Facts = Callable[[Manifest], Mapping[str, Any]]


def points(runs: Runs, facts: Facts) -> pd.DataFrame:
    """``measure`` of every run, all tenants and priorities together. facts: where in the sweep a run is.

    Raises :class:`DataError`, also as :func:`refuse_two_configurations` does.
    """
    refuse_two_configurations(runs, facts)
    rows: list[dict[str, Any]] = []
    for run in runs:
        m = run.manifest
        at = {**facts(m), "policy": arm_of(m), "source": m.source, "seed": m.seed}
        table = measure(run)
        whole = table[(table["tenant"] == ALL) & (table["priority"] == ALL)]
        at["served_rps"] = flow(run).responded_rps
        metrics = whole.drop(columns=["tenant", "priority"]).to_dict("records")
        rows.extend(at | {str(name): value for name, value in row.items()} for row in metrics)
    return pd.DataFrame(rows)


def refuse_two_configurations(runs: Runs, facts: Facts) -> None:
    """Raises :class:`DataError` for two simulations of one point, arm and seed: one of them is of another configuration, from
    before the experiment was changed. A live run repeated is another measurement. facts: where in the sweep a run is."""
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs.where(lambda m: m.source == "simulation"):
        m = run.manifest
        first = seen.setdefault((*facts(m).values(), arm_of(m), m.seed), run)
        if first is not run:
            raise DataError(
                f"{first.folder} and {run.folder}: two configurations of one point of the sweep; remove the folder of the one "
                "that is not meant"
            )


def arm_of(manifest: Manifest) -> str:
    """What a run is called beside others: its arm, else its policy as it was chosen."""
    if name := (manifest.config.get("arm") or {}).get("name"):
        return str(name)
    chosen = [each for each in manifest.overrides if each.startswith("policy=")]
    return chosen[-1].removeprefix("policy=") if chosen else manifest.policy.name


def choice_of(manifest: Manifest, group: str) -> str:
    """What was chosen of a group of the configuration on the command line, without its folder. Raises :class:`DataError`."""
    for each in manifest.overrides:
        if each.startswith(f"{group}="):
            return each.partition("=")[2].rpartition("/")[2]
    raise DataError(
        f"{manifest.experiment}/{manifest.run_id}: run without {group}=; it is not a point of this experiment"
    )


def at(frame: pd.DataFrame, kind: str = ALL, **facts: Any) -> pd.DataFrame:
    """The rows of a kind of request at a point of the sweep."""
    keep = frame["kind"] == kind
    for name, value in facts.items():
        keep &= frame[name] == value
    return frame[keep]


def mean(frame: pd.DataFrame, metric: str) -> Interval:
    """Over the runs of ``frame``, with its interval over seeds; several live runs of a seed are one observation."""
    return t_interval(frame.groupby("seed")[metric].mean().tolist())


def against(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> Paired:
    """``other - baseline``, by the seeds that both have."""
    one, two = (frame.groupby("seed")[metric].mean() for frame in (baseline, other))
    shared = one.index.intersection(two.index)
    return paired(one[shared].tolist(), two[shared].tolist())


def relative(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> Interval:
    """``other / baseline``, seed by seed."""
    one, two = (frame.groupby("seed")[metric].mean() for frame in (baseline, other))
    return t_interval((two / one).dropna().tolist())


class Ratio(NamedTuple):
    """Of two arms over the seeds they share: the geometric mean of their ratios with its interval, and the p-value of its logarithm's
    being zero. NaN as in :class:`Paired`."""

    ratio: Interval
    p: float


def ratio(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> Ratio:
    """``other / baseline`` of a metric above zero, tested as it is told: by its logarithm."""
    one, two = (frame.groupby("seed")[metric].mean().dropna() for frame in (baseline, other))
    shared = one.index.intersection(two.index)
    found = paired([math.log(x) for x in one[shared]], [math.log(x) for x in two[shared]])
    of = found.difference
    return Ratio(Interval(math.exp(of.mean), math.exp(of.low), math.exp(of.high), of.n), found.p)


def cell(value: Interval, metric: str | None = None) -> str:
    """A mean with half of its interval, for a table: in the unit of ``metric``, else as it is; a dash where no run has it."""
    if value.n == 0:
        return "–"
    scale = 1.0 if metric is None else METRICS[metric].scale
    text = number(value.mean / scale)
    return text if value.n < 2 else f"{text} ±{number((value.high - value.low) / 2 / scale, 2)}"


def heading(metric: str, kind: str = ALL) -> str:
    """Of a column: what, and its unit below."""
    of = METRICS[metric]
    return f"{'' if kind == ALL else kind + ' '}{of.label}" + (f"\n({of.unit})" if of.unit else "")


def plain(value: float) -> str:
    """A rate or another value of the sweep as it was given."""
    return f"{value:,g}"


def about(value: float) -> str:
    """Two digits of a large number, for prose."""
    return f"{float(f'{value:.2g}'):,.0f}"


def span(value: Interval, scale: float = 1.0) -> str:
    """`` (95 %: low to high)`` for prose; empty below two runs."""
    return "" if value.n < 2 else f" (95 %: {number(value.low / scale)} to {number(value.high / scale)})"
