"""Time and identity: the integer vocabulary every layer shares.

Time is an integer count of nanoseconds since the start of the run. Integers compare and add exactly, so a log replays
to the bit; a float clock would not. A real driver subtracts its start instant; a simulation starts at zero.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NewType

Nanos = NewType("Nanos", int)
"""Nanoseconds since run start (an instant) or a span of nanoseconds; the name of the variable says which."""

RequestId = NewType("RequestId", int)
"""Issued by the load: dense, from zero, never reused."""

TaskId = NewType("TaskId", int)
"""Issued by the control plane: ``request << TASK_BITS | n`` for the n-th task made for that request."""

ReplicaId = NewType("ReplicaId", int)
"""Issued by the driver; unique within a run, never reused after the replica left."""

NEVER: Final = Nanos(2**63 - 1)
"""The instant that does not come: 'no deadline', 'no wakeup'. Fits int64, so it lives in columns."""

MICROSECOND: Final = 1_000
MILLISECOND: Final = 1_000_000
SECOND: Final = 1_000_000_000

SECONDS_MAX: Final = 1e9
"""Longest span a user may set, in seconds (31 years): a few of them together still fit int64 nanoseconds."""

TASK_BITS: Final = 16
"""Tasks a request may create over its life, retries included: 2**16."""


class RequestKind(IntEnum):
    """What the client asked for. The classifier decides it; metrics are grouped by it."""

    LLM_CHAT = 0
    LLM_GENERATE = 1
    EMBEDDING = 2


class PoolKind(IntEnum):
    """How the replicas of a pool take work."""

    LLM = 0  # continuous batching: a task joins the running batch at the next iteration
    EMBEDDING = 1  # one batch at a time, formed when the engine is free
    OPERATOR = 2  # a CPU function: retrieve, rerank, tool


def task_id(request: int, n: int) -> TaskId:
    """Id of the ``n``-th task of ``request``."""
    return TaskId(request << TASK_BITS | n)


def request_of(task: int) -> RequestId:
    """The request that a task belongs to."""
    return RequestId(task >> TASK_BITS)


def seconds(value: float) -> Nanos:
    """Nearest whole nanosecond to ``value`` seconds."""
    return Nanos(round(value * SECOND))
