"""A server process of ours: runs until SIGINT or SIGTERM, then finishes what it has begun."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import uvloop

GRACE_S: Final = 3.0
"""For requests in progress when it is told to stop."""


class Server(Protocol):
    async def close(self, grace_s: float = 0.0) -> None: ...


def serve_until_stopped(start: Callable[[], Awaitable[Sequence[Server]]]) -> None:
    """Run the servers that ``start`` gives. A second signal cuts what is in progress."""
    uvloop.run(_serve(start))


async def _serve(start: Callable[[], Awaitable[Sequence[Server]]]) -> None:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    servers = await start()
    # What is there now stays: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    await stop.wait()
    closing = asyncio.ensure_future(_close(servers, GRACE_S))
    hurrying = asyncio.ensure_future(hurry.wait())
    await asyncio.wait({closing, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if not closing.done():
        await _close(servers, 0.0)
    hurrying.cancel()


async def _close(servers: Sequence[Server], grace_s: float) -> bool:
    await asyncio.gather(*(server.close(grace_s) for server in servers))
    return True
