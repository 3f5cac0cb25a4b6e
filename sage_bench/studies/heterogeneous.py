"""5.5: where embeddings run: on the GPUs that generate, on a GPU of their own, on CPUs, or on both.

The points, what 1,000 good requests cost, and where the cheaper of two clusters changes are those of :mod:`sage_bench.hetero`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from sage_bench.cli.hetero import told
from sage_bench.figures.hetero import NAMES
from sage_bench.figures.hetero import hetero as drawn
from sage_bench.hetero import ARMS, CHAT_RPS, Hetero, crossings, point
from sage_bench.metrics.statistics import Interval, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Runs
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, number, percent
from sage_bench.studies.hypotheses import Hypothesis, settled
from sage_bench.studies.points import against, at, cell, choice_of, heading, mean, plain, points, relative, span
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError

SERVED_WELL: Final = 0.95
"""SLO attainment of documents from which a rate counts as carried."""


def findings(experiments: Experiments) -> Findings:
    of = sides(experiments, "heterogeneous")
    frame = points(of.sweep, _where)
    rows = [point(run, **_where(run.manifest), seed=run.manifest.seed) for run in of.sweep]
    if len({row["arm"] for row in rows}) < 2:
        raise DataError("heterogeneous: runs on one cluster only; run the whole experiment")
    table = pd.DataFrame(rows).sort_values(["rate", "arm", "seed"], ignore_index=True)
    found = Hetero(table, crossings(table), [])
    arms = [arm for arm in ARMS if arm in set(table["arm"])]
    rates = sorted(float(each) for each in table["rate"].unique())
    policies = _policies(experiments.simulated["heterogeneous_policies"])
    claims = settled([*_cpu_against_gpu(frame, arms, rates, of.sweep), *policies.claims])
    sentences = [
        *_cheapest(found, arms, rates),
        *(f"{told(each)}." for each in found.crossings),
        *_tokens(frame, arms, rates),
    ]

    def draw() -> Figure:
        return drawn(found.means(), found.crossings)

    caption = (
        f"What 1,000 good requests cost and take in energy beside {NAMES[arms[0]]}, and how long embeddings take, over the rate of "
        f"documents; {plain(CHAT_RPS)} chats a second throughout, {table['seed'].nunique()} seeds, simulated; dotted: a crossover."
    )
    return Findings(
        tables=[
            _table(frame, found, arms, rates),
            policies.table,
            *side_by_side(
                "heterogeneous_live_measured", of, _where, {"arm": "embeds on", "rate": "documents\n(1/s)"}, _LIVE
            ),
        ],
        figures=[Drawing("heterogeneous", caption, draw)],
        sentences=[*sentences, *policies.sentences],
        claims=claims,
        nowhere=_nowhere(table, arms, rates),
        fairness=[
            "Every cluster generates on the same two H100s and gets the same requests, seed by seed; they differ in what embeds, and so in "
            "price.",
            "The CPU is favoured: what was measured on it is bge-small, on GPUs bge-large, about ten times its size. By published rates of one "
            "model on both, the CPU's crossovers would be at about 0.7 of the rates given (docs/hetero.md).",
            "The rates of the L4 and of the CPU rest on one published measurement each, those of the H100 on kernel times without HTTP, which "
            "favours sharing the LLM GPUs.",
            "Prices are list prices on demand; energy is of devices, not of hosts, and CPUs have no power model.",
        ],
    )


_LIVE: Final = (
    ("slo_attainment", "embedding"),
    ("throughput_rps", "all"),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p50", "embedding"),
    ("e2e_ns_p95", "embedding"),
)


def _where(m: Manifest) -> dict[str, Any]:
    """The arm, and documents a second as the load was chosen."""
    return {"arm": choice_of(m, "cluster").removeprefix("hetero_"), "rate": float(choice_of(m, "load"))}


def _table(frame: pd.DataFrame, found: Hetero, arms: Sequence[str], rates: Sequence[float]) -> TableOf:
    means = found.means().set_index(["rate", "arm"])
    rows = []
    for rate in rates:
        for arm in arms:
            here, chat, documents = (at(frame, kind, arm=arm, rate=rate) for kind in ("all", "chat", "embedding"))
            if here.empty:
                continue
            good = t_interval(
                found.points[(found.points["rate"] == rate) & (found.points["arm"] == arm)]["cost"].tolist()
            )
            best = means.loc[rate]["cost"].idxmin() == arm
            rows.append(
                [
                    plain(rate),
                    f"{NAMES[arm]}{' *' if best else ''}",
                    cell(mean(documents, "slo_attainment"), "slo_attainment"),
                    *(cell(mean(documents, metric), metric) for metric in ("e2e_ns_p50", "e2e_ns_p95")),
                    *(cell(mean(chat, metric), metric) for metric in ("ttft_ns_p95", "tpot_ns_p95")),
                    cell(mean(chat, "output_tokens_per_s"), "output_tokens_per_s"),
                    cell(mean(here, "cost_per_1k"), "cost_per_1k"),
                    cell(good) if math.isfinite(good.mean) else "none good",
                    cell(mean(here, "energy_j_per_1k"), "energy_j_per_1k"),
                    cell(mean(here, "utilisation_sd"), "utilisation_sd"),
                ]
            )
    return TableOf(
        "clusters",
        f"{plain(CHAT_RPS)} chats a second and so many documents; *: the cheapest per 1,000 good requests. Means of "
        f"{found.points['seed'].nunique()} seeds, ± half of the 95 % interval; busy sd: over nodes.",
        Sheet(
            "Where embeddings run",
            [
                "documents\n(1/s)", "embeds on", heading("slo_attainment", "documents"), heading("e2e_ns_p50", "documents"),
                heading("e2e_ns_p95", "documents"), heading("ttft_ns_p95", "chat"), heading("tpot_ns_p95", "chat"),
                heading("output_tokens_per_s", "chat"), heading("cost_per_1k"), "cost good\n(USD/1k)", heading("energy_j_per_1k"),
                heading("utilisation_sd"),
            ],
            rows,
        ),
    )  # fmt: skip


def _cheapest(found: Hetero, arms: Sequence[str], rates: Sequence[float]) -> list[str]:
    """Who is the cheapest over which rates."""
    means = found.means().pivot_table(index="rate", columns="arm", values="cost")
    first = {rate: str(means.loc[rate].idxmin()) for rate in rates}
    runs: list[tuple[str, float, float]] = []
    for rate in rates:
        if runs and runs[-1][0] == first[rate]:
            runs[-1] = (first[rate], runs[-1][1], rate)
        else:
            runs.append((first[rate], rate, rate))
    parts = [
        f"{NAMES[arm]} at {plain(low)}" + (f" to {plain(high)}" if high > low else "") + " documents/s"
        for arm, low, high in runs
    ]
    added = [arm for arm in arms if arm != "shared"]
    text = [f"Cheapest per 1,000 good requests: {', then '.join(parts)}."]
    if "shared" in first.values() and len(added) > 1:
        best = {rate: str(means.loc[rate, added].idxmin()) for rate in rates}
        changes = [f"{NAMES[best[rates[0]]]} at {plain(rates[0])} documents/s"]
        changes += [f"{NAMES[best[b]]} from {plain(b)} on" for a, b in itertools.pairwise(rates) if best[a] != best[b]]
        text.append(f"Where the LLM's GPUs may not be shared, the cheapest is {', '.join(changes)}.")
    return text


def _tokens(frame: pd.DataFrame, arms: Sequence[str], rates: Sequence[float]) -> list[str]:
    """What moving embeddings off the LLM's GPUs does to its tokens (claim 273)."""
    if not {"shared", "cpu"} <= set(arms):
        return []
    rate = _carried(frame, "cpu", rates)
    if rate is None:
        return []
    shared, cpu = (at(frame, "chat", arm=arm, rate=rate) for arm in ("shared", "cpu"))
    tokens, tpot = (relative(shared, cpu, metric) for metric in ("output_tokens_per_s", "tpot_ns_p95"))
    beside, apart = (at(frame, "embedding", arm=arm, rate=rate) for arm in ("shared", "cpu"))
    slower = relative(beside, apart, "e2e_ns_p50")
    return [
        f"At {plain(rate)} documents/s, the most that the CPU carries, embedding on it takes {number(slower.mean)} times as long as beside the "
        f"LLM (p50), and gives the LLM {percent(tokens.mean - 1)} output tokens a second and {percent(tpot.mean - 1)} TPOT p95."
    ]


