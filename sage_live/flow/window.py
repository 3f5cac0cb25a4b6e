"""Windows of event time: what happened between two instants, in whatever order the flow hears of it.

Windows begin at multiples of ``every`` and are half open: ``[start, start + size)``. The watermark is the latest event time
seen less the allowed lateness. A window is closed, and its result passed on, when the watermark reaches its end; an item
that comes after that is late: counted, given to ``on_late``, and left out of that window. Results leave in the order of
their windows' starts; at the end of the source the windows that are still open are closed.

The watermark moves with events only: a source that falls silent keeps its last windows open.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from sage_core.errors import ConfigError
from sage_core.units import NEVER, Nanos, seconds
from sage_live.flow.aggregate import Accumulator, Aggregate
from sage_live.flow.stage import Stage


@dataclass(frozen=True, slots=True)
class Windows:
    """Spans in ns. Made by :func:`tumbling` and :func:`sliding`."""

    size: Nanos
    every: Nanos


def tumbling(size_s: float) -> Windows:
    """One after the other: each event time is in one."""
    return sliding(size_s, size_s)


def sliding(size_s: float, every_s: float) -> Windows:
    """One begins every ``every_s`` seconds and lasts ``size_s``: an event time is in ``size_s / every_s`` of them.

    ConfigError for times below 1 ns, and for gaps between windows, into which items would vanish.
    """
    size, every = seconds(size_s), seconds(every_s)
    if every < 1 or size < 1:
        raise ConfigError(f"windows: expected at least 1 ns, got size_s={size_s:g}, every_s={every_s:g}")
    if every > size:
        raise ConfigError(
            f"windows: every_s={every_s:g} leaves gaps between windows of {size_s:g} s; expected at most that"
        )
    return Windows(size, every)


@dataclass(frozen=True, slots=True)
class Window:
    """A closed window. ``values``: by the names given to the aggregates."""

    start: Nanos
    end: Nanos
    key: Hashable
    values: Mapping[str, float]


class WindowStage(Stage):
    """``lateness`` in ns. See the module."""

    def __init__(
        self,
        name: str,
        windows: Windows,
        time_of: Callable[[Any], Nanos],
        aggregates: Mapping[str, Aggregate[Any]],
        key: Callable[[Any], Hashable] | None,
        lateness: Nanos,
        on_late: Callable[[Any], object] | None,
    ) -> None:
        super().__init__(name)
        self._windows = windows
        self._time_of = time_of
        self._aggregates = aggregates
        self._key = key
        self._lateness = lateness
        self._on_late = on_late
        self._open: dict[int, dict[Hashable, list[Accumulator[Any]]]] = {}
        """By start and key."""
        self._watermark = -int(NEVER)
        self._closes_next = int(NEVER)
        """The end of the first open window."""

    async def work(self) -> None:
        inlet, stats, now = self.inlet, self.stats, self.clock.now
        items = inlet.items
        while True:
            item = inlet.take() if items else await inlet.get()
            stats.items_in += 1
            began = now()
            self._add(item)
            stats.busy_ns += now() - began
            stats.items_finished += 1
            if self._watermark >= self._closes_next:
                await self._close(self._watermark)

    async def flush(self) -> None:
        await self._close(int(NEVER))

    def cut(self) -> None:
        super().cut()
        self.stats.windows_dropped = sum(len(keys) for keys in self._open.values())
        self._open.clear()

    def _add(self, item: object) -> None:
        try:
            at = index(self._time_of(item))
        except TypeError as error:
            raise TypeError(f"time_of: expected a whole number of nanoseconds ({error})") from error
        watermark = self._watermark = max(self._watermark, at - self._lateness)
        key = None if self._key is None else self._key(item)
        size, every = self._windows.size, self._windows.every
        late = False
        for start in range(((at - size) // every + 1) * every, at + 1, every):
            end = start + size
            if end <= watermark:
                late = True
                continue
            keys = self._open.get(start)
            if keys is None:
                keys = self._open[start] = {}
                self._closes_next = min(self._closes_next, end)
            accumulators = keys.get(key)
            if accumulators is None:
                accumulators = keys[key] = [each.start() for each in self._aggregates.values()]
            for each in accumulators:
                each.add(item)
        if late:
            self.stats.late += 1
            if self._on_late is not None:
                self._on_late(item)

    async def _close(self, watermark: int) -> None:
        """Pass on the windows that end by then."""
        size = self._windows.size
        for start in sorted(start for start in self._open if start + size <= watermark):
            keys = self._open[start]
            for key, accumulators in tuple(keys.items()):
                values = {name: each.result() for name, each in zip(self._aggregates, accumulators, strict=True)}
                await self.outlet.put(Window(Nanos(start), Nanos(start + size), key, values))
                self.stats.items_out += 1
                del keys[key]
            del self._open[start]
        self._closes_next = min(self._open, default=int(NEVER)) + size
