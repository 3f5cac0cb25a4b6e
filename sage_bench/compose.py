"""The composition root: from a checked configuration to objects. The only place that instantiates a ``_target_``."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from sage_bench.config import NAME, DeviceConfig, EmbedConfig, LlmConfig, RunConfig, SimDriverConfig
from sage_bench.pipelines.staged_load import StagedLoad
from sage_bench.results.devices import devices_of, listed_price, price_of
from sage_core import native_plane as planes
from sage_core.backend import ContentsOf, OutputTokens
from sage_core.declared import DeclarationError, Declared, declared
from sage_core.errors import ConfigError, SageError
from sage_core.load import ANSWER, Contents, Load
from sage_core.native_plane import Plane
from sage_core.pipeline import Pipeline, pipeline_of, single_request_pipelines
from sage_core.policy import Policy, native_twin
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.stepper import ColumnRecorder, Recorder
from sage_policies.predict import Oracle
from sage_policies.presets import PRESETS, preset
from sage_sim.device import Device, MakeDevice
from sage_sim.disaggregated import DisaggregatedDevice, KvLink
from sage_sim.driver import SimDriver
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime
from sage_sim.memory import ReplicaMemory, check_memory, llm_memory
from sage_sim.operator import OperatorDevice, OperatorReplica
from sage_sim.pipelined import PipelinedDevice
from sage_sim.profile import Profile, load_profile
from sage_sim.sharing import MpsDevice, shared

TruthOf = Callable[[int], int]

DEVICES_MAX: Final = 100_000
"""More is a slip of the finger: each is an object with state of its own."""

REPORT_INTERVAL_S_MIN: Final = 0.001
"""Scraping faster is a mistake in the units: the run would do little else."""


@dataclass(slots=True)
class Parts:
    """What a run is made of."""

    config: RunConfig
    streams: Streams
    slo: SloTable
    load: Load
    pipelines: dict[str, Pipeline]
    declared: dict[str, Declared]  # those of them that a file declares
    profiles: dict[str, Profile]
    policy: Policy  # one of its own, to be looked at; the plane makes another
    warnings: list[str]


def make_parts(config: RunConfig) -> Parts:
    """Everything but the plane and the driver. Raises ConfigError or DataError, naming the key or the file."""
    streams = Streams(config.seed)
    slo = make("slo", config.slo)
    if not isinstance(slo, SloTable):
        raise ConfigError(f"slo._target_: expected sage_core.slo.SloTable, got {type(slo).__name__}")
    load: Load = make("load", config.load, streams=streams, slo=slo)
    for method in ("arrivals", "ended"):
        if not callable(getattr(load, method, None)):
            raise ConfigError(f"load._target_: {type(load).__name__} has no {method}(); see sage_core.load.Load")
    profiles = {name: load_profile(name) for name in _profile_names(config)}
    _check_cluster(config, profiles)
    declarations = declared_of(config)
    pipelines = pipelines_of(declarations)
    _check_pipelines(config, load, pipelines)
    return Parts(
        config,
        streams,
        slo,
        load,
        pipelines,
        declarations,
        profiles,
        make_policy(config),
        [*_warnings(config, profiles), *getattr(load, "notes", ())],
    )


def make_plane(config: RunConfig, truth: TruthOf | None = None) -> Plane:
    """A fresh control plane. ``truth``: for the oracle predictor only."""
    made = [make_policy(config)]
    chosen = made[0].name
    policies: dict[str, Callable[[], Policy]] = {name: lambda name=name: preset(name) for name in PRESETS}  # type: ignore[misc]

    def active() -> Policy:
        policy = made.pop() if made else make_policy(config)
        if isinstance(policy.predict, Oracle) and truth is not None:
            policy.predict.bind(truth)
        return policy

    policies[chosen] = active
    return planes.make_plane(
        config.mechanism, pipelines_of(declared_of(config)), policies, chosen, attempts_max=config.attempts_max
    )


def declared_of(config: RunConfig) -> dict[str, Declared]:
    """Pipelines that the configuration declares, by name: one, or several below ``pipelines``. Raises ConfigError."""
    node = config.pipeline
    if node == {"kind": "single"}:
        return {}
    several = node["pipelines"] if set(node) == {"pipelines"} and isinstance(node["pipelines"], list) else [node]
    found: dict[str, Declared] = {}
    for plain in several:
        try:
            each = declared(plain)
        except DeclarationError as error:
            raise ConfigError(f"pipeline.{error}") from error
        name = each.pipeline.name
        if name in found or name in single_request_pipelines():
            raise ConfigError(f"pipeline.name: {name} is taken; choose another name")
        found[name] = each
    return found


def pipelines_of(declarations: Mapping[str, Declared]) -> dict[str, Pipeline]:
    """Everything that a request may go through, by name."""
    return {**single_request_pipelines(), **{name: each.pipeline for name, each in declarations.items()}}


def _check_pipelines(config: RunConfig, load: Load, pipelines: Mapping[str, Pipeline]) -> None:
    """Every pipeline that the load names is known, and somebody does each stage of a declared one."""
    mix = getattr(load, "mix", None)
    pools = {group.operator.pool for group in config.cluster.devices if group.operator is not None}
    pools |= {each.pool for group in config.cluster.devices for each in group.engines}
    for asked in dict.fromkeys(each.pipeline for each in getattr(mix, "classes", ())):
        pipeline = pipeline_of(dict(pipelines), asked)
        if pipeline is None:
            raise ConfigError(
                f"load.classes: pipeline {asked!r} is not known; known: {', '.join(pipelines)} (choose one with pipeline=NAME)"
            )
        if pipeline.single is not None:
            continue  # an engine of that model may come later; the run says what was not served
        for stage in pipeline.stages:
            if not stage.free and stage.op.pool not in pools:
                raise ConfigError(
                    f"cluster.devices: stage {stage.name} of pipeline {asked} needs pool {stage.op.pool!r}, and no device "
                    f"has it; they have {', '.join(sorted(pools))}"
                )


def make_driver(parts: Parts, record: Recorder | ColumnRecorder | None = None) -> SimDriver:
    """A simulated run, ready to go."""
    config = parts.config
    # Weak, because the native loop holds the devices that ask, and the collector cannot look into native code.
    made: list[weakref.ref[SimDriver]] = []

    def driver_of_run() -> SimDriver:
        driver = made[0]()
        assert driver is not None
        return driver

    def truth(request: int) -> int:
        return driver_of_run().output_tokens(request, ANSWER)

    def results(request: int, stage: int) -> int:
        return driver_of_run().output_tokens(request, stage)

    def contents(request: int) -> Contents | None:
        return driver_of_run().contents(request)

    truths = Truths(results, contents)

    devices = device_makers(parts, truths)
    driver = SimDriver(
        make_plane(config, truth),
        StagedLoad(parts.load, parts.declared, parts.streams) if parts.declared else parts.load,
        devices,
        parts.streams,
        network=config.cluster.network,
        report_interval_s=config.cluster.report_interval_s,
        faults=config.cluster.faults,
        until_s=_simulated(config).until_s,
        record=record,
    )
    made.append(weakref.ref(driver))
    return driver


def device_makers(parts: Parts, truths: Truths | None = None) -> list[MakeDevice]:
    """One for each device of the cluster, in order. truths: what they may know of requests; None: nothing, for those
    who only ask what the devices are."""
    config = parts.config
    laws = {name: profile.iteration_time() for name, profile in parts.profiles.items()}
    devices: list[MakeDevice] = []
    for group in config.cluster.devices:
        for _ in range(group.count):
            devices.append(
                _device_maker(
                    group, len(devices), parts.profiles, laws, truths or _NOBODY, config.mechanism == "reference"
                )
            )
    return devices


def _simulated(config: RunConfig) -> SimDriverConfig:
    if not isinstance(config.driver, SimDriverConfig):
        raise ConfigError("driver: expected sim here; a live run goes through sage_bench.live")
    return config.driver


def make_policy(config: RunConfig) -> Policy:
    """A fresh policy object as configured."""
    node = dict(config.policy)
    if "shared_devices" in node and not node["shared_devices"]:  # for policies that tell them from the others
        node["shared_devices"] = shared_devices(config)
    count = sum(group.count for group in config.cluster.devices)
    if any(type(device) is int and not 0 <= device < count for device in node.get("shared_devices") or ()):
        raise ConfigError(
            f"policy.shared_devices: expected numbers from 0 to {count - 1}, got {node['shared_devices']}"
        )
    policy = make("policy", node)
    if isinstance(policy, Policy) and not NAME.fullmatch(policy.name):
        raise ConfigError(
            f"policy: {node.get('_target_')} names itself {policy.name!r}; expected a plain folder name, because results "
            "go by it"
        )
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"policy._target_: {node.get('_target_')} must return a sage_core.policy.Policy, got {type(policy).__name__}"
        )
    for part in (policy.order, policy.route, policy.limit, policy.predict):
        native_twin(part)  # the native side looks at types: asked here, before anything is written
    return policy


def shared_devices(config: RunConfig) -> list[int]:
    """Numbers of the devices that host an LLM and an embedding engine."""
    groups = [group for group in config.cluster.devices for _ in range(group.count)]
    return [number for number, group in enumerate(groups) if group.llm is not None and group.embed is not None]


def make(group: str, node: Mapping[str, Any], **given: Any) -> Any:
    """Instantiate one group's ``_target_``. A wrong target, key or value is a ConfigError that names the group."""
    if "_target_" not in node:
        raise ConfigError(
            f"{group}: has no _target_; choose one with {group}=NAME (see `sage run --info defaults-tree`)"
        )
    plain = {**node, "_convert_": "all"}  # else nested dataclasses arrive as OmegaConf nodes
    try:
        if not given:
            return instantiate(plain)
        # As a partial: Hydra would merge ``given`` into the configuration and turn its dataclasses into dicts.
        return instantiate(plain, _partial_=True)(**given)
    except TypeError as error:  # an unknown or missing key; Hydra reports its own calls as InstantiationException
        raise ConfigError(_cannot_make(group, node["_target_"], error)) from error
    except InstantiationException as error:
        cause: BaseException = error
        while not isinstance(cause, SageError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, SageError):
            raise cause from None
        raise ConfigError(_cannot_make(group, node["_target_"], cause)) from error


