"""Wins and losses, arm by arm and metric by metric, and where no arm differs: counted from the same verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from sage_bench.metrics.compare import Condition
from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL
from sage_bench.publish.chapter import Chapter
from sage_bench.studies.findings import TableOf
from sage_bench.tables import Sheet

_GROUP = ["experiment", "source"]


def balance(chapter: Chapter) -> Iterator[TableOf]:
    """A table for each experiment and source: how often each arm was better, worse, or not significantly different."""
    if chapter.verdicts.empty:
        return
    for i, ((experiment, source), rows) in enumerate(chapter.verdicts.groupby(_GROUP, sort=False)):
        metrics = list(dict.fromkeys(zip(rows["metric"], rows["kind"], strict=True)))
        cells = []
        for (policy, baseline), part in rows.groupby(["policy", "baseline"], sort=False):
            of = [part[(part["metric"] == metric) & (part["kind"] == kind)] for metric, kind in metrics]
            cells.append([str(policy), str(baseline), *(_count(each["verdict"]) for each in of)])
        headings = [f"{METRICS[metric].label}\n{'all requests' if kind == ALL else kind}" for metric, kind in metrics]
        conditions = len(rows[["condition", "rate"]].drop_duplicates())
        yield TableOf(
            f"wins_and_losses{f'_{i + 1}' if i else ''}",
            f"Better / worse / no significant difference than the arm it is held against, in {conditions} "
            f"condition{'s' if conditions > 1 else ''} of {experiment} ({source}); paired by seed, Holm-adjusted within "
            "each condition.",
            Sheet(f"Wins and losses: {experiment} ({source})", ["arm", "against", *headings], cells),
            core=False,
        )


def nowhere(chapter: Chapter) -> list[str]:
    """Where no arm differs significantly in any metric compared, a sentence for each experiment that can say."""
    if chapter.verdicts.empty:
        return []
    sentences = []
    for (experiment, source), rows in chapter.verdicts.groupby(_GROUP, sort=False):
        of = [
            each
            for each in chapter.conditions
            if (each.experiment, each.source) == (experiment, source) and _decided(rows, each) is not None
        ]
        alike = [each for each in of if _decided(rows, each) is False]
        if not of:
            continue
        what = f"{experiment} ({source})"
        names = [_name(each) for each in alike]
        listed = f": {'; '.join(names)}" if 0 < len(alike) <= 6 and any(names) else ""
        sentences.append(
            f"{what}: in {len(alike)} of {len(of)} conditions no arm differs significantly from the one it is held "
            f"against in any metric compared{listed}."
        )
        sentences += [sentence for sweep in _sweeps(of) if (sentence := _load(what, rows, sweep))]
    return sentences


def _load(what: str, rows: pd.DataFrame, sweep: Sequence[Condition]) -> str | None:
    """The load below which no arm differs, of conditions that differ in their rate alone."""
    by_rate = sorted((each.rate, _decided(rows, each)) for each in sweep if each.rate is not None)
    if len({rate for rate, _ in by_rate}) < 2:
        return None
    label = f"{what}{', ' + sweep[0].sweep if sweep[0].sweep else ''}"
    first = next((rate for rate, differs in by_rate if differs), None)
    if first is None:
        return f"{label}: no arm differs at any load tried, up to {by_rate[-1][0]:g} req/s."
    below = [rate for rate, _ in by_rate if rate < first]
    if not below:
        return f"{label}: already at the lowest load tried, {first:g} req/s, at least one arm differs."
    return f"{label}: up to {below[-1]:g} req/s no arm differs; at {first:g} req/s at least one does."


def _sweeps(of: Sequence[Condition]) -> list[list[Condition]]:
    groups: dict[str, list[Condition]] = {}
    for each in of:
        groups.setdefault(each.sweep, []).append(each)
    return list(groups.values())


def _decided(rows: pd.DataFrame, condition: Condition) -> bool | None:
    """Whether any arm differs in it; None where too few seeds can tell."""
    same = (rows["condition"] == condition.label) & (rows["source"] == condition.source)
    verdicts = rows[same & (rows["rate"].eq(condition.rate) if condition.rate is not None else rows["rate"].isna())]
    told = verdicts[verdicts["verdict"] != "too few seeds"]
    return None if told.empty else bool(told["verdict"].isin(("better", "worse")).any())


def _count(verdicts: pd.Series[str]) -> str:
    """``better / worse / no significant difference``; those without a verdict are not counted."""
    if not (verdicts != "too few seeds").any():
        return "–"
    return " / ".join(str(int((verdicts == name).sum())) for name in ("better", "worse", "no significant difference"))


def _name(condition: Condition) -> str:
    return condition.label or ("" if condition.rate is None else f"{condition.rate:g} req/s")
