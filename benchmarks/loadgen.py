"""What the load generator can do before it measures itself: ``make bench-loadgen`` writes ``results/bench/loadgen.json``.

Poisson arrivals, open loop, one process on one core, against the fake engine of ``benchmarks/http`` on another. Chat
answered as JSON and as streams of 16 content chunks (back to back, and 5 ms apart), and embeddings. Send lag: from the
scheduled instant to the write. CPU time: of the generating thread, encoding of prompts included, over its requests.
Then the same from a generator that is asked for more than it can send, which must call its run INVALID.

Scenarios take turns, so that they meet the same disturbances; a figure is the median of the rounds, ``rounds_valid`` says
how many were not called INVALID. A scenario with one failed request has no figure, and the exit status is 1. These
machines are noisy: compare figures of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from loopback import cpu_seconds, fake_backend, others_share, pinned
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_bench.loads import Fixed, OpenLoop, RequestClass
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_live.loadgen.generator import generate
from sage_live.loadgen.options import Model, Options
from sage_live.loadgen.prompts import estimated
from sage_live.loadgen.summary import summary

OUT = Path("results/bench/loadgen.json")
CHUNKS = 16
INPUT_TOKENS = 128
LAG_MS_P99 = 5.0  # targets
CPU_US = 120.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """kind: of the requests. rate: requests/s. pace_ms: between chunks of a stream."""

    kind: str
    rate: float
    streamed: bool = False
    pace_ms: int = 0


SCENARIOS = {
    "chat": Scenario("chat", 5000.0),
    "stream16": Scenario("chat", 5000.0, streamed=True),
    "stream16_paced": Scenario("chat", 1000.0, streamed=True, pace_ms=5),
    "embed": Scenario("embedding", 5000.0),
    "overloaded": Scenario("chat", 1_000_000.0),
}
FIGURES = {  # key: of the summary
    "rate": "requested_rate",
    "achieved": "achieved_rate",
    "send_lag_p50_ms": "send_lag_ms_p50",
    "send_lag_p99_ms": "send_lag_ms_p99",
    "send_lag_max_ms": "send_lag_ms_max",
    "cpu_us": "cpu_us",
    "busy": "busy",
}
LEAN = ("chat", "stream16", "embed")  # held to the targets; 16 wake-ups a request cost what they cost


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, each scenario and round")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=2, metavar=("SCENARIO", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        name, port = options.child
        print(json.dumps(measured(name, int(port), options.seconds)))
        return
    console = Console()
    load_average, before = os.getloadavg()[0], cpu_seconds()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in SCENARIOS}
    for _ in range(options.rounds):
        for name in SCENARIOS:
            rounds[name].append(child(name, options.seconds))
    figures: dict[str, object] = {
        "cores": os.cpu_count(),
        "load_average": load_average,
        "load_average_end": os.getloadavg()[0],
        "others_share": others_share(before),
    }
    for name, runs in rounds.items():
        figures |= figures_of(name, runs)
    console.print(table_of(figures))
    refused = [name for name, runs in rounds.items() if any(run["failures"] for run in runs)]
    for name in refused:
        console.print(f"{name}: failed requests, no figures: {[run['failures'] for run in rounds[name]]}")
    if figures["loadgen_overloaded_rounds_valid"]:
        refused.append("overloaded")
        console.print("overloaded: the generator called its run valid; it must not")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"written to {options.out}; load average {load_average:.2f}; other programs had {figures['others_share']:.0%} of the "
        "cores (above 10 %: measure again)"
    )
    sys.exit(1 if refused else 0)


def child(name: str, seconds: float) -> dict[str, Any]:
    """One scenario in a process of its own, on the last core."""
    scenario = SCENARIOS[name]
    with fake_backend("--chunks", str(CHUNKS), "--pace-ms", str(scenario.pace_ms)) as port:
        command = [*pinned(-1), sys.executable, __file__, "--child", name, str(port), "--seconds", str(seconds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def measured(name: str, port: int, seconds: float) -> dict[str, Any]:
    """One scenario in this process."""
    scenario = SCENARIOS[name]
    embeds = scenario.kind == "embedding"
    lengths = {} if embeds else {"output_tokens": Fixed(CHUNKS), "output_tokens_max": CHUNKS}
    of = RequestClass(scenario.kind, 1.0, input_tokens=Fixed(INPUT_TOKENS), **lengths)  # type: ignore[arg-type]
    requests = round(min(scenario.rate, 10_000.0) * seconds)
    load = OpenLoop(scenario.rate, {"all": of}, requests=requests, streams=Streams(2), slo=SloTable())
    model = Model("fake", estimated(seed=1))
    options = Options(f"http://127.0.0.1:{port}", {of.pipeline: model}, stream=scenario.streamed)
    told = summary(uvloop.run(generate(load, options)), fixed_lengths=False)
    return {"valid": told.valid, **told.as_dict()}


def figures_of(name: str, runs: list[dict[str, Any]]) -> dict[str, object]:
    failed = any(run["failures"] for run in runs)
    figures: dict[str, object] = {
        f"loadgen_{name}_{figure}": None if failed else statistics.median(run[key] for run in runs)
        for figure, key in FIGURES.items()
    }
    figures[f"loadgen_{name}_rounds_valid"] = sum(run["valid"] for run in runs)
    figures[f"loadgen_{name}_rounds"] = len(runs)
    figures[f"loadgen_{name}_invalid"] = sorted({reason for run in runs for reason in run["invalid"]})
    return figures


def table_of(figures: dict[str, object]) -> Table:
    table = Table(title=f"one process, open loop; target: lag p99 < {LAG_MS_P99:g} ms, {CPU_US:g} CPU us", box=SIMPLE)
    for heading in ("", "asked /s", "sent /s", "lag p50 ms", "p99 ms", "CPU us", "valid", "target"):
        table.add_column(heading, justify="right")
    for name in SCENARIOS:
        of = [
            figures[f"loadgen_{name}_{key}"]
            for key in ("rate", "achieved", "send_lag_p50_ms", "send_lag_p99_ms", "cpu_us")
        ]
        if None in of:
            table.add_row(name, *["-"] * 7)
            continue
        rate, achieved, p50, p99, cpu_us = (float(str(value)) for value in of)
        met = p99 < LAG_MS_P99 and (name not in LEAN or cpu_us <= CPU_US)
        table.add_row(
            name,
            f"{rate:,.0f}",
            f"{achieved:,.0f}",
            f"{p50:.3f}",
            f"{p99:.2f}",
            f"{cpu_us:.0f}",
            f"{figures[f'loadgen_{name}_rounds_valid']} of {figures[f'loadgen_{name}_rounds']}",
            "" if name == "overloaded" else "met" if met else "missed",
        )
    return table


if __name__ == "__main__":
    main()
