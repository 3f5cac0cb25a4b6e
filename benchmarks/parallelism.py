"""What running independent branches at once is worth: ``make bench-orchestration`` runs it too; ``parallelism.json``.

A pipeline of several independent answers to one text, joined by a last one, is run as declared, where the plane sends every
branch as soon as it is ready; and as a chain, where each branch waits for the one before. The two have the same stages, and a
request gets the same lengths in both. The *bound* is that of an unlimited machine, request by request: the time of all stages
of the chain over the time of the longest branch and the last stage, each as long as the chain took for it. Batching makes a
token of a full engine slower than that of an idle one, and so does a queue: both keep the speed-up below the bound.
Simulated, and live on emulated engines.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_bench.config import composed
from sage_bench.live import run_live
from sage_bench.metrics.statistics import paired, t_interval
from sage_bench.results.reader import Run
from sage_bench.run import run

OUT: Final = Path("results/bench/parallelism.json")
WIDTHS: Final = (2, 4, 8)
LOADS: Final = {"idle": 0.05, "half": 0.5, "busy": 0.9}
"""Share of the rate at which the engines are busy all the time, by :func:`capacity`."""

CLUSTER: Final = (
    "cluster.devices=["
    "{node: a100, count: 2, llm: {profile: llama-3.1-8b-a100-tp1, max_num_seqs: 16, max_num_batched_tokens: 2048}}, "
    "{node: cpu, operator: {pool: cpu, workers: 4, fixed_s: 0.00005}}]"
)
FORMS: Final = ("chain", "declared")
INPUT_TOKENS: Final = 400
BRANCH: Final = {"op": "chat", "output_tokens_max": 64, "output_tokens": {"lognormal": {"median": 40, "sigma": 0.5, "low": 8, "high": 64}}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load, each simulated run")
    parser.add_argument("--live-seconds", type=float, default=30.0, help="of load, each live run; 0: none")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sage-bench-parallelism-") as name:
        for width in options.widths:
            for form in FORMS:
                (Path(name) / f"{form}-{width}.yaml").write_text(yaml.safe_dump(pipeline(width, chain=form == "chain")))
            for load, share in LOADS.items():
                rows.append(compared("simulated", width, load, share, options.seeds, options.seconds, Path(name)))
                if options.live_seconds and load != "busy" and width == max(options.widths):
                    rows.append(compared("emulated", width, load, share, 1, options.live_seconds, Path(name)))
    console.print(table_of(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"load_average": os.getloadavg()[0], "rows": rows}, indent=2) + "\n")
    console.print(f"written to {options.out}")


def pipeline(width: int, *, chain: bool) -> dict[str, Any]:
    """``width`` answers to the request, joined by a last one. In a chain a decision that is always the same, and takes no
    time to speak of, makes each wait for the one before."""
    stages: dict[str, Any] = {}
    for number in range(width):
        stages[f"branch{number}"] = {**BRANCH, "prompt": f"Answer number {number}:\n{{request}}"}
        if chain and number:
            stages[f"turn{number}"] = {"op": "branch", "of": f"branch{number - 1}", "contains": "", "chances": [0, 1]}
            stages[f"branch{number}"]["when"] = {f"turn{number}": 1}
    stages["all"] = {"op": "join", "of": [f"branch{number}" for number in range(width)]}
    stages["whole"] = {**BRANCH, "prompt": "Put these together:\n{all}"}
    return {"name": "branches", "stages": stages, "output": "whole"}


def capacity(width: int) -> float:
    """Requests/s that two engines of 16 sequences sustain, roughly: an answer of 42 tokens takes 0.75 s in a full batch."""
    return 2 * 16 / 0.75 / (width + 1)


def compared(how: str, width: int, load: str, share: float, seeds: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Both forms on the same requests, seed by seed."""
    found: dict[str, list[pd.DataFrame]] = {form: [] for form in FORMS}
    for seed in range(1, seeds + 1):
        for form in FORMS:
            found[form].append(one(how, form, width, share * capacity(width), seed, seconds, folder))
    means_s = {form: [float(of["e2e_s"].mean()) for of in found[form]] for form in FORMS}
    bounds = [float((of["chain_s"] / of["path_s"]).mean()) for of in found["chain"]]
    speedups = [chain / declared for chain, declared in zip(means_s["chain"], means_s["declared"], strict=True)]
    speedup = t_interval(speedups)
    difference = paired(means_s["chain"], means_s["declared"]).difference
    bound = t_interval(bounds).mean
    return {
        "how": how, "width": width, "load": load, "rate": share * capacity(width), "seeds": seeds,
        **{f"{form}_s": t_interval(means_s[form]).mean for form in FORMS},
        **{f"{form}_p95_s": t_interval([float(of["e2e_s"].quantile(0.95)) for of in found[form]]).mean for form in FORMS},
        "speedup": speedup.mean, "speedup_low": speedup.low, "speedup_high": speedup.high,
        "difference_s": difference.mean, "difference_low_s": difference.low, "difference_high_s": difference.high,
        "bound": bound, "of_bound": speedup.mean / bound,
    }  # fmt: skip


