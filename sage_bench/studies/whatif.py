"""A prediction held against what really happened: fifo is recorded, hybrid is predicted from the record, and hybrid is run.

Three runs of each seed: the record, the prediction (a simulation of the recorded requests under hybrid, and one under fifo, which
it is held against), and the real run of the same clients under hybrid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.paired_differences import paired_differences
from sage_bench.figures.style import SOURCES
from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.statistics import Interval, Paired, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, percent
from sage_bench.studies.points import at, cell, heading, mean, points
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.tables import Sheet
from sage_bench.whatif import counted, differences
from sage_core.errors import DataError

RECORDED, WANTED = "fifo", "hybrid"
"""Policies: what was run, and what is asked for."""

EXACT: Final = 0.05
"""Error of a prediction up to which it is called near."""

METRICS_TOLD: Final = (
    ("slo_attainment", ALL),
    ("goodput_rps", ALL),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p95", "chat"),
    ("e2e_ns_p50", "generate"),
    ("e2e_ns_p95", "embedding"),
)

LOOPS: Final = {"OpenLoop": "open loop", "ClosedLoop": "closed loop"}


class World(NamedTuple):
    """What was recorded in one kind of load and source. real, predicted: rows of :func:`sage_bench.studies.points.points`, by
    policy, of the seeds that have all runs. runs: those that the rows are of."""

    loop: str
    source: str
    real: pd.DataFrame
    predicted: pd.DataFrame
    runs: Runs
    pairs: list[tuple[Run, Run, Run]]
    same: int

    @property
    def name(self) -> str:
        return LOOPS[self.loop] + ("" if self.source == "simulation" else f", {SOURCES[self.source]}")


def findings(experiments: Experiments) -> Findings:
    worlds = _worlds(experiments)
    if not worlds:
        raise DataError("whatif: no record has its prediction; run experiment=whatif, then experiment=whatif_predicted")
    rows = [row for world in worlds for row in _rows(world)]
    first = worlds[0]
    between = {world.name: _intervals(world) for world in worlds}
    sentences = [_sentence(world) for world in worlds]
    sentences += [_covered(world, told) for world in worlds if (told := between[world.name])]
    claims = [_claim(world) for world in worlds]

    def draw() -> Figure:
        chosen = next((world for world in worlds if world.loop == "ClosedLoop"), first)
        return _drawn(chosen)

    caption = (
        "Difference of hybrid to fifo, as predicted from the record under fifo and as it really was, in per cent of fifo; means and 95 % "
        f"intervals over {first.real['seed'].nunique()} seeds, {'closed loop' if any(w.loop == 'ClosedLoop' for w in worlds) else first.name}."
    )
    return Findings(
        tables=[
            TableOf(
                "predictions",
                f"Recorded under {RECORDED}, predicted and really run under {WANTED}; the error is that of the prediction against the real run, "
                f"by seed. Means of {first.real['seed'].nunique()} seeds, ± half of the 95 % interval.",
                Sheet(
                    "Predicted and real",
                    [
                        "load",
                        "metric",
                        f"{RECORDED}\nrecorded",
                        f"{WANTED}\npredicted",
                        f"{WANTED}\nreal",
                        "error\n(%)",
                        "largest\n(%)",
                    ],
                    rows,
                ),
            )
        ],
        figures=[Drawing("predicted_and_real", caption, draw)],
        sentences=sentences,
        claims=claims,
        nowhere=[
            f"{world.name}: every prediction made the decisions of the real run, so a prediction says no more and no less than running it."
            for world in worlds
            if world.same == len(world.pairs)
        ],
        fairness=[
            "Record, prediction and real run have the same cluster, objectives, seeds and counted window.",
            "A simulated record holds every request's true length; what is left to get wrong there is what the policy does to the load: in a "
            "closed loop clients who are answered sooner ask sooner, and a record cannot know that.",
            "A policy sees the same predictions of lengths in the record and in the real run; nobody sees true lengths.",
            *_builds(worlds),
        ],
    )


def _builds(worlds: Sequence[World]) -> list[str]:
    """That a prediction and its real run were made by different code: then the error is that of the change too."""
    made = [{run.manifest.software.native_build for run in pair} for world in worlds for pair in world.pairs]
    different = sum(len(each) > 1 for each in made)
    if not different:
        return []
    return [
        f"{different} of {len(made)} predictions and their real runs were made by different native builds; run both again."
    ]


def _real_at(m: Manifest) -> dict[str, Any]:
    return {"loop": m.load.name, "of": m.source}


def _predicted_at(m: Manifest) -> dict[str, Any]:
    """Of the record that it was predicted from."""
    load = m.config["load"]
    return {"loop": str(load["load"]), "of": str(load["source"])}


def _worlds(experiments: Experiments) -> list[World]:
    predicted = experiments.simulated["whatif_predicted"]
    real = [*experiments.simulated["whatif"], *experiments.live.get("whatif", ())]
    found = []
    for loop in LOOPS:
        for source in SOURCES:
            here = {"loop": loop, "of": source}
            mine = _first(Runs([run for run in real if _real_at(run.manifest) == here]))
            theirs = Runs([run for run in predicted if _predicted_at(run.manifest) == here])
            told, guessed = points(mine, _real_at), points(theirs, _predicted_at)  # refuses two simulations of one seed
            pairs = _pairs(mine, theirs)
            if pairs:
                seeds = {truth.manifest.seed for _, _, truth in pairs}
                told, guessed = (frame[frame["seed"].isin(seeds)] for frame in (told, guessed))
                kept = Runs([run for run in (*mine, *theirs) if run.manifest.seed in seeds])
                same = sum(one.manifest.digest == other.manifest.digest for one, _, other in pairs)
                found.append(World(loop, source, told, guessed, kept, pairs, same))
    return found


def _first(runs: Runs) -> Runs:
    """Of live runs that were repeated the earliest, as ``load=whatif/record`` takes it; simulations all."""
    kept: dict[tuple[str, int], Run] = {}
    for run in sorted(runs, key=lambda each: each.manifest.timing.started_at):
        kept.setdefault((run.manifest.policy.name, run.manifest.seed), run)
    live = {run.folder for run in kept.values()}
    return Runs([run for run in runs if run.manifest.source == "simulation" or run.folder in live])


def _pairs(real: Runs, predicted: Runs) -> list[tuple[Run, Run, Run]]:
    """By seed that has all four runs: hybrid predicted, fifo repeated, hybrid real; the fourth is the record."""

    def by_seed(runs: Runs, policy: str) -> dict[int, Run]:
        return {run.manifest.seed: run for run in runs if run.manifest.policy.name == policy}

    asked, base, truth = by_seed(predicted, WANTED), by_seed(predicted, RECORDED), by_seed(real, WANTED)
    seeds = asked.keys() & base.keys() & truth.keys() & by_seed(real, RECORDED).keys()
    return [(asked[seed], base[seed], truth[seed]) for seed in sorted(seeds)]


def _errors(world: World, metric: str, kind: str) -> list[float]:
    """Of the prediction, relative, by seed."""
    asked, truth = (
        at(frame, kind, policy=WANTED).groupby("seed")[metric].mean() for frame in (world.predicted, world.real)
    )
    return (asked / truth - 1).dropna().tolist()


def _rows(world: World) -> list[list[str]]:
    rows = []
    for metric, kind in METRICS_TOLD:
        errors = _errors(world, metric, kind)
        if not errors:
            continue
        rows.append(
            [
                world.name,
                heading(metric, kind).replace("\n", " "),
                cell(mean(at(world.real, kind, policy=RECORDED), metric), metric),
                cell(mean(at(world.predicted, kind, policy=WANTED), metric), metric),
                cell(mean(at(world.real, kind, policy=WANTED), metric), metric),
                f"{100 * t_interval(errors).mean:+.2f}",
                f"{100 * max(errors, key=abs):+.2f}",
            ]
        )
    return rows


def _worst(world: World) -> tuple[float, str]:
    """The largest error of any metric in any seed, and whose."""
    found = [
        (max(map(abs, errors)), heading(*each).partition("\n")[0])
        for each in METRICS_TOLD
        if (errors := _errors(world, *each))
    ]
    return max(found)


def _sentence(world: World) -> str:
    error, label = _worst(world)
    if world.same == len(world.pairs):
        return f"{world.name.capitalize()}: all {len(world.pairs)} predictions made the very decisions of the real run; their error is zero."
    mean_error = t_interval([abs(each) for metric in METRICS_TOLD for each in _errors(world, *metric)]).mean
    return (
        f"{world.name.capitalize()}: the prediction is off by {percent(mean_error)} on average over metrics and seeds, at most {percent(error)} "
        f"({label}); {world.same} of {len(world.pairs)} made the decisions of the real run."
    )


def _intervals(world: World) -> list[tuple[str, Paired, float]]:
    """Of every seed and metric with an interval: what a user of one record is told, and what the difference really was."""
    found = []
    for asked, base, truth in world.pairs:
        before = counted(base.folder)
        told = differences(before, counted(asked.folder).reindex(before.index), asked.manifest.seed)
        for metric, kind in METRICS_TOLD:
            pair = told.get((kind, metric))
            really = _value(world.real, WANTED, truth.manifest.seed, metric, kind) - _value(
                world.real, RECORDED, truth.manifest.seed, metric, kind
            )
            if pair is not None and not math.isnan(pair.p) and not math.isnan(really):
                found.append((metric, pair, really))
    return found


def _value(frame: pd.DataFrame, policy: str, seed: int, metric: str, kind: str) -> float:
    return float(at(frame, kind, policy=policy, seed=seed)[metric].mean())


def _covered(world: World, told: Sequence[tuple[str, Paired, float]]) -> str:
    inside = sum(pair.difference.low <= really <= pair.difference.high for _, pair, really in told)
    sure = [(pair, really) for _, pair, really in told if pair.p < 0.05]
    right = sum((pair.difference.mean > 0) == (really > 0) for pair, really in sure)
    return (
        f"{world.name.capitalize()}: of {len(told)} predicted differences with an interval {inside} hold the real one; {len(sure)} are significant, "
        f"and of those {right} have the sign of the real one."
    )


def _claim(world: World) -> Claim:
    error, label = _worst(world)
    return Claim(
        f"whatif-{'open' if world.loop == 'OpenLoop' else 'closed'}-{world.source}",
        0,
        f"a prediction from the record is within {percent(EXACT, 0)} of the real run in every metric and seed ({world.name})",
        f"at most {percent(error)} off ({label}), {len(world.pairs)} seed{'s' if len(world.pairs) > 1 else ''}",
        "holds" if error <= EXACT else "does not hold",
        evidence(world.runs),
    )


def _drawn(world: World) -> Figure:
    """Both differences to the recorded fifo, over it, in per cent."""
    rows: dict[str, list[Interval]] = {}
    for metric, kind in METRICS_TOLD:
        was, asked, truth = (
            at(frame, kind, policy=policy).groupby("seed")[metric].mean()
            for frame, policy in ((world.real, RECORDED), (world.predicted, WANTED), (world.real, WANTED))
        )
        changes = [t_interval((100 * (each / was - 1)).dropna().tolist()) for each in (asked, truth)]
        if all(each.n for each in changes):
            rows[f"{'' if kind == ALL else kind + ' '}{METRICS[metric].label}"] = changes
    label = f"{WANTED} against {RECORDED} (%), {world.name}"
    return paired_differences(rows, ("predicted from the record", "really run"), label)


WHATIF = Study(
    "whatif",
    "5.9",
    "What if",
    f"From a record under {RECORDED}: how well can it be told what {WANTED} would have made of the same clients?",
    ("whatif", "whatif_predicted"),
    findings,
    live=("whatif", "whatif_predicted"),
)
