"""The report's tables as text: printed on a terminal, and written as Markdown.

Numbers are means over seeds; where ``±`` is given it is half the 95 % interval. All intervals are in ``means.csv``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from sage_bench.metrics.compare import Condition
from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.saturation import BALANCE_MIN
from sage_bench.metrics.stage_spans import stage_means
from sage_bench.metrics.statistics import CONFIDENCE
from sage_bench.metrics.summary import Summary, Sweep
from sage_bench.results.schema import KINDS
from sage_core.units import MILLISECOND

DETAILED_MAX: Final = 4
"""Conditions of one experiment that get tables and figures of their own; of more, an overview is shown."""

_SERVICE: Final = (
    "slo_attainment",
    "goodput_rps",
    "throughput_rps",
    "output_tokens_per_s",
    "utilisation",
    "cost_per_1k",
)
_QUEUEING: Final = (
    "queue_depth_mean",
    "queue_depth_max",
    "wait_ns_max",
    "hol_blocked",
    "overtaken",
    "jain_service",
    "jain_slo",
)
_WAITING: Final = (
    "queue_ns_p50",
    "queue_ns_p95",
    "queue_ns_p99",
    "control_ns_per_request",
    "control_overhead",
)
_DEVICES: Final = (
    "utilisation_sd",
    "idle_ns",
    "idle_gaps",
    "idle_gap_ns_max",
    "tokens_per_s",
)
_EXPENSE: Final = (
    "cost_per_1k",
    "cost_per_1m_tokens",
    "cost_per_1m_output_tokens",
    "power_w",
    "energy_j_per_1k",
    "energy_j_per_1m_tokens",
    "energy_j_per_1m_output_tokens",
)
_HOST: Final = (
    "machine_cpu_mean",
    "machine_cpu_max",
    "gateway_cpu_mean",
    "gateway_cpu_max",
    "generator_cpu_mean",
    "generator_cpu_max",
)
_LATENCIES: Final = (
    "slo_attainment",
    "ttft_ns_p50",
    "ttft_ns_p95",
    "ttft_ns_p99",
    "tpot_ns_p95",
    "e2e_ns_p50",
    "e2e_ns_p95",
    "e2e_ns_p99",
)
_WITH_INTERVAL: Final = {*_SERVICE, "ttft_ns_p95", "e2e_ns_p95", "queue_depth_mean"}
"""Printed with their intervals; those of the others are in means.csv."""


_OVERVIEW: Final = (
    ("slo_attainment", ALL),
    ("goodput_rps", ALL),
    ("queue_depth_mean", ALL),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p95", "generate"),
    ("e2e_ns_p95", "embedding"),
)
_DEFINED: Final = (
    "slo_attainment",
    "goodput_rps",
    "throughput_rps",
    "utilisation",
    *_QUEUEING,
    *_WAITING[-2:],
    *_DEVICES,
    *_EXPENSE,
    *_HOST[::2],
)


_NUMBER: Final = re.compile(r"^[<>≤≥~≈]?[+−-]?(\d|\.\d|inf$)[^a-zA-Z]*([a-zA-Z%/]{1,6})?$")
_NONE: Final = ("", "–", "-", "none", "n/a")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of text: printed, and written as Markdown. A heading may have a second line, its unit."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def numeric(sheet: Sheet) -> list[bool]:
    """Which columns hold numbers: every cell is one (with its unit, interval or count), or says that there is none."""
    columns = [[row[i] for row in sheet.rows] for i in range(len(sheet.columns))]
    return [
        any(_NUMBER.match(cell) for cell in cells) and all(cell in _NONE or _NUMBER.match(cell) for cell in cells)
        for cells in columns
    ]


def sheets(summary: Summary) -> Iterator[Sheet]:
    """The tables, in reading order: per condition the policies, their latencies and the verdicts; then the sweeps."""
    for experiment, source in dict.fromkeys((each.experiment, each.source) for each in summary.conditions):
        of = [each for each in summary.conditions if (each.experiment, each.source) == (experiment, source)]
        if len(of) > DETAILED_MAX:
            yield _overview(summary, of)
        else:
            for condition in of:
                yield from _policies(summary, condition)
                yield from _latencies(summary, condition)
                yield from _stages(condition)
                if len(condition.arms) > 1:
                    yield _verdicts(summary, condition)
    yield from (_saturation(summary, sweep) for sweep in summary.sweeps)


def definitions() -> list[str]:
    """What the columns mean, a line each."""
    lines = [
        f"±: {CONFIDENCE:.0%} interval of the mean over seeds (Student's t); verdicts: paired by seed, Holm-adjusted."
    ]
    lines.extend(f"{METRICS[name].label}: {METRICS[name].definition}." for name in _DEFINED)
    return lines


def has(means: pd.DataFrame, kind: str, name: str) -> bool:
    """Whether any run has that metric for that kind as a whole."""
    whole = (means["kind"] == kind) & (means["tenant"] == ALL) & (means["priority"] == ALL)
    return bool((whole & (means["metric"] == name)).any())


def part(table: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """The rows of ``means`` or ``verdicts`` that belong to ``condition``."""
    same = (table["experiment"] == condition.experiment) & (table["condition"] == condition.label)
    return table[same & (table["source"] == condition.source)]


def verdict_sentences(summary: Summary, condition: Condition) -> Iterator[str]:
    """What each arm is better and worse in than the first, and which arms do not differ: a paragraph for the condition.

    Nothing for a condition among many (:data:`DETAILED_MAX`): the counts of wins and losses say it shorter.
    """
    name = (condition.experiment, condition.source)
    of = part(summary.verdicts, condition)
    if sum((each.experiment, each.source) == name for each in summary.conditions) > DETAILED_MAX or of.empty:
        return
    said, alike, unknown = [], [], []
    for policy, rows in of.groupby("policy", sort=False):
        parts = [
            f"{outcome} in {', '.join(_difference(row) for row in won.to_dict('records'))}"
            for outcome in ("better", "worse")
            if len(won := rows[rows["verdict"] == outcome])
        ]
        if parts:
            others = (
                "; no significant difference in the others"
                if (rows["verdict"] == "no significant difference").any()
                else ""
            )
            said.append(f"{policy} is {'; '.join(parts)}{others}.")
        elif (rows["verdict"] == "too few seeds").all():
            unknown.append(str(policy))
        else:
            alike.append(str(policy))
    if alike:
        said.append(f"{', '.join(alike)}: no significant difference in any metric compared.")
    if unknown:
        said.append(f"{', '.join(unknown)}: too few seeds to tell.")
    yield f"{title_of(condition)}, against {next(iter(condition.arms))}: {' '.join(said)}"


def title_of(condition: Condition) -> str:
    """Experiment, source, offered load and overrides of a condition."""
    rate = "" if condition.rate is None else f", {_number(condition.rate)} req/s offered"
    return f"{condition.experiment} ({condition.source}){rate}{', ' + condition.label if condition.label else ''}"


def _policies(summary: Summary, condition: Condition) -> Iterator[Sheet]:
    of = part(summary.means, condition)
    for title, wanted in (
        ("", _SERVICE),
        (": queueing and fairness", _QUEUEING),
        (": time queued, and in the plane", _WAITING),
        (": devices", _DEVICES),
        (": cost and energy", _EXPENSE),
        (": CPU of the machine that ran it", _HOST),
    ):
        names = [name for name in wanted if has(of, ALL, name)]
        if not names:
            continue
        rows = [
            [policy, str(len(runs)), *(_cell(of, policy, ALL, name) for name in names)]
            for policy, runs in condition.arms.items()
        ]
        yield Sheet(f"{title_of(condition)}{title}", ["policy", "runs", *map(_heading, names)], rows)


def _latencies(summary: Summary, condition: Condition) -> Iterator[Sheet]:
    of = part(summary.means, condition)
    for kind in KINDS:
        names = [name for name in _LATENCIES if has(of, kind, name)]
        if names:
            rows = [[policy, *(_cell(of, policy, kind, name) for name in names)] for policy in condition.arms]
            yield Sheet(f"{title_of(condition)}: {kind}", ["policy", *map(_heading, names)], rows)


def _stages(condition: Condition) -> Iterator[Sheet]:
    """Where the time of requests through declared pipelines went."""
    rows = []
    for policy, runs in condition.arms.items():
        for row in stage_means(runs).to_dict("records"):
            spans = [_number(row[name] / MILLISECOND) for name in ("queue_ns", "service_ns")]
            stage = f"{row['pipeline']}.{row['name']}"
            rows.append([policy, stage, row["pool"], _number(row["requests"]), *spans, f"{100 * row['share']:.1f}"])
    if rows:
        columns = ["policy", "stage", "pool", "on path\n(requests)", "queued\n(ms)", "service\n(ms)", "of E2E\n(%)"]
        yield Sheet(f"{title_of(condition)}: stages", columns, rows)


def _verdicts(summary: Summary, condition: Condition) -> Sheet:
    baseline = next(iter(condition.arms))
    rows = []
    for row in part(summary.verdicts, condition).to_dict("records"):
        name, p = row["metric"], row["p_adjusted"]
        rows.append(
            [
                row["policy"],
                _heading(name, row["kind"], " "),
                _value(name, row["difference"], sign=True) if math.isnan(p) else _interval(row),
                "" if math.isnan(p) else "<0.001" if p < 0.0005 else f"{p:.3f}",
                row["verdict"],
            ]
        )
    return Sheet(f"{title_of(condition)}: against {baseline}", ["policy", "metric", "difference", "p", "verdict"], rows)


def _interval(row: Mapping[Hashable, Any]) -> str:
    """The difference of a verdict with its interval."""
    name, difference = row["metric"], row["difference"]
    low, high = (_value(name, row[end], sign=True, like=difference) for end in ("low", "high"))
    return f"{_value(name, difference, sign=True)} [{low}, {high}]"


def _difference(row: Mapping[Hashable, Any]) -> str:
    return f"{_heading(row['metric'], row['kind'], ' ')}: {_interval(row)}"


def _overview(summary: Summary, of: Sequence[Condition]) -> Sheet:
    whole = pd.concat([part(summary.means, each) for each in of])
    columns = [(name, kind) for name, kind in _OVERVIEW if has(whole, kind, name)]
    rows = []
    for condition in of:
        mine = part(summary.means, condition)
        for policy in condition.arms:
            cells = [_cell(mine, policy, kind, name) for name, kind in columns]
            rows.append([condition.label or "as configured", policy, *cells])
    title = f"{of[0].experiment} ({of[0].source}), {len(of)} conditions"
    return Sheet(title, ["condition", "policy", *(_heading(name, kind) for name, kind in columns)], rows)


def _saturation(summary: Summary, sweep: Sweep) -> Sheet:
    whole = pd.concat([part(summary.means, each) for each in sweep.conditions])
    kinds = [kind for kind in KINDS if has(whole, kind, "e2e_ns_p95")]
    rows = []
    for policy, point in sweep.points.items():
        at = [part(summary.means, each) for each in sweep.conditions if each.rate == point.rate_rps]
        rows.append(
            [
                policy,
                "none" if math.isnan(point.rate_rps) else _number(point.rate_rps),
                "none" if math.isnan(point.next_rps) else _number(point.next_rps),
                _number(point.throughput_rps),
                *(_cell(at[0], policy, kind, "e2e_ns_p95") if at else "–" for kind in kinds),
            ]
        )
    title = " ".join(filter(None, [sweep.experiment, f"({sweep.source})", sweep.label]))
    headings = ["sustained\n(req/s)", "first not\n(req/s)", "highest\nthroughput"]
    return Sheet(
        f"{title}: saturation, the highest rate at which {BALANCE_MIN:.0%} of the offered flow is responded, and latency there",
        ["policy", *headings, *(_heading("e2e_ns_p95", kind) for kind in kinds)],
        rows,
    )


def _cell(of: pd.DataFrame, policy: str, kind: str, name: str) -> str:
    whole = (of["kind"] == kind) & (of["tenant"] == ALL) & (of["priority"] == ALL)
    rows = of[whole & (of["policy"] == policy) & (of["metric"] == name)]
    if rows.empty:
        return "–"
    mean, low, high = (float(rows.iloc[0][each]) for each in ("mean", "low", "high"))
    text = _value(name, mean)
    if math.isnan(low) or name not in _WITH_INTERVAL:
        return text
    return f"{text} ±{_value(name, (high - low) / 2, like=mean)}"


def _value(name: str, value: float, *, sign: bool = False, like: float | None = None) -> str:
    """A value of a metric in its unit; shares of a hundred have one decimal."""
    metric = METRICS[name]
    if name == "control_overhead":  # far below what one decimal shows
        return f"{value / metric.scale:.2g}"
    if metric.unit == "%":
        return f"{value / metric.scale:{'+' if sign else ''}.1f}"
    return _number(value / metric.scale, sign=sign, like=None if like is None else like / metric.scale)


def _number(value: float, *, sign: bool = False, like: float | None = None) -> str:
    """About three significant digits; as many decimals as ``like`` gets."""
    size = abs(value if like is None else like)
    decimals = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 0.995 else 3
    return f"{value:{'+' if sign else ''},.{decimals}f}"


def _heading(name: str, kind: str = ALL, between: str = "\n") -> str:
    metric = METRICS[name]
    parts = ["" if kind == ALL else kind, metric.label, f"({metric.unit})" if metric.unit else ""]
    return between.join(part for part in parts if part)