def one(how: str, form: str, width: int, rate: float, seed: int, seconds: float, folder: Path) -> pd.DataFrame:
    """By request: e2e_s, chain_s (of all stages) and path_s (of the longest branch and the last stage)."""
    given = [
        "load=pipeline/summarize", "pipeline=file", f"pipeline.path={folder / f'{form}-{width}.yaml'}", CLUSTER,
        f"load.rate={rate}", f"load.duration_s={seconds}", f"seed={seed}", "load.classes.text.kind=chat",
        "load.classes.text.pipeline=branches", "~load.classes.text.input_tokens",
        f"+load.classes.text.input_tokens={{_target_: sage_bench.loads.Fixed, value: {INPUT_TOKENS}}}",
        f"results={folder / how / form}", f"name={width}-{rate:.3g}-{seed}", f"warmup_s={seconds / 10}", "slo=none",
        "record.steps=false", "policy=least_in_flight",
    ]  # fmt: skip
    live = how == "emulated"
    made = run_live(composed(["driver=live", "driver.stream=false", *given])) if live else run(composed(given))
    return spans(Run(made.folder))


def spans(of: Run) -> pd.DataFrame:
    """By request that counts and was answered."""
    requests = of.frame("requests", ("request", "outcome", "warmup", "e2e_ns")).set_index("request")
    requests = requests[(requests["outcome"] == "responded") & ~requests["warmup"]]
    tasks = of.frame("tasks", ("request", "pool", "stage", "dispatched_ns", "ended_ns", "outcome"))
    tasks = tasks[(tasks["outcome"] == "finished") & (tasks["pool"] == "llm") & tasks["request"].isin(requests.index)]
    took_s = (tasks["ended_ns"] - tasks["dispatched_ns"]) / 1e9
    last = tasks["stage"] == tasks["stage"].max()
    whole = took_s[last].groupby(tasks["request"]).sum()
    branches = took_s[~last].groupby(tasks["request"])
    return pd.DataFrame(
        {
            "e2e_s": requests["e2e_ns"] / 1e9,
            "chain_s": branches.sum() + whole,
            "path_s": branches.max() + whole,
        }
    )


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "", "branches", "load", "req/s", "chain s", "declared s", "speed-up, 95 %", "bound", "of it",
        box=SIMPLE, title="independent branches at once",
    )  # fmt: skip
    for row in rows:
        spread = (row["speedup_high"] - row["speedup_low"]) / 2
        table.add_row(
            row["how"], str(row["width"]), row["load"], f"{row['rate']:.2f}", f"{row['chain_s']:.2f}",
            f"{row['declared_s']:.2f}", f"{row['speedup']:.2f}" + (f" ± {spread:.2f}" if row["seeds"] > 1 else ""),
            f"{row['bound']:.2f}", f"{row['of_bound']:.0%}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
