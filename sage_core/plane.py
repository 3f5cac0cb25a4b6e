"""The control plane: events in, commands out. The meaning of ``sage_core._native.Plane``, which runs by default.

A pure, synchronous state machine. It has no clock, no sockets, no threads and no randomness of its own: a driver calls
:meth:`ControlPlane.step` with the instant and what happened, carries out the commands, and calls again no later than
:attr:`ControlPlane.wakeup_at`. The same object runs under SimPy and under asyncio; calling it again with a log's events
gives the log's commands.

Invariants asserted here, in production too (INVARIANTS.md): 1 conservation, 3 no task dispatched twice, 4 causality,
5 time monotone. Capacity (2) is the mechanism's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond, Task
from sage_core.errors import ConfigError, IllegalEvent, InvariantViolation, PolicyError, SageError
from sage_core.executor import Run
from sage_core.lifecycle import REPLICA, REQUEST, TASK, ReplicaState, RequestState, TaskState, advance
from sage_core.pipeline import Pipeline, Stage, pipeline_of
from sage_core.policy import Policy, Predict, Speed, raised
from sage_core.reference import Mechanism, checked, part_name
from sage_core.units import NEVER, TASK_BITS, Nanos, PoolKind, RequestKind, request_of, task_id

TOKENS_MAX = 1 << 40
"""Tokens a request may name: sums over millions of tasks still fit the int64 columns."""

_KINDS = len(RequestKind)
_ID_GAP_MAX = 1 << 20


class _Request:
    __slots__ = ("arrived", "next_task", "run", "tasks", "tenant")

    def __init__(self, arrived: e.RequestArrived, tenant: int, run: Run) -> None:
        self.arrived = arrived
        self.tenant = tenant
        self.run = run
        self.tasks: list[int] = []  # live ones
        self.next_task = 0


class _Task:
    __slots__ = ("pool", "replica", "spec", "state")

    def __init__(self, spec: Task, pool: int) -> None:
        self.spec = spec
        self.pool = pool
        self.replica = -1
        self.state = TaskState.QUEUED


@dataclass(slots=True)
class Counts:
    """Every arrived request is in exactly one of these."""

    arrived: int = 0
    responded: int = 0
    rejected: int = 0
    cancelled: int = 0
    failed: int = 0
    retries: int = 0
    decisions: int = 0


def unknown_policy(name: str, known: Iterable[str]) -> ConfigError:
    """What to say about a policy that is not there."""
    return ConfigError(f"policy: unknown policy {name!r}; known: {', '.join(sorted(known))}")


def checked_prediction(predict: Predict, predicted: object) -> int:
    """What a predictor answered, if that is a count of tokens; else a PolicyError."""
    if type(predicted) is not int or not 0 <= predicted <= TOKENS_MAX:
        raise PolicyError(
            f"predict {predict.name}: expected a whole number of tokens (int, not a NumPy or float number) from "
            f"0 to {TOKENS_MAX}, got {predicted!r}"
        )
    return predicted


class ControlPlane:
    """Schedules every request kind over every replica.

    pipelines: by name; a request names the one it wants (see :func:`sage_core.pipeline.pipeline_of`).
    policies: factories by name; ``policy`` is the one to start with, ``PolicyChanged`` switches.
    attempts_max: how often a task may be tried; one that has streamed is never tried again.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        policies: Mapping[str, Callable[[], Policy]],
        policy: str,
        *,
        attempts_max: int = 3,
    ) -> None:
        if attempts_max < 1:
            raise ConfigError(f"attempts_max: expected 1 or more, got {attempts_max}")
        self._pipelines = dict(pipelines)
        self._policies = dict(policies)
        self._attempts_max = attempts_max
        self._mechanism = Mechanism()
        self._pools: dict[str, int] = {}
        self._pool_kinds: dict[str, int] = {}
        self._replicas: dict[int, tuple[str, ReplicaState]] = {}
        self._tenants: dict[str, int] = {}
        self._requests: dict[int, _Request] = {}
        self._tasks: dict[int, _Task] = {}
        self._request_last = -1
        self._requests_awaited: set[int] = set()  # ids below it that have not arrived; never iterated
        self._now = Nanos(0)
        self._arrivals: list[int] = []  # tasks of requests that arrived in this step, for admission
        self.counts = Counts()
        self._handlers: dict[type, Callable[[Nanos, Any, list[AnyCommand]], None]] = {
            e.RequestArrived: self._on_arrived,
            e.RequestCancelled: self._on_cancelled,
            e.TokensProduced: self._on_tokens,
            e.TaskFinished: self._on_finished,
            e.TaskFailed: self._on_failed,
            e.ReplicaReported: self._on_reported,
            e.ReplicaJoined: self._on_joined,
            e.ReplicaDraining: self._on_draining,
            e.ReplicaLeft: self._on_left,
            e.PolicyChanged: self._on_policy,
            e.RunEnded: self._on_ended,
        }
        self._policy = self._bind(Nanos(0), policy)

    # --- what drivers use -----------------------------------------------------------------------------------------

    def step(self, now: Nanos, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        """One decision round: take in simultaneous ``events``, decide, say what to do.

        Raises IllegalEvent (driver or backend), PolicyError (policy author), InvariantViolation (us).
        """
        if now < self._now:
            raise IllegalEvent(f"invariant 5: time went back from {self._now} to {now}")
        self._now = now
        commands: list[AnyCommand] = []
        handlers = self._handlers
        for event in events:
            handler = handlers.get(type(event))
            if handler is None:
                raise IllegalEvent(f"not an event: {event!r}")
            handler(now, event, commands)
        try:
            if self._arrivals:
                if self._policy.admit is not None:
                    self._admit(now, commands)
                self._arrivals.clear()
            decisions = self._mechanism.decide(now)
        except Exception as error:
            self._blame(error)
        if decisions:
            self._dispatch(decisions, commands)
        return commands

    def _blame(self, error: Exception) -> NoReturn:
        """Raise what came up while the policy was asked: as a PolicyError if it is the author's, else as it is."""
        theirs = None if isinstance(error, SageError) else raised(self._policy.name, error)
        if theirs is None:
            raise error
        raise theirs from error

    @property
    def wakeup_at(self) -> Nanos:
        """Call ``step(now, [])`` no later than this; NEVER when only events matter."""
        return Nanos(self._mechanism.wakeup_at)

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def policy(self) -> Policy:
        """The active policy."""
        return self._policy

    @property
    def tasks_queued(self) -> int:
        """Tasks waiting in the plane."""
        return int(self._mechanism.queued())

    def queue_depths(self) -> dict[str, int]:
        """The same by pool, of every pool that there has been."""
        return {name: self._mechanism.queued_in(pool) for name, pool in self._pools.items()}

    def close(self, now: Nanos, reason: str) -> list[AnyCommand]:
        """The step of ``RunEnded(reason)``, then :meth:`check`. Every arrived request has ended (invariant 1)."""
        commands = self.step(now, (e.RunEnded(reason),))
        self.check()
        return commands

    def check(self) -> None:
        """Conservation and the mechanism's own invariants over the whole state; slow, for tests and ends of runs."""
        counts = self.counts
        ended = counts.responded + counts.rejected + counts.cancelled + counts.failed
        if counts.arrived != ended + len(self._requests):
            raise InvariantViolation(f"invariant 1: {counts} with {len(self._requests)} live")
        if len(self._tasks) != self._mechanism.queued() + self._mechanism.in_flight():
            raise InvariantViolation(
                f"invariant 3: {len(self._tasks)} live tasks, {self._mechanism.queued()} queued and "
                f"{self._mechanism.in_flight()} in flight"
            )
        self._mechanism.check()

    # --- requests -------------------------------------------------------------------------------------------------

    def _on_arrived(self, now: Nanos, event: e.RequestArrived, commands: list[AnyCommand]) -> None:
        if self._has_arrived(event.request):
            raise IllegalEvent(f"request {event.request} arrived twice")
        if event.scheduled_at > now:
            raise IllegalEvent(
                f"invariant 4: request {event.request} is scheduled at {event.scheduled_at}, after {now}"
            )
        if not (0 <= event.input_tokens <= TOKENS_MAX and 0 <= event.output_tokens_max <= TOKENS_MAX):
            raise IllegalEvent(f"request {event.request}: token counts must be from 0 to {TOKENS_MAX}, got {event!r}")
        if not 0 <= event.kind < _KINDS:
            raise IllegalEvent(f"request {event.request}: kind {event.kind} is not a RequestKind")
        if event.request > self._request_last:
            # Ids are dense in order of issue, not of arrival: a closed-loop user may think for long.
            if event.request - self._request_last > _ID_GAP_MAX:
                raise IllegalEvent(f"request {event.request}: ids must be dense, the last was {self._request_last}")
            self._requests_awaited.update(range(self._request_last + 1, event.request))
            self._request_last = event.request
        else:
            self._requests_awaited.discard(event.request)
        self.counts.arrived += 1
        pipeline = pipeline_of(self._pipelines, event.pipeline)
        if pipeline is None:
            self.counts.rejected += 1
            commands.append(Reject(event.request, f"unknown pipeline {event.pipeline}", 0))
            return
        tenant = self._tenants.setdefault(event.tenant, len(self._tenants))
        request = _Request(event, tenant, Run(pipeline, event.input_tokens))
        self._requests[event.request] = request
        for stage in pipeline.first:
            self._arrivals.append(self._queue(now, request, stage, 0))

    def _has_arrived(self, request: int) -> bool:
        return request <= self._request_last and request not in self._requests_awaited

    def _on_cancelled(self, now: Nanos, event: e.RequestCancelled, commands: list[AnyCommand]) -> None:
        if not self._has_arrived(event.request):
            raise IllegalEvent(f"invariant 4: request {event.request} was cancelled before it arrived")
        if event.request in self._requests:  # else it ended while the cancellation was on its way
            self._end(event.request, e.RequestCancelled, commands)

    def _end(self, request: int, trigger: type, commands: list[AnyCommand]) -> None:
        """Take the request out of the plane with every task it still has."""
        state = advance(REQUEST, RequestState.LIVE, trigger, "request", request)
        live = self._requests.pop(request)
        for task in live.tasks:
            held = self._tasks.pop(task)
            if held.state is TaskState.QUEUED:
                advance(TASK, held.state, trigger, "task", task)
                self._mechanism.withdraw(task)
            elif held.state is not TaskState.LOST:  # what was lost is no longer on any replica
                advance(TASK, held.state, Cancel, "task", task)
                self._mechanism.dropped(task)
                commands.append(Cancel(held.replica, task))
        counts = self.counts
        if state is RequestState.RESPONDED:
            counts.responded += 1
        elif state is RequestState.REJECTED:
            counts.rejected += 1
        elif state is RequestState.CANCELLED:
            counts.cancelled += 1
        else:
            counts.failed += 1

    def _fail(self, request: int, reason: str, commands: list[AnyCommand]) -> None:
        self._end(request, Fail, commands)
        commands.append(Fail(request, reason))

    def _admit(self, now: Nanos, commands: list[AnyCommand]) -> None:
        admit = self._policy.admit
        assert admit is not None
        by_pool: dict[int, list[int]] = {}
        for task in self._arrivals:
            if task in self._tasks:  # not cancelled within this step
                by_pool.setdefault(self._tasks[task].pool, []).append(task)
        for pool, arrived in by_pool.items():
            tasks = [task for task in arrived if task in self._tasks]  # not refused with a task for an earlier pool
            if not tasks:
                continue
            view = self._mechanism.task_view(pool, tasks)
            answer = admit.score(now, view, self._mechanism.replica_view(pool))
            scores = checked(answer, (len(tasks),), "admit", admit)
            for task, score in zip(tasks, scores.tolist(), strict=True):
                if math.isnan(score):
                    raise PolicyError(f"admit {part_name(admit)}: score of task {task} is NaN at now={now}")
                request = request_of(task)
                if score == math.inf and request in self._requests:
                    self._end(request, Reject, commands)
                    commands.append(Reject(request, f"admission: {part_name(admit)}", admit.retry_after_ns))

    # --- tasks ----------------------------------------------------------------------------------------------------

    def _queue(self, now: Nanos, request: _Request, stage: Stage, attempt: int) -> int:
        arrived = request.arrived
        if request.next_task >> TASK_BITS:
            raise InvariantViolation(f"request {arrived.request} made more than {1 << TASK_BITS} tasks")
        task = task_id(arrived.request, request.next_task)
        request.next_task += 1
        pool = self._pools.get(stage.op.pool)
        if pool is None:  # no replica of it has joined yet: the task waits for one
            pool = self._add_pool(stage.op.pool, PoolKind.LLM)
        input_tokens, output_tokens_max = request.run.work(stage, arrived.output_tokens_max)
        predicted = 0
        if output_tokens_max:
            predict = self._policy.predict
            try:
                predicted = predict.predict(
                    arrived.request, arrived.tenant, arrived.kind, input_tokens, output_tokens_max
                )
            except Exception as error:
                self._blame(error)
            checked_prediction(predict, predicted)
        ttft_due_at, due_at = arrived.ttft_due_at, arrived.due_at
        pipeline = request.run.pipeline
        if pipeline.critical_path and min(ttft_due_at, due_at) < NEVER:
            speeds = [self._speed(each.op.pool) for each in pipeline.stages]
            ttft_due_at, due_at = request.run.due(stage, ttft_due_at, due_at, arrived.output_tokens_max, speeds)
        spec = Task(task, stage.index, attempt, arrived.priority, now, input_tokens, output_tokens_max, arrived.prefix)
        request.tasks.append(task)
        self._tasks[task] = _Task(spec, pool)
        self._mechanism.enqueue(
            now,
            pool,
            task,
            arrived.request,
            arrived.kind,
            request.tenant,
            arrived.priority,
            attempt,
            arrived.scheduled_at,
            now,
            ttft_due_at,
            due_at,
            input_tokens,
            output_tokens_max,
            predicted,
            arrived.prefix,
        )
        return task

    def _speed(self, pool: str) -> Speed:
        index = self._pools.get(pool)
        return Speed() if index is None else self._mechanism.speed(index)

    def _dispatch(self, decisions: list[tuple[int, int]], commands: list[AnyCommand]) -> None:
        """One command a replica, in order of its first decision."""
        self.counts.decisions += len(decisions)
        if len(decisions) == 1:
            replica, task = decisions[0]
            commands.append(Dispatch(replica, (self._send(replica, task),)))
            return
        leaving: dict[int, list[Task]] = {}
        for replica, task in decisions:
            leaving.setdefault(replica, []).append(self._send(replica, task))
        commands.extend(Dispatch(replica, tuple(tasks)) for replica, tasks in leaving.items())

    def _send(self, replica: int, task: int) -> Task:
        held = self._tasks[task]
        if held.state is not TaskState.QUEUED:
            raise InvariantViolation(f"invariant 3: task {task} was dispatched while {held.state.value}")
        held.state = TaskState.DISPATCHED
        held.replica = replica
        return held.spec

    def _known(self, task: int) -> _Task | None:
        """The live task, or None for one that ended while the event was on its way."""
        held = self._tasks.get(task)
        if held is None and not self._has_arrived(request_of(task)):
            raise IllegalEvent(f"invariant 4: task {task} belongs to no request that has arrived")
        return held

    def _on_tokens(self, now: Nanos, event: e.TokensProduced, commands: list[AnyCommand]) -> None:
        held = self._known(event.task)
        if held is None:
            return
        if held.state is TaskState.DISPATCHED:
            self._mechanism.started(event.task)
        state = advance(TASK, held.state, e.TokensProduced, "task", event.task)
        if event.count:
            held.state = state

    def _on_finished(self, now: Nanos, event: e.TaskFinished, commands: list[AnyCommand]) -> None:
        held = self._known(event.task)
        if held is None:
            return
        if not 0 <= event.output_tokens <= TOKENS_MAX:
            raise IllegalEvent(f"task {event.task} finished with {event.output_tokens} output tokens")
        advance(TASK, held.state, e.TaskFinished, "task", event.task)
        self._mechanism.finished(now, event.task, event.output_tokens)
        del self._tasks[event.task]
        number = request_of(event.task)
        request = self._requests[number]
        request.tasks.remove(event.task)
        if held.spec.output_tokens_max:
            try:
                self._policy.predict.observe(request.arrived.tenant, request.arrived.kind, event.output_tokens)
            except Exception as error:
                self._blame(error)
        for stage in request.run.finished(held.spec.stage, event.output_tokens):
            self._queue(now, request, stage, 0)
        if request.run.done:
            self._end(number, Respond, commands)
            commands.append(Respond(number))

    def _on_failed(self, now: Nanos, event: e.TaskFailed, commands: list[AnyCommand]) -> None:
        held = self._known(event.task)
        if held is None:
            return
        before = held.state
        advance(TASK, before, e.TaskFailed, "task", event.task)
        self._mechanism.dropped(event.task)
        self._again_or_fail(now, event.task, before, event.reason, event.retryable, commands)

    def _again_or_fail(
        self, now: Nanos, task: int, before: TaskState, reason: str, retryable: bool, commands: list[AnyCommand]
    ) -> None:
        """A new attempt, unless the client has seen tokens already (it sees none of a stage in between) or the attempts are
        used up."""
        held = self._tasks.pop(task)
        number = request_of(task)
        request = self._requests[number]
        request.tasks.remove(task)
        unseen = before is TaskState.DISPATCHED or held.spec.stage not in request.run.pipeline.answering
        if retryable and unseen and held.spec.attempt + 1 < self._attempts_max:
            self.counts.retries += 1
            self._queue(now, request, request.run.pipeline.stages[held.spec.stage], held.spec.attempt + 1)
        else:
            self._fail(number, reason, commands)

    # --- replicas and policy --------------------------------------------------------------------------------------

    def _add_pool(self, name: str, kind: int) -> int:
        self._pools[name] = self._mechanism.add_pool(name, int(kind))
        return self._pools[name]

    def _on_joined(self, now: Nanos, event: e.ReplicaJoined, commands: list[AnyCommand]) -> None:
        # CPU workers have no token budget; a figure of 0 says so.
        budget_min = 0 if event.pool_kind == PoolKind.OPERATOR else 1
        if event.tasks_max < 1 or event.batch_tokens_max < budget_min:
            raise IllegalEvent(f"replica {event.replica}: tasks_max and batch_tokens_max must be from 1, got {event!r}")
        if event.replica in self._replicas:
            raise IllegalEvent(f"replica {event.replica} joined twice")
        known = self._pool_kinds.setdefault(event.pool, event.pool_kind)
        if known != event.pool_kind:
            raise IllegalEvent(
                f"replica {event.replica}: pool {event.pool} is {PoolKind(known).name}, not {PoolKind(event.pool_kind).name}"
            )
        pool = self._pools.get(event.pool)
        if pool is None:
            pool = self._add_pool(event.pool, event.pool_kind)
        else:
            self._mechanism.set_kind(pool, event.pool_kind)
        self._replicas[event.replica] = (event.pool, ReplicaState.SERVING)
        self._mechanism.join(
            pool,
            event.replica,
            event.device,
            event.tasks_max,
            event.batch_tokens_max,
            event.kv_tokens_max,
            event.fixed_ns,
            event.input_token_ns,
            event.output_token_ns,
            event.output_seq_ns,
        )

    def _replica(self, replica: int, trigger: type) -> None:
        if replica not in self._replicas:
            raise IllegalEvent(f"replica {replica} is not known to the plane: {trigger.__name__}")
        pool, state = self._replicas[replica]
        self._replicas[replica] = (pool, advance(REPLICA, state, trigger, "replica", replica))

    def _on_reported(self, now: Nanos, event: e.ReplicaReported, commands: list[AnyCommand]) -> None:
        if self._replicas.get(event.replica, ("", None))[1] is ReplicaState.LEFT:
            return  # the report was on its way when the replica left
        self._replica(event.replica, e.ReplicaReported)
        self._mechanism.report(event.replica, now, event.running, event.waiting, event.kv_blocks_free)

    def _on_draining(self, now: Nanos, event: e.ReplicaDraining, commands: list[AnyCommand]) -> None:
        self._replica(event.replica, e.ReplicaDraining)
        self._mechanism.drain(event.replica)

    def _on_left(self, now: Nanos, event: e.ReplicaLeft, commands: list[AnyCommand]) -> None:
        self._replica(event.replica, e.ReplicaLeft)
        before: dict[int, TaskState] = {}
        for task in self._mechanism.leave(event.replica):
            held = self._tasks[task]
            before[task] = held.state
            held.state = advance(TASK, held.state, e.ReplicaLeft, "task", task)
        for task, state in before.items():
            if task in self._tasks:  # else its request failed with another task of this replica
                self._again_or_fail(now, task, state, f"replica {event.replica} left", True, commands)

    def _on_policy(self, now: Nanos, event: e.PolicyChanged, commands: list[AnyCommand]) -> None:
        self._policy = self._bind(now, event.policy)

    def _on_ended(self, now: Nanos, event: e.RunEnded, commands: list[AnyCommand]) -> None:
        for request in sorted(self._requests):
            self._fail(request, event.reason, commands)

    def _bind(self, now: Nanos, name: str) -> Policy:
        make = self._policies.get(name)
        if make is None:
            raise unknown_policy(name, self._policies)
        policy = make()
        self._mechanism.bind(now, policy.order, policy.route, policy.limit)
        return policy
