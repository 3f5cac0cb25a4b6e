"""A run's steps folded into rows: one per request, task and replica report.

The rows are a pure function of the sequence ``(now, events, commands)`` and of what is known before the run (operator
names, objectives, warm-up). A simulated run, a live run and a replayed log therefore go through the same code.

Rules: only live requests and tasks are held; a row is written the moment its subject ends. Every request that arrived
ends in exactly one of ``schema.OUTCOMES`` (invariant 1, checked here a second time, from the outside), and a task is
dispatched once (invariant 3). Events of a step come before its commands, except that a client who went away only
decides the outcome if the plane did not answer in that same step. News of a task that already ended is late, not wrong
(a live engine finishes what was cancelled a moment ago), and changes nothing.

:class:`RunRecorder` is the meaning, and what records steps that Python takes;
:class:`sage_bench.results.native_recorder.NativeRecorder` writes the same rows for the native event loop.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from sage_bench.results.schema import KINDS, OUTCOMES, REPLICAS, REQUESTS, TASKS
from sage_bench.results.writer import BUFFER_ROWS, TableWriter
from sage_core import commands as does
from sage_core import events as did
from sage_core.commands import AnyCommand, Task
from sage_core.errors import ConfigError, InvariantViolation, OutputError
from sage_core.events import AnyEvent
from sage_core.slo import SloTable
from sage_core.units import NEVER, SECOND, TASK_BITS

Stages = Sequence[tuple[str, str]]
"""(operator, pool) of each stage of a pipeline, in the order of its plan."""

IDS_NAMED: Final = 10
"""Request ids an error lists before it says how many more there are."""

CUT_OFF: Final = "no outcome when the run ended"
_INT32: Final = range(-(2**31), 2**31)


class Recorder(abc.ABC):
    """A recorder is closed when the run is over and aborted when it is cut short; ``with`` does either."""

    @abc.abstractmethod
    def close(self) -> None:
        """The run is over: write the rest. Raises :class:`InvariantViolation` if a request has no outcome."""

    @abc.abstractmethod
    def abort(self, reason: str) -> None:
        """The run was cut short: requests without an outcome become failed for ``reason``, with no end instant."""

    @abc.abstractmethod
    def counts(self) -> dict[str, int]:
        """Requests arrived, requests per outcome, tasks dispatched: for the manifest."""

    @abc.abstractmethod
    def replicas(self) -> list[dict[str, Any]]:
        """Every replica that joined and when it left (ns, null if it stayed): for the manifest."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OutputError):  # the first error is the one to see
                self.abort(f"the run was cut short: {kind.__name__}")


