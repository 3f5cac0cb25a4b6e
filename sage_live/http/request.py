"""A request as its handler sees it, and the answer to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sage_live.http.wire import Headers, header_lines

if TYPE_CHECKING:
    from sage_core._native import StreamRelay
    from sage_live.http.connection import ServerConnection

_OPEN, _STREAMING, _ANSWERED, _GONE = range(4)

_BIG = 64 * 1024
"""Bytes from which copying a body behind its head costs more than a second system call."""

_SMALL = 4096
_CHUNKS = [b"%x\r\n" % size for size in range(_SMALL)]
"""The line before a chunk of so many bytes: a piece of a stream is written for every token."""


class Request:
    """One request, its body complete. Answer with :meth:`respond`, or :meth:`start`, :meth:`write` ... :meth:`end`.

    The answer may come at any later time, in the event loop's thread. Answering a client that has gone does nothing;
    answering twice is a defect of the handler and raises RuntimeError.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_head",
        "_relay",
        "_state",
        "body",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "on_disconnect",
        "on_writable",
        "path",
        "peer",
        "query",
    )

    def __init__(
        self,
        connection: ServerConnection,
        method: str,
        path: str,
        query: str,
        headers: dict[bytes, bytes],
        body: bytes,
        peer: str,
        keep_alive: bool,
        http10: bool,
    ) -> None:
        self.method = method
        self.path = path
        """Percent-decoded, without the query."""
        self.query = query
        """As sent: not decoded, without the question mark."""
        self.headers = headers
        """Lower-case names; values of a repeated name are joined with a comma."""
        self.body = body
        self.peer = peer
        """The client's address, without its port."""
        self.keep_alive = keep_alive
        self.http10 = http10
        self.on_disconnect: Callable[[], None] | None = None
        """Called once if the client goes away before the answer is complete."""
        self.on_writable: Callable[[bool], None] | None = None
        """False: the client reads too slowly, stop writing; True: go on."""
        self._connection = connection
        self._state = _OPEN
        self._chunked = False
        self._head = b""  # of a stream, not yet written
        self._relay: StreamRelay | None = None

    @property
    def answered(self) -> bool:
        """Whether there is no more to be said: the answer is complete, or the client has gone."""
        return self._state >= _ANSWERED

    @property
    def started(self) -> bool:
        """Whether any of the answer has been given."""
        return self._state != _OPEN

    @property
    def relayed(self) -> int:
        """Bytes of a stream in progress that its relay has written: they are not yet counted by the connection."""
        return 0 if self._relay is None else self._relay.bytes

    def respond(
        self, status: int, body: bytes, content_type: bytes = b"application/json", headers: Headers = ()
    ) -> None:
        """The whole answer. Raises ValueError for a line break in a header."""
        if self._state:
            self._not_open()
            return
        connection = self._connection
        head = connection.answer_head(status, content_type, self)
        if headers:
            head += header_lines(headers)
        self._state = _ANSWERED
        if status == 204 or status == 304:
            connection.write(head + b"\r\n")
        elif self.method == "HEAD":
            connection.write(b"%bcontent-length: %d\r\n\r\n" % (head, len(body)))
        elif len(body) < _BIG:
            connection.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        else:
            connection.write(b"%bcontent-length: %d\r\n\r\n" % (head, len(body)))
            connection.write(body)
        connection.answered(self)

    def start(self, status: int, content_type: bytes = b"text/event-stream", headers: Headers = ()) -> None:
        """Begin an answer whose length is not known. Raises ValueError for a line break in a header.

        The head travels with the first piece if that is written in the same turn of the loop.
        """
        if self._state:
            self._not_open()
            return
        connection = self._connection
        self._chunked = not self.http10
        if self.http10:
            self.keep_alive = False  # the only end that an HTTP/1.0 client can see is the connection's
        head = connection.answer_head(status, content_type, self) + header_lines(headers)
        self._state = _STREAMING
        self._head = head + (b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        connection.streams(self)

    def write(self, data: bytes) -> None:
        """One piece of a started answer: at once, in one system call."""
        if self._state != _STREAMING:
            self._not_streaming()
            return
        if not data or self.method == "HEAD":
            return
        if self._chunked:
            size = len(data)
            frame = _CHUNKS[size] if size < _SMALL else b"%x\r\n" % size
            data = b"".join((self._head, frame, data, b"\r\n"))
        elif self._head:
            data = self._head + data
        self._head = b""
        connection = self._connection  # its write, without the call: once a token
        connection.written += len(data)
        connection.transport.write(data)

    def relay(self) -> StreamRelay | None:
        """What writes chunks of a started answer as an engine framed them, until the answer ends or the client goes; None
        where this client does not get chunks."""
        if self._state == _STREAMING and self._chunked and self.method != "HEAD" and not self._head:
            # Not above: the embedding server runs in the environment of the engines, without the native part.
            from sage_core._native import StreamRelay

            self._relay = StreamRelay(self._connection.transport.write, time.monotonic_ns)
        return self._relay

    def end(self, data: bytes = b"") -> None:
        """The answer is complete, with ``data`` as its last piece: one system call for both."""
        if self._state != _STREAMING:
            self._not_streaming()
            return
        self._leave(_ANSWERED)
        last = self._head
        if self.method != "HEAD":
            if not self._chunked:
                last += data
            elif data:
                last = b"%b%x\r\n%b\r\n0\r\n\r\n" % (last, len(data), data)
            else:
                last += b"0\r\n\r\n"
        if last:
            self._connection.write(last)
        self._connection.answered(self)

    def abort(self) -> None:
        """Cut the connection, so that the client cannot take what it got for a complete answer."""
        if self._state < _ANSWERED:
            self._leave(_ANSWERED)
            self._connection.abort()

    # --- for the connection ---------------------------------------------------------------------------------------

    def flush_head(self) -> None:
        """The turn of the loop is over and nothing followed the head."""
        if self._head and self._state == _STREAMING:
            head, self._head = self._head, b""
            self._connection.write(head)

    def gone(self) -> None:
        """The client went away."""
        if self._state < _ANSWERED:
            self._leave(_GONE)
            if self.on_disconnect is not None:
                self.on_disconnect()

    def _leave(self, state: int) -> None:
        self._state = state
        if self._relay is not None:
            self._relay.stop()
            self._connection.written += self._relay.bytes
            self._relay = None

    def _not_open(self) -> None:
        if self._state != _GONE:
            raise RuntimeError(f"{self.method} {self.path} was answered twice")

    def _not_streaming(self) -> None:
        if self._state != _GONE:
            raise RuntimeError(f"{self.method} {self.path}: a piece of an answer that was not started, or was ended")