def _carried(frame: pd.DataFrame, arm: str, rates: Sequence[float]) -> float | None:
    """The highest rate below which all have :data:`SERVED_WELL` of their documents in time."""
    carried = None
    for rate in rates:
        documents = at(frame, "embedding", arm=arm, rate=rate)
        if documents.empty or mean(documents, "slo_attainment").mean < SERVED_WELL:
            break
        carried = rate
    return carried


def _cpu_against_gpu(
    frame: pd.DataFrame, arms: Sequence[str], rates: Sequence[float], runs: Runs
) -> list[Claim | Hypothesis]:
    if not {"cpu", "gpu"} <= set(arms):
        return []
    # The most of documents that each answers at any rate: beyond saturation that is its capacity.
    most = {
        arm: max(
            (mean(at(frame, "embedding", arm=arm, rate=rate), "throughput_rps") for rate in rates),
            key=lambda each: each.mean,
        )
        for arm in ("cpu", "gpu")
    }
    cpu, gpu = (_carried(frame, arm, rates) for arm in ("cpu", "gpu"))
    held = ", ".join(
        f"{NAMES[arm]} carries {'none of the rates' if rate is None else f'{plain(rate)} documents/s'}"
        for arm, rate in (("cpu", cpu), ("gpu", gpu))
    )
    tokens = _token_claim(frame, cpu, runs) if cpu is not None and "shared" in arms else []
    return [
        Claim(
            "heterogeneous-cpu-share",
            266,
            "CPU-only nodes give [X] % of GPU performance for embedding-heavy load",
            f"{percent(most['cpu'].mean / most['gpu'].mean)} of an L4's embeddings a second by 16 vCPUs ({number(most['cpu'].mean)} against "
            f"{number(most['gpu'].mean)}, with a smaller model on the CPU); within the objectives {held}",
            "stated",
            evidence(runs),
        ),
        *tokens,
    ]


