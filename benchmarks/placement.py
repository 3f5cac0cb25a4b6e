"""The cost of placing jobs and of managing them: prints a table, writes ``results/bench/placement.json`` and a figure.

*plan*: every job of a mixed cluster (nodes with CPUs, L4, A100 and H100; LLMs, embeddings, operators; labels, alternatives,
shared GPUs, anti-affinity) placed by each strategy, ten jobs a node; and on half the nodes, where many have no place and are
told why. *submit*: the job manager places and starts all of them in one step. *events*: random lives of jobs, instances and
nodes (tests/core/test_jobs_random.py), with every invariant checked along the way from outside.

CPU time of this process, least of three; never wall time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from sage_bench.figures.placement import placement
from sage_bench.figures.style import save
from sage_core.cluster import Cluster, Gpu, Job, Needs, Node
from sage_core.jobs import JobManager, Start, Submitted
from sage_core.node_selector import STRATEGIES, NodeSelector
from sage_core.plan import plan
from sage_core.rng import Streams
from sage_core.units import Nanos

OUT: Final = Path("results/bench/placement.json")
NODES: Final = (25, 50, 100, 200, 400)
JOBS_PER_NODE: Final = 10
NODES_TARGET: Final = 200
EVENTS: Final = 100_000
LIVES: Final = Path(__file__).parents[1] / "tests" / "core" / "test_jobs_random.py"

Figures = dict[str, float]
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the events, no more than 200 nodes")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    console = Console()
    figures: Figures = {"load_average": os.getloadavg()[0]}
    plans(figures, console, [nodes for nodes in NODES if nodes <= NODES_TARGET or not options.quick])
    submission(figures, console)
    lives(figures, console, EVENTS // 10 if options.quick else EVENTS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    drawn = save(placement(figures), options.out.with_suffix(""))
    console.print(f"wrote {options.out}, {', '.join(map(str, drawn))}; load average {figures['load_average']:.2f}")


def plans(figures: Figures, console: Console, sizes: list[int]) -> None:
    """``plan_cpu_s_STRATEGY_NODES``, and ``..._full`` with twice the jobs that the nodes are for."""
    table = Table("strategy", "nodes", "jobs", "placed", "CPU s", title="Plans")
    for strategy in STRATEGIES:
        for nodes in sizes:
            found, cpu_s = least(lambda nodes=nodes, strategy=strategy: plan(cluster(nodes), strategy))  # type: ignore[misc]
            figures[f"plan_cpu_s_{strategy}_{nodes}"] = cpu_s
            table.add_row(strategy, str(nodes), f"{nodes * JOBS_PER_NODE:,}", f"{len(found.placed):,}", f"{cpu_s:.3f}")
            if nodes == NODES_TARGET:
                figures[f"placed_{strategy}_{nodes}"] = len(found.placed)
                figures[f"unplaced_jobs_{strategy}_{nodes}"] = len(found.unplaced)
        half = Cluster(cluster(NODES_TARGET).nodes[::2], cluster(NODES_TARGET).jobs)
        found, cpu_s = least(lambda half=half, strategy=strategy: plan(half, strategy))  # type: ignore[misc]
        figures[f"plan_cpu_s_{strategy}_full"] = cpu_s
        figures[f"unplaced_jobs_{strategy}_full"] = len(found.unplaced)
        told = f"{len(found.placed):,}, {len(found.unplaced):,} jobs not"
        table.add_row(strategy, str(NODES_TARGET // 2), f"{len(half.jobs):,}", told, f"{cpu_s:.3f}")
    console.print(table)


def submission(figures: Figures, console: Console) -> None:
    """``submit_cpu_s``: the manager's first step with all jobs of the target."""
    whole = cluster(NODES_TARGET)

    def submit() -> int:
        manager = JobManager(NodeSelector("pack"), whole.nodes)
        return sum(isinstance(each, Start) for each in manager.step(Nanos(0), [Submitted(job) for job in whole.jobs]))

    started, figures["submit_cpu_s"] = least(submit)
    console.print(
        f"submit: {len(whole.jobs):,} jobs, {started:,} instances started, {figures['submit_cpu_s']:.3f} CPU s"
    )


def lives(figures: Figures, console: Console, events: int) -> None:
    """``events``, all of them legal, with ``events_cpu_s`` of the manager and its world together; a broken rule raises."""
    world = module(LIVES).World("pack", seed=1)
    before = time.process_time()
    world.wander(events, check_every=10)
    figures["events"], figures["events_cpu_s"] = world.events, time.process_time() - before
    figures["events_instances"], figures["events_violations"] = world.issued, 0
    console.print(
        f"events: {world.events:,}, {world.issued:,} instances, no rule broken, {figures['events_cpu_s']:.1f} CPU s "
        "with the checks"
    )


def cluster(nodes: int) -> Cluster:
    """The same cluster for the same number of nodes."""
    random = Streams(0).stream(f"cluster/{nodes}")
    jobs = tuple(job(f"job-{i}", random) for i in range(nodes * JOBS_PER_NODE))
    return Cluster(tuple(node(f"node-{i:04}", random) for i in range(nodes)), jobs)


def node(name: str, random: np.random.Generator) -> Node:
    zone = {"zone": "abc"[random.integers(0, 3)]}
    draw = random.random()
    if draw < 0.4:
        return Node(name, 64, 256, (), 2.856, zone)
    if draw < 0.7:
        return Node(name, 48, 192, (Gpu("l4", 24, 4),), 4.6016, zone)
    if draw < 0.9:
        return Node(name, 96, 1152, (Gpu("a100_sxm", 80, 8),), 27.4472, zone)
    return Node(name, 192, 2048, (Gpu("h100_sxm", 80, 8),), 55.04, zone)


def job(name: str, random: np.random.Generator) -> Job:
    draw, labels = random.random(), {"zone": "abc"[random.integers(0, 3)]} if random.random() < 0.1 else {}
    anti = bool(random.random() < 0.1)
    replicas = 2 if anti else 1
    if draw < 0.35:
        needs = (Needs(1, 4, 1, 6, None, labels), Needs(4, 8, labels=labels))
        return Job(name, "embedding", "m", needs, replicas, anti)
    if draw < 0.60:
        return Job(name, "llm", "m", Needs(2, 24, 1, 20, None, labels), replicas, anti)
    if draw < 0.72:
        return Job(name, "llm", "m", Needs(4, 64, 1, 0, "a100_sxm"), replicas, anti, priority=-1)
    if draw < 0.75:
        return Job(name, "llm", "m", Needs(8, 128, 2, 40, "h100_sxm"), replicas, anti, priority=-1)
    return Job(name, "operator", "m", Needs(float(random.integers(1, 5)), 8, labels=labels), replicas, anti)


def least(call: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its CPU time: the least of three calls."""
    times = []
    for _ in range(3):
        before = time.process_time()
        result = call()
        times.append(time.process_time() - before)
    return result, min(times)


def module(path: Path) -> ModuleType:
    """A file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


if __name__ == "__main__":
    main()
