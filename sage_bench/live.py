"""A live run: engines, a gateway, a load generator, and the same folder of results as a simulated one.

Engines are emulated as ``cluster.devices`` says, or are real ones at the URLs of ``driver.engines``; then the devices
describe them, for the policy's expectations and for the simulation of the same run. Latencies count from the scheduled
arrivals of the generator; log and rows are the gateway's, ``client.parquet`` is what the generator saw.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import uvloop
from numpy.typing import NDArray
from omegaconf import DictConfig

from sage_bench.compose import Parts, device_makers, make_parts, price_per_h
from sage_bench.config import DeviceConfig, LiveDriverConfig, checked
from sage_bench.gateway_process import JOB, SERVED, Job, Told
from sage_bench.live_manifest import Started, write_live_manifest
from sage_bench.run import prepare, run_id
from sage_core.errors import ConfigError, EngineError
from sage_core.events import ReplicaJoined
from sage_core.load import ColumnLoad
from sage_core.units import PoolKind, RequestKind
from sage_live.adapters import adapter
from sage_live.http_engine import EngineSpec
from sage_live.loadgen.generator import Measured, generate
from sage_live.loadgen.options import Model, Options
from sage_live.loadgen.overhead import measure_overhead
from sage_live.loadgen.processes import run_processes
from sage_live.loadgen.prompts import Prompts, estimated, with_tokenizer
from sage_live.loadgen.schema import FIELDS, client_table, write_client
from sage_live.loadgen.summary import Summary, summary
from sage_live.processes import EngineProcess
from sage_live.round_trip import round_trip_ns

HEALTHY_S: Final = 60.0
"""What engines that are up may take to be found healthy by the gateway."""

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
    stays."""
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
    measured, told, specs, versions, round_trips, interrupted = uvloop.run(_measure(parts, config.driver, folder, tell))
    verdict = summary(measured, fixed_lengths=config.driver.exact_output)
    write_client(
        folder / "client.parquet",
        client_table(_on_gateway_clock(measured, told), measured.gaps, round(config.warmup_s * 1e9)),
    )
    write_live_manifest(
        folder,
        config,
        plain,
        told.served(),
        started,
        source="live" if config.driver.engines else "emulated",
        status="interrupted" if interrupted else "complete",
        specs=specs,
        versions=versions,
        round_trips=round_trips,
        rate=getattr(parts.load, "rate", None),
        overrides=overrides,
        profiles=parts.profiles,
        price_per_h=price_per_h(config, parts.profiles),
        generator=verdict.as_dict(),
        invalid=verdict.invalid,
    )
    return LiveResult(folder, told, verdict, interrupted, parts.warnings, time.perf_counter() - wall)


def _fresh(folder: Path) -> Path:
    """``folder``, or it with a number: what was measured is not measured again by measuring once more."""
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    return next(each for each in itertools.chain([folder], names) if not each.exists())


def _check(parts: Parts, driver: LiveDriverConfig) -> None:
    """What a live run cannot do, asked before anything is written or started."""
    engines = [engine for group in parts.config.cluster.devices for _ in range(group.count) for engine in group.engines]
    for index, group in enumerate(parts.config.cluster.devices):
        if group.operator is not None or group.disaggregated is not None or group.mps is not None:
            raise ConfigError(
                f"cluster.devices[{index}]: a live run has LLM and embedding engines; operator, disaggregated and mps are "
                "for simulations"
            )
    if driver.engines and len(driver.engines) != len(engines):
        raise ConfigError(
            f"driver.engines: cluster.devices has {len(engines)} engines, got {len(driver.engines)} URLs; one for each, "
            "in order"
        )
    if driver.processes > 1 and not isinstance(parts.load, ColumnLoad):
        raise ConfigError(
            "driver.processes: a closed loop runs in one process, because its users wait for their answers"
        )