def _cannot_make(group: str, target: object, cause: BaseException) -> str:
    """Why ``target`` could not be found or called, and what to do."""
    why = (
        str(cause).splitlines()[0] if isinstance(cause, InstantiationException) else f"{type(cause).__name__}: {cause}"
    )
    if isinstance(cause, ModuleNotFoundError):
        missing = cause.name or ""
        owner, _, name = missing.rpartition(".")
        if owner in sys.modules:
            why = f"{owner} has no {name!r}"
        else:
            why = f"no module {missing!r}; modules are looked for in the working directory and among installed packages"
    elif isinstance(cause, TypeError) and str(cause).startswith(f"{str(target).rpartition('.')[2]}("):
        with contextlib.suppress(Exception):  # the hint is a courtesy: never hide the error behind one of its own
            why = f"{cause}; it takes {', '.join(inspect.signature(get_object(str(target))).parameters) or 'nothing'}"
    return f"{group}: {target} cannot be made: {why}"


def price_per_h(config: RunConfig, profiles: Mapping[str, Profile]) -> float | None:
    """USD per hour of the whole cluster; None where a device has no price and none is listed."""
    prices = []
    for group in config.cluster.devices:
        price = price_of(group, profiles)
        prices.append(None if price is None else price * group.count)
    return None if None in prices else float(sum(price for price in prices if price is not None))


