"""To a server over HTTP: our gateway, or any other that speaks OpenAI's API."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from sage_core.errors import ConfigError, EngineError
from sage_live.client.ask import Ask
from sage_live.client.asking import Taker
from sage_live.client.refusals import refusal
from sage_live.http.client import Exchange, Pool, UpstreamError

IDLE_S: Final = 4.0
"""Seconds for which an unused connection is kept: less than the shortest time-out among usual servers (uvicorn's, 5)."""

_JSON: Final = (b"content-type", b"application/json")


class HttpTransport:
    """Build inside the event loop. ``base_url`` as OpenAI's clients take it, with ``/v1``, which is added where there is
    no path at all. Raises ConfigError."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        if not urlsplit(base_url).path.strip("/"):
            base_url = base_url.rstrip("/") + "/v1"
        headers = []
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ConfigError("api_key: expected printable ASCII characters")
            headers.append((b"authorization", b"Bearer " + api_key.encode()))
        self._pool = Pool(base_url, headers=headers, idle_s=IDLE_S)

    def send(self, ask: Ask, taker: Taker) -> HttpFlight:
        """Ask the server."""
        flight = HttpFlight(taker)
        headers = (_JSON, *ask.headers) if ask.body else ask.headers
        flight.exchange = self._pool.send("POST" if ask.body else "GET", ask.endpoint, headers, ask.body, flight)
        return flight

    async def close(self) -> None:
        await self._pool.close()


class HttpFlight:
    """An exchange, and the sink of its answer."""

    __slots__ = ("_body", "_headers", "_status", "_streams", "_taker", "exchange")

    def __init__(self, taker: Taker) -> None:
        self.exchange: Exchange | None = None
        self._taker = taker
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self._streams = False

    def cancel(self) -> None:
        """The server sees a client that went away."""
        if self.exchange is not None:
            self.exchange.abort()

    def pause(self) -> None:
        if self.exchange is not None:
            self.exchange.pause()

    def resume(self) -> None:
        if self.exchange is not None:
            self.exchange.resume()

    # --- the sink -----------------------------------------------------------------------------------------------------

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status, self._headers = status, headers
        content_type = headers.get(b"content-type", b"")
        self._streams = status == 200 and content_type.startswith(b"text/event-stream")
        if self._streams:
            self._taker.begin(content_type)

    def on_body(self, data: bytes) -> None:
        if self._streams:
            self._taker.piece(data)
        else:
            self._body += data

    def on_end(self) -> None:
        if self._streams:
            self._taker.finish(b"")
        elif self._status == 200:
            self._taker.complete(200, bytes(self._body), self._headers.get(b"content-type", b""))
        else:
            self._taker.fail(refusal(self._status, bytes(self._body), self._headers))

    def on_error(self, error: UpstreamError) -> None:
        told = EngineError(str(error))
        told.__cause__ = error
        self._taker.fail(told)
