"""5.4: backends, load, clients and model sizes: how far it scales, what the ceiling is, and what the control plane costs.

Overhead is measured: CPU time inside the plane on the machine that ran the simulation (or the gateway, live), per request.
Engines are modelled, so what it is held against, the time a request takes, is simulated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.percentiles_rate import percentiles_rate
from sage_bench.figures.style import SOURCES
from sage_bench.figures.throughput_backends import throughput_backends
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.saturation import Saturation, flow, saturation
from sage_bench.metrics.statistics import Interval, holm, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Claim, Drawing, Findings, Outcome, TableOf, bounded, decided, number, percent
from sage_bench.studies.points import (
    about,
    against,
    arm_of,
    at,
    cell,
    choice_of,
    heading,
    mean,
    plain,
    points,
    relative,
    span,
)
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import COMPARED, side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError
from sage_core.units import MICROSECOND, MILLISECOND, SECOND, PoolKind

NEAR_LINEAR: Final = 0.9
"""Efficiency from which scaling is called near-linear."""

NEGLIGIBLE: Final = 0.001
"""Share of the model's time below which the plane's is called negligible."""

FAIR: Final = 0.95
"""Jain index of service from which a hundred clients are said to be served fairly."""

FULL: Final = 0.9
"""Share of the sequences an engine takes from which it is called full."""

_LIVE: Final = (*COMPARED, ("control_ns_per_request", ALL))

SERVED: Final = "answered\n(req/s)"
"""Heading of what :mod:`sage_bench.studies.points` calls ``served_rps``."""


def findings(experiments: Experiments) -> Findings:
    parts = [
        _backends(experiments),
        _load(experiments),
        _clients(experiments),
        _fairness(experiments),
        _models(experiments),
    ]
    return Findings(
        tables=[table for part in parts for table in part.tables],
        figures=[figure for part in parts for figure in part.figures],
        sentences=[sentence for part in parts for sentence in part.sentences],
        claims=[claim for part in parts for claim in part.claims],
        nowhere=[sentence for part in parts for sentence in part.nowhere],
        fairness=[
            "All numbers of backends, clients and loads share policy (hybrid, but where policies are compared), objectives and seeds.",
            _engines_text(experiments),
            "Numbers of backends are compared by equal requests (512 tokens in, 128 out): of a mix an overloaded system answers the cheap "
            "part, and what it answers is no measure of its size.",
            "The 70B class spans four GPUs an engine, so its throughput is that of eight GPUs where the others have two.",
            "The plane's time is that of the machine that simulated, alone on a core while it decides; a slower machine, or one "
            "shared with others, makes every overhead here larger in proportion.",
        ],
    )


def _engines_text(experiments: Experiments) -> str:
    """Which experiments have the same engines, so that numbers are not read across those that have not."""
    names: dict[str, list[str]] = {}
    for name in experiments.simulated:
        runs = sides(experiments, name).sweep
        text = " or ".join(
            sorted({_engine(group) for run in runs for group in run.manifest.config["cluster"]["devices"]})
        )
        names.setdefault(text, []).append(name.rpartition("/")[2])
    if len(names) == 1:
        return f"All experiments have the same engines: {next(iter(names))}."
    told = "; ".join(f"{', '.join(of)}: {text}" for text, of in names.items())
    return f"Engines are the same within an experiment (but for model sizes) and not in all of them: {told}. Numbers are not compared across."


def _engine(group: Mapping[str, Any]) -> str:
    """Of a group of equal devices: its node and what it runs."""
    llm, embed = group.get("llm"), group.get("embed")
    parts = [f"{llm['profile']} with {_sequences(llm)} sequences"] if llm else []
    parts.append(embed["profile"] if embed else "no embeddings")
    return f"{group['node']} ({', '.join(parts)})"


def _sequences(llm: Mapping[str, Any]) -> int:
    return int(llm.get("max_num_seqs", 256))


# --- backends --------------------------------------------------------------------------------------------------------


def _where(m: Manifest) -> dict[str, Any]:
    return {"backends": len(m.devices), "rate": m.load.rate}


def _backends(experiments: Experiments) -> Findings:
    of = sides(experiments, "scalability/backends")
    frame = points(of.sweep, _where)
    counts = sorted(int(each) for each in frame["backends"].unique())
    if len(counts) < 2:
        raise DataError("scalability/backends: runs with one number of backends only; sweep cluster.devices.0.count")
    strong, weak = float(frame["rate"].max()), _weak_rate(frame, counts)
    rates = {"strong": dict.fromkeys(counts, strong), "weak": {each: weak * each for each in counts}}
    tables, speedups, series = [], {}, {}
    for name, rate_of in rates.items():
        rows, found = [], {}
        first = at(frame, backends=counts[0], rate=rate_of[counts[0]])
        for each in counts:
            here = at(frame, backends=each, rate=rate_of[each])
            chat = at(frame, "chat", backends=each, rate=rate_of[each])
            found[each] = relative(first, here, "served_rps")
            rows.append(
                [
                    str(each),
                    plain(rate_of[each]),
                    cell(mean(here, "served_rps")),
                    number(found[each].mean),
                    percent(found[each].mean * counts[0] / each, 0),
                    cell(mean(here, "slo_attainment"), "slo_attainment"),
                    *(cell(mean(chat, metric), metric) for metric in ("ttft_ns_p95", "e2e_ns_p50")),
                ]
            )
        speedups[name] = found
        series[f"{name} scaling"] = [
            mean(at(frame, backends=each, rate=rate_of[each]), "served_rps") for each in counts
        ]
        what = (
            f"The same {plain(strong)} requests/s for all"
            if name == "strong"
            else f"{plain(weak)} requests/s a backend"
        )
        tables.append(
            TableOf(
                f"{name}_scaling",
                f"{what}; means of {first['seed'].nunique()} seeds, ± half of the 95 % interval. Speedup and efficiency are of "
                f"what is answered, against {_backends_text(counts[0])}.",
                Sheet(
                    f"{name.capitalize()} scaling",
                    [
                        "backends", "offered\n(req/s)", SERVED, "speedup", "efficiency",
                        heading("slo_attainment"), heading("ttft_ns_p95", "chat"), heading("e2e_ns_p50", "chat"),
                    ],
                    rows,
                ),
            )
        )  # fmt: skip
    tables.append(
        _measured(
            "backends",
            "Speedup and overhead",
            f"{plain(weak)} requests/s a backend; the speedups are those of the other tables.",
            ["backends", "speedup\nstrong", "speedup\nweak"],
            [
                (
                    [str(each), *(number(speedups[name][each].mean) for name in ("strong", "weak"))],
                    at(frame, backends=each, rate=rates["weak"][each]),
                )
                for each in counts
            ],
        )
    )
    most = counts[-1]
    sentences, claims = [], []
    for name, found in speedups.items():
        speedup = found[most]
        efficiency = speedup.mean * counts[0] / most
        load = f"at {plain(strong)} requests/s" if name == "strong" else f"at {plain(weak)} requests/s a backend"
        sentences.append(
            f"{name.capitalize()} scaling: {most} backends answer {number(speedup.mean)} times{span(speedup)} the requests of "
            f"{_backends_text(counts[0])} {load}, an efficiency of {percent(efficiency, 0)}."
        )
        claims.append(
            Claim(
                f"scalability-{name}",
                272 if name == "strong" else 274,
                f"near-linear scaling to {most} backends ({name}): efficiency of at least {percent(NEAR_LINEAR, 0)}",
                f"{number(speedup.mean)}x on {most} backends{span(speedup)}, efficiency {percent(efficiency)}",
                bounded(_scaled(speedup, counts[0] / most), least=NEAR_LINEAR),
                evidence(of.sweep),
            )
        )
    sentences.append(_overhead_over_backends(frame, rates["weak"], counts))
    live = points(of.live, _where) if len(of.live) else None
    if live is not None:
        sentences.append(_overhead_live(at(live), of.live.source()))
    shares = {n: mean(at(frame, backends=n, rate=rates["weak"][n]), "control_overhead") for n in counts}
    claims.append(
        Claim(
            "scalability-overhead",
            275,
            f"the plane's overhead stays below {percent(NEGLIGIBLE)} of E2E from {counts[0]} to {most} backends",
            f"{_small(shares[counts[0]].mean)} of E2E with {_backends_text(counts[0])}, {_small(shares[most].mean)} with {most}",
            _all(bounded(share, most=NEGLIGIBLE) for share in shares.values()),
            evidence(of.sweep),
        )
    )
    if live is not None:
        parts = [mean(part, "control_overhead") for _, part in at(live).groupby(["backends", "rate"])]
        claims.append(
            Claim(
                "scalability-overhead-live",
                275,
                f"the overhead of a gateway stays below {percent(NEGLIGIBLE)} of E2E at every point that was run",
                f"at most {_small(max(part.mean for part in parts))} of E2E, the mean of {min(part.n for part in parts)} seeds",
                _all(bounded(part, most=NEGLIGIBLE) for part in parts),
                evidence(of.live),
            )
        )

    def draw() -> Figure:
        return throughput_backends(counts, series, SOURCES[of.sweep.source()])

    caption = (
        f"Throughput over backends: {plain(strong)} requests/s offered to all (strong), {plain(weak)} a backend (weak); means and "
        f"95 % intervals of {frame['seed'].nunique()} seeds, simulated. {sentences[0]}"
    )
    tables += side_by_side(
        "backends_live_measured", of, _where, {"backends": "backends", "rate": "offered\n(req/s)"}, _LIVE
    )
    return Findings(tables, [Drawing("throughput_backends", caption, draw)], sentences, claims)


def _weak_rate(frame: pd.DataFrame, counts: Sequence[int]) -> float:
    """The lowest rate a backend (requests/s) at which every number of backends was run."""
    have = {(int(n), float(rate)) for n, rate in zip(frame["backends"], frame["rate"], strict=True)}
    for rate in sorted({rate / n for n, rate in have}):
        if all((n, rate * n) in have for n in counts):
            return rate
    raise DataError(
        "scalability/backends: no rate that grows with the backends; sweep load.rate over multiples of cluster.devices.0.count"
    )


def _overhead_over_backends(frame: pd.DataFrame, rate_of: dict[int, float], counts: Sequence[int]) -> str:
    first, last = (at(frame, backends=n, rate=rate_of[n]) for n in (counts[0], counts[-1]))
    found = against(first, last, "control_ns_per_request")
    known = found.difference.n > 1 and found.p < 0.05
    few, many = (mean(each, "control_ns_per_request").mean / MICROSECOND for each in (first, last))
    how = "does not change significantly" if not known else "grows" if many > few else "falls"
    return (
        f"The plane's time a request {how} from {_backends_text(counts[0])} to {counts[-1]} under proportional load: {number(few)} us "
        f"and {number(many)} us, {_small(mean(first, 'control_overhead').mean)} and {_small(mean(last, 'control_overhead').mean)} of "
        "the time a request takes."
    )


def _overhead_live(frame: pd.DataFrame, source: str) -> str:
    """Of the gateway, whose steps are of one event or two: nothing is simulated in this number but the engines."""
    plane, shares = frame["control_ns_per_request"] / MICROSECOND, frame["control_overhead"]
    return (
        f"In a gateway ({SOURCES[source]}) the plane takes {number(float(plane.min()))} to {number(float(plane.max()))} us a request, where "
        f"events come one by one and not many at an instant: {_small(float(shares.min()))} to {_small(float(shares.max()))} of E2E."
    )


def _scaled(value: Interval, factor: float) -> Interval:
    return Interval(value.mean * factor, value.low * factor, value.high * factor, value.n)


def _all(outcomes: Iterable[Outcome]) -> Outcome:
    """Of a claim that has to hold at every point."""
    told = set(outcomes)
    for each in ("does not hold", "not measured", "no significant difference"):
        if each in told:
            return each
    return "holds"


def _backends_text(count: int) -> str:
    return "one backend" if count == 1 else f"{count} backends"


# --- load ------------------------------------------------------------------------------------------------------------


def _load(experiments: Experiments) -> Findings:
    of = sides(experiments, "scalability/load")
    frame = points(of.sweep, _where)
    rates = sorted(float(each) for each in frame["rate"].unique())
    knee = saturation({rate: [flow(run) for run in of.sweep if run.manifest.load.rate == rate] for rate in rates})
    engines = int(frame["backends"].iloc[0])
    last = [run for run in of.sweep if run.manifest.load.rate == rates[-1]]
    rows = []
    for rate in rates:
        here, chat = at(frame, rate=rate), at(frame, "chat", rate=rate)
        slots = t_interval([_slots(run) for run in of.sweep if run.manifest.load.rate == rate])
        rows.append(
            [
                plain(rate),
                cell(mean(here, "served_rps")),
                cell(mean(here, "slo_attainment"), "slo_attainment"),
                *(cell(mean(chat, f"e2e_ns_{part}"), f"e2e_ns_{part}") for part in ("p50", "p95", "p99")),
                percent(slots.mean, 0),
                cell(mean(here, "queue_depth_mean"), "queue_depth_mean"),
            ]
        )
    table = TableOf(
        "load",
        f"{engines} backends, means of {frame['seed'].nunique()} seeds. Slots: sequences running on LLM engines, of their "
        "max_num_seqs, at the median instant.",
        Sheet(
            "Offered load",
            [
                "offered\n(req/s)", SERVED, heading("slo_attainment"),
                *(heading(f"e2e_ns_{part}", "chat") for part in ("p50", "p95", "p99")),
                "slots", heading("queue_depth_mean"),
            ],
            rows,
        ),
    )  # fmt: skip
    beyond = at(frame, rate=rates[-1])
    used, waiting = t_interval([_slots(run) for run in last]), mean(beyond, "queue_depth_mean").mean
    plane_us = mean(beyond, "control_ns_per_request").mean / MICROSECOND
    sentences = [
        _ceiling_text(knee, engines),
        f"At {plain(rates[-1])} requests/s the LLM engines hold {percent(used.mean, 0)} of the sequences they can and "
        f"{number(waiting)} tasks wait in the plane, which is busy for {percent(_core(beyond))} of one core at "
        f"{number(plane_us)} us a request. {_why(knee, used, _core(beyond))} A plane of that cost would be at its own ceiling at about "
        f"{about(1e6 / plane_us)} requests/s; a gateway pays for HTTP too, and is at its own before that.",
    ]
    low, high = at(frame, rate=rates[0]), at(frame, rate=rates[-1])
    sentences.append(
        f"From {plain(rates[0])} to {plain(rates[-1])} requests/s the plane's time a request goes from "
        f"{number(mean(low, 'control_ns_per_request').mean / MICROSECOND)} us to {number(plane_us)} us: "
        f"{_small(mean(low, 'control_overhead').mean)} and {_small(mean(high, 'control_overhead').mean)} of E2E."
    )
    claims = [
        Claim(
            "scalability-supports",
            264,
            "supports [I] requests/s with [J] engines",
            f"{plain(knee.rate_rps)} requests/s with {engines} simulated engines, sustained"
            if not math.isnan(knee.rate_rps)
            else f"no rate of the sweep is sustained by {engines} simulated engines",
            "holds" if not math.isnan(knee.rate_rps) else "does not hold",
            evidence(of.sweep),
        )
    ]
    latencies = {
        f"chat {label} (s)": {
            part: {rate: mean(at(frame, "chat", rate=rate), f"{name}_{part}") for rate in rates}
            for part in ("p50", "p95", "p99")
        }
        for name, label in (("ttft_ns", "TTFT"), ("e2e_ns", "E2E"))
    }

    def draw() -> Figure:
        return percentiles_rate(latencies, knee, SOURCES[of.sweep.source()])

    caption = f"Latency of chat over the offered load on {engines} backends, {frame['seed'].nunique()} seeds, simulated. {sentences[0]}"
    nowhere = []
    free = list(itertools.takewhile(lambda rate: mean(at(frame, rate=rate), "queue_depth_mean").mean < 1, rates))
    if free:
        nowhere.append(
            f"Up to {plain(max(free))} requests/s on {engines} backends less than one task waits in the plane on average: there "
            "is hardly a queue to order."
        )
    plane = _measured(
        "load",
        "Overhead over load",
        f"{engines} backends.",
        ["offered\n(req/s)"],
        [([plain(rate)], at(frame, rate=rate)) for rate in rates],
    )
    return Findings([table, plane], [Drawing("latency_load", caption, draw)], sentences, claims, nowhere)


def _ceiling_text(knee: Saturation, engines: int) -> str:
    top = f"the most answered at any load is {number(knee.throughput_rps)} requests/s"
    if math.isnan(knee.rate_rps):
        return f"{engines} backends sustain no rate of the sweep; {top}."
    if math.isnan(knee.next_rps):
        return f"{engines} backends sustain every rate of the sweep, up to {plain(knee.rate_rps)} requests/s; {top}."
    return (
        f"{engines} backends sustain {plain(knee.rate_rps)} requests/s and not {plain(knee.next_rps)} (95 % of the offered flow "
        f"answered); {top}."
    )


def _why(knee: Saturation, used: Interval, core: float) -> str:
    """What the ceiling is. used: places taken in the LLM engines; core: what the plane takes of one core; both at the highest rate."""
    if math.isnan(knee.next_rps):
        return "No rate of the sweep is above the ceiling, so these runs do not say what it is."
    if core >= 1:
        return "The plane would need more than a core, which a simulation does not charge it for: live, it is a ceiling too."
    if bounded(used, least=FULL) == "holds":
        return "The engines are the ceiling: they are full, and the plane is not."
    return "That the engines are full is not shown, so these runs do not say what the ceiling is."


def _slots(run: Run) -> float:
    """Median over reports of LLM engines within the arrivals: sequences running, of the most that the engine takes."""
    reports = run.frame("replicas", ("at_ns", "replica", "running"))
    llms = {each.replica for each in run.manifest.replicas if each.pool_kind == PoolKind.LLM}
    until = run.frame("requests", ("scheduled_ns",))["scheduled_ns"].max()
    of = reports[reports["replica"].isin(llms) & reports["at_ns"].between(run.manifest.warmup_ns, until)]
    most = [_sequences(group["llm"]) for group in run.manifest.config["cluster"]["devices"] if group.get("llm")]
    return float(of["running"].median() / max(most)) if len(of) else math.nan


# --- clients ---------------------------------------------------------------------------------------------------------


def _users(m: Manifest) -> dict[str, Any]:
    return {"users": int(m.config["load"]["users"])}


def _clients(experiments: Experiments) -> Findings:
    of = sides(experiments, "scalability/clients")
    frame = points(of.sweep, _users)
    counts = sorted(int(each) for each in frame["users"].unique())
    rows = []
    for each in counts:
        here, chat = at(frame, users=each), at(frame, "chat", users=each)
        served = mean(here, "served_rps")
        rows.append(
            [
                str(each),
                cell(served),
                number(served.mean / each),
                *(cell(mean(chat, metric), metric) for metric in ("ttft_ns_p95", "e2e_ns_p50", "e2e_ns_p95")),
            ]
        )
    table = TableOf(
        "clients",
        f"Clients that ask again half a second (on average) after each answer, {len(of.sweep[0].manifest.devices)} backends, means of "
        f"{frame['seed'].nunique()} seeds. A closed loop: not comparable with the open-loop latencies of the other tables.",
        Sheet(
            "Concurrent clients",
            [
                "clients", SERVED, "a client\n(req/s)", heading("ttft_ns_p95", "chat"), heading("e2e_ns_p50", "chat"),
                heading("e2e_ns_p95", "chat"),
            ],
            rows,
        ),
    )  # fmt: skip
    one, most = at(frame, users=counts[0]), at(frame, users=counts[-1])
    each_one, each_most = (mean(part, "served_rps").mean / n for part, n in ((one, counts[0]), (most, counts[-1])))
    sentence = (
        f"{counts[-1]} clients get {number(mean(most, 'served_rps').mean)} requests/s where {counts[0]} "
        f"gets {number(mean(one, 'served_rps').mean)}: a client gets {percent(each_most / each_one, 0)} of what it would alone."
    )
    plane = _measured(
        "clients",
        "Overhead over clients",
        "A closed loop.",
        ["clients"],
        [([str(each)], at(frame, users=each)) for each in counts],
    )
    return Findings(
        [table, plane, *side_by_side("clients_live_measured", of, _users, {"users": "clients"}, _LIVE)],
        [],
        [sentence],
        [],
    )


def _fairness(experiments: Experiments) -> Findings:
    runs = experiments.simulated["scalability/fairness"]
    frame = points(runs, _where)
    clients = _by_client(runs)
    rates = sorted(float(each) for each in frame["rate"].unique())
    policies = list(dict.fromkeys(frame["policy"]))
    rows = []
    for rate in rates:
        for policy in policies:
            here, chat = at(frame, rate=rate, policy=policy), at(frame, "chat", rate=rate, policy=policy)
            mine = clients[(clients["rate"] == rate) & (clients["policy"] == policy)]
            rows.append(
                [
                    plain(rate),
                    policy,
                    cell(mean(here, "slo_attainment"), "slo_attainment"),
                    *(_share(mine, name) for name in ("heavy", "light")),
                    cell(mean(here, "jain_service"), "jain_service"),
                    cell(mean(here, "jain_slo"), "jain_slo"),
                    *(
                        f"{number(t_interval(mine[name].tolist()).mean)}"
                        for name in ("e2e_best_s", "e2e_median_s", "e2e_worst_s")
                    ),
                    cell(mean(here, "wait_ns_max"), "wait_ns_max"),
                    cell(mean(chat, "ttft_ns_p99"), "ttft_ns_p99"),
                ]
            )
    count = int(clients["clients"].max())
    table = TableOf(
        "fairness",
        f"{count} clients of one priority, in bursts; the heavy ones send half of all requests. Jain indices over clients, of requests "
        "answered by the end of the arrivals over offered, and of SLO attainment. E2E: the mean of the best served, the median and "
        f"the worst served client. Means of {frame['seed'].nunique()} seeds.",
        Sheet(
            "A hundred clients",
            [
                "offered\n(req/s)", "policy", heading("slo_attainment"), "SLO heavy\n(%)", "SLO light\n(%)", "Jain\nservice", "Jain\nSLO",
                "E2E best\n(s)", "median\n(s)", "worst\n(s)", heading("wait_ns_max"), heading("ttft_ns_p99", "chat"),
            ],
            rows,
        ),
    )  # fmt: skip
    sentences, claims = [], []
    top = rates[-1]
    if {"hybrid", "fifo"} <= set(policies):
        one, other = (at(frame, rate=top, policy=policy) for policy in ("fifo", "hybrid"))
        indices = {"jain_service": "of service", "jain_slo": "of SLO attainment"}
        differences = [against(one, other, name) for name in indices]
        adjusted = holm([found.p for found in differences])
        for (name, label), found, p in zip(indices.items(), differences, adjusted, strict=True):
            what = "no significant difference" if not p < 0.05 else "higher" if found.difference.mean > 0 else "lower"
            sentences.append(
                f"Among {count} clients at {plain(top)} requests/s the Jain index {label} is {number(mean(other, name).mean)} under hybrid "
                f"and {number(mean(one, name).mean)} under fifo ({what})."
            )
        index = mean(at(frame, rate=top, policy="hybrid"), "jain_service")
        waited_ns = float(at(frame, rate=top, policy="hybrid")["wait_ns_max"].max())
        claims.append(
            Claim(
                "scalability-fairness",
                191,
                f"{count} clients are served fairly under overload: a Jain index of service of at least {FAIR}",
                f"Jain {number(index.mean)}{span(index)} under hybrid at {plain(top)} requests/s; nobody was queued longer than "
                f"{number(waited_ns / SECOND)} s in any of the {index.n} runs",
                bounded(index, least=FAIR),
                evidence(runs),
            )
        )
        heavy, light = (
            t_interval(clients[(clients["rate"] == top) & (clients["policy"] == "hybrid")][name].tolist())
            for name in ("heavy", "light")
        )
        sentences.append(
            f"Who pays under hybrid: the clients that send most meet {percent(heavy.mean)} of their objectives, the others "
            f"{percent(light.mean)}."
        )
    claims.append(
        Claim(
            "scalability-evaluated",
            263,
            "evaluated with up to [G] GPU nodes and [H] clients",
            f"up to {_most_gpus(experiments)} simulated GPUs and {max(count, _most_users(experiments))} clients",
            "stated",
            tuple(name for runs in experiments.simulated.values() for name in evidence(runs)),
        )
    )
    return Findings([table], [], sentences, claims)


def _by_client(runs: Runs) -> pd.DataFrame:
    """Of each run: SLO attainment of clients that send more than the mean and of the others, and the best, median and worst of
    the clients' mean E2E of chat."""
    rows = []
    for run in runs:
        requests = run.frame("requests", ("tenant", "kind", "good", "e2e_ns", "warmup"))
        requests = requests[~requests["warmup"]]
        of = requests.groupby("tenant", observed=True)
        sent, good = of.size(), of["good"].mean()
        many = sent > sent.mean()
        chat = requests[requests["kind"] == "chat"].groupby("tenant", observed=True)["e2e_ns"].mean() / 1e9
        rows.append(
            {
                **_where(run.manifest),
                "policy": arm_of(run.manifest),
                "seed": run.manifest.seed,
                "clients": len(sent),
                "heavy": float(good[many].mean()),
                "light": float(good[~many].mean()),
                "e2e_best_s": float(chat.min()),
                "e2e_median_s": float(chat.median()),
                "e2e_worst_s": float(chat.max()),
            }
        )
    return pd.DataFrame(rows)


