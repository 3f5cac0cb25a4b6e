"""Which port a service of this machine gets: the registry's rules (sage_core.ports), asked of the operating system."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from sage_core.ports import choose, is_wsl2


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def choose_port(service: str) -> int:
    """The port of ``service``: its environment variable, its own, the alternative, or the next free one. ConfigError."""
    try:
        wsl2 = is_wsl2(Path("/proc/version").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        wsl2 = False
    return choose(service, os.environ, is_free, wsl2=wsl2)
