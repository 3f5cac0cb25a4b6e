"""How long the way to an engine and back is: a small request that it answers at once, asked of an idle engine."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Final

from sage_live.http.client import Pool, UpstreamError

REPEATS: Final = 41


class _Answer:
    """The sink of one answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Not looked at: an error takes the same way."""

    def on_body(self, data: bytes) -> None:
        """Nor this."""

    def on_end(self) -> None:
        self.done.set_result(time.monotonic_ns())

    def on_error(self, error: UpstreamError) -> None:
        self.done.set_exception(error)


async def round_trip_ns(url: str, path: str = "/health", repeats: int = REPEATS) -> int:
    """Median over ``repeats`` requests on one open connection, this process and the engine's server included.

    Raises UpstreamError.
    """
    pool = Pool(url, connections_max=1)
    took = []
    try:
        for _ in range(repeats + 1):
            answer = _Answer()
            asked = time.monotonic_ns()
            pool.send("GET", path, (), b"", answer)
            took.append(await answer.done - asked)
    finally:
        await pool.close()
    return round(statistics.median(took[1:]))  # the first opened the connection
