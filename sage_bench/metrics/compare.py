"""Runs side by side: which of them are arms of one comparison, their means over seeds, and who is better.

Runs of one experiment and source that share ``config_hash`` (everything but seed and policy, and what their configuration
says that arms differ in) form a *condition*; its *arms* are policies, or what ``arm.name`` says. A simulation repeated with the same configuration, policy and seed says nothing
new, so the latest stands for all of them; a live run repeated is another measurement and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import pandas as pd

from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL, CLASS, measure
from sage_bench.metrics.statistics import effect_size, holm, paired, t_interval, verdict
from sage_bench.results.manifest import Manifest, config_hash
from sage_bench.results.reader import Run, Runs
from sage_core.errors import ConfigError

BASELINES: Final = ("fifo", "hybrid")
"""The arm that others are held against: the first of these that is there, else the first by name."""

COMPARED: Final = (
    ("slo_attainment", ALL),
    ("goodput_rps", ALL),
    ("ttft_ns_p95", "chat"),
    ("e2e_ns_p95", "chat"),
    ("e2e_ns_p95", "generate"),
    ("e2e_ns_p95", "embedding"),
)
"""(metric, kind) of the verdicts. Few on purpose: each comparison more makes every other less certain."""

_ARM: Final = ["experiment", "condition", "source", "rate", "policy"]


@dataclass(frozen=True, slots=True)
class Condition:
    """Runs that differ in nothing but policy and seed.

    label: the overrides that tell it from others, "" if none. rate: nominal, requests/s. arms: runs by the arm's name, else
    the policy's label; the baseline first.
    """

    experiment: str
    label: str
    source: str
    rate: float | None
    arms: dict[str, list[Run]]

    @property
    def sweep(self) -> str:
        """The label less the rate: conditions that share it are points of one curve."""
        return " ".join(each for each in self.label.split(" ") if not each.startswith("load.rate="))


def conditions(runs: Runs, baseline: str | None = None) -> list[Condition]:
    """The conditions among ``runs``, by experiment, rate and label. baseline: an arm, instead of :data:`BASELINES`.

    Raises :class:`ConfigError` if no condition has that arm.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in _latest(runs):
        m = run.manifest
        groups.setdefault((m.experiment, m.source, m.config_hash), []).append(run)
    labels: dict[tuple[str, str, str], int] = {}
    for key, members in groups.items():
        name = (key[0], key[1], _condition(members[0].manifest))
        labels[name] = labels.get(name, 0) + 1
    found = []
    for (experiment, source, digest), members in groups.items():
        label = _condition(members[0].manifest)
        if labels[experiment, source, label] > 1:
            label = f"{label} #{digest[:6]}".strip()
        arms = Runs(members).by(_arm_labels(members))
        first = next((name for name in (baseline, *BASELINES) if name in arms), None)
        order = sorted(arms, key=lambda name: (name != first, name))
        found.append(
            Condition(
                experiment, label, source, members[0].manifest.load.rate, {name: list(arms[name]) for name in order}
            )
        )
    if baseline is not None and not any(baseline in condition.arms for condition in found):
        known = sorted({name for condition in found for name in condition.arms})
        raise ConfigError(f"baseline: no run of policy {baseline!r}; expected one of {', '.join(known)}")
    return sorted(found, key=lambda c: (c.experiment, c.source, -1.0 if c.rate is None else c.rate, c.label))


