"""5.2: one control plane for both kinds of work, against two services with a static split of the same devices.

The static split is tuned by grid search: every split runs at every rate, and the best by goodput capacity is what the unified
control plane is held against. It is chosen on the runs it is then judged on, which favours it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from sage_bench.figures.attainment_rate import attainment_rate
from sage_bench.figures.latency_cdf import latency_cdf
from sage_bench.figures.latency_throughput import latency_throughput
from sage_bench.metrics.capacity import ATTAINMENT_MIN, Capacity, attainment, capacity, ratio
from sage_bench.metrics.compare import against
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.statistics import CONFIDENCE, Interval, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Claim, Drawing, Findings, Outcome, TableOf, bounded, decided, number, percent
from sage_bench.studies.points import arm_of, at, choice_of, mean, points, refuse_two_configurations, relative, span
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import Sides, side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError
from sage_core.units import MILLISECOND, SECOND

GAIN: Final = 1.25
"""Of capacity, asked for under the mix that varies."""

UNIFIED: Final = "unified"
SPLITS: Final = ("split_1", "split_2", "split_3")
"""The arms that the grid search is over: so many of the devices embed and do nothing else."""

MIXES: Final = {"varying": "mix varies", "constant": "constant mix"}

ABOUT: Final = {
    "unified": "hybrid on shared devices",
    "unified_fifo": "fifo on shared devices",
    "round_robin": "shared devices, router takes turns",
    "least_in_flight": "shared devices, router joins the shortest queue",
    "vllm_only": "all devices generate, clients embed on CPUs of their own",
    **{f"split_{k}": f"{4 - k} devices generate, {k} embed, each fifo" for k in (1, 2, 3)},
    **{f"split_{k}_hybrid": f"{4 - k} devices generate, {k} embed, each hybrid" for k in (1, 2, 3)},
}

PAIRS: Final = ("pair_unified", "pair_split")
"""The arms of the live size, on two devices."""

STRETCH_NS: Final = 5 * SECOND
"""Of time, in which one side of a split is seen to miss its objectives while the other is idle."""


def findings(experiments: Experiments) -> Findings:
    of = sides(experiments, "control_plane")
    runs, cut = whole_grids(of.sweep)
    alone, cut_alone = whole_grids(experiments.simulated["control_plane_vllm_only"])
    _same_devices(runs)
    frame = _attainments([*runs, *alone])
    by_mix = {mix: frame[frame["mix"] == mix] for mix in MIXES if mix in set(frame["mix"])}
    if "varying" not in by_mix:
        raise DataError(
            "control_plane: no arm ran at every rate under load=control_plane/varying; run the whole experiment"
        )
    known = {mix: _capacities(part) for mix, part in by_mix.items()}
    best = {mix: _best(mix, each) for mix, each in known.items()}
    found = differences(by_mix, best)
    gains = {mix: ratio(each[UNIFIED], each[best[mix]]) for mix, each in known.items()}
    shown = list(
        dict.fromkeys(
            [UNIFIED, *best.values(), *(a for a in ("unified_fifo", "round_robin") if a in set(frame["arm"]))]
        )
    )
    titles = {mix: f"{MIXES[mix]}, best split: {best[mix]}" for mix in by_mix}
    panels = {titles[mix]: part for mix, part in by_mix.items()}
    marked = {titles[mix]: {arm: each.rate.mean for arm, each in known[mix].items()} for mix in by_mix}
    measured = points(runs.where(lambda m: arm_of(m) in shown), _where)
    chats = measured[measured["kind"] == "chat"].rename(columns={"policy": "arm"})
    at_rate = _rate_above(frame, "varying", known["varying"][best["varying"]])
    seeds = runs_seeds(runs)
    return Findings(
        tables=[
            _capacity_table(known, best),
            _tuning_table(frame, best),
            _stranded_table(runs, best, at_rate),
            *_live(of),
        ],
        figures=[
            Drawing(
                "capacity",
                f"SLO attainment of the kind of request that is served worse, over the offered rate; bands are {CONFIDENCE:.0%} "
                f"intervals over {seeds} seeds, rings mark goodput capacity. Simulated.",
                lambda: attainment_rate(panels, marked, shown, "simulation"),
            ),
            Drawing(
                "throughput_latency",
                f"TTFT p99 of chat against what is served (chat and embeddings), one point a rate, mean of {seeds} seeds, all "
                "arms on the same rates. Simulated.",
                lambda: latency_throughput(
                    {titles[mix]: chats[chats["mix"] == mix] for mix in by_mix},
                    shown,
                    "ttft_ns_p99",
                    "chat",
                    "simulation",
                ),
            ),
            Drawing(
                "latency_cdf",
                f"Latency of the two approaches while the mix varies, at {at_rate:g} requests/s offered, {seeds} seeds. Simulated.",
                lambda: latency_cdf(
                    {
                        arm: list(runs.where(lambda m, arm=arm: _is(m, "varying", arm, at_rate)))  # type: ignore[misc]
                        for arm in (UNIFIED, best["varying"])
                    },
                    [("chat", "ttft_ns"), ("embedding", "e2e_ns")],
                ),
            ),
        ],
        sentences=[
            *(_gain_sentence(mix, known[mix], best[mix], gains[mix]) for mix in known),
            *_policy_sentences(known, best),
            *_vllm_only(known),
        ],
        claims=[
            *_claims(runs, known, best, gains),
            *_point_claims(runs, measured, found, best["varying"], at_rate),
            _throughput_claim(runs, measured, known["varying"][UNIFIED], gains["varying"]),
            *live_claims(of),
        ],
        nowhere=[_nowhere(mix, found[found["mix"] == mix], best[mix]) for mix in known],
        fairness=[
            "Every arm but vllm_only has the same four devices; vllm_only has the clients' CPUs besides, at no cost to it, and embeds "
            "with a model a seventeenth of the others' size.",
            "The split's engines have what is best for them: all of a device's memory, and batches as large as they take.",
            "Latency and attainment under load are compared at the first rate above the split's own goodput capacity, where the split misses its "
            "objectives by construction; the figures have all rates.",
            f"The split is chosen among {len(SPLITS)} by grid search on the runs it is judged on, which favours it.",
        ],
        notes=[
            f"Goodput capacity: the largest offered rate at which at least {ATTAINMENT_MIN:.0%} of the requests of each kind meet "
            "their objectives, between two rates by a straight line, seed by seed.",
            *cut,
            *cut_alone,
        ],
    )


def runs_seeds(runs: Runs) -> int:
    """How many seeds there are."""
    return len({run.manifest.seed for run in runs})


def _where(manifest: Manifest) -> Mapping[str, Any]:
    return {"mix": choice_of(manifest, "load"), "rate": manifest.load.rate}


def _is(manifest: Manifest, mix: str, arm: str, rate: float) -> bool:
    return _where(manifest) == {"mix": mix, "rate": rate} and arm_of(manifest) == arm


def whole_grids(runs: Runs) -> tuple[Runs, list[str]]:
    """The runs of one experiment less those of every arm and seed that lacks a rate of its mix, and a sentence for each that is
    left out: a curve that was cut off looks like a capacity above the grid.

    Raises :class:`DataError` as :func:`refuse_two_configurations` does.
    """
    refuse_two_configurations(runs, _where)

    def curve(m: Manifest) -> tuple[str, str, int]:
        return choice_of(m, "load"), arm_of(m), m.seed

    ran: dict[tuple[str, str, int], set[float | None]] = {}
    grid: dict[str, set[float | None]] = {}
    for run in runs:
        key = curve(run.manifest)
        ran.setdefault(key, set()).add(run.manifest.load.rate)
        grid.setdefault(key[0], set()).add(run.manifest.load.rate)
    cut = {key: rates for key, rates in ran.items() if rates != grid[key[0]]}
    said = [
        f"{arm} under {mix}, seed {seed}: ran at {len(rates)} of {len(grid[mix])} rates, left out."
        for (mix, arm, seed), rates in sorted(cut.items())
    ]
    return runs.where(lambda m: curve(m) not in cut), said


def _attainments(runs: Sequence[Run]) -> pd.DataFrame:
    rows = [
        {**_where(run.manifest), "arm": arm_of(run.manifest), "seed": run.manifest.seed, "attainment": attainment(run)}
        for run in runs
    ]
    return pd.DataFrame(rows)


def _capacities(frame: pd.DataFrame) -> dict[str, Capacity]:
    """By arm, of one mix."""
    found: dict[str, Capacity] = {}
    for arm in dict.fromkeys(frame["arm"]):
        of = frame[frame["arm"] == arm]
        curves: dict[int, dict[float, float]] = {}
        for seed, rate, value in zip(of["seed"], of["rate"], of["attainment"], strict=True):
            curves.setdefault(int(seed), {})[float(rate)] = float(value)
        found[arm] = capacity(curves)
    return found


def _best(mix: str, known: Mapping[str, Capacity]) -> str:
    """The split with the most capacity. One that the grid does not reach the end of is better than any whose end is known."""
    splits = [arm for arm in SPLITS if arm in known]
    if not splits or UNIFIED not in known:
        raise DataError(
            f"control_plane: no run of {UNIFIED} or of a split at every rate under the load {mix}; run the whole experiment"
        )

    def order(arm: str) -> tuple[float, float]:
        each = known[arm]
        return each.above / len(each.rates), each.rate.mean if each.bracketed else -math.inf

    best = max(splits, key=order)
    if not known[best].rates.keys() & known[UNIFIED].rates.keys():
        raise DataError(
            f"control_plane: {UNIFIED} and {best} share no seed under the load {mix}; run the whole experiment"
        )
    return best


def _rate_above(frame: pd.DataFrame, mix: str, of: Capacity) -> float:
    """The lowest rate of the grid above that capacity, else the highest there is."""
    rates = sorted(set(frame[(frame["mix"] == mix) & (frame["arm"] == UNIFIED)]["rate"]))
    return float(next((rate for rate in rates if of.bracketed and rate >= of.rate.mean), rates[-1]))


def _same_devices(runs: Runs) -> None:
    """Raises :class:`DataError` unless all arms have the same accelerators."""
    found = {tuple(sorted(f"{d.count} {d.hardware}" for d in run.manifest.devices)): run for run in runs}
    if len(found) > 1:
        (one, a), (other, b), *_ = found.items()
        raise DataError(
            f"{a.folder} and {b.folder}: not the same hardware ({', '.join(one)}; {', '.join(other)}); arms are compared at equal "
            "hardware"
        )


def _cell(each: Capacity) -> str:
    if each.bracketed:
        half = "" if each.rate.n < 2 else f" ±{number((each.rate.high - each.rate.low) / 2, 2)}"
        return f"{number(each.rate.mean)}{half} ({each.between[0]:g} to {each.between[1]:g})"
    return f"below the grid ({each.below} seeds)" if each.below else f"above the grid ({each.above} seeds)"


def _times(value: Interval) -> str:
    """A ratio with its interval, for prose."""
    return f"{number(value.mean)}x{span(value)}"


def _capacity_table(known: Mapping[str, Mapping[str, Capacity]], best: Mapping[str, str]) -> TableOf:
    mixes = [mix for mix in MIXES if mix in known]
    arms = [arm for arm in ABOUT if any(arm in known[mix] for mix in mixes)]
    rows = []
    for arm in arms:
        row = [arm, ABOUT[arm]]
        for mix in mixes:
            each = known[mix].get(arm)
            against = ratio(each, known[mix][best[mix]]) if each else Interval(math.nan, math.nan, math.nan, 0)
            row += ["–" if each is None else _cell(each), "–" if against.n == 0 else number(against.mean)]
        rows.append(row)
    columns = ["arm", "what it is", *(part for mix in mixes for part in (f"{MIXES[mix]}\n(req/s)", f"of {best[mix]}"))]
    return TableOf(
        "capacity",
        f"Goodput capacity with half of its {CONFIDENCE:.0%} interval over seeds, in brackets the rates of the grid around it, and as a "
        "multiple of the best split's.",
        Sheet("Goodput capacity", columns, rows),
    )


def _tuning_table(frame: pd.DataFrame, best: Mapping[str, str]) -> TableOf:
    """Every split at every rate: how the baseline was tuned (requirement 218)."""
    of = frame[frame["arm"].isin(SPLITS)]
    rates = sorted(set(of["rate"]))
    rows = []
    for mix, first in best.items():
        for arm in SPLITS:
            mean = of[(of["mix"] == mix) & (of["arm"] == arm)].groupby("rate")["attainment"].mean()
            cells = [f"{100 * mean[rate]:.1f}" if rate in mean else "–" for rate in rates]
            rows.append([MIXES[mix], f"{arm} (best)" if arm == first else arm, *cells])
    return TableOf(
        "tuning",
        "Grid search of the static split: least SLO attainment of a kind (%), mean over seeds, by offered rate (requests/s).",
        Sheet("How the split was tuned", ["load", "split", *(f"{rate:g}" for rate in rates)], rows),
        core=False,
    )


def _stranded_table(runs: Runs, best: Mapping[str, str], rate: float) -> TableOf:
    """What of the split stood idle while the other part missed its objectives (requirement 7)."""
    rows = []
    for mix, arm in best.items():
        found = [stranded(run) for run in runs.where(lambda m, mix=mix, arm=arm: _is(m, mix, arm, rate))]  # type: ignore[misc]
        for i, (kind, other) in enumerate((("chat", "embed"), ("embedding", "generate"))):
            missed = t_interval([each[i][0] for each in found])
            idle = t_interval([each[i][1] for each in found])
            rows.append(
                [
                    MIXES[mix],
                    arm,
                    kind,
                    "–" if missed.n == 0 else percent(missed.mean),
                    other,
                    "–" if idle.n == 0 else f"{percent(idle.mean)}",
                ]
            )
    return TableOf(
        "stranded",
        f"Stranded capacity of the best split at {rate:g} requests/s: in the stretches of {STRETCH_NS // SECOND} s in which fewer than "
        f"{ATTAINMENT_MIN:.0%} of the requests of a kind met their objectives, how much of the time the other kind's devices had nothing "
        "to do (sampled every second).",
        Sheet(
            "Stranded capacity",
            ["load", "arm", "kind that missed", "stretches", "devices that", "idle meanwhile"],
            rows,
        ),
    )


def stranded(run: Run) -> list[tuple[float, float]]:
    """For chat and for embeddings: share of the stretches in which the kind missed; idle share of the others' replicas then."""
    requests = run.frame("requests", ("kind", "scheduled_ns", "good", "warmup"))
    counted = requests[~requests["warmup"]]
    first, last = int(counted["scheduled_ns"].min()), int(counted["scheduled_ns"].max())
    samples = run.frame("replicas", ("at_ns", "pool", "in_flight"))
    samples = samples[samples["at_ns"].between(first, last)]
    found = []
    for kind, pool in (("chat", "embed"), ("embedding", "llm")):
        of = counted[counted["kind"] == kind]
        mean = of["good"].groupby((of["scheduled_ns"] - first) // STRETCH_NS).mean()
        missed = mean.index[mean < ATTAINMENT_MIN]
        others = samples[(samples["pool"] == pool) & ((samples["at_ns"] - first) // STRETCH_NS).isin(missed)]
        found.append(
            (
                len(missed) / len(mean) if len(mean) else math.nan,
                float((others["in_flight"] == 0).mean()) if len(others) else math.nan,
            )
        )
    return found


def _gain_sentence(mix: str, known: Mapping[str, Capacity], best: str, gain: Interval) -> str:
    if gain.n == 0:
        return f"Under a {MIXES[mix].replace('mix varies', 'varying mix')} the grid does not bracket the capacities: {UNIFIED} {_cell(known[UNIFIED])}, {best} {_cell(known[best])}."
    unified, split = (known[arm].rate.mean for arm in (UNIFIED, best))
    what = "While the mix varies" if mix == "varying" else "Under a constant mix, which a split can be tuned to,"
    said = (
        f"{what} the unified control plane sustains {number(unified)} requests/s with {ATTAINMENT_MIN:.0%} of each kind within "
        f"objectives, the best static split ({best}) {number(split)}: {_times(gain)}"
    )
    ends = {
        "no significant difference": "; that is no significant difference",
        "does not hold": "; the split is better there",
    }
    return f"{said}{ends.get(bounded(gain, least=1.0), '')}."


def _policy_sentences(known: Mapping[str, Mapping[str, Capacity]], best: Mapping[str, str]) -> list[str]:
    """How much of the gain is the policy and how much is sharing the devices."""
    said = []
    for mix, each in known.items():
        policy, sharing = f"{best[mix]}_hybrid", "unified_fifo"
        parts = []
        if policy in each and (found := ratio(each[UNIFIED], each[policy])).n:
            parts.append(f"over the same split with hybrid inside each part it is {_times(found)}")
        if sharing in each and (found := ratio(each[UNIFIED], each[sharing])).n:
            parts.append(f"over fifo on the same shared devices {_times(found)}")
        if parts:
            said.append(f"Where it comes from ({MIXES[mix]}): {', '.join(parts)}.")
    return said


def _vllm_only(known: Mapping[str, Mapping[str, Capacity]]) -> list[str]:
    each = known["varying"].get("vllm_only")
    if each is None:
        return []
    if not each.bracketed:
        return [f"vLLM alone, with embeddings on the clients' CPUs: {_cell(each)}."]
    return [
        f"vLLM alone, with embeddings on sixteen vCPUs for each GPU on the clients' side, sustains {number(each.rate.mean)} requests/s of "
        "this mix: CPUs are no place for these documents."
    ]


def differences(by_mix: Mapping[str, pd.DataFrame], best: Mapping[str, str]) -> pd.DataFrame:
    """Attainment of unified less that of the best split, at every rate of every mix: the columns of
    :func:`sage_bench.metrics.compare.against`, adjusted over all of them, and mix and rate."""
    tables = {
        (mix, rate): part[(part["rate"] == rate) & part["arm"].isin((UNIFIED, best[mix]))].pivot_table(
            index="seed", columns="arm", values="attainment"
        )
        for mix, part in by_mix.items()
        for rate in sorted(set(part["rate"]))
    }
    places = {f"{mix} {rate:g}": (mix, rate) for mix, rate in tables}
    found = against({name: tables[place] for name, place in places.items()}, UNIFIED)
    mixes, rates = zip(*(places[name] for name in found["cell"]), strict=True)
    return found.assign(mix=mixes, rate=rates)


def _nowhere(mix: str, found: pd.DataFrame, best: str) -> str:
    """Up to which rate the two do not differ significantly in attainment."""
    rates = sorted(found["rate"])
    differs = sorted(found.loc[found["verdict"].isin(("better", "worse")), "rate"])
    label = MIXES[mix]
    if (found["verdict"] == "too few seeds").all():
        return f"{label}: too few seeds to say where {UNIFIED} and {best} differ."
    if not differs:
        return f"{label}: at no rate up to {rates[-1]:g} requests/s do {UNIFIED} and {best} differ significantly."
    below = [rate for rate in rates if rate < differs[0]]
    if not below:
        return f"{label}: {UNIFIED} and {best} differ already at the lowest rate, {rates[0]:g} requests/s."
    return f"{label}: up to {below[-1]:g} requests/s it makes no significant difference whether devices are shared or split ({best})."


def _claims(
    runs: Runs, known: Mapping[str, Mapping[str, Capacity]], best: Mapping[str, str], gains: Mapping[str, Interval]
) -> list[Claim]:
    claims = []
    for mix, least, id, asked in (
        (
            "varying",
            GAIN,
            "capacity-varying",
            f"unified over the best static split while the mix varies, at least {GAIN}x of goodput capacity",
        ),
        (
            "constant",
            1.0,
            "capacity-constant",
            "unified over the best static split under a constant, known mix: how small the gain is",
        ),
    ):
        gain = gains.get(mix, Interval(math.nan, math.nan, math.nan, 0))
        if gain.n == 0:
            claims.append(Claim(id, 225, asked, "the rates do not bracket the capacities", "not measured", ()))
            continue
        text = f"{_times(gain)} of {best[mix]}, {gain.n} seeds"
        claims.append(Claim(id, 225, asked, text, bounded(gain, least=least), evidence(runs)))
        if mix == "varying":
            more = f"{percent(gain.mean - 1)} more load within objectives than {best[mix]}"
            claims.append(
                Claim(
                    "more-load",
                    270,
                    "sustains [Y] % more throughput before saturation",
                    more,
                    bounded(gain, least=1.0),
                    evidence(runs),
                )
            )
    return claims


def _point_claims(runs: Runs, measured: pd.DataFrame, found: pd.DataFrame, best: str, rate: float) -> list[Claim]:
    """At the rate just above the split's capacity: p99 and attainment."""
    one, two = (at(measured, "chat", mix="varying", rate=rate, policy=arm) for arm in (best, UNIFIED))
    asked = "reduces p99 latency against the baseline under mixed load"
    factor = relative(one, two, "ttft_ns_p99")
    if factor.n == 0:
        claims = [Claim("p99-mixed", 257, asked, "too few chats in a run for a p99", "not measured", ())]
    else:
        text = f"{number(factor.mean)}x that of {best}{span(factor)}"
        if factor.mean < 1:
            less = Interval(1 - factor.mean, 1 - factor.high, 1 - factor.low, factor.n)
            text = f"{percent(less.mean)}{span(less, 0.01)} lower than with {best}"
        where = f"at {rate:g} requests/s of a mix that varies"
        claims = [
            Claim(
                "p99-mixed", 257, asked, f"p99 TTFT of chat {text} {where}", bounded(factor, most=1.0), evidence(runs)
            )
        ]
    row = found[(found["mix"] == "varying") & (found["rate"] == rate)].iloc[0]
    text = f"{percent(row['ours'])} against {percent(row['theirs'])} with {best} at {rate:g} requests/s (the kind served worse)"
    claims.append(
        Claim(
            "slo-mixed",
            259,
            "achieves a higher SLO attainment than the baseline",
            text,
            decided(row["difference"] > 0, row["p_adjusted"] <= 1 - CONFIDENCE),
            evidence(runs),
        )
    )
    return claims


def _throughput_claim(runs: Runs, measured: pd.DataFrame, unified: Capacity, gain: Interval) -> Claim:
    """The gain, and the latency of chat at the highest rate of the grid that the unified plane sustains."""
    asked = "improves throughput by [Y]x while p95 stays below [Z] ms"
    if gain.n == 0:
        return Claim("throughput-p95", 258, asked, "the rates do not bracket the capacities", "not measured", ())
    rate = unified.between[0]
    p95 = mean(at(measured, "chat", mix="varying", rate=rate, policy=UNIFIED), "ttft_ns_p95")
    text = f"{_times(gain)} the goodput capacity; at {rate:g} requests/s p95 TTFT of chat is {number(p95.mean / MILLISECOND)} ms"
    return Claim(
        "throughput-p95", 258, asked, f"{text}{span(p95, MILLISECOND)}", bounded(gain, least=1.0), evidence(runs)
    )


def _live(of: Sides) -> list[TableOf]:
    return side_by_side(
        "live",
        of,
        _where,
        {"mix": "load", "rate": "rate\n(req/s)"},
        (
            ("slo_attainment", ALL),
            ("slo_attainment", "chat"),
            ("slo_attainment", "embedding"),
            ("ttft_ns_p95", "chat"),
            ("e2e_ns_p95", "embedding"),
        ),
    )


def live_claims(of: Sides) -> list[Claim]:
    """The same sign live: attainment of the unified pair of devices less that of the split pair, both ways, over the points and
    seeds that ran both ways."""
    asked = "the same sign live, on emulated engines at a reduced size"
    if not len(of.live) or not len(of.twins):
        return [Claim("capacity-live", 225, asked, "no live run: `sage paper --size live`", "not measured", ())]
    by_place = [_pair_differences(_attainments(list(runs))) for runs in (of.twins, of.live)]
    shared = by_place[0].index.intersection(by_place[1].index)
    if shared.empty:
        return [Claim("capacity-live", 225, asked, "no point and seed ran on both sides", "not measured", ())]
    simulated, live = (t_interval(each[shared].groupby("seed").mean().tolist()) for each in by_place)
    signs = {bounded(each, least=0.0) for each in (simulated, live)}
    outcome: Outcome = "holds" if len(signs) == 1 else "does not hold"
    if "no significant difference" in signs:
        outcome = "no significant difference"
    sides = "; ".join(
        f"{name} {100 * each.mean:+.1f} points{span(each, 0.01)}"
        for name, each in (("simulated", simulated), ("live", live))
    )
    text = f"least SLO attainment of a kind, unified less split, on two devices: {sides}"
    return [Claim("capacity-live", 225, asked, text, outcome, evidence(of.live))]


def _pair_differences(frame: pd.DataFrame) -> pd.Series[float]:
    """Of unified and split pairs of devices, by rate and seed; empty where an arm has no run."""
    table = frame.groupby(["rate", "seed", "arm"])["attainment"].mean().unstack("arm")
    both = table.reindex(columns=list(PAIRS)).dropna()
    values: pd.Series[float] = both[PAIRS[0]] - both[PAIRS[1]]
    return values


CONTROL_PLANE = Study(
    name="control_plane",
    section="5.2",
    title="Control plane: unified or split",
    question="What does one control plane for chat and embeddings gain over two services with a static split of the same devices?",
    experiments=("control_plane", "control_plane_vllm_only"),
    findings=findings,
    live=("control_plane",),
    baselines=(UNIFIED, PAIRS[0]),
)
