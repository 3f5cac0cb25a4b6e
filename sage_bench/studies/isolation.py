"""5.3: what a batch tenant that floods in bursts does to an interactive one, with isolation, without, and alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.latency_cdf import latency_cdf
from sage_bench.figures.timeline import timeline
from sage_bench.metrics.measure import ALL, measure
from sage_bench.metrics.percentile import percentile
from sage_bench.metrics.statistics import CONFIDENCE, Interval, t_interval
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, bounded, number, percent
from sage_bench.studies.points import arm_of, refuse_two_configurations, span
from sage_bench.studies.study import Experiments, Study, evidence
from sage_bench.studies.twins import side_by_side, sides
from sage_bench.tables import Sheet
from sage_core.errors import DataError
from sage_core.units import MILLISECOND, SECOND

SLOWDOWN_MAX: Final = 1.2
"""Of the interactive tenant's p99 TTFT against being alone, asked for with isolation."""

BATCH_MIN: Final = 0.9
"""Of the batch tenant's throughput without isolation, asked for with it."""

SOLO: Final = "solo"
WITH: Final = "reserved"
WITHOUT: Final = "fifo"

ABOUT: Final = {
    SOLO: "interactive tenant alone",
    WITH: "hybrid, most places kept for urgent work, few batch prompts in an engine",
    "hybrid": "hybrid as shipped: objectives, classes, fairness, a tenth of the places kept",
    "hybrid_blind": "hybrid less what tells tenants apart",
    "priority": "strict priority in the queue",
    WITHOUT: "none: first come, first served",
    "round_robin": "none: a router that takes turns",
}

TIMELINE_S: Final = 3.0
TIMELINE_ROWS: Final = 40

INTERACTIVE: Final = "interactive"
BATCH: Final = "batch"


def findings(experiments: Experiments) -> Findings:
    of = sides(experiments, "isolation")
    frame = _frame(of.sweep)
    arms = [arm for arm in ABOUT if arm in set(frame["arm"])]
    missing = [arm for arm in (SOLO, WITH, WITHOUT) if arm not in arms]
    if missing:
        raise DataError(f"isolation: no run of {', '.join(missing)}; run the whole experiment")
    seeds = frame["seed"].nunique()
    slow = {arm: _ratio(frame, arm, SOLO, "ttft_p99") for arm in arms}
    mean_slow = {arm: _ratio(frame, arm, SOLO, "e2e_mean") for arm in arms}
    batch = {arm: _ratio(frame, arm, WITHOUT, "batch_rps") for arm in arms if arm != SOLO}
    rows = [
        [
            arm,
            ABOUT[arm],
            _ms(frame, arm, "ttft_p99"),
            _cell(slow[arm]),
            _cell(mean_slow[arm]),
            f"{100 * _mean(frame, arm, 'slo'):.1f}",
            "–" if arm == SOLO else _cell(batch[arm]),
            "–" if arm == SOLO else number(_mean(frame, arm, "batch_e2e_p95") / SECOND),
            "–" if arm == SOLO else number(_mean(frame, arm, "jain_slo")),
        ]
        for arm in arms
    ]
    columns = [
        "arm",
        "isolation",
        "TTFT p99\n(ms)",
        "of solo",
        "E2E mean\nof solo",
        "SLO\n(%)",
        f"batch served\nof {WITHOUT}",
        "batch E2E\np95 (s)",
        "Jain SLO",
    ]
    shown = (SOLO, WITH, WITHOUT)
    return Findings(
        tables=[
            TableOf(
                "isolation",
                f"The interactive tenant's chats, and what the batch tenant gets: served is what was answered before the load ended. "
                f"Means of {seeds} seeds with half of the {CONFIDENCE:.0%} interval; ratios are taken seed by seed.",
                Sheet("Interference of tenants", columns, rows),
            ),
            *side_by_side("live", of, _nothing, {}),
        ],
        figures=[
            Drawing(
                "latency_cdf",
                f"Interactive chats (above) and batch generations (below), alone, with isolation ({WITH}) and without ({WITHOUT}); "
                f"{seeds} seeds. Simulated.",
                lambda: latency_cdf(
                    {arm: list(of.sweep.where(lambda m, arm=arm: arm_of(m) == arm)) for arm in shown},  # type: ignore[misc]
                    [("chat", "ttft_ns"), ("generate", "e2e_ns")],
                ),
            ),
            Drawing(
                "timeline",
                f"The same requests with isolation ({WITH}) and without ({WITHOUT}), of one seed: {TIMELINE_S:g} s around the chat that waited "
                f"longest under {WITHOUT}, a line a request, {TIMELINE_ROWS} evenly picked. Simulated.",
                lambda: _timeline(of.sweep),
            ),
        ],
        sentences=_sentences(frame, slow, batch),
        claims=_claims(of.sweep, frame, slow, batch),
        nowhere=_nowhere(frame, arms),
        fairness=[
            "The interactive requests are the same in every arm, instant by instant: their classes have arrivals and contents of their own.",
            f"{SOLO} has the same devices; it lacks the batch tenant and nothing else.",
            f"{WITH} is hybrid with two parameters set for isolation (reserve, prefill_depth), found by trying on this load; hybrid as shipped "
            "is beside it.",
        ],
    )