def measured(found: Sequence[Condition]) -> pd.DataFrame:
    """``measure`` of every run, one row per run and class, with the columns experiment, condition, source, rate, policy,
    seed and run_id in front."""
    frames = []
    for condition in found:
        for policy, members in condition.arms.items():
            for run in members:
                frame = measure(run)
                facts = (condition.experiment, condition.label, condition.source, condition.rate, policy)
                for i, (name, fact) in enumerate(zip(_ARM, facts, strict=True)):
                    frame.insert(i, name, fact)
                frame.insert(len(_ARM), "seed", run.manifest.seed)
                frame.insert(len(_ARM) + 1, "run_id", run.manifest.run_id)
                frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval over the runs of each arm and class: columns of the arm, :data:`CLASS`, metric, mean, low, high, n.

    rows: of :func:`measured`. A class that some runs of an arm do not have is averaged over those that do.
    """
    out = []
    for key, part in rows.groupby([*_ARM, *CLASS], sort=False, dropna=False):
        for metric in METRICS:
            if metric in part.columns:
                interval = t_interval(part[metric].tolist())
                if interval.n:
                    out.append((*key, metric, *interval))
    return pd.DataFrame(out, columns=[*_ARM, *CLASS, "metric", "mean", "low", "high", "n"])


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """Each arm against the first of its condition, paired by seed, adjusted over all verdicts of the condition.

    rows: of :func:`measured`. Columns: experiment, condition, source, rate, policy, baseline, kind, metric, seeds,
    difference, low, high, effect (of ``statistics.effect_size``), p_adjusted, verdict.
    """
    out = []
    whole = rows[(rows["tenant"] == ALL) & (rows["priority"] == ALL)]
    for key, part in whole.groupby(["experiment", "condition", "source", "rate"], sort=False, dropna=False):
        baseline, *others = part["policy"].unique()
        for metric, kind in COMPARED:
            of = part[part["kind"] == kind]
            if of.empty or of[metric].isna().all():
                continue
            # Several live runs of one seed are one observation of that seed.
            table = of.pivot_table(index="seed", columns="policy", values=metric, aggfunc="mean", dropna=False)
            for policy in others:
                if policy not in table or baseline not in table:
                    continue
                shared = table[[baseline, policy]].dropna()
                result = paired(shared[baseline].tolist(), shared[policy].tolist())
                d = result.difference
                effect = effect_size(shared[baseline].tolist(), shared[policy].tolist())
                out.append((*key, policy, baseline, kind, metric, d.n, d.mean, d.low, d.high, effect, result.p))
    names = ["experiment", "condition", "source", "rate", "policy", "baseline", "kind", "metric", "seeds"]
    frame = pd.DataFrame(out, columns=[*names, "difference", "low", "high", "effect", "p_adjusted"])
    for index in frame.groupby(names[:4], sort=False, dropna=False).groups.values():
        frame.loc[index, "p_adjusted"] = holm(frame.loc[index, "p_adjusted"].tolist())
    frame["verdict"] = [
        verdict(difference, p, METRICS[metric].better or "higher")
        for metric, difference, p in zip(frame["metric"], frame["difference"], frame["p_adjusted"], strict=True)
    ]
    return frame


def against(cells: Mapping[str, pd.DataFrame], arm: str, better: Literal["higher", "lower"] = "higher") -> pd.DataFrame:
    """``arm`` less every other arm in every cell, paired by seed, adjusted over all of them.

    cells: by name, (seeds x arms) of one metric; a seed that an arm lacks does not count for it. Columns: cell, other, ours,
    theirs (means over the shared seeds), seeds, difference, low, high, effect, p_adjusted, verdict (of ``arm``).
    """
    rows = []
    for cell, table in cells.items():
        for other in table.columns:
            if other == arm or arm not in table:
                continue
            shared = table[[other, arm]].dropna()
            theirs, ours = shared[other].tolist(), shared[arm].tolist()
            found = paired(theirs, ours)
            d = found.difference
            means = (float(shared[arm].mean()), float(shared[other].mean()))
            rows.append((cell, other, *means, d.n, d.mean, d.low, d.high, effect_size(theirs, ours), found.p))
    names = ["cell", "other", "ours", "theirs", "seeds", "difference", "low", "high", "effect", "p_adjusted"]
    frame = pd.DataFrame(rows, columns=names)
    frame["p_adjusted"] = holm(frame["p_adjusted"].tolist())
    frame["verdict"] = [
        verdict(difference, p, better) for difference, p in zip(frame["difference"], frame["p_adjusted"], strict=True)
    ]
    return frame


def against_best(
    cells: Mapping[str, pd.DataFrame], arm: str, better: Literal["higher", "lower"] = "higher"
) -> pd.DataFrame:
    """:func:`against` the one other arm that is best in its cell on average: one row a cell, adjusted over the cells.

    The other is chosen on the seeds it is then held against, which favours it.
    """
    kept = {}
    for cell, table in cells.items():
        others = table.drop(columns=arm, errors="ignore").mean()
        if arm in table and len(others.dropna()):
            best = others.idxmax() if better == "higher" else others.idxmin()
            kept[cell] = table[[arm, best]]
    return against(kept, arm, better)


def _condition(manifest: Manifest) -> str:
    """The overrides that make it, less those that all its runs share or may differ in."""
    differs_in = manifest.config.get("arm", {}).get("differs_in", ())
    dropped = ["policy=", "policy.", "seed=", "experiment=", "results=", "arm=", "arm."]
    dropped += [f"{key}{end}" for key in differs_in for end in "=."]
    return " ".join(sorted(each for each in manifest.overrides if not each.lstrip("+~").startswith(tuple(dropped))))


def _arm_labels(members: Sequence[Run]) -> Callable[[Manifest], str]:
    """The arm's own name; else policy name and overridden parameters, and a digest where that does not tell two policies
    apart."""

    def label(m: Manifest) -> str:
        if name := m.config.get("arm", {}).get("name"):
            return str(name)
        changed = [
            each.lstrip("+~").removeprefix("policy.") for each in m.overrides if each.lstrip("+~").startswith("policy.")
        ]
        return f"{m.policy.name}[{','.join(sorted(changed))}]" if changed else m.policy.name

    meant: dict[str, set[str]] = {}
    for run in members:
        meant.setdefault(label(run.manifest), set()).add(_policy_hash(run.manifest))
    return lambda m: label(m) if len(meant[label(m)]) == 1 else f"{label(m)} #{_policy_hash(m)[:6]}"


def _policy_hash(manifest: Manifest) -> str:
    policy = manifest.policy
    return config_hash({"name": policy.name, "parameters": policy.parameters})


def _latest(runs: Runs) -> list[Run]:
    """All runs but those that a later one repeats exactly; in the order of their folders."""
    kept: dict[tuple[str, ...], Run] = {}
    for run in runs:
        m = run.manifest
        # Not config_hash alone: arms of one condition may differ in more than their policy.
        whole = config_hash({"all": {key: value for key, value in m.config.items() if key != "results"}})
        same = (m.experiment, m.source, m.config_hash, whole, _policy_hash(m), str(m.seed))
        key = same if m.source == "simulation" else (*same, m.run_id)
        if key not in kept or kept[key].manifest.timing.started_at <= m.timing.started_at:
            kept[key] = run
    return list(kept.values())
