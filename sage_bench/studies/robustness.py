"""When something goes wrong: an engine dies, is drained or is slow, the network is slow, reports are old.

Every scenario is held against the run of the same policy and seed in which nothing happens: the same requests, so what
differs is the scenario's doing. *Recovered* is the end of the last stretch of :data:`STRETCH_S` whose requests' attainment is more
than :data:`LOST` below that of the same requests without the fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sage_bench.figures.attainment_time import attainment_time
from sage_bench.figures.style import SOURCES
from sage_bench.metrics.statistics import SEEDS_MIN, Interval, holm, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, decided, number, percent
from sage_bench.studies.points import against, arm_of, at, cell, choice_of, heading, mean, points, relative, span
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError
from sage_core.units import SECOND

STRETCH_S: Final = 5.0
LOST: Final = 0.05
NOTHING: Final = "none"
"""The scenario in which nothing happens."""

LIVE_FAULTS: Final = Path("results/bench/faults.json")
"""What ``make bench-faults`` wrote: engines of a live system that were killed, stopped or slowed."""

MEANING: Final = {
    NOTHING: "nothing happens",
    "crash": "one engine dies",
    "drain": "one engine is drained",
    "slow": "one engine is slow",
    "delay": "the network is slow",
    "stale": "reports are old",
}


class Span(NamedTuple):
    """Of a fault, s since the start: it happens, and what it took is back."""

    start: float
    back: float


class Around(NamedTuple):
    """One run. attainment: (n,) of the stretches. arrived: requests, and of those without any outcome lost, failed."""

    scenario: str
    policy: str
    seed: int
    attainment: NDArray[np.float64]
    during: float
    after: float
    arrived: int
    lost: int
    failed: int
    retries: int


def findings(experiments: Experiments) -> Findings:
    of = sides(experiments, "robustness")
    frame = points(of.sweep, _where)
    policies = list(dict.fromkeys(frame["policy"]))
    scenarios = [name for name in MEANING if name in set(frame["scenario"])]
    if NOTHING not in scenarios or len(scenarios) < 2:
        raise DataError(
            "robustness: needs runs with cluster=robustness/none and another scenario; run the whole experiment"
        )
    edges = _edges(of.sweep)
    spans = {
        name: span for run in of.sweep if (span := _span(run.manifest)) for name in [_where(run.manifest)["scenario"]]
    }
    around = [_around(run, edges, spans) for run in of.sweep]
    faults = [name for name in scenarios if name in spans]
    tables = [_overall(frame, scenarios, policies)]
    if faults:
        tables.append(_faults(around, faults, policies, spans, edges))
    tables += side_by_side("robustness_live_measured", of, _where, {"scenario": "scenario"})
    lost = sum(each.lost for each in around)
    arrived = sum(each.arrived for each in around)
    sentences = [
        f"No request is lost silently: of {arrived:,} requests in {len(of.sweep)} runs {lost:,} ended without an outcome"
        f"{_told_failed(around)}."
    ]
    sentences += [_fault_sentence(around, name, policies, spans[name], edges) for name in faults]
    sentences += [_steady_sentence(frame, name, policies) for name in scenarios if name not in (NOTHING, *faults)]
    claims = [
        Claim(
            "robustness-nothing-lost",
            234,
            "no request is lost whatever happens to an engine",
            f"{lost:,} of {arrived:,} requests ended without an outcome",
            "holds" if lost == 0 else "does not hold",
            evidence(of.sweep),
        )
    ]
    if "hybrid" in policies and len(policies) > 1:
        claims += [_claim(frame, name, policies, of.sweep) for name in scenarios if name != NOTHING]
    figures = []
    if faults:

        def draw() -> Figure:
            panels = {
                MEANING[name]: {policy: _curve(around, name, policy) for policy in policies}
                for name in (NOTHING, *faults)
            }
            first = spans[faults[0]]
            return attainment_time(panels, edges, [first.start, first.back], SOURCES[of.sweep.source()])

        caption = (
            f"SLO attainment of requests by when they were scheduled, in stretches of {STRETCH_S:g} s, mean of "
            f"{frame['seed'].nunique()} seeds, simulated; dotted: the fault, and the engine is back. {sentences[1]}"
        )
        figures.append(Drawing("attainment_time", caption, draw))
    return Findings(
        tables,
        figures,
        sentences,
        claims,
        nowhere=_nowhere(frame, scenarios, policies),
        fairness=[
            "Every scenario and policy sees the same requests, seed by seed; a scenario changes the cluster and nothing else.",
            "What an engine was streaming when it died cannot be repeated unseen, so it fails, with every policy alike; the rest is "
            "tried again elsewhere.",
            "Nobody is told that the slow engine is slow: policies that route by expected times expect it to be like the others.",
        ],
        notes=_live_note(),
    )


def _where(m: Manifest) -> dict[str, Any]:
    return {"scenario": choice_of(m, "cluster")}


# --- around a fault --------------------------------------------------------------------------------------------------


def _span(manifest: Manifest) -> Span | None:
    """From the first fault of a run to when the last device is back; None without faults."""
    faults = manifest.config["cluster"].get("faults") or []
    if not faults:
        return None
    return Span(
        min(float(each["at_s"]) for each in faults),
        max(float(each["at_s"]) + float(each.get("restart_after_s") or math.inf) for each in faults),
    )


def _edges(runs: Runs) -> NDArray[np.float64]:
    """Of the stretches, s: from the end of the warm-up, over the arrivals of the shortest run."""
    start = max(run.manifest.warmup_ns for run in runs) / SECOND
    ends = [run.manifest.cooldown_at_ns or run.manifest.duration_ns for run in runs]
    return np.arange(start, min(ends) / SECOND + 1e-9, STRETCH_S)


def _around(run: Run, edges: NDArray[np.float64], spans: dict[str, Span]) -> Around:
    scenario = _where(run.manifest)["scenario"]
    rows = run.frame("requests", ("scheduled_ns", "good", "outcome", "retries", "warmup"))
    at_s, good = rows["scheduled_ns"].to_numpy() / SECOND, rows["good"].to_numpy(np.float64)
    sent, _ = np.histogram(at_s, edges)
    met, _ = np.histogram(at_s, edges, weights=good)
    window = next(iter(spans.values())) if spans and scenario not in spans else spans.get(scenario)
    start, back = window or Span(math.inf, math.inf)
    inside = (at_s >= start) & (at_s < back)
    behind = (at_s >= back) & (at_s < edges[-1])
    arrived = run.manifest.counts.get("arrived", len(rows))
    return Around(
        scenario,
        arm_of(run.manifest),
        run.manifest.seed,
        met / np.maximum(sent, 1),
        float(good[inside].mean()) if inside.any() else math.nan,
        float(good[behind].mean()) if behind.any() else math.nan,
        arrived,
        int(rows["outcome"].isna().sum()) + arrived - len(rows),
        int((rows["outcome"] == "failed").sum()),
        int(rows["retries"].sum()),
    )


def _of(around: Sequence[Around], scenario: str, policy: str) -> list[Around]:
    return sorted((a for a in around if (a.scenario, a.policy) == (scenario, policy)), key=lambda each: each.seed)


def _curve(around: Sequence[Around], scenario: str, policy: str) -> NDArray[np.float64]:
    curve: NDArray[np.float64] = np.mean([each.attainment for each in _of(around, scenario, policy)], axis=0)
    return curve


def recovery_s(
    with_fault: NDArray[np.float64], without: NDArray[np.float64], edges: NDArray[np.float64], start_s: float
) -> float:
    """From ``start_s`` to the end of the last stretch that loses more than :data:`LOST`; 0 if none does, infinite if the last one
    does: then it is not over."""
    worse = np.flatnonzero((without - with_fault > LOST) & (edges[1:] > start_s))
    if not len(worse):
        return 0.0
    return math.inf if worse[-1] == len(with_fault) - 1 else float(edges[worse[-1] + 1] - start_s)


def _recoveries(
    around: Sequence[Around], scenario: str, policy: str, span: Span, edges: NDArray[np.float64]
) -> Interval:
    """By seed; NaN for a seed that has not recovered by the end."""
    pairs = zip(_of(around, scenario, policy), _of(around, NOTHING, policy), strict=True)
    found = [recovery_s(with_fault.attainment, without.attainment, edges, span.start) for with_fault, without in pairs]
    return t_interval([each if math.isfinite(each) else math.nan for each in found])


def _faults(
    around: Sequence[Around],
    faults: Sequence[str],
    policies: Sequence[str],
    spans: dict[str, Span],
    edges: NDArray[np.float64],
) -> TableOf:
    rows = []
    for name in faults:
        for policy in policies:
            mine, calm = _of(around, name, policy), _of(around, NOTHING, policy)
            recovered = _recoveries(around, name, policy, spans[name], edges)
            rows.append(
                [
                    MEANING[name],
                    policy,
                    *(
                        _percent_cell([getattr(each, part) for each in of])
                        for part in ("during", "after")
                        for of in (calm, mine)
                    ),
                    f"{cell(recovered)}{'' if recovered.n == len(mine) else f' ({recovered.n} of {len(mine)} seeds)'}",
                    number(float(np.mean([each.failed for each in mine]))),
                    number(float(np.mean([each.retries for each in mine]))),
                    str(sum(each.lost for each in mine)),
                ]
            )
    first = spans[faults[0]]
    return TableOf(
        "faults",
        f"The fault is at {first.start:g} s, the engine is back at {first.back:g} s; attainment of requests scheduled between the two "
        f"(during) and later (after), beside the same requests without the fault. Recovered: from the fault to the end of the last "
        f"{STRETCH_S:g} s in which attainment is more than {100 * LOST:g} points below that of the same requests without it; 0 where it "
        "never is. Failed and retried: requests a run.",
        Sheet(
            "Around a fault",
            [
                "what", "policy", "during\nwithout (%)", "with (%)", "after\nwithout (%)", "with (%)", "recovered\n(s)", "failed", "retried",
                "lost",
            ],
            rows,
        ),
    )  # fmt: skip


def _percent_cell(values: Sequence[float]) -> str:
    value = t_interval([100 * each for each in values])
    return cell(value)


def _fault_sentence(
    around: Sequence[Around], scenario: str, policies: Sequence[str], span: Span, edges: NDArray[np.float64]
) -> str:
    """Which policy loses least while it lasts, and which most."""
    loss = {
        policy: t_interval(
            [
                calm.during - hit.during
                for hit, calm in zip(_of(around, scenario, policy), _of(around, NOTHING, policy), strict=True)
            ]
        )
        for policy in policies
    }
    best, worst = min(loss, key=lambda name: loss[name].mean), max(loss, key=lambda name: loss[name].mean)
    text = (
        f"When {MEANING[scenario]} for {span.back - span.start:g} s, {best} loses {percent(loss[best].mean)} of the objectives of the "
        f"requests of that time and {worst} {percent(loss[worst].mean)}"
    )
    text += f"; it is over {_over(around, scenario, best, span, edges)}, {_over(around, scenario, worst, span, edges)}"
    if "hybrid" in loss and "hybrid" not in (best, worst):
        text += f" (hybrid: {percent(loss['hybrid'].mean)})"
    return text + "."


def _over(around: Sequence[Around], scenario: str, policy: str, span: Span, edges: NDArray[np.float64]) -> str:
    """When, with a policy; how many seeds have not recovered is said before any mean over those that have."""
    seeds, found = len(_of(around, scenario, policy)), _recoveries(around, scenario, policy, span, edges)
    if found.n < seeds:
        return f"by the end of the run in {found.n} of {seeds} seeds with {policy}"
    return f"{number(found.mean)} s after the fault with {policy}"


def _told_failed(around: Sequence[Around]) -> str:
    failed = sum(each.failed for each in around)
    return f", and {failed:,} that an engine was streaming when it died are reported as failed" if failed else ""


# --- scenarios that last ---------------------------------------------------------------------------------------------


def _overall(frame: pd.DataFrame, scenarios: Sequence[str], policies: Sequence[str]) -> TableOf:
    rows = []
    for name in scenarios:
        for policy in policies:
            here, chat = at(frame, scenario=name, policy=policy), at(frame, "chat", scenario=name, policy=policy)
            rows.append(
                [
                    MEANING[name],
                    policy,
                    cell(mean(here, "slo_attainment"), "slo_attainment"),
                    cell(mean(chat, "slo_attainment"), "slo_attainment"),
                    cell(mean(here, "served_rps")),
                    *(cell(mean(chat, metric), metric) for metric in ("ttft_ns_p95", "e2e_ns_p95")),
                    number(mean(here, "failed").mean),
                ]
            )
    return TableOf(
        "scenarios",
        f"Whole runs of {number(float(frame['offered'].median()))} counted requests, means of {frame['seed'].nunique()} seeds.",
        Sheet(
            "Scenarios",
            [
                "what", "policy", heading("slo_attainment"), heading("slo_attainment", "chat"), "answered\n(req/s)",
                heading("ttft_ns_p95", "chat"), heading("e2e_ns_p95", "chat"), "failed",
            ],
            rows,
        ),
    )  # fmt: skip


def _steady_sentence(frame: pd.DataFrame, scenario: str, policies: Sequence[str]) -> str:
    lost, served = {}, {}
    for policy in policies:
        calm, hit = (at(frame, scenario=name, policy=policy) for name in (NOTHING, scenario))
        chats = [at(frame, "chat", scenario=name, policy=policy) for name in (NOTHING, scenario)]
        lost[policy] = mean(chats[0], "slo_attainment").mean - mean(chats[1], "slo_attainment").mean
        served[policy] = relative(calm, hit, "served_rps").mean - 1
    told = ", ".join(f"{name} {percent(lost[name])}" for name in _extremes(lost))
    slowed = min(served, key=lambda name: served[name])
    return (
        f"When {MEANING[scenario]} throughout, chat loses of its objectives: {told}. What is answered changes most with {slowed}, by "
        f"{percent(served[slowed])}{'' if slowed == 'hybrid' else _hybrid(served)}."
    )


def _extremes(losses: dict[str, float]) -> list[str]:
    """The policies that lose least and most, and hybrid."""
    named = [min(losses, key=lambda name: losses[name]), max(losses, key=lambda name: losses[name])]
    return list(dict.fromkeys([*named, *(["hybrid"] if "hybrid" in losses else [])]))


def _hybrid(served: dict[str, float]) -> str:
    return f" (hybrid: {percent(served['hybrid'])})" if "hybrid" in served else ""


def _claim(frame: pd.DataFrame, scenario: str, policies: Sequence[str], runs: Runs) -> Claim:
    """hybrid against the best of the others, whichever that is here."""
    means = {name: mean(at(frame, scenario=scenario, policy=name), "slo_attainment") for name in policies}
    best = max((name for name in policies if name != "hybrid"), key=lambda name: means[name].mean)
    found = against(
        at(frame, scenario=scenario, policy=best), at(frame, scenario=scenario, policy="hybrid"), "slo_attainment"
    )
    return Claim(
        f"robustness-{scenario}",
        259,
        f"when {MEANING[scenario]}, hybrid attains more of the objectives than any other policy here",
        f"{percent(means['hybrid'].mean)} against {percent(means[best].mean)} under {best}, the best of the others; difference "
        f"{number(100 * found.difference.mean)} points{span(found.difference, 0.01)}",
        decided(found.difference.mean > 0, found.p < 0.05),
        evidence(runs),
    )


def _nowhere(frame: pd.DataFrame, scenarios: Sequence[str], policies: Sequence[str]) -> list[str]:
    """Scenarios in which no policy loses attainment significantly, Holm-adjusted over all of them."""
    asked = [(name, policy) for name in scenarios if name != NOTHING for policy in policies]
    found = [
        against(at(frame, scenario=NOTHING, policy=policy), at(frame, scenario=name, policy=policy), "slo_attainment")
        for name, policy in asked
    ]
    adjusted = holm([each.p for each in found])
    free = []
    for name in dict.fromkeys(name for name, _ in asked):
        mine = [
            (each, p)
            for (scenario, _), each, p in zip(asked, found, adjusted, strict=True)
            if scenario == name and not math.isnan(p)
        ]
        if mine and all((p > 0.05 or each.difference.mean >= 0) and each.difference.n >= SEEDS_MIN for each, p in mine):
            free.append(MEANING[name])
    return [f"No policy loses SLO attainment significantly when {each}." for each in free]


def _live_note() -> list[str]:
    """What was measured on live engines that were killed, if it was."""
    if not LIVE_FAULTS.is_file():
        return ["Engines of a live system are killed by `make bench-faults`; its figures are not in results/bench."]
    figures = json.loads(LIVE_FAULTS.read_text(encoding="utf-8"))
    runs = {name: each for name, each in figures.items() if isinstance(each, dict) and "lost" in each}
    told = ", ".join(f"{name} {each['lost']} of {each['requests']}" for name, each in runs.items())
    return (
        [f"Live, on emulated engines behind the gateway (`make bench-faults`), requests lost: {told}."] if runs else []
    )


ROBUSTNESS = Study(
    "robustness",
    "5.6",
    "Robustness",
    "What happens to requests and objectives when an engine dies, is slow, or is seen late?",
    ("robustness",),
    findings,
    live=("robustness",),
)
