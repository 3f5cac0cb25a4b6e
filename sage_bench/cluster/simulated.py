"""A plan as the configuration group ``cluster`` of ``sage run``: what would run where, simulated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import yaml

from sage_bench.config import EmbedConfig, LlmConfig
from sage_core.cluster import Cluster, Job, Service
from sage_core.errors import ConfigError
from sage_core.plan import Plan

_ENGINES: Final[Mapping[Service, tuple[str, tuple[str, ...]]]] = {
    "llm": ("llm", LlmConfig.__struct_fields__),
    "embedding": ("embed", EmbedConfig.__struct_fields__),
}
"""Of a service: its key in ``cluster.devices[]``, and the keys below that."""


class _Device(NamedTuple):
    """GPUs of a node, or CPUs of it (no GPUs), and the jobs whose replicas are on them."""

    node: str
    gpus: tuple[int, ...]
    jobs: list[tuple[Job, str | None]]  # and the profile of each, there


def simulated(cluster: Cluster, plan: Plan) -> str:
    """YAML to put into a folder and run: ``sage run --config-dir FOLDER cluster=NAME``.

    Replicas on the same GPUs are one device; a node's price is shared by its devices, by their GPUs. Jobs without a profile
    and operators are left out, and a comment says so, as it does of options that the simulator does not have. ConfigError:
    nothing is left, or engines share a GPU in a way that a simulated device cannot.
    """
    devices = _devices(cluster, plan)
    names = {job.name for device in devices for job, profile in device.jobs if _is_known(job, profile)}
    known = [job for job in cluster.jobs if job.name in names]  # as in the file: pools are by who comes first
    if not known:
        raise ConfigError(
            "plan: no job that was placed has a profile, so there is nothing to simulate; give one a profile"
        )
    pools = _pools(known)
    entries: list[dict[str, Any]] = []
    for device in devices:
        entry = _entry(device, _price(cluster, device, devices), pools)
        if entry is None:
            continue
        if entries and {**entries[-1], "count": 1} == entry:  # equal neighbours are counted, as people write them
            entries[-1]["count"] += 1
        else:
            entries.append(entry)
    group = {
        "network": {"delay_s": 0.0002, "jitter_s": 0.0},
        "report_interval_s": 1.0,
        "devices": entries,
        "faults": [],
    }
    head = [f"The plan of `sage cluster plan --strategy {plan.strategy}`, to be simulated.", *_left_out(devices)]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(group, sort_keys=False, width=120)


def _is_known(job: Job, profile: str | None) -> bool:
    return job.service in _ENGINES and profile is not None


def _devices(cluster: Cluster, plan: Plan) -> list[_Device]:
    """The devices in use, by node and GPU. ConfigError: two overlap without being the same."""
    jobs = {job.name: job for job in cluster.jobs}
    on_gpus: dict[tuple[str, tuple[int, ...]], _Device] = {}
    on_cpus = []
    owners: dict[tuple[str, int], tuple[int, ...]] = {}
    for each in plan.placed:
        node, gpus = each.place.node, each.place.gpus
        job = jobs[each.job]
        engine = job, job.profile_by(each.place.needs)
        if not gpus:
            on_cpus.append(_Device(node, gpus, [engine]))  # engines on CPUs have some of their own
            continue
        for gpu in gpus:
            if owners.setdefault((node, gpu), gpus) != gpus:
                raise ConfigError(
                    f"plan: job {each.job!r} shares GPU {gpu} of {node} with a job on other GPUs too, which a simulated device "
                    "cannot; give both the same number of GPUs, or GPUs to themselves (gpu_memory_gib: 0)"
                )
        on_gpus.setdefault((node, gpus), _Device(node, gpus, [])).jobs.append(engine)
    return sorted([*on_gpus.values(), *on_cpus], key=lambda device: (device.node, not device.gpus, device.gpus))


def _pools(known: Sequence[Job]) -> dict[tuple[Service, str], str | None]:
    """The pool of each service and model: the usual one for the first model, and one called as the model for others."""
    pools: dict[tuple[Service, str], str | None] = {}
    for job in known:
        usual = all(service != job.service for service, _ in pools)
        pools.setdefault((job.service, job.model), None if usual else job.model)
    return pools


def _price(cluster: Cluster, device: _Device, devices: Sequence[_Device]) -> float | None:
    """The device's share of its node's price, USD per hour."""
    node = next(each for each in cluster.nodes if each.name == device.node)
    if node.price_per_h is None:
        return None
    beside = [each for each in devices if each.node == device.node]
    gpus = sum(len(each.gpus) for each in beside)
    return round(node.price_per_h * (len(device.gpus) / gpus if gpus else 1 / len(beside)), 6)


def _entry(
    device: _Device, price: float | None, pools: Mapping[tuple[Service, str], str | None]
) -> dict[str, Any] | None:
    """The device as an entry of ``cluster.devices``; None where nothing on it has a profile."""
    entry: dict[str, Any] = {"node": device.node, "count": 1}
    if price is not None:
        entry["price_per_h"] = price
    for job, profile in device.jobs:
        if not _is_known(job, profile):
            continue
        key, fields = _ENGINES[job.service]
        if key in entry:
            raise ConfigError(
                f"plan: {' and '.join(other.name for other, _ in device.jobs)} share GPU {device.gpus[0]} of {device.node}; a "
                "simulated device has at most one LLM and one embedding engine: give each a GPU (gpu_memory_gib: 0)"
            )
        pool = pools[job.service, job.model]
        options = {name: value for name, value in job.options.items() if name in fields}
        entry[key] = {"profile": profile, **({} if pool is None else {"pool": pool}), **options}
    return entry if "llm" in entry or "embed" in entry else None


def _left_out(devices: Iterable[_Device]) -> Iterator[str]:
    lines: dict[str, None] = {}
    for job, profile in (each for device in devices for each in device.jobs):
        if not _is_known(job, profile):
            lines[
                f"Left out: {job.name}, {'an operator' if job.service == 'operator' else 'which has no profile there'}."
            ] = None
            continue
        unknown = sorted(name for name in job.options if name not in _ENGINES[job.service][1])
        if unknown:
            lines[f"Options of {job.name} that the simulator does not have: {', '.join(unknown)}."] = None
    yield from lines