def _share(clients: pd.DataFrame, name: str) -> str:
    return number(100 * t_interval(clients[name].tolist()).mean)


def _most_gpus(experiments: Experiments) -> int:
    return max(
        sum(device.count for device in run.manifest.devices) for runs in experiments.simulated.values() for run in runs
    )


def _most_users(experiments: Experiments) -> int:
    return max(int(_users(run.manifest)["users"]) for run in experiments.simulated["scalability/clients"])


# --- models ----------------------------------------------------------------------------------------------------------


def _model(m: Manifest) -> dict[str, Any]:
    return {"model": choice_of(m, "cluster").upper(), "rate": m.load.rate}


def _models(experiments: Experiments) -> Findings:
    runs = experiments.simulated["scalability/models"]
    frame = points(runs, _model)
    names = sorted(frame["model"].unique(), key=lambda name: float(name.rstrip("B")))
    rates = sorted(float(each) for each in frame["rate"].unique())
    profiles = {_model(run.manifest)["model"]: ", ".join(run.manifest.profiles) for run in runs}
    rows, ratios = [], {}
    for name in names:
        for rate in rates:
            here = at(frame, model=name, rate=rate)
            if rate == rates[0]:
                ratios[name] = _of_model_time(here)
            rows.append(
                [
                    name,
                    plain(rate),
                    cell(mean(here, "served_rps")),
                    *(cell(mean(here, metric), metric) for metric in ("slo_attainment", "e2e_ns_mean")),
                    number(_model_time(here).mean / MILLISECOND),
                ]
            )
    table = TableOf(
        "models",
        "Two engines of each class, 512 tokens in and 128 out, means of "
        f"{frame['seed'].nunique()} seeds. Model time is E2E less the time queued in the plane. Profiles: "
        + "; ".join(f"{name} {profiles[name]}" for name in names)
        + ". All engines are simulated by these profiles.",
        Sheet(
            "Model size",
            [
                "model", "offered\n(req/s)", SERVED, heading("slo_attainment"), heading("e2e_ns_mean"),
                "model time\n(ms)",
            ],
            rows,
        ),
    )  # fmt: skip
    plane = _measured(
        "models",
        "Overhead over model size",
        "Two engines of each class.",
        ["model", "offered\n(req/s)"],
        [([name, plain(rate)], at(frame, model=name, rate=rate)) for name in names for rate in rates],
    )
    least, most = names[0], names[-1]
    told = ", ".join(f"{_small(ratios[name].mean)} for {name}" for name in names)
    sentences = [
        f"Of the time a model takes the plane adds, at {plain(rates[0])} requests/s, {told}. "
        + _plane_text(least, most, *(at(frame, model=name, rate=rates[0]) for name in (least, most)))
    ]
    claims = [
        Claim(
            "scalability-models",
            274,
            f"negligible overhead for large models: below {percent(NEGLIGIBLE)} of the time of a {most} model",
            f"{_small(ratios[most].mean)} for {most}, {_small(ratios[least].mean)} for {least}",
            bounded(ratios[most], most=NEGLIGIBLE),
            evidence(runs),
        ),
        Claim(
            "scalability-models-falls",
            189,
            "the overhead is a smaller part of a large model's time than of a small one's",
            f"{_small(ratios[most].mean)} for {most} against {_small(ratios[least].mean)} for {least}",
            _falls(at(frame, model=least, rate=rates[0]), at(frame, model=most, rate=rates[0])),
            evidence(runs),
        ),
    ]
    return Findings([table, plane], [], sentences, claims)


