"""Where every replica of every job would go, by a strategy, on an empty cluster: a pure function."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sage_core.capacity import Capacity, Placement
from sage_core.cluster import Cluster, Job, Node, Strategy, placing_order
from sage_core.node_selector import NodeSelector
from sage_core.unplaceable import Unplaceable, why_not


class Placed(msgspec.Struct, frozen=True):
    """Replica number ``replica`` of a job has a place."""

    job: str
    replica: int
    place: Placement


class Unplaced(msgspec.Struct, frozen=True):
    """The job's replicas from number ``replica`` on have none: what one can no more get, the next cannot either."""

    job: str
    replica: int
    why: Unplaceable


class Plan(msgspec.Struct, frozen=True):
    """Places in the order in which they were taken, and who got none."""

    strategy: Strategy
    placed: tuple[Placed, ...]
    unplaced: tuple[Unplaced, ...]


def plan(cluster: Cluster, strategy: Strategy | None = None) -> Plan:
    """Place the jobs by ``strategy`` (None: the cluster's own): priority first, then the largest, then by name.

    A job that finds no room for one of its replicas keeps the places of the others, and the jobs after it go on.
    """
    selector = NodeSelector(strategy or cluster.strategy)
    capacity = Capacity(cluster.nodes)
    placed, unplaced = [], []
    for job in sorted(cluster.jobs, key=placing_order):
        for replica in range(job.replicas):
            place = selector.place(capacity, job)
            if place is None:
                unplaced.append(Unplaced(job.name, replica, why_not(capacity, job)))
                break
            capacity.take(job, place)
            placed.append(Placed(job.name, replica, place))
    return Plan(selector.strategy, tuple(placed), tuple(unplaced))


def fits_nowhere(nodes: Iterable[Node], job: Job) -> Unplaceable | None:
    """Why no node could run even one replica of ``job`` with nothing else on it; None where one could."""
    capacity = Capacity(nodes)
    return why_not(capacity, job) if NodeSelector().place(capacity, job) is None else None
