"""A live run: engines, a gateway, a load generator, and the same folder of results as a simulated one.

Engines are emulated as ``cluster.devices`` says, or are real ones at the URLs of ``driver.engines``; then the devices
describe them, for the policy's expectations and for the simulation of the same run. Latencies count from the scheduled
arrivals of the generator; log and rows are the gateway's, ``client.parquet`` is what the generator saw.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uvloop
from numpy.typing import NDArray
from omegaconf import DictConfig

from sage_bench.compose import Parts, device_makers, make, make_parts, price_per_h
from sage_bench.config import DeviceConfig, LiveDriverConfig, LlmConfig, checked
from sage_bench.core_speed import SAMPLES, watching, write_core_speed
from sage_bench.discovery import check_url, versions_of
from sage_bench.gateway_process import JOB, SERVED, Job, Told
from sage_bench.host_samples import sampling, write_host
from sage_bench.live_manifest import Started, write_live_manifest
from sage_bench.results.manifest import Status
from sage_bench.results.writer import flag_outside
from sage_bench.run import cooldown_begins, prepare, run_id, traces_of
from sage_bench.serving import Served
from sage_core.errors import ConfigError, EngineError, SageError
from sage_core.events import ReplicaJoined
from sage_core.load import Arrivals, ColumnLoad, Load
from sage_core.rng import Streams
from sage_core.units import NEVER, PoolKind, RequestKind, seconds
from sage_live.adapters import adapter
from sage_live.health import State
from sage_live.http_engine import EngineSpec
from sage_live.loadgen.generator import Measured, generate
from sage_live.loadgen.options import Model, Options
from sage_live.loadgen.overhead import measure_overhead
from sage_live.loadgen.processes import run_processes
from sage_live.loadgen.prompts import Prompts, estimated, with_tokenizer
from sage_live.loadgen.schema import FIELDS, client_table, write_client
from sage_live.loadgen.summary import Summary, summary
from sage_live.pipelines.pipeline import LivePipeline
from sage_live.processes import EngineProcess
from sage_live.round_trip import round_trip_ns

HEALTHY_S: Final = 60.0
"""What engines that are up may take to be found healthy by the gateway."""

LOOKED_AT: Final = 10_000
"""Requests of the load that are looked at beforehand, for what they ask."""

STATES_TOLD: Final = 10

KIND_OF: Final = {"chat": RequestKind.LLM_CHAT, "generate": RequestKind.LLM_GENERATE, "embed": RequestKind.EMBEDDING}

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LiveResult:
    """What a live run left behind. invalid: why its latencies may not be believed, empty if they may."""

    folder: Path
    told: Told
    summary: Summary
    interrupted: bool
    warnings: list[str]
    wall_s: float


def run_live(
    composed: DictConfig | dict[str, Any], overrides: Sequence[str] = (), tell: Tell = lambda text: None
) -> LiveResult:
    """Run once and write ``results/<name>/<run id>/``. Raises SageError. Ctrl-C ends the load early; what was measured
    stays. A run that ends before anything was sent leaves no folder. One whose gateway ended by itself, or in which every
    request failed, is told by an EngineError and keeps what the generator saw; its manifest says ``failed``."""
    config, plain = checked(composed)
    if not isinstance(config.driver, LiveDriverConfig):
        raise ConfigError(f"driver: expected live, got {type(config.driver).__name__}")
    if config.cluster.faults:
        raise ConfigError("cluster.faults: are for simulations; a live run's engines fail by themselves")
    parts = make_parts(config)
    if config.driver.tokenizer is not None:
        with_tokenizer(Path(config.driver.tokenizer), seed=config.seed)  # a wrong path is told before anything starts
    _check(parts, config.driver)
    folder = _fresh(Path(config.results) / config.name / f"live-{run_id(parts, plain)}")
    prepare(folder, plain)
    started = Started.now()
    wall = time.perf_counter()
    try:
        seen = uvloop.run(_measure(parts, config.driver, folder, tell))
        if not len(seen.measured.rows) and (seen.interrupted or seen.ended is not None):
            raise seen.ended or _InterruptedError
    except BaseException as error:
        if not _any_request(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, _InterruptedError):
            raise KeyboardInterrupt from None
        raise
    window = _window(parts, seen)
    verdict = summary(seen.measured, fixed_lengths=config.driver.exact_output)
    write_client(
        folder / "client.parquet",
        client_table(_on_gateway_clock(seen), seen.measured.gaps, *window),
    )
    if seen.told is not None:
        flag_outside(folder / "requests.parquet", *window)
    origin_ns = seen.measured.start_ns if seen.told is None else seen.told.origin_ns
    host = write_host(folder, origin_ns)
    write_core_speed(folder, origin_ns)
    unknown = Served(0, b"", 0, 0.0, {}, [], parts.policy.name, 0, engines=seen.specs)  # it could not tell any more
    served = unknown if seen.told is None else seen.told.served(seen.specs)
    failure = seen.ended or served.broken or _nothing_answered(seen)
    status: Status = "failed" if failure is not None else "interrupted" if seen.interrupted else "complete"
    write_live_manifest(
        folder,
        config,
        plain,
        served,
        started,
        source="live" if config.driver.engines else "emulated",
        status=status,
        versions=seen.versions,
        round_trips=seen.round_trips,
        rate=getattr(parts.load, "rate", None),
        overrides=overrides,
        window=(window[0], None if window[1] == NEVER else window[1]),
        traces=traces_of(parts.load),
        profiles=parts.profiles,
        price_per_h=price_per_h(config, parts.profiles),
        generator=verdict.as_dict(),
        invalid=verdict.invalid,
        host=host,
    )
    if failure is not None:
        kind = type(failure) if isinstance(failure, SageError) else EngineError
        raise kind(
            f"{failure}\n{folder}: failed; {verdict.requests:,} requests came due before that, and client.parquet has what "
            f"became of them{_told_failures(verdict)}"
        ) from failure
    assert seen.told is not None
    warnings = [*parts.warnings, *_doubts(seen, verdict, config.driver)]
    return LiveResult(folder, seen.told, verdict, seen.interrupted, warnings, time.perf_counter() - wall)


def _nothing_answered(seen: _Seen) -> EngineError | None:
    """Every request failed: there is nothing to measure."""
    if seen.told is None or not 0 < seen.told.counts["arrived"] == seen.told.counts["failed"]:
        return None
    return EngineError("every request failed; look at what the engines say")


def _any_request(folder: Path) -> bool:
    """Whether the gateway had anything to record."""
    with suppress(OSError, pa.ArrowInvalid):
        return bool(pq.read_metadata(folder / "requests.parquet").num_rows)
    return False


class _InterruptedError(Exception):
    """Ctrl-C before anything was sent."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was measured. told: how the gateway's life went, None where ``ended`` says that it ended by itself. cut: the
    generator gave up what had no answer ``drain_s`` after the last arrival."""

    measured: Measured
    told: Told | None
    ended: EngineError | None
    specs: list[EngineSpec]
    versions: dict[str, str]
    round_trips: dict[str, int]
    interrupted: bool
    cut: bool


def _doubts(seen: _Seen, verdict: Summary, driver: LiveDriverConfig) -> list[str]:
    """What did not go as it should, for people to read."""
    notes = []
    if seen.cut:
        notes.append(
            f"driver.drain_s: {verdict.failures.get('cut', 0):,} requests had no answer {driver.drain_s:g} s after the last "
            "arrival and were given up"
        )
    states = [each for each in (seen.told.states if seen.told is not None else []) if each[2] != State.HEALTHY]
    notes += [
        f"engine {name}: {state} at {at / 1e9:.1f} s{f' ({why})' if why else ''}"
        for at, name, state, why in states[:STATES_TOLD]
    ]
    if len(states) > STATES_TOLD:
        notes.append(f"{len(states) - STATES_TOLD:,} more changes of engines' states (manifest.json)")
    if verdict.failures and not seen.interrupted:
        notes.append(f"the generator counts{_told_failures(verdict).removeprefix(',')}")
    return notes


def _told_failures(verdict: Summary) -> str:
    failed = ", ".join(f"{name} {count:,}" for name, count in verdict.failures.items())
    return f", {sum(verdict.failures.values()):,} failures: {failed}" if failed else ""


def _fresh(folder: Path) -> Path:
    """``folder``, or it with a number: what was measured is not measured again by measuring once more."""
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    return next(each for each in itertools.chain([folder], names) if not each.exists())


def _check(parts: Parts, driver: LiveDriverConfig) -> None:
    """What a live run cannot do, asked before anything is written or started."""
    engines = [engine for group in parts.config.cluster.devices for _ in range(group.count) for engine in group.engines]
    for index, group in enumerate(parts.config.cluster.devices):
        if group.disaggregated is not None or group.mps is not None:
            raise ConfigError(
                f"cluster.devices[{index}]: a live run has LLM and embedding engines, and functions; disaggregated and mps "
                "are for simulations"
            )
    if driver.engines and len(driver.engines) != len(engines):
        raise ConfigError(
            f"driver.engines: cluster.devices has {len(engines)} engines, got {len(driver.engines)} URLs; one for each, "
            "in order"
        )
    for index, url in enumerate(driver.engines):
        check_url(f"driver.engines[{index}]", url)
    pools = {engine.pool: PoolKind.LLM if isinstance(engine, LlmConfig) else PoolKind.EMBEDDING for engine in engines}
    for key, given in (("adapters", driver.adapters), ("models", driver.models)):
        for pool in given:
            if pool not in pools:
                raise ConfigError(
                    f"driver.{key}: no engine of cluster.devices is in pool {pool!r}; it has {', '.join(pools)}"
                )
    for pool, name in driver.adapters.items():
        try:
            adapter(name)
        except ConfigError as error:
            raise ConfigError(f"driver.adapters.{pool}: {error}") from error
    served = _served(parts, pools)
    for pipeline in _asked(parts):
        if pipeline not in served:
            raise ConfigError(
                f"load: asks for pipeline {pipeline!r}, which no engine of cluster.devices serves; they serve {', '.join(served) or 'none'}"
            )
    indexes = {name: Path(folder) for name, folder in driver.indexes.items()}
    for declaration in parts.declared.values():  # what the gateway will load, so that its errors come before it starts
        LivePipeline(declaration, indexes)
    if driver.processes > 1 and not isinstance(parts.load, ColumnLoad):
        raise ConfigError(
            "driver.processes: a closed loop runs in one process, because its users wait for their answers"
        )


def _asked(parts: Parts) -> list[str]:
    """The pipelines of the load's first requests. Of a load of its own: that of the run is asked once."""
    load: Load = make("load", parts.config.load, streams=Streams(parts.config.seed), slo=parts.slo)
    return list(dict.fromkeys(arrival.request.pipeline for arrival in itertools.islice(load.arrivals(), LOOKED_AT)))


