"""Every policy on every shape of load, below, near and above what the devices sustain: who wins where, and where nobody does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pandas as pd

from sage_bench.figures.verdict_matrix import verdict_matrix
from sage_bench.metrics.compare import against, against_best
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.statistics import CONFIDENCE, SEEDS_MIN, Interval
from sage_bench.results.manifest import Manifest
from sage_bench.studies.findings import Claim, Drawing, Findings, Outcome, TableOf, decided, percent
from sage_bench.studies.points import at, cell, choice_of, heading, mean, points
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError
from sage_core.units import SECOND

OURS: Final = "hybrid"
METRIC: Final = "slo_attainment"

VERDICTS: Final = ("better", "no significant difference", "worse", "too few seeds")

LEVELS: Final = ("light", "near", "over")
"""Of load, by the end of its name; a name without one is near."""

TRADED: Final = (
    (METRIC, ALL),
    ("goodput_rps", ALL),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p95", "embedding"),
    ("jain_slo", ALL),
    ("wait_ns_max", ALL),
)
"""(metric, kind) of the table of trade-offs: service, latency, fairness, starvation."""

REACH: Final = 30.0
"""Points of attainment at which the colours of the matrix end."""


def findings(experiments: Experiments) -> Findings:
    of = sides(experiments, "policy_comparison")
    frame = points(of.sweep, _where)
    cells = _cells(frame)
    if not any(OURS in table for table in cells.values()):
        raise DataError(f"policy_comparison: no run of {OURS}; run the whole experiment")
    every, best = against(cells, OURS), against_best(cells, OURS)
    if best.empty:
        raise DataError(f"policy_comparison: no run of a policy besides {OURS}; run the whole experiment")
    seeds = frame["seed"].nunique()
    return Findings(
        tables=[
            _verdicts(best),
            _beaten(every),
            *_trade_offs(frame),
            *side_by_side("live", of, _where, _HEADINGS),
        ],
        figures=[
            Drawing(
                "verdicts",
                f"SLO attainment of {OURS} less that of every other policy (points), load by load; a dot: significant at "
                f"{CONFIDENCE:.0%}, paired over {_pairs(every)} seeds, Holm-adjusted over the whole matrix. Simulated.",
                lambda: verdict_matrix(every, f"attainment of {OURS} less the other's (points)", REACH),
            )
        ],
        sentences=_sentences(best, every),
        claims=_claims(_made_up(best), _made_up(every), evidence(of.sweep)),
        nowhere=_nowhere(frame, cells),
        fairness=[
            "All policies have the same devices, the same engines and, seed by seed, the same requests.",
            "Every parameter is the shipped default; separate and upstream_hybrid are told which devices host both kinds.",
            "upstream_hybrid goes by what engines last reported, once a second here; upstream_hybrid_counted is the same with loads that are "
            "never stale.",
            f"The best other policy of a cell is chosen on the runs it is held against, which favours it over {OURS}.",
            *_of_traces(frame),
        ],
        notes=[
            f"Cells: {len(cells)}. Policies: {frame['policy'].nunique()}. Seeds: {seeds}.",
            *(
                []
                if any(_is_trace(load) for load in set(frame["load"]))
                else [
                    "Recorded traces: none among these runs, because they are not part of the repository; docs/studies.md says how."
                ]
            ),
        ],
    )


_HEADINGS: Final = {"load": "load", "level": "level", "rate": "rate\n(req/s)"}


def _where(manifest: Manifest) -> Mapping[str, Any]:
    choice = choice_of(manifest, "load")
    if choice == "trace":
        path, scale = (manifest.config["load"][key] for key in ("path", "rate_scale"))
        name = f"{Path(path).stem.removeprefix('trace_')} x{scale:g}"
        # A trace has no nominal rate; what came differs a little from seed to seed, in the embeddings mixed in.
        rate = float(f"{manifest.counts['arrived'] / (manifest.duration_ns / SECOND):.1g}")
        return {"load": name, "level": "near", "rate": rate}
    name, _, level = choice.partition("_")
    return {"load": name, "level": level or "near", "rate": manifest.load.rate}


def _is_trace(load: str) -> bool:
    """Whether a load, or the cell of one, is a recorded trace, by the name :func:`_where` gives it."""
    return " x" in load


def _made_up(verdicts: pd.DataFrame) -> pd.DataFrame:
    """The cells whose requests differ from seed to seed: of a trace they are the same, so its seeds are no repetitions."""
    return verdicts[~verdicts["cell"].map(_is_trace).astype(bool)]


def _of_traces(frame: pd.DataFrame) -> list[str]:
    traces = [load for load in dict.fromkeys(frame["load"]) if _is_trace(load)]
    if not traces:
        return []
    return [
        f"The requests of a recorded trace ({', '.join(traces)}) are the same for every seed; only the embeddings mixed in differ. Its cells "
        "are in the tables and the figure, and their intervals say nothing of another day: no claim and no count of cells rests on them."
    ]


def _cells(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """(seeds x policies) of attainment, by load and level."""
    whole = frame[frame["kind"] == ALL]
    loads = list(dict.fromkeys(whole["load"]))
    found = {}
    for load in loads:
        for level in LEVELS:
            part = whole[(whole["load"] == load) & (whole["level"] == level)]
            if len(part):
                found[f"{load} {level}"] = part.pivot_table(index="seed", columns="policy", values=METRIC)
    return found


def _verdicts(best: pd.DataFrame) -> TableOf:
    rows = [
        [
            row["cell"],
            _share_cell(row["ours"]),
            row["other"],
            _share_cell(row["theirs"]),
            points_cell(Interval(row["difference"], row["low"], row["high"], int(row["seeds"]))),
            effect_cell(row["effect"]),
            p_cell(row["p_adjusted"]),
            row["verdict"],
        ]
        for row in best.to_dict("records")
    ]
    columns = ["load", f"{OURS}\n(%)", "best other", "SLO\n(%)", "difference\n(points)", "effect\n(g)", "p", "verdict"]
    return TableOf(
        "against_best",
        f"SLO attainment of {OURS} against the best other policy of each cell, paired over {_pairs(best)} seeds, with the {CONFIDENCE:.0%} "
        "interval, Hedges' g of the pairs, and p Holm-adjusted over the cells.",
        Sheet(f"{OURS} against the best other policy", columns, rows),
    )


def _beaten(every: pd.DataFrame) -> TableOf:
    rows = []
    for other, part in every.groupby("other", sort=False):
        counts = [int((part["verdict"] == name).sum()) for name in VERDICTS]
        ranked = part.dropna(subset="difference").sort_values("difference")
        ends = (
            [f"{100 * row['difference']:+.1f} ({row['cell']})" for row in ranked.iloc[[-1, 0]].to_dict("records")]
            if len(ranked)
            else ["–", "–"]
        )
        rows.append([str(other), *map(str, counts), *ends])
    columns = [
        "other policy",
        "better",
        "no significant\ndifference",
        "worse",
        "too few\nseeds",
        "most (points)",
        "least (points)",
    ]
    return TableOf(
        "against_each",
        f"In how many cells {OURS} has a significantly higher, not significantly different, and significantly lower SLO attainment than "
        "each other policy; Holm-adjusted over all cells and policies.",
        Sheet(f"{OURS} against each other policy", columns, rows),
    )


def _trade_offs(frame: pd.DataFrame) -> list[TableOf]:
    """Service, latency and fairness of every policy (requirement 90), a table for each level."""
    tables = []
    for level in LEVELS:
        of = frame[frame["level"] == level]
        if of.empty:
            continue
        loads = list(dict.fromkeys(of["load"]))
        known = [(metric, kind) for metric, kind in TRADED if at(of, kind)[metric].notna().any()]
        rows = [
            [
                policy,
                # A load counts like any other, however many requests it has.
                *(cell(mean(at(of, kind, policy=policy), metric), metric) for metric, kind in known),
            ]
            for policy in sorted(set(of["policy"]), key=lambda name: (name != OURS, name))
        ]
        tables.append(
            TableOf(
                f"trade_offs_{level}",
                f"Means over {', '.join(loads)} ({level}) with half of the interval over seeds: service, latency, fairness and the longest "
                "wait of any request.",
                Sheet(f"Trade-offs, {level}", ["policy", *(heading(metric, kind) for metric, kind in known)], rows),
                core=level == "near",
            )
        )
    return tables


def _sentences(best: pd.DataFrame, every: pd.DataFrame) -> list[str]:
    """Counts are of the loads that are made up; a loss is told wherever it is."""
    counted = _made_up(best)
    better, alike, worse, unknown = (int((counted["verdict"] == name).sum()) for name in VERDICTS)
    said = [
        f"Against the best other policy of each cell, {OURS} has a significantly higher SLO attainment in {better} of {len(counted)} "
        f"cells, a significantly lower one in {worse}, and no significant difference in {alike}"
        f"{f'; {unknown} ran with too few seeds to say' if unknown else ''}."
    ]
    said += [
        f"It loses under {row['cell']}: {percent(row['ours'])} against {percent(row['theirs'])} of {row['other']}."
        for row in best[best["verdict"] == "worse"].to_dict("records")
    ]
    if better:
        row = counted[counted["verdict"] == "better"].sort_values("difference").iloc[-1]
        said.append(
            f"It gains most under {row['cell']}: {percent(row['ours'])} against {percent(row['theirs'])} of {row['other']}."
        )
    never = [other for other, part in _made_up(every).groupby("other") if not (part["verdict"] == "better").any()]
    if never:
        said.append(f"It is significantly better than {', '.join(map(str, never))} in no cell.")
    return said


def _at_worst(best: pd.DataFrame) -> str:
    """What a cell may hide: a loss that is not significant is still bounded by its interval."""
    known = best[best["low"].notna()]
    if known.empty:
        return ""
    row = known.sort_values("low", kind="stable").iloc[0]
    return f"; no interval of a difference reaches below {100 * row['low']:+.2f} points ({row['cell']})"


def _claims(best: pd.DataFrame, every: pd.DataFrame, shown: tuple[str, ...]) -> list[Claim]:
    """A claim is decided where every pair shares seeds enough; a loss that was found is told however few there are."""
    worse = best[best["verdict"] == "worse"]
    lost = f" ({', '.join(worse['cell'])})" if len(worse) else ""
    others = list(dict.fromkeys(every["other"]))
    beaten = [other for other in others if ((every["other"] == other) & (every["verdict"] == "better")).any()]
    left = [other for other in others if other not in beaten]
    missed = f" (not than {', '.join(left)})" if left else ""
    never: Outcome = "does not hold" if len(worse) else "holds" if _decided(best) else "no significant difference"
    each: Outcome = decided(not left, _decided(every))
    return [
        Claim(
            "never-worse",
            220,
            f"{OURS} is in no cell significantly worse than the best other policy on SLO attainment",
            f"significantly worse in {len(worse)} of {len(best)} cells{lost}{_at_worst(best)}{_few(best)}",
            never if len(best) else "not measured",
            shown,
        ),
        Claim(
            "better-than-each",
            220,
            f"{OURS} is significantly better than each other policy in at least one cell",
            f"better than {len(beaten)} of {len(others)} policies{missed}{_few(every)}",
            each if len(every) else "not measured",
            shown,
        ),
    ]


def _decided(verdicts: pd.DataFrame) -> bool:
    """Whether every pair shares seeds enough that a difference would have been seen."""
    return bool((verdicts["seeds"] >= SEEDS_MIN).all())


def _pairs(verdicts: pd.DataFrame) -> str:
    """How many seeds a comparison is over: ``5``, or ``1 to 5``."""
    least, most = int(verdicts["seeds"].min()), int(verdicts["seeds"].max())
    return f"{least}" if least == most else f"{least} to {most}"


def _few(verdicts: pd.DataFrame) -> str:
    few = int((verdicts["seeds"] < SEEDS_MIN).sum())
    return f"; {few} of {len(verdicts)} comparisons share fewer than {SEEDS_MIN} seeds" if few else ""


def _nowhere(frame: pd.DataFrame, cells: Mapping[str, pd.DataFrame]) -> list[str]:
    """By load, the highest level up to which no policy differs significantly from the best of its cell (requirement 13)."""
    alike: dict[str, bool | None] = {}
    for name, table in cells.items():
        first = table.mean().idxmax()
        found = against({name: table}, str(first))
        told = found["verdict"] != "too few seeds"
        alike[name] = not found["verdict"].isin(("better", "worse")).any() if told.any() else None
    said = []
    for load in dict.fromkeys(name.rpartition(" ")[0] for name in cells):
        levels = [level for level in LEVELS if f"{load} {level}" in cells]
        if any(alike[f"{load} {level}"] is None for level in levels):
            said.append(f"{load}: too few seeds to say where the policies differ.")
            continue
        rates = {level: _rate(frame, load, level) for level in levels}
        below = [level for i, level in enumerate(levels) if all(alike[f"{load} {each}"] for each in levels[: i + 1])]
        if not below:
            said.append(f"{load}: policies differ already at the lowest load, {rates[levels[0]]:g} requests/s.")
        elif len(below) == len(levels):
            said.append(f"{load}: no policy differs from the best up to {rates[levels[-1]]:g} requests/s.")
        else:
            said.append(
                f"{load}: up to {rates[below[-1]]:g} requests/s it does not matter which policy decides; at "
                f"{rates[levels[len(below)]]:g} it does."
            )
    return said


def _rate(frame: pd.DataFrame, load: str, level: str) -> float:
    return float(frame[(frame["load"] == load) & (frame["level"] == level)]["rate"].iloc[0])


def points_cell(value: Interval) -> str:
    if value.n == 0:
        return "–"
    mean, low, high = (100 * each for each in value[:3])
    return f"{mean:+.1f}" if value.n < 2 else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _share_cell(value: float) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.1f}"


def effect_cell(value: float) -> str:
    return "–" if pd.isna(value) else "always the same" if abs(value) == float("inf") else f"{value:+.1f}"


def p_cell(value: float) -> str:
    return "–" if pd.isna(value) else "<0.001" if value < 0.0005 else f"{value:.3f}"


POLICY_COMPARISON = Study(
    name="policy_comparison",
    section="5.6",
    title="Policies on a library of loads",
    question="Which policy serves which load best, how sure is that, and where does it not matter?",
    experiments=("policy_comparison",),
    findings=findings,
    live=("policy_comparison",),
)
