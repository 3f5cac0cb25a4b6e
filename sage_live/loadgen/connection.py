"""One keep-alive connection with at most one request on it: HTTP/1.1 framing by httptools, content by :class:`Answer`."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol, cast

import httptools

from sage_live.loadgen.answer import Answer
from sage_live.loadgen.encode import Item
from sage_live.loadgen.schema import Error

HTTP_OK = 200


class Owner(Protocol):
    """Who sends. All instants are of CLOCK_MONOTONIC, ns."""

    start_ns: int

    def ended(self, connection: Connection, error: Error) -> None:
        """``connection.item`` has its answer, or never will; ``connection.reusable`` says what may be done with it."""

    def lost(self, connection: Connection) -> None:
        """An idle connection was closed."""


class Connection(asyncio.Protocol):
    """Made for its first item, which is sent when the connection is there; then ``send``, once it is idle."""

    def __init__(self, owner: Owner, item: Item | None) -> None:
        self._owner = owner
        self.transport: asyncio.Transport | None = None
        self.answer = Answer()
        self._pieces: list[bytes] = []
        # httptools takes its callbacks from here; a bound list.append costs no Python frame for each chunk.
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self.item = item
        self._abandoned = False
        self._begin()
        if item is not None:  # to be punctual is ours, to accept the connection the server's
            self.sent_ns = time.monotonic_ns()

    def send(self, item: Item) -> None:
        """Write the request."""
        self.item = item
        self.sent_ns = time.monotonic_ns()
        self._write(item)

    def give_up(self, error: Error) -> None:
        """End what is outstanding for our own reason; the server sees the connection close."""
        self.reusable = False
        self._abandoned = True
        if self.transport is not None:
            self.transport.abort()
        self._end(error)

    def next(self) -> None:
        """Ready for another item."""
        self.item = None
        self._begin()

    def _begin(self) -> None:
        self.sent_ns = self.ended_ns = self.status = -1
        self.idle_ns = time.monotonic_ns()
        self.bytes = 0
        self.reusable = False
        self._complete = False
        self.answer.begin()

    def _write(self, item: Item) -> None:
        assert self.transport is not None
        at = self._owner.start_ns + item.at
        self.transport.write(b"%bx-sage-scheduled-ns: %d\r\n%b" % (item.line, at, item.rest))

    # --- what httptools and the event loop call -------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        if self.status >= HTTP_OK:  # else it was an interim answer
            self._complete = True
            self.reusable = self._parser.should_keep_alive()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self._abandoned:
            self.transport.abort()
        elif self.item is not None:
            self._write(self.item)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self.item is None:  # nobody asked
            self.reusable = False
            self._owner.lost(self)
            if self.transport is not None:
                self.transport.abort()
            return
        self.bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.give_up(Error.MALFORMED)
            return
        pieces = self._pieces
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            if self.item.streamed and self.status == HTTP_OK:
                self.answer.stream(body, now)
            else:
                self.answer.piece(body)
        if self._complete:
            self.ended_ns = now
            self._end(self._judged())

    def eof_received(self) -> None:
        if self.item is None:
            self._owner.lost(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self.item is None:
            self._owner.lost(self)
            return
        error = Error.RESET
        if (
            exc is None and self.status == HTTP_OK and self._judged() is Error.NONE
        ):  # a body that ends with the connection
            error = Error.NONE
        self._end(error)

    def _judged(self) -> Error:
        if self.status != HTTP_OK:
            return Error.STATUS
        return self.answer.end(self.item is not None and self.item.streamed)

    def _end(self, error: Error) -> None:
        if self.item is None:
            return
        if self.ended_ns < 0:
            self.ended_ns = time.monotonic_ns()
        self._owner.ended(self, error)
