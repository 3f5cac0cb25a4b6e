"""What a job manager says of its jobs."""

from __future__ import annotations

from enum import Enum

import msgspec

from sage_core.cluster import Job
from sage_core.job_lifecycle import ReplicaPhase
from sage_core.units import Nanos


class JobState(Enum):
    """A job as a whole: of its replicas, the worst."""

    SUBMITTED = "submitted"  # a replica has no place
    PLACED = "placed"  # a replica waits for its turn to start
    STARTING = "starting"  # a replica starts, or is being replaced
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"  # a replica is unhealthy, crashed, or failed
    DRAINING = "draining"  # paused or cancelled, and instances are left
    PAUSED = "paused"
    FAILED = "failed"  # every replica failed
    STOPPED = "stopped"  # cancelled, and nothing is left


class InstanceStatus(msgspec.Struct, frozen=True):
    """A replica and its instance. id: None where none is live. reason: why it is not healthy. retry_at: while in backoff."""

    replica: int
    id: int | None
    node: str | None
    gpus: tuple[int, ...]
    state: ReplicaPhase
    restarts: int
    reason: str
    retry_at: Nanos


class JobStatus(msgspec.Struct, frozen=True):
    """A job, the reason for its state where it is not as wanted, and its replicas by number."""

    job: Job
    state: JobState
    reason: str
    instances: tuple[InstanceStatus, ...]
