"""A small multi-server queue that speaks the core's events and commands: rows to test with, and theory to test against.

Not the plane and not an engine: ``servers`` replicas, one task each, Poisson arrivals, exponential service, and a queue
that is first come first served or by priority. Every number comes from named streams.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage_bench.results.manifest import (
    LoadFact,
    Manifest,
    PolicyFact,
    ReplicaFact,
    Source,
    Status,
    Timing,
    write_manifest,
)
from sage_bench.results.recorder import RunRecorder
from sage_core.commands import AnyCommand, Dispatch, Reject, Respond, Task
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported, RequestArrived, TaskFinished, TokensProduced
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import SECOND, PoolKind, RequestKind, seconds, task_id

PIPELINES = {"chat": [("generate", "llm")], "embed": [("embed", "llm")]}
Step = tuple[int, list[AnyEvent], list[AnyCommand]]


@dataclass(frozen=True)
class Class:
    """A share of the requests. The first of ``prefill`` of a chat request's service is before its first token."""

    kind: RequestKind = RequestKind.LLM_CHAT
    tenant: str = "a"
    priority: int = 0
    share: float = 1.0
    input_tokens: int = 512
    output_tokens: int = 128
    prefill: float = 0.25


@dataclass(frozen=True)
class Queue:
    """What to simulate. rate: requests/s. queue_max: arrivals are rejected while so many tasks are queued."""

    rate: float
    service_s: float
    requests: int
    seed: int = 1
    servers: int = 1
    order: str = "fifo"
    queue_max: int | None = None
    report_s: float | None = None
    classes: Sequence[Class] = (Class(),)
    slo: SloTable = field(
        default_factory=lambda: SloTable({"chat": Slo(ttft_s=1.0, tpot_s=0.1), "embedding": Slo(e2e_s=0.5)})
    )

    def steps(self) -> Iterator[Step]:
        """(now, events, commands), in time order."""
        order: Callable[[Task], tuple[int, ...]] = (
            (lambda task: (task.priority, task.task)) if self.order == "priority" else (lambda task: (task.task,))
        )
        rows = self._requests()
        free = list(range(self.servers))
        queue: list[tuple[tuple[int, ...], Task]] = []
        happens: list[tuple[int, int, AnyEvent]] = [(row[0].scheduled_at, i, row[0]) for i, row in enumerate(rows)]
        heapq.heapify(happens)
        serial = len(rows)
        on: dict[int, int] = {}
        joined: list[AnyEvent] = [
            ReplicaJoined(r, "llm", PoolKind.LLM, r, f"node{r}", tasks_max=1, batch_tokens_max=8192)
            for r in range(self.servers)
        ]
        yield 0, joined, []
        reported = 0
        while happens:
            now = happens[0][0]
            events: list[AnyEvent] = []
            commands: list[AnyCommand] = []
            while happens and happens[0][0] == now:
                event = heapq.heappop(happens)[2]
                events.append(event)
                if isinstance(event, RequestArrived):
                    if self.queue_max is not None and len(queue) >= self.queue_max:
                        commands.append(Reject(event.request, "queue full", SECOND))
                        continue
                    task = Task(
                        task_id(event.request, 0),
                        0,
                        0,
                        event.priority,
                        now,
                        event.input_tokens,
                        event.output_tokens_max,
                    )
                    heapq.heappush(queue, (order(task), task))
                elif isinstance(event, TaskFinished):
                    heapq.heappush(free, on.pop(event.task))
                    commands.append(Respond(event.task >> 16))
            while queue and free:
                task = heapq.heappop(queue)[1]
                replica = heapq.heappop(free)
                on[task.task] = replica
                commands.append(Dispatch(replica, (task,)))
                _, each, service_ns = rows[task.task >> 16]
                if each.output_tokens:
                    first = now + round(each.prefill * service_ns)
                    heapq.heappush(happens, (first, serial, TokensProduced(task.task, 1)))
                heapq.heappush(happens, (now + service_ns, serial + 1, TaskFinished(task.task, each.output_tokens)))
                serial += 2
            if self.report_s is not None and now >= reported:
                reported += seconds(self.report_s)
                events.extend(ReplicaReported(r, int(r in on.values()), 0, 100) for r in range(self.servers))
            yield now, events, commands

    def _requests(self) -> list[tuple[RequestArrived, Class, int]]:
        streams = Streams(self.seed)
        gaps = streams.stream("gaps").exponential(1 / self.rate, self.requests)
        services = streams.stream("services").exponential(self.service_s, self.requests)
        total = sum(each.share for each in self.classes)
        picks = streams.stream("classes").choice(
            len(self.classes), self.requests, p=[c.share / total for c in self.classes]
        )
        rows, at = [], 0
        for i in range(self.requests):
            at += seconds(gaps[i])
            c = self.classes[picks[i]]
            slo = self.slo.of(c.kind, c.priority)
            arrived = RequestArrived(
                request=i,
                pipeline="embed" if c.kind is RequestKind.EMBEDDING else "chat",
                kind=c.kind,
                tenant=c.tenant,
                priority=c.priority,
                input_tokens=c.input_tokens,
                output_tokens_max=2 * c.output_tokens,
                scheduled_at=at,
                ttft_due_at=slo.ttft_due_at(at),
                due_at=slo.due_at(at, 2 * c.output_tokens),
            )
            rows.append((arrived, c, max(1, seconds(services[i]))))
        return rows


def run(
    folder: Path,
    queue: Queue,
    *,
    experiment: str = "queueing",
    policy: str | None = None,
    parameters: dict[str, Any] | None = None,
    source: Source = "simulation",
    status: Status = "complete",
    invalid: tuple[str, ...] = (),
    warmup_s: float = 0.0,
    config: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    price_per_h: float | None = None,
    buffer_rows: int = 4096,
    tasks: bool = True,
) -> Manifest:
    """Simulate ``queue`` into ``folder``, as the composition root would; the run's manifest."""
    now = 0
    recorder = RunRecorder(
        folder, PIPELINES, queue.slo, warmup_ns=seconds(warmup_s), buffer_rows=buffer_rows, tasks=tasks
    )
    with recorder:
        for now, events, commands in queue.steps():
            recorder(now, events, commands)
    return write_manifest(
        folder,
        experiment=experiment,
        run_id=folder.name,
        source=source,
        status=status,
        policy=PolicyFact(policy or queue.order, parameters or {}),
        seed=queue.seed,
        load=LoadFact(queue.rate, "poisson"),
        config={"load": {"rate": queue.rate}, "seed": queue.seed, "policy": queue.order, **(config or {})},
        overrides=overrides,
        duration_ns=now,
        digest="00" * 16,
        steps=0,
        control_s=0.0,
        timing=Timing("2000-01-01T00:00:00Z", 0.0, 0.0),
        native_build="none",
        warmup_ns=seconds(warmup_s),
        counts=recorder.counts(),
        replicas=tuple(ReplicaFact(**row) for row in recorder.replicas()),
        price_per_h=price_per_h,
        invalid=invalid,
    )