def _plane_text(least: str, most: str, small: pd.DataFrame, large: pd.DataFrame) -> str:
    """Whether the plane's time depends on the model."""
    found = against(small, large, "control_ns_per_request")
    few, many = (mean(frame, "control_ns_per_request").mean / MICROSECOND for frame in (small, large))
    how = "no significant difference" if not found.p < 0.05 else "more" if found.difference.mean > 0 else "less"
    return f"The plane itself takes {number(few)} us a request with {least} and {number(many)} us with {most} ({how})."


def _falls(small: pd.DataFrame, large: pd.DataFrame) -> Outcome:
    shares = [(frame.assign(share=_shares(frame)), "share") for frame in (small, large)]
    found = against(shares[0][0], shares[1][0], "share")
    return decided(found.difference.mean < 0, found.p < 0.05)


def _model_time(frame: pd.DataFrame) -> Interval:
    """Mean E2E less mean time queued in the plane, ns."""
    return t_interval((frame["e2e_ns_mean"] - frame["queue_ns_mean"]).tolist())


def _shares(frame: pd.DataFrame) -> pd.Series[float]:
    return frame["control_ns_per_request"] / (frame["e2e_ns_mean"] - frame["queue_ns_mean"])


def _of_model_time(frame: pd.DataFrame) -> Interval:
    return t_interval(_shares(frame).tolist())


