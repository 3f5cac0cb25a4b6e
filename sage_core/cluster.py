"""The words of a cluster: its nodes, and the jobs that are to run on them.

A job is a service that keeps running (an LLM engine, an embedding engine, an operator), so many replicas of it. What a
replica needs may be stated as alternatives: an embedding model runs on a GPU or on CPUs, whichever is to be had.

Sizes are what people write (CPUs, GiB); :class:`sage_core.capacity.Capacity` counts in whole units, so that sums are exact.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec

Service = Literal["llm", "embedding", "operator"]
Runtime = Literal["local", "ray"]
Strategy = Literal["pack", "spread", "cost", "cpu_offload"]

Amount = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Replicas = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]


class _Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Gpu(_Word, frozen=True):
    """``count`` equal GPUs of a node. type: a device of ``sage_sim/hardware.yaml``, or any other name. memory_gib: of each."""

    type: str
    memory_gib: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    count: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1


class Node(_Word, frozen=True):
    """One machine. GPUs are numbered from 0 in the order of ``gpus``. price_per_h: USD while it is used; None: not known."""

    name: Name
    cpus: Amount
    memory_gib: Amount
    gpus: tuple[Gpu, ...] = ()
    price_per_h: Amount | None = None
    labels: dict[str, str] = {}


class Needs(_Word, frozen=True):
    """What one replica takes of one node.

    gpus: so many GPUs of one type. gpu_memory_gib: of each of them; engines share a GPU by memory; 0: the GPU to itself.
    gpu_type: None is any. labels: the node must have them. profile: of the job so placed; None: the job's own.
    """

    cpus: Amount
    memory_gib: Amount
    gpus: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    gpu_memory_gib: Amount = 0.0
    gpu_type: str | None = None
    labels: dict[str, str] = {}
    profile: str | None = None

    def __post_init__(self) -> None:
        if not self.gpus and (self.gpu_memory_gib or self.gpu_type is not None):
            raise ValueError("gpu_memory_gib and gpu_type mean nothing without gpus; set gpus: 1 or more")

    @property
    def size(self) -> tuple[float, ...]:
        """Larger comes first in a plan: GPUs, memory of each (a GPU to itself is the most), memory, CPUs."""
        gpu_memory = math.inf if self.gpus and not self.gpu_memory_gib else self.gpu_memory_gib
        return self.gpus, gpu_memory, self.memory_gib, self.cpus


class Job(_Word, frozen=True):
    """A service and how many replicas of it.

    needs: of one replica; several are alternatives, the preferred one first. anti_affinity: no two replicas on one node.
    apart_from: jobs that may not be on a node with it, whichever of the two came first. profile: a calibrated profile, by
    which the simulator and an emulated engine know its times. options: the engine's own. priority: lower is placed first.
    """

    name: Name
    service: Service
    model: str
    needs: Needs | tuple[Needs, ...]
    replicas: Replicas = 1
    anti_affinity: bool = False
    apart_from: tuple[str, ...] = ()
    profile: str | None = None
    options: dict[str, Any] = {}
    priority: int = 0

    def __post_init__(self) -> None:
        if self.needs == ():
            raise ValueError("needs: expected at least one alternative, got an empty list")

    @property
    def alternatives(self) -> tuple[Needs, ...]:
        """``needs``, always several."""
        return self.needs if isinstance(self.needs, tuple) else (self.needs,)

    def profile_by(self, needs: Needs) -> str | None:
        """The calibrated profile of a replica that was given ``needs``, which is one of its alternatives."""
        return needs.profile or self.profile


class Cluster(_Word, frozen=True):
    """Nodes and jobs. runtime: what starts the jobs, processes on this machine or Ray. strategy: how nodes are chosen.
    name: of the cluster, where it is not to be called as its file.
    """

    nodes: tuple[Node, ...]
    jobs: tuple[Job, ...] = ()
    runtime: Runtime = "local"
    strategy: Strategy = "pack"
    name: Name | None = None


def placing_order(job: Job) -> tuple[Any, ...]:
    """Sort key: priority, then the largest first, then the name."""
    return job.priority, tuple(-amount for amount in job.alternatives[0].size), job.name
