"""An HTTP/1.1 server for answers that come later: callbacks, no Task and no Future a request."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from email.utils import formatdate
from typing import TypeAlias

from sage_core.errors import ConfigError
from sage_live.http.connection import ServerConnection
from sage_live.http.limits import Limits
from sage_live.http.request import Request
from sage_live.http.wire import REASONS, header_lines

__all__ = ["Handler", "HttpServer", "Limits", "Request"]

Handler: TypeAlias = Callable[[Request], None]

_log = logging.getLogger(__name__)

_TARGETS_MAX, _TARGET_BYTES_MAX = 1024, 256
"""Of the request targets whose decoding is remembered."""

_HEADS_MAX = 256
"""Of the answer heads that are remembered."""


def error_json(status: int, message: str) -> bytes:
    """The body of an error that nobody else words."""
    return json.dumps({"error": {"message": message, "code": status}}).encode()


def log_failure(request: Request, error: Exception) -> None:
    """A handler raised."""
    _log.error("%s %s: the handler failed", request.method, request.path, exc_info=error)


class HttpServer:
    """Made by :meth:`start`."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        error_body: Callable[[int, str], bytes],
        on_failure: Callable[[Request, Exception], None],
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.error_body = error_body
        self.loop = asyncio.get_running_loop()
        self.tick = 0
        """Seconds since the start, as counted by the sweep."""
        self.draining = False
        self.port = 0
        self.targets: dict[bytes, tuple[str, str]] = {}
        """Request target to path and query."""
        self._on_failure = on_failure
        self._connections: dict[ServerConnection, None] = {}
        self._heads: dict[tuple[int, bytes, bytes], bytes] = {}
        self._date = formatdate(usegmt=True).encode()
        self._listener: asyncio.Server | None = None
        self._empty: asyncio.Future[None] | None = None
        self._timer = self.loop.call_later(1.0, self._sweep)

    @classmethod
    async def start(
        cls,
        handler: Handler,
        host: str,
        port: int,
        *,
        limits: Limits | None = None,
        error_body: Callable[[int, str], bytes] = error_json,
        on_failure: Callable[[Request, Exception], None] = log_failure,
    ) -> HttpServer:
        """Listen. ``handler`` is called in the loop's thread with every request whose body is complete; it may answer
        then or later. If it raises, ``on_failure`` is told and the client gets a 500.

        Args:
            port: 0 for any free one.
            error_body: the JSON of an answer that this level gives, from its status and message.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        server = cls(handler, limits or Limits(), error_body, on_failure)
        try:
            server._listener = await server.loop.create_server(
                lambda: ServerConnection(server), host, port, backlog=1024
            )
        except OSError as error:
            server._timer.cancel()
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another address or port"
            ) from error
        server.port = server._listener.sockets[0].getsockname()[1]
        return server

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def close(self, grace_s: float = 0.0) -> None:
        """Accept no more, let what is in progress finish for up to ``grace_s`` seconds, then cut it."""
        if self._listener is not None:
            self._listener.close()
        self.draining = True
        for connection in tuple(self._connections):
            connection.drain()
        await self._until_empty(grace_s)
        for connection in tuple(self._connections):
            connection.abort()
        await self._until_empty(1.0)
        self._timer.cancel()

    # --- for the connections --------------------------------------------------------------------------------------

    def admit(self, connection: ServerConnection) -> bool:
        """Whether there is room for one more. It is counted either way."""
        self._connections[connection] = None
        return len(self._connections) <= self.limits.connections_max

    def forget(self, connection: ServerConnection) -> None:
        del self._connections[connection]
        if self._empty is not None and not self._connections and not self._empty.done():
            self._empty.set_result(None)

    def failed(self, request: Request, error: Exception) -> None:
        """A handler raised: a 500, or a cut stream."""
        self._on_failure(request, error)
        if not request.started:
            request.respond(500, self.error_body(500, "the server failed on this request"))
        elif not request.answered:
            request.abort()

    def head(self, status: int, content_type: bytes, connection: bytes) -> bytes:
        """Status line and common headers of an answer; made once a second for each kind of answer."""
        key = (status, content_type, connection)
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _HEADS_MAX:
                self._heads.clear()
            reason = REASONS.get(status, b"")
            kind = header_lines([(b"content-type", content_type)]) if content_type else b""
            head = b"HTTP/1.1 %d %b\r\ndate: %b\r\n%b%b" % (status, reason, self._date, connection, kind)
            self._heads[key] = head
        return head

    def remember(self, url: bytes, target: tuple[str, str]) -> None:
        """How a request target decodes: clients ask for the same few again and again."""
        if len(url) <= _TARGET_BYTES_MAX:
            if len(self.targets) >= _TARGETS_MAX:
                self.targets.clear()
            self.targets[url] = target

    # --- once a second --------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        self._timer = self.loop.call_later(1.0, self._sweep)
        self.tick += 1
        self._date = formatdate(usegmt=True).encode()
        self._heads.clear()
        for connection in tuple(self._connections):
            connection.sweep(self.tick)

    async def _until_empty(self, timeout_s: float) -> None:
        if self._connections:
            self._empty = self.loop.create_future()
            await asyncio.wait([self._empty], timeout=timeout_s)