class RunRecorder(Recorder):
    """Call it with each step of a run, then :meth:`close` it; or use ``with``, which closes or aborts.

    folder: where the Parquet files go. pipelines: the stages of every pipeline that requests may ask for. slo: the
    objectives; TTFT and end-to-end due times travel in the events, TPOT is looked up here. warmup_ns: requests
    scheduled before it are flagged, as are those from ``cooldown_at`` on. tasks: write ``tasks.parquet`` (queue depth,
    blocking and utilisation need it). Raises :class:`OutputError`, and :class:`InvariantViolation` for a sequence no
    correct control plane can produce.
    """

    def __init__(
        self,
        folder: Path,
        pipelines: Mapping[str, Stages],
        slo: SloTable,
        *,
        warmup_ns: int = 0,
        cooldown_at: int = NEVER,
        tasks: bool = True,
        buffer_rows: int = BUFFER_ROWS,
    ) -> None:
        self.arrived = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.tasks = 0
        self._pipelines = dict(pipelines)
        self._tpot_max_ns = functools.cache(functools.partial(tpot_max_ns, slo))
        self._warmup_ns = warmup_ns
        self._cooldown_at = cooldown_at
        self._live: dict[int, _Request] = {}
        self._flights: dict[int, _Flight] = {}
        self._replicas: dict[int, _Replica] = {}
        self._went_away: list[int] = []
        self._batches = 0
        with contextlib.ExitStack() as opened:  # the first file must not be left open if the next cannot be made
            self._requests = opened.enter_context(
                TableWriter(folder / "requests.parquet", REQUESTS, buffer_rows=buffer_rows)
            )
            self._reports = opened.enter_context(
                TableWriter(folder / "replicas.parquet", REPLICAS, buffer_rows=buffer_rows)
            )
            self._task_rows = (
                opened.enter_context(TableWriter(folder / "tasks.parquet", TASKS, buffer_rows=buffer_rows))
                if tasks
                else None
            )
            self._files = opened.pop_all()
        self._event_handlers: dict[type, Callable[[int, Any], None]] = {
            did.RequestArrived: self._request_arrived,
            did.RequestCancelled: self._request_cancelled,
            did.TokensProduced: self._tokens_produced,
            did.TaskFinished: self._task_finished,
            did.TaskFailed: self._task_failed,
            did.ReplicaReported: self._replica_reported,
            did.ReplicaJoined: self._replica_joined,
            did.ReplicaLeft: self._replica_left,
            did.ReplicaDraining: _nothing,
            did.PolicyChanged: _nothing,
            did.RunEnded: _nothing,
        }
        self._command_handlers: dict[type, Callable[[int, Any], None]] = {
            does.Dispatch: self._dispatch,
            does.Cancel: self._cancel,
            does.Respond: self._respond,
            does.Reject: self._reject,
            does.Fail: self._fail,
        }

    def __call__(self, now: int, events: Sequence[AnyEvent], commands: Sequence[AnyCommand]) -> None:
        """One step of the plane at ``now`` (ns)."""
        handlers = self._event_handlers
        for event in events:
            handlers[type(event)](now, event)
        handlers = self._command_handlers
        for command in commands:
            handlers[type(command)](now, command)
        if self._went_away:
            for request in self._went_away:
                if request in self._live:
                    self._end(now, request, "cancelled", "the client went away")
            self._went_away.clear()

    def close(self) -> None:
        lost = list(self._live)
        self.abort(CUT_OFF)
        check_outcomes(lost, self.arrived)

    def abort(self, reason: str) -> None:
        for request in list(self._live):
            self._end(None, request, "failed", reason)
        for flight in self._flights.values():
            self._write_task(flight, None, None)
        self._flights.clear()
        self._files.close()

    def counts(self) -> dict[str, int]:
        return {"arrived": self.arrived, **self.outcomes, "tasks": self.tasks}

    def replicas(self) -> list[dict[str, Any]]:
        return [
            {
                "replica": replica,
                "pool": row.joined.pool,
                "pool_kind": row.joined.pool_kind,
                "node": row.joined.node,
                "device": row.joined.device,
                "joined_ns": row.joined_ns,
                "left_ns": row.left_ns,
            }
            for replica, row in self._replicas.items()
        ]

    # --- events ---------------------------------------------------------------------------------------------------

    def _stages(self, pipeline: str) -> Stages | None:
        """As :func:`sage_core.pipeline.pipeline_of`: ``chat@MODEL`` is ``chat`` on the pool MODEL."""
        found = self._pipelines.get(pipeline)
        base, _, pool = pipeline.partition("@")
        if found is None and pool and len(self._pipelines.get(base, ())) == 1:
            found = self._pipelines[pipeline] = [(self._pipelines[base][0][0], pool)]
        return found

    def _request_arrived(self, now: int, event: did.RequestArrived) -> None:
        stages = self._stages(event.pipeline)
        if stages is None:
            raise ConfigError(
                f"pipeline {event.pipeline!r} (request {event.request}): not among the run's pipelines "
                f"({', '.join(self._pipelines)}); add it to the pipeline configuration"
            )
        if event.priority not in _INT32:
            raise ConfigError(
                f"request {event.request}: priority {event.priority} is out of range; expected a whole number of 32 bits"
            )
        if event.request in self._live:
            raise InvariantViolation(f"invariant 1: request {event.request} arrived twice")
        self._live[event.request] = _Request(event, stages, now)
        self.arrived += 1

    def _request_cancelled(self, now: int, event: did.RequestCancelled) -> None:
        self._went_away.append(event.request)

    def _tokens_produced(self, now: int, event: did.TokensProduced) -> None:
        flight = self._flights.get(event.task)
        if flight is None:
            return
        flight.output_tokens += event.count
        if event.count and flight.first_token_ns is None:
            self._first_token(now, flight)

    def _task_finished(self, now: int, event: did.TaskFinished) -> None:
        flight = self._flights.pop(event.task, None)
        if flight is None:
            return
        output_tokens = flight.output_tokens = event.output_tokens
        # What does not generate has a result of a size too: passages, or an outcome.
        if output_tokens and flight.task.output_tokens_max:
            if flight.first_token_ns is None:  # not streamed: the first token came with the last
                self._first_token(now, flight)
            request = self._live.get(event.task >> TASK_BITS)
            if request is not None:
                request.output_tokens += output_tokens
                if flight.task.stage == request.first_token_stage:
                    request.stage_tokens = output_tokens
        self._task_ended(now, flight, "finished")

    def _task_failed(self, now: int, event: did.TaskFailed) -> None:
        flight = self._flights.pop(event.task, None)
        if flight is not None:
            self._task_ended(now, flight, "failed")

    def _replica_reported(self, now: int, event: did.ReplicaReported) -> None:
        replica = self._replicas.get(event.replica)
        if replica is None:
            return  # it left while its report was on the way
        joined = replica.joined
        self._reports.append(
            (
                now,
                event.replica,
                joined.pool,
                joined.node,
                joined.device,
                event.running,
                event.waiting,
                event.kv_blocks_free,
                len(replica.tasks),
            )
        )

    def _replica_joined(self, now: int, event: did.ReplicaJoined) -> None:
        self._replicas[event.replica] = _Replica(event, now, {})

    def _replica_left(self, now: int, event: did.ReplicaLeft) -> None:
        replica = self._replicas.get(event.replica)
        if replica is not None:
            replica.left_ns = now
            for task in list(replica.tasks):
                self._task_ended(now, self._flights.pop(task), "lost")

    # --- commands -------------------------------------------------------------------------------------------------

    def _dispatch(self, now: int, command: does.Dispatch) -> None:
        replica = self._replicas.get(command.replica)
        if replica is None:
            raise InvariantViolation(f"invariant 4: dispatch to replica {command.replica}, which never joined")
        batch = self._batches
        self._batches += 1
        for task in command.tasks:
            request = self._live.get(task.task >> TASK_BITS)
            if request is None:
                raise InvariantViolation(f"task {task.task} dispatched, but its request is not live")
            if not 0 <= task.stage < len(request.stages):
                raise InvariantViolation(f"task {task.task} dispatched, but its pipeline has no stage {task.stage}")
            if task.task in self._flights:
                raise InvariantViolation(f"task {task.task} dispatched, but it is already in flight (invariant 3)")
            self._flights[task.task] = _Flight(
                task, replica, request.stages[task.stage], now, batch, len(command.tasks)
            )
            replica.tasks[task.task] = None
            if request.dispatched_ns is None:
                request.dispatched_ns = now
            request.replica = replica
            request.tasks += 1
            request.queue_ns += now - task.queued_at
            if task.attempt:
                request.retries += 1
            self.tasks += 1

    def _cancel(self, now: int, command: does.Cancel) -> None:
        flight = self._flights.pop(command.task, None)
        if flight is not None:
            self._task_ended(now, flight, "cancelled")

    def _respond(self, now: int, command: does.Respond) -> None:
        self._end(now, command.request, "responded", None)

    def _reject(self, now: int, command: does.Reject) -> None:
        self._end(now, command.request, "rejected", command.reason)

    def _fail(self, now: int, command: does.Fail) -> None:
        self._end(now, command.request, "failed", command.reason)

    # --- rows -----------------------------------------------------------------------------------------------------

    def _first_token(self, now: int, flight: _Flight) -> None:
        flight.first_token_ns = now
        request = self._live.get(flight.task.task >> TASK_BITS)
        if request is not None and flight.task.stage >= request.first_token_stage:
            request.first_token_stage = flight.task.stage
            request.first_token_ns = now
            request.stage_tokens = 0

    def _task_ended(self, now: int, flight: _Flight, outcome: str) -> None:
        del flight.replica.tasks[flight.task.task]
        self._write_task(flight, now, outcome)

    def _write_task(self, flight: _Flight, ended_ns: int | None, outcome: str | None) -> None:
        if self._task_rows is None:
            return
        task, joined = flight.task, flight.replica.joined
        self._task_rows.append(
            (
                task.task,
                task.task >> TASK_BITS,
                task.stage,
                flight.stage[0],
                flight.stage[1],
                task.attempt,
                joined.replica,
                joined.node,
                joined.device,
                task.queued_at,
                flight.dispatched_ns,
                flight.first_token_ns,
                ended_ns,
                task.input_tokens,
                flight.output_tokens,
                flight.batch,
                flight.batch_tasks,
                outcome,
            )
        )

    def _end(self, now: int | None, request_id: int, outcome: str, reason: str | None) -> None:
        request = self._live.pop(request_id, None)
        if request is None:
            raise InvariantViolation(
                f"invariant 1: request {request_id} {outcome}, but it already ended or never arrived"
            )
        self.outcomes[outcome] += 1
        event = request.event
        scheduled_ns = event.scheduled_at
        first_token_ns = request.first_token_ns
        ttft_ns = None if first_token_ns is None else first_token_ns - scheduled_ns
        tpot_max_ns = self._tpot_max_ns(event.kind, event.priority)
        e2e_ns = tpot_ns = None
        if outcome == "responded":
            assert now is not None
            e2e_ns = now - scheduled_ns
            if ttft_ns is not None and request.stage_tokens > 1 and e2e_ns > ttft_ns:
                tpot_ns = (e2e_ns - ttft_ns) / (request.stage_tokens - 1)
            # Where nothing is generated the response itself is the first output.
            first_ns = now if first_token_ns is None else first_token_ns
            ttft_ok = None if event.ttft_due_at == NEVER else first_ns <= event.ttft_due_at
            tpot_ok = None if tpot_max_ns is None or tpot_ns is None else tpot_ns <= tpot_max_ns
            e2e_ok = None if event.due_at == NEVER else now <= event.due_at
            good = ttft_ok is not False and tpot_ok is not False and e2e_ok is not False
        else:
            ttft_ok = None if event.ttft_due_at == NEVER else False
            tpot_ok = None if tpot_max_ns is None else False
            e2e_ok = None if event.due_at == NEVER else False
            good = False
        joined = None if request.replica is None else request.replica.joined
        self._requests.append(
            (
                request_id,
                KINDS[event.kind],
                event.tenant,
                event.priority,
                event.pipeline,
                scheduled_ns,
                request.arrived_ns,
                request.dispatched_ns,
                first_token_ns,
                now,
                event.input_tokens,
                request.output_tokens,
                event.output_tokens_max,
                None if event.ttft_due_at == NEVER else event.ttft_due_at,
                None if event.due_at == NEVER else event.due_at,
                outcome,
                reason,
                request.tasks,
                request.retries,
                None if joined is None else joined.replica,
                None if joined is None else joined.node,
                request.queue_ns,
                ttft_ns,
                tpot_ns,
                e2e_ns,
                ttft_ok,
                tpot_ok,
                e2e_ok,
                good,
                not self._warmup_ns <= scheduled_ns < self._cooldown_at,
            )
        )


