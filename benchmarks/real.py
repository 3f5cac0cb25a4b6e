"""How true the simulation of a *real* engine is, calibrated here: ``make bench-real`` prints a table and writes ``real.json``.

vLLM's CPU build runs a small model on one core (``make install-live``); its API server, control plane and load generator have
the other. It is calibrated with one designed set of requests (``sage calibrate``). Then other requests are sent: other
lengths, other arrival processes, loads from idle to saturated, all of them in turn and the whole round several times, so
that a slow minute of the machine falls on each. After every round it is calibrated again, and each live run is simulated
with the profiles from before and after it: what is predicted is the engine, and not that the machine is as fast as some
minutes ago. Errors (of the means over the rounds) stand beside how far the live runs of one load are apart (noise), below
which no error means anything, and beside how far the two predictions are (drift).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import live_engines  # noqa: E402

from sage_bench.calibrate.session import Report, Wanted, calibrate_engine  # noqa: E402
from sage_bench.cli.calibrate import show  # noqa: E402
from sage_bench.config import composed  # noqa: E402
from sage_bench.live import run_live  # noqa: E402
from sage_bench.validate.compare import Compared, Latency  # noqa: E402
from sage_bench.validate.live import RunFidelity, validate_run  # noqa: E402

OUT = Path("results/bench/real.json")
ENGINE_CORE, OUR_CORE = 1, 0

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
    parser.add_argument("--seconds", type=float, default=45.0, help="of load, each run")
    parser.add_argument("--rounds", type=int, default=3, help="live runs of each load, from 2")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each calibration")
    parser.add_argument("--capacity", type=float, default=None, help="requests/s that saturate it; measured otherwise")
    parser.add_argument("--loads", nargs="+", choices=tuple(ARRIVALS), default=list(ARRIVALS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if (lacking := live_engines.missing()) is not None:
        sys.exit(f"bench-real: {lacking}")
    console = Console(highlight=False, width=110)
    figures = json.loads(options.out.read_text()) if options.out.exists() else {}
    os.sched_setaffinity(0, {OUR_CORE})
    logs = ROOT / ".sage/logs/live"
    recipe = live_engines.RECIPES[options.engine]
    recipe = replace(recipe, env={**recipe.env, **ONE_PROCESS_ENV})
    engine = live_engines.Engine(options.engine, recipe, ENGINE_CORE, logs, ONE_PROCESS)
    try:
        engine.wait()
        for thread in engine.process_titled("VLLM::EngineCore").threads():
            os.sched_setaffinity(thread.id, {ENGINE_CORE})
        with tempfile.TemporaryDirectory(prefix="sage-bench-real-") as name:
            found = measure(engine, options, Path(name), console)
    finally:
        engine.stop()
    figures[options.engine] = found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")


def measure(
    engine: live_engines.Engine, options: argparse.Namespace, folder: Path, console: Console
) -> dict[str, object]:
    """Calibrate, send every load, calibrate again, and so on; then predict what was sent."""
    before = os.getloadavg()[0]
    reports = [_calibrated(engine, options.budget, folder / "engine-0.yaml", console)]
    lengths = LENGTHS[options.engine]
    capacity = options.capacity or _capacity(engine, _device(reports[0]), lengths, folder)
    runs: dict[str, list[Path]] = {load: [] for load in options.loads}
    for number in range(options.rounds):
        for load in options.loads:
            share, arrivals = ARRIVALS[load]
            seconds, warmup = (options.seconds, 4.0) if share < 1 else (options.seconds / share, 0.0)
            results = folder / f"{load}-{number}"
            runs[load].append(
                _live(engine, _device(reports[-1]), lengths, share * capacity, arrivals, seconds, results, warmup)
            )
        reports.append(_calibrated(engine, options.budget, folder / f"engine-{number + 1}.yaml", console))
    found: dict[str, object] = {
        "engine": f"vLLM {live_engines.version('vllm')} (CPU), {engine.model}",
        "load_average_before": before,
        "calibrations": len(reports),
        "calibration_s": sum(report.seconds for report in reports),
        "calibration_requests": sum(report.requests for report in reports),
        "calibration_scatter_pct": statistics.fmean(report.scatter_pct for report in reports),
        "capacity_req_s": capacity,
    }
    columns = ("load", "latency", "requests", "measured", "mean %", "p95 %", "noise %", "drift %")
    table = Table(*columns, title=f"{engine.model}: simulated against live")
    for load, folders in runs.items():
        twice = [
            [validate_run(run, folder / f"validate-{run.name}-{i}", [_device(report)]) for report in reports[i : i + 2]]
            for i, run in enumerate(folders)
        ]
        for name, row in _errors(twice):
            found[f"{load}_{name}"] = row
            shown = (f"{row[key]:+.2f}" for key in ("mean_pct", "p95_pct"))
            rest = (f"{row[key]:.2f}" for key in ("noise_pct", "drift_pct"))
            table.add_row(load, name, f"{row['requests']}", f"{row['measured_mean_ms']:.1f} ms", *shown, *rest)
    console.print(table)
    found["load_average_after"] = os.getloadavg()[0]
    return found


def _calibrated(engine: live_engines.Engine, budget_s: float, profile: Path, console: Console) -> Report:
    wanted = Wanted(engine.url, engine.model, budget_s=budget_s, max_num_seqs=16, prompt_max=1024)
    report = calibrate_engine(wanted, profile, lambda line: console.print(line, style="dim", markup=False))
    show(report, profile, console)
    return report


def _device(report: Report) -> str:
    """The override that puts the calibrated engine into the cluster."""
    return f"cluster.devices=[{_hydra({'node': 'cpu', 'llm': report.device})}]"


def _errors(runs: Sequence[Sequence[RunFidelity]]) -> Iterator[tuple[str, dict[str, float]]]:
    """By latency. runs: each with its simulations, by the profile from before it and by that from after it. ``mean_pct``,
    ``p95_pct``: simulated over live, each the mean of the runs. ``noise_pct``: from the least to the largest live mean, over
    their mean. ``drift_pct``: between the two simulated means of a run, over the first, mean of the runs."""
    (kind,) = runs[0][0].kinds
    for name in ("ttft", "tpot", "e2e"):
        latencies = [[each.kinds[kind][name] for each in run] for run in runs]
        means = [first.mean.measured for first, _ in latencies]

        def error(statistic: str, of: Sequence[Sequence[Latency]] = latencies) -> float:
            pairs: list[Compared] = [getattr(each, statistic) for run in of for each in run]
            return 100 * (sum(pair.simulated for pair in pairs) / sum(pair.measured for pair in pairs) - 1)

        drifts = [abs(after.mean.simulated / before.mean.simulated - 1) for before, after in latencies]
        yield (
            name,
            {
                "measured_mean_ms": statistics.fmean(means) * 1e3,
                "mean_pct": error("mean"),
                "p95_pct": error("p95"),
                "noise_pct": 100 * (max(means) - min(means)) / statistics.fmean(means),
                "drift_pct": 100 * statistics.fmean(drifts),
                "requests": sum(first.samples for first, _ in latencies),
            },
        )


def _capacity(engine: live_engines.Engine, device: str, lengths: tuple[str, str], folder: Path) -> float:
    """Requests/s that the engine completes when there are always more: a burst, from first arrival to last end."""
    import pandas as pd

    run = _live(
        engine, device, lengths, 200.0, "{_target_: sage_bench.loads.Constant}", 0.6, folder / "burst", warmup=0
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
