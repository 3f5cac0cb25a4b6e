"""``sage llm serve``: a real vLLM, or an engine emulated from a profile, behind OpenAI's API."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer

from sage_bench.config import EmbedConfig, LlmConfig
from sage_bench.emulate import DIMENSIONS, emulation
from sage_core.errors import ConfigError
from sage_live.ports import choose_port, is_free
from sage_live.processes import vllm_command
from sage_live.servers.emulated import Behaviour, EmulatedServer
from sage_live.servers.run import serve_until_stopped

app = typer.Typer(help="LLM engines: serve one, real or emulated.", no_args_is_help=True)

CONTEXT: Final = {"ignore_unknown_options": True}
"""Options that are not ours are the engine's."""

_ALIASES: Final = {
    "enable_prefix_caching": "prefix_caching",
    "enable_chunked_prefill": "chunked_prefill",
    "scheduling_policy": "scheduling",
}
"""vLLM's name of an option to ours, where they differ."""


@app.command("serve", context_settings=CONTEXT)
def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [ENGINE OPTIONS]",
            help="A model for vLLM and vLLM's own options; or, with --emulate, options of cluster.devices[].llm.",
        ),
    ] = None,
    emulate: Annotated[str, typer.Option(metavar="PROFILE", help="Emulate an engine; see `sage profile list`.")] = "",
    model: Annotated[str | None, typer.Option(help="Name to serve under; default: the profile's model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: SAGE_LLM_PORT, 8001, 8901.")] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Emulated engines, on successive ports.")] = 1,
    llm_config: Annotated[str, typer.Option(help="The engine as JSON, as in cluster.devices[].llm.")] = "",
    embed_profile: Annotated[str, typer.Option(help="Emulate an embedding engine on the same device.")] = "",
    embed_config: Annotated[str, typer.Option(help="It as JSON, as in cluster.devices[].embed.")] = "",
    embed_model: Annotated[str | None, typer.Option(help="Its name; default: the profile's model.")] = None,
    dimensions: Annotated[int, typer.Option(min=1, max=65536, help="Of its vectors.")] = DIMENSIONS,
    output_tokens_mean: Annotated[int, typer.Option(min=1, help="Where a client leaves the end to the model.")] = 128,
    stream_interval: Annotated[int, typer.Option(min=1, help="Least tokens of a stream's event.")] = 1,
    flush_ms: Annotated[float, typer.Option(min=0, help="Least time between two events of a stream.")] = 1.0,
    slow: Annotated[float, typer.Option(min=0.001, help="Fault: every time of the model so many times longer.")] = 1.0,
    hang_after: Annotated[int | None, typer.Option(min=0, help="Fault: answer so many requests and no more.")] = None,
    fail_rate: Annotated[float, typer.Option(min=0, max=1, help="Fault: share of requests that get a 500.")] = 0.0,
) -> None:
    """Serve an LLM in the foreground until Ctrl-C: `sage llm serve MODEL`, or `sage llm serve --emulate PROFILE`."""
    arguments = arguments or []
    if not (emulate or llm_config or embed_profile or embed_config):
        _serve_vllm(arguments, host, port)
    llm = _llm(emulate, llm_config, arguments)
    emulated = emulation(
        llm,
        _config(embed_config, {"profile": embed_profile} if embed_profile else {}, EmbedConfig, "--embed-config"),
        model=model,
        embed_model=embed_model,
        dimensions=dimensions,
    )
    behaviour = Behaviour(output_tokens_mean, stream_interval, round(flush_ms * 1e6), slow, hang_after, fail_rate)
    served = [each.model for each in (emulated.llm, emulated.embedding) if each is not None]

    async def start() -> list[EmulatedServer]:
        servers = []
        for each in _ports(host, port, count):
            server = await EmulatedServer.start(
                emulated.make,
                llm=emulated.llm,
                embedding=emulated.embedding,
                behaviour=behaviour,
                host=host,
                port=each,
            )
            servers.append(server)
            print(f"http://{host}:{server.port} emulates {' and '.join(served)}", flush=True)
        return servers

    serve_until_stopped(start)


def _serve_vllm(arguments: list[str], host: str, port: int | None) -> None:
    """Become vLLM: signals and the exit code are its own."""
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("expected a model (`sage llm serve MODEL`), or --emulate PROFILE")
    command = vllm_command(
        arguments[0], host=host, port=choose_port("llm") if port is None else port, arguments=arguments[1:]
    )
    os.execv(command[0], command)


def _ports(host: str, port: int | None, count: int) -> list[int]:
    if port is not None and port + count > 65536:
        raise ConfigError(f"--port, --count: {count} ports from {port} on end beyond 65535")
    if port is not None:
        return [port + n if port else 0 for n in range(count)]
    ports = [choose_port("llm")]
    while len(ports) < count:
        ports.append(next(each for each in range(ports[-1] + 1, 65536) if is_free(each, host)))
    return ports


def _llm(profile: str, text: str, arguments: Sequence[str]) -> LlmConfig | None:
    given: dict[str, Any] = {"profile": profile} if profile else {}
    options = _options(arguments)
    if not (given or text):
        if options:
            raise ConfigError(f"--{next(iter(options))}: is for an LLM engine; say which with --emulate PROFILE")
        return None
    return _config(text, given | options, LlmConfig, "--llm-config")


def _options(arguments: Sequence[str]) -> dict[str, str | bool]:
    """``--max-num-seqs 64 --no-prefix-caching`` by the names of LlmConfig."""
    options: dict[str, str | bool] = {}
    left = list(arguments)
    while left:
        first = left.pop(0)
        if not first.startswith("--"):
            raise ConfigError(f"expected an option of the engine, got {first!r}")
        name, equals, value = first[2:].partition("=")
        key = name.replace("-", "_")
        if equals or (left and not left[0].startswith("--")):
            known, worth = key, value if equals else left.pop(0)
            options[_key(known, name)] = worth
        else:
            options[_key(key.removeprefix("no_"), name)] = not key.startswith("no_")
    return options


def _key(key: str, option: str) -> str:
    key = _ALIASES.get(key, key)
    known = list(LlmConfig.__struct_fields__)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean --{close[0].replace('_', '-')}?" if close else f"known: {', '.join(known)}"
        raise ConfigError(f"--{option}: an emulated engine has no such option; {hint}")
    return key


_Config = TypeVar("_Config", LlmConfig, EmbedConfig)


def _config(text: str, given: dict[str, Any], kind: type[_Config], option: str) -> _Config | None:
    """From JSON, and options over it; None where nothing is given."""
    if not (text or given):
        return None
    try:
        return msgspec.convert((msgspec.json.decode(text) if text else {}) | given, kind, strict=False)
    except (msgspec.ValidationError, TypeError) as error:
        what, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`")
        raise ConfigError(f"--{key.replace('_', '-')}: {what}" if key else f"{option}: {what}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{option}: expected a JSON object: {error}") from error
