"""A port for each engine of this machine."""

from __future__ import annotations

import os
import socket

from sage_core.errors import ConfigError
from sage_core.ports import FALLBACKS_MAX, SERVICES, choose, override
from sage_live.ports import is_free


class EnginePorts:
    """By the registry's rules (sage_core.ports), and never one that was given to an engine which may still want it: an
    engine takes seconds to listen on its port."""

    def __init__(self) -> None:
        self._given: set[int] = set()

    def take(self, service: str) -> int:
        """Free now, and not given. ConfigError where there is none."""
        port = self._choose(service)
        self._given.add(port)
        return port

    def release(self, port: int) -> None:
        """Its engine has ended."""
        self._given.discard(port)

    def _choose(self, service: str) -> int:
        if service not in SERVICES:
            return any_port()
        first = override(service, os.environ)
        if first is None:
            return choose(service, os.environ, self._free)
        # A job has several engines: the variable says where their ports begin.
        last = min(first + FALLBACKS_MAX, 65535)
        for port in range(first, last + 1):
            if self._free(port):
                return port
        raise ConfigError(f"no free port for {service!r} in {first}-{last}; stop what holds them")

    def _free(self, port: int) -> bool:
        return port not in self._given and is_free(port)


def any_port(host: str = "127.0.0.1") -> int:
    """One that the operating system says is free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
