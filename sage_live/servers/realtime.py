"""A backend model in real time, for a server: jobs go in, and each hears of its tokens.

The model keeps its own exact instants; what it says reaches a job when the event loop gets to it, and how late that is
gets counted. What arrives in one turn of the loop is one step of the model. One timer serves all streams: the model says
when its iteration in progress ends, and only then can anybody have another token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias

from sage_core.backend import BackendModel, ContentsOf, OutputTokens
from sage_core.commands import AnyCommand, Cancel, Dispatch, Task
from sage_core.events import AnyEvent, ReplicaReported, TaskFailed, TaskFinished, TokensProduced
from sage_core.load import Contents
from sage_core.units import NEVER, SECOND, Nanos, PoolKind, request_of, task_id
from sage_live.alarm import Alarm
from sage_live.servers.prometheus import Histogram

LATENESS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper edges of the buckets of lateness."""


class Usage(Protocol):
    """What a replica has done so far; see sage_sim.engine.ReplicaUsage."""

    @property
    def replica(self) -> int: ...
    @property
    def busy_ns(self) -> int: ...
    @property
    def iterations(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...


class Model(BackendModel, Protocol):
    """A model that also says what happens between its events."""

    def generated(self, now: Nanos, tasks: Sequence[int]) -> list[int]:
        """Output tokens that each task has by ``now``, told or not; 0 once its end was told."""

    @property
    def boundary_at(self) -> Nanos:
        """Earliest instant after the last one at which :meth:`generated` may give more; ``NEVER`` when idle."""

    def usage(self, now: Nanos) -> Sequence[Usage]:
        """What each replica has done up to ``now``."""


MakeModel: TypeAlias = Callable[[OutputTokens, ContentsOf], Model]


class Job:
    """One task of the model. A server's requests derive from it."""

    __slots__ = ("number", "streams", "tokens")

    def __init__(self, streams: bool = False) -> None:
        self.number = -1  # -1 while the model does not have it
        self.streams = streams  # whether it wants to hear of tokens between the first and the last
        self.tokens = 0  # output tokens that it took notice of

    def on_tokens(self, tokens: int) -> None:
        """It has ``tokens`` in all by now; told of the first token, and again as they come if it streams."""

    def on_finished(self, tokens: int) -> None:
        """It is complete; 0 tokens for an embedding."""

    def on_failed(self, reason: str) -> None:
        """The model can never do it."""


class RealTimeEngine:
    """Build inside a running event loop.

    slow: everything takes so many times as long: the model's clock runs that much slower. interval: tokens that a stream
    waits for after its first. flush_ns: least time between two looks at the streams.
    """

    def __init__(self, make: MakeModel, *, slow: float = 1.0, interval: int = 1, flush_ns: int = 0) -> None:
        self._model = make(self._output_tokens, self._contents)
        replicas = {joined.pool_kind: joined.replica for joined in self._model.joined()}
        self._llm, self._embed = replicas.get(PoolKind.LLM), replicas.get(PoolKind.EMBEDDING)
        self._slow = slow
        self._interval = interval
        self._flush_ns = flush_ns
        self._origin = time.monotonic_ns()
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._ring)
        self._alarm_at = NEVER
        self._turn: asyncio.Handle | None = None
        self._inbox: list[AnyCommand] = []
        self._jobs: dict[int, Job] = {}  # by number
        self._truths: dict[int, tuple[int, Contents | None]] = {}
        self._streams: dict[int, Job] = {}  # by task: those that have their first token
        self._looked_at = 0
        self._count = 0
        self.lateness = Histogram(LATENESS_S)
        """Seconds (real) from the instant at which something happened in the model until it was told."""

    @property
    def now(self) -> Nanos:
        """On the model's clock."""
        elapsed = time.monotonic_ns() - self._origin
        return Nanos(elapsed if self._slow == 1 else int(elapsed / self._slow))

    def generate(
        self, job: Job, input_tokens: int, output_tokens: int, priority: int = 0, contents: Contents | None = None
    ) -> None:
        """Give the LLM engine a task of exactly ``output_tokens`` (both from 1)."""
        assert self._llm is not None
        number = self._enter(job)
        self._truths[number] = output_tokens, contents
        task = Task(task_id(number, 0), 0, 0, priority, 0, input_tokens, output_tokens)
        self._inbox.append(Dispatch(self._llm, (task,)))

    def embed(self, job: Job, input_tokens: int) -> None:
        """Give the embedding engine a text of ``input_tokens`` (from 1)."""
        assert self._embed is not None
        number = self._enter(job)
        self._inbox.append(Dispatch(self._embed, (Task(task_id(number, 0), 0, 0, 0, 0, input_tokens, 0),)))

    def cancel(self, job: Job) -> bool:
        """Drop it at the end of this turn; nothing more is told. False if it has ended."""
        number = job.number
        if self._jobs.pop(number, None) is None:
            return False
        job.number = -1
        replica = self._llm if self._truths.pop(number, None) is not None else self._embed
        assert replica is not None
        task = task_id(number, 0)
        self._streams.pop(task, None)
        self._inbox.append(Cancel(replica, task))
        self._soon()
        return True

    def reports(self) -> list[ReplicaReported]:
        """What its replicas say of their load."""
        return self._model.report(self._catch_up())

    def usage(self) -> Sequence[Usage]:
        return self._model.usage(self._catch_up())

    @property
    def live(self) -> int:
        """Jobs in the model."""
        return len(self._jobs)

    def close(self) -> None:
        """Nothing more is told."""
        self._alarm.close()
        if self._turn is not None:
            self._turn.cancel()

    # --- the model's side ---------------------------------------------------------------------------------------------

    def _output_tokens(self, request: int, stage: int) -> int:
        return self._truths[request][0]

    def _contents(self, request: int) -> Contents | None:
        return self._truths[request][1]

    def _enter(self, job: Job) -> int:
        number = job.number = self._count
        self._count += 1
        self._jobs[number] = job
        self._soon()
        return number

    def _soon(self) -> None:
        if self._turn is None:
            self._turn = self._loop.call_soon(self._take)

    def _take(self) -> None:
        self._turn = None
        commands, self._inbox = self._inbox, []
        now = self._catch_up()
        self._tell(self._model.step(now, commands))
        self._arm()

    def _ring(self) -> None:
        self._alarm_at = NEVER
        now = self._catch_up()
        if self._streams and now - self._looked_at >= self._flush_ns:
            self._look(now)
        self._arm()

    def _catch_up(self) -> Nanos:
        """Everything that has happened by now, at the model's own instants."""
        model = self._model
        now = self.now
        while (at := model.wakeup_at) <= now:
            self._tell(model.step(at, ()))
            self.lateness.add((self.now - at) * self._slow / SECOND)
        return now

    def _tell(self, events: Sequence[AnyEvent]) -> None:
        for event in events:
            assert isinstance(event, TokensProduced | TaskFinished | TaskFailed)
            number = request_of(event.task)
            job = self._jobs.get(number)
            if job is None:
                continue  # cancelled in this turn
            if isinstance(event, TokensProduced):
                if job.streams:
                    self._streams[event.task] = job
                job.on_tokens(event.count)
                continue
            del self._jobs[number]
            job.number = -1
            self._truths.pop(number, None)
            self._streams.pop(event.task, None)
            if isinstance(event, TaskFinished):
                job.on_finished(event.output_tokens)
            else:
                job.on_failed(event.reason)

    def _look(self, now: Nanos) -> None:
        """Who has more tokens than it was told of?"""
        self._looked_at = now
        counts = self._model.generated(now, [*self._streams])
        for job, tokens in zip([*self._streams.values()], counts, strict=True):
            if tokens - job.tokens >= self._interval:
                job.on_tokens(tokens)

    def _arm(self) -> None:
        at: int = self._model.wakeup_at
        if self._streams:
            at = min(at, max(self._model.boundary_at, self._looked_at + self._flush_ns))
        if at != self._alarm_at:
            self._alarm_at = Nanos(at)
            if at < NEVER:
                self._alarm.set(self._origin + (at if self._slow == 1 else int(at * self._slow) + 1))