def check_outcomes(lost: Sequence[int], arrived: int) -> None:
    """Raise if of ``arrived`` requests the ``lost`` have no outcome."""
    if lost:
        more = f" and {len(lost) - IDS_NAMED} more" if len(lost) > IDS_NAMED else ""
        raise InvariantViolation(
            f"invariant 1: {len(lost)} of {arrived} requests have no outcome: "
            f"{', '.join(str(request) for request in lost[:IDS_NAMED])}{more}"
        )


def tpot_max_ns(slo: SloTable, kind: int, priority: int) -> float | None:
    """The TPOT objective of requests of this kind and priority, in ns per token."""
    tpot_s = slo.of(kind, priority).tpot_s
    return None if tpot_s is None else tpot_s * SECOND


class _Replica(msgspec.Struct):
    joined: did.ReplicaJoined
    joined_ns: int
    tasks: dict[int, None]  # in flight on it, in the order of dispatch
    left_ns: int | None = None


class _Request(msgspec.Struct, gc=False):
    """A request that has not ended. ``gc=False``: it refers to nothing that refers back."""

    event: did.RequestArrived
    stages: Stages
    arrived_ns: int
    dispatched_ns: int | None = None
    first_token_ns: int | None = None
    first_token_stage: int = -1  # the last generating stage so far
    stage_tokens: int = 0  # output tokens of that stage
    output_tokens: int = 0  # of all stages
    tasks: int = 0
    retries: int = 0
    replica: _Replica | None = None
    queue_ns: int = 0


class _Flight(msgspec.Struct, gc=False):
    """A task that is on a replica."""

    task: Task
    replica: _Replica
    stage: tuple[str, str]
    dispatched_ns: int
    batch: int
    batch_tasks: int
    first_token_ns: int | None = None
    output_tokens: int = 0


def _nothing(now: int, event: object) -> None:
    """Events that make no row."""
