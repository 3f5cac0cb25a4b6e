"""How good the decisions of each policy's order are: deadlines met, against the most that can be; ``results/bench/scheduling.json``.

The smallest case that has an exact answer: tasks that are all there at once, one replica that does one at a time, service
times that are known. Whenever the replica is free the order scores what is left, and the least score goes. The most
deadlines that any schedule can meet is Moore's algorithm (J. M. Moore, Management Science 15, 1968); a test holds it against
every permutation. Means over random instances, the same for every policy.

It judges orders alone: no routing, no batching, no limits, no classes, no arrivals to come; orders that differ in these alone
share a row. An order that looks well here may starve
somebody; ``sage paper --only policy_comparison`` has whole systems. What a decision costs is in ``make bench``.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_core.policy import Order, Speed
from sage_core.units import NEVER, Nanos, PoolKind
from sage_policies.presets import PRESETS

OUT: Final = Path("results/bench/scheduling.json")
LOADS: Final = (0.7, 1.0, 1.5, 3.0)
"""All work over the latest deadline: above 1 not all can be met."""
SPEED: Final = Speed(0.0, 5e4, 1e7)
"""Of an 8B model on one GPU, roughly: 50 us a token in, 10 ms a token out."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Instance:
    """(tasks,) each. work, due: ns."""

    input_tokens: Ints
    output_tokens: Ints
    work: Ints
    due: Ints


class Queue:
    """Some tasks of an instance as a policy sees them."""

    pool = "llm"
    pool_kind = PoolKind.LLM
    speed = SPEED
    bypassed = 0

    def __init__(self, instance: Instance, rows: Ints) -> None:
        count = len(rows)
        zero = np.zeros(count, np.int64)
        self.task = self.request = rows
        self.oldest = int(rows[0]) if count else -1
        self.kind = self.tenant = self.priority = self.attempt = self.prefix = self.tenant_service = zero
        self.arrived_at = self.queued_at = zero
        self.ttft_due_at = np.full(count, NEVER, np.int64)
        self.due_at = instance.due[rows]
        self.input_tokens = instance.input_tokens[rows]
        self.output_tokens = self.output_tokens_max = instance.output_tokens[rows]

    def __len__(self) -> int:
        return len(self.task)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "load_average": os.getloadavg()[0],
        "tasks": options.tasks,
        "instances": options.instances,
    }
    figures["policies"] = {name: {str(load): 0.0 for load in LOADS} for name in PRESETS}
    figures["optimum"] = {}
    for load in LOADS:
        drawn = [instance(options.tasks, load, seed) for seed in range(options.instances)]
        most = [optimum(each) for each in drawn]
        figures["optimum"][str(load)] = float(np.mean(most))
        for name, make in PRESETS.items():
            order = make().order
            figures["policies"][name][str(load)] = float(np.mean([met(order, each) for each in drawn]))
    Console(width=100).print(shown(figures))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def instance(tasks: int, load: float, seed: int) -> Instance:
    """Lengths as chats have them, deadlines anywhere up to the latest."""
    draw = np.random.Generator(np.random.PCG64(seed))
    tokens_in = np.maximum(draw.lognormal(6.0, 0.8, tasks), 8).astype(np.int64)
    tokens_out = np.maximum(draw.lognormal(4.5, 0.9, tasks), 2).astype(np.int64)
    work = (SPEED.input_token_ns * tokens_in + SPEED.output_token_ns * tokens_out).astype(np.int64)
    latest = work.sum() / load
    return Instance(tokens_in, tokens_out, work, draw.uniform(work, np.maximum(latest, work)).astype(np.int64))


def met(order: Order, of: Instance) -> int:
    """Deadlines that are met when ``order`` decides; ties go to the lower id, ``inf`` is not taken."""
    now, on_time = 0, 0
    left = np.arange(len(of.work))
    while len(left):
        scores = order.score(Nanos(now), Queue(of, left))
        first = int(np.argmin(scores))
        if np.isinf(scores[first]):
            break
        task = int(left[first])
        now += int(of.work[task])
        on_time += now <= of.due[task]
        left = np.delete(left, first)
    return on_time


def optimum(of: Instance) -> int:
    """The most deadlines that any schedule meets: by due time, dropping the longest so far whenever one would be late."""
    kept: list[int] = []  # of work, negative: the longest on top
    now = 0
    for task in np.argsort(of.due, kind="stable"):
        heapq.heappush(kept, -int(of.work[task]))
        now += int(of.work[task])
        if now > of.due[task]:
            now += heapq.heappop(kept)
    return len(kept)


def shown(figures: Mapping[str, Any]) -> Table:
    title = (
        f"deadlines met of {figures['tasks']}, mean of {figures['instances']} instances; in brackets: of the optimum"
    )
    table = Table("order of", *(f"load {load:g}" for load in LOADS), box=SIMPLE, title=title)
    best = figures["optimum"]
    table.add_row("optimum", *(f"{best[str(load)]:.2f}" for load in LOADS), style="bold")
    same: dict[tuple[float, ...], list[str]] = {}
    for name, of in figures["policies"].items():
        same.setdefault(tuple(of[str(load)] for load in LOADS), []).append(name)
    for counts, names in sorted(same.items(), key=lambda row: -sum(row[0])):
        cells = (
            f"{count:.2f} ({100 * count / best[str(load)]:.0f} %)" for count, load in zip(counts, LOADS, strict=True)
        )
        table.add_row(", ".join(names), *cells)
    return table


if __name__ == "__main__":
    main()
