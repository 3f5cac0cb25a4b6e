"""The life of a job and of a replica of it, as tables; :mod:`sage_core.lifecycle` states the two rules they keep.

A trigger is an event of a driver, an action, or a class of this file: what the manager concludes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, TypeVar

from sage_core.capacity import Placement
from sage_core.errors import IllegalEvent
from sage_core.job_events import (
    Cancelled,
    InstanceHealthy,
    InstanceUnhealthy,
    Kill,
    NodeLeft,
    Paused,
    RestartAsked,
    Resumed,
    Scaled,
    Start,
    Stop,
)


class JobPhase(Enum):
    """What is wanted of a job."""

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"


class ReplicaPhase(Enum):
    """Where a replica of a job is. From ``starting`` to ``killed`` it has a live instance."""

    SUBMITTED = "submitted"  # has no place yet
    PLACED = "placed"  # has one, and waits for its turn to start
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"  # was told to stop
    KILLED = "killed"  # was killed, and has not been seen to exit
    BACKOFF = "backoff"  # crashed; keeps its place, and starts again when the delay is over
    FAILED = "failed"  # crashed too often; gave its place back
    STOPPED = "stopped"  # wanted no more


class Crashed:
    """Its instance exited although it was wanted."""


class CrashedTooOften:
    """... and once too often."""


class Retried:
    """Its delay is over."""


class Replaced:
    """Its instance exited, as it was told to, for another one to take its place."""


class Dismissed:
    """It is wanted no more, and nothing of it runs."""


JOB: Final[Mapping[tuple[JobPhase, type], JobPhase]] = {
    (JobPhase.RUNNING, Paused): JobPhase.PAUSED,
    (JobPhase.RUNNING, Scaled): JobPhase.RUNNING,
    (JobPhase.RUNNING, RestartAsked): JobPhase.RUNNING,
    (JobPhase.RUNNING, Cancelled): JobPhase.CANCELLED,
    (JobPhase.PAUSED, Resumed): JobPhase.RUNNING,
    (JobPhase.PAUSED, Scaled): JobPhase.PAUSED,
    (JobPhase.PAUSED, Cancelled): JobPhase.CANCELLED,
}

REPLICA: Final[Mapping[tuple[ReplicaPhase, type], ReplicaPhase]] = {
    (ReplicaPhase.SUBMITTED, Placement): ReplicaPhase.PLACED,
    (ReplicaPhase.SUBMITTED, Dismissed): ReplicaPhase.STOPPED,
    (ReplicaPhase.PLACED, Start): ReplicaPhase.STARTING,
    (ReplicaPhase.PLACED, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.PLACED, Dismissed): ReplicaPhase.STOPPED,
    (ReplicaPhase.STARTING, InstanceHealthy): ReplicaPhase.HEALTHY,
    (ReplicaPhase.STARTING, InstanceUnhealthy): ReplicaPhase.STARTING,  # not yet healthy is no news
    (ReplicaPhase.STARTING, Stop): ReplicaPhase.DRAINING,
    (ReplicaPhase.STARTING, Kill): ReplicaPhase.KILLED,
    (ReplicaPhase.STARTING, Crashed): ReplicaPhase.BACKOFF,
    (ReplicaPhase.STARTING, CrashedTooOften): ReplicaPhase.FAILED,
    (ReplicaPhase.STARTING, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.HEALTHY, InstanceHealthy): ReplicaPhase.HEALTHY,
    (ReplicaPhase.HEALTHY, InstanceUnhealthy): ReplicaPhase.UNHEALTHY,
    (ReplicaPhase.HEALTHY, Stop): ReplicaPhase.DRAINING,
    (ReplicaPhase.HEALTHY, Crashed): ReplicaPhase.BACKOFF,
    (ReplicaPhase.HEALTHY, CrashedTooOften): ReplicaPhase.FAILED,
    (ReplicaPhase.HEALTHY, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.UNHEALTHY, InstanceHealthy): ReplicaPhase.HEALTHY,
    (ReplicaPhase.UNHEALTHY, InstanceUnhealthy): ReplicaPhase.UNHEALTHY,
    (ReplicaPhase.UNHEALTHY, Stop): ReplicaPhase.DRAINING,
    (ReplicaPhase.UNHEALTHY, Crashed): ReplicaPhase.BACKOFF,
    (ReplicaPhase.UNHEALTHY, CrashedTooOften): ReplicaPhase.FAILED,
    (ReplicaPhase.UNHEALTHY, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.DRAINING, InstanceHealthy): ReplicaPhase.DRAINING,
    (ReplicaPhase.DRAINING, InstanceUnhealthy): ReplicaPhase.DRAINING,
    (ReplicaPhase.DRAINING, Kill): ReplicaPhase.KILLED,
    (ReplicaPhase.DRAINING, Crashed): ReplicaPhase.BACKOFF,  # drained because it was unhealthy
    (ReplicaPhase.DRAINING, CrashedTooOften): ReplicaPhase.FAILED,
    (ReplicaPhase.DRAINING, Replaced): ReplicaPhase.PLACED,
    (ReplicaPhase.DRAINING, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.DRAINING, Dismissed): ReplicaPhase.STOPPED,
    (ReplicaPhase.KILLED, InstanceHealthy): ReplicaPhase.KILLED,
    (ReplicaPhase.KILLED, InstanceUnhealthy): ReplicaPhase.KILLED,
    (ReplicaPhase.KILLED, Kill): ReplicaPhase.KILLED,
    (ReplicaPhase.KILLED, Crashed): ReplicaPhase.BACKOFF,
    (ReplicaPhase.KILLED, CrashedTooOften): ReplicaPhase.FAILED,
    (ReplicaPhase.KILLED, Replaced): ReplicaPhase.PLACED,
    (ReplicaPhase.KILLED, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.KILLED, Dismissed): ReplicaPhase.STOPPED,
    (ReplicaPhase.BACKOFF, Retried): ReplicaPhase.PLACED,
    (ReplicaPhase.BACKOFF, NodeLeft): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.BACKOFF, Dismissed): ReplicaPhase.STOPPED,
    (ReplicaPhase.FAILED, RestartAsked): ReplicaPhase.SUBMITTED,
    (ReplicaPhase.FAILED, Dismissed): ReplicaPhase.STOPPED,
}

LIVE: Final = frozenset(
    {
        ReplicaPhase.STARTING,
        ReplicaPhase.HEALTHY,
        ReplicaPhase.UNHEALTHY,
        ReplicaPhase.DRAINING,
        ReplicaPhase.KILLED,
    }
)
"""Phases with a live instance."""

P = TypeVar("P", JobPhase, ReplicaPhase)


def advance(table: Mapping[tuple[P, type], P], phase: P, trigger: type, subject: str) -> P:
    """The phase after ``trigger``; :class:`IllegalEvent` naming the subject where there is none."""
    try:
        return table[phase, trigger]
    except KeyError:
        raise IllegalEvent(f"{subject}: {trigger.__name__} cannot happen while {phase.value}") from None
