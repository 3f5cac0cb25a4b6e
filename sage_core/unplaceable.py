"""Why a replica has no place: of each node, what it has too little of. For people, so not on the path of placing."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

import msgspec

from sage_core.capacity import MIB_PER_GIB, MILLI, Capacity
from sage_core.cluster import Job, Needs

_SHOWN_MAX: Final = 4
"""Reasons, and nodes with one reason, in a line of text."""


class Unplaceable(msgspec.Struct, frozen=True):
    """No node has room: why not, of each by name."""

    reasons: dict[str, str]

    def __str__(self) -> str:
        """The reasons, nodes with the same one together; the first few."""
        nodes_of: dict[str, list[str]] = {}
        for node, reason in self.reasons.items():
            nodes_of.setdefault(reason, []).append(node)
        parts = [f"{_some(nodes)}: {reason}" for reason, nodes in nodes_of.items()]
        more = f"; and {len(parts) - _SHOWN_MAX} other reasons" if len(parts) > _SHOWN_MAX else ""
        return "; ".join(parts[:_SHOWN_MAX]) + more if parts else "the cluster has no nodes"


def why_not(capacity: Capacity, job: Job) -> Unplaceable:
    """Why each node cannot take a replica of ``job`` now; of alternatives, each."""
    apart = capacity.apart(job)
    having_gpus = [{*capacity.group_node[capacity.groups(needs)].tolist()} for needs in job.alternatives]
    reasons = {}
    for i, node in enumerate(capacity.nodes):
        if i not in apart:
            lacking = (_lacking(capacity, i, *each) for each in zip(job.alternatives, having_gpus, strict=True))
            reasons[node.name] = ", or ".join(lacking)
        elif job.anti_affinity and i in capacity.replicas_of(job.name):
            reasons[node.name] = "holds a replica of it"
        else:
            reasons[node.name] = "holds a job that it is to be apart from"
    return Unplaceable(reasons)


def told(needs: Needs) -> str:
    """Needs in words: ``2 a100_sxm GPUs with 60 GiB free, 8 CPUs, 64 GiB``."""
    parts = []
    if needs.gpus:
        kind = f"{needs.gpu_type} " if needs.gpu_type else ""
        each = f"with {needs.gpu_memory_gib:g} GiB free" if needs.gpu_memory_gib else "to itself"
        parts.append(f"{needs.gpus} {kind}GPU{'s' if needs.gpus > 1 else ''} {each}")
    parts += [f"{needs.cpus:g} CPU{'' if needs.cpus == 1 else 's'}", f"{needs.memory_gib:g} GiB"]
    parts += [f"label {key}={value}" for key, value in sorted(needs.labels.items())]
    return ", ".join(parts)


def _lacking(capacity: Capacity, i: int, needs: Needs, having_gpus: Container[int]) -> str:
    """What node ``i`` has too little of."""
    labels = capacity.nodes[i].labels
    wrong = [
        f"label {key} is {labels.get(key, 'missing')}"
        for key, value in sorted(needs.labels.items())
        if labels.get(key) != value
    ]
    cpus_free, memory_free = int(capacity.cpus_free[i]), int(capacity.memory_free[i])
    if cpus_free < round(needs.cpus * MILLI):
        wrong.append(f"{cpus_free / MILLI:g} of {needs.cpus:g} CPUs free")
    if memory_free < round(needs.memory_gib * MIB_PER_GIB):
        wrong.append(f"{memory_free / MIB_PER_GIB:g} of {needs.memory_gib:g} GiB free")
    if needs.gpus and i not in having_gpus:
        wrong.append(_gpus(capacity, i))
    return " and ".join(wrong) or "it fits"


def _gpus(capacity: Capacity, i: int) -> str:
    offered = []
    at = int(capacity.gpu_start[i])
    for gpu in capacity.nodes[i].gpus:
        free = [each / MIB_PER_GIB for each in capacity.gpu_free[at : at + gpu.count].tolist()]
        least, most = round(min(free), 1), round(max(free), 1)
        room = f"{most:g}" if least == most else f"{least:g} to {most:g}"
        offered.append(f"{gpu.count} {gpu.type} with {room} of {gpu.memory_gib:g} GiB free")
        at += gpu.count
    return f"GPUs: {', '.join(offered) or 'none'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_MAX]) + (f" and {len(names) - _SHOWN_MAX} more" if len(names) > _SHOWN_MAX else "")
