"""What a streaming flow costs an item: ``python benchmarks/flow.py`` writes ``results/bench/flow.json``.

Items per CPU-second of this process by the number of stages (the cheapest function there is, so that what is measured is the
flow), by the kind of stage, and by the limit of the queues; and the peak of memory with a fast source and a slow sink.
CPU time, never wall time; the best of the rounds. These machines are noisy: compare figures of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_live.flow import QUEUE_LIMIT, Count, Flow, FlowRun, Mean, Quantile, sliding, tumbling

OUT = Path("results/bench/flow.json")
T = TypeVar("T")

STAGES = (1, 2, 4, 8)
LIMITS = (1, 8, 64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: dict[str, float] = {"load_average": os.getloadavg()[0], "items": options.items}
    for name, make in scenarios().items():
        figures[f"{name}_items_per_cpu_s"] = max(items_per_cpu_s(make, options.items) for _ in range(options.rounds))
    for count in (options.items // 10, options.items):
        figures[f"peak_bytes_{count}_items"] = peak_bytes(count)
    figures["load_average_end"] = os.getloadavg()[0]
    table = Table("", "", box=SIMPLE)
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,.2f}" if name.startswith("load") else f"{figure:,.0f}")
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def scenarios() -> dict[str, Callable[[int], FlowRun]]:
    """By name: a run over so many items."""
    made: dict[str, Callable[[int], FlowRun]] = {}
    for stages in STAGES:
        made[f"maps_{stages}"] = partial(maps, stages=stages)
    for limit in LIMITS:
        made[f"maps_4_limit_{limit}"] = partial(maps, stages=4, limit=limit)
    made["filter"] = lambda count: Flow.of(range(count)).filter(same).to(ignore)
    made["flat_map_of_4"] = lambda count: Flow.of(range(count // 4)).flat_map(lambda n: range(4)).to(ignore)
    made["batch_of_32"] = lambda count: Flow.of(range(count)).batch(32).to(ignore)
    made["coroutine"] = lambda count: Flow.of(range(count)).map(coroutine).to(ignore)
    made["coroutines_16_ordered"] = lambda count: Flow.of(range(count)).map(waiting, parallelism=16).to(ignore)
    made["coroutines_16_unordered"] = lambda count: (
        Flow.of(range(count)).map(waiting, parallelism=16, ordered=False).to(ignore)
    )
    made["tumbling_count"] = lambda count: Flow.of(range(count)).window(tumbling(1e-6), same, {"n": Count()}).to(ignore)
    made["tumbling_count_mean_quantile"] = lambda count: (
        Flow.of(range(count))
        .window(tumbling(1e-6), same, {"n": Count(), "m": Mean(same), "q": Quantile(0.9, same)})
        .to(ignore)
    )
    made["sliding_4_count"] = lambda count: (
        Flow.of(range(count)).window(sliding(4e-6, 1e-6), same, {"n": Count()}).to(ignore)
    )
    return made


def maps(count: int, stages: int, limit: int = QUEUE_LIMIT) -> FlowRun:
    flow = Flow.of(range(count))
    for _ in range(stages):
        flow = flow.map(same, queue_limit=limit)
    return flow.to(ignore, queue_limit=limit)


def items_per_cpu_s(make: Callable[[int], FlowRun], count: int) -> float:
    execution = make(count)
    began = time.process_time()
    asyncio.run(execution.run())
    return count / (time.process_time() - began)


def peak_bytes(count: int) -> float:
    """Allocated at most, with items of 1 kB, queues of 64 and a sink that gives way after every item."""

    async def slow(item: bytearray) -> None:
        await asyncio.sleep(0)

    flow = Flow.of(bytearray(1000) for _ in range(count)).map(same).map(same)
    tracemalloc.start()
    try:
        asyncio.run(flow.to(slow).run())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def same(item: T) -> T:
    return item


def ignore(item: object) -> None:
    pass


async def coroutine(item: int) -> int:
    return item


async def waiting(item: int) -> int:
    await asyncio.sleep(0)
    return item


if __name__ == "__main__":
    main()
