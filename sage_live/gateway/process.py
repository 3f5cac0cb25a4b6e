"""How this process fares: CPU, memory, file descriptors, and how late its event loop is."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Final

import psutil

from sage_core.units import SECOND

INTERVAL_S: Final = 0.1


def process_figures() -> list[tuple[str, str, str, float]]:
    """Name, type, help and value, under the names every Prometheus client library uses for a process."""
    process = psutil.Process()
    with process.oneshot():
        cpu = process.cpu_times()
        memory = process.memory_info()
        figures = [
            ("process_cpu_seconds_total", "counter", "User and system CPU time.", cpu.user + cpu.system),
            ("process_resident_memory_bytes", "gauge", "Resident memory.", memory.rss),
            ("process_virtual_memory_bytes", "gauge", "Virtual memory.", memory.vms),
            ("process_start_time_seconds", "gauge", "Start of the process, Unix time.", process.create_time()),
            ("process_open_fds", "gauge", "Open file descriptors.", process.num_fds()),
        ]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [*figures, ("process_max_fds", "gauge", "Limit of open file descriptors.", limit)]


class LoopLag:
    """Tells ``observe`` every ``INTERVAL_S`` how late it was called, in ns: what every callback had to wait about then.

    Started with the loop that is to be watched.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, observe: Callable[[float], None]) -> None:
        self._loop = loop
        self._observe = observe
        self._due = loop.time() + INTERVAL_S
        self._timer = loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        """No more."""
        self._timer.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        # A loop whose clock is coarse may call a timer a little early.
        self._observe(max(0.0, now - self._due) * SECOND)
        self._due = now + INTERVAL_S
        self._timer = self._loop.call_at(self._due, self._tick)
