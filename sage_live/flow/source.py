"""Where items come from: something that is asked for the next one, or something that pushes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Generic, Literal, TypeVar

from sage_core.errors import ConfigError, SageError
from sage_live.flow.edge import EndedError
from sage_live.flow.stage import Stage

T = TypeVar("T")


class FlowClosed(SageError, RuntimeError):
    """An item for a flow that takes none: it has ended, failed, drains, or was not connected yet."""


class PulledSource(Stage):
    """Asks an iterable for the next item when there is room for it: an iterable need never be told to wait.

    A plain iterator is called in the event loop: it must not block.
    """

    def __init__(self, name: str, items: Iterable[object] | AsyncIterable[object]) -> None:
        super().__init__(name)
        self._items = items
        self._stopped = False
        self._asking: asyncio.Task[object] | None = None

    async def work(self) -> None:
        if isinstance(self._items, AsyncIterable):
            await self._work_async(aiter(self._items))
            return
        if self._stopped:
            return
        stats = self.stats
        for item in self._items:
            stats.items_in += 1
            if not self.outlet.offer(item):
                await self.outlet.put(item)
            stats.items_out += 1
            stats.items_finished += 1
            if self._stopped:
                break

    async def _work_async(self, items: AsyncIterator[object]) -> None:
        try:
            while not self._stopped:
                self._asking = asyncio.current_task()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                except asyncio.CancelledError:
                    if not self._stopped:
                        raise
                    return
                finally:
                    self._asking = None
                self.stats.items_in += 1
                await self.outlet.put(item)
                self.stats.items_out += 1
                self.stats.items_finished += 1
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()

    def stop(self) -> None:
        self._stopped = True
        if self._asking is not None:  # it may never give another; one that it has given is let in
            self._asking.cancel()


class Inlet(Generic[T]):
    """A source that items are pushed into, by any number of coroutines of one event loop.

    full: what becomes of an item at the limit of the first queue. ``block``: the producer waits; ``reject``: it is told no.
    """

    def __init__(self, full: Literal["block", "reject"] = "block") -> None:
        if full not in ("block", "reject"):
            raise ConfigError(f"full: expected block or reject, got {full!r}")
        self.full = full
        self._stage: PushedSource | None = None

    async def put(self, item: T) -> bool:
        """Whether it was let in: True, after waiting for room if need be; under ``reject`` False at the limit.

        A producer that is told no gives way once, so that the flow gets its turn. Raises FlowClosed.
        """
        if self.offer(item, counted=self.full == "reject"):
            return True
        stage = self._connected()
        if self.full == "reject":
            await asyncio.sleep(0)
            return False
        try:
            await stage.outlet.put(item)
        except EndedError:
            raise FlowClosed("the flow ended while an item waited to be let in") from None
        stage.stats.items_out += 1
        return True

    def offer(self, item: T, *, counted: bool = True) -> bool:
        """Whether it was let in, without waiting, whatever ``full`` says. A no is counted. Raises FlowClosed."""
        stage = self._connected()
        try:
            taken = stage.outlet.offer(item)
        except EndedError:
            raise FlowClosed("the flow takes no more items") from None
        if taken:
            stage.stats.items_out += 1
        elif counted:
            stage.stats.rejected += 1
        return taken

    def close(self) -> None:
        """No more items come: the flow ends when it has done with those it has."""
        self._connected().stop()

    def connect(self, stage: PushedSource) -> None:
        """For the flow: this inlet's other end. ConfigError if it has one."""
        if self._stage is not None:
            raise ConfigError("an Inlet is the source of one run; make another one")
        self._stage = stage

    def _connected(self) -> PushedSource:
        if self._stage is None:
            raise FlowClosed("the Inlet is not connected: call Flow.of(inlet)...to(sink) first")
        return self._stage


class PushedSource(Stage):
    """The flow's end of an :class:`Inlet`."""

    def __init__(self, name: str, inlet: Inlet[T]) -> None:
        super().__init__(name)
        inlet.connect(self)
        self._done = False
        self._waiter: asyncio.Future[None] | None = None

    async def work(self) -> None:
        """Nothing but to last until the producers have finished."""
        if not self._done:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def stop(self) -> None:
        self._done = True
        self.outlet.end()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        self.outlet.end()


def source_stage(name: str, source: Iterable[T] | AsyncIterable[T] | Inlet[T]) -> Stage:
    """ConfigError for anything else."""
    if isinstance(source, Inlet):
        return PushedSource(name, source)
    if isinstance(source, Iterable | AsyncIterable):
        return PulledSource(name, source)
    raise ConfigError(f"source: expected an iterable, an async iterable or an Inlet, got {type(source).__name__}")
