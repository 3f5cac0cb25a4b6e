"""Questions to an engine that no client asked: is it well, what is its load, does it do the least piece of work."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Final

from sage_core.units import PoolKind
from sage_live.http.client import UpstreamError
from sage_live.http.wire import Headers
from sage_live.http_engine import JSON, HttpEngine

OVERRUN_MAX: Final = 1.25
"""Times a time-out, beyond which it was this process that did not run."""


class Late(Exception):
    """The time was up, but only because this process had been paused: nothing is known."""


class Probe:
    """Asks one engine, over the connections that its work uses too."""

    __slots__ = ("_engine",)

    def __init__(self, engine: HttpEngine) -> None:
        self._engine = engine

    async def get(self, path: str, within_s: float) -> tuple[int, bytes]:
        """Status and body. Raises TimeoutError, UpstreamError, Late."""
        return await self._ask("GET", path, within_s)

    async def for_one_token(self, within_s: float) -> str:
        """Whether it works: "", or why not. An engine that batches does this between two steps of long answers.

        Raises Late.
        """
        spec = self._engine.spec
        asked: dict[str, str | int] = {"model": spec.upstream_model or spec.model}
        if spec.kind is PoolKind.EMBEDDING:
            path = self._engine.adapter.embeddings
            asked["input"] = "."
        else:
            path = "/v1/completions"
            asked |= {"prompt": ".", "max_tokens": 1}
        try:
            status, _ = await self._ask("POST", path, within_s, JSON, json.dumps(asked).encode())
        except TimeoutError:
            return f"it did not answer a request for one token within {within_s:g} s"
        except UpstreamError as error:
            return str(error)
        # A 404 is from one that serves chat only: it answers.
        return f"it answered {status} to a request for one token" if status >= 500 else ""

    async def _ask(
        self, method: str, path: str, within_s: float, headers: Headers = (), body: bytes = b""
    ) -> tuple[int, bytes]:
        done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        asked = time.monotonic()
        exchange = self._engine.pool.send(method, path, headers, body, _Whole(done))
        try:
            async with asyncio.timeout(within_s):
                return await done
        except TimeoutError:
            # After a pause of this process timers go first, and an answer that lies ready is not seen.
            if time.monotonic() - asked > OVERRUN_MAX * within_s:
                raise Late from None
            raise
        finally:
            exchange.abort()


class _Whole:
    """The sink of a small answer."""

    __slots__ = ("_done", "_pieces", "_status")

    def __init__(self, done: asyncio.Future[tuple[int, bytes]]) -> None:
        self._done = done
        self._status = 0
        self._pieces: list[bytes] = []

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_end(self) -> None:
        if not self._done.done():
            self._done.set_result((self._status, b"".join(self._pieces)))

    def on_error(self, error: UpstreamError) -> None:
        if not self._done.done():
            self._done.set_exception(error)
