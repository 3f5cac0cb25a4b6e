"""How true the simulation of a *real* engine is, calibrated here: ``make bench-real`` prints a table and writes ``real.json``.

vLLM's CPU build runs a small model on one core (``make install-live``); its API server, control plane and load generator have
the other. It is calibrated with one designed set of requests (``sage calibrate``), and other requests are sent: other
lengths, other arrival processes, loads from idle to saturated. A round of the one and a run of the other take turns, so
that both meet the same hours of the machine, and the engine's core is watched throughout: what is predicted is the engine, and
not how busy the machine's other tenants are (:mod:`sage_bench.core_speed`). The profile is fitted to all rounds, and each live
run simulated with it at the speed that its core had. Errors are of all runs of a load together. Beside them stand the noise,
which is how far two live runs of one load, one after the other, are apart, and the range in which the error lies when the runs
are drawn anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import live_engines  # noqa: E402

from sage_bench.calibrate.session import Interleaved, Report, Wanted  # noqa: E402
from sage_bench.cli.calibrate import show  # noqa: E402
from sage_bench.config import composed  # noqa: E402
from sage_bench.live import run_live  # noqa: E402
from sage_bench.metrics.percentile import percentile  # noqa: E402
from sage_bench.validate.live import REQUESTS, validate_run  # noqa: E402

OUT = Path("results/bench/real.json")
ENGINE_CORE, OUR_CORE = 1, 0

MAX_NUM_SEQS = 8
"""What streams out of a fuller batch would keep the other core busier than the engine's."""

WARM_S = 25.0
"""Of rounds that are thrown away: for its first twenty seconds of work vLLM takes a quarter longer for everything."""

ROUNDS_FIRST = 2
"""Before the first live run, to know the capacity."""

# The runs of a load are of the same requests; from the second on half of their prompts would be in the cache.
NO_PREFIX_CACHE = ("--no-enable-prefix-caching",)

RESAMPLES = 2000

# vLLM's scheduler and worker are two processes that wait for one another in busy loops: on a machine without a core for each they
# take from whatever else runs there, now more, now less. So the worker lives in the scheduler's process, which waits for a queue.
ONE_PROCESS = ("--distributed-executor-backend", "uni")
ONE_PROCESS_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}

LENGTHS = {
    "tiny-random": ("{_target_: sage_bench.loads.Lognormal, median: 100, sigma: 0.5, low: 24, high: 400}",
                    "{_target_: sage_bench.loads.Lognormal, median: 28, sigma: 0.5, low: 4, high: 96}"),
    "smollm2": ("{_target_: sage_bench.loads.Lognormal, median: 60, sigma: 0.4, low: 24, high: 160}",
                "{_target_: sage_bench.loads.Lognormal, median: 14, sigma: 0.4, low: 4, high: 40}"),
}  # fmt: skip
"""Prompt and output lengths of the predicted loads; calibration uses neither."""

