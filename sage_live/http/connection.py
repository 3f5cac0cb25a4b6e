"""The server's side of one connection: bytes to requests, and the answers in the order of the requests.

The rules it keeps:

* Reading goes on while a request is in progress, because the end of the stream is how a disconnect shows.
* Requests are handed over one at a time; those behind wait in a queue of bounded length.
* What is refused at this level (malformed, too big, too slow) is answered after the requests before it, then the
  connection is closed: after a framing error nobody knows where the next request begins.
* No timer and no closure a request: :meth:`ServerConnection.sweep` is called once a second and looks at the phase.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NoReturn, TypeAlias, cast
from urllib.parse import unquote_to_bytes

import httptools

from sage_live.http.request import Request

if TYPE_CHECKING:
    from sage_live.http.server import HttpServer

_BETWEEN, _HEAD, _BODY = range(3)
"""What is being received: nothing, a request's head, its body."""

_CHUNK_OVERHEAD_MAX = 16
"""Framing bytes that a chunked body may spend on a byte of content. One-byte chunks need 5; the rest are extensions."""

_Refusal: TypeAlias = tuple[int, str]


class _Refused(Exception):
    """Leaves the parser; what to answer is in ``ServerConnection._refusal``."""


class ServerConnection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_busy",
        "_continue",
        "_current",
        "_deaf",
        "_delivered",
        "_fed",
        "_head",
        "_headers",
        "_http10",
        "_keep_alive",
        "_lingers",
        "_parser",
        "_peer",
        "_phase",
        "_queue",
        "_read",
        "_read_paused",
        "_refusal",
        "_server",
        "_since",
        "_stalled_since",
        "_upgrade",
        "_url",
        "_write_paused",
        "transport",
        "written",
    )

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._peer = ""
        # The message that is being received.
        self._phase = _BETWEEN
        self._since = 0  # tick of the server's sweep at which the phase began
        self._fed = 0  # bytes of it in earlier reads; the one that it began in does not count
        self._read = 0  # bytes of the current read
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head = self._headers  # complete
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._keep_alive = True
        self._http10 = False
        self._upgrade = False
        self._continue = False  # a client waits for 100 Continue
        self._refusal: _Refusal = (400, "")
        self._deaf = False  # nothing that arrives from now on matters
        # The messages that were received.
        self._queue: deque[Request | _Refusal] = deque()
        self._current: Request | None = None
        self._busy = False  # handing over
        self._read_paused = False
        # What is being sent.
        self._write_paused = False
        self.written = 0  # bytes, but those that a relay writes for the request in progress
        self._delivered = 0  # of these, at the last sweep, those that the kernel had taken
        self._stalled_since = 0
        self._lingers = False

    @property
    def in_progress(self) -> bool:
        """Whether the client waits for an answer, or is sending a request."""
        return self._current is not None or bool(self._queue) or self._phase != _BETWEEN

    # --- asyncio --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        self._since = self._stalled_since = self._server.tick
        if not self._server.admit(self):
            self._refuse((503, "this server has as many connections as it takes"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()
        self._parser = None  # which holds our methods
        self._server.forget(self)

    def eof_received(self) -> None:
        # A client that is done sending looks like one that has gone; every client of an API waits with its side open.
        if self.in_progress:
            self.transport.abort()
        self._lost()

    def data_received(self, data: bytes) -> None:
        if self._deaf or self._parser is None:
            return
        self._read = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._unparsable(error)
        if self._phase:
            self._weigh()
        if self._queue and self._current is None:
            self._serve()

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._current is not None and self._current.on_writable is not None:
            self._current.on_writable(False)

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._current is not None and self._current.on_writable is not None:
            self._current.on_writable(True)

    # --- the parser -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._phase = _HEAD
        self._since = self._server.tick
        self._fed = -self._read
        self._url = b""
        self._headers = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self._headers
        if name in headers:
            if name == b"host":
                self._raise(400, "repeated Host")
            value = headers[name] + b", " + value
        headers[name] = value

    def on_headers_complete(self) -> None:
        headers, parser, limits = self._headers, self._parser, self._server.limits
        assert parser is not None
        self._phase = _BODY
        self._since = self._server.tick
        self._head, self._headers = headers, {}  # trailers go to the new one and are forgotten
        self._keep_alive = keep_alive = parser.should_keep_alive()
        self._http10 = False
        if not keep_alive or b"connection" in headers:
            version = parser.get_http_version()
            if version == "1.0":
                self._http10 = True
            elif version != "1.1":
                self._raise(505, f"HTTP/{version} is not spoken here: HTTP/1.1")
        if b"upgrade" in headers or self._url[:1] != b"/":
            self._upgrade = parser.should_upgrade()
            if self._upgrade:
                return
        if b"host" not in headers and not self._http10:
            self._raise(400, "no Host")
        if self._fed + 2 * self._read > limits.head_bytes_max:  # it may be too big: how big is it?
            size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in headers.items())
            if size > limits.head_bytes_max:
                self._raise(*self._head_too_big())
        length = headers.get(b"content-length")
        if length is not None:
            if int(length) > limits.body_bytes_max:
                self._raise(*self._body_too_big())
        elif b"transfer-encoding" in headers:
            if self._http10:
                self._raise(400, "Transfer-Encoding in HTTP/1.0")
            if headers[b"transfer-encoding"].lower() != b"chunked":
                self._raise(501, "the only Transfer-Encoding taken is chunked")
        if b"expect" in headers and headers[b"expect"].lower() == b"100-continue":
            self._continue = not self._http10
            self._say_continue()

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._body_bytes += len(data)

    def on_message_complete(self) -> None:
        if self._upgrade:
            return  # the parser skipped the body; see _feed_without_upgrade
        parser, url, body = self._parser, self._url, self._body
        assert parser is not None
        if self._body_bytes > self._server.limits.body_bytes_max:
            self._raise(*self._body_too_big())
        if not body:
            content = b""
        elif len(body) == 1:
            content = body.pop()
        else:
            content = b"".join(body)
            body.clear()
        target = self._server.targets.get(url)
        if target is None:
            target = self._target(url)
        self._phase = _BETWEEN
        self._body_bytes = 0
        self._continue = False
        method = _METHODS.get(raw := parser.get_method()) or raw.decode()
        self._queue.append(
            Request(self, method, target[0], target[1], self._head, content, self._peer, self._keep_alive, self._http10)
        )

    # --- receiving ------------------------------------------------------------------------------------------------

    def _raise(self, status: int, message: str) -> NoReturn:
        self._refusal = (status, message)
        raise _Refused

    def _head_too_big(self) -> _Refusal:
        return 431, f"the headers have more than the {self._server.limits.head_bytes_max} bytes that are taken"

    def _body_too_big(self) -> _Refusal:
        return 413, f"the body has more than the {self._server.limits.body_bytes_max} bytes that are taken"

    def _target(self, url: bytes) -> tuple[str, str]:
        path, _, query = url.partition(b"?")
        if not path.startswith(b"/"):  # http://host/path, as sent to a proxy; or the asterisk of OPTIONS
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2] if b"://" in path else path
        try:
            target = unquote_to_bytes(path).decode(), query.decode()
        except UnicodeDecodeError:
            self._raise(400, "the path is not UTF-8")
        self._server.remember(url, target)
        return target

    def _unparsable(self, error: httptools.HttpParserError) -> None:
        if isinstance(error, httptools.HttpParserCallbackError):
            if not isinstance(error.__context__, _Refused):
                raise error
            self._refuse(self._refusal)
        else:
            text = str(error)
            version = "HTTP version" in text or "PRI" in text
            self._refuse((505, "HTTP/1.1 is spoken here") if version else (400, f"not HTTP: {text}"))

    def _feed_without_upgrade(self, rest: bytes) -> None:
        """Another protocol was asked for, which the server may ignore. The parser cannot, so it is told a request
        without the wish."""
        self._upgrade = False
        assert self._parser is not None
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse((405, "this is not a proxy"))
            return
        lines = [b"%b: %b\r\n" % header for header in self._head.items() if header[0] != b"upgrade"]
        version = b"1.0" if self._http10 else b"1.1"
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self._url, version, b"".join(lines))
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    def _weigh(self) -> None:
        """A message is incomplete: is it within bounds?"""
        self._fed += self._read
        limits = self._server.limits
        if self._phase == _HEAD:
            if self._fed > limits.head_bytes_max:
                self._refuse(self._head_too_big())
        elif self._body_bytes > limits.body_bytes_max:
            self._refuse(self._body_too_big())
        elif self._fed > limits.head_bytes_max + (1 + _CHUNK_OVERHEAD_MAX) * self._body_bytes:
            self._refuse((400, "a chunked body with next to no content"))

    def _refuse(self, refusal: _Refusal) -> None:
        self._deaf = True
        self._phase = _BETWEEN
        self._body.clear()
        self._queue.append(refusal)
        if self._current is None:
            self._serve()

    def _say_continue(self) -> None:
        if self._continue and self._current is None and not self._queue:
            self._continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # --- handing over and answering -------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._busy = True  # an answer within the handler leaves the next request to the loop below
        queue, handler = self._queue, self._server.handler
        while queue and self._current is None:
            item = queue.popleft()
            if isinstance(item, tuple):
                self._answer_refusal(item)
                break
            self._current = item
            try:
                handler(item)
            except Exception as error:
                self._server.failed(item, error)
        self._busy = False
        if len(queue) >= self._server.limits.pipelined_max:
            if not self._read_paused:
                self._read_paused = True
                self.transport.pause_reading()
        elif self._read_paused:
            self._read_paused = False
            self._since = self._server.tick
            self.transport.resume_reading()
        self._say_continue()

    def answer_head(self, status: int, content_type: bytes, request: Request) -> bytes:
        """Status line and the headers that every answer has; the empty line is still to come."""
        if not request.keep_alive or self._server.draining:
            request.keep_alive = False
            return self._server.head(status, content_type, b"connection: close\r\n")
        return self._server.head(status, content_type, b"connection: keep-alive\r\n" if request.http10 else b"")

    def streams(self, request: Request) -> None:
        """A streamed answer began; its head is with the request."""
        self._server.loop.call_soon(request.flush_head)
        if self._write_paused and request.on_writable is not None:
            request.on_writable(False)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self.transport.write(data)

    def answered(self, request: Request) -> None:
        """The answer is complete: on to the next."""
        self._current = None
        request.on_disconnect = request.on_writable = None  # which hold it: no cycle is left to the collector
        if not request.keep_alive or self._server.draining:
            self._deaf = True
            self._queue.clear()
            self.transport.close()
            return
        if not self._phase:
            self._since = self._server.tick
        if not self._busy:
            self._serve() if self._queue else self._say_continue()

    def abort(self) -> None:
        """Cut the connection, whatever is in progress."""
        self.transport.abort()
        self._lost()

    def _answer_refusal(self, refusal: _Refusal) -> None:
        """And close, but not at once: to close with unread data resets the connection, and with it the answer."""
        status, message = refusal
        body = self._server.error_body(status, message)
        head = self._server.head(status, b"application/json", b"connection: close\r\n")
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self.transport.write_eof()
        self._queue.clear()
        self._lingers = True
        self._since = self._server.tick

    def _lost(self) -> None:
        request, self._current = self._current, None
        self._queue.clear()
        self._deaf = True
        if request is not None:
            try:
                request.gone()
            except Exception as error:
                self._server.failed(request, error)

    # --- once a second --------------------------------------------------------------------------------------------

    def sweep(self, tick: int) -> None:
        """Whatever has lasted too long ends. ``tick`` counts seconds."""
        limits = self._server.limits
        unsent = self.transport.get_write_buffer_size()
        delivered = self.written - unsent + (0 if self._current is None else self._current.relayed)
        if delivered != self._delivered or not unsent:
            self._delivered = delivered
            self._stalled_since = tick
        elif tick - self._stalled_since > limits.stalled_s:
            self.abort()
            return
        age = tick - self._since
        if self._lingers:
            if age > limits.linger_s:
                self.abort()
        elif self._phase == _HEAD:
            if age > limits.head_s and not self._read_paused:
                self._refuse((408, "the headers took too long"))
        elif self._phase == _BODY:
            if age > limits.body_s + self._body_bytes / limits.body_bytes_per_s_min and not self._read_paused:
                self._refuse((408, "the body took too long"))
        elif self._current is None and age > limits.idle_s:
            self.abort()

    def drain(self) -> None:
        """The server closes: at once where nothing is in progress, else after the answer."""
        if not self.in_progress and not self._lingers:
            self._deaf = True
            self.transport.close()


_METHODS = {method.encode(): method for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")}
