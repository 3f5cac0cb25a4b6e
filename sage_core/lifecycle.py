"""The life of a request, a task and a replica, as tables.

Two rules: everything that affects a transition is in this file, and what is not in a table cannot happen. An illegal
transition is a missing key, raised in one place as :class:`IllegalEvent`. The diagrams in ARCHITECTURE.md are drawn
from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, TypeVar

from sage_core import commands as c
from sage_core import events as e
from sage_core.errors import IllegalEvent


class RequestState(Enum):
    """A request is live from arrival to exactly one of four ends."""

    LIVE = "live"
    RESPONDED = "responded"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    FAILED = "failed"


class TaskState(Enum):
    """A task is queued once, dispatched at most once, and ends once; another attempt is another task."""

    QUEUED = "queued"
    DISPATCHED = "dispatched"
    STREAMING = "streaming"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"


class ReplicaState(Enum):
    """A replica serves from joining to leaving, perhaps draining in between."""

    SERVING = "serving"
    DRAINING = "draining"
    LEFT = "left"


REQUEST: Final[Mapping[tuple[RequestState, type], RequestState]] = {
    (RequestState.LIVE, c.Respond): RequestState.RESPONDED,
    (RequestState.LIVE, c.Reject): RequestState.REJECTED,
    (RequestState.LIVE, c.Fail): RequestState.FAILED,
    (RequestState.LIVE, e.RequestCancelled): RequestState.CANCELLED,
}

TASK: Final[Mapping[tuple[TaskState, type], TaskState]] = {
    (TaskState.QUEUED, c.Dispatch): TaskState.DISPATCHED,
    (TaskState.QUEUED, e.RequestCancelled): TaskState.CANCELLED,
    (TaskState.QUEUED, c.Reject): TaskState.CANCELLED,
    (TaskState.QUEUED, c.Fail): TaskState.CANCELLED,
    (TaskState.DISPATCHED, e.TokensProduced): TaskState.STREAMING,
    (TaskState.DISPATCHED, e.TaskFinished): TaskState.FINISHED,
    (TaskState.DISPATCHED, e.TaskFailed): TaskState.FAILED,
    (TaskState.DISPATCHED, e.ReplicaLeft): TaskState.LOST,
    (TaskState.DISPATCHED, c.Cancel): TaskState.CANCELLED,
    (TaskState.STREAMING, e.TokensProduced): TaskState.STREAMING,
    (TaskState.STREAMING, e.TaskFinished): TaskState.FINISHED,
    (TaskState.STREAMING, e.TaskFailed): TaskState.FAILED,
    (TaskState.STREAMING, e.ReplicaLeft): TaskState.LOST,
    (TaskState.STREAMING, c.Cancel): TaskState.CANCELLED,
}

REPLICA: Final[Mapping[tuple[ReplicaState, type], ReplicaState]] = {
    (ReplicaState.SERVING, e.ReplicaReported): ReplicaState.SERVING,
    (ReplicaState.SERVING, e.ReplicaDraining): ReplicaState.DRAINING,
    (ReplicaState.SERVING, e.ReplicaLeft): ReplicaState.LEFT,
    (ReplicaState.DRAINING, e.ReplicaReported): ReplicaState.DRAINING,
    (ReplicaState.DRAINING, e.ReplicaDraining): ReplicaState.DRAINING,
    (ReplicaState.DRAINING, e.ReplicaLeft): ReplicaState.LEFT,
}

S = TypeVar("S", RequestState, TaskState, ReplicaState)


def advance(table: Mapping[tuple[S, type], S], state: S, trigger: type, subject: str, number: int) -> S:
    """The state after ``trigger``; :class:`IllegalEvent` naming the subject (task 7) when there is none."""
    try:
        return table[state, trigger]
    except KeyError:
        raise IllegalEvent(f"{subject} {number}: {trigger.__name__} cannot happen while {state.value}") from None
