"""The job manager: which instance is to run where, and what is done when it does not.

A pure state machine, pumped as the control plane is: ``step(now, events) -> actions``, and ``wakeup_at`` says when it next
wants to be called although nothing happened (a delay, a time-out, a grace period). It starts nothing itself.

A job has replicas; a replica has a place, and in it one instance after another. Ids of instances are dense integers, never
used again. What the tables of :mod:`sage_core.job_lifecycle` do not hold cannot happen. These are its rules:

* A replica keeps its place while its job wants it to run: through crashes and restarts. It loses it with its node, when it
  crashed too often, or when it is wanted no more and its instance is gone.
* A crash is followed by a delay that doubles up to a limit, and starts from the beginning after a stable time. What crashes
  ``crashes_max`` times within ``crash_window_ns`` has failed, and stays so until a restart is asked for.
* A rolling restart replaces one instance at a time: the next one only when every other replica is healthy.
* What happens to an instance that is already gone is late news and is ignored; an instance that never was is IllegalEvent.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from sage_core.capacity import Capacity, Placement
from sage_core.cluster import Job, Node, placing_order
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.job_events import (
    Cancelled,
    InstanceExited,
    InstanceHealthy,
    InstanceUnhealthy,
    JobAction,
    JobEvent,
    Kill,
    NodeJoined,
    NodeLeft,
    Paused,
    RestartAsked,
    Resumed,
    Scaled,
    Start,
    Stop,
    Submitted,
)
from sage_core.job_lifecycle import (
    JOB,
    REPLICA,
    Crashed,
    CrashedTooOften,
    Dismissed,
    JobPhase,
    Replaced,
    ReplicaPhase,
    Retried,
    advance,
)
from sage_core.job_options import JobOptions
from sage_core.job_status import InstanceStatus, JobState, JobStatus
from sage_core.node_selector import NodeSelector
from sage_core.rng import Streams
from sage_core.units import NEVER, SECOND, Nanos
from sage_core.unplaceable import why_not

__all__ = [
    "Cancelled",
    "InstanceExited",
    "InstanceHealthy",
    "InstanceStatus",
    "InstanceUnhealthy",
    "JobAction",
    "JobEvent",
    "JobManager",
    "JobOptions",
    "JobState",
    "JobStatus",
    "Kill",
    "NodeJoined",
    "NodeLeft",
    "Paused",
    "ReplicaPhase",
    "RestartAsked",
    "Resumed",
    "Scaled",
    "Start",
    "Stop",
    "Submitted",
]


class _Replica(msgspec.Struct):
    key: int  # of all replicas of all jobs, never used again
    job: str
    number: int
    phase: ReplicaPhase = ReplicaPhase.SUBMITTED
    place: Placement | None = None
    instance: int | None = None
    replacing: bool = False  # its instance was told to exit, for another one to take its place
    leaving: bool = False  # wanted no more
    restarts: int = 0
    attempts: int = 0  # crashes since it was last stable
    crashes: list[int] = []  # instants within the window
    healthy_at: int = NEVER  # since when
    due_at: int = NEVER  # when its phase is over although nothing happened
    reason: str = ""


class _Job(msgspec.Struct):
    job: Job
    phase: JobPhase
    replicas: list[_Replica]
    to_replace: list[int]  # instances that a rolling restart has not come to


class _Saved(msgspec.Struct):
    now: int
    options: JobOptions
    nodes: tuple[Node, ...]
    jobs: list[_Job]
    instances: int
    keys: int
    actions: list[JobAction]
    touched: list[str]
    room_changed: bool


_BY_USE: Final = (
    ReplicaPhase.FAILED,
    ReplicaPhase.SUBMITTED,
    ReplicaPhase.BACKOFF,
    ReplicaPhase.PLACED,
    ReplicaPhase.KILLED,
    ReplicaPhase.DRAINING,
    ReplicaPhase.UNHEALTHY,
    ReplicaPhase.STARTING,
    ReplicaPhase.HEALTHY,
)
"""Phases from least to most useful: who goes first when there are too many."""

_DOUBLINGS_MAX: Final = 62
"""2**62 ns is longer than any limit."""


class JobManager:
    """The life of every job on ``nodes``.

    An IllegalEvent changes nothing by itself; what the events before it led to comes with the next step.
    """

    def __init__(self, selector: NodeSelector, nodes: Sequence[Node], options: JobOptions = JobOptions()) -> None:  # noqa: B008  # frozen
        self.options = options
        self.wakeup_at: Nanos = NEVER
        self._selector = selector
        self._capacity = Capacity(nodes)
        self._now = 0
        self._jobs: dict[str, _Job] = {}
        self._replicas: dict[int, _Replica] = {}  # by key
        self._live: dict[int, _Replica] = {}  # by instance
        self._waiting: dict[int, _Replica] = {}  # submitted, by key
        self._placed: dict[int, _Replica] = {}
        self._timers: list[tuple[int, int]] = []  # (instant, key): a heap; those that no longer hold are skipped
        self._instances = 0
        self._keys = 0
        self._actions: list[JobAction] = []
        self._touched: dict[str, None] = {}  # jobs to look at, in order
        self._room_changed = False

    def step(self, now: Nanos, events: Sequence[JobEvent]) -> list[JobAction]:
        """What is to be done after ``events``, which happened by ``now``. IllegalEvent: one that cannot have happened."""
        if now < self._now:
            raise IllegalEvent(f"jobs: time went back from {self._now} to {now} ns")
        self._now = now
        for event in events:
            self._happened(event)
        while (replica := self._timer()) is not None and replica.due_at <= now:
            self._due(replica)
        for name in self._touched:
            self._reconcile(self._jobs[name])
            self._replace_next(self._jobs[name])
        self._touched.clear()
        if self._room_changed:
            self._place()
        self._start()
        timer = self._timer()
        self.wakeup_at = NEVER if timer is None else Nanos(timer.due_at)
        actions, self._actions = self._actions, []
        return actions

    def jobs(self) -> dict[str, JobStatus]:
        """Every job that was submitted, by name, in the order of submission."""
        return {name: self._status(job) for name, job in self._jobs.items()}

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that can be used, by name."""
        return self._capacity.nodes

    @property
    def capacity(self) -> Capacity:
        """What is free; to look at, not to book."""
        return self._capacity

    def snapshot(self) -> bytes:
        """Everything there is, for :meth:`restore`. Actions that a step returned are the driver's to remember: those of
        them that were lost are asked for again when their time is over."""
        saved = _Saved(
            self._now,
            self.options,
            self._capacity.nodes,
            [*self._jobs.values()],
            self._instances,
            self._keys,
            self._actions,
            [*self._touched],
            self._room_changed,
        )
        return msgspec.msgpack.encode(saved)

    @classmethod
    def restore(cls, selector: NodeSelector, snapshot: bytes) -> JobManager:
        """The manager that goes on where that one was, on the same clock. ConfigError: not a snapshot."""
        try:
            saved = msgspec.msgpack.decode(snapshot, type=_Saved)
        except msgspec.DecodeError as error:
            raise ConfigError(f"snapshot of jobs: {error}; start without it") from error
        manager = cls(selector, saved.nodes, saved.options)
        manager._now = saved.now
        manager._instances, manager._keys = saved.instances, saved.keys
        manager._actions, manager._room_changed = saved.actions, saved.room_changed
        manager._touched = dict.fromkeys(saved.touched)
        for job in saved.jobs:
            manager._jobs[job.job.name] = job
            for replica in job.replicas:
                manager._adopt(replica)
        timer = manager._timer()
        manager.wakeup_at = NEVER if timer is None else Nanos(timer.due_at)
        return manager

    # --- what happened --------------------------------------------------------------------------------------------------

    def _happened(self, event: JobEvent) -> None:
        match event:
            case InstanceHealthy() | InstanceUnhealthy() | InstanceExited():
                if not 0 <= event.instance < self._instances:
                    raise IllegalEvent(f"instance {event.instance}: {type(event).__name__}, but it was never started")
                replica = self._live.get(event.instance)
                if replica is not None:
                    self._observed(replica, event)
            case Submitted():
                self._submitted(event.job)
            case NodeJoined():
                if event.node.name in self._capacity.index:
                    raise IllegalEvent(f"node {event.node.name!r}: NodeJoined, but it is there already")
                self._use([*self._capacity.nodes, event.node])
            case NodeLeft():
                self._node_left(event.node)
            case _:
                self._asked(event)

    def _submitted(self, job: Job) -> None:
        before = self._jobs.get(job.name)
        if before is not None and _state(before) is not JobState.STOPPED:
            raise IllegalEvent(f"job {job.name!r}: Submitted, but there is one of that name; cancel it first")
        self._jobs.pop(job.name, None)  # the newest is the last
        self._jobs[job.name] = _Job(job, JobPhase.RUNNING, [], [])
        self._touched[job.name] = None

    def _asked(self, event: Cancelled | Paused | Resumed | Scaled | RestartAsked) -> None:
        if event.job not in self._jobs:
            raise IllegalEvent(f"job {event.job!r}: {type(event).__name__}, but there is no such job")
        job = self._jobs[event.job]
        phase = advance(JOB, job.phase, type(event), f"job {event.job!r}")
        if isinstance(event, Scaled):
            if event.replicas < 1:
                raise IllegalEvent(
                    f"job {event.job!r}: expected 1 replica or more, got {event.replicas}; pause it instead"
                )
            job.job = msgspec.structs.replace(job.job, replicas=event.replicas)
        job.phase = phase
        if isinstance(event, RestartAsked):
            self._restart(job)
        self._touched[event.job] = None

    def _restart(self, job: _Job) -> None:
        """All instances of now are to be replaced; what crashed starts again at once, as if it never had."""
        job.to_replace = [r.instance for r in job.replicas if r.instance is not None and not r.leaving]
        for replica in job.replicas:
            replica.crashes, replica.attempts = [], 0
            if replica.phase is ReplicaPhase.FAILED:
                replica.reason = ""
                self._to(replica, RestartAsked)
                self._room_changed = True
            elif replica.phase is ReplicaPhase.BACKOFF:
                self._to(replica, Retried)
                replica.restarts += 1

    def _observed(self, replica: _Replica, event: InstanceHealthy | InstanceUnhealthy | InstanceExited) -> None:
        self._touched[replica.job] = None
        before = replica.phase
        if before is ReplicaPhase.HEALTHY and self._now - replica.healthy_at >= self.options.stable_ns:
            replica.attempts = 0
        match event:
            case InstanceHealthy():
                self._to(replica, InstanceHealthy)
                if replica.phase is ReplicaPhase.HEALTHY is not before:
                    replica.healthy_at, replica.reason = self._now, ""
            case InstanceUnhealthy():
                due_at = self._now + self.options.unhealthy_max_ns if before is ReplicaPhase.HEALTHY else None
                self._to(replica, InstanceUnhealthy, due_at)
                if replica.phase is ReplicaPhase.UNHEALTHY:
                    replica.reason = event.reason
            case InstanceExited():
                self._exited(replica, event.reason)

    def _exited(self, replica: _Replica, reason: str) -> None:
        self._end_instance(replica)
        if replica.leaving:
            self._dismiss(replica)
        elif replica.replacing:
            replica.replacing = False
            replica.restarts += 1
            self._to(replica, Replaced)
        else:
            self._crashed(replica, reason)

    def _crashed(self, replica: _Replica, reason: str) -> None:
        options = self.options
        if replica.phase not in (ReplicaPhase.DRAINING, ReplicaPhase.KILLED):
            replica.reason = reason  # else it is known why it was told to exit
        replica.crashes = [at for at in replica.crashes if at > self._now - options.crash_window_ns] + [self._now]
        if len(replica.crashes) >= options.crashes_max:
            window_s = options.crash_window_ns / SECOND
            replica.reason = f"crashed {len(replica.crashes)} times within {window_s:g} s, last: {replica.reason}"
            self._give_back(replica)
            self._to(replica, CrashedTooOften)
            return
        delay = min(options.backoff_first_ns << min(replica.attempts, _DOUBLINGS_MAX), options.backoff_max_ns)
        if options.jitter:
            draw = Streams(options.seed).stream(f"backoff/{replica.key}/{replica.restarts}").random()
            delay -= round(delay * options.jitter * draw)
        replica.attempts += 1
        self._to(replica, Crashed, self._now + delay)

    def _node_left(self, name: str) -> None:
        if name not in self._capacity.index:
            raise IllegalEvent(f"node {name!r}: NodeLeft, but it is not there")
        for replica in [each for each in self._replicas.values() if each.place is not None and each.place.node == name]:
            self._touched[replica.job] = None
            if replica.instance is not None:
                replica.restarts += not replica.leaving
                self._end_instance(replica)
            if replica.leaving:
                self._dismiss(replica)
            else:
                self._give_back(replica)
                replica.replacing = False
                replica.reason = f"node {name} left"
                self._to(replica, NodeLeft)
        self._use([node for node in self._capacity.nodes if node.name != name])

    def _due(self, replica: _Replica) -> None:
        """The time of its phase is over."""
        options = self.options
        self._touched[replica.job] = None
        match replica.phase:
            case ReplicaPhase.STARTING:
                replica.reason = f"not healthy within {options.start_timeout_ns / SECOND:g} s of its start"
                self._kill(replica)
            case ReplicaPhase.UNHEALTHY:
                replica.reason = f"unhealthy for {options.unhealthy_max_ns / SECOND:g} s: {replica.reason}"
                self._stop(replica)
            case ReplicaPhase.DRAINING | ReplicaPhase.KILLED:
                self._kill(replica)
            case _:
                replica.restarts += 1
                self._to(replica, Retried)

    # --- what follows ---------------------------------------------------------------------------------------------------

    def _reconcile(self, job: _Job) -> None:
        """As many replicas as are wanted: make those that are missing, dismiss those of least use."""
        wanted = [each for each in job.replicas if not each.leaving]
        goal = job.job.replicas if job.phase is JobPhase.RUNNING else 0
        wanted.sort(key=lambda each: (_BY_USE.index(each.phase), -each.number))
        for replica in wanted[: max(len(wanted) - goal, 0)]:
            self._dismiss(replica)
        taken = {each.number for each in job.replicas}
        number = 0
        for _ in range(goal - len(wanted)):
            while number in taken:
                number += 1
            taken.add(number)
            replica = _Replica(self._keys, job.job.name, number)
            self._keys += 1
            job.replicas.append(replica)
            self._adopt(replica, book=False)
            self._room_changed = True

    def _dismiss(self, replica: _Replica) -> None:
        """It is wanted no more: its instance is stopped; where it has none, that is its end."""
        replica.leaving = True
        if replica.instance is not None:
            if replica.phase not in (ReplicaPhase.DRAINING, ReplicaPhase.KILLED):
                self._stop(replica)
            return
        self._give_back(replica)
        self._to(replica, Dismissed)
        del self._replicas[replica.key]
        self._jobs[replica.job].replicas.remove(replica)

    def _replace_next(self, job: _Job) -> None:
        """The next step of a rolling restart: one replica at most is not healthy on account of it."""
        if not job.to_replace:
            return
        old = {each.instance: each for each in job.replicas if not each.leaving and not each.replacing}
        job.to_replace = [instance for instance in job.to_replace if instance in old]
        down = [
            each
            for each in job.replicas
            if not each.leaving and each.phase not in (ReplicaPhase.HEALTHY, ReplicaPhase.FAILED)
        ]
        if any(each.instance not in job.to_replace for each in down):
            return
        # One that is down anyway costs nobody anything, so those are replaced first.
        going = [each for each in down if each.phase in (ReplicaPhase.STARTING, ReplicaPhase.UNHEALTHY)]
        if job.to_replace and (going or not down):
            replica = going[0] if going else old[job.to_replace[0]]
            replica.replacing = True
            self._stop(replica)

    def _place(self) -> None:
        """Places for those that wait, in the order of a plan. Once a job found no room, its other replicas find none."""
        self._room_changed = False
        refused: set[str] = set()
        for replica in sorted(self._waiting.values(), key=self._order):
            if replica.job in refused:
                continue
            job = self._jobs[replica.job].job
            place = self._selector.place(self._capacity, job)
            if place is None:
                refused.add(replica.job)
                continue
            self._capacity.take(job, place)
            replica.place = place
            self._to(replica, Placement)

    def _start(self) -> None:
        """Start who has a place, as many at one time as a node may."""
        most = self.options.starting_max
        starting = Counter(self._on_nodes(ReplicaPhase.STARTING)) if most and self._placed else Counter()
        for replica in sorted(self._placed.values(), key=self._order):
            assert replica.place is not None
            if most and starting[replica.place.node] >= most:
                continue
            starting[replica.place.node] += 1
            replica.instance = self._instances
            self._instances += 1
            self._live[replica.instance] = replica
            place = replica.place
            self._actions.append(Start(replica.instance, replica.job, place.node, place.gpus, place.needs))
            self._to(replica, Start, self._now + self.options.start_timeout_ns)

    def _stop(self, replica: _Replica) -> None:
        assert replica.instance is not None and replica.place is not None
        self._actions.append(Stop(replica.instance, replica.place.node, self.options.grace_ns))
        self._to(replica, Stop, self._now + self.options.grace_ns)

    def _kill(self, replica: _Replica) -> None:
        assert replica.instance is not None and replica.place is not None
        self._actions.append(Kill(replica.instance, replica.place.node))
        self._to(replica, Kill, self._now + self.options.kill_again_ns)

    # --- bookkeeping ----------------------------------------------------------------------------------------------------

    def _to(self, replica: _Replica, trigger: type, due_at: int | None = None) -> None:
        """By the table to its next phase, which is over at ``due_at``; None: a new phase has no end, an old one keeps it."""
        before = replica.phase
        replica.phase = advance(REPLICA, before, trigger, f"job {replica.job!r}, replica {replica.number}")
        if replica.phase is not before:
            self._index(replica, before)
            replica.due_at = NEVER
        if due_at is not None:
            replica.due_at = due_at
            heapq.heappush(self._timers, (due_at, replica.key))

    def _index(self, replica: _Replica, before: ReplicaPhase | None = None) -> None:
        for phase, members in ((ReplicaPhase.SUBMITTED, self._waiting), (ReplicaPhase.PLACED, self._placed)):
            if replica.phase is phase:
                members[replica.key] = replica
            elif before is phase:
                del members[replica.key]

    def _adopt(self, replica: _Replica, *, book: bool = True) -> None:
        """Into every index by which a replica is found. book: its place too, where it has one."""
        self._replicas[replica.key] = replica
        self._index(replica)
        if replica.instance is not None:
            self._live[replica.instance] = replica
        if replica.due_at < NEVER:
            heapq.heappush(self._timers, (replica.due_at, replica.key))
        if book and replica.place is not None:
            self._capacity.take(self._jobs[replica.job].job, replica.place)

    def _end_instance(self, replica: _Replica) -> None:
        assert replica.instance is not None
        del self._live[replica.instance]
        replica.instance = None

    def _give_back(self, replica: _Replica) -> None:
        if replica.place is not None:
            self._capacity.release(self._jobs[replica.job].job, replica.place)
            replica.place = None
            self._room_changed = True

    def _use(self, nodes: Iterable[Node]) -> None:
        """Count anew on these nodes."""
        self._capacity = Capacity(nodes)
        for replica in self._replicas.values():
            if replica.place is not None:
                self._capacity.take(self._jobs[replica.job].job, replica.place)
        self._room_changed = True

    def _order(self, replica: _Replica) -> tuple[Any, ...]:
        """Who is served first, as in a plan."""
        return placing_order(self._jobs[replica.job].job), replica.key

    def _on_nodes(self, phase: ReplicaPhase) -> list[str]:
        return [each.place.node for each in self._replicas.values() if each.phase is phase and each.place is not None]

    def _status(self, job: _Job) -> JobStatus:
        waiting = any(each.phase is ReplicaPhase.SUBMITTED for each in job.replicas)
        no_room = f"no node has room: {why_not(self._capacity, job.job)}" if waiting else ""
        instances = []
        for each in sorted(job.replicas, key=lambda each: (each.number, each.key)):
            place, reason = each.place, each.reason
            if each.phase is ReplicaPhase.SUBMITTED:
                reason = f"{reason}; {no_room}" if reason else no_room
            instances.append(
                InstanceStatus(
                    each.number,
                    each.instance,
                    None if place is None else place.node,
                    () if place is None else place.gpus,
                    each.phase,
                    each.restarts,
                    reason,
                    Nanos(each.due_at) if each.phase is ReplicaPhase.BACKOFF else NEVER,
                )
            )
        state = _state(job)
        reason = next((each.reason for each in instances if each.reason), "")
        return JobStatus(job.job, state, "" if state is JobState.HEALTHY else reason, tuple(instances))

    def _timer(self) -> _Replica | None:
        """Whose phase is over first."""
        while self._timers:
            at, key = self._timers[0]
            replica = self._replicas.get(key)
            if replica is not None and replica.due_at == at:
                return replica
            heapq.heappop(self._timers)
        return None


_TROUBLED: Final = {ReplicaPhase.UNHEALTHY, ReplicaPhase.BACKOFF, ReplicaPhase.FAILED}


def _state(job: _Job) -> JobState:
    if job.phase is not JobPhase.RUNNING:
        over = JobState.PAUSED if job.phase is JobPhase.PAUSED else JobState.STOPPED
        return JobState.DRAINING if job.replicas else over
    wanted = [each for each in job.replicas if not each.leaving]
    phases = {each.phase for each in wanted}
    if phases == {ReplicaPhase.FAILED}:
        return JobState.FAILED
    ending = (ReplicaPhase.DRAINING, ReplicaPhase.KILLED)
    if phases & _TROUBLED or any(each.phase in ending and not each.replacing for each in wanted):
        return JobState.UNHEALTHY
    if ReplicaPhase.SUBMITTED in phases or not phases:
        return JobState.SUBMITTED
    if ReplicaPhase.PLACED in phases:
        return JobState.PLACED
    return JobState.HEALTHY if phases == {ReplicaPhase.HEALTHY} else JobState.STARTING
