"""``sage gateway``: start one, manage its keys."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from sage_bench.cli.gateway_keys import key_app
from sage_bench.compose import make_plane
from sage_bench.config import checked, composed
from sage_bench.discovery import model_of, versions_of
from sage_bench.live_manifest import Started, version, write_live_manifest
from sage_bench.pipelines.file import read_pipeline
from sage_bench.run import discard, prepare, unused
from sage_bench.serving import EngineConfig, Serving, parse_engine, read_engines, serve, with_names
from sage_core.errors import ConfigError
from sage_live.gateway.app import Gateway, GatewayConfig
from sage_live.gateway.keyfile import default_path
from sage_live.gateway.keys import ApiKeys
from sage_live.gateway.logs import AccessLog
from sage_live.gateway.rate import Limits as RateLimit
from sage_live.gateway.rate import RateLimits
from sage_live.gateway.tracing import otlp_tracer
from sage_live.health import HealthConfig
from sage_live.http.limits import Limits
from sage_live.ports import choose_port
from sage_live.service import ServiceConfig

app = typer.Typer(no_args_is_help=True, help="Serve OpenAI's API from engines, with the control plane in between.")
app.add_typer(key_app, name="key")

GROUPS = ("policy", "slo", "attempts_max", "mechanism", "seed", "record", "name", "results")
"""Keys of a run's configuration that mean something to a gateway."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def start(
    context: typer.Context,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="An engine: URL[,model=NAME][,kind=embedding][,adapter=NAME]...; may be repeated."),
    ] = None,
    engines: Annotated[Path | None, typer.Option(help="A YAML list of engines (docs/gateway.md).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: SAGE_GATEWAY_PORT, 8888, or the next free one.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys (`sage gateway key add`).")] = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Serve anybody, even beyond this machine.")] = False,
    rpm: Annotated[int | None, typer.Option(help="Requests a minute per tenant.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Tokens a minute per tenant.")] = None,
    live_max: Annotated[int, typer.Option(help="Live requests; above it clients get 503.")] = 10_000,
    request_s: Annotated[float, typer.Option(help="Seconds a request may take in all.")] = 600.0,
    body_max: Annotated[int, typer.Option(help="Bytes of a request body; above it 413.")] = 16 * 1024 * 1024,
    grace_s: Annotated[float, typer.Option(help="Seconds for live requests at shutdown.")] = 30.0,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for engines whose model must be asked.")] = 0.0,
    health: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A rule of docs/health.md, as in interval_s=1; may be repeated."),
    ] = None,
    access_log: Annotated[str | None, typer.Option(help="JSON lines to this file; - for standard error.")] = None,
    otlp: Annotated[str | None, typer.Option(help="OpenTelemetry collector, http://HOST:PORT/v1/traces.")] = None,
    pipeline: Annotated[
        list[str] | None,
        typer.Option(
            help="A pipeline to serve as a model: a name or a YAML file (docs/pipelines.md); may be repeated."
        ),
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(metavar="POOL=MODEL", help="Who does the work of a pipeline's pool; may be repeated."),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="An index of a pipeline (`sage index build`); may be repeated."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="A folder for log and rows: `sage replay`, `sage whatif`.")
    ] = None,
) -> None:
    """Serve. Further arguments choose policy and objectives as in `sage run`: policy=hybrid slo=interactive ..."""
    foreign = [arg for arg in context.args if arg.lstrip("+~").split("=")[0].split(".")[0].split("/")[0] not in GROUPS]
    if foreign:
        raise ConfigError(f"{foreign[0]}: not for a gateway; it takes {', '.join(GROUPS)} (GROUP=CHOICE or key=value)")
    for option, value, low, high in (
        ("--port", port or 0, 0, 65535),
        ("--live-max", live_max, 1, 10_000_000),
        ("--request-s", request_s, 0.001, 1e6),
        ("--body-max", body_max, 1, 2**31 - 1),
        ("--grace-s", grace_s, 0, 1e6),
        ("--wait-s", wait_s, 0, 1e6),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{option}: expected {low:,g} to {high:,}, got {value}")
    if otlp is not None and not re.match(r"https?://[^/\s]+", otlp):
        raise ConfigError(f"--otlp: expected a URL such as http://127.0.0.1:4318/v1/traces, got {otlp!r}")
    composed_ = composed(["driver=live", "load=clients", *context.args])
    if pipeline:
        pools = pairs("--pool", pool or [])
        composed_["pipeline"] = {"pipelines": [_with_pools(read_pipeline(each), pools) for each in pipeline]}
    elif pool or index:
        raise ConfigError(f"{'--pool' if pool else '--index'}: is for a pipeline; say which one with --pipeline")
    config, plain = checked(composed_)
    make_plane(config)  # a wrong parameter of the policy is told before anything is asked or written
    listed = [*(read_engines(engines) if engines else []), *map(parse_engine, engine or [])]
    if host not in LOOPBACK and keys is None and not no_keys:
        raise ConfigError(
            f"--host {host}: anybody who reaches it could use the engines; add --keys {default_path(os.environ)} "
            "(`sage gateway key add TENANT`), or --no-keys if that is meant"
        )
    origin_ns = time.time_ns()
    api_keys = None if keys is None else ApiKeys(keys)
    specs = with_names([each.spec(each.model or _model(each, wait_s), os.environ) for each in listed])
    if record is not None:
        unused(record)
    serving = Serving(
        GatewayConfig(
            host, choose_port("gateway") if port is None else port, grace_s, version(), Limits(body_bytes_max=body_max)
        ),
        ServiceConfig(live_max, request_s),
        _health(health or []),
        specs,
        api_keys,
        RateLimits(RateLimit(rpm, tpm), None if api_keys is None else api_keys.limits),
        None if access_log is None else AccessLog(None if access_log == "-" else Path(access_log), origin_ns),
        None if otlp is None else otlp_tracer(otlp, origin_ns, version()),
        {"policy": config.policy, "slo": config.slo, "engines": [each.url for each in specs]},
        record,
        {name: Path(folder) for name, folder in pairs("--index", index or []).items()},
        _note,
    )
    started = Started.now()
    if record is not None:
        prepare(record, plain)
    listening = False

    def ready(gateway: Gateway, port: int) -> None:
        nonlocal listening
        listening = True
        _ready(gateway, port)

    try:
        served = serve(config, serving, ready)
    finally:
        if record is not None and not listening:
            discard(record)
    if record is not None:
        versions = asyncio.run(versions_of(served.engines))
        write_live_manifest(record, config, plain, served, started, versions=versions, source="live")
    counts = served.counts
    print(
        f"served {counts['arrived']:,} requests in {served.duration_ns / 1e9:,.1f} s: {counts['responded']:,} responded, "
        f"{counts['rejected']:,} rejected, {counts['cancelled']:,} cancelled, {counts['failed']:,} failed; "
        f"digest {served.digest.hex()}",
        flush=True,
    )
    if served.broken is not None:
        raise served.broken


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` of a repeated option. ConfigError for anything else."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{option} {text}: expected KEY=VALUE")
        found[key] = value
    return found


def _with_pools(plain: dict[str, Any], pools: dict[str, str]) -> dict[str, Any]:
    return plain | {"pools": {**plain.get("pools", {}), **pools}}


def _health(given: Sequence[str]) -> HealthConfig:
    rules: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--health {text}: expected KEY=VALUE, as in interval_s=1")
        rules[key] = value
    try:
        return msgspec.convert(rules, HealthConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--health: {error}") from error


def _model(engine: EngineConfig, wait_s: float) -> str:
    key = None if engine.api_key_env is None else os.environ.get(engine.api_key_env)
    return model_of(engine.url, wait_s=wait_s, api_key=key)


def _ready(gateway: Gateway, port: int) -> None:
    host = gateway.config.host
    print(
        f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1, policy {gateway.service.policy}, "
        f"{len(gateway.service.watches)} engines; Ctrl-C drains and stops",
        flush=True,
    )


def _note(engine: str, state: str, why: str) -> None:
    text = f"engine {engine}: {state}{f' ({why})' if why else ''}"
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