def _profile_names(config: RunConfig) -> list[str]:
    return sorted({engine.profile for group in config.cluster.devices for engine in group.engines})


def _check_cluster(config: RunConfig, profiles: Mapping[str, Profile]) -> None:
    """Everything a device could refuse later, asked here, where the key is known and nothing has been written."""
    cluster = config.cluster
    if not cluster.devices:
        raise ConfigError("cluster.devices: expected at least one device")
    if 0 < cluster.report_interval_s < REPORT_INTERVAL_S_MIN:
        raise ConfigError(
            f"cluster.report_interval_s: expected 0 (no reports) or at least {REPORT_INTERVAL_S_MIN:g}, "
            f"got {cluster.report_interval_s:g}"
        )
    count = sum(group.count for group in cluster.devices)
    if count > DEVICES_MAX:
        raise ConfigError(f"cluster.devices: expected at most {DEVICES_MAX:,} devices in all, got {count:,}")
    for index, fault in enumerate(cluster.faults):
        if not 0 <= fault.device < count:
            raise ConfigError(f"cluster.faults[{index}].device: expected 0 to {count - 1}, got {fault.device}")
    kinds: dict[str, str] = {}
    for index, group in enumerate(config.cluster.devices):
        at = f"cluster.devices[{index}]"
        if group.disaggregated is not None and (group.llm or group.embed or group.operator or group.mps):
            raise ConfigError(f"{at}.disaggregated: stands for devices of its own; list other engines apart")
        replica = group.llms[-1] if group.llms else None
        for engine_kind, engine in (("llm", replica), ("embedding", group.embed), ("operator", group.operator)):
            if engine is not None and kinds.setdefault(engine.pool, engine_kind) != engine_kind:
                raise ConfigError(
                    f"{at}: pool {engine.pool!r} has {kinds[engine.pool]} replicas, so no {engine_kind} replica can join it"
                )
        if group.operator is not None and (group.llm is not None or group.embed is not None):
            raise ConfigError(f"{at}: operator workers and engines do not share a device; list them apart")
        if group.operator is None and not group.engines:
            raise ConfigError(f"{at}: expected llm, embed, disaggregated or operator")
        for each in group.engines:
            role, wanted = ("llm", "llm") if isinstance(each, LlmConfig) else ("embed", "embedding")
            if profiles[each.profile].kind != wanted:
                raise ConfigError(
                    f"{at}.{role}.profile: {each.profile} is of kind {profiles[each.profile].kind}, expected {wanted}"
                )
        if any(llm.pipeline_parallel > 1 for llm in group.llms) and len(group.engines) > 1:
            raise ConfigError(
                f"{at}: an engine with pipeline_parallel above 1 has its devices for itself; list others apart"
            )
        if group.mps is not None and (group.llm is None or group.embed is None):
            raise ConfigError(f"{at}.mps: shares are for an LLM and an embedding engine on one device; it has only one")
        if group.mps is not None and group.mps.llm_share + group.mps.embed_share > 1:
            raise ConfigError(
                f"{at}.mps: expected shares of 1 in all, got {group.mps.llm_share} + {group.mps.embed_share}"
            )
        try:
            check_device_memory(group, profiles)
            laws = {engine.profile: profiles[engine.profile].iteration_time() for engine in group.engines}
            _device_maker(group, index, profiles, laws, _NOBODY, reference=False)(0).joined()
        except ConfigError as error:
            raise ConfigError(f"{at}: {error}") from error