def _token_claim(frame: pd.DataFrame, rate: float, runs: Runs) -> list[Hypothesis]:
    shared, cpu = (at(frame, "chat", arm=arm, rate=rate) for arm in ("shared", "cpu"))
    found = against(shared, cpu, "output_tokens_per_s")
    ratio = relative(shared, cpu, "output_tokens_per_s")
    return [
        Hypothesis(
            "heterogeneous-tokens",
            273,
            "CPU embedding is slightly slower and the LLM's token throughput rises significantly",
            f"at {plain(rate)} documents/s the LLM's output changes by {percent(ratio.mean - 1, 2)}{_percents(ratio)}",
            found.difference.mean > 0,
            found.p,
            evidence(runs),
        )
    ]


def _percents(ratio: Interval) -> str:
    return "" if ratio.n < 2 else f" (95 %: {percent(ratio.low - 1, 2)} to {percent(ratio.high - 1, 2)})"


def _nowhere(table: pd.DataFrame, arms: Sequence[str], rates: Sequence[float]) -> list[str]:
    """Where the choice costs little: the dearest arm that serves well is within 10 % of the cheapest."""
    means = table.groupby(["rate", "arm"])[["cost", "slo_embedding"]].mean()
    sentences = []
    for rate in rates:
        here = means.loc[rate]
        good = here[here["slo_embedding"] >= SERVED_WELL]
        if len(good) == len(arms):
            spread = float(good["cost"].max() / good["cost"].min() - 1)
            sentences.append((rate, spread))
    if not sentences:
        return []
    low, high = sentences[0][0], sentences[-1][0]
    worst = max(spread for _, spread in sentences)
    at_rates = f"At {plain(low)}" if low == high else f"From {plain(low)} to {plain(high)}"
    return [
        f"{at_rates} documents/s, where all of these clusters serve the documents well, the dearest costs at most "
        f"{percent(worst)} more than the cheapest: the GPUs that generate are most of every bill."
    ]