def _timeline(runs: Runs) -> Figure:
    """Of the lowest seed that both arms have."""
    pair = [{run.manifest.seed: run for run in runs if arm_of(run.manifest) == arm} for arm in (WITH, WITHOUT)]
    shared = sorted(pair[0].keys() & pair[1].keys())
    if not shared:
        raise DataError(f"isolation: {WITH} and {WITHOUT} share no seed; run the whole experiment")
    kept, damaged = (of[shared[0]] for of in pair)
    chats = damaged.frame("requests", ("kind", "scheduled_ns", "dispatched_ns", "warmup"))
    chats = chats[(chats["kind"] == "chat") & ~chats["warmup"]]
    waited = (chats["dispatched_ns"] - chats["scheduled_ns"]).to_numpy()
    longest = int(chats["scheduled_ns"].to_numpy()[np.nanargmax(waited)])
    return timeline({WITH: kept, WITHOUT: damaged}, longest / SECOND - TIMELINE_S / 2, TIMELINE_S, TIMELINE_ROWS)


def _nothing(manifest: Manifest) -> Mapping[str, Any]:
    return {}


def _frame(runs: Runs) -> pd.DataFrame:
    """A row a run: arm, seed, and of the interactive tenant's chats ttft_p99, e2e_mean (ns) and slo; batch_rps answered before the load
    ended, batch_e2e_p95 (ns); jain_slo of the tenants. Raises :class:`DataError` as :func:`refuse_two_configurations` does."""
    refuse_two_configurations(runs, _nothing)
    return pd.DataFrame([_row(run) for run in runs])


def _row(run: Run) -> dict[str, Any]:
    table = measure(run)
    chat = table[(table["kind"] == "chat") & (table["tenant"] == INTERACTIVE)]
    if chat.empty:
        raise DataError(f"{run.folder}: no chat of a tenant {INTERACTIVE!r}; it is not a run of this experiment")
    whole = table[(table["kind"] == ALL) & (table["tenant"] == ALL)].iloc[0]
    requests = run.frame("requests", ("tenant", "kind", "scheduled_ns", "ended_ns", "outcome", "warmup", "e2e_ns"))
    first, last = (requests.loc[~requests["warmup"], "scheduled_ns"].agg(end) for end in ("min", "max"))
    batch = requests[requests["tenant"] == BATCH]
    served = (batch["outcome"] == "responded") & batch["ended_ns"].between(first, last)
    long = batch.loc[~batch["warmup"] & (batch["kind"] == "generate"), "e2e_ns"].dropna()
    return {
        "arm": arm_of(run.manifest),
        "seed": run.manifest.seed,
        "ttft_p99": float(chat["ttft_ns_p99"].iloc[0]),
        "e2e_mean": float(chat["e2e_ns_mean"].iloc[0]),
        "slo": float(chat["slo_attainment"].iloc[0]),
        "batch_rps": np.count_nonzero(served) / ((last - first) / SECOND),
        "batch_e2e_p95": percentile(long.to_numpy(), 0.95),
        "jain_slo": float(whole["jain_slo"]),
    }


def _of(frame: pd.DataFrame, arm: str, column: str) -> pd.Series[float]:
    values: pd.Series[float] = frame[frame["arm"] == arm].groupby("seed")[column].mean()
    return values


def _mean(frame: pd.DataFrame, arm: str, column: str) -> float:
    return float(_of(frame, arm, column).mean())


def _ratio(frame: pd.DataFrame, arm: str, other: str, column: str) -> Interval:
    return t_interval((_of(frame, arm, column) / _of(frame, other, column)).dropna().tolist())


def _ms(frame: pd.DataFrame, arm: str, column: str) -> str:
    value = t_interval((_of(frame, arm, column) / MILLISECOND).tolist())
    return number(value.mean) if value.n < 2 else f"{number(value.mean)} ±{number((value.high - value.low) / 2, 2)}"


def _cell(value: Interval) -> str:
    if value.n == 0:
        return "–"
    return number(value.mean) if value.n < 2 else f"{number(value.mean)} ±{number((value.high - value.low) / 2, 2)}"


