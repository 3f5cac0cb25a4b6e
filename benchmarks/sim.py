"""Simulated requests per CPU-second: ``make bench-sim`` prints a table and writes ``results/bench/sim.json``.

The whole path of ``sage run`` with all results written: the standard workload (Poisson, 512 tokens in, 128 out, hybrid,
iteration-level engines) at 10^4 to 10^7 requests, and at 1 and 256 replicas with the rate in proportion. Each in a child
of its own, after a run of ten requests in the same child, whose imports and caches are start-up and told apart. CPU time
of the child over all its threads, never wall time; these machines are noisy, so compare figures of one call.

``jump_speedup``: CPU time a request of the engine that walks one iteration at a time (Python, the executable meaning)
over the native engine that jumps, for the same tasks; the events must be equal.

``--peer NAME REQUESTS COMMAND`` runs another simulator beside it in the same call and counts the CPU time of its process
tree.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sage_core.commands import Dispatch, Task
from sage_core.events import AnyEvent
from sage_core.units import NEVER, Nanos, task_id
from sage_sim.engine import LlmReplica, SimulatedDevice
from sage_sim.profile import load_profile

OUT = Path("results/bench/sim.json")
RATE_PER_REPLICA = 122.0 / 8  # requests/s: 70 % of what the standard cluster sustains
SIZES = {"10k": 10_000, "100k": 100_000, "1m": 1_000_000, "10m": 10_000_000}
REPLICAS = (1, 256)
WALKED = 400  # requests that the walking engine is asked to serve
PROFILE = "llama-3.1-8b-a100-tp1"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no run of a million requests or more")
    parser.add_argument(
        "--peer",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "REQUESTS", "COMMAND"),
        help="another simulator's command, and how many requests it simulates",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    console = Console()
    figures: dict[str, float | None] = {"load_average": os.getloadavg()[0]}
    table = Table(title="simulated requests, hybrid, all results written")
    for heading in ("requests", "replicas", "per CPU-second", "start-up CPU s", "control plane", "peak MB"):
        table.add_column(heading, justify="right")
    for name, requests in SIZES.items():
        if options.quick and requests > 100_000:
            figures[f"sim_requests_per_cpu_s_{name}"] = None
            continue
        run = child(requests, 8)
        figures["sim_requests_per_cpu_s" if name == "100k" else f"sim_requests_per_cpu_s_{name}"] = rate(run)
        if name in ("100k", "1m"):
            figures[f"peak_mb_{name}"] = run["peak_mb"]
        row(table, run)
    for replicas in REPLICAS:
        run = child(100_000, replicas)
        figures[f"sim_requests_per_cpu_s_{replicas}_replica{'s' if replicas > 1 else ''}"] = rate(run)
        row(table, run)
    console.print(table)
    figures.update(jump(console))
    for name, requests, command in options.peer:
        cpu_s = peer(command)
        figures[f"peer_{name}_requests_per_cpu_s"] = int(requests) / cpu_s
        console.print(f"{name}: {int(requests) / cpu_s:,.0f} requests per CPU-second ({cpu_s:.1f} CPU s)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {options.out}; load average {figures['load_average']:.2f}")


def rate(run: dict[str, float]) -> float:
    return run["requests"] / run["cpu_s"]


def row(table: Table, run: dict[str, float]) -> None:
    table.add_row(
        f"{run['requests']:,.0f}",
        f"{run['replicas']:.0f}",
        f"{rate(run):,.0f}",
        f"{run['startup_s']:.2f}",
        f"{100 * run['control_s'] / run['cpu_s']:.0f} %",
        f"{run['peak_mb']:,.0f}",
    )


def simulate(requests: int, replicas: int) -> dict[str, float]:
    """One run in this process: CPU seconds, and peak resident memory (MB, imports included)."""
    from sage_bench.config import composed
    from sage_bench.run import run

    def go(number: int, folder: str) -> float:
        overrides = [
            "experiment=standard",
            f"load.requests={number}",
            f"load.rate={RATE_PER_REPLICA * replicas}",
            f"cluster.devices.0.count={replicas}",
            f"results={folder}",
        ]
        result = run(composed(overrides))
        assert result.counts.responded == number
        return result.finish.control_s

    before = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        go(10, folder)
        started = time.process_time()
        control_s = go(requests, folder)
        cpu_s = time.process_time() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "requests": requests,
        "replicas": replicas,
        "cpu_s": cpu_s,
        "startup_s": started - before,
        "control_s": control_s,
        "peak_mb": peak_mb,
    }


def child(requests: int, replicas: int) -> dict[str, float]:
    code = f"import json, runpy; m = runpy.run_path({__file__!r}); print(json.dumps(m['simulate']({requests}, {replicas})))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def jump(console: Console) -> dict[str, float]:
    """The engine that walks against the engine that jumps: the same tasks, the same events, CPU time of each."""
    walked_s, walked = serve(reference=True)
    jumped_s, jumped = serve(reference=False)
    for _ in range(4):
        jumped_s = min(jumped_s, serve(reference=False)[0])
    if walked != jumped:
        raise SystemExit("the engines differ: see tests/sim/test_engine_differential.py")
    console.print(
        f"engine alone: {1e6 * walked_s / WALKED:,.0f} us a request one iteration at a time, {1e6 * jumped_s / WALKED:.1f} us "
        f"jumping, equal events: {walked_s / jumped_s:,.0f}x"
    )
    return {"jump_speedup": walked_s / jumped_s, "engine_us_per_request": 1e6 * jumped_s / WALKED}


def serve(*, reference: bool) -> tuple[float, list[tuple[int, Sequence[AnyEvent]]]]:
    """CPU seconds and events of WALKED tasks of 512 tokens in and 128 out, 15.25 a second."""
    replica = LlmReplica(
        0,
        "llm",
        load_profile(PROFILE).iteration_time(),
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        block_size=16,
        kv_blocks=20_000,
    )
    device = SimulatedDevice(0, "node", replica, None, lambda request, stage: 128, reference=reference)
    told: list[tuple[int, Sequence[AnyEvent]]] = []
    arrivals = [(Nanos(round(i * 1e9 / RATE_PER_REPLICA)), i) for i in range(WALKED)]
    started = time.process_time()
    for at, request in arrivals:
        while device.wakeup_at < at:
            now = device.wakeup_at
            told.append((now, device.step(now, ())))
        task = Task(task_id(request, 0), 0, 0, 0, at, 512, 128)
        told.append((at, device.step(at, (Dispatch(0, (task,)),))))
    while device.wakeup_at < NEVER:
        now = device.wakeup_at
        told.append((now, device.step(now, ())))
    return time.process_time() - started, told


def peer(command: str) -> float:
    """CPU seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(shlex.split(command), stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
