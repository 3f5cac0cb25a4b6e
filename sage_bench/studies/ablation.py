"""One ingredient less at a time: what each is worth, and what the parts of the system are worth that are no policy's."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Final

import pandas as pd

from sage_bench.figures.paired_differences import paired_differences
from sage_bench.metrics.compare import against
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.statistics import CONFIDENCE, SEEDS_MIN, Interval
from sage_bench.studies.findings import Claim, Drawing, Findings, Outcome, TableOf, percent
from sage_bench.studies.points import at, cell, choice_of, heading, mean, points
from sage_bench.studies.policy_comparison import effect_cell, p_cell, points_cell
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError

WHOLE: Final = "hybrid"
SYSTEM: Final = "full"
METRIC: Final = "slo_attainment"

PARTS: Final = {
    "no_control_plane": "clients take turns among the engines; nothing classifies, orders or limits (requirement 91)",
    "no_batching": "engines take one request at a time (requirement 92)",
    "no_cpu": "embeddings on the GPUs that generate; no CPU node (requirement 93)",
}
"""Arms of the second experiment, and what they lack."""

ASIDE: Final = (
    (METRIC, ALL),
    (METRIC, "chat"),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p95", "embedding"),
    ("goodput_rps", ALL),
    ("cost_per_1k", ALL),
    ("jain_slo", ALL),
)


def findings(experiments: Experiments) -> Findings:
    of, system = sides(experiments, "ablation"), sides(experiments, "ablation_system")
    frame = points(of.sweep, lambda m: {"load": choice_of(m, "load")})
    frame["policy"] = (
        frame["policy"].str.rpartition("/")[2].where(lambda name: name == WHOLE, lambda name: "no_" + name)
    )
    parts = points(system.sweep, lambda m: {"load": "mixed hardware"})
    for rows, whole, name in ((frame, WHOLE, "ablation"), (parts, SYSTEM, "ablation_system")):
        if whole not in set(rows["policy"]):
            raise DataError(f"{name}: no run of {whole}; run the whole experiment")
        if set(rows["policy"]) == {whole}:
            raise DataError(f"{name}: no run of anything but {whole}; run the whole experiment")
    less, lacking = _less(frame, WHOLE), _less(parts, SYSTEM)
    loads = list(frame["load"].drop_duplicates())
    seeds = frame["seed"].nunique()
    return Findings(
        tables=[
            _one_off(less, loads, seeds),
            _aside("ablation_measures", "What else each ingredient moves", frame, WHOLE),
            _system(lacking, parts),
            *side_by_side("live", of, lambda m: {"load": choice_of(m, "load")}, {"load": "load"}),
        ],
        figures=[
            Drawing(
                "ingredients",
                f"SLO attainment without an ingredient less that of {WHOLE} as a whole, with {CONFIDENCE:.0%} intervals over {seeds} seeds. "
                "Left of zero the ingredient pays. Simulated.",
                lambda: paired_differences(
                    {
                        name: [_interval(_row(less, load, name)) for load in loads]
                        for name in less["other"].drop_duplicates()
                    },
                    loads,
                    "SLO attainment (points), simulated",
                    scale=0.01,
                ),
            )
        ],
        sentences=_sentences(less, lacking),
        claims=_claims(lacking, parts, evidence(system.sweep)),
        nowhere=_nowhere(less, loads),
        fairness=[
            f"In ablation the arms differ in one switch of {WHOLE} each and in nothing else.",
            "In ablation_system the arms differ in the policy or in the cluster, as said; prices are of what each arm has.",
        ],
    )


def _less(frame: pd.DataFrame, whole: str) -> pd.DataFrame:
    """Of :func:`against`, turned round: every arm less the whole one, cell by cell."""
    rows = frame[frame["kind"] == ALL]
    cells = {
        load: rows[rows["load"] == load].pivot_table(index="seed", columns="policy", values=METRIC)
        for load in dict.fromkeys(rows["load"])
    }
    found = against(cells, whole)
    for name in ("difference", "low", "high", "effect"):
        found[name] = -found[name]
    found[["low", "high"]] = found[["high", "low"]].to_numpy()
    swapped = {"better": "worse", "worse": "better"}
    found["verdict"] = [swapped.get(verdict, verdict) for verdict in found["verdict"]]
    return found


def _row(less: pd.DataFrame, load: str, name: str) -> pd.Series[Any]:
    row = less[(less["cell"] == load) & (less["other"] == name)]
    if row.empty or not row["seeds"].iloc[0]:
        raise DataError(f"ablation: {name} and {WHOLE} have no runs of one seed under {load}; run the whole experiment")
    return row.iloc[0]


def _interval(row: pd.Series[Any]) -> Interval:
    return Interval(row["difference"], row["low"], row["high"], int(row["seeds"]))


def _one_off(less: pd.DataFrame, loads: list[str], seeds: int) -> TableOf:
    rows = []
    for name in less["other"].drop_duplicates():
        row = [name]
        for load in loads:
            found = _row(less, load, name)
            row += [
                points_cell(_interval(found)),
                effect_cell(found["effect"]),
                p_cell(found["p_adjusted"]),
                found["verdict"],
            ]
        rows.append(row)
    columns = ["without"]
    for load in loads:
        columns += [f"{load}\n(points)", "effect\n(g)", "p", "verdict"]
    return TableOf(
        "one_factor_off",
        f"SLO attainment less that of {WHOLE} as a whole, {seeds} seeds, paired, with the {CONFIDENCE:.0%} interval, Hedges' g of the pairs, and p "
        "Holm-adjusted over the table. *Worse* means that the ingredient pays.",
        Sheet(f"{WHOLE} less one ingredient", columns, rows),
    )


def _aside(name: str, title: str, frame: pd.DataFrame, whole: str) -> TableOf:
    known = [(metric, kind) for metric, kind in ASIDE if metric in frame and at(frame, kind)[metric].notna().any()]
    rows = []
    for load in dict.fromkeys(frame["load"]):
        of = frame[frame["load"] == load]
        rows += [
            [load, arm, *(cell(mean(at(of, kind, policy=arm), metric), metric) for metric, kind in known)]
            for arm in sorted(set(of["policy"]), key=lambda each: (each != whole, each))
        ]
    return TableOf(
        name,
        "Means over seeds with half of the interval.",
        Sheet(title, ["load", "arm", *(heading(metric, kind) for metric, kind in known)], rows),
        core=False,
    )


def _system(lacking: pd.DataFrame, parts: pd.DataFrame) -> TableOf:
    table = _aside("ablation_system", "The system less a part", parts, SYSTEM)
    verdicts = {row["other"]: row["verdict"] for row in lacking.to_dict("records")}
    rows = [[arm, PARTS.get(arm, "–"), *cells, verdicts.get(arm, "–")] for _, arm, *cells in table.sheet.rows]
    return TableOf(
        table.name,
        "A cluster of GPUs that generate and CPU nodes that embed, as a whole and less a part; verdicts on SLO attainment, paired by seed and "
        "Holm-adjusted.",
        Sheet(table.sheet.title, ["arm", "what is missing", *table.sheet.columns[2:], "verdict"], rows),
    )


def _sentences(less: pd.DataFrame, lacking: pd.DataFrame) -> list[str]:
    said = []
    for load, part in less.groupby("cell", sort=False):
        pays, costs = (_named(part[part["verdict"] == verdict]) for verdict in ("worse", "better"))
        what = f"what pays is {pays}" if pays else "no ingredient pays significantly"
        said.append(f"Under {load}: {what}{f'; what costs is {costs}' if costs else ''}.")
    for row in lacking.to_dict("records"):
        part = row["other"].removeprefix("no_").replace("_", " ")
        sure = "" if row["verdict"] in ("better", "worse") else f" ({row['verdict']})"
        said.append(
            f"Without {part} SLO attainment is {percent(row['theirs'])} instead of {percent(row['ours'])}, {_points(row)}{sure}."
        )
    return said


def _named(rows: pd.DataFrame) -> str:
    """Ingredients and what each is worth, the most first."""
    order = rows.reindex(rows["difference"].abs().sort_values(ascending=False).index)
    return ", ".join(
        f"{row['other'].removeprefix('no_')} ({100 * abs(row['difference']):.1f} points)"
        for row in order.to_dict("records")
    )


def _points(row: Mapping[Hashable, Any]) -> str:
    """What being without it changes, with its interval where there are seeds enough for one."""
    of = "" if math.isnan(row["low"]) else f" (95 %: {100 * row['low']:+.2f} to {100 * row['high']:+.2f})"
    return f"{100 * row['difference']:+.2f} points{of}"


def _claims(lacking: pd.DataFrame, parts: pd.DataFrame, shown: tuple[str, ...]) -> list[Claim]:
    requirement = {"no_control_plane": 91, "no_batching": 92, "no_cpu": 93}
    outcomes: dict[str, Outcome] = {"worse": "holds", "better": "does not hold"}
    return [
        Claim(
            f"part-{row['other']}",
            requirement.get(row["other"], 233),
            f"the system serves more within objectives with it than {str(row['other']).replace('_', ' ')}",
            f"SLO attainment {percent(row['ours'])} with, {percent(row['theirs'])} without, {_points(row)}",
            outcomes.get(row["verdict"], "no significant difference"),
            shown,
        )
        for row in lacking.to_dict("records")
    ]


def _nowhere(less: pd.DataFrame, loads: list[str]) -> list[str]:
    seeds = int(less["seeds"].min())  # of the pair that shares the fewest
    if seeds < SEEDS_MIN:
        return [f"{seeds} seeds are too few to say which ingredients make no difference."]
    idle = [
        str(name).removeprefix("no_")
        for name, part in less.groupby("other", sort=False)
        if not part["verdict"].isin(("better", "worse")).any()
    ]
    if not idle:
        return []
    return [f"Make no significant difference under any of {', '.join(loads)}: {', '.join(idle)}."]


ABLATION = Study(
    name="ablation",
    section="5.7",
    title="Ablation",
    question="What is each ingredient of the policy and each part of the system worth?",
    experiments=("ablation", "ablation_system"),
    findings=findings,
    live=("ablation",),
    baselines=(WHOLE, SYSTEM),
)