def _served(parts: Parts, pools: Mapping[str, PoolKind]) -> dict[str, str]:
    """Pipelines that engines in ``pools`` serve, and the pool of each."""
    found = {}
    for name, pipeline in parts.pipelines.items():
        pool = pipeline.stages[0].op.pool
        for asked in {pool, *pools} if name not in parts.declared else ():
            if asked in pools and (pools[asked] is PoolKind.EMBEDDING) == (name == "embed"):
                found[f"{name}@{asked}"] = asked
                if asked == pool:
                    found[name] = asked
    return found | {name: name for name in parts.declared}  # a pipeline is asked for as if it were a model


async def _measure(parts: Parts, driver: LiveDriverConfig, folder: Path, tell: Tell) -> _Seen:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    async with AsyncExitStack() as running:
        tell("starting engines")
        heads = {os.getpid(): "generator"}
        specs = await _unless(stop, _engines(parts, driver, running, heads))
        port = _free_port()
        (folder / JOB).write_bytes(msgspec.json.encode(Job(port, specs, driver.indexes)))
        tell("starting the gateway")
        gateway = await _unless(
            stop,
            EngineProcess.start(
                "gateway",
                [sys.executable, "-m", "sage_bench.gateway_process", str(folder)],
                port=port,
                health="/metrics",  # its /health waits for an engine, and who is missing is told below
                timeout_s=HEALTHY_S,
                grace_s=120.0,
            ),
        )
        running.push_async_callback(gateway.stop)
        heads[gateway.pid] = "gateway"
        await running.enter_async_context(sampling(folder, heads))
        if driver.watch_core is not None:
            running.enter_context(watching(driver.watch_core, folder / SAMPLES))
        await _unless(stop, _all_healthy(gateway.url, len(specs)))
        versions = await _unless(stop, versions_of(specs))
        round_trips = {
            spec.url: await _unless(stop, round_trip_ns(spec.url, adapter(spec.adapter).health)) for spec in specs
        }
        options = await _unless(stop, _options(parts, driver, gateway.url, specs))
        tell("sending")
        window = Window(driver.drain_s)
        ended = asyncio.ensure_future(gateway.wait())
        ended.add_done_callback(lambda _: window.set())
        stopping = asyncio.ensure_future(stop.wait())
        stopping.add_done_callback(lambda _: window.set())
        measured = await _generate(parts, driver, options, window)
        early = ended.result() if ended.done() else None  # nobody has told it to stop yet
        stopping.cancel()
    told = None
    with suppress(OSError):
        told = msgspec.json.decode((folder / SERVED).read_bytes(), type=Told)
    error = None
    if told is None or (early is not None and told.broken is None):
        code = await gateway.wait()
        how = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        when = "in the middle of the run" if early is not None else "at its end, without a word"
        error = EngineError(
            f"the gateway ended {when}, with {how}; the end of {gateway.log}:\n{gateway.tail()}".rstrip()
        )
    else:
        gateway.log.unlink(missing_ok=True)
    for name in (JOB, SERVED):
        (folder / name).unlink(missing_ok=True)
    return _Seen(measured, told, error, specs, versions, round_trips, stop.is_set(), window.cut)


