"""What a gateway adds, beside other routers in the same run: ``make bench-gateway`` writes ``results/bench/gateway.json``.

A fake engine that answers at once and a load generator (both C++, ``benchmarks/http``) share one core; the process tree of
the router under test has another. Cells: JSON chat, chat streamed as 33 events back to back, and embeddings, closed loop
at concurrency 1, 16 and 64; and paced streams, 5 ms between events, open loop, of 33 events and of 329: what a stream
costs is shared by its events, so the first tells of requests, the second of tokens. A router adds its median less that of the
direct connection of the same round. CPU time is that of the router's process tree over all its requests, warm-up
included.

Systems take turns cell by cell, so that they meet the same disturbances; each figure is the median of the rounds. A cell
with one failed request has no figure, and the exit status is 1. These machines are noisy: compare figures of one run.

``bare_relay`` passes bytes from socket to socket and looks at none. ``vllm_router`` is the PyPI
package, installed into ``.sage/bench``. ``--peer NAME COMMAND`` adds another router; the
command says {port} where it is to listen and {backend} where the engine's port goes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from loopback import (
    TOOLS,
    cpu_ns,
    cpu_seconds,
    fake_backend,
    free_port,
    last_line,
    others_share,
    pinned,
    running,
    set_pace,
    tool,
)
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

OUT = Path("results/bench/gateway.json")
VLLM_ROUTER = "vllm-router==0.1.17"
CHAT_MODEL, EMBED_MODEL = "fake", "fake-embed"
KINDS = ("chat", "stream", "embed")
CONCURRENCY = (1, 16, 64)
EVENTS = 33  # data events of a stream
EVENTS_LONG = 329
PACE_MS = 5
PACED_RATE = (
    97.0  # streams/s: 3,200 events/s; about 16 streams at a time, which get their events together. Arrivals are
)
# not in step with the events: a request that always came with (or never) would see one phase only.
STARTED_WITHIN_S = 90.0  # vllm_router looks for its engine every 30 s
# Of `ours`, in us: the most it may be, and the most it may be as a multiple of vllm_router in the same run.
TARGETS: tuple[tuple[str, float | None, float | None], ...] = (
    ("chat_c64_cpu_us", 120.0, 1.3),
    ("stream_c16_cpu_us", None, 1.0),
    ("embed_c16_cpu_us", None, 1.3),
    ("embed_c64_cpu_us", None, 1.3),
    ("paced_chunk_cpu_us", 40.0, None),
    ("paced_long_chunk_cpu_us", 40.0, None),
    ("paced_ttft_added_us", 1000.0, None),
    ("idle_dispatch_p99_us", 1000.0, None),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: its name in the figures, and what the load generator is told."""

    name: str
    kind: str
    load: tuple[str, ...]
    events: int = EVENTS
    times: int = 1
    """How much longer than the others it is measured."""

    @property
    def paced(self) -> bool:
        return self.name.startswith("paced")


@dataclass(frozen=True, slots=True)
class System:
    """Something that answers on `port`: a router's process, or (without one) the engine itself."""

    name: str
    port: int
    process: psutil.Process | None


