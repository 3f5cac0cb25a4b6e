"""A gateway from configuration: engines, policy and objectives to a process that serves, and what it leaves on disk."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import uvloop
import yaml

from sage_bench.compose import declared_of, make, make_plane, pipelines_of
from sage_bench.config import RunConfig
from sage_bench.discovery import check_url
from sage_bench.results.native_recorder import NativeRecorder
from sage_bench.results.recorder import RunRecorder
from sage_bench.results.writer import StepWriter
from sage_core.commands import AnyCommand
from sage_core.errors import ConfigError, DataError, OutputError
from sage_core.events import AnyEvent
from sage_core.native_plane import Plane
from sage_core.slo import SloTable
from sage_core.stepper import ColumnRecorder, Recorder
from sage_core.units import NEVER, PoolKind, seconds
from sage_live.gateway.app import Gateway, GatewayConfig
from sage_live.gateway.keys import ApiKeys
from sage_live.gateway.logs import AccessLog
from sage_live.gateway.rate import RateLimits
from sage_live.gateway.tracing import Tracer
from sage_live.health import HealthConfig, State, Watch
from sage_live.http_engine import EngineSpec, HttpEngine
from sage_live.pipelines.function_engine import Workers
from sage_live.pipelines.pipeline import LivePipeline
from sage_live.service import InferenceService, ServiceConfig
from sage_policies.presets import PRESETS

_log = logging.getLogger(__name__)

STATES_MAX = 10_000
"""Changes of engines' states that are remembered: the last ones, for a gateway may serve for years."""

Tasks = Annotated[int, msgspec.Meta(ge=1, le=65536)]
BatchTokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
KvTokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Cost = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
"""Expected nanoseconds."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine in service. model null: what its ``/v1/models`` says. api_key_env: the environment variable that holds
    the key it wants. Other keys as in sage_live.http_engine.EngineSpec. Raises ConfigError for what is no URL."""

    url: str
    model: str | None = None
    kind: Literal["llm", "embedding"] = "llm"
    adapter: str = "vllm"
    name: str = ""
    pool: str = ""
    upstream_model: str = ""
    node: str = "local"
    device: int = -1
    tasks_max: Tasks | None = None
    batch_tokens_max: BatchTokens | None = None
    kv_tokens_max: KvTokens = 0
    priority_scheduling: bool = False
    api_key_env: str | None = None
    fixed_ns: Cost = 0.0
    input_token_ns: Cost = 0.0
    output_token_ns: Cost = 0.0
    output_seq_ns: Cost = 0.0

    def __post_init__(self) -> None:
        check_url("url", self.url)

    def spec(self, model: str, env: Mapping[str, str]) -> EngineSpec:
        """With its model known. ConfigError for a key that is not in ``env``."""
        key = None
        if self.api_key_env is not None:
            key = env.get(self.api_key_env)
            if not key:
                raise ConfigError(f"engine {self.url}: api_key_env: {self.api_key_env} is not set; set it to the key")
        embedding = self.kind == "embedding"
        return EngineSpec(
            self.url,
            model,
            PoolKind.EMBEDDING if embedding else PoolKind.LLM,
            self.adapter,
            self.name,
            self.pool,
            self.upstream_model,
            self.node,
            self.device,
            self.tasks_max or (32 if embedding else 256),
            self.batch_tokens_max or (16384 if embedding else 8192),
            self.kv_tokens_max,
            self.priority_scheduling,
            key,
            self.fixed_ns,
            self.input_token_ns,
            self.output_token_ns,
            self.output_seq_ns,
        )


def read_engines(path: Path) -> list[EngineConfig]:
    """A YAML list of engines. DataError naming the file and the key."""
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        return msgspec.convert(plain, list[EngineConfig])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path}: expected a YAML list of engines: {' '.join(str(error).split())}") from error


def parse_engine(text: str) -> EngineConfig:
    """``URL[,key=value]...`` as on the command line. ConfigError naming the key."""
    url, *pairs = text.split(",")
    fields: dict[str, Any] = {"url": url}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--engine {text}: expected URL[,key=value]..., got {pair!r}")
        fields[key] = value
    try:
        return msgspec.convert(fields, EngineConfig, strict=False)
    except msgspec.ValidationError as error:
        hint = f"; keys are {', '.join(EngineConfig.__struct_fields__)}" if "unknown field" in str(error) else ""
        raise ConfigError(f"--engine {text}: {error}{hint}") from error