_T = TypeVar("_T")


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T:
    """What ``work`` gives; it is cancelled and _InterruptedError raised as soon as ``stop`` is set."""
    doing, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([doing, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.wait([doing])
    if doing.cancelled():
        raise _InterruptedError
    return doing.result()


class Window(asyncio.Event):
    """Set when the generator is to stop: by whoever sets it, or ``drain_s`` after the last arrival of an open loop.

    The generator waits for it from its start on, and that is where instants of the load count from.
    """

    def __init__(self, drain_s: float) -> None:
        super().__init__()
        self.cut = False
        self._drain_s = drain_s
        self._start_s: float | None = None
        self._last_s: float | None = None

    async def wait(self) -> Literal[True]:
        self._start_s = asyncio.get_running_loop().time()
        self._arm()
        return await super().wait()

    def last_arrival(self, at_ns: int) -> None:
        """The load has no arrival after this instant (ns)."""
        self._last_s = at_ns / 1e9
        self._arm()

    def _arm(self) -> None:
        if self._start_s is not None and self._last_s is not None:
            asyncio.get_running_loop().call_at(self._start_s + self._last_s + self._drain_s, self._close)

    def _close(self) -> None:
        self.cut = not self.is_set()
        self.set()


class _Watched:
    """An open loop; ``window`` is told when its last arrival is known."""

    def __init__(self, load: ColumnLoad, window: Window) -> None:
        self._load = load
        self._window = window

    def columns(self) -> Iterator[Arrivals]:
        last = 0
        for batch in self._load.columns():
            if len(batch.at):
                last = int(batch.at[-1])
            yield batch
        self._window.last_arrival(last)


async def _generate(parts: Parts, driver: LiveDriverConfig, options: Options, window: Window) -> Measured:
    if not isinstance(parts.load, ColumnLoad):
        return await generate(parts.load, options, stop=window)
    load = _Watched(parts.load, window)
    if driver.processes == 1:
        return await generate(load, options, stop=window)
    return await run_processes(load, options, driver.processes, stop=window)


# --- engines ---------------------------------------------------------------------------------------------------------


async def _engines(
    parts: Parts, driver: LiveDriverConfig, running: AsyncExitStack, heads: dict[int, str]
) -> list[EngineSpec]:
    """Every engine of the cluster, up: emulated ones are started, and their process ids and names added to ``heads``."""
    groups = [group for group in parts.config.cluster.devices for _ in range(group.count)]
    joined = {
        number: maker(0).joined()
        for number, (group, maker) in enumerate(zip(groups, device_makers(parts), strict=True))
        if group.operator is None  # functions are called by the gateway itself
    }
    if driver.engines:
        urls = iter(driver.engines)
        return [engine_spec(each, next(urls), number, driver) for number, engines in joined.items() for each in engines]
    starting = [asyncio.ensure_future(_emulated(number, groups[number], running, heads)) for number in joined]
    try:
        urls_of = await asyncio.gather(*starting)
    except BaseException:
        for each in starting:
            each.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        raise
    return [
        engine_spec(each, url, number, driver)
        for url, (number, engines) in zip(urls_of, joined.items(), strict=True)
        for each in engines
    ]


async def _emulated(number: int, group: DeviceConfig, running: AsyncExitStack, heads: dict[int, str]) -> str:
    """Start the emulated engines of a device; their URL."""
    port = _free_port()
    command = [sys.executable, "-m", "sage_bench", "llm", "serve", "--port", str(port)]
    if group.llm is not None:
        command += ["--llm-config", msgspec.json.encode(group.llm).decode(), "--model", group.llm.pool]
    if group.embed is not None:
        command += ["--embed-config", msgspec.json.encode(group.embed).decode(), "--embed-model", group.embed.pool]
    engine = await EngineProcess.start(f"engine-{number}", command, port=port, timeout_s=HEALTHY_S)
    running.push_async_callback(engine.stop)
    heads[engine.pid] = engine.name
    return engine.url


def engine_spec(joined: ReplicaJoined, url: str, number: int, driver: LiveDriverConfig) -> EngineSpec:
    """An engine as the gateway is told of it; what it is expected to cost is what the simulated one would say."""
    pool = joined.pool
    upstream = driver.models.get(pool, "")
    return EngineSpec(
        url,
        pool,
        PoolKind(joined.pool_kind),
        driver.adapters.get(pool, "vllm"),
        f"{joined.node}-{number}-{pool}",
        pool,
        upstream,
        joined.node,
        number,
        joined.tasks_max,
        joined.batch_tokens_max,
        joined.kv_tokens_max,
        False,
        None,
        joined.fixed_ns,
        joined.input_token_ns,
        joined.output_token_ns,
        joined.output_seq_ns,
    )


async def _all_healthy(gateway: str, count: int) -> None:
    """Wait until the gateway has found every engine healthy. EngineError naming those that are not."""
    deadline = time.monotonic() + HEALTHY_S
    while True:
        told = await asyncio.to_thread(_get, f"{gateway}/v1/management/engines")
        missing = [
            f"{each['name']} ({each['why'] or each['state']})" for each in told["data"] if each["state"] != "healthy"
        ]
        if not missing and len(told["data"]) == count:
            return
        if time.monotonic() > deadline:
            raise EngineError(f"engines not healthy after {HEALTHY_S:g} s: {', '.join(missing)}")
        await asyncio.sleep(0.1)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5.0) as answer:
        return json.load(answer)


# --- the load --------------------------------------------------------------------------------------------------------


async def _options(parts: Parts, driver: LiveDriverConfig, url: str, specs: Sequence[EngineSpec]) -> Options:
    config = parts.config
    pools = {spec.pool: spec.kind for spec in specs}

    def prompts(overhead: int | None) -> Prompts:
        if driver.tokenizer is None:
            made = estimated(seed=config.seed, overhead=overhead or 0)
            made.exact = not driver.engines  # an emulated engine takes our word for it
            return made
        return with_tokenizer(Path(driver.tokenizer), seed=config.seed, overhead=overhead)

    models = {name: Model(pool, prompts(0)) for name, pool in _served(parts, pools).items()}
    options = Options(
        url,
        models,
        stream=driver.stream,
        fixed_lengths=driver.exact_output,
        chunk_times=True,
        warmup_s=config.warmup_s,
    )
    if driver.tokenizer is None:
        return options
    measured = {}
    for name, model in models.items():
        if name in parts.declared:  # its prompt is a stage's; what the client sends is a part of that
            measured[name] = model
            continue
        kind = KIND_OF[name.partition("@")[0]]
        engine = next(spec for spec in specs if spec.pool == model.name)  # not by the gateway: it would be in the log
        there = Model(engine.upstream_model or model.name, model.prompts)
        direct = replace(options, url=engine.url, models={name: there})
        measured[name] = Model(model.name, prompts(await measure_overhead(direct, name, kind)))
    return replace(options, models=measured)


def _load_began(seen: _Seen) -> int:
    """On the gateway's clock, ns; 0 where the gateway cannot tell any more."""
    return 0 if seen.told is None else seen.measured.start_ns - seen.told.origin_ns


def _window(parts: Parts, seen: _Seen) -> tuple[int, int]:
    """What counts, as in a simulation: from the end of the load's warm-up to the begin of its cool-down, on the gateway's clock."""
    began, cooldown_at = _load_began(seen), cooldown_begins(parts)
    return began + seconds(parts.config.warmup_s), NEVER if cooldown_at == NEVER else began + cooldown_at


def _on_gateway_clock(seen: _Seen) -> NDArray[np.int64]:
    """The client's instants counted from the gateway's start, as those of the other tables; from the start of the load
    where the gateway cannot tell any more."""
    shift = _load_began(seen)
    rows = seen.measured.rows.copy()
    for name in ("scheduled_ns", "sent_ns", "first_token_ns", "ended_ns"):
        column = rows[:, FIELDS.index(name)]
        column[column >= 0] += shift
    return rows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
