"""Eight emulated engines, the gateway and the load generator on the cores of one machine: ``make bench-emulated`` writes
``results/bench/emulated.json``.

1,000 requests/s, Poisson, open loop, by ``sage run driver=live``: six H100s with Llama-3.1-8B and two L4s with an embedding
model, 70 % chat and 30 % embeddings, streamed and not. Answers are short, because a token of a stream costs three
processes a wake-up. What is measured: whether the generator kept up, errors, latencies beside those of the simulated run
of the same configuration, how late the emulated engines were against their own models, and who used the CPU while the
load was on. Log and rows are written as in any run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from loopback import cpu_ns, cpu_seconds, others_share
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_bench.config import composed
from sage_bench.live import run_live
from sage_bench.run import run

OUT = Path("results/bench/emulated.json")
RATE = 1000.0
OUTPUT_TOKENS = 8
CLUSTER = (
    "cluster.devices=["
    "{node: h100, count: 6, llm: {profile: llama-3.1-8b-h100-tp1, max_num_seqs: 128, max_num_batched_tokens: 2048}}, "
    "{node: l4, count: 2, embed: {profile: bge-large-en-v1.5-l4, max_batch_tasks: 32, max_batch_tokens: 16384}}]"
)
CHAT = "load.classes.chat."
LENGTHS = (
    f"~{CHAT}input_tokens", f"+{CHAT}input_tokens={{_target_: sage_bench.loads.Fixed, value: 128}}",
    f"~{CHAT}output_tokens", f"+{CHAT}output_tokens={{_target_: sage_bench.loads.Fixed, value: {OUTPUT_TOKENS}}}",
    f"{CHAT}output_tokens_max={OUTPUT_TOKENS}",
)  # fmt: skip
SCENARIOS = {"json": "driver.stream=false", "stream": "driver.stream=true"}
SETTLED_S = 3.0  # of load before the window in which CPU is counted
LEFT_S = 2.0  # and after it
ROLES = ("engines", "gateway", "generator")


@dataclass(frozen=True, slots=True)
class Sample:
    """At one instant: seconds, CPU seconds by role, requests that the engines have ended, and their lateness."""

    at: float
    cpu_s: dict[str, float]
    ended: float
    lateness: dict[float, float]  # events by upper bound in seconds, cumulative


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seconds", type=float, default=15.0, help="of load, each scenario")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=2, metavar=("SCENARIO", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        scenario, folder = options.child
        live(scenario, options.rate, options.seconds, Path(folder))
        return
    figures: dict[str, object] = {"cores": os.cpu_count(), "rate": options.rate, "load_average": os.getloadavg()[0]}
    before = cpu_seconds()
    refused = []
    with tempfile.TemporaryDirectory(prefix="sage-bench-emulated-") as name:
        for scenario in SCENARIOS:
            measured = one(scenario, options.rate, options.seconds, Path(name))
            figures |= {f"emulated_{scenario}_{key}": value for key, value in measured.items()}
            if measured["failures"]:
                refused.append(f"{scenario}: {measured['failures']}")
    figures |= {"load_average_end": os.getloadavg()[0], "others_share": others_share(before)}
    console = Console()
    console.print(table_of(figures))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"written to {options.out}; load average {figures['load_average']:.2f} before; other programs had "
        f"{figures['others_share']:.0%} of the cores (above 10 %: measure again)"
    )
    if refused:
        raise SystemExit("failed requests: " + "; ".join(refused))


# --- the run ---------------------------------------------------------------------------------------------------------


def overrides(scenario: str, rate: float, seconds: float, folder: Path) -> list[str]:
    return [
        CLUSTER, *LENGTHS, f"load.rate={rate}", f"load.duration_s={seconds}", "policy=least_in_flight",
        f"results={folder}", f"name={scenario}",
    ]  # fmt: skip


def live(scenario: str, rate: float, seconds: float, folder: Path) -> None:
    """The run itself, in a process of its own: its last line is the generator's verdict and the folder."""
    given = overrides(scenario, rate, seconds, folder)
    done = run_live(composed(["driver=live", SCENARIOS[scenario], *given]), given, lambda text: print(text, flush=True))
    told = {"folder": str(done.folder), "valid": done.summary.valid, **done.summary.as_dict()}
    print(json.dumps(told), flush=True)


