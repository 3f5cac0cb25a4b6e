"""Energy of a run, from what its engines did and what its devices draw; both are facts of the manifest.

A device draws its idle power while it is up, and more while an engine on it works::

    J = idle W * s up + (prefill W - idle W) * s prefilling + (decode W - idle W) * s decoding

but never more than its highest power all the time, since engines may share it. A device that has left (crash, drain)
draws nothing until it is back. Hosts, network and cooling are not in it. What one device does not tell makes the whole
unknown: a sum that leaves a device out would flatter it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sage_bench.results.manifest import DeviceFact, Manifest, PowerFact, ReplicaFact
from sage_core.units import SECOND


class Energy(NamedTuple):
    """joules: of all devices over the whole run, NaN if not known; then ``unknown`` says why, a reason each."""

    joules: float
    unknown: tuple[str, ...]


def energy(manifest: Manifest) -> Energy:
    """Energy of the accelerators from the start of the run to its last instant, warm-up included."""
    if not manifest.devices:
        return Energy(math.nan, ("the manifest does not say what the devices are",))
    lives: dict[tuple[int, int], list[ReplicaFact]] = {}
    for replica in manifest.replicas:
        lives.setdefault((replica.device, replica.joined_ns), []).append(replica)
    devices = {each.device: each for each in manifest.devices}
    joules, unknown = 0.0, []
    for (number, _), replicas in lives.items():
        device = devices[number]
        if why := _unknown(device, replicas):
            unknown.append(why)
        else:
            assert device.power is not None
            joules += _joules(device.power, replicas, manifest.duration_ns)
    return Energy(math.nan if unknown else joules, tuple(dict.fromkeys(unknown)))


def _unknown(device: DeviceFact, replicas: list[ReplicaFact]) -> str | None:
    """Why the energy of a life of ``device`` is not known; None if it is."""
    if device.power is None:
        return f"node {device.node}: {device.no_power}"
    if any(each.usage is None for each in replicas):
        return f"node {device.node}: the run did not record what its engines did"
    if any(each.usage is not None and each.usage.prefill_ns is None for each in replicas):
        return f"node {device.node}: its engine does not tell prefill from decode time"
    return None


def _joules(power: PowerFact, replicas: list[ReplicaFact], end_ns: int) -> float:
    """Energy of one life of a device: ``replicas`` are those on it, and join and leave together."""
    first = replicas[0]
    up_s = ((end_ns if first.left_ns is None else first.left_ns) - first.joined_ns) / SECOND
    busy_s = sum(each.usage.busy_ns for each in replicas if each.usage is not None) / SECOND
    prefill_s = sum(each.usage.prefill_ns or 0 for each in replicas if each.usage is not None) / SECOND
    extra = (power.prefill_w - power.idle_w) * prefill_s + (power.decode_w - power.idle_w) * (busy_s - prefill_s)
    return min(power.idle_w * up_s + extra, max(power.prefill_w, power.decode_w) * up_s)