def check_device_memory(group: DeviceConfig, profiles: Mapping[str, Profile]) -> None:
    """A device must hold what is placed on it. Engines of a disaggregated replica have devices of their own."""
    if group.disaggregated is not None:
        for llm in group.llms:
            check_device_memory(DeviceConfig(node=group.node, llm=llm), profiles)
        return
    needs: list[ReplicaMemory] = []
    sizes: list[float] = []
    for engine in group.engines:
        name = "llm" if isinstance(engine, LlmConfig) else "embed"
        profile = profiles[engine.profile]
        memory = profile.memory
        needs.append(
            llm_memory(
                f"{name} ({engine.profile})",
                weights=memory.weights_bytes,
                kv_bytes_per_token=memory.kv_bytes_per_token,
                kv_tokens=_kv_tokens(engine, profile) if isinstance(engine, LlmConfig) else 0,
                # An estimate, which an engine that is alone may belie: a measured KV size is taken as it is.
                reserve=memory.reserve_bytes if len(group.engines) > 1 else 0,
                devices=profile.hardware.count * (engine.pipeline_parallel if isinstance(engine, LlmConfig) else 1),
            )
        )
        if profile.hardware.memory_gib is not None:
            sizes.append(profile.hardware.memory_gib)
    if sizes:  # where the profiles are of different devices (a warning says so), the larger one is meant
        check_memory(group.node, round(max(sizes) * 2**30), needs)


