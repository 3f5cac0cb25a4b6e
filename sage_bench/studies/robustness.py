"""When something goes wrong: an engine dies, is drained or is slow, the network is slow, reports are old.

Every scenario is held against the run of the same policy and seed in which nothing happens: the same requests, so what
differs is the scenario's doing. A request that was under way when a fault happened, in either run, is one that the fault may have
hit: it counts as of that instant, however long before it was scheduled. *Recovered* is the end of the last stretch of
:data:`STRETCH_S` whose requests' attainment is more than :data:`LOST` below that of the same requests without the fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sage_bench.figures.attainment_time import attainment_time
from sage_bench.figures.style import SOURCES
from sage_bench.metrics.statistics import SEEDS_MIN, Interval, holm, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.bench_figures import bench_figures
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, number, percent
from sage_bench.studies.hypotheses import Hypothesis, settled
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


class Account(NamedTuple):
    """One run. attainment: (n,) of the stretches, by when requests were scheduled. arrived: requests, and of those lost without an
    outcome and failed; left: of the failed those whose engine left."""

    scenario: str
    policy: str
    seed: int
    attainment: NDArray[np.float64]
    arrived: int
    lost: int
    failed: int
    left: int
    retries: int


class Beside(NamedTuple):
    """A run with a fault beside that of the same policy and seed without. during, after: attainment of the same requests, without
    the fault and with it. recovered: s, as of :func:`recovery_s`."""

    scenario: str
    policy: str
    seed: int
    during: tuple[float, float]
    after: tuple[float, float]
    recovered: float


class LiveFault(msgspec.Struct, frozen=True):
    """A part of what ``make bench-faults`` wrote: requests, and how many of them were lost."""

    requests: int
    lost: int


class LiveFaults(msgspec.Struct, frozen=True):
    """Engines of a live system that were killed, slowed or stopped."""

    killed: LiveFault
    slow: LiveFault
    hanging: LiveFault
    frozen: LiveFault
    outage: LiveFault


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
    accounts = [_account(run, edges) for run in of.sweep]
    faults = [name for name in scenarios if name in spans]
    alone = _alone(frame, scenarios, policies)
    pairs = [pair for name in faults for pair in _pairs(of.sweep, name, spans[name], edges)]
    tables = [_overall(frame, scenarios, policies)]
    if faults:
        tables.append(_faults(pairs, accounts, faults, policies, spans))
    tables += side_by_side("robustness_live_measured", of, _where, {"scenario": "scenario"})
    lost = sum(each.lost for each in accounts)
    arrived = sum(each.arrived for each in accounts)
    sentences = [_accounted(accounts)]
    sentences += [_fault_sentence(pairs, name, policies, spans[name]) for name in faults]
    sentences += [_steady_sentence(frame, name, policies) for name in scenarios if name not in (NOTHING, *faults)]
    claims: list[Claim | Hypothesis] = [
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
                MEANING[name]: {policy: _curve(accounts, name, policy) for policy in policies}
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
        settled(claims),
        nowhere=_nowhere(frame, scenarios, policies),
        fairness=[
            "Every scenario and policy sees the same requests, seed by seed; a scenario changes the cluster and nothing else.",
            "What an engine was streaming when it died cannot be repeated unseen, so it fails, with every policy alike; the rest is "
            "tried again elsewhere.",
            "hybrid is held against the best of the others, chosen on the same runs, which favours that other.",
            "Nobody is told that the slow engine is slow: policies that route by expected times expect it to be like the others.",
        ],
        notes=[*alone, *_live_note()],
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


def _account(run: Run, edges: NDArray[np.float64]) -> Account:
    rows = run.frame("requests", ("scheduled_ns", "good", "outcome", "reason", "retries"))
    failed = rows["outcome"] == "failed"
    left = failed & rows["reason"].astype("string").str.fullmatch(_LEFT).fillna(False).astype(bool)
    arrived = run.manifest.counts.get("arrived", len(rows))
    return Account(
        _where(run.manifest)["scenario"],
        arm_of(run.manifest),
        run.manifest.seed,
        _attainment(rows["scheduled_ns"].to_numpy() / SECOND, rows["good"].to_numpy(np.float64), edges),
        arrived,
        int(rows["outcome"].isna().sum()) + arrived - len(rows),
        int(failed.sum()),
        int(left.sum()),
        int(rows["retries"].sum()),
    )


_LEFT: Final = r"replica \d+ left"
"""The control plane's reason for a failure where the engine was gone and the request could not be tried again."""