ARRIVALS = {
    "idle": (0.06, "{_target_: sage_bench.loads.Constant}"),
    "half": (0.5, "{_target_: sage_bench.loads.Gamma, cv: 1.5}"),
    "busy": (0.75, "{_target_: sage_bench.loads.Poisson}"),
    "saturated": (6.0, "{_target_: sage_bench.loads.Poisson}"),
}
"""Share of the capacity, and how requests arrive; calibration's held-out loads are Poisson. The saturating one is short:
all that it sends waits, and what is measured is how fast the engine works it off. A little above the capacity would
measure the difference of two nearly equal rates instead, which no machine repeats."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=tuple(LENGTHS), default="tiny-random")
    parser.add_argument("--seconds", type=float, default=24.0, help="of load, each run")
    parser.add_argument("--turns", type=int, default=7, help="live runs of each load, from 2")
    parser.add_argument("--round", type=float, default=9.0, help="seconds of calibration before each live run")
    parser.add_argument("--capacity", type=float, default=None, help="requests/s that saturate it; measured otherwise")
    parser.add_argument("--loads", nargs="+", choices=tuple(ARRIVALS), default=list(ARRIVALS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the runs; temporary otherwise")
    options = parser.parse_args()
    if (lacking := live_engines.missing()) is not None:
        sys.exit(f"bench-real: {lacking}")
    if options.turns < 2:
        parser.error("--turns: expected at least 2, between whose runs there is noise")
    console = Console(highlight=False, width=110)
    figures = json.loads(options.out.read_text()) if options.out.exists() else {}
    os.sched_setaffinity(0, {OUR_CORE})
    logs = ROOT / ".sage/logs/live"
    recipe = live_engines.RECIPES[options.engine]
    recipe = replace(recipe, env={**recipe.env, **ONE_PROCESS_ENV})
    engine = live_engines.Engine(
        options.engine, recipe, ENGINE_CORE, logs, (*ONE_PROCESS, *NO_PREFIX_CACHE, "--max-num-seqs", f"{MAX_NUM_SEQS}")
    )
    try:
        engine.wait()
        for thread in engine.process_titled("VLLM::EngineCore").threads():
            os.sched_setaffinity(thread.id, {ENGINE_CORE})
        with tempfile.TemporaryDirectory(prefix="sage-bench-real-") as name:
            found = measure(engine, options, options.keep or Path(name), console)
    finally:
        engine.stop()
    figures[options.engine] = found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")


def measure(
    engine: live_engines.Engine, options: argparse.Namespace, folder: Path, console: Console
) -> dict[str, object]:
    """Rounds of calibration and live runs in turn; then predict what was sent."""
    before = os.getloadavg()[0]
    wanted = Wanted(
        engine.url,
        engine.model,
        tokenizer=live_engines.MODELS / engine.model,
        prompts="text",  # as they are live: tokenisation takes its time
        budget_s=6 * options.round,  # of which half goes to three rounds
        max_num_seqs=MAX_NUM_SEQS,
        prompt_max=512,
        watch_core=ENGINE_CORE,
    )
    lengths = LENGTHS[options.engine]
    runs: dict[str, list[Path]] = {load: [] for load in options.loads}
    say = partial(console.print, style="dim", markup=False)
    with Interleaved(wanted, say) as warming:
        until = time.monotonic() + WARM_S
        while time.monotonic() < until:
            warming.round()
    with Interleaved(wanted, say) as calibration:
        for _ in range(ROUNDS_FIRST):
            calibration.round()
        first = _device(calibration.solved(folder / "first.yaml"))
        capacity = options.capacity or _capacity(engine, first, lengths, folder)
        console.print(f"capacity: {capacity:.1f} requests/s", style="dim")
        for turn in range(options.turns):
            for load in options.loads:
                share, arrivals = ARRIVALS[load]
                seconds, warmup = (options.seconds, 3.0) if share < 1 else (options.seconds / share, 0.0)
                calibration.round()
                runs[load].append(
                    _live(
                        engine, first, lengths, share * capacity, arrivals, seconds, folder / f"{load}-{turn}", warmup
                    )
                )
        calibration.round()
        report = calibration.solved(folder / "engine.yaml")
    show(report, folder / "engine.yaml", console)
    found: dict[str, object] = {
        "engine": f"vLLM {live_engines.version('vllm')} (CPU), {engine.model}",
        "load_average_before": before,
        "calibration_requests": report.requests,
        "calibration_scatter_pct": report.scatter_pct,
        "capacity_req_s": capacity,
        "runs": options.turns,
    }
    columns = ("load", "latency", "requests", "measured", "mean %", "of runs drawn anew", "p95 %", "noise %")
    table = Table(*columns, title=f"{engine.model}: simulated against live")
    for load, folders in runs.items():
        outs = [folder / f"validate-{load}-{turn}" for turn in range(len(folders))]  # the runs of a load have one name
        fidelities = [validate_run(run, out, [_device(report)]) for run, out in zip(folders, outs, strict=True)]
        compared = [pd.read_parquet(out / REQUESTS) for out in outs]
        slowness = [each.slowness.mean for each in fidelities if each.slowness is not None]
        found[f"{load}_slowness"] = slowness
        for name in ("ttft", "tpot", "e2e"):
            row = _row(compared, name)
            found[f"{load}_{name}"] = row
            table.add_row(
                load,
                name,
                f"{row['requests']:.0f}",
                f"{row['measured_mean_ms']:.1f} ms",
                f"{row['mean_pct']:+.1f}",
                f"{row['mean_pct_low']:+.1f} to {row['mean_pct_high']:+.1f}",
                f"{row['p95_pct']:+.1f}",
                f"{row['noise_pct']:.1f}",
            )
        table.add_section()
    console.print(table)
    found["load_average_after"] = os.getloadavg()[0]
    return found


def _device(report: Report) -> str:
    """The override that puts the calibrated engine into the cluster."""
    return f"cluster.devices=[{_hydra({'node': 'cpu', 'llm': report.device})}]"


def _row(runs: Sequence[pd.DataFrame], latency: str) -> dict[str, float]:
    """Of all runs of a load. ``mean_pct``, ``p95_pct``: simulated over live, of all their requests; ``mean_pct_low`` and ``high``:
    the middle 95 % of the former when runs are drawn anew with replacement. ``noise_pct``: mean difference of the means of
    two live runs that follow one another, over the mean."""
    pairs = []
    for run in runs:
        both = run[[f"measured_{latency}_s", f"simulated_{latency}_s"]].dropna().to_numpy()
        pairs.append((both[:, 0], both[:, 1]))
    measured, simulated = (np.concatenate(side) for side in zip(*pairs, strict=True))
    sums = np.array([[each.sum() for each in pair] for pair in pairs])
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    means = [float(each.mean()) for each, _ in pairs]
    return {
        "requests": len(measured),
        "measured_mean_ms": float(measured.mean()) * 1e3,
        "mean_pct": 100 * (float(simulated.mean() / measured.mean()) - 1),
        "mean_pct_low": 100 * (float(low) - 1),
        "mean_pct_high": 100 * (float(high) - 1),
        "p95_pct": 100 * (percentile(simulated, 0.95) / percentile(measured, 0.95) - 1),
        "noise_pct": 100 * statistics.fmean(abs(b - a) for a, b in pairwise(means)) / statistics.fmean(means),
    }


def _capacity(engine: live_engines.Engine, device: str, lengths: tuple[str, str], folder: Path) -> float:
    """Requests/s that the engine completes when there are always more: a burst, from first arrival to last end."""
    run = _live(
        engine, device, lengths, 200.0, "{_target_: sage_bench.loads.Constant}", 1.5, folder / "burst", warmup=0
    )
    rows = pd.read_parquet(run / "requests.parquet")
    return float(len(rows) / ((rows["ended_ns"].max() - rows["scheduled_ns"].min()) / 1e9))


def _live(
    engine: live_engines.Engine,
    device: str,
    lengths: tuple[str, str],
    rate: float,
    arrivals: str,
    seconds: float,
    results: Path,
    warmup: float,
) -> Path:
    overrides = [
        "driver=live",
        f"driver.watch_core={ENGINE_CORE}",
        f"driver.engines=[{engine.url}]",
        f"+driver.models.llm={engine.model}",
        f"driver.tokenizer={live_engines.MODELS / engine.model}",
        device,
        "~load.classes",
        "+load.classes={text: {_target_: sage_bench.loads.RequestClass, kind: generate, share: 1.0, tenants: default, "
        f"priority: 0, input_tokens: {lengths[0]}, output_tokens: {lengths[1]}, output_tokens_max: 128}}}}",
        f"load.arrivals={arrivals}" if "cv" not in arrivals else f"++load.arrivals={arrivals}",
        f"load.rate={rate}",
        f"load.duration_s={seconds}",
        f"warmup_s={warmup}",
        "policy=fifo",
        f"results={results}",
        f"seed={sum(map(ord, results.name.partition('-')[0])) % 1000}",  # the runs of a load are of the same requests
    ]
    done = run_live(composed(overrides))
    if done.summary.invalid:
        print(f"INVALID: {'; '.join(done.summary.invalid)}")
    return done.folder


def _hydra(value: object) -> str:
    """In the grammar of Hydra's overrides: keys without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_hydra(inner)}" for key, inner in value.items()) + "}"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
