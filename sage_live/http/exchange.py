"""A request to another server and its answer, as the asker sees them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from sage_core.errors import SageError

if TYPE_CHECKING:
    from sage_core._native import StreamRelay
    from sage_live.http.client import ClientConnection


class Reason(StrEnum):
    """Why there is no whole answer."""

    CONNECT = "connect"
    """No connection: refused, unreachable, timed out, or TLS failed."""
    CLOSED = "closed"
    """The peer closed the connection before the end of its answer."""
    TIMEOUT = "timeout"
    """No head of an answer within ``head_s``."""
    MALFORMED = "malformed"
    """What came is not HTTP."""
    SHUTDOWN = "shutdown"
    """The pool was closed."""


class UpstreamError(SageError, ConnectionError):
    """There is no whole answer.

    Attributes:
        reason: why.
        sent: whether any byte of the request may have left; if not, the peer knows nothing of it.
        received: whether any byte of an answer came.
    """

    def __init__(self, reason: Reason, detail: str, sent: bool, received: bool) -> None:
        super().__init__(detail)
        self.reason = reason
        self.sent = sent
        self.received = received


class Sink(Protocol):
    """Is told of an answer: head, any number of pieces of the body, then end; or at any point an error, the last
    call. All calls are made in the event loop's thread; none after :meth:`Exchange.abort`, and none within
    :meth:`Pool.send`."""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Header names are in lower case."""

    def on_body(self, data: bytes) -> None:
        """All of the body that one read of the socket brought."""

    def on_end(self) -> None: ...

    def on_error(self, error: UpstreamError) -> None: ...


class Exchange:
    """A request that was sent or waits for a connection, and its answer."""

    __slots__ = ("_connection", "_paused", "data", "last", "over", "received", "relay", "sent", "since", "sink")

    def __init__(self, data: bytes, sink: Sink) -> None:
        self._connection: ClientConnection | None = None
        self._paused = False
        self.data = data
        """The request, as bytes."""
        self.sink = sink
        self.sent = False
        """Whether any byte of the request may have left."""
        self.received = False
        """Whether any byte of the answer came."""
        self.since = 0
        """Tick of the pool at which it was sent."""
        self.last = False
        """Within ``on_body``: whether that is the last piece, so that it can be passed on together with the end."""
        self.relay: StreamRelay | None = None
        """What reads are offered to before they are taken apart; the sink is not told of those that it passes on. A sink sets
        it within ``on_body``; it stays if that was for the first read of a chunked body, where its framing begins."""
        self.over = False

    def abort(self) -> None:
        """Forget it. The connection is cut, which the peer sees as a client that went away."""
        if not self.over:
            self.over = True
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.cut()

    def pause(self) -> None:
        """Read no more of the answer until :meth:`resume`; the peer will be unable to write."""
        if not self._paused:
            self._paused = True
            if self._connection is not None:
                self._connection.transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._connection is not None:
                self._connection.transport.resume_reading()

    # --- for the pool ---------------------------------------------------------------------------------------------

    def on(self, connection: ClientConnection | None) -> None:
        """Carried by a connection, or by none any more."""
        if self._paused:
            if self._connection is not None and not self._connection.transport.is_closing():
                self._connection.transport.resume_reading()
            if connection is not None:
                connection.transport.pause_reading()
        self._connection = connection

    def fail(self, reason: Reason, detail: str) -> None:
        if not self.over:
            self.over = True
            self.sink.on_error(UpstreamError(reason, detail, self.sent, self.received))
