"""Everything a report says about a folder of runs, as tables of numbers.

Only complete runs whose load generator kept up are compared; a folder that has none is summarised as it is, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sage_bench.metrics.compare import Condition, conditions, means, measured, verdicts
from sage_bench.metrics.definitions import LATENCIES
from sage_bench.metrics.energy import energy
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.percentile import P99_SAMPLES_MIN
from sage_bench.metrics.saturation import Saturation, flow, saturation
from sage_bench.metrics.statistics import SEEDS_MIN
from sage_bench.results.reader import Runs


@dataclass(frozen=True, slots=True)
class Sweep:
    """One curve per policy over the rates of an experiment."""

    experiment: str
    source: str
    label: str
    conditions: list[Condition]
    points: dict[str, Saturation]


@dataclass(frozen=True, slots=True)
class Summary:
    """rows, means, verdicts: see :mod:`sage_bench.metrics.compare`. notes: what a reader must know, a sentence each."""

    conditions: list[Condition]
    rows: pd.DataFrame
    means: pd.DataFrame
    verdicts: pd.DataFrame
    sweeps: list[Sweep]
    notes: list[str]


def summarise(runs: Runs, baseline: str | None = None) -> Summary:
    """Measure and compare ``runs``. Raises :class:`DataError`, and :class:`ConfigError` for an unknown ``baseline``."""
    notes = []
    kept = runs.where(lambda m: m.status == "complete" and not m.invalid)
    for run in runs.where(lambda m: m.status != "complete"):
        left_out = "left out" if len(kept) else "partial"
        notes.append(f"{run.folder}: {run.manifest.status}, {left_out}")
    for run in runs.where(lambda m: m.status == "complete" and bool(m.invalid)):
        left_out = "left out" if len(kept) else "its latencies are the load generator's as much as the system's"
        notes.append(f"{run.folder}: INVALID ({'; '.join(run.manifest.invalid)}), {left_out}")
    found = conditions(kept if len(kept) else runs, baseline)
    used = sum(len(members) for each in found for members in each.arms.values())
    if repeated := len(kept if len(kept) else runs) - used:
        notes.append(
            f"{repeated} simulations repeat others (same configuration, policy and seed); the latest of each is used"
        )
    few = min(len({run.manifest.seed for run in arm}) for each in found for arm in each.arms.values())
    if few < SEEDS_MIN:
        notes.append(f"some policies ran with {few} seed{'s' if few > 1 else ''}; {SEEDS_MIN} or more are advised")
    notes.extend(_same_decisions(found))
    rows = measured(found)
    whole = rows[rows["tenant"] == ALL]
    if any((whole[f"{name}_p99"].isna() & whole[f"{name}_samples"].gt(0)).any() for name in LATENCIES):
        notes.append(f"a p99 needs {P99_SAMPLES_MIN} samples in a run; where there are fewer, none is given")
    notes.extend(_expense_notes(found))
    return Summary(found, rows, means(rows), verdicts(rows), _sweeps(found), notes)


def _expense_notes(found: Sequence[Condition]) -> list[str]:
    """Why some runs have no energy or cost, and what energy rests on."""
    manifests = [run.manifest for each in found for arm in each.arms.values() for run in arm]
    reasons = dict.fromkeys(why for each in manifests for why in energy(each).unknown)
    notes = [f"energy is not known: {why}" for why in reasons]
    devices = [device for each in manifests for device in each.devices]
    estimated = sorted({str(each.hardware) for each in devices if each.power is not None and not each.power.measured})
    if estimated and not reasons:
        notes.append(
            f"energy: the busy power of {', '.join(estimated)} is taken over from other devices (see the manifest)"
        )
    if any(each.price_per_h is None for each in manifests):
        notes.append("cost is not known: not every device has a price_per_h (cluster.devices)")
    return notes


def _same_decisions(found: Sequence[Condition]) -> list[str]:
    """Policies that a condition cannot tell apart: every run has the same digest, so they decided alike."""
    notes = []
    for each in found:
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, arm in each.arms.items():
            alike.setdefault(tuple(sorted(run.manifest.digest for run in arm)), []).append(name)
        for names in alike.values():
            if len(names) > 1:
                where = f" ({each.label})" if each.label else ""
                notes.append(
                    f"{', '.join(names)} made the same decisions throughout{where}: this load cannot tell them apart"
                )
    return notes


def _sweeps(found: Sequence[Condition]) -> list[Sweep]:
    groups: dict[tuple[str, str, str], list[Condition]] = {}
    for each in found:
        if each.rate is not None:
            groups.setdefault((each.experiment, each.source, each.sweep), []).append(each)
    sweeps = []
    for (experiment, source, label), members in groups.items():
        if len({each.rate for each in members}) < 2:
            continue
        points = {}
        for policy in dict.fromkeys(name for each in members for name in each.arms):
            flows = {
                each.rate: [flow(run) for run in each.arms[policy]]
                for each in members
                if each.rate is not None and policy in each.arms
            }
            points[policy] = saturation(flows)
        sweeps.append(Sweep(experiment, source, label, members, points))
    return sweeps