def _sentences(frame: pd.DataFrame, slow: Mapping[str, Interval], batch: Mapping[str, Interval]) -> list[str]:
    alone, without, within = (_mean(frame, arm, "ttft_p99") / MILLISECOND for arm in (SOLO, WITHOUT, WITH))
    kept = slow[WITH].mean <= SLOWDOWN_MAX
    said = [
        f"Alone, the interactive tenant's chats have a p99 TTFT of {number(alone)} ms. Beside the batch tenant and without isolation "
        f"({WITHOUT}) it is {number(without)} ms, {number(slow[WITHOUT].mean)}x{span(slow[WITHOUT])}; with isolation ({WITH}) "
        f"{number(within)} ms, {number(slow[WITH].mean)}x{span(slow[WITH])}"
        f"{'' if kept else f', which is more than the {SLOWDOWN_MAX}x asked for'}.",
        f"The batch tenant is then served {percent(batch[WITH].mean)} of what it gets without isolation, and pays in time: p95 E2E of "
        f"its generations {number(_mean(frame, WITH, 'batch_e2e_p95') / SECOND)} s instead of "
        f"{number(_mean(frame, WITHOUT, 'batch_e2e_p95') / SECOND)} s.",
    ]
    others = [arm for arm in slow if arm not in (SOLO, WITH, WITHOUT)]
    if others:
        said.append("Other arms: " + ", ".join(f"{arm} {number(slow[arm].mean)}x of solo" for arm in others) + ".")
    return said


def _claims(
    runs: Runs, frame: pd.DataFrame, slow: Mapping[str, Interval], batch: Mapping[str, Interval]
) -> list[Claim]:
    damage = _mean(frame, WITHOUT, "ttft_p99") / MILLISECOND
    share = _mean(frame, WITH, "slo")
    worse = _ratio(frame, WITHOUT, WITH, "ttft_p99")
    return [
        Claim(
            "isolation-latency",
            226,
            f"interactive p99 TTFT within {SLOWDOWN_MAX}x of solo with isolation",
            f"{number(slow[WITH].mean)}x of solo{span(slow[WITH])}",
            bounded(slow[WITH], most=SLOWDOWN_MAX),
            evidence(runs),
        ),
        Claim(
            "isolation-batch",
            226,
            f"batch throughput at least {percent(BATCH_MIN, 0)} of that without isolation",
            f"{percent(batch[WITH].mean)} of {WITHOUT}{span(batch[WITH], 0.01)}",
            bounded(batch[WITH], least=BATCH_MIN),
            evidence(runs),
        ),
        Claim(
            "isolation-damage",
            271,
            "without isolation p99 rises to [A] ms",
            f"p99 TTFT of the interactive tenant {number(damage)} ms under {WITHOUT}, {number(slow[WITHOUT].mean)}x of solo{span(slow[WITHOUT])}",
            bounded(slow[WITHOUT], least=1.0),
            evidence(runs),
        ),
        Claim(
            "fifo-degrades",
            267,
            "an insight, such as FIFO degrades p99 by [C]x",
            f"{WITHOUT} makes the interactive p99 TTFT {number(worse.mean)}x that of {WITH} on the same requests{span(worse)}",
            bounded(worse, least=1.0),
            evidence(runs),
        ),
        Claim(
            "isolation-interference",
            143,
            "slowdown of a tenant by another, measured",
            f"p99 TTFT {number(slow[WITHOUT].mean)}x without isolation and {number(slow[WITH].mean)}x with it; SLO attainment with it "
            f"{percent(share)}, without {percent(_mean(frame, WITHOUT, 'slo'))}",
            bounded(slow[WITHOUT], least=1.0),
            evidence(runs),
        ),
    ]


def _nowhere(frame: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    """Whom isolation gives nothing."""
    jain = {arm: _mean(frame, arm, "jain_slo") for arm in arms if arm != SOLO}
    blind = "hybrid_blind"
    said = [
        f"Jain index over the tenants of SLO attainment: {', '.join(f'{arm} {number(value)}' for arm, value in jain.items())}."
    ]
    if blind in arms:
        found = _ratio(frame, "hybrid", blind, "ttft_p99")
        if found.n > 1 and found.low <= 1 <= found.high:
            said.append(
                f"Classes, fairness and kept places make no significant difference to the interactive p99 TTFT here ({number(found.mean)}x"
                f"{span(found)}): objectives alone tell the two tenants apart."
            )
    return said


ISOLATION = Study(
    name="isolation",
    section="5.3",
    title="Isolation: interactive beside batch",
    question="How much does a batch tenant slow an interactive one down, and what does keeping them apart cost the batch tenant?",
    experiments=("isolation",),
    findings=findings,
    live=("isolation",),
    references=(SOLO,),
)