# --- words -----------------------------------------------------------------------------------------------------------


def _measured(
    name: str, title: str, where: str, headings: Sequence[str], rows: Sequence[tuple[list[str], pd.DataFrame]]
) -> TableOf:
    """What the plane costs at each point. Times of this machine: another run of the same gives others, so they have a table of
    their own, told by its name."""
    return TableOf(
        f"{name}_measured",
        f"{where} CPU time inside the plane, measured while the runs were simulated: a request, over its mean E2E, over its model time (E2E less "
        "the time queued in the plane), and of one core at what is answered.",
        Sheet(
            title,
            [*headings, SERVED, heading("control_ns_per_request"), "of E2E", "of model\ntime", "of a core"],
            [
                [
                    *cells,
                    cell(mean(frame, "served_rps")),
                    cell(mean(frame, "control_ns_per_request"), "control_ns_per_request"),
                    _small(mean(frame, "control_overhead").mean),
                    _small(_of_model_time(frame).mean),
                    _small(_core(frame)),
                ]
                for cells, frame in rows
            ],
        ),
    )


def _core(frame: pd.DataFrame) -> float:
    """Share of one core that the plane takes at the throughput of ``frame``."""
    return mean(frame, "control_ns_per_request").mean * mean(frame, "served_rps").mean / 1e9


def _small(share: float) -> str:
    """A share that may be far below a per cent."""
    return f"{100 * share:.2g} %"


SCALABILITY = Study(
    "scalability",
    "5.4",
    "Scalability",
    "How does throughput grow with backends, load and clients, what is the ceiling, and what does the control plane cost?",
    ("scalability/backends", "scalability/load", "scalability/clients", "scalability/fairness", "scalability/models"),
    findings,
    live=("scalability/backends", "scalability/clients"),
)
