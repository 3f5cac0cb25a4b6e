"""One small HTTP request and its answer, awaited: for probes and management, not for the path of inference."""

from __future__ import annotations

import asyncio

from sage_core.errors import EngineError
from sage_live.http.client import Pool, UpstreamError


class _Answer:
    """Collects one answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = bytearray()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result((self._status, bytes(self._body)))

    def on_error(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def ask(
    url: str, path: str, *, method: str = "GET", body: bytes = b"", timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """Status and body. EngineError where there is no answer within ``timeout_s``."""
    pool = Pool(url, connections_max=1, connect_s=timeout_s)
    try:
        answer = _Answer()
        headers = ((b"content-type", b"application/json"),) if body else ()
        pool.send(method, path, headers, body, answer)
        async with asyncio.timeout(timeout_s):
            return await answer.done
    except UpstreamError as error:
        raise EngineError(f"{url}{path}: {error}") from error
    except TimeoutError:
        raise EngineError(f"{url}{path}: no answer within {timeout_s:g} s") from None
    finally:
        await pool.close()
