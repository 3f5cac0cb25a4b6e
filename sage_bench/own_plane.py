"""A control plane in the process of whoever asks, instead of in a gateway: from configuration to a transport.

Its engines run already, or are emulated here, one server for each device of ``cluster.devices``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from sage_bench.compose import device_makers, make, make_parts, make_plane
from sage_bench.config import LiveDriverConfig, RunConfig, checked, composed
from sage_bench.discovery import model_of
from sage_bench.emulate import emulation
from sage_bench.live import engine_spec
from sage_bench.live_manifest import Started, write_live_manifest
from sage_bench.results.manifest import Source
from sage_bench.run import prepare
from sage_bench.serving import EngineConfig, RecordedService, Served, deploy, parse_engine, recorder, with_names
from sage_core.errors import ConfigError, EngineError
from sage_core.slo import SloTable
from sage_live.client.inprocess import ServiceTransport
from sage_live.health import HealthConfig, State
from sage_live.http_engine import EngineSpec
from sage_live.servers.emulated import EmulatedServer
from sage_live.service import InferenceService, ServiceConfig

Chosen: TypeAlias = str | Mapping[str, Any]
"""A choice of a configuration group by name, or what such a file would say."""

Start: TypeAlias = Callable[[AsyncExitStack], Awaitable[list[EngineSpec]]]
"""Gives engines that run; what was started for them ends with the stack."""

REQUEST_S: Final = 600.0
"""What a request may take in all, where its caller is not more patient."""


def own_plane(
    engines: Sequence[EngineConfig | str] | None,
    cluster: str | None,
    policy: Chosen | None,
    slo: Chosen | None,
    overrides: Sequence[str],
    wait_s: float,
) -> OwnPlane:
    """Before ``engines``, or where there are none, before those of ``cluster``. ConfigError, DataError, EngineError."""
    config, plain = _configuration(cluster, policy, slo, overrides)
    if engines is not None:
        return OwnPlane(config, plain, _running(engines, wait_s), HealthConfig(), "live")
    # Devices of one pool may differ in a cluster, so a slow one is not a sick one.
    health = HealthConfig(scrape_s=config.cluster.report_interval_s or 1.0, slow_factor=0)
    return OwnPlane(config, plain, _emulated(config), health, "emulated")


@dataclass(frozen=True, slots=True)
class OwnPlane:
    """What it is made of. plain: the configuration as data, for the record."""

    config: RunConfig
    plain: dict[str, Any]
    engines: Start
    health: HealthConfig
    source: Source

    async def transport(self, record: Path | None, wait_s: float, request_s: float) -> ServiceTransport:
        """Engines, and a service before them: all of it ends when the transport is closed."""
        running = AsyncExitStack()
        try:
            specs = await self.engines(running)
            service = await self._service(running, record, specs, request_s)
            await _all_healthy(service, wait_s)
        except BaseException:
            await running.aclose()
            raise
        return ServiceTransport(service, running.aclose)

    async def _service(
        self, running: AsyncExitStack, record: Path | None, specs: Sequence[EngineSpec], request_s: float
    ) -> InferenceService:
        config = self.config
        slo = make("slo", config.slo)
        if not isinstance(slo, SloTable):
            raise ConfigError(f"slo._target_: expected sage_core.slo.SloTable, got {type(slo).__name__}")
        served: list[Served] = []
        if record is not None:
            prepare(record, self.plain)
            started = Started.now()

            def manifest() -> None:
                if served:
                    write_live_manifest(record, config, self.plain, served[0], started, source=self.source)

            running.callback(manifest)  # once the files below it are closed
        files = running.enter_context(contextlib.ExitStack())
        rows, tell = recorder(files, record, config, slo)
        service = RecordedService(
            make_plane(config),
            ServiceConfig(request_s=max(request_s, REQUEST_S)),
            slo=slo,
            health=self.health,
            record=tell,
        )

        async def end() -> None:
            await service.close("the client was closed")
            served.append(service.served(rows))
            if service.driver.broken is not None:
                raise service.driver.broken

        running.push_async_callback(end)
        for spec in specs:
            service.add_engine(spec)
        driver = config.driver
        assert isinstance(driver, LiveDriverConfig)
        deploy(service, config, {name: Path(folder) for name, folder in driver.indexes.items()})
        return service


def _configuration(
    cluster: str | None, policy: Chosen | None, slo: Chosen | None, overrides: Sequence[str]
) -> tuple[RunConfig, dict[str, Any]]:
    """Checked, and as plain data. ConfigError naming the key."""
    chosen = {"cluster": cluster, "policy": policy, "slo": slo}
    named = [f"{group}={choice}" for group, choice in chosen.items() if isinstance(choice, str)]
    config = composed(["driver=live", "load=clients", *named, *overrides])
    for group, choice in chosen.items():
        if isinstance(choice, Mapping):
            config[group] = dict(choice)
    return checked(config)


def _running(engines: Sequence[EngineConfig | str], wait_s: float) -> Start:
    """Engines at URLs; one that names no model is asked. ConfigError, EngineError."""
    specs = []
    for each in engines:
        engine = parse_engine(each) if isinstance(each, str) else each
        key = None if engine.api_key_env is None else os.environ.get(engine.api_key_env)
        specs.append(engine.spec(engine.model or model_of(engine.url, wait_s=wait_s, api_key=key), os.environ))
    if not specs:
        raise ConfigError("create: engines: expected at least one")

    named = with_names(specs)

    async def start(running: AsyncExitStack) -> list[EngineSpec]:
        return named

    return start


def _emulated(config: RunConfig) -> Start:
    """Those of ``cluster.devices``; a pool's name is its model's. ConfigError for what cannot be emulated."""
    groups = [group for group in config.cluster.devices for _ in range(group.count)]
    for index, group in enumerate(groups):
        if group.disaggregated is not None or group.mps is not None:
            raise ConfigError(
                f"cluster.devices: device {index} is not one of LLM and embedding engines that take turns, which is what "
                "can be emulated"
            )
    if config.cluster.faults:
        raise ConfigError("cluster.faults: are for simulations; an emulated cluster has none")
    makers = device_makers(make_parts(config))

    async def start(running: AsyncExitStack) -> list[EngineSpec]:
        specs = []
        for number, (group, maker) in enumerate(zip(groups, makers, strict=True)):
            if group.operator is not None:  # functions are called in this process
                continue
            llm, embed = group.llm, group.embed
            emulated = emulation(
                llm,
                embed,
                model=None if llm is None else llm.pool,
                embed_model=None if embed is None else embed.pool,
            )
            server = await EmulatedServer.start(emulated.make, llm=emulated.llm, embedding=emulated.embedding)
            running.push_async_callback(server.close)
            url = f"http://127.0.0.1:{server.port}"
            specs += [engine_spec(replica, url, number, LiveDriverConfig()) for replica in maker(0).joined()]
        return specs

    return start


async def _all_healthy(service: InferenceService, wait_s: float) -> None:
    """Give engines time to be found healthy; EngineError where a model has none after it."""
    deadline = asyncio.get_running_loop().time() + wait_s
    watches = service.watches.values()
    while any(watch.state is not State.HEALTHY for watch in watches):
        if asyncio.get_running_loop().time() >= deadline:
            break
        await asyncio.sleep(0.005)
    up = {watch.engine.spec.model for watch in watches if watch.state is State.HEALTHY}
    for watch in watches:
        if watch.engine.spec.model not in up:
            raise EngineError(
                f"engine {watch.engine.spec.url}: {watch.why or 'not healthy'} after {wait_s:g} s; start it first"
            )
