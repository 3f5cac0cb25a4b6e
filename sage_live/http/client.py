"""The client's side of HTTP/1.1: for each endpoint a pool of connections that are kept open.

The rules it keeps:

* A connection goes back to the pool only when its answer was read to the end and the peer keeps it open.
* The connection that was used last is taken first, so that those which a smaller load does not need grow old and go.
* A request that found its connection closed by the peer is sent once more, if nothing of an answer came and the
  connection had been lying idle: the peer's idle time-out crossed our request. Nothing else is ever sent twice.
* No Task, Future, timer or closure a request; a Task where a connection is opened.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import cast
from urllib.parse import urlsplit

import httptools

from sage_core.errors import ConfigError
from sage_live.http.exchange import Exchange, Reason, Sink, UpstreamError
from sage_live.http.wire import Headers, header_lines

__all__ = ["Exchange", "Pool", "Reason", "Sink", "UpstreamError"]

_STALE_S = 1
"""Ticks within which a connection that the peer had closed shows it. A request that was underway longer was lost by the
peer, not by the connection, and may have had its effect."""

_LINES_MAX = 256
"""Request lines of an endpoint that are remembered."""


class Pool:
    """The connections to one endpoint. Build inside a running event loop.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST:PORT``; a path in it goes before every path.
        tls: for https; None: the system's authorities.
        headers: sent with every request.
        connections_max: above it requests wait, first come first served; None: no bound.
        connect_s: seconds that opening a connection may take.
        head_s: seconds until the head of an answer, plus up to one; None: for ever.
        idle_s: seconds after which an unused connection is closed. Less than the peer's, or requests meet closed ones.

    Raises:
        ConfigError: no such URL.
        ValueError: a line break in a header.
    """

    def __init__(
        self,
        url: str,
        *,
        tls: ssl.SSLContext | None = None,
        headers: Headers = (),
        connections_max: int | None = None,
        connect_s: float = 5.0,
        head_s: float | None = None,
        idle_s: float = 30.0,
    ) -> None:
        secure, self.host, self.port, self._base_path = endpoint(url)
        self.tick = 0
        """Seconds since the start, as counted by the sweep."""
        self._tls = (tls or ssl.create_default_context()) if secure else None
        self._connections_max = connections_max
        self._connect_s = connect_s
        self._head_s = head_s
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port != _PORTS[secure]:
            host = f"{host}:{self.port}"
        self._common = header_lines([(b"host", host.encode()), *headers])
        self._lines: dict[tuple[str, str], bytes] = {}
        self._open: dict[ClientConnection, None] = {}
        self._idle: list[ClientConnection] = []
        self._waiting: deque[Exchange] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False
        self._timer = self._loop.call_later(1.0, self._sweep)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    @property
    def idle(self) -> int:
        """How many of these carry no request."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """How many requests have no connection yet."""
        return sum(not exchange.over for exchange in self._waiting)

    def send(self, method: str, path: str, headers: Headers, body: bytes, sink: Sink) -> Exchange:
        """Ask; ``sink`` is told of the answer.

        Args:
            path: percent-encoded, with the query if there is one.
            headers: beside those of the pool, Host and Content-Length.

        Raises:
            ValueError: a line break or a blank where it would let its author write another request, or HEAD, whose
                answers this client cannot frame.
        """
        line = self._lines.get((method, path))
        if line is None:
            line = self._line(method, path)
        if headers:
            line += header_lines(headers)
        if body or method != "GET":
            data = b"%bcontent-length: %d\r\n\r\n%b" % (line, len(body), body)
        else:
            data = line + b"\r\n"
        exchange = Exchange(data, sink)
        if self._idle:
            self._idle.pop().carry(exchange, True)
        elif self._closed:
            self._loop.call_soon(exchange.fail, Reason.SHUTDOWN, f"{self._name} is no longer used")
        else:
            self._waiting.append(exchange)
            self._open_one()
        return exchange

    async def close(self) -> None:
        """Cut every connection. Requests underway fail."""
        self._closed = True
        self._timer.cancel()
        for task in self._connecting:
            task.cancel()
        if self._connecting:
            await asyncio.wait(self._connecting)
        self._fail_waiting(Reason.SHUTDOWN, f"{self._name} is no longer used")
        for connection in tuple(self._open):
            connection.fail(Reason.SHUTDOWN, f"{self._name} is no longer used")
        while self._open:  # until the loop has told each that it is lost
            await asyncio.sleep(0)

    # --- for the connections --------------------------------------------------------------------------------------

    def release(self, connection: ClientConnection) -> None:
        """An answer was read to the end, and the connection can carry another."""
        waiting = self._waiting
        while waiting:
            exchange = waiting.popleft()
            if not exchange.over:
                connection.carry(exchange, False)
                return
        connection.since = self.tick
        self._idle.append(connection)

    def retire(self, connection: ClientConnection) -> None:
        """It cannot carry another."""
        if connection in self._idle:
            self._idle.remove(connection)

    def lost(self, connection: ClientConnection) -> None:
        self.retire(connection)
        del self._open[connection]
        if len(self._waiting) > len(self._connecting):
            self._open_one()

    def again(self, exchange: Exchange) -> None:
        """The connection was stale: once more on one that did not lie idle, and before all who wait."""
        self._waiting.appendleft(exchange)
        self._open_one()

    # --- helpers --------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"{self.host}:{self.port}"

    def _line(self, method: str, path: str) -> bytes:
        target = self._base_path + path
        if not (method.isascii() and method.isalpha() and method.isupper()) or method == "HEAD":
            raise ValueError(f"method {method!r}: expected GET, POST, PUT, PATCH or DELETE")
        if not target.startswith("/") or not target.isascii() or not target.isprintable() or " " in target:
            raise ValueError(f"path {target!r}: expected a percent-encoded one that starts with a slash")
        line = f"{method} {target} HTTP/1.1\r\n".encode() + self._common
        if len(self._lines) >= _LINES_MAX:
            self._lines.clear()
        self._lines[method, path] = line
        return line

    def _open_one(self) -> None:
        """Open a connection for the waiting, unless as many are open or being opened as may be."""
        count = len(self._open) + len(self._connecting)
        if not self._closed and (self._connections_max is None or count < self._connections_max):
            task = self._loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await self._loop.create_connection(
                    lambda: ClientConnection(self), self.host, self.port, ssl=self._tls
                )
        except TimeoutError:
            self._no_connection(f"{self._name} did not accept a connection within {self._connect_s:g} s")
        except OSError as error:  # of TLS too
            self._no_connection(f"cannot connect to {self._name}: {error.strerror or error}")
        else:
            if connection in self._open:  # else it was lost before this Task went on
                self.release(connection)

    def _no_connection(self, detail: str) -> None:
        """Those who wait would fare no better; but where other connections are open, only the first pays."""
        if not self._open:
            self._fail_waiting(Reason.CONNECT, detail)
        else:
            while self._waiting:
                exchange = self._waiting.popleft()
                if not exchange.over:
                    exchange.fail(Reason.CONNECT, detail)
                    break

    def _fail_waiting(self, reason: Reason, detail: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for exchange in waiting:
            exchange.fail(reason, detail)

    def made(self, connection: ClientConnection) -> None:
        self._open[connection] = None

    def _sweep(self) -> None:
        """Once a second: whatever has lasted too long ends."""
        self._timer = self._loop.call_later(1.0, self._sweep)
        self.tick += 1
        for connection in tuple(self._open):
            connection.sweep(self.tick, self._idle_s, self._head_s)


_PORTS = (80, 443)


def endpoint(url: str) -> tuple[bool, str, int, str]:
    """Whether TLS, host, port, path."""
    expected = "expected http://HOST:PORT or https://HOST:PORT, and perhaps a path"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL ({error}); {expected}") from error
    if parts.scheme not in ("http", "https") or not host or not host.isascii() or parts.query or parts.fragment:
        raise ConfigError(f"{url!r}: {expected}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"a URL with a user name or password in it ({parts.hostname}): keys are told apart from URLs")
    secure = parts.scheme == "https"
    return secure, host, port or _PORTS[secure], parts.path.rstrip("/")


class ClientConnection(asyncio.Protocol):
    """One connection to the endpoint, with at most one exchange on it."""

    __slots__ = (
        "_begins",
        "_complete",
        "_exchange",
        "_head",
        "_headers",
        "_keep_alive",
        "_parser",
        "_pieces",
        "_pool",
        "_reused",
        "_status",
        "_until_close",
        "on_body",
        "since",
        "transport",
    )

    def __init__(self, pool: Pool) -> None:
        self.since = 0
        """Tick at which it became idle."""
        self._pool = pool
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append
        """The parser's callback for a piece of the body; without a frame of ours, for there is one a token."""
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._reused = False  # it lay idle before the current request
        self._headers: dict[bytes, bytes] = {}
        self._status = 0  # of the head that the sink has not been told of yet; 0: none
        self._head = self._headers
        self._begins = False  # the next byte of the body is the first of its first chunk
        self._keep_alive = False
        self._until_close = False  # the end of the connection is the end of the body
        self._complete = False

    def carry(self, exchange: Exchange, reused: bool) -> None:
        """Send a request."""
        self._exchange = exchange
        self._reused = reused
        exchange.on(self)
        exchange.sent = True
        exchange.since = self._pool.tick
        self.transport.write(exchange.data)

    def cut(self) -> None:
        self._exchange = None
        self._pool.retire(self)
        self.transport.abort()

    def fail(self, reason: Reason, detail: str) -> None:
        exchange = self._exchange
        self.cut()
        if exchange is not None:
            exchange.on(None)
            exchange.fail(reason, detail)

    def sweep(self, tick: int, idle_s: float, head_s: float | None) -> None:
        exchange = self._exchange
        if exchange is None:
            if tick - self.since > idle_s:
                self.cut()
        elif head_s is not None and not exchange.received and tick - exchange.since > head_s:
            self.fail(Reason.TIMEOUT, f"{self._name} did not answer within {head_s:g} s")

    # --- asyncio --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pool.made(self)

    def eof_received(self) -> None:
        self._pool.retire(self)  # the transport closes itself and then says so

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._parser = None  # which holds our methods
        self._pool.lost(self)
        if exchange is None:
            return
        exchange.on(None)
        if exchange.received:
            if self._until_close and exc is None:
                exchange.over = True
                exchange.sink.on_end()
            else:
                exchange.fail(Reason.CLOSED, f"{self._name} closed the connection in the middle of its answer")
        elif self._reused and self._pool.tick - exchange.since <= _STALE_S:
            self._pool.again(exchange)
        else:
            exchange.fail(Reason.CLOSED, f"{self._name} closed the connection without an answer")

    def data_received(self, data: bytes) -> None:
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None:
            self.cut()  # nothing was asked
            return
        relay = exchange.relay
        if relay is not None and relay.pass_on(data):
            return
        exchange.received = True
        malformed = ""
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            malformed = "another protocol"
        except httptools.HttpParserError as error:
            malformed = str(error)
        sink = exchange.sink
        start = 0  # of the body in this read
        if self._status:
            status, self._status = self._status, 0
            sink.on_head(status, self._head)
            if self._exchange is not exchange:
                return
            if data.startswith(b"HTTP/1.1 200 ") and b"transfer-encoding" in self._head:  # the head is all in this read
                start = data.index(b"\r\n\r\n") + 4
                self._begins = True
        pieces = self._pieces
        begins, self._begins = self._begins, self._begins and len(data) == start
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            exchange.last = self._complete
            sink.on_body(body)
            if self._exchange is not exchange:
                return
            if exchange.relay is not relay and exchange.relay is not None:
                if begins:
                    exchange.relay.follow(data, start)
                else:
                    exchange.relay = None  # it would not know where the chunks begin
        if self._complete:
            self._complete = False
            self._exchange = None
            exchange.over = True
            exchange.on(None)
            if self._keep_alive and not malformed and not self.transport.is_closing():
                self._pool.release(self)
            else:
                self.transport.close()
            del exchange.sink  # which holds it: no cycle is left to the collector
            sink.on_end()
        elif malformed:
            self.fail(Reason.MALFORMED, f"{self._name} does not answer in HTTP: {malformed}")

    # --- the parser -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more than one answer")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self._headers
        headers[name] = headers[name] + b", " + value if name in headers else value

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        if status < 200:  # an interim one
            return
        self._status = status
        self._head, self._headers = self._headers, {}  # trailers go to the new one and are forgotten
        self._keep_alive = parser.should_keep_alive()
        self._until_close = not self._keep_alive and not (
            b"content-length" in self._head or b"transfer-encoding" in self._head
        )

    def on_message_complete(self) -> None:
        parser = self._parser
        if parser is not None and parser.get_status_code() >= 200:
            self._complete = True

    @property
    def _name(self) -> str:
        return f"{self._pool.host}:{self._pool.port}"