# --- one pool of a GPU and a CPU -------------------------------------------------------------------------------------


def _mixed(m: Manifest) -> dict[str, Any]:
    return {"rate": float(choice_of(m, "load"))}


class Pool(NamedTuple):
    """What the runs on one pool of unequal engines say."""

    table: TableOf
    sentences: list[str]
    claims: list[Hypothesis]


def _policies(runs: Runs) -> Pool:
    """Who uses a pool of unequal engines well: the variance of utilisation over nodes, and latency."""
    frame = points(runs, _mixed)
    frame["utilisation_variance"] = frame["utilisation_sd"] ** 2
    rates = sorted(float(each) for each in frame["rate"].unique())
    policies = list(dict.fromkeys(frame["policy"]))
    rows = []
    for rate in rates:
        for policy in policies:
            here, documents = at(frame, policy=policy, rate=rate), at(frame, "embedding", policy=policy, rate=rate)
            rows.append(
                [
                    plain(rate),
                    policy,
                    cell(mean(documents, "slo_attainment"), "slo_attainment"),
                    *(cell(mean(documents, metric), metric) for metric in ("e2e_ns_p50", "e2e_ns_p95")),
                    *(cell(mean(here, metric), metric) for metric in ("utilisation", "utilisation_sd")),
                    cell(mean(here, "utilisation_variance")),
                ]
            )
    table = TableOf(
        "mixed_pool",
        f"One pool of an L4 and a CPU of about a seventh of its speed, beside two H100s that generate; means of {frame['seed'].nunique()} "
        "seeds. Variance: of the nodes' mean utilisation.",
        Sheet(
            "A pool of unequal engines",
            [
                "documents\n(1/s)", "policy", heading("slo_attainment", "documents"), heading("e2e_ns_p50", "documents"),
                heading("e2e_ns_p95", "documents"), heading("utilisation"), heading("utilisation_sd"), "variance",
            ],
            rows,
        ),
    )  # fmt: skip
    if not {"hybrid", "round_robin"} <= set(policies):
        return Pool(table, [], [])
    sentences, claims = [], []
    for rate in rates:
        turns, hybrid = (at(frame, policy=policy, rate=rate) for policy in ("round_robin", "hybrid"))
        change = mean(hybrid, "utilisation_variance").mean / mean(turns, "utilisation_variance").mean - 1
        changed = f"{percent(abs(change))} {'less' if change < 0 else 'more'}"
        found = against(turns, hybrid, "utilisation_variance")
        p95 = {
            policy: mean(at(frame, "embedding", policy=policy, rate=rate), "e2e_ns_p95").mean / 1e9
            for policy in ("round_robin", "hybrid")
        }
        variance = {
            policy: mean(at(frame, policy=policy, rate=rate), "utilisation_variance").mean for policy in policies
        }
        least = min(variance, key=lambda name: variance[name])
        sentences.append(
            f"With {plain(rate)} documents/s on a pool of an L4 and a CPU, hybrid has {changed} "
            f"variance of utilisation over the nodes than round_robin; embeddings take {number(p95['hybrid'])} s (p95) against "
            f"{number(p95['round_robin'])} s. The least variance is that of {least}; equal use is not the aim where engines are unequal."
        )
        claims.append(
            Hypothesis(
                f"heterogeneous-variance-{rate:g}",
                260,
                f"hybrid reduces the variance of utilisation across CPU and GPU nodes ({plain(rate)} documents/s)",
                f"{changed} than under round_robin; difference of variances {number(found.difference.mean)}"
                f"{span(found.difference)}",
                found.difference.mean < 0,
                found.p,
                evidence(runs),
            )
        )
    return Pool(table, sentences, claims)


HETEROGENEOUS = Study(
    "heterogeneous",
    "5.5",
    "Heterogeneous hardware",
    "Should embeddings run on the GPUs that generate, on a GPU of their own, on CPUs, or on both, and at which load does that change?",
    ("heterogeneous", "heterogeneous_policies"),
    findings,
    live=("heterogeneous",),
)
