"""What happens to jobs, and what is to be done: facts in the past tense, imperatives; see :mod:`sage_core.jobs`."""

from __future__ import annotations

import msgspec

from sage_core.cluster import Job, Needs, Node


class _Event(msgspec.Struct, frozen=True, tag=True):
    pass


class Submitted(_Event, frozen=True):
    """A job is to run. Its name must be free: never used, or that of a job that has stopped."""

    job: Job


class Cancelled(_Event, frozen=True):
    """The job is to end: its instances drain."""

    job: str


class Paused(_Event, frozen=True):
    """Its instances are to end and its places to be given back, until it is resumed."""

    job: str


class Resumed(_Event, frozen=True):
    """A paused job is to run again."""

    job: str


class Scaled(_Event, frozen=True):
    """The job is to have so many replicas, 1 or more."""

    job: str
    replicas: int


class RestartAsked(_Event, frozen=True):
    """Each instance is to be replaced, one at a time; replicas that had failed get a new chance."""

    job: str


class InstanceHealthy(_Event, frozen=True):
    """The instance answers."""

    instance: int


class InstanceUnhealthy(_Event, frozen=True):
    """The instance runs and does not answer as it should."""

    instance: int
    reason: str


class InstanceExited(_Event, frozen=True):
    """The instance is gone: it ended, was killed, could not be started, or is not known to the actuator."""

    instance: int
    reason: str


class NodeJoined(_Event, frozen=True):
    """A node can be used."""

    node: Node


class NodeLeft(_Event, frozen=True):
    """A node cannot be used any more, and what ran there is gone."""

    node: str


JobEvent = (
    Submitted
    | Cancelled
    | Paused
    | Resumed
    | Scaled
    | RestartAsked
    | InstanceHealthy
    | InstanceUnhealthy
    | InstanceExited
    | NodeJoined
    | NodeLeft
)


class Start(msgspec.Struct, frozen=True, tag=True):
    """Start a process for the job on that node. An instance is one life: a restart is another instance.

    gpus: by their numbers on the node; empty: it runs on CPUs. needs: the alternative that was chosen. The answer is
    InstanceHealthy in time, or InstanceExited, also where it cannot be started at all.
    """

    instance: int
    job: str
    node: str
    gpus: tuple[int, ...]
    needs: Needs


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Let it finish what it has, take no more, and exit. What has not after ``grace_ns`` gets a Kill from the manager."""

    instance: int
    node: str
    grace_ns: int


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End it at once. Repeated until InstanceExited comes, which is also the answer for one that is not known."""

    instance: int
    node: str


JobAction = Start | Stop | Kill
