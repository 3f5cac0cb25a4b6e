"""Which node a replica is put on: a pure function of what is free and of the job, by one of four strategies.

``pack``: nodes in use first, and of those the one that it leaves least of. ``spread``: the node with the fewest replicas of
the job, then the least used one. ``cost``: the least added price; a node that idles costs its price once it is used.
``cpu_offload``: embedding jobs take CPUs where they can, on nodes without GPUs first, so that GPUs stay free for LLMs; what
else there is is packed. The last tie goes to the least name.

Of a job's alternatives the first that fits anywhere is taken; ``cost`` takes the cheapest, ``cpu_offload`` one without GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from sage_core.capacity import MIB_PER_GIB, MILLI, Capacity, Ints, Placement
from sage_core.cluster import Job, Needs, Strategy
from sage_core.errors import ConfigError

STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)

Floats = NDArray[np.float64]


class NodeSelector:
    """ConfigError: no strategy has that name."""

    def __init__(self, strategy: Strategy = "pack") -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self.strategy: Strategy = strategy

    def place(self, capacity: Capacity, job: Job) -> Placement | None:
        """Where the next replica of ``job`` goes; None: no node has room (:func:`sage_core.unplaceable.why_not`). Books
        nothing: ``capacity.take`` does."""
        found: tuple[float, int, Needs] | None = None
        for needs in self._alternatives(job):
            fitting = capacity.fitting(job, needs)
            if not fitting.size:
                continue
            node = self._choose(capacity, job, needs, fitting)
            added = _added(capacity, node) if self.strategy == "cost" else 0.0
            if found is None or added < found[0]:
                found = added, node, needs
            if not added:
                break  # the preferred one; by cost, none is cheaper
        if found is None:
            return None
        _, node, needs = found
        return Placement(
            capacity.nodes[node].name, capacity.gpus(node, needs), needs, self._why(capacity, job, needs, node)
        )

    def _alternatives(self, job: Job) -> Sequence[Needs]:
        if self.strategy == "cpu_offload" and job.service == "embedding":
            return sorted(job.alternatives, key=lambda needs: needs.gpus > 0)
        return job.alternatives

    def _choose(self, capacity: Capacity, job: Job, needs: Needs, fitting: Ints) -> int:
        """The best of the nodes that fit."""
        match self.strategy:
            case "pack":
                fitting = _least(fitting, capacity.replicas[fitting] == 0)
            case "spread":
                here = capacity.replicas_of(job.name)
                if here:
                    fitting = _least(fitting, np.array([here.get(int(node), 0) for node in fitting], np.int64))
                asked = _left(capacity, needs, fitting)[: 3 if needs.gpus else 2]
                return int(fitting[np.argmax(np.minimum.reduce(asked))])
            case "cost":
                fitting = _least(fitting, np.where(capacity.replicas[fitting] > 0, 0.0, capacity.price[fitting]))
            case "cpu_offload":
                if not needs.gpus:
                    fitting = _least(fitting, capacity.gpu_total[fitting] > 0)
                fitting = _least(fitting, capacity.replicas[fitting] == 0)
        return int(fitting[np.argmin(np.add.reduce(_left(capacity, needs, fitting)))])

    def _why(self, capacity: Capacity, job: Job, needs: Needs, node: int) -> str:
        first = not capacity.replicas[node]
        match self.strategy:
            case "pack":
                return "no node in use has room" if first else "in use already, and the fullest with room"
            case "spread":
                return f"{capacity.replicas_of(job.name).get(node, 0)} replicas of the job there, and the least used"
            case "cost":
                if not first:
                    return "adds no price: in use already"
                added = _added(capacity, node)
                return (
                    f"adds {added:.4g} USD/h" if np.isfinite(added) else "no other has room, and its price is not known"
                )
            case "cpu_offload":
                if job.service == "embedding":
                    return "its CPUs will do, GPUs stay free" if not needs.gpus else "no node has CPUs for it"
                return "no node in use has room" if first else "in use already, and the fullest with room"


def _least(nodes: Ints, key: NDArray[np.bool_] | Ints | Floats) -> Ints:
    """Those of the nodes whose key is least."""
    least: Ints = nodes[key == key.min()]
    return least


def _added(capacity: Capacity, node: int) -> float:
    """USD per hour that the cluster costs more with a replica there; infinite where the price is not known."""
    return 0.0 if capacity.replicas[node] else float(capacity.price[node])


def _left(capacity: Capacity, needs: Needs, nodes: Ints) -> list[Floats]:
    """Shares of CPUs, memory and GPU memory that are free once the replica is there; each of shape (nodes,)."""
    per_gpu = capacity.gpu_total[nodes] / np.maximum(capacity.gpu_count[nodes], 1)
    each = needs.gpu_memory_gib * MIB_PER_GIB if needs.gpu_memory_gib else per_gpu
    return [
        (capacity.cpus_free[nodes] - round(needs.cpus * MILLI)) / np.maximum(capacity.cpus[nodes], 1),
        (capacity.memory_free[nodes] - round(needs.memory_gib * MIB_PER_GIB)) / np.maximum(capacity.memory[nodes], 1),
        (capacity.gpu_total_free[nodes] - needs.gpus * each) / np.maximum(capacity.gpu_total[nodes], 1),
    ]