def one(scenario: str, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """A scenario's figures."""
    command = [sys.executable, __file__, "--child", scenario, str(folder)]
    command += ["--rate", str(rate), "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        while (line := child.stdout.readline().strip()) and line != "sending":
            pass
        samples = []
        for pause in (SETTLED_S, seconds - SETTLED_S - LEFT_S):
            time.sleep(pause)
            if child.poll() is None:
                samples.append(sample(psutil.Process(child.pid)))
        last = child.stdout.read().strip().splitlines()
    if child.returncode or len(samples) < 2:
        raise SystemExit(f"{scenario}: the run failed with status {child.returncode}")
    told: dict[str, Any] = json.loads(last[-1])
    before, after = samples
    served = after.ended - before.ended
    figures: dict[str, Any] = {key: told[key] for key in ("valid", "invalid", "achieved_rate", "failures")}
    figures |= {f"send_lag_{part}_ms": told[f"send_lag_ms_{part}"] for part in ("p50", "p99", "max")}
    figures["served_rate"] = served / (after.at - before.at)
    for role in ROLES:
        spent_s = after.cpu_s[role] - before.cpu_s[role]
        figures[f"{role}_cores"] = spent_s / (after.at - before.at)
        figures[f"{role}_cpu_us"] = spent_s / served * 1e6
    figures |= {f"lateness_p{q}_ms": quantile(before, after, q / 100) * 1e3 for q in (50, 99)}
    figures |= {f"live_{key}": value for key, value in latencies(Path(told["folder"])).items()}
    simulated = run(composed(overrides(scenario, rate, seconds, folder / "sim"))).folder
    return figures | {f"simulated_{key}": value for key, value in latencies(simulated).items()}


def sample(child: psutil.Process) -> Sample:
    """Of a running child and its processes."""
    cpu_s = dict.fromkeys(ROLES, 0.0)
    ended, lateness = 0.0, dict[float, float]()
    at = time.monotonic()
    for process in child.children(recursive=True):
        if process.children():
            continue  # a guard, which ends the other if we die
        command = process.cmdline()
        engine = "serve" in command
        cpu_s["engines" if engine else "gateway"] += cpu_ns(process) / 1e9
        if engine:
            text = metrics(int(command[command.index("--port") + 1]))
            ended += sum(counts(text, "vllm:request_success_total")) + sum(
                counts(text, "sage_emulated_embedded_texts_total")
            )
            for bound, count in re.findall(
                r'^sage_emulated_lateness_seconds_bucket\{.*le="([^"]+)".*\} (\S+)$', text, re.M
            ):
                lateness[float(bound)] = lateness.get(float(bound), 0.0) + float(count)
    cpu_s["generator"] = cpu_ns(child) / 1e9 - cpu_s["engines"] - cpu_s["gateway"]
    return Sample(at, cpu_s, ended, lateness)


def metrics(port: int) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def counts(text: str, name: str) -> Iterable[float]:
    return (float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


# --- figures ---------------------------------------------------------------------------------------------------------


def quantile(before: Sample, after: Sample, q: float) -> float:
    """Seconds, linear within the bucket; the last bound where it is beyond it."""
    bounds = sorted(after.lateness)
    total = after.lateness[bounds[-1]] - before.lateness[bounds[-1]]
    low_s, below = 0.0, 0.0
    for bound_s in bounds[:-1]:
        count = after.lateness[bound_s] - before.lateness[bound_s]
        if count >= q * total > 0:
            return low_s + (bound_s - low_s) * (q * total - below) / (count - below)
        low_s, below = bound_s, count
    return low_s


def latencies(folder: Path) -> dict[str, float]:
    """Milliseconds from the scheduled arrival to the end, by kind of request."""
    frame = pd.read_parquet(folder / "requests.parquet", columns=["kind", "e2e_ns"])
    e2e_ms = {kind: frame.loc[frame["kind"] == kind, "e2e_ns"].dropna() / 1e6 for kind in ("chat", "embedding")}
    return {f"{kind}_p{q}_ms": float(of.quantile(q / 100)) for kind, of in e2e_ms.items() for q in (50, 99)}


def table_of(figures: dict[str, object]) -> Table:
    table = Table(title=f"{figures['rate']:g} requests/s to 8 emulated engines", box=SIMPLE)
    for heading in ("", *SCENARIOS):
        table.add_column(heading, justify="right" if heading else "left")
    first = f"emulated_{next(iter(SCENARIOS))}_"
    for key in (name.removeprefix(first) for name in figures if name.startswith(first)):
        values = [figures[f"emulated_{scenario}_{key}"] for scenario in SCENARIOS]
        table.add_row(key, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    return table


if __name__ == "__main__":
    main()
