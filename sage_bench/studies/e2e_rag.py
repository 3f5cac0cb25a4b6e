"""5.1: a question through embedding, retrieval, reranking and generation, under a growing rate, beside documents to be embedded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.latency_cdf import latency_cdf
from sage_bench.figures.latency_rate import latency_rate
from sage_bench.figures.stage_shares import stage_shares
from sage_bench.figures.stage_waterfall import stage_waterfall
from sage_bench.figures.style import SOURCES
from sage_bench.metrics.capacity import ATTAINMENT_MIN
from sage_bench.metrics.compare import conditions, means, measured
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.saturation import Saturation, flow, saturation
from sage_bench.metrics.stage_spans import StageSpans, stage_means, stage_spans
from sage_bench.metrics.statistics import SEEDS_MIN, Interval, holm
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.bench_figures import bench_figures
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, number, percent
from sage_bench.studies.hypotheses import Hypothesis, settled
from sage_bench.studies.points import against, arm_of, at, cell, heading, mean, plain, points, ratio, span
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError
from sage_core.units import MILLISECOND

ARMS: Final = ("hybrid", "hybrid_no_path", "fifo", "flat")
UNIFIED: Final = "hybrid"


class Searched(msgspec.Struct, frozen=True):
    """Of the shipped index: share of the ten nearest vectors that it finds."""

    recall_at_10: float


class Retrieval(msgspec.Struct, frozen=True):
    """A part of what ``make bench-retrieval`` wrote. search: by vectors in the index."""

    search: dict[int, Searched]


class Mix(NamedTuple):
    """Points of one share of questions. loaded: the rate (requests/s) at which the arms are looked at closely."""

    share: float
    name: str
    frame: pd.DataFrame
    runs: Runs
    arms: list[str]
    rates: list[float]
    loaded: float

    @property
    def others(self) -> list[str]:
        return [arm for arm in self.arms if arm != UNIFIED]

    @property
    def there(self) -> str:
        return f"at {plain(self.loaded)} requests/s, {percent(self.share, 0)} questions"

    def chat(self, arm: str, rate: float | None = None) -> pd.DataFrame:
        """Questions of an arm, at the loaded rate unless told otherwise."""
        return at(self.frame, "chat", policy=arm, rate=self.loaded if rate is None else rate)


def findings(experiments: Experiments) -> Findings:
    of = sides(experiments, "e2e_rag")
    mixes = _mixes(of.sweep)
    tables, figures, sentences, nowhere = [_table(mixes)], [], [], []
    claims: list[Claim | Hypothesis] = []
    for i, mix in enumerate(mixes):
        loaded = {
            arm: [run for run in mix.runs if arm_of(run.manifest) == arm and run.manifest.load.rate == mix.loaded]
            for arm in mix.arms
        }
        stages = {arm: _stage_table(runs) for arm, runs in loaded.items()}
        tables.append(_stages(mix, stages))
        figures += _figures(mix, loaded, stages, core=i == 0)
        sentences += [_tight(mix), *_against(mix), *_where_time_goes(mix, stages)]
        claims += _claims(mix)
        nowhere += _nowhere(mix)
    headings = {"share": "questions", "rate": "offered\n(req/s)"}
    return Findings(
        tables=[*tables, *side_by_side("e2e_rag_live_measured", of, _where, headings, _LIVE)],
        figures=figures,
        sentences=sentences,
        claims=settled(claims),
        nowhere=nowhere,
        fairness=[
            "All arms have the same cluster, pipeline, questions, documents and objectives, seed by seed; they differ in the policy and in "
            "whether a stage is due by the critical path after it.",
            "The arms are looked at closely at the highest rate at which any of them still meets 95 % of the questions' objectives, whichever it is: "
            "an arm that gave out before is shown there at its worst.",
            "policy.batch_s of hybrid was chosen on this load, seeds 1 to 3; the seeds judged here were not used for it.",
            "flat is what plain load balancers in front of each service do: no queue in the plane and no order; the network between its "
            "services is taken to cost nothing more.",
            "How long stages take beside generation is measured (search, rerank) or assumed and written in conf/cluster/pipelines.yaml; what the "
            "stages make of a question is drawn by what conf/pipeline/rag.yaml declares.",
        ],
        notes=_recall(),
    )


def _mixes(runs: Runs) -> list[Mix]:
    """Raises :class:`DataError` where there is nothing to compare."""
    found = []
    for share in sorted({_where(run.manifest)["share"] for run in runs}):
        mine = Runs([run for run in runs if _where(run.manifest)["share"] == share])
        frame = points(mine, _where)
        arms = [arm for arm in ARMS if arm in set(frame["policy"])]
        if UNIFIED not in arms or len(arms) < 2:
            raise DataError("e2e_rag: needs the arm hybrid and another; run the whole experiment")
        rates = sorted(float(each) for each in frame["rate"].unique())
        name = f"{round(100 * share)}"
        found.append(Mix(share, name, frame, mine, arms, rates, _loaded(frame, arms, rates)))
    return found


_LIVE: Final = (
    ("slo_attainment", "chat"),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p50", "chat"),
    ("e2e_ns_p95", "chat"),
    ("e2e_ns_p95", "embedding"),
)


def _where(m: Manifest) -> dict[str, Any]:
    return {"share": float(m.config["load"]["classes"]["question"]["share"]), "rate": m.load.rate}


def _loaded(frame: pd.DataFrame, arms: Sequence[str], rates: Sequence[float]) -> float:
    """The rate that the arms are looked at closely: of those that all arms have the highest at which any arm, whichever, still meets 95 %
    of the objectives of the questions; the lowest where none does. Raises :class:`DataError` where no rate has all arms."""
    common = [rate for rate in rates if all(len(at(frame, policy=arm, rate=rate)) for arm in arms)]
    if not common:
        raise DataError(f"e2e_rag: no rate has runs of all of {', '.join(arms)}; run the whole experiment")
    met = [
        rate
        for rate in common
        if any(mean(at(frame, "chat", policy=arm, rate=rate), "slo_attainment").mean >= ATTAINMENT_MIN for arm in arms)
    ]
    return max(met, default=common[0])


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(mixes: Sequence[Mix]) -> TableOf:
    rows = []
    for mix in mixes:
        for rate in mix.rates:
            for arm in mix.arms:
                chat, documents, whole = (
                    at(mix.frame, kind, policy=arm, rate=rate) for kind in ("chat", "embedding", ALL)
                )
                if whole.empty:
                    continue
                rows.append(
                    [
                        percent(mix.share, 0),
                        plain(rate),
                        arm,
                        cell(mean(chat, "slo_attainment"), "slo_attainment"),
                        *(cell(mean(chat, f"e2e_ns_{part}"), f"e2e_ns_{part}") for part in ("p50", "p95", "p99")),
                        cell(mean(chat, "ttft_ns_p95"), "ttft_ns_p95"),
                        cell(mean(documents, "slo_attainment"), "slo_attainment"),
                        cell(mean(whole, "served_rps")),
                    ]
                )
    return TableOf(
        "latency",
        "Questions through retrieval and generation, and documents embedded beside them in bursts; whole answers are wanted in 3 s, "
        f"documents in 2 s. Means of {mixes[0].frame['seed'].nunique()} seeds, ± half of the 95 % interval. A p99 needs 662 questions a run.",
        Sheet(
            "End to end",
            [
                "questions", "offered\n(req/s)", "arm", heading("slo_attainment", "question"),
                *(heading(f"e2e_ns_{part}") for part in ("p50", "p95", "p99")), heading("ttft_ns_p95"),
                heading("slo_attainment", "document"), "answered\n(req/s)",
            ],
            rows,
        ),
    )  # fmt: skip


def _stage_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Means by stage, of the declared pipeline alone: documents go through one stage."""
    table = stage_means(runs)
    of: pd.DataFrame = table[table["pipeline"] == runs[0].manifest.config["pipeline"]["name"]]
    return of


