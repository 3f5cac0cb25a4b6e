"""Do due times of stages by the critical path matter? Both arms on the same requests, seed by seed.

Questions go through ``pipeline=rag`` and share one embedding engine with documents (``experiment=deadlines``). One arm has
``pipeline.deadlines=critical_path``: the embedding of a question is due when the predicted rest of its answer must begin. In
the other every stage is due when the request is. Three loads: documents that are wanted soon; the same of a tenant of their
own, which hybrid's fairness tells apart; and documents that may wait. Simulated, so the only noise is that of the load; arms
of a seed see the same load. Prints paired differences and verdicts; writes ``results/bench/deadlines.json`` and a figure.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from sage_bench.config import composed
from sage_bench.figures.paired_differences import paired_differences
from sage_bench.figures.style import save
from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL, measure
from sage_bench.metrics.statistics import Interval, holm, paired, t_interval, verdict
from sage_bench.results.reader import Run
from sage_bench.run import run

OUT = Path("results/bench/deadlines.json")
SEEDS = 8
POLICIES: Final = ("slo_aware", "hybrid")
ARMS: Final = ("request", "critical_path")
"""The baseline first."""

LOADS: Final[Mapping[str, tuple[str, ...]]] = {
    "documents wanted in 2 s": (),
    "the same, another tenant's": ("load.classes.document.tenants=documents",),
    "documents may take 30 s": ("slo.classes.embedding.e2e_s=30", "load.classes.document.priority=1"),
}
MEASURED: Final = (
    ("slo_attainment", ALL),
    ("slo_attainment", "chat"),
    ("slo_attainment", "embedding"),
    ("e2e_ns_p95", "chat"),
)
NAMES: Final = {ALL: "all requests", "chat": "questions", "embedding": "documents"}

Values = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="repetitions; 5 or more")
    parser.add_argument("--out", type=Path, default=OUT, help="the figure goes beside it")
    parser.add_argument("--quick", action="store_true", help="20 s of load: to see that it works, not for figures")
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    comparisons = []
    for load, overrides in LOADS.items():
        for policy in POLICIES:
            quick = ("load.duration_s=20", "warmup_s=2") if options.quick else ()
            comparisons += compared(load, policy, options.seeds, (*overrides, *quick))
            console.print(f"{load}, {policy}: {2 * options.seeds} runs")
    judged(comparisons)
    console.print(shown(comparisons))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"seeds": options.seeds, "baseline": ARMS[0], "arm": ARMS[1], "comparisons": comparisons}
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    for path in save(drawn(comparisons), options.out.with_suffix("")):
        console.print(f"wrote {path}")
    console.print(f"wrote {options.out}")


def compared(load: str, policy: str, seeds: int, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """A comparison for each of MEASURED: means of both arms, paired difference with its interval, p."""
    found: dict[str, list[Values]] = {arm: [] for arm in ARMS}
    for seed in range(1, seeds + 1):
        for arm in ARMS:
            found[arm].append(values(policy, arm, seed, overrides))
    rows = []
    for metric, kind in MEASURED:
        series = [[each[f"{kind}.{metric}"] for each in found[arm]] for arm in ARMS]
        result = paired(*series)
        rows.append(
            {
                "load": load,
                "policy": policy,
                "kind": kind,
                "metric": metric,
                **{arm: t_interval(of).mean for arm, of in zip(ARMS, series, strict=True)},
                "difference": result.difference.mean,
                "low": result.difference.low,
                "high": result.difference.high,
                "seeds": result.difference.n,
                "p": result.p,
            }
        )
    return rows


def values(policy: str, arm: str, seed: int, overrides: tuple[str, ...]) -> Values:
    """One run's MEASURED."""
    with tempfile.TemporaryDirectory() as folder:
        about = ("experiment=deadlines", f"policy={policy}", f"pipeline.deadlines={arm}", f"seed={seed}")
        made = run(composed([*about, f"results={folder}", "record.steps=false", "record.tasks=false", *overrides]))
        table = measure(Run(made.folder))
    whole = table[(table["tenant"] == ALL) & (table["priority"] == ALL)].set_index("kind")
    return {f"{kind}.{metric}": float(whole.loc[kind, metric]) for metric, kind in MEASURED}  # type: ignore[arg-type]


def judged(comparisons: list[dict[str, Any]]) -> None:
    """Add p_adjusted (Holm, over all comparisons) and the verdict."""
    for row, p in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        row["p_adjusted"] = p
        row["verdict"] = verdict(row["difference"], p, METRICS[row["metric"]].better or "higher")


def shown(comparisons: list[dict[str, Any]]) -> Table:
    table = Table(
        "load", "policy", "metric", ARMS[0], ARMS[1], "difference, 95 %", "verdict", title="Critical-path deadlines"
    )
    for i, row in enumerate(comparisons):
        metric = METRICS[row["metric"]]
        spread = (row["high"] - row["low"]) / 2 / metric.scale
        table.add_row(
            row["load"] if i % (len(MEASURED) * len(POLICIES)) == 0 else "",
            row["policy"] if i % len(MEASURED) == 0 else "",
            f"{NAMES[row['kind']]}: {metric.label} ({metric.unit})",
            *(f"{row[arm] / metric.scale:.3g}" for arm in ARMS),
            f"{row['difference'] / metric.scale:+.2f} ± {spread:.2f}",
            row["verdict"],
            end_section=(i + 1) % len(MEASURED) == 0,
        )
    return table


def drawn(comparisons: list[dict[str, Any]]) -> Any:
    """Differences of SLO attainment by load and policy."""
    rows: dict[str, list[Interval]] = {}
    for row in comparisons:
        if row["metric"] == "slo_attainment":
            interval = Interval(row["difference"], row["low"], row["high"], row["seeds"])
            rows.setdefault(f"{row['load']}\n{row['policy']}", []).append(interval)
    label = "gain in SLO attainment\n(percentage points), simulated"
    return paired_differences(
        rows, [NAMES[kind] for metric, kind in MEASURED if metric == "slo_attainment"], label, scale=0.01
    )


if __name__ == "__main__":
    main()
