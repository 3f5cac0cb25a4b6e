"""Which TCP port each service listens on.

One registry, so that no two services are given the same port by default. Pure: the environment, the text of
``/proc/version`` and the question "is this port free?" are arguments, so the choice can be tested without a socket.
The live half asks the operating system.

Order of choice for a service: its environment variable, which is obeyed and never second-guessed; its ports in the
registry, in order; the next free port above them that belongs to nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum, unique
from typing import Final

from sage_core.errors import ConfigError

FALLBACKS_MAX: Final = 100
"""Ports tried above a service's own before giving up."""


@unique
class SagePorts(IntEnum):
    """Default ports."""

    GATEWAY_DEFAULT = 8888
    LLM_DEFAULT = 8001
    LLM_ALTERNATIVE = 8901  # where 8001 is taken, and first on WSL2, which shares low ports with Windows services
    EMBEDDING_DEFAULT = 8090


SERVICES: Final[Mapping[str, tuple[SagePorts, ...]]] = {
    "gateway": (SagePorts.GATEWAY_DEFAULT,),
    "llm": (SagePorts.LLM_DEFAULT, SagePorts.LLM_ALTERNATIVE),
    "embedding": (SagePorts.EMBEDDING_DEFAULT,),
}


def variable(service: str) -> str:
    """Environment variable that overrides the port of ``service``: ``SAGE_GATEWAY_PORT`` and so on."""
    return f"SAGE_{_known(service).upper()}_PORT"


def override(service: str, env: Mapping[str, str]) -> int | None:
    """The port that ``env`` sets for ``service``, ``None`` if it sets none.

    Raises ``ConfigError`` if the value is not a port number.
    """
    name = variable(service)
    text = env.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ConfigError(f"{name}: expected a port number from 1 to 65535, got {text!r}; correct or unset it")
    return int(text)


def choose(service: str, env: Mapping[str, str], is_free: Callable[[int], bool], *, wsl2: bool = False) -> int:
    """Port for ``service``.

    Raises ``ConfigError`` for an unknown service, an override that is no port number or is meant for another service,
    and when no port within ``FALLBACKS_MAX`` of its own is free.
    """
    reserved = {port: other for other in SERVICES if other != service for port in _claimed(other, env)}
    wanted = override(service, env)
    if wanted is not None:
        if wanted in reserved:
            raise ConfigError(
                f"{variable(service)}={wanted}: that is the port of {reserved[wanted]!r}; "
                f"choose another, or move {reserved[wanted]!r} with {variable(reserved[wanted])}"
            )
        return wanted
    own = SERVICES[service][::-1] if wsl2 else SERVICES[service]
    top = int(max(own))
    for port in (*own, *range(top + 1, top + 1 + FALLBACKS_MAX)):
        if port not in reserved and is_free(port):
            return int(port)
    raise ConfigError(
        f"no free port for {service!r}: tried {', '.join(str(int(port)) for port in own)} "
        f"and {top + 1}-{top + FALLBACKS_MAX}; stop what holds them or set {variable(service)}"
    )


def is_wsl2(proc_version: str) -> bool:
    """Whether the text of ``/proc/version`` is that of a WSL2 kernel (WSL1 has no virtual network, so no clash)."""
    text = proc_version.lower()
    return "wsl2" in text or "microsoft-standard" in text


def _claimed(service: str, env: Mapping[str, str]) -> tuple[int, ...]:
    """Ports nobody but ``service`` may be given: its override, or else its own in the registry."""
    moved = override(service, env)
    return SERVICES[service] if moved is None else (moved,)


def _known(service: str) -> str:
    if service not in SERVICES:
        raise ConfigError(f"unknown service {service!r}: expected one of {', '.join(SERVICES)}")
    return service
