"""What a cluster is doing, as plain data: shown by ``sage cluster status``, sent by a controller, kept in a file."""

from __future__ import annotations

import os

import msgspec

from sage_core.job_lifecycle import ReplicaPhase
from sage_core.jobs import JobState


class EngineStatus(msgspec.Struct, frozen=True):
    """One replica of a job. name: of its live engine, as the gateway knows it; "" where there is none. gpus: of its node.
    url: "" until it is healthy. restarts: so far. reason: why it is not healthy."""

    job: str
    replica: int
    name: str
    node: str | None
    gpus: tuple[int, ...]
    state: ReplicaPhase
    url: str
    restarts: int
    reason: str


class JobLine(msgspec.Struct, frozen=True):
    """One job. replicas: wanted."""

    name: str
    service: str
    model: str
    state: JobState
    replicas: int
    reason: str


class ClusterStatus(msgspec.Struct, frozen=True):
    """Of one cluster that is up. pid: of its controller. gateway: its URL, None where there is none."""

    name: str
    runtime: str
    pid: int
    gateway: str | None
    nodes_lost: tuple[str, ...]
    jobs: tuple[JobLine, ...]
    engines: tuple[EngineStatus, ...]

    @classmethod
    def starting(cls, name: str, runtime: str) -> ClusterStatus:
        """Of one that has no jobs yet; its controller is this process."""
        return cls(name, runtime, os.getpid(), None, (), (), ())

    @property
    def healthy(self) -> bool:
        """Every replica of every job is, and there is one."""
        return bool(self.jobs) and all(job.state is JobState.HEALTHY for job in self.jobs)

    @property
    def over(self) -> bool:
        """Nothing of any job runs."""
        live = {ReplicaPhase.STARTING, ReplicaPhase.HEALTHY, ReplicaPhase.UNHEALTHY, ReplicaPhase.DRAINING}
        return not any(each.state in live or each.state is ReplicaPhase.KILLED for each in self.engines)

    @property
    def failures(self) -> list[str]:
        """One line for each replica that is given up."""
        return [
            f"{each.job}[{each.replica}]: {each.reason}" for each in self.engines if each.state is ReplicaPhase.FAILED
        ]
