"""What is free on each node: a ledger that cannot be overdrawn.

Amounts are whole: thousandths of a CPU, MiB. Sums are then exact, in whatever order places are taken and given back. Nodes
are columns in the order of their names, so that "the first of equals" is the least name, and a question about all nodes
is a few operations on arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sage_core.cluster import Job, Needs, Node
from sage_core.errors import ConfigError, InvariantViolation

MILLI: Final = 1000
MIB_PER_GIB: Final = 1024

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
K = TypeVar("K")


class Placement(msgspec.Struct, frozen=True):
    """A place for one replica: GPUs by their numbers on the node, the alternative of its needs, and why there."""

    node: str
    gpus: tuple[int, ...]
    needs: Needs
    why: str = ""


class Capacity:
    """Free CPUs, memory and memory of each GPU of ``nodes``, and who is where.

    ConfigError: two nodes have one name. Arrays are of shape (nodes,) and those of GPUs of shape (GPUs,), where GPUs of one
    node are neighbours; ``group`` numbers the entries of ``Node.gpus``, since GPUs that work together are of one kind.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = tuple(sorted(nodes, key=lambda node: node.name))
        self.index = {node.name: i for i, node in enumerate(self.nodes)}
        if len(self.index) < len(self.nodes):
            twice = next(name for name, count in Counter(node.name for node in self.nodes).items() if count > 1)
            raise ConfigError(f"node {twice!r}: two nodes have that name; rename one")
        self.cpus: Ints = _whole([node.cpus for node in self.nodes], MILLI)
        self.memory: Ints = _whole([node.memory_gib for node in self.nodes], MIB_PER_GIB)
        groups = [(i, gpu) for i, node in enumerate(self.nodes) for gpu in node.gpus]
        self.group_node: Ints = np.array([i for i, _ in groups], np.int64)
        self.group_types = tuple(gpu.type for _, gpu in groups)
        counts = [gpu.count for _, gpu in groups]
        self.group: Ints = np.repeat(np.arange(len(groups)), counts)
        self.gpu_memory: Ints = np.repeat(np.array([_of_gpu(gpu.memory_gib) for _, gpu in groups], np.int64), counts)
        # The GPUs of node i are gpu_start[i] up to, without, gpu_start[i + 1].
        owners = self.group_node[self.group]
        self.gpu_start: Ints = np.searchsorted(owners, np.arange(len(self.nodes) + 1))
        self.gpu_total: Ints = _sums(owners, self.gpu_memory, len(self.nodes))
        self.gpu_count: Ints = np.diff(self.gpu_start)
        self.price = np.array([np.inf if n.price_per_h is None else n.price_per_h for n in self.nodes], np.float64)
        self.cpus_free = self.cpus.copy()
        self.memory_free = self.memory.copy()
        self.gpu_free = self.gpu_memory.copy()
        self.gpu_total_free = self.gpu_total.copy()
        self.replicas: Ints = np.zeros(len(self.nodes), np.int64)
        self._on: dict[str, Counter[int]] = {}  # job: nodes where it is
        self._shunned: dict[str, Counter[str]] = {}  # job: jobs with a place that want to be apart from it
        self._labelled: dict[tuple[tuple[str, str], ...], Mask] = {}
        self._typed: dict[str, Mask] = {}

    def take(self, job: Job, place: Placement) -> None:
        """Book a place. InvariantViolation where the node has no such room: places come from :meth:`fitting`."""
        self._move(job, place, 1)
        node, gpus = self.index[place.node], self._gpus(place)
        if (
            min(self.cpus_free[node], self.memory_free[node]) < 0
            or bool((self.gpu_free[gpus] < 0).any())
            or len({*self.group[gpus].tolist()}) > 1
        ):
            self._move(job, place, -1)
            raise InvariantViolation(f"job {job.name!r} on node {place.node!r}: more than is free was booked")

    def release(self, job: Job, place: Placement) -> None:
        """Give a place back."""
        self._move(job, place, -1)

    def fitting(self, job: Job, needs: Needs) -> Ints:
        """The nodes, rising, on which a replica of ``job`` can run now, with these of its needs."""
        fits = self.cpus_free >= _amount(needs.cpus, MILLI)
        fits &= self.memory_free >= _amount(needs.memory_gib, MIB_PER_GIB)
        if needs.labels:
            fits &= self.labelled(needs)
        if needs.gpus:
            with_gpus = np.zeros(len(self.nodes), np.bool_)
            with_gpus[self.group_node[self.groups(needs)]] = True
            fits &= with_gpus
        apart = self.apart(job)
        if apart:
            fits[list(apart)] = False
        return np.flatnonzero(fits)

    def gpus(self, node: int, needs: Needs) -> tuple[int, ...]:
        """The GPUs to take on a node that fits: of its first kind that has enough, those with the least room to spare."""
        if not needs.gpus:
            return ()
        start, end = self.gpu_start[node], self.gpu_start[node + 1]
        groups = self.groups(needs)
        group = groups[self.group_node[groups] == node][0]
        usable = np.flatnonzero(self._usable(needs)[start:end] & (self.group[start:end] == group))
        least = usable[np.argsort(self.gpu_free[start:end][usable], kind="stable")]
        return tuple(sorted(int(gpu) for gpu in least[: needs.gpus]))

    def replicas_of(self, job: str) -> Counter[int]:
        """How many replicas of the job each node has."""
        return self._on.get(job, Counter())

    def apart(self, job: Job) -> set[int]:
        """Nodes that hold what the job may not run beside."""
        others = [*job.apart_from, *self._shunned.get(job.name, ()), *([job.name] if job.anti_affinity else [])]
        return {node for other in others for node in self.replicas_of(other)}

    def labelled(self, needs: Needs) -> Mask:
        """Which nodes have the labels."""
        key = tuple(sorted(needs.labels.items()))
        if key not in self._labelled:
            self._labelled[key] = np.array(
                [node.labels.items() >= needs.labels.items() for node in self.nodes], np.bool_
            )
        return self._labelled[key]

    def groups(self, needs: Needs) -> Ints:
        """The groups with GPUs enough."""
        counts = np.bincount(self.group[self._usable(needs)], minlength=len(self.group_types))
        groups: Ints = np.flatnonzero(counts >= needs.gpus)
        return groups

    def _usable(self, needs: Needs) -> Mask:
        """Which GPUs one of ``needs.gpus`` could be."""
        if needs.gpu_memory_gib:
            usable: Mask = self.gpu_free >= _of_gpu(needs.gpu_memory_gib)
        else:
            usable = self.gpu_free == self.gpu_memory
        kind = needs.gpu_type
        if kind is not None:
            if kind not in self._typed:
                self._typed[kind] = np.array([each == kind for each in self.group_types], np.bool_)[self.group]
            usable = usable & self._typed[kind]
        return usable

    def _gpus(self, place: Placement) -> Ints:
        return np.array(place.gpus, np.int64) + int(self.gpu_start[self.index[place.node]])

    def _move(self, job: Job, place: Placement, sign: int) -> None:
        node, gpus, needs = self.index[place.node], self._gpus(place), place.needs
        self.cpus_free[node] -= sign * _amount(needs.cpus, MILLI)
        self.memory_free[node] -= sign * _amount(needs.memory_gib, MIB_PER_GIB)
        if gpus.size:
            each = _of_gpu(needs.gpu_memory_gib) if needs.gpu_memory_gib else self.gpu_memory[gpus]
            self.gpu_free[gpus] -= sign * each
            self.gpu_total_free[node] -= sign * int(np.sum(np.broadcast_to(each, gpus.shape)))
        self.replicas[node] += sign
        _count(self._on.setdefault(job.name, Counter()), node, sign)
        for other in job.apart_from:
            _count(self._shunned.setdefault(other, Counter()), job.name, sign)


def _count(counter: Counter[K], key: K, sign: int) -> None:
    counter[key] += sign
    if not counter[key]:
        del counter[key]


def _sums(owners: Ints, amounts: Ints, count: int) -> Ints:
    sums = np.zeros(count, np.int64)
    np.add.at(sums, owners, amounts)
    return sums


def _whole(amounts: list[float], unit: int) -> Ints:
    return np.array([_amount(each, unit) for each in amounts], np.int64)


def _of_gpu(gib: float) -> int:
    """MiB, and no less than one: who has a GPU to itself is told from the others by what they take."""
    return max(_amount(gib, MIB_PER_GIB), 1)


def _amount(amount: float, unit: int) -> int:
    return round(amount * unit)