def with_names(specs: Sequence[EngineSpec]) -> list[EngineSpec]:
    """``specs``, each with a name of its own: ``host:port``, or ``host:port-model`` where another engine is called that.
    ConfigError for two that were given one name."""
    given = [spec.name for spec in specs if spec.name]
    taken = set(given)
    if len(taken) < len(given):
        raise ConfigError(f"engine: name: {', '.join(given)}: two engines cannot have one name")
    named = []
    for spec in specs:
        each = spec
        if not each.name and each.called in taken:
            each = replace(each, name=f"{each.called}-{each.model.rpartition('/')[2]}")
            if each.called in taken:
                raise ConfigError(
                    f"engine {each.url}: name: {each.called!r} is another engine's; give this one one, name=..."
                )
        taken.add(each.called)
        named.append(each)
    return named


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve, beside a run's configuration. indexes: what its pipelines retrieve from. record: the folder for log and rows; None: nothing is kept."""

    gateway: GatewayConfig
    service: ServiceConfig = field(default_factory=ServiceConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    engines: Sequence[EngineSpec] = ()
    keys: ApiKeys | None = None
    rates: RateLimits | None = None
    log: AccessLog | None = None
    tracer: Tracer | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    record: Path | None = None
    indexes: Mapping[str, Path] = field(default_factory=dict)
    on_state: Callable[[str, str, str], None] = lambda engine, state, why: None


@dataclass(frozen=True, slots=True)
class Served:
    """How a gateway's life went: for the manifest.

    policy: the first; switches: instants (ns) and names of those that followed. origin_ns: CLOCK_MONOTONIC of instant 0.
    engines: all that were in service; states: instant (ns), name, state and reason of every change. broken: what
    ended the control plane before its time.
    """

    steps: int
    digest: bytes
    duration_ns: int
    control_s: float
    counts: Mapping[str, int]
    replicas: Sequence[Mapping[str, Any]]
    policy: str
    origin_ns: int
    switches: Sequence[tuple[int, str]] = ()
    engines: Sequence[EngineSpec] = ()
    states: Sequence[tuple[int, str, str, str]] = ()
    broken: Exception | None = None


class RecordedService(InferenceService):
    """Keeps what a manifest says of its life beside log and rows."""

    def __init__(self, plane: Plane, config: ServiceConfig, **options: Any) -> None:
        told = options.pop("on_state", None)

        def on_state(engine: HttpEngine, state: State, why: str) -> None:
            self._states.append((self.driver.now, engine.name, state.value, why))
            if told is not None:
                told(engine, state, why)

        super().__init__(plane, config, on_state=on_state, **options)
        self._first = self.policy
        self._switches: list[tuple[int, str]] = []
        self._engines: list[EngineSpec] = []
        self._states: deque[tuple[int, str, str, str]] = deque(maxlen=STATES_MAX)

    def add_engine(self, spec: EngineSpec) -> Watch:
        watch = super().add_engine(spec)
        if spec not in self._engines:
            self._engines.append(spec)
        return watch

    def set_policy(self, name: str) -> None:
        super().set_policy(name)
        self._switches.append((self.driver.now, name))

    def served(self, rows: RunRecorder | NativeRecorder | None) -> Served:
        """How it went. Call when it is closed."""
        driver = self.driver
        counts = driver.plane.counts
        return Served(
            driver.steps,
            driver.digest,
            driver.now,
            driver.control_ns / 1e9,
            {name: getattr(counts, name) for name in counts.__dataclass_fields__},
            [] if rows is None else rows.replicas(),
            self._first,
            driver.origin_ns,
            self._switches,
            self._engines,
            list(self._states),
            driver.broken,
        )


def policy_names(config: RunConfig) -> list[str]:
    """What the plane of this configuration may be switched to."""
    return sorted({*PRESETS, str(config.policy.get("name") or "")} - {""})


@contextlib.asynccontextmanager
async def gateway(config: RunConfig, serving: Serving) -> AsyncIterator[tuple[Gateway, list[Served]]]:
    """A gateway that listens; at the end it drains, and the list has what was :class:`Served`."""
    served: list[Served] = []
    slo = make("slo", config.slo)
    if not isinstance(slo, SloTable):
        raise ConfigError(f"slo._target_: expected sage_core.slo.SloTable, got {type(slo).__name__}")
    with contextlib.suppress(ControlPlaneError), contextlib.ExitStack() as files:
        rows, record = recorder(files, serving.record, config, slo)
        service = RecordedService(
            make_plane(config),
            serving.service,
            slo=slo,
            health=serving.health,
            record=record,
            on_state=lambda engine, state, why: serving.on_state(engine.name, state.value, why),
        )
        made = Gateway(
            service,
            serving.gateway,
            keys=serving.keys,
            rates=serving.rates,
            log=serving.log,
            tracer=serving.tracer,
            policies=policy_names(config),
            settings=serving.settings,
        )
        try:
            for spec in serving.engines:
                service.add_engine(spec)
            deploy(service, config, serving.indexes)
            await made.start()
            yield made, served
        finally:
            await made.close()
            served.append(service.served(rows))
        if service.driver.broken is not None:
            raise ControlPlaneError  # so that the recorder does not expect every request to have an outcome


def deploy(service: InferenceService, config: RunConfig, indexes: Mapping[str, Path]) -> None:
    """Put the declared pipelines of the configuration in service, once their engines are. ConfigError, DataError."""
    workers: dict[str, Workers] = {}
    for group in config.cluster.devices:
        if (o := group.operator) is not None:
            count = group.count * o.workers + (workers[o.pool].at_once if o.pool in workers else 0)
            workers[o.pool] = Workers(count, o.fixed_s * 1e9, o.input_token_s * 1e9)
    for declaration in declared_of(config).values():
        service.add_pipeline(LivePipeline(declaration, indexes, workers))


class ControlPlaneError(Exception):
    """The control plane broke; what broke it is :attr:`Served.broken`."""


class LiveRecorder(NativeRecorder):
    """Of a system in service: when the disk is full it goes on serving without its record, and says so at the end."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(folder, *args, background=True, **options)
        self._lost: OutputError | None = None

    def flush(self) -> None:
        """Write what is full; drop it once writing has failed."""
        if self._lost is None:
            try:
                super().flush()
            except OutputError as error:
                self._lost = error
                _log.error("%s; requests are served and no longer recorded", error)
        else:
            for name in self.native.full_tables():
                self.native.take(name)

    def abort(self, reason: str) -> None:
        try:
            super().abort(reason)
        except OutputError:
            if self._lost is None:
                raise
        if self._lost is not None:
            raise self._lost


def recorder(
    files: contextlib.ExitStack, folder: Path | None, config: RunConfig, slo: SloTable
) -> tuple[RunRecorder | NativeRecorder | None, Recorder | ColumnRecorder | None]:
    """Who makes the rows of a live run, and what the driver is to tell of each step."""
    if folder is None:
        return None, None
    known = pipelines_of(declared_of(config))
    pipelines = {name: [(s.op.name, s.op.pool) for s in p.stages] for name, p in known.items()}
    about: dict[str, Any] = {"warmup_ns": seconds(config.warmup_s), "cooldown_at": NEVER, "tasks": config.record.tasks}
    if config.mechanism == "native":
        columns = files.enter_context(LiveRecorder(folder, pipelines, slo, steps=config.record.steps, **about))
        return columns, columns
    rows = files.enter_context(RunRecorder(folder, pipelines, slo, **about))
    log = files.enter_context(StepWriter(folder / "steps.parquet")) if config.record.steps else None

    def record(
        now: int, events: Sequence[AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None:
        rows(now, events, commands)
        if log is not None:
            log(now, encoded, digest)

    return rows, record


def serve(config: RunConfig, serving: Serving, ready: Callable[[Gateway, int], None]) -> Served:
    """Serve until SIGINT or SIGTERM, then drain; or until the control plane breaks. ``ready`` is told the port."""

    async def main() -> Served:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with gateway(config, serving) as (made, served):
            made.service.driver.on_broken = lambda error: stop.set()
            gc.collect()
            gc.freeze()  # what is here now stays: no collection looks at it again
            ready(made, made.port)
            await stop.wait()
        return served[0]

    return uvloop.run(main())
