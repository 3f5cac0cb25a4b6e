"""Simulation against live runs on emulated engines: ``make bench-live`` prints tables and writes ``live.json``.

There the engine's model is the truth, so what differs is everything else: HTTP, the event loops, the network of one
machine, and how punctual they are on it. *fidelity*: errors of the simulated run of the same configuration, from idle to
saturated, with the difference between two live runs beside them. What a message takes from the plane to an engine and
back is calibrated first, with embeddings one at a time; everything else is the model as it is. *ranking*: every policy on a mixed load at high
utilisation, live and simulated; Kendall's tau between the two orders.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from sage_bench.config import composed
from sage_bench.live import run_live
from sage_bench.results.reader import Run
from sage_bench.run import run
from sage_bench.validate.live import validate_run

OUT = Path("results/bench/live.json")

ONE_ENGINE = (
    "cluster=small",
    "cluster.devices.0.count=1",
    "~load.classes.chat.output_tokens",
    "+load.classes.chat.output_tokens={_target_: sage_bench.loads.Lognormal, median: 60, sigma: 0.5, low: 4, high: 256}",
    "load.classes.chat.output_tokens_max=256",
)
ONE_AT_A_TIME = (
    *ONE_ENGINE[:2],
    "~load.classes.chat",
    "load.classes.embedding.share=1.0",
    "load.rate=8",
    "load.arrivals={_target_: sage_bench.loads.Constant}",
)
"""Embeddings only, far enough apart that none waits for another."""

RATES = {"idle": 1.0, "half": 8.0, "busy": 16.0}
"""Requests/s on one emulated A100 with Llama-3.1-8B, and an L4 for embeddings."""

POLICIES = ("round_robin", "least_in_flight", "separate", "fifo", "priority", "slo_aware", "hybrid")
RANKED = (
    "cluster.devices=[{node: a100, count: 2, llm: {profile: llama-3.1-8b-a100-tp1, max_num_seqs: 24, "
    "gpu_memory_utilization: 0.85}, embed: {profile: bge-m3-a100, max_batch_tasks: 32}}]",
    "load=tenants",
    "load.rate=16",
)
"""Two devices that host both kinds of work, interactive tenants beside batch ones, a little more than they sustain."""

Figures = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of load, each run")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--only", choices=("fidelity", "ranking"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: Figures = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    figures["load_average_before"] = os.getloadavg()[0]
    console = Console(highlight=False, width=110)
    with tempfile.TemporaryDirectory(prefix="sage-bench-live-") as name:
        if options.only != "ranking":
            figures["fidelity"] = fidelity(options.seconds, Path(name), console)
        if options.only != "fidelity":
            figures["ranking"] = ranking(options.policies, options.seconds, Path(name), console)
    figures["load_average_after"] = os.getloadavg()[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"{options.out}: load average {figures['load_average_before']:.1f} before")


def fidelity(seconds: float, folder: Path, console: Console) -> Figures:
    """Errors in per cent of measured, by load, kind and latency."""
    table = Table("load", "kind", "latency", "mean %", "p95 %", "noise of the mean %", title="simulated against live")
    way = network(seconds, folder)
    found: Figures = {"network": way}
    for load, rate in RATES.items():
        first, second = (live([*ONE_ENGINE, f"load.rate={rate}"], seconds, folder / f"{load}-{n}") for n in (1, 2))
        errors = validate_run(first, folder / f"validate-{load}", way, second)
        assert errors.noise_pct is not None
        for kind, latencies in errors.kinds.items():
            for name, latency in latencies.items():
                if name == "queue":
                    continue
                noise = errors.noise_pct[kind][name]["mean"]
                mean, p95 = latency.mean.error_pct, latency.p95.error_pct
                found[f"{load}_{kind}_{name}"] = {
                    "mean_pct": mean,
                    "p95_pct": p95,
                    "noise_pct": noise,
                    "measured_mean_ms": latency.mean.measured * 1e3,
                    "mean_difference_ms": (latency.mean.simulated - latency.mean.measured) * 1e3,
                }
                table.add_row(load, kind, name, *(f"{x:+.2f}" if x is not None else "" for x in (mean, p95, noise)))
    console.print(table)
    return found


def network(seconds: float, folder: Path) -> list[str]:
    """Overrides of the twin: the delay with which embeddings that wait for nothing take as long as they did live."""
    run = live(ONE_AT_A_TIME, seconds, folder / "network", seed=12)
    errors = validate_run(run, folder / "validate-network")
    e2e = errors.kinds["embedding"]["e2e"].p50
    config = Run(run).manifest.config["cluster"]["network"]
    delay_s = config["delay_s"] + (e2e.measured - e2e.simulated) / 2
    return [f"cluster.network.delay_s={max(delay_s, 0.0):.6f}"]


def ranking(policies: Sequence[str], seconds: float, folder: Path, console: Console) -> Figures:
    """Each policy live and simulated, on the same arrivals."""
    rows = []
    for policy in policies:
        overrides = [*RANKED, f"policy={policy}"]
        rows.append(told(live(overrides, seconds, folder / f"live-{policy}")) | {"policy": policy, "of": "live"})
        simulated = run(composed([*overrides, *common(seconds, folder / f"sim-{policy}")])).folder
        rows.append(told(simulated) | {"policy": policy, "of": "simulated"})
    frame = pd.DataFrame(rows).set_index(["of", "policy"])
    table = Table("policy", *(f"{name} {of}" for name in frame.columns for of in ("live", "sim")), title="every policy")
    for policy in policies:
        cells = [
            f"{float(frame.at[(of, policy), name]):.4g}"  # type: ignore[arg-type]
            for name in frame.columns
            for of in ("live", "simulated")
        ]
        table.add_row(policy, *cells)
    console.print(table)
    found: Figures = {"policies": list(policies)}
    for name in frame.columns:
        real, model = (frame.loc[of].loc[list(policies), name].to_numpy() for of in ("live", "simulated"))
        tau = kendalltau(real, model)
        found[name] = {
            "live": list(real),
            "simulated": list(model),
            "kendall_tau": tau.statistic,
            "p_value": tau.pvalue,
        }
        console.print(
            f"{name}: Kendall's tau {tau.statistic:+.3f} (p = {tau.pvalue:.4f}) over {len(policies)} policies"
        )
    return found


def told(folder: Path) -> dict[str, float]:
    """What policies are ranked by."""
    columns = ["kind", "priority", "good", "ttft_ns", "e2e_ns", "warmup", "outcome"]
    frame = pd.read_parquet(folder / "requests.parquet", columns=columns)
    frame = frame[~frame["warmup"]]
    urgent = frame[frame["priority"] == 0]
    return {
        "slo_attainment": float(frame["good"].mean()),
        "urgent_attainment": float(urgent["good"].mean()),
        "e2e_mean_s": float(np.nanmean(frame["e2e_ns"].to_numpy(float))) / 1e9,
        "urgent_ttft_mean_s": float(np.nanmean(urgent["ttft_ns"].to_numpy(float))) / 1e9,
    }


def live(overrides: Sequence[str], seconds: float, results: Path, seed: int = 11) -> Path:
    """One live run."""
    done = run_live(composed([*overrides, "driver=live", *common(seconds, results, seed)]))
    if done.summary.invalid:
        print(f"INVALID: {'; '.join(done.summary.invalid)}")
    return done.folder


def common(seconds: float, results: Path, seed: int = 11) -> list[str]:
    return [f"load.duration_s={seconds:g}", "warmup_s=5", f"results={results}", f"seed={seed}"]


if __name__ == "__main__":
    main()
