"""What a load generator is told beside its load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

from sage_core.errors import ConfigError
from sage_core.slo import SloTable
from sage_live.loadgen.prompts import Prompts


class Address(NamedTuple):
    """Where requests go. base: path before ``/v1``, without a slash at its end."""

    host: str
    port: int
    base: str


@dataclass(frozen=True, slots=True)
class Model:
    """The served model that a pipeline asks for, and prompts for it."""

    name: str
    prompts: Prompts


@dataclass(frozen=True, slots=True)
class Options:
    """url: of the gateway or engine, with or without ``/v1``. models: by pipeline.

    stream: chat and generate are streamed. fixed_lengths: each answer has exactly the load's output tokens (``ignore_eos``
    and ``min_tokens``, which vLLM and its relatives know); otherwise the load's cap is ``max_tokens`` and the model ends
    where it wants. chunk_times: keep the gaps between chunks. warmup_s: requests scheduled before are sent and marked.
    timeout_s: after that an answer is given up. connections: opened before the start. idle_s: an idle connection is not
    used again after that; below what servers allow (5 s is common), so that a request never meets one being closed.
    body: more fields of request bodies, by kind (chat, generate, embedding). api_key: sent as a bearer token.
    """

    url: str
    models: Mapping[str, Model]
    stream: bool = True
    fixed_lengths: bool = False
    chunk_times: bool = False
    warmup_s: float = 0.0
    timeout_s: float = 600.0
    connections: int = 8
    idle_s: float = 3.0
    body: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    api_key: str | None = None

    def __post_init__(self) -> None:
        self.address()
        for name in ("warmup_s", "timeout_s", "connections", "idle_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        for kind in self.body:
            if kind not in SloTable.KINDS:
                raise ConfigError(f"body: unknown kind {kind!r}; expected one of {', '.join(SloTable.KINDS)}")
        header_safe("api_key", self.api_key or "")

    def address(self) -> Address:
        """``url`` taken apart."""
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme != "http" or not parts.hostname or (port is None and ":" in parts.netloc.rpartition("]")[2]):
            raise ConfigError(
                f"url: expected http://HOST:PORT, got {self.url!r}; load is generated in plain HTTP, so that the cost of "
                "encryption is not measured with it"
            )
        return Address(parts.hostname, port or 80, header_safe("url", parts.path.rstrip("/").removesuffix("/v1")))


def header_safe(name: str, value: str) -> str:
    """``value`` if it may stand in a head of a request: printable ASCII, so nothing can add a header of its own."""
    if not (value.isascii() and (value.isprintable() or not value)):
        raise ConfigError(f"{name}: expected printable ASCII, because it is sent in an HTTP header; got {value!r}")
    return value