Sample = dict[str, float]  # what one system did in one cell of one round
CELLS = (
    *(Cell(f"{kind}_c{c}", kind, ("--connections", str(c))) for kind in KINDS for c in CONCURRENCY),
    Cell("paced", "stream", ("--rate", str(PACED_RATE))),
    Cell("paced_long", "stream", ("--rate", str(PACED_RATE * EVENTS / EVENTS_LONG)), EVENTS_LONG, 6),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of short cells, to try the script")
    parser.add_argument("--systems", default="bare_relay,vllm_router,ours", help="which to measure, beside direct")
    parser.add_argument("--cells", default=",".join(c.name for c in CELLS), help="which cells to measure")
    parser.add_argument(
        "--peer", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"), help="another router"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rounds, seconds = (1, 0.2) if options.quick else (3, 1.6)
    if shutil.which("taskset") is None:
        raise SystemExit("taskset (of util-linux) is not on PATH: without it the cores cannot be kept apart")
    wanted = options.cells.split(",")
    if unknown := set(wanted) - {cell.name for cell in CELLS}:
        raise SystemExit(f"--cells: {', '.join(sorted(unknown))}: expected some of {', '.join(c.name for c in CELLS)}")
    cells = [cell for cell in CELLS if cell.name in wanted]
    console = Console()
    figures: dict[str, object] = {"load_average": os.getloadavg()[0], "machine": machine()}
    before = cpu_seconds()
    with ExitStack() as stack:
        backend = stack.enter_context(fake_backend())
        systems, skipped = start(stack, options.systems.split(","), dict(options.peer), backend)
        samples, refused = measure(systems, cells, backend, rounds, seconds)
        set_pace(backend, 0, EVENTS - 2)
        ours = [system for system in systems if system.name == "ours"]
        figures["idle_dispatch_p99_us"] = idle_dispatch_p99_us(ours[0], seconds) if ours else None
    names = [system.name for system in systems]
    figures.update(summary(names, cells, samples))
    figures |= {
        "skipped": skipped,
        "refused": refused,
        "others_share": others_share(before),
        "load_average_end": os.getloadavg()[0],
    }
    console.print(measured(names, cells, figures))
    if "ours" in names:
        console.print(compared(figures))
    for name, reason in skipped.items():
        console.print(f"{name} was not measured: {reason}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"written to {options.out}; load average {figures['load_average']:.2f} before, {os.getloadavg()[0]:.2f} after; "
        f"other programs had {figures['others_share']:.0%} of the cores (above 10 %: measure again)"
    )
    if refused:
        raise SystemExit("refused, for failed requests: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))


# --- the systems -----------------------------------------------------------------------------------------------------


def ours_command(port: int, backend: int, record: Path) -> list[str]:
    """Our gateway before the fake engine, writing its log and rows."""
    sage = str(Path(sys.executable).with_name("sage"))
    engine = f"http://127.0.0.1:{backend}"
    return [
        *(sage, "gateway", "start", "--port", str(port), "--engine", f"{engine},model={CHAT_MODEL}"),
        *("--engine", f"{engine},model={EMBED_MODEL},kind=embedding,name=embed", "--record", str(record)),
    ]


def bare_relay_command(port: int, backend: int) -> list[str]:
    """Bytes from socket to socket."""
    return [str(tool("bare_relay")), "--port", str(port), "--backend", str(backend)]


def vllm_router_command(port: int, backend: int) -> list[str]:
    """The router of PyPI, installed on first use; round robin, its cheapest policy.

    Raises OSError where it cannot be had.
    """
    home = TOOLS / "vllm-router"
    program = home / "bin" / "vllm-router"
    if not program.exists():
        for command in (
            [sys.executable, "-m", "venv", str(home)],
            [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", VLLM_ROUTER],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                shutil.rmtree(home, ignore_errors=True)
                raise OSError(f"{VLLM_ROUTER} could not be installed: {last_line(done.stderr)}")
    return [
        *(str(program), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{backend}"),
        *("--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "warning"),
    ]


def start(
    stack: ExitStack, wanted: Sequence[str], peers: dict[str, str], backend: int
) -> tuple[list[System], dict[str, str]]:
    """The systems that run, `direct` first, and why others do not. They stop with the stack."""
    systems = [System("direct", backend, None)]
    skipped: dict[str, str] = {}
    record = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sage-bench-")))
    known: dict[str, Callable[[int, int], list[str]]] = {
        "bare_relay": bare_relay_command,
        "vllm_router": vllm_router_command,
        "ours": partial(ours_command, record=record / "run"),
    }
    if unknown := set(wanted) - {"", *known}:
        raise SystemExit(f"--systems: {', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    for name in [*(name for name in known if name in wanted), *peers]:
        port = free_port()
        try:
            if name in peers:
                command = shlex.split(peers[name].format(port=port, backend=backend))
            else:
                command = known[name](port, backend)
            process = stack.enter_context(running(command, core=-1, log=TOOLS / f"{name}.log"))
            await_answer(port, process, TOOLS / f"{name}.log")
        except OSError as error:
            skipped[name] = str(error)
            continue
        systems.append(System(name, port, psutil.Process(process.pid)))
    return systems, skipped


def await_answer(port: int, process: subprocess.Popen[str], log: Path) -> None:
    """Returns when the system answers a chat request. Raises OSError where it ends, or does not within the time."""
    body = json.dumps({"model": CHAT_MODEL, "messages": [{"role": "user", "content": "ready?"}]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    deadline = time.monotonic() + STARTED_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    what = "gave no answer" if process.poll() is None else f"ended with status {process.returncode}"
    raise OSError(f"it {what}: {last_line(log.read_text()) or 'no output'}")


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    systems: Sequence[System], cells: Sequence[Cell], backend: int, rounds: int, seconds: float
) -> tuple[dict[tuple[str, str], list[Sample]], dict[str, str]]:
    """Samples by (system, cell), one a round; and what is refused, with the reasons of the failures."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    refused: dict[str, str] = {}
    for turn in range(rounds):
        # Each round begins with another system: none always follows the same neighbour.
        first = turn % len(systems)
        for cell in cells:
            set_pace(backend, PACE_MS if cell.paced else 0, cell.events - 2)
            for system in (*systems[first:], *systems[:first]):
                sample = one(system, cell, seconds)
                if isinstance(sample, str):
                    refused[f"{system.name}_{cell.name}"] = sample
                else:
                    samples.setdefault((system.name, cell.name), []).append(sample)
    for key in list(samples):
        if "_".join(key) in refused:
            del samples[key]
    return samples, refused


def one(system: System, cell: Cell, seconds: float) -> Sample | str:
    """One system in one cell: its sample, or the reasons of its failures."""
    model = EMBED_MODEL if cell.kind == "embed" else CHAT_MODEL
    command = [
        *pinned(0), str(tool("http_load")), "--port", str(system.port), "--kind", cell.kind, "--model", model,
        "--events", str(cell.events), "--seconds", str(seconds * cell.times), "--warmup-s", "0.2", *cell.load,
    ]  # fmt: skip
    try:
        before = cpu_ns(system.process) if system.process else 0
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        spent_us = (cpu_ns(system.process) - before) / 1e3 if system.process else 0.0
    except psutil.NoSuchProcess:
        return "the process ended"
    if done.returncode != 0:
        return last_line(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout)
    if told["failures"] or not told["n"]:
        return f"{told['failures']} of {told['total']} failed {told['reasons']}, {told['n']} measured"
    names = ("ttft_p50_us",) if cell.paced else ("rps", "p50_us", "p99_us")
    sample: Sample = {name: told[name] for name in names}
    if system.process is not None:
        sample["cpu_us"] = spent_us / told["total"]
    return sample


def idle_dispatch_p99_us(ours: System, seconds: float) -> float | None:
    """99th percentile, of requests that find an idle engine, from the end of their parsing to the write to the engine.

    From the histogram of ``/metrics`` over a closed loop of one connection, linear within the bucket.
    """
    cell = next(cell for cell in CELLS if cell.name == "chat_c1")
    before = idle_dispatch_counts(ours.port)
    if isinstance(one(ours, cell, seconds), str):
        return None
    after = idle_dispatch_counts(ours.port)
    counts = [(bound, count - then) for (bound, count), (_, then) in zip(after, before, strict=True)]
    rank = 0.99 * counts[-1][1]
    low_s, below = 0.0, 0.0
    for bound_s, count in counts:
        if count >= rank > 0:
            within = (rank - below) / (count - below)
            return round((low_s + (bound_s - low_s) * within) * 1e6, 2) if math.isfinite(bound_s) else low_s * 1e6
        low_s, below = bound_s, count
    return None


def idle_dispatch_counts(port: int) -> list[tuple[float, float]]:
    """Upper bounds in seconds and cumulative counts."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1:{port}/metrics", timeout=5
    ) as answer:
        text = answer.read().decode()
    found = re.findall(r'^sage_idle_dispatch_seconds_bucket\{le="([^"]+)"\} (\d+)$', text, re.MULTILINE)
    return [(float(bound), float(count)) for bound, count in found]


# --- figures ---------------------------------------------------------------------------------------------------------


def summary(
    systems: Sequence[str], cells: Sequence[Cell], samples: dict[tuple[str, str], list[Sample]]
) -> dict[str, float | None]:
    """The figures by name: medians over rounds; None where a cell was refused."""
    figures: dict[str, float | None] = {}
    for system in systems:
        for cell in cells:
            rows = samples.get((system, cell.name), [])
            direct = samples.get(("direct", cell.name), [])
            if cell.paced:
                figures[f"{system}_{cell.name}_ttft_p50_us"] = median(rows, "ttft_p50_us")
                if system != "direct":
                    chunk = median(rows, "cpu_us")
                    per_event = None if chunk is None else round(chunk / cell.events, 2)
                    figures[f"{system}_{cell.name}_chunk_cpu_us"] = per_event
                    figures[f"{system}_{cell.name}_ttft_added_us"] = added(rows, direct, "ttft_p50_us")
                continue
            for name in ("rps", "p50_us", "p99_us"):
                figures[f"{system}_{cell.name}_{name}"] = median(rows, name)
            if system != "direct":
                figures[f"{system}_{cell.name}_cpu_us"] = median(rows, "cpu_us")
                figures[f"{system}_{cell.name}_added_p50_us"] = added(rows, direct, "p50_us")
                figures[f"{system}_{cell.name}_added_p99_us"] = added(rows, direct, "p99_us")
    return figures


def median(rows: Sequence[Sample], name: str) -> float | None:
    return round(statistics.median(row[name] for row in rows), 2) if rows else None


def added(rows: Sequence[Sample], direct: Sequence[Sample], name: str) -> float | None:
    """Median over rounds of what a system takes longer than the direct connection of its round."""
    if not rows or not direct:
        return None
    return round(statistics.median(row[name] - base[name] for row, base in zip(rows, direct, strict=True)), 2)


def measured(systems: Sequence[str], cells: Sequence[Cell], figures: dict[str, object]) -> Table:
    table = Table(title="microseconds; +: over direct; paced: TTFT, and CPU a chunk", box=SIMPLE)
    for heading in ("cell", "", "req/s", "p50", "p99", "+p50", "+p99", "CPU"):
        table.add_column(heading, justify="left" if heading in ("cell", "") else "right", no_wrap=True)
    for cell in cells:
        ends = ["rps", "p50_us", "p99_us", "added_p50_us", "added_p99_us", "cpu_us"]
        if cell.paced:
            ends = ["", "ttft_p50_us", "", "ttft_added_us", "", "chunk_cpu_us"]
        for system in systems:
            row = [text(figures.get(f"{system}_{cell.name}_{end}")) for end in ends]
            table.add_row(cell.name if system == systems[0] else "", system, *row, end_section=system == systems[-1])
    return table


def compared(figures: dict[str, object]) -> Table:
    """Our figures beside vllm_router's of the same run, and beside the targets."""
    table = Table("", "ours", "vllm_router", "ratio", "at most", "", title="targets", box=SIMPLE)
    for name, most, ratio in TARGETS:
        ours, theirs = figures.get(f"ours_{name}", figures.get(name)), figures.get(f"vllm_router_{name}")
        times = ours / theirs if isinstance(ours, float) and isinstance(theirs, float) else None
        limits = [f"{most:.0f}"] if most is not None else []
        limits += [f"{ratio}x"] if ratio is not None else []
        if not isinstance(ours, float) or (ratio is not None and times is None):
            verdict = "not measured"
        else:
            met = (most is None or ours <= most) and (ratio is None or times is None or times <= ratio)
            verdict = "met" if met else "MISSED"
        table.add_row(name, text(ours), text(theirs), text(times, 2), " and ".join(limits), verdict)
    return table


def text(figure: object, digits: int = 0) -> str:
    return f"{figure:.{digits}f}" if isinstance(figure, float) else "-"


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cores = sorted(os.sched_getaffinity(0))
    compiler = subprocess.run(
        [os.environ.get("CXX", "g++"), "-dumpfullversion"], capture_output=True, text=True, check=False
    )
    return {
        "cores": len(cores),
        "engine_and_load_core": cores[0],
        "router_core": cores[-1],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "compiler": compiler.stdout.strip(),
        "vllm_router": VLLM_ROUTER.partition("==")[2],
    }


if __name__ == "__main__":
    main()
