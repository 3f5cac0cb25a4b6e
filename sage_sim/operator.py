"""CPU operators (retrieve, rerank, tool): a few workers, first come first served.

Service takes ``fixed_ns + input_token_ns * input_tokens``; what comes of it has the size that the load says. A worker that has started a function finishes it: cancelling
such a task drops its result but frees no worker. Nothing is random and nothing contends but the workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from sage_core.backend import OutputTokens
from sage_core.commands import AnyCommand, Cancel, Dispatch, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported, TaskFinished
from sage_core.load import AS_INPUT
from sage_core.units import NEVER, Nanos, PoolKind, request_of


@dataclass(frozen=True, slots=True)
class OperatorReplica:
    """``workers`` CPU workers. Raises ConfigError."""

    replica: int
    pool: str
    workers: int
    fixed_ns: int
    input_token_ns: int = 0

    def __post_init__(self) -> None:
        for key, least in (("workers", 1), ("fixed_ns", 0), ("input_token_ns", 0)):
            value = getattr(self, key)
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"{key} of replica {self.replica}: expected a whole number from {least}, got {value!r}"
                )


class OperatorDevice:
    """A BackendModel (sage_core.backend) of one replica of CPU workers. results: sizes of what comes of each task."""

    def __init__(self, device: int, node: str, operator: OperatorReplica, results: OutputTokens) -> None:
        self._device = device
        self._node = node
        self._operator = operator
        self._results = results
        self._waiting: deque[Task] = deque()
        self._running: list[_Run] = []  # heap
        self._starts = 0
        self._dropped: set[int] = set()  # running tasks whose result is not wanted
        self._known: dict[int, int] = {}  # size of the result of each task that waits or runs
        self._ended: list[AnyEvent] = []  # not yet told
        self._busy_ns = 0  # of tasks that have ended

    def joined(self) -> list[ReplicaJoined]:
        """What the replica says when it becomes healthy. The speed hints are exact for a task that does not wait."""
        operator = self._operator
        return [
            ReplicaJoined(
                replica=operator.replica,
                pool=operator.pool,
                pool_kind=PoolKind.OPERATOR,
                device=self._device,
                node=self._node,
                tasks_max=operator.workers,
                batch_tokens_max=0,
                fixed_ns=float(operator.fixed_ns),
                input_token_ns=float(operator.input_token_ns),
            )
        ]

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]:
        """Advance to ``now``, apply ``commands``, return what the plane should know. Raises IllegalEvent."""
        self._run(now)
        for command in commands:
            if not isinstance(command, Dispatch | Cancel) or command.replica != self._operator.replica:
                raise IllegalEvent(f"device {self._device} has replica {self._operator.replica} only, got {command!r}")
            if isinstance(command, Cancel):
                self._cancel(command.task)
            else:
                for task in command.tasks:
                    self._submit(now, task)
        self._run(now)  # functions that take no time
        told, self._ended = self._ended, []
        return told

    @property
    def wakeup_at(self) -> Nanos:
        """When the next function ends, or NEVER. Nothing is told of a cancelled one, but the next in line starts."""
        return Nanos(self._running[0].end) if self._running else NEVER

    def report(self, now: Nanos) -> list[ReplicaReported]:
        """Busy workers and queue length at ``now``. What is still to be told stays to be told."""
        self._run(now)
        return [ReplicaReported(self._operator.replica, len(self._running), len(self._waiting), 0)]

    def busy_ns(self, now: Nanos) -> int:
        """Worker time spent up to ``now``, the elapsed part of running functions included."""
        self._run(now)
        return self._busy_ns + sum(now - run.start for run in self._running)

    def crash(self, now: Nanos) -> None:
        """Drop everything; nothing is told."""
        self._busy_ns = self.busy_ns(now)
        self._waiting.clear()
        self._running.clear()
        self._dropped.clear()
        self._known.clear()
        self._ended.clear()

    def _run(self, now: int) -> None:
        while self._running and self._running[0].end <= now:
            run = heappop(self._running)
            self._busy_ns += run.end - run.start
            if run.task in self._dropped:
                self._dropped.remove(run.task)
            else:
                self._ended.append(TaskFinished(run.task, self._known[run.task]))
            del self._known[run.task]
            if self._waiting:
                self._start(run.end, self._waiting.popleft())

    def _submit(self, now: int, task: Task) -> None:
        if task.task in self._known:
            raise IllegalEvent(f"task {task.task} was submitted twice")
        size = self._results(request_of(task.task), task.stage)  # now: later its request may have ended
        self._known[task.task] = task.input_tokens if size == AS_INPUT else size
        if len(self._running) < self._operator.workers:
            self._start(now, task)
        else:
            self._waiting.append(task)

    def _start(self, at: int, task: Task) -> None:
        service_ns = self._operator.fixed_ns + self._operator.input_token_ns * task.input_tokens
        self._starts += 1
        heappush(self._running, _Run(at + service_ns, self._starts, at, task.task))

    def _cancel(self, task: int) -> None:
        if task not in self._known:
            return  # it has ended
        waiting = len(self._waiting)
        self._waiting = deque(other for other in self._waiting if other.task != task)
        if len(self._waiting) < waiting:
            del self._known[task]
        else:
            self._dropped.add(task)


class _Run(NamedTuple):
    """A function in progress; ordered by end, then by order of starting."""

    end: int  # ns
    order: int
    start: int  # ns
    task: int