def _warnings(config: RunConfig, profiles: Mapping[str, Profile]) -> list[str]:
    """Configured values that leave what a profile was fitted on, and profiles whose error nobody knows."""
    found = [
        f"profile {name}: a prior from data sheets, nothing of this model was measured on this device (see `sage profile show {name}`)"
        if profile.source.kind == "roofline"
        else f"profile {name}: rests on a single measured rate; its error is not known (see `sage profile show {name}`)"
        for name, profile in profiles.items()
        if not profile.errors
    ]
    for group in config.cluster.devices:
        of = {profiles[engine.profile].hardware.device for engine in group.engines}
        listed = listed_price(group, profiles)
        if listed is not None and group.price_per_h is not None and not 0.5 <= group.price_per_h / listed <= 2:
            found.append(
                f"node {group.node}: price_per_h is {group.price_per_h:g} USD for {devices_of(group, profiles)} x "
                f"{' and '.join(sorted(of))}, listed at {listed:g} USD (sage_sim/hardware.yaml)"
            )
        if len(of) > 1 and group.disaggregated is None:
            found.append(f"node {group.node}: one device has engines with profiles of {' and '.join(sorted(of))}")
        if group.disaggregated is not None and any(llm.prefix_caching for llm in group.llms):
            found.append(
                f"node {group.node}: engines of a disaggregated replica know no shared prefixes; only a preempted sequence finds its "
                "own blocks (prefix_caching)"
            )
        for llm in group.llms:
            found += profiles[llm.profile].warn_outside(
                seqs=llm.max_num_seqs, prefill_tokens=llm.max_num_batched_tokens
            )
        if group.embed is not None:
            found += profiles[group.embed.profile].warn_outside(prefill_tokens=group.embed.max_batch_tokens)
    return list(dict.fromkeys(found))


class Truths(NamedTuple):
    """What devices may know of a request: the sizes of its results, and what its prompt begins with."""

    output_tokens: OutputTokens
    contents: ContentsOf


_NOBODY: Final = Truths(lambda request, stage: 0, lambda request: None)


def _device_maker(
    group: DeviceConfig,
    number: int,
    profiles: Mapping[str, Profile],
    laws: Mapping[str, IterationTime],
    truths: Truths,
    reference: bool,
) -> MakeDevice:
    def llm_replica(config: LlmConfig, replica: int) -> LlmReplica:
        return llm_replica_of(config, replica, profiles[config.profile], laws[config.profile])

    def make_device(replica: int) -> Device:
        if group.operator is not None:
            o = group.operator
            return OperatorDevice(
                number,
                group.node,
                OperatorReplica(
                    replica,
                    o.pool,
                    workers=o.workers,
                    fixed_ns=_ns(o.fixed_s),
                    input_token_ns=_ns(o.input_token_s),
                ),
                truths.output_tokens,
            )
        if (apart := group.disaggregated) is not None:
            memory = profiles[apart.prefill.profile].memory
            return DisaggregatedDevice(
                number,
                group.node,
                [llm_replica(apart.prefill, replica)] * apart.prefill_engines,
                [llm_replica(apart.decode, replica)] * apart.decode_engines,
                KvLink(memory.kv_bytes_per_token, round(apart.link.gb_per_s * 1e9), _ns(apart.link.latency_s)),
                truths.output_tokens,
                reference,
            )
        llm = embed = None
        if group.llm is not None:
            llm = llm_replica(group.llm, replica)
            replica += 1
        if group.embed is not None:
            embed = embed_replica_of(group.embed, replica, laws[group.embed.profile])

        def simulated(llm: LlmReplica | None, embed: EmbedReplica | None) -> SimulatedDevice:
            return SimulatedDevice(number, group.node, llm, embed, truths.output_tokens, reference, truths.contents)

        if llm is not None and group.llm is not None and group.llm.pipeline_parallel > 1:
            stages, hop_ns = group.llm.pipeline_parallel, _ns(group.llm.pipeline_hop_s)
            return PipelinedDevice(
                number, group.node, llm, stages, hop_ns, truths.output_tokens, reference, truths.contents
            )
        if (mps := group.mps) is None or llm is None or embed is None:
            return simulated(llm, embed)
        slower_llm = replace(llm, time=shared(llm.time, mps.llm_share, mps.saturation))
        slower_embed = replace(embed, time=shared(embed.time, mps.embed_share, mps.saturation))
        return MpsDevice([simulated(slower_llm, None), simulated(None, slower_embed)])

    return make_device


