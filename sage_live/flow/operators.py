"""Stages that look at one item at a time, and those that put several together or take one apart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import CoroutineType
from typing import Any

from sage_core.errors import ConfigError
from sage_core.units import Nanos
from sage_live.flow.edge import EndedError
from sage_live.flow.stage import Stage


class Map(Stage):
    """A function called in the event loop."""

    def __init__(self, name: str, function: Callable[[Any], object]) -> None:
        super().__init__(name)
        self._function = function

    async def work(self) -> None:
        inlet, outlet, stats, function, now = self.inlet, self.outlet, self.stats, self._function, self.clock.now
        items = inlet.items
        while True:
            item = inlet.take() if items else await inlet.get()
            stats.items_in += 1
            began = now()
            result = function(item)
            stats.busy_ns += now() - began
            if type(result) is CoroutineType:
                result.close()
                raise ConfigError("the function gave a coroutine; write it with `async def`, so that it is awaited")
            if not outlet.offer(result):
                await outlet.put(result)
            stats.items_out += 1
            stats.items_finished += 1


class ParallelMap(Stage):
    """A coroutine function, or a function in threads, on several items at once.

    ordered: results leave in the order of their items. A result that is not yet due stays with its worker, so that never
    more than ``parallelism`` items are in hand.
    """

    def __init__(
        self, name: str, function: Callable[[Any], Any], parallelism: int, ordered: bool, *, threads: bool
    ) -> None:
        super().__init__(name)
        self.workers = parallelism
        self._pool = ThreadPoolExecutor(parallelism, thread_name_prefix=name) if threads else None
        self._function: Callable[[Any], Awaitable[object]] = self._in_thread if threads else function
        self._plain = function
        self._ordered = ordered and parallelism > 1
        self._taken = 0
        self._due = 0
        self._turns: dict[int, asyncio.Future[None]] = {}

    async def work(self) -> None:
        inlet, outlet, stats, function, now = self.inlet, self.outlet, self.stats, self._function, self.clock.now
        items = inlet.items
        while True:
            item = inlet.take() if items else await inlet.get()
            turn = self._taken
            self._taken += 1
            stats.items_in += 1
            began = now()
            result = await function(item)
            stats.busy_ns += now() - began
            if self._ordered and turn != self._due:
                self._turns[turn] = asyncio.get_running_loop().create_future()
                await self._turns[turn]
            if not outlet.offer(result):
                await outlet.put(result)
            stats.items_out += 1
            stats.items_finished += 1
            self._due += 1
            if self._due in self._turns:
                self._turns.pop(self._due).set_result(None)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, item: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._guarded, item)

    def _guarded(self, item: object) -> object:
        try:
            return self._plain(item)
        except StopIteration as error:  # a future cannot carry it
            raise RuntimeError("the function raised StopIteration") from error


class Filter(Stage):
    """Passes on the items that a predicate holds for."""

    def __init__(self, name: str, predicate: Callable[[Any], object]) -> None:
        super().__init__(name)
        self._predicate = predicate

    async def work(self) -> None:
        inlet, outlet, stats, predicate, now = self.inlet, self.outlet, self.stats, self._predicate, self.clock.now
        items = inlet.items
        while True:
            item = inlet.take() if items else await inlet.get()
            stats.items_in += 1
            began = now()
            wanted = predicate(item)
            stats.busy_ns += now() - began
            if wanted:
                if not outlet.offer(item):
                    await outlet.put(item)
                stats.items_out += 1
            stats.items_finished += 1


class FlatMap(Stage):
    """Passes on each of the items that a function makes of one."""

    def __init__(self, name: str, function: Callable[[Any], Iterable[object]]) -> None:
        super().__init__(name)
        self._function = function

    async def work(self) -> None:
        inlet, outlet, stats, function, now = self.inlet, self.outlet, self.stats, self._function, self.clock.now
        items = inlet.items
        while True:
            item = inlet.take() if items else await inlet.get()
            stats.items_in += 1
            began = now()
            results = iter(function(item))
            while True:  # the function may be a generator, whose work is done here
                try:
                    result = next(results)
                except StopIteration:
                    break
                stats.busy_ns += now() - began
                if not outlet.offer(result):
                    await outlet.put(result)
                stats.items_out += 1
                began = now()
            stats.busy_ns += now() - began
            stats.items_finished += 1


class Batch(Stage):
    """Lists of ``max_size`` items; of fewer when the first of them has waited ``max_wait`` ns, and at the end."""

    def __init__(self, name: str, max_size: int, max_wait: Nanos | None) -> None:
        super().__init__(name)
        self._max_size = max_size
        self._max_wait = max_wait
        self._pending: list[object] = []

    async def work(self) -> None:
        inlet, stats, clock = self.inlet, self.stats, self.clock
        items = inlet.items
        due = Nanos(0)
        while True:
            pending = self._pending
            if not items and pending and self._max_wait is not None:
                try:
                    more = await inlet.wait(clock, due)
                except EndedError:
                    return
                if not more:
                    await self._pass_on()
                    continue
            item = inlet.take() if items else await inlet.get()
            stats.items_in += 1
            if not pending and self._max_wait is not None:
                due = Nanos(clock.now() + self._max_wait)
            pending.append(item)
            if len(pending) >= self._max_size:
                await self._pass_on()

    async def flush(self) -> None:
        if self._pending:
            await self._pass_on()

    async def _pass_on(self) -> None:
        batch = self._pending
        await self.outlet.put(batch)
        self._pending = []
        self.stats.items_out += 1
        self.stats.items_finished += len(batch)