def _stages(mix: Mix, stages: dict[str, pd.DataFrame]) -> TableOf:
    rows = [
        [
            arm,
            str(row["name"]),
            str(row["pool"]),
            *(number(row[name] / MILLISECOND) for name in ("queue_ns", "service_ns")),
            percent(row["share"]),
        ]
        for arm, table in stages.items()
        for row in table.to_dict("records")
    ]
    return TableOf(
        f"stages_{mix.name}",
        f"Where the time of answered questions goes {mix.there}: queued in the plane, then from dispatch to done, along the path each "
        "took. Gaps are what no stage accounts for.",
        Sheet(
            f"Stages, {percent(mix.share, 0)} questions",
            ["arm", "stage", "pool", "queued\n(ms)", "service\n(ms)", "of E2E"],
            rows,
        ),
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(mix: Mix, loaded: dict[str, list[Run]], stages: dict[str, pd.DataFrame], *, core: bool) -> list[Drawing]:
    source = SOURCES[mix.runs.source()]
    seeds = f"{mix.frame['seed'].nunique()} seeds, simulated"

    def cdf() -> Figure:
        return latency_cdf(loaded, [("chat", "e2e_ns")])

    def decomposed() -> Figure:
        return stage_shares(stages, source)

    def waterfall() -> Figure:
        of = stage_spans(loaded[UNIFIED][0])
        name = loaded[UNIFIED][0].manifest.config["pipeline"]["name"]
        return stage_waterfall({title: _spans(of, name, quantile) for title, quantile in _PICKED.items()}, source)

    def over_rates() -> Figure:
        rows = means(measured(conditions(mix.runs)))
        return latency_rate(rows, _knees(mix.runs), [("chat", f"e2e_ns_{part}") for part in ("p50", "p95")])

    return [
        Drawing(f"latency_cdf_{mix.name}", f"E2E of questions {mix.there}: all requests of {seeds}.", cdf, core),
        Drawing(f"stages_{mix.name}", f"Mean time of a question by stage {mix.there}: {seeds}.", decomposed, core),
        Drawing(
            f"waterfall_{mix.name}",
            f"Two questions of one simulated run under hybrid {mix.there}: that of median latency and that of the 99th percentile.",
            waterfall,
            core,
        ),
        Drawing(
            f"latency_rate_{mix.name}",
            f"E2E of questions over the offered load, {percent(mix.share, 0)} questions, the rest documents; means and 95 % intervals of "
            f"{seeds}.",
            over_rates,
            core=False,
        ),
    ]


_PICKED: Final = {"median": 0.5, "99th percentile": 0.99}


def _spans(of: StageSpans, pipeline: str, quantile: float) -> pd.DataFrame:
    """Of the question whose latency is that quantile, by nearest rank."""
    asked = of.totals[of.totals["pipeline"] == pipeline].sort_values(["e2e_ns", "request"])
    request = int(asked.iloc[max(math.ceil(quantile * len(asked)) - 1, 0)]["request"])
    return of.spans[of.spans["request"] == request]


def _knees(runs: Runs) -> dict[str, Saturation]:
    flows: dict[str, dict[float, list[Any]]] = {}
    for run in runs:
        if run.manifest.load.rate is not None:
            flows.setdefault(arm_of(run.manifest), {}).setdefault(run.manifest.load.rate, []).append(flow(run))
    return {arm: saturation(by_rate) for arm, by_rate in flows.items()}


# --- sentences and claims --------------------------------------------------------------------------------------------


def _tight(mix: Mix) -> str:
    chat = mix.chat(UNIFIED)
    p50, p99 = (mean(chat, f"e2e_ns_{part}") for part in ("p50", "p99"))
    if not p99.n:
        return f"The median question takes {number(p50.mean / MILLISECOND)} ms under hybrid {mix.there}; there are too few in a run for a p99."
    return (
        f"Under hybrid the p99 of a question {mix.there}, is {number(p99.mean / MILLISECOND)} ms{span(p99, MILLISECOND)}, "
        f"{number(p99.mean / p50.mean)} times the median ({number(p50.mean / MILLISECOND)} ms)."
    )


def _against(mix: Mix) -> list[str]:
    """The arms at the loaded rate, and at the next, beyond which hybrid fails its own objective."""
    sentences = []
    beyond = [rate for rate in mix.rates if rate > mix.loaded][:1]
    for rate in (mix.loaded, *beyond):
        mine = mix.chat(UNIFIED, rate)
        told = []
        for arm in mix.others:
            found = against(mix.chat(arm, rate), mine, "slo_attainment")
            if found.difference.n:
                share = percent(mean(mix.chat(arm, rate), "slo_attainment").mean)
                told.append(
                    f"{share} with {arm} ({100 * found.difference.mean:+.1f} points{span(found.difference, 0.01)})"
                )
        sentences.append(
            f"At {plain(rate)} requests/s, {percent(mix.share, 0)} questions, {percent(mean(mine, 'slo_attainment').mean)} of the questions "
            f"are answered in time under hybrid, {', '.join(told)}."
        )
    return sentences


def _where_time_goes(mix: Mix, stages: dict[str, pd.DataFrame]) -> list[str]:
    shares = {str(row["name"]): float(row["share"]) for row in stages[UNIFIED].to_dict("records") if row["stage"] >= 0}
    order = sorted(shares, key=lambda name: -shares[name])
    told = ", ".join(f"{name} {percent(shares[name])}" for name in order)
    queued = {
        arm: float((table["queue_ns"] * table["requests"]).sum() / table["requests"].max()) / MILLISECOND
        for arm, table in stages.items()
    }
    return [
        f"Of the time of a question under hybrid {mix.there}, the stages take: {told}.",
        f"A question is queued in the plane, all stages together, for {', '.join(f'{number(ms)} ms with {arm}' for arm, ms in queued.items())}.",
    ]


def _claims(mix: Mix) -> list[Claim | Hypothesis]:
    mine = mix.chat(UNIFIED)
    p99 = mean(mine, "e2e_ns_p99")
    asked = "5.1: the p99 of a question, in ms"
    shown = evidence(mix.runs)
    claims: list[Claim | Hypothesis] = [
        Claim(
            f"e2e-{mix.name}-p99", 269, asked, f"p99 of {number(p99.mean / MILLISECOND)} ms{span(p99, MILLISECOND)} {mix.there}", "stated", shown
        )
        if p99.n
        else Claim(f"e2e-{mix.name}-p99", 269, asked, f"too few questions a run for a p99 {mix.there}", "not measured", ())
    ]  # fmt: skip
    for arm in mix.others:
        other = mix.chat(arm)
        attained = against(other, mine, "slo_attainment")
        shares = [mean(each, "slo_attainment").mean for each in (mine, other)]
        claims.append(
            Hypothesis(
                f"e2e-{mix.name}-attainment-{arm}",
                259,
                f"hybrid achieves [A] % SLO attainment of questions against [B] % of {arm}",
                f"{percent(shares[0])} against {percent(shares[1])}, {100 * attained.difference.mean:+.2f} points"
                f"{span(attained.difference, 0.01)} {mix.there}",
                attained.difference.mean > 0,
                attained.p,
                shown,
            )
        )
        for part, letter, requirement in (("p95", "Y", 268), ("p99", "X", 257)):
            found = ratio(other, mine, f"e2e_ns_{part}")
            if not found.ratio.n:  # too few questions in a run
                continue
            claims.append(
                Hypothesis(
                    f"e2e-{mix.name}-{part}-{arm}",
                    requirement,
                    f"hybrid reduces the {part} of questions by [{letter}] % against {arm} under mixed load",
                    f"{part} {_change(found.ratio)} {mix.there}",
                    found.ratio.mean < 1,
                    found.p,
                    shown,
                )
            )
    return claims


def _change(of: Interval) -> str:
    """A ratio as what it is more or less than 1."""
    low, high = (f"{100 * (bound - 1):+.1f}" for bound in (of.low, of.high))
    return f"{100 * (of.mean - 1):+.1f} %" + (f" (95 %: {low} to {high})" if of.n > 1 else "")


def _nowhere(mix: Mix) -> list[str]:
    """The rates at which no arm differs significantly from hybrid in the questions answered in time, Holm-adjusted over all."""
    asked = [(rate, arm) for rate in mix.rates for arm in mix.others]
    found = [against(mix.chat(arm, rate), mix.chat(UNIFIED, rate), "slo_attainment") for rate, arm in asked]
    if any(each.difference.n < SEEDS_MIN for each in found):
        return []
    adjusted = holm([each.p for each in found])
    differs = {rate for (rate, _), p in zip(asked, adjusted, strict=True) if p < 0.05}
    free = [rate for rate in mix.rates if rate < min(differs, default=math.inf)]
    if not free:
        return []
    return [
        f"With {percent(mix.share, 0)} questions no arm differs significantly from hybrid in the questions answered in time up to "
        f"{plain(free[-1])} requests/s."
    ]


def _recall() -> list[str]:
    """What was measured of the shipped retrieval, if it was: by another program, so it is said to be no part of the runs."""
    measured_here = bench_figures("retrieval", Retrieval)
    if measured_here is None:
        return [
            "recall@k of the shipped index is measured by `make bench-retrieval`; its figures are not in results/bench."
        ]
    told = ", ".join(f"{each.recall_at_10:.3g} of {count:,} vectors" for count, each in measured_here.search.items())
    return [
        "Not from these runs: `make bench-retrieval` of this checkout gives recall@10 of the shipped index against exact search as "
        f"{told}."
    ]


E2E_RAG = Study(
    "e2e_rag",
    "5.1",
    "End-to-end pipeline",
    "How long does a question take through retrieval and generation as load grows, where does the time go, and who is in time?",
    ("e2e_rag",),
    findings,
    live=("e2e_rag",),
)
