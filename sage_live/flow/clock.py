"""The clock of a flow: how long stages were busy, and when a batch has waited long enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from sage_core.units import SECOND, Nanos


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """Another one than :class:`RealClock` makes a test of waiting exact, and quick."""

    def now(self) -> Nanos:
        """Never runs backwards."""

    def call_at(self, at: Nanos, callback: Callable[[], None]) -> Timer:
        """Call it in the event loop's thread, once, at ``at`` or later."""


class RealClock:
    """CLOCK_MONOTONIC, and the timers of the running event loop."""

    def now(self) -> Nanos:
        return Nanos(time.monotonic_ns())

    def call_at(self, at: Nanos, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(max(0, at - time.monotonic_ns()) / SECOND, callback)
