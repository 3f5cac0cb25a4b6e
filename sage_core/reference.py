"""The scheduling mechanism in plain Python: the meaning of ``sage_core._native.Mechanism``.

What may be decided is here; what should be decided is the policy's. Rules kept, each step:

* a total order: the lower score goes first, equal scores in order of task id, so ties never depend on memory layout;
* in-step accounting: a task placed in this step counts at once against the next one;
* capacity: a task is placed only on a replica that is open to it (:class:`sage_core.policy.Limits`);
* a task is never in two places: queued, in flight, or gone.

Nothing here is fast on purpose. Floating-point expressions are written in the order the C++ twin evaluates them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sage_core.errors import IllegalEvent, InvariantViolation, PolicyError
from sage_core.policy import Limit, Limits, Order, QueueView, Route, Speed
from sage_core.units import NEVER, Nanos, PoolKind

MATRIX_ROWS_MAX = 256
"""Tasks a route that is not live is asked about at once."""

SLOWDOWN_GAIN = 0.125
SLOWDOWN_BOUNDS = (0.125, 8.0)

TASK_COLUMNS = (
    "task",
    "request",
    "kind",
    "tenant",
    "priority",
    "attempt",
    "arrived_at",
    "queued_at",
    "ttft_due_at",
    "due_at",
    "input_tokens",
    "output_tokens_max",
    "output_tokens",
    "prefix",
)
REPLICA_COLUMNS = (
    "replica",
    "device",
    "in_flight",
    "device_in_flight",
    "prefill_tokens",
    "kv_tokens",
    "tasks_max",
    "batch_tokens_max",
    "kv_tokens_max",
    "running",
    "waiting",
    "kv_blocks_free",
    "reported_at",
    "last_dispatch",
)
LIMIT_COLUMNS = ("tasks_max", "tasks_max_batch", "prefill_tokens_max", "kv_tokens_max", "hold_until")
REPLICA_COSTS = ("fixed_ns", "input_token_ns", "output_token_ns", "output_seq_ns", "slowdown")


class Table:
    """Columns as attributes: a :class:`sage_core.policy.TaskView` or ``ReplicaView`` made from rows."""

    def __init__(self, rows: int, columns: dict[str, np.ndarray[Any, Any]], **facts: object) -> None:
        self._rows = rows
        for name, column in columns.items():
            column.flags.writeable = False
            setattr(self, name, column)
        for name, fact in facts.items():
            setattr(self, name, fact)

    def __len__(self) -> int:
        return self._rows

    def __getattr__(self, name: str) -> Any:  # only reached for columns that do not exist
        raise AttributeError(f"no column {name!r} in this view; columns: {', '.join(sorted(vars(self)))}")


class QueuedTask(NamedTuple):
    """One row of the queue; the fields of :data:`TASK_COLUMNS`."""

    task: int
    request: int
    kind: int
    tenant: int
    priority: int
    attempt: int
    arrived_at: int
    queued_at: int
    ttft_due_at: int
    due_at: int
    input_tokens: int
    output_tokens_max: int
    output_tokens: int
    prefix: int


@dataclass
class Replica:
    """One row of a replica table."""

    replica: int
    device: int
    tasks_max: int
    batch_tokens_max: int
    kv_tokens_max: int
    fixed_ns: float
    input_token_ns: float
    output_token_ns: float
    output_seq_ns: float
    in_flight: int = 0
    device_in_flight: int = 0
    prefill_tokens: int = 0
    kv_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    reported_at: int = 0
    last_dispatch: int = 0
    slowdown: float = 1.0


@dataclass
class _InFlight:
    pool: _Pool
    replica: Replica
    input_tokens: int
    kv_tokens: int
    dispatched_at: int
    in_flight_then: int
    prefill_ns: float
    prefilling: bool = True


@dataclass
class _Pool:
    name: str
    kind: PoolKind
    queue: dict[int, QueuedTask] = field(default_factory=dict)  # in order of queueing
    static_score: dict[int, float] = field(default_factory=dict)
    serving: list[Replica] = field(default_factory=list)
    draining: list[Replica] = field(default_factory=list)
    tenant_service: dict[int, int] = field(default_factory=dict)
    service_floor: int = 0
    dispatches: int = 0
    bypassed: int = 0

    def oldest(self) -> int:
        return next(iter(self.queue), -1)

    def speed(self) -> Speed:
        if not self.serving:
            return Speed()
        return Speed(
            min(replica.fixed_ns for replica in self.serving),
            min(replica.input_token_ns for replica in self.serving),
            min(replica.output_token_ns for replica in self.serving),
        )


class Mechanism:
    """Queues, capacity, selection, routing and removal for all pools. Instants and spans in ns."""

    def __init__(self) -> None:
        self._pools: list[_Pool] = []
        self._replica_pool: dict[int, _Pool] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._device_in_flight: dict[int, int] = {}
        self._order: Order | None = None
        self._route: Route | None = None
        self._limit: Limit | None = None
        self.wakeup_at: int = NEVER

    # --- policy and membership ------------------------------------------------------------------------------------

    def bind(self, now: Nanos, order: Order, route: Route, limit: Limit) -> None:
        """Decide with these parts from now on; static scores are made again."""
        self._order, self._route, self._limit = order, route, limit
        for pool in self._pools:
            pool.static_score.clear()
            if order.static:
                for task in pool.queue.values():
                    self._score_static(now, pool, task)

    def add_pool(self, name: str, kind: int) -> int:
        """Index of the new pool."""
        self._pools.append(_Pool(name, PoolKind(kind)))
        return len(self._pools) - 1

    def set_kind(self, pool: int, kind: int) -> None:
        """What a pool turned out to be when its first replica joined."""
        self._pools[pool].kind = PoolKind(kind)

    def join(
        self,
        pool: int,
        replica: int,
        device: int,
        tasks_max: int,
        batch_tokens_max: int,
        kv_tokens_max: int,
        fixed_ns: float,
        input_token_ns: float,
        output_token_ns: float,
        output_seq_ns: float,
    ) -> None:
        """A replica starts serving ``pool``."""
        if replica in self._replica_pool:
            raise IllegalEvent(f"replica {replica} joined twice")
        self._pools[pool].serving.append(
            Replica(
                replica,
                device,
                tasks_max,
                batch_tokens_max,
                kv_tokens_max,
                fixed_ns,
                input_token_ns,
                output_token_ns,
                output_seq_ns,
            )
        )
        self._replica_pool[replica] = self._pools[pool]

    def drain(self, replica: int) -> None:
        """No new work for ``replica``; what it has stays counted."""
        pool = self._pool_of(replica)
        for row in pool.serving:
            if row.replica == replica:
                pool.serving.remove(row)
                pool.draining.append(row)
                return

    def leave(self, replica: int) -> list[int]:
        """``replica`` is gone. The tasks that were on it, ascending; they are no longer in flight."""
        pool = self._pool_of(replica)
        lost = sorted(task for task, flight in self._in_flight.items() if flight.replica.replica == replica)
        for task in lost:
            self._release(task)
        pool.serving = [row for row in pool.serving if row.replica != replica]
        pool.draining = [row for row in pool.draining if row.replica != replica]
        del self._replica_pool[replica]
        return lost

    def report(self, replica: int, now: Nanos, running: int, waiting: int, kv_blocks_free: int) -> None:
        """Observed load of ``replica``."""
        pool = self._pool_of(replica)
        for row in (*pool.serving, *pool.draining):
            if row.replica == replica:
                row.running, row.waiting, row.kv_blocks_free, row.reported_at = running, waiting, kv_blocks_free, now

    # --- tasks ----------------------------------------------------------------------------------------------------

    def enqueue(self, now: Nanos, pool: int, *columns: int) -> None:
        """Queue a task; ``columns`` as in :data:`TASK_COLUMNS`."""
        row = QueuedTask(*columns)
        here = self._pools[pool]
        if row.task in self._in_flight or any(row.task in other.queue for other in self._pools):
            raise InvariantViolation(f"invariant 3: task {row.task} is queued or in flight already")
        # A tenant that comes back does not collect credit for the time it asked for nothing (Sheng et al., OSDI'24).
        active = {task.tenant for task in here.queue.values()}
        if row.tenant not in active:
            lift = min((here.tenant_service[tenant] for tenant in active), default=here.service_floor)
            here.tenant_service[row.tenant] = max(here.tenant_service.get(row.tenant, 0), lift)
        here.queue[row.task] = row
        if self._order is not None and self._order.static:
            self._score_static(now, here, row)

    def withdraw(self, task: int) -> bool:
        """Take a queued task out; ``False`` when it is not queued."""
        for pool in self._pools:
            if task in pool.queue:
                self._unqueue(pool, task)
                return True
        return False

    def started(self, task: int) -> None:
        """The first output token of ``task`` was seen: its prefill is done."""
        flight = self._flight(task)
        if flight.prefilling:
            flight.prefilling = False
            flight.replica.prefill_tokens -= flight.input_tokens

    def finished(self, now: Nanos, task: int, output_tokens: int) -> int:
        """``task`` is done: free its place, learn how slow its replica was. Returns the replica."""
        flight = self._flight(task)
        replica = flight.replica
        per_token = replica.output_token_ns + replica.output_seq_ns * float(flight.in_flight_then)
        expected = flight.prefill_ns + float(output_tokens) * per_token
        if expected > 0.0:
            low, high = SLOWDOWN_BOUNDS
            ratio = min(max(float(now - flight.dispatched_at) / expected, low), high)
            replica.slowdown = replica.slowdown + (ratio - replica.slowdown) * SLOWDOWN_GAIN
        return self._release(task)

    def dropped(self, task: int) -> int:
        """``task`` left its replica undone (failed, cancelled). Returns the replica."""
        return self._release(task)

    # --- decisions ------------------------------------------------------------------------------------------------

    def decide(self, now: Nanos) -> list[tuple[int, int]]:
        """Place what may be placed now: (replica, task) in order of decision. Updates ``wakeup_at``."""
        decisions: list[tuple[int, int]] = []
        self.wakeup_at = NEVER
        for pool in self._pools:
            if pool.queue and pool.serving:
                self._decide_pool(now, pool, decisions)
        return decisions

    def _decide_pool(self, now: Nanos, pool: _Pool, decisions: list[tuple[int, int]]) -> None:
        assert self._order is not None and self._route is not None and self._limit is not None
        limits = self._limits(now, pool)
        open_urgent = [r for r in range(len(pool.serving)) if _is_open(pool.serving[r], limits, r, now, urgent=True)]
        open_batch = [r for r in open_urgent if _is_open(pool.serving[r], limits, r, now, urgent=False)]

        def open_to(row: QueuedTask) -> list[int]:
            return open_urgent if row.priority <= 0 else open_batch

        def put(row: QueuedTask, scores: Sequence[float]) -> int | None:
            """Place ``row`` on the best open replica; its index, or None when none takes it."""
            best = min(((score, r) for r in open_to(row) if (score := scores[r]) < math.inf), default=None)
            if best is None:
                return None
            r = best[1]
            self._place(now, pool, row, pool.serving[r], limits, r)
            decisions.append((pool.serving[r].replica, row.task))
            for is_urgent, openings in ((True, open_urgent), (False, open_batch)):
                if r in openings and not _is_open(pool.serving[r], limits, r, now, urgent=is_urgent):
                    openings.remove(r)
            return r

        if open_urgent:
            ranked = self._ranked(now, pool)
            if self._route.live:
                for row in ranked:
                    if open_to(row):
                        put(row, self._route_scores(now, pool, [row])[0])
            else:
                placed_here = [0] * len(pool.serving)
                while chunk := [row for row in ranked if open_to(row)][:MATRIX_ROWS_MAX]:
                    ranked = ranked[ranked.index(chunk[-1]) + 1 :]
                    matrix = self._route_scores(now, pool, chunk)
                    for row, scores in zip(chunk, matrix, strict=True):
                        weighted = [
                            score + self._route.load_weight * float(n)
                            for score, n in zip(scores, placed_here, strict=True)
                        ]
                        where = put(row, weighted)
                        if where is not None:
                            placed_here[where] += 1
        if pool.queue:
            held = [until for until in limits.hold_until.tolist() if until > now]
            self.wakeup_at = min([self.wakeup_at, *held])

    def _limits(self, now: Nanos, pool: _Pool) -> Limits:
        assert self._limit is not None
        limits = self._limit.limit(now, self._replica_view(pool), self._queue_view(pool))
        return Limits(*(checked_limit(limits, name, len(pool.serving), self._limit) for name in LIMIT_COLUMNS))

    def _ranked(self, now: Nanos, pool: _Pool) -> list[QueuedTask]:
        """Queued tasks that may go now, best first."""
        assert self._order is not None
        rows = list(pool.queue.values())
        if self._order.static:
            scores: Iterable[float] = (pool.static_score[row.task] for row in rows)
        else:
            scores = self._order_scores(now, pool, rows)
        ranked = sorted((score, row.task) for score, row in zip(scores, rows, strict=True) if score < math.inf)
        return [pool.queue[task] for _, task in ranked]

    def _order_scores(self, now: Nanos, pool: _Pool, rows: list[QueuedTask]) -> list[float]:
        assert self._order is not None
        scores = checked(self._order.score(now, self._task_view(pool, rows)), (len(rows),), "order", self._order)
        for row, score in zip(rows, scores.tolist(), strict=True):
            if math.isnan(score):
                raise PolicyError(f"order {part_name(self._order)}: score of task {row.task} is NaN at now={now}")
        return list(scores.tolist())

    def _route_scores(self, now: Nanos, pool: _Pool, rows: list[QueuedTask]) -> list[list[float]]:
        assert self._route is not None
        self._refresh_devices(pool)
        shape = (len(rows), len(pool.serving))
        view = self._task_view(pool, rows)
        scores = checked(self._route.score(now, view, self._replica_view(pool)), shape, "route", self._route)
        if np.isnan(scores).any():
            row, r = np.argwhere(np.isnan(scores))[0].tolist()
            raise PolicyError(
                f"route {part_name(self._route)}: score of task {rows[row].task} on replica "
                f"{pool.serving[r].replica} is NaN at now={now}"
            )
        return [list(line) for line in scores.tolist()]

    def _score_static(self, now: Nanos, pool: _Pool, row: QueuedTask) -> None:
        pool.static_score[row.task] = self._order_scores(now, pool, [row])[0]

    def _place(self, now: Nanos, pool: _Pool, row: QueuedTask, replica: Replica, limits: Limits, r: int) -> None:
        if not _is_open(replica, limits, r, now, urgent=row.priority <= 0):
            raise InvariantViolation(
                f"invariant 2: task {row.task} placed on replica {replica.replica}, which is not open to it"
            )
        if row.task == pool.oldest():
            pool.bypassed = 0
        else:
            pool.bypassed += 1
        self._unqueue(pool, row.task)
        prefill_ns = replica.fixed_ns + replica.input_token_ns * float(replica.prefill_tokens + row.input_tokens)
        replica.in_flight += 1
        replica.prefill_tokens += row.input_tokens
        replica.kv_tokens += row.input_tokens + row.output_tokens
        pool.dispatches += 1
        replica.last_dispatch = pool.dispatches
        self._device_in_flight[replica.device] = self._device_in_flight.get(replica.device, 0) + 1
        pool.tenant_service[row.tenant] += row.input_tokens + 2 * row.output_tokens
        self._in_flight[row.task] = _InFlight(
            pool,
            replica,
            row.input_tokens,
            row.input_tokens + row.output_tokens,
            now,
            replica.in_flight,
            prefill_ns,
        )

    def _unqueue(self, pool: _Pool, task: int) -> None:
        row = pool.queue.pop(task)
        pool.static_score.pop(task, None)
        if all(other.tenant != row.tenant for other in pool.queue.values()):
            pool.service_floor = pool.tenant_service[row.tenant]

    def _release(self, task: int) -> int:
        flight = self._flight(task)
        replica = flight.replica
        replica.in_flight -= 1
        replica.kv_tokens -= flight.kv_tokens
        if flight.prefilling:
            replica.prefill_tokens -= flight.input_tokens
        self._device_in_flight[replica.device] -= 1
        del self._in_flight[task]
        return replica.replica

    def _flight(self, task: int) -> _InFlight:
        flight = self._in_flight.get(task)
        if flight is None:
            raise IllegalEvent(f"task {task} is not in flight")
        return flight

    def _pool_of(self, replica: int) -> _Pool:
        pool = self._replica_pool.get(replica)
        if pool is None:
            raise IllegalEvent(f"replica {replica} is not known")
        return pool

    def speed(self, pool: int) -> Speed:
        """Of the fastest serving replica of a pool, cost by cost."""
        return self._pools[pool].speed()

    # --- what policies see ----------------------------------------------------------------------------------------

    def task_view(self, pool: int, tasks: list[int]) -> Table:
        """View of some queued tasks, in the given order."""
        return self._task_view(self._pools[pool], [self._pools[pool].queue[task] for task in tasks])

    def replica_view(self, pool: int) -> Table:
        """View of the serving replicas of a pool."""
        return self._replica_view(self._pools[pool])

    def _task_view(self, pool: _Pool, rows: list[QueuedTask]) -> Table:
        columns = {name: np.array([row[i] for row in rows], np.int64) for i, name in enumerate(TASK_COLUMNS)}
        columns["tenant_service"] = np.array([pool.tenant_service[row.tenant] for row in rows], np.int64)
        return Table(
            len(rows),
            columns,
            pool=pool.name,
            pool_kind=pool.kind,
            speed=pool.speed(),
            oldest=pool.oldest(),
            bypassed=pool.bypassed,
        )

    def _replica_view(self, pool: _Pool) -> Table:
        self._refresh_devices(pool)
        columns: dict[str, np.ndarray[Any, Any]] = {
            name: np.array([getattr(row, name) for row in pool.serving], np.int64) for name in REPLICA_COLUMNS
        }
        for name in REPLICA_COSTS:
            columns[name] = np.array([getattr(row, name) for row in pool.serving], np.float64)
        return Table(len(pool.serving), columns)

    def _queue_view(self, pool: _Pool) -> QueueView:
        rows = pool.queue.values()
        return QueueView(
            pool.kind,
            len(rows),
            sum(row.input_tokens for row in rows),
            pool.queue[pool.oldest()].queued_at if rows else NEVER,
            min((min(row.ttft_due_at, row.due_at) for row in rows), default=NEVER),
        )

    def _refresh_devices(self, pool: _Pool) -> None:
        for row in pool.serving:
            row.device_in_flight = self._device_in_flight.get(row.device, 0)

    # --- counts and integrity -------------------------------------------------------------------------------------

    def queued(self) -> int:
        """Tasks queued in all pools."""
        return sum(len(pool.queue) for pool in self._pools)

    def queued_in(self, pool: int) -> int:
        """Tasks queued in that one."""
        return len(self._pools[pool].queue)

    def in_flight(self) -> int:
        """Tasks on replicas."""
        return len(self._in_flight)

    def check(self) -> None:
        """Invariants over the whole state; for tests, it is slow."""
        for pool in self._pools:
            for row in (*pool.serving, *pool.draining):
                on_it = [flight for flight in self._in_flight.values() if flight.replica is row]
                counted = (len(on_it), sum(flight.kv_tokens for flight in on_it))
                pending = sum(flight.input_tokens for flight in on_it if flight.prefilling)
                if (row.in_flight, row.kv_tokens) != counted or row.prefill_tokens != pending:
                    raise InvariantViolation(f"invariant 2: replica {row.replica} counts {row}, holds {counted}")
            if any(task in self._in_flight for task in pool.queue):
                raise InvariantViolation("invariant 3: a task is queued and in flight")


def _is_open(replica: Replica, limits: Limits, r: int, now: Nanos, *, urgent: bool) -> bool:
    return bool(
        now >= limits.hold_until[r]
        and replica.in_flight < limits.tasks_max[r]
        and (urgent or replica.in_flight < limits.tasks_max_batch[r])
        and replica.prefill_tokens < limits.prefill_tokens_max[r]
        and replica.kv_tokens < limits.kv_tokens_max[r]
    )


def part_name(part: object) -> str:
    """How an error names a policy part: its own ``name``, else its class."""
    name = getattr(part, "name", None)
    return name if isinstance(name, str) else type(part).__name__


def checked(scores: object, shape: tuple[int, ...], verb: str, part: object) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``scores`` as float64 of ``shape``, or a :class:`PolicyError` that names the part."""
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{verb} {part_name(part)}: scores must be numbers, got {type(scores).__name__}") from error
    if array.shape != shape:
        raise PolicyError(f"{verb} {part_name(part)}: expected scores of shape {shape}, got {array.shape}")
    return array


def checked_limit(limits: object, name: str, replicas: int, part: object) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Column ``name`` of ``limits`` as int64 (replicas,), or a :class:`PolicyError` that names the part."""
    column = np.asarray(getattr(limits, name, None))
    if column.shape != (replicas,):
        raise PolicyError(
            f"limit {part_name(part)}: {name} must have one entry a replica, ({replicas},); got {column.shape}"
        )
    if not np.can_cast(column.dtype, np.int64):
        raise PolicyError(
            f"limit {part_name(part)}: {name} must be whole numbers (int64; units.NEVER for no limit), "
            f"got {column.dtype}"
        )
    return column.astype(np.int64, copy=False)