def _kv_tokens(config: LlmConfig, profile: Profile) -> int:
    if config.kv_tokens is not None:
        if config.gpu_memory_utilization is not None:
            raise ConfigError(
                "kv_tokens, gpu_memory_utilization: both say how large the KV cache is; leave one of them out"
            )
        return config.kv_tokens
    return profile.kv_tokens(config.gpu_memory_utilization, stages=config.pipeline_parallel)


def llm_replica_of(config: LlmConfig, replica: int, profile: Profile, law: IterationTime) -> LlmReplica:
    kv_tokens = _kv_tokens(config, profile)
    host, drafts = config.host, config.speculative
    if kv_tokens < config.block_size:
        raise ConfigError(f"kv_tokens: expected at least one block of {config.block_size} tokens, got {kv_tokens}")
    return LlmReplica(
        replica,
        config.pool,
        law,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        kv_blocks=kv_tokens // config.block_size,
        chunked_prefill=config.chunked_prefill,
        priority_queue=config.scheduling == "priority",
        ingress_ns=_ns(config.ingress_s),
        egress_ns=_ns(config.egress_s),
        prefix_caching=config.prefix_caching,
        async_scheduling=config.async_scheduling,
        scheduler_reserve_full_isl=config.scheduler_reserve_full_isl,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_num_partial_prefills=config.max_num_partial_prefills,
        max_model_len=_max_model_len(config, profile),
        watermark_blocks=int(config.watermark * (kv_tokens // config.block_size)),
        num_speculative_tokens=0 if drafts is None else drafts.num_speculative_tokens,
        acceptance_rate=0.0 if drafts is None else drafts.acceptance_rate,
        draft_ns=0 if drafts is None else _ns(drafts.draft_s),
        scheduler_ns=_ns(host.scheduler_s),
        scheduler_seq_ns=_ns(host.scheduler_seq_s),
        api_server_ns=_ns(host.api_server_s),
        api_server_token_ns=_ns(host.api_server_token_s),
        detokenizer_token_ns=_ns(host.detokenizer_token_s),
        startup_ns=_ns(config.startup_s),
        weight_bytes=0
        if config.weights_gib_per_s is None
        else profile.memory.weights_bytes // (profile.hardware.count * config.pipeline_parallel),
        weight_bytes_per_s=0 if config.weights_gib_per_s is None else round(config.weights_gib_per_s * 2**30),
    )


def _max_model_len(config: LlmConfig, profile: Profile) -> int:
    positions = profile.model.positions
    if config.max_model_len is not None and config.max_model_len > positions:
        raise ConfigError(f"max_model_len: {profile.model.name} has {positions} positions, got {config.max_model_len}")
    return positions if config.max_model_len is None else config.max_model_len


def _ns(span_s: float) -> int:
    return round(span_s * 1e9)


def embed_replica_of(config: EmbedConfig, replica: int, law: IterationTime) -> EmbedReplica:
    return EmbedReplica(
        replica,
        config.pool,
        law,
        max_batch_tasks=config.max_batch_tasks,
        max_batch_tokens=config.max_batch_tokens,
        padding=config.padding,
        ingress_ns=_ns(config.ingress_s),
        egress_ns=_ns(config.egress_s),
    )
