"""The queue between two stages: bounded, for one event loop.

``offer`` and ``take`` do not suspend: a stage uses them while there is room or something to take, and suspends in ``put``
or ``get`` only at the limits. So stages take turns once for each filling of a queue and not once for each item.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

from sage_core.units import Nanos
from sage_live.flow.clock import Clock

T = TypeVar("T")


class EndedError(Exception):
    """No more items come, and those that came were taken; or none is wanted any more."""


class Edge(Generic[T]):
    """Holds at most ``limit`` items."""

    __slots__ = ("_givers", "_takers", "depth_max", "ended", "items", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: deque[T] = deque()
        """Look, and take with :meth:`take`."""
        self.depth_max = 0
        """The most items that it held."""
        self.ended = False
        self._takers: deque[asyncio.Future[None]] = deque()
        self._givers: deque[asyncio.Future[None]] = deque()

    def offer(self, item: T) -> bool:
        """Append it if there is room. Raises EndedError."""
        if self.ended:
            raise EndedError
        items = self.items
        if len(items) >= self.limit:
            return False
        items.append(item)
        if len(items) > self.depth_max:
            self.depth_max = len(items)
        if self._takers:
            _wake(self._takers)
        return True

    async def put(self, item: T) -> None:
        """Append it once there is room. Raises EndedError."""
        while not self.offer(item):
            await _wait(self._givers)

    def take(self) -> T:
        """The first of those that are there."""
        item = self.items.popleft()
        if self._givers:
            _wake(self._givers)
        return item

    async def get(self) -> T:
        """The first, once there is one. Raises EndedError."""
        while not self.items:
            if self.ended:
                raise EndedError
            await _wait(self._takers)
        return self.take()

    async def wait(self, clock: Clock, until: Nanos) -> bool:
        """Whether there is an item, as soon as there is one or ``until`` has come. Raises EndedError."""
        while not self.items:
            if self.ended:
                raise EndedError
            if clock.now() >= until:
                return False
            future = asyncio.get_running_loop().create_future()
            timer = clock.call_at(until, partial(_resolve, future))
            try:
                await _wait(self._takers, future)
            finally:
                timer.cancel()
        return True

    def end(self) -> None:
        """No more items come. Whoever waits is woken."""
        self.ended = True
        for waiters in (self._takers, self._givers):
            while waiters:
                _wake(waiters)


class Nowhere(Edge[T]):
    """Behind the last stage: takes everything, keeps nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(0)

    def offer(self, item: T) -> bool:
        return True


async def _wait(waiters: deque[asyncio.Future[None]], future: asyncio.Future[None] | None = None) -> None:
    future = future or asyncio.get_running_loop().create_future()
    waiters.append(future)
    try:
        await future
    except asyncio.CancelledError:
        if future.cancelled():
            with suppress(ValueError):
                waiters.remove(future)
        else:  # it was woken in the same turn: the next in line gets what it was woken for
            _wake(waiters)
        raise


def _wake(waiters: deque[asyncio.Future[None]]) -> None:
    """The first that still waits."""
    while waiters:
        future = waiters.popleft()
        if not future.done():
            future.set_result(None)
            return


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