async def _measure(
    parts: Parts, driver: LiveDriverConfig, folder: Path, tell: Tell
) -> tuple[Measured, Told, list[EngineSpec], dict[str, str], dict[str, int], bool]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    async with AsyncExitStack() as running:
        tell("starting engines")
        specs = await _engines(parts, driver, running)
        port = _free_port()
        (folder / JOB).write_bytes(msgspec.json.encode(Job(port, specs)))
        tell("starting the gateway")
        gateway = await EngineProcess.start(
            "gateway",
            [sys.executable, "-m", "sage_bench.gateway_process", str(folder)],
            port=port,
            logs=folder,
            timeout_s=HEALTHY_S,
            grace_s=120.0,
        )
        running.push_async_callback(gateway.stop)
        await _all_healthy(gateway.url, len(specs))
        round_trips = {spec.url: await round_trip_ns(spec.url, adapter(spec.adapter).health) for spec in specs}
        options = await _options(parts, driver, gateway.url, specs)
        tell("sending")
        measured = await _generate(parts, driver, options, stop)
        versions = {spec.url: await _version(spec.url) for spec in specs}
    try:
        told = msgspec.json.decode((folder / SERVED).read_bytes(), type=Told)
    except OSError as error:
        raise EngineError(f"the gateway ended without a word; the end of {gateway.log}:\n{gateway.tail()}") from error
    for name in (JOB, SERVED):
        (folder / name).unlink()
    gateway.log.unlink(missing_ok=True)
    return measured, told, specs, versions, round_trips, stop.is_set()


async def _generate(parts: Parts, driver: LiveDriverConfig, options: Options, stop: asyncio.Event) -> Measured:
    if driver.processes == 1:
        return await generate(parts.load, options, stop=stop)
    if not isinstance(parts.load, ColumnLoad):
        raise ConfigError(
            "driver.processes: a closed loop runs in one process, because its users wait for their answers"
        )
    return await run_processes(parts.load, options, driver.processes, stop=stop)


# --- engines ---------------------------------------------------------------------------------------------------------


async def _engines(parts: Parts, driver: LiveDriverConfig, running: AsyncExitStack) -> list[EngineSpec]:
    """Every engine of the cluster, up: emulated ones are started."""
    groups = [group for group in parts.config.cluster.devices for _ in range(group.count)]
    joined = [maker(0).joined() for maker in device_makers(parts)]
    if driver.engines:
        urls = iter(driver.engines)
        return [
            engine_spec(each, next(urls), number, driver) for number, engines in enumerate(joined) for each in engines
        ]
    starting = [asyncio.ensure_future(_emulated(number, group, running)) for number, group in enumerate(groups)]
    try:
        urls_of = await asyncio.gather(*starting)
    except BaseException:
        for each in starting:
            each.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        raise
    return [
        engine_spec(each, url, number, driver)
        for number, (url, engines) in enumerate(zip(urls_of, joined, strict=True))
        for each in engines
    ]


async def _emulated(number: int, group: DeviceConfig, running: AsyncExitStack) -> str:
    """Start the emulated engines of a device; their URL."""
    port = _free_port()
    command = [sys.executable, "-m", "sage_bench", "llm", "serve", "--port", str(port)]
    if group.llm is not None:
        command += ["--llm-config", msgspec.json.encode(group.llm).decode(), "--model", group.llm.pool]
    if group.embed is not None:
        command += ["--embed-config", msgspec.json.encode(group.embed).decode(), "--embed-model", group.embed.pool]
    engine = await EngineProcess.start(f"engine-{number}", command, port=port, timeout_s=HEALTHY_S)
    running.push_async_callback(engine.stop)
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


async def _version(url: str) -> str:
    """What the engine says it is."""
    with suppress(OSError, ValueError):
        told = await asyncio.to_thread(_get, f"{url}/version")
        return str(told.get("version", "unknown"))
    return "unknown"


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

    models = {}
    for name, pipeline in parts.pipelines.items():
        pool = pipeline.stages[0].op.pool
        for asked in {pool, *pools}:
            if asked in pools and (pools[asked] is PoolKind.EMBEDDING) == (name == "embed"):
                models[f"{name}@{asked}"] = Model(asked, prompts(0))
                if asked == pool:
                    models[name] = models[f"{name}@{asked}"]
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
        kind = KIND_OF[name.partition("@")[0]]
        engine = next(spec for spec in specs if spec.pool == model.name)  # not by the gateway: it would be in the log
        there = Model(engine.upstream_model or model.name, model.prompts)
        direct = replace(options, url=engine.url, models={name: there})
        measured[name] = Model(model.name, prompts(await measure_overhead(direct, name, kind)))
    return replace(options, models=measured)


def _on_gateway_clock(measured: Measured, told: Told) -> NDArray[np.int64]:
    """The client's instants counted from the gateway's start, as those of the other tables."""
    shift = measured.start_ns - told.origin_ns
    rows = measured.rows.copy()
    for name in ("scheduled_ns", "sent_ns", "first_token_ns", "ended_ns"):
        column = rows[:, FIELDS.index(name)]
        column[column >= 0] += shift
    return rows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
