"""One event loop in a background thread for all clients of the process, and what a client keeps there.

The thread starts with the first client and ends with the process, after whatever is open has been closed. A forked
process has no such thread: it makes clients of its own, and those it inherited say so.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import uvloop

from sage_core.errors import ConfigError, EngineError
from sage_core.units import SECONDS_MAX
from sage_live.client.ask import Ask
from sage_live.client.asking import Asking, AskingStream, AskingWhole, Delivery, Transport

_T = TypeVar("_T")
_Asking = TypeVar("_Asking", bound=Asking)

EXIT_S: Final = 5.0
"""What closing may take when the process ends."""


class LoopThread:
    """Made by :func:`loop_thread`."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._thread = threading.Thread(target=self._run, name="sage-client", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run it in the loop, and wait."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C among them
            future.cancel()
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _stop(self) -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close_all(), self.loop).result(EXIT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(EXIT_S)

    async def _close_all(self) -> None:
        await asyncio.gather(*(session.shut() for session in tuple(self.sessions)), return_exceptions=True)


_guard = threading.Lock()
_shared: LoopThread | None = None


def loop_thread() -> LoopThread:
    """This process's."""
    global _shared
    with _guard:
        if _shared is None:
            _shared = LoopThread()
        return _shared


def _forget() -> None:
    """In a forked process: threads are not inherited, and what another one locked stays locked."""
    global _guard, _shared
    if _shared is not None:
        atexit.unregister(_shared._stop)
    _guard = threading.Lock()
    _shared = None


os.register_at_fork(after_in_child=_forget)


class Session:
    """A client's end in the loop: its transport, and the requests that are underway. ``make`` builds the transport there.

    timeout_s: from a call to its answer, or between two pieces of a stream. retries: after answers that say come back
    later. A session that nobody holds any more closes itself.
    """

    def __init__(
        self, make: Callable[[], Coroutine[Any, Any, Transport]], *, timeout_s: float = 600.0, retries: int = 0
    ) -> None:
        self._closed = True
        self._process = os.getpid()
        self._timeout_s = _seconds(timeout_s)
        if retries < 0:
            raise ConfigError(f"retries: expected 0 or more, got {retries!r}")
        self._retries = retries
        self._live: set[Asking] = set()
        self._thread = loop_thread()
        self.transport = self._thread.call(make())
        self._closed = False
        self._thread.sessions.add(self)

    def __del__(self) -> None:
        if not self._closed and self._process == os.getpid():
            self._closed = True
            shutting = _shut(self._live, self.transport)
            try:
                asyncio.run_coroutine_threadsafe(shutting, self._thread.loop)
            except RuntimeError:  # the process is ending, and the loop has
                shutting.close()

    def whole(self, ask: Ask) -> AskingWhole:
        """Send it; the answer is a future's."""
        return self._started(AskingWhole(ask, *self._circumstances(ask)))

    def stream(self, ask: Ask, deliver: Callable[[Delivery], None]) -> AskingStream:
        """Send it; ``deliver`` is called in the loop's thread."""
        return self._started(AskingStream(ask, *self._circumstances(ask), deliver))

    def close(self) -> None:
        """Fail what is underway, close the connections, end what was started for this client. Twice is once."""
        if self._leave():
            self._thread.call(self.shut())

    async def aclose(self) -> None:
        """:meth:`close` for a coroutine in any loop."""
        if self._leave():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.shut(), self._thread.loop))

    async def shut(self) -> None:
        """In the loop's thread."""
        self._closed = True
        await _shut(self._live, self.transport)

    def _leave(self) -> bool:
        if self._closed or self._process != os.getpid():
            return False
        self._closed = True
        return True

    def _circumstances(self, ask: Ask) -> tuple[Transport, asyncio.AbstractEventLoop, set[Asking], float, int]:
        if self._process != os.getpid():
            raise ConfigError(
                f"this client was made in process {self._process}, of which this is a fork: make another here, with create()"
            )
        if self._closed:
            raise ConfigError("this client is closed: make another, with create()")
        timeout_s = self._timeout_s if ask.timeout_s is None else _seconds(ask.timeout_s)
        return self.transport, self._thread.loop, self._live, timeout_s, self._retries

    def _started(self, asking: _Asking) -> _Asking:
        asking.start()
        return asking


async def _shut(live: set[Asking], transport: Transport) -> None:
    for asking in tuple(live):
        asking.fail(EngineError("the client was closed before the answer was complete"))
    await transport.close()


def _seconds(timeout_s: float) -> float:
    if not 0 < timeout_s <= SECONDS_MAX:
        raise ConfigError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
    return timeout_s
