"""A timer that is right to some ten microseconds, for either event loop.

uvloop rounds timers to whole milliseconds and asyncio rounds them up to the next one: up to a millisecond of send lag that
the measured system would be blamed for. A timerfd is a file descriptor that becomes readable at an instant of
CLOCK_MONOTONIC, so the loop wakes for it as it does for a socket. Where the system has none (not Linux), the loop's own
timer does, at its own resolution.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

from sage_core.units import SECOND

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK | TFD_CLOEXEC have the same values


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Alarm:
    """Calls ``ring()`` once for each ``set``, in the running loop."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        libc = ctypes.CDLL(None)
        self._fd = -1
        if hasattr(libc, "timerfd_create"):
            self._fd = libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS)
        if self._fd >= 0:
            self._spec = _TimerSpec()
            self._at = ctypes.byref(self._spec)
            self._settime = libc.timerfd_settime
            self._loop.add_reader(self._fd, self._read)

    def set(self, instant_ns: int) -> None:
        """Ring at ``instant_ns`` of CLOCK_MONOTONIC, at once if that has passed; replaces an earlier setting."""
        if self._fd >= 0:
            value = self._spec.value
            value.seconds, value.nanoseconds = divmod(max(instant_ns, 1), SECOND)  # zero would disarm it
            self._settime(self._fd, _ABSOLUTE, self._at, None)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later(max(0, instant_ns - time.monotonic_ns()) / SECOND, self._ring)

    def close(self) -> None:
        """Ring no more."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._handle is not None:
            self._handle.cancel()

    def _read(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # it was set anew between waking and reading
            return
        self._ring()
