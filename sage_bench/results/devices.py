"""What a manifest says of the devices of a run and of what their engines did: facts that energy is computed from."""

from __future__ import annotations

from collections.abc import Mapping

from sage_bench.config import DeviceConfig, RunConfig
from sage_bench.results.manifest import DeviceFact, PowerFact, UsageFact
from sage_sim import hardware
from sage_sim.engine import ReplicaUsage
from sage_sim.profile import Profile


def device_facts(config: RunConfig, profiles: Mapping[str, Profile]) -> tuple[DeviceFact, ...]:
    """The devices of the cluster, counted out, in the order of their numbers. profiles: by the names in ``config``."""
    groups = [group for group in config.cluster.devices for _ in range(group.count)]
    return tuple(_device(number, group, profiles) for number, group in enumerate(groups))


def devices_of(group: DeviceConfig, profiles: Mapping[str, Profile]) -> int:
    """Devices that one of the group spans: tensor and pipeline parallelism, prefill and decode engines."""
    if (apart := group.disaggregated) is not None:
        prefill, decode = (profiles[llm.profile].hardware.count for llm in group.llms)
        return apart.prefill_engines * prefill + apart.decode_engines * decode
    count = max((profiles[engine.profile].hardware.count for engine in group.engines), default=1)
    return count * (1 if group.llm is None else group.llm.pipeline_parallel)


def listed_price(group: DeviceConfig, profiles: Mapping[str, Profile]) -> float | None:
    """USD per hour by ``sage_sim/hardware.yaml``; None where its devices are unlisted, or of several kinds."""
    names = {profiles[engine.profile].hardware.device for engine in group.engines}
    found = hardware.facts(next(iter(names))) if len(names) == 1 else None
    return None if found is None or found.price is None else found.price.usd_per_hour * devices_of(group, profiles)


def price_of(group: DeviceConfig, profiles: Mapping[str, Profile]) -> float | None:
    """USD per hour of one of the group: as configured, else as listed."""
    return listed_price(group, profiles) if group.price_per_h is None else group.price_per_h


def usage_fact(usage: ReplicaUsage | None) -> UsageFact | None:
    """What a simulated engine says of itself; None stays None."""
    if usage is None:
        return None
    return UsageFact(
        usage.busy_ns,
        usage.iterations,
        usage.preemptions,
        usage.prefill_busy_ns,
        prefix_tokens=usage.prefix_queries,
        prefix_hit_tokens=usage.prefix_hits,
        itl_mean_ns=usage.itl_sum_ns / usage.itl_count if usage.itl_count else None,
        batch_tokens=usage.tokens,
        padded_tokens=usage.padded_tokens,
    )


def _device(number: int, group: DeviceConfig, profiles: Mapping[str, Profile]) -> DeviceFact:
    of = [profiles[engine.profile].hardware for engine in group.engines]
    names = sorted({each.device for each in of})
    count = devices_of(group, profiles)
    busy = max((each.count for each in of), default=1)
    if group.disaggregated is not None and len({each.count for each in of}) > 1:
        busy = 0
    power, why = _power(names, count, busy)
    return DeviceFact(
        number, group.node, names[0] if len(names) == 1 else None, count, power, why, price_of(group, profiles)
    )


def _power(names: list[str], count: int, busy: int) -> tuple[PowerFact | None, str | None]:
    """The power of ``count`` devices, of which ``busy`` work on one iteration, or why it is not known."""
    if not names:
        return None, "CPU workers have no power model"
    if len(names) > 1:
        return None, f"its profiles are of different devices ({', '.join(names)})"
    facts = hardware.facts(names[0])
    if facts is None:
        return None, f"sage_sim/hardware.yaml has no device {names[0]}"
    idle_w, prefill_w, decode_w = facts.idle_w, facts.prefill_w, facts.decode_w
    if facts.power is None or idle_w is None or prefill_w is None or decode_w is None:
        return None, f"the power of {names[0]} is not known (sage_sim/hardware.yaml)"
    if not busy:
        return None, "its prefill and decode engines run on different numbers of devices"
    idle = count * idle_w
    watts = (idle, idle + busy * (prefill_w - idle_w), idle + busy * (decode_w - idle_w))
    return PowerFact(*watts, measured=facts.power.measured, source=facts.power.source), None