def _attainment(
    at_s: NDArray[np.float64], good: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) by stretch; 0 where it has no request."""
    count, _ = np.histogram(at_s, edges)
    met, _ = np.histogram(at_s, edges, weights=good)
    of: NDArray[np.float64] = met / np.maximum(count, 1)
    return of


def _pairs(runs: Runs, scenario: str, span: Span, edges: NDArray[np.float64]) -> list[Beside]:
    """Of every policy and seed that has both runs."""
    calm, hit = (
        {(arm_of(run.manifest), run.manifest.seed): run for run in runs if _where(run.manifest)["scenario"] == name}
        for name in (NOTHING, scenario)
    )
    return [
        compared(scenario, *key, _same_requests(calm[key], hit[key]), span, edges)
        for key in sorted(calm.keys() & hit.keys())
    ]


_TWO: Final = ("_without", "_with")


def _same_requests(calm: Run, hit: Run) -> pd.DataFrame:
    """A row for each request, what became of it in both runs; one that a run lost is not good there and has no end. Raises
    :class:`DataError` where the two did not see the same."""
    rows = [run.frame("requests", ("request", "scheduled_ns", "ended_ns", "good")) for run in (calm, hit)]
    both = rows[0].merge(rows[1], on="request", how="outer", suffixes=_TWO, validate="one_to_one")
    scheduled = [both[f"scheduled_ns{name}"] for name in _TWO]
    arrived = [run.manifest.counts.get("arrived", len(of)) for run, of in zip((calm, hit), rows, strict=True)]
    if arrived[0] != arrived[1] or ((scheduled[0] - scheduled[1]).fillna(0.0) != 0.0).any():
        raise DataError(
            f"{calm.folder} and {hit.folder}: not the same requests, so the fault is not all they differ in; run both again"
        )
    return both.assign(
        scheduled_ns=scheduled[0].fillna(scheduled[1]), **{f"good{name}": both[f"good{name}"].eq(True) for name in _TWO}
    )


def compared(
    scenario: str, policy: str, seed: int, both: pd.DataFrame, span: Span, edges: NDArray[np.float64]
) -> Beside:
    """both: columns scheduled_ns, and ended_ns (NaN where it has no end) and good ``_without`` and ``_with`` the fault."""
    at_s = both["scheduled_ns"].to_numpy() / SECOND
    ended_s = np.max([both[f"ended_ns{name}"].fillna(math.inf).to_numpy() / SECOND for name in _TWO], axis=0)
    calm, hit = (both[f"good{name}"].to_numpy(np.float64) for name in _TWO)
    struck = (at_s < min(span.back, edges[-1])) & (ended_s >= span.start)
    behind = (at_s >= span.back) & (at_s < edges[-1])
    when_s = np.where(struck, np.maximum(at_s, span.start), at_s)
    without, with_fault = (_attainment(when_s, good, edges) for good in (calm, hit))
    return Beside(
        scenario,
        policy,
        seed,
        (_share(calm[struck]), _share(hit[struck])),
        (_share(calm[behind]), _share(hit[behind])),
        recovery_s(with_fault, without, edges, span.start),
    )


def _share(good: NDArray[np.float64]) -> float:
    return float(good.mean()) if len(good) else math.nan


def _of(found: Sequence[Beside], scenario: str, policy: str) -> list[Beside]:
    return [each for each in found if (each.scenario, each.policy) == (scenario, policy)]


def _accounts_of(accounts: Sequence[Account], scenario: str, policy: str) -> list[Account]:
    return [each for each in accounts if (each.scenario, each.policy) == (scenario, policy)]


def _curve(accounts: Sequence[Account], scenario: str, policy: str) -> NDArray[np.float64]:
    of = [each.attainment for each in _accounts_of(accounts, scenario, policy)]
    curve: NDArray[np.float64] = np.mean(of, axis=0)
    return curve


def _alone(frame: pd.DataFrame, scenarios: Sequence[str], policies: Sequence[str]) -> list[str]:
    """A note for each policy and scenario of which a seed has only one of the two runs. Raises :class:`DataError` where none has
    both."""
    notes = []
    for name in scenarios[1:]:
        for policy in policies:
            calm, hit = (set(at(frame, scenario=each, policy=policy)["seed"]) for each in (NOTHING, name))
            if not calm & hit:
                raise DataError(
                    f"robustness: policy {policy} has no seed with both cluster=robustness/{NOTHING} and cluster=robustness/{name}; "
                    "run the whole experiment"
                )
            if single := calm ^ hit:
                notes.append(
                    f"{MEANING[name].capitalize()}, {policy}: of seed{'s' if len(single) > 1 else ''} "
                    f"{', '.join(map(str, sorted(single)))} only one of the two runs is there, so differences are without."
                )
    return notes


def recovery_s(
    with_fault: NDArray[np.float64], without: NDArray[np.float64], edges: NDArray[np.float64], start_s: float
) -> float:
    """From ``start_s`` to the end of the last stretch that loses more than :data:`LOST`; 0 if none does, infinite if the last one
    does: then it is not over."""
    worse = np.flatnonzero((without - with_fault > LOST) & (edges[1:] > start_s))
    if not len(worse):
        return 0.0
    return math.inf if worse[-1] == len(with_fault) - 1 else float(edges[worse[-1] + 1] - start_s)


def _recoveries(pairs: Sequence[Beside]) -> Interval:
    """By seed; those that have not recovered by the end do not count."""
    return t_interval([each.recovered for each in pairs if math.isfinite(each.recovered)])


def _faults(
    found: Sequence[Beside],
    accounts: Sequence[Account],
    faults: Sequence[str],
    policies: Sequence[str],
    spans: dict[str, Span],
) -> TableOf:
    rows = []
    for name in faults:
        for policy in policies:
            pairs, mine = _of(found, name, policy), _accounts_of(accounts, name, policy)
            recovered = _recoveries(pairs)
            rows.append(
                [
                    MEANING[name],
                    policy,
                    *(_percent_cell([each.during[side] for each in pairs]) for side in (0, 1)),
                    *(_percent_cell([each.after[side] for each in pairs]) for side in (0, 1)),
                    f"{cell(recovered)}{'' if recovered.n == len(pairs) else f' ({recovered.n} of {len(pairs)} seeds)'}",
                    number(float(np.mean([each.failed for each in mine]))),
                    number(float(np.mean([each.retries for each in mine]))),
                    str(sum(each.lost for each in mine)),
                ]
            )
    first = spans[faults[0]]
    return TableOf(
        "faults",
        f"The fault is at {first.start:g} s, the engine is back at {first.back:g} s; attainment of the requests that were under way or "
        f"scheduled between the two (during) and of those scheduled later (after), beside the same requests without the fault. Under way: "
        f"in either of the two runs. Recovered: from the fault to the end of the last {STRETCH_S:g} s in which attainment is more than "
        f"{100 * LOST:g} points below that of the same requests without it, those under way at the fault counted as of then; 0 where it "
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


def _fault_sentence(found: Sequence[Beside], scenario: str, policies: Sequence[str], span: Span) -> str:
    """Which policy loses least while it lasts, and which most."""
    pairs = {policy: _of(found, scenario, policy) for policy in policies}
    loss = {name: t_interval([each.during[0] - each.during[1] for each in mine]).mean for name, mine in pairs.items()}
    best, worst = min(loss, key=lambda name: loss[name]), max(loss, key=lambda name: loss[name])
    text = (
        f"When {MEANING[scenario]} for {span.back - span.start:g} s, {best} loses {percent(loss[best])} of the objectives of the "
        f"requests of that time, those under way at its start among them, and {worst} {percent(loss[worst])}"
    )
    text += f"; it is over {_over(best, pairs[best])}, {_over(worst, pairs[worst])}"
    if "hybrid" in loss and "hybrid" not in (best, worst):
        text += f" (hybrid: {percent(loss['hybrid'])})"
    return text + "."


def _over(policy: str, pairs: Sequence[Beside]) -> str:
    """When, with a policy; how many seeds have not recovered is said before any mean over those that have."""
    found = _recoveries(pairs)
    if found.n < len(pairs):
        return f"by the end of the run in {found.n} of {len(pairs)} seeds with {policy}"
    return f"{number(found.mean)} s after the fault with {policy}"


def _accounted(accounts: Sequence[Account]) -> str:
    """What became of the requests of all runs: lost, or failed and of what."""
    arrived, lost, failed, left = (
        sum(getattr(each, name) for each in accounts) for name in ("arrived", "lost", "failed", "left")
    )
    told = []
    if left:
        told.append(f"{left:,} whose engine left before they were done")
    if failed - left:
        told.append(f"{failed - left:,} for other reasons")
    reported = f"; {failed:,} are reported as failed: {' and '.join(told)}" if told else ""
    if lost:
        return f"Of {arrived:,} requests in {len(accounts)} runs {lost:,} ended without an outcome{reported}."
    return f"No request is lost silently: of {arrived:,} requests in {len(accounts)} runs none ended without an outcome{reported}."


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
        lost[policy] = -against(chats[0], chats[1], "slo_attainment").difference.mean
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


def _claim(frame: pd.DataFrame, scenario: str, policies: Sequence[str], runs: Runs) -> Hypothesis:
    """hybrid against the best of the others, whichever that is here."""
    means = {name: mean(at(frame, scenario=scenario, policy=name), "slo_attainment") for name in policies}
    best = max((name for name in policies if name != "hybrid"), key=lambda name: means[name].mean)
    found = against(
        at(frame, scenario=scenario, policy=best), at(frame, scenario=scenario, policy="hybrid"), "slo_attainment"
    )
    return Hypothesis(
        f"robustness-{scenario}",
        259,
        f"when {MEANING[scenario]}, hybrid attains more of the objectives than any other policy here",
        f"{percent(means['hybrid'].mean)} against {percent(means[best].mean)} under {best}, the best of the others; difference "
        f"{number(100 * found.difference.mean)} points{span(found.difference, 0.01)}",
        found.difference.mean > 0,
        found.p,
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
        mine = [(each, p) for (scenario, _), each, p in zip(asked, found, adjusted, strict=True) if scenario == name]
        if mine and all((p > 0.05 or each.difference.mean >= 0) and each.difference.n >= SEEDS_MIN for each, p in mine):
            free.append(MEANING[name])
    return [f"No policy loses SLO attainment significantly when {each}." for each in free]


def _live_note() -> list[str]:
    """What was measured on live engines that were killed, if it was: by another program, so it is said to be no part of the runs."""
    faults = bench_figures("faults", LiveFaults)
    if faults is None:
        return ["Engines of a live system are killed by `make bench-faults`; its figures are not in results/bench."]
    told = ", ".join(
        f"{name} {each.lost} of {each.requests}"
        for name in LiveFaults.__struct_fields__
        for each in [getattr(faults, name)]
    )
    return [
        "Not from these runs: `make bench-faults` of this checkout has emulated engines behind the gateway killed, slowed or stopped; "
        f"requests lost: {told}."
    ]


ROBUSTNESS = Study(
    "robustness",
    "5.8",
    "Robustness",
    "What happens to requests and objectives when an engine dies, is slow, or is seen late?",
    ("robustness",),
    findings,
    live=("robustness",),
)
