"""One request on its way: tries, time-out, cancellation, and whom the answer goes to.

Rules:

* Everything but what is marked otherwise happens in the thread of the event loop.
* A request ends once: with an answer, an error, or because nobody wants it any more; then its exchange is cut.
* A stream whose reader falls behind is told to wait, up to the engine: what is not read is not produced.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Final, Protocol, TypeAlias

from sage_core.errors import EngineError
from sage_live.client.ask import Ask
from sage_live.client.refusals import NoAnswerInTime, refusal, refusal_in_stream
from sage_live.client.sse import Events
from sage_live.errors import ApiError

RETRIED: Final = (429, 503)
"""Answers that say: come back later."""

BACKOFF_S: Final = 0.5
"""Before the first retry, where the server does not say; doubles each time."""

AHEAD_MAX, AHEAD_MIN = 256, 64
"""Events that a stream may be ahead of its reader before it is told to wait; from how many it goes on."""


class Taker(Protocol):
    """Where an answer goes: :class:`sage_live.call.Answer`, but that it may fail in more ways than an engine has."""

    def complete(self, status: int, body: bytes, content_type: bytes) -> None: ...

    def begin(self, content_type: bytes) -> None: ...

    def piece(self, data: bytes) -> None: ...

    def finish(self, data: bytes) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Flight(Protocol):
    """A try that is underway. Nothing comes after :meth:`cancel`, and it does nothing when there is nothing to do."""

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Transport(Protocol):
    """Carries requests. ``send`` raises ApiError or tells the taker later, never before it returns."""

    def send(self, ask: Ask, taker: Taker) -> Flight: ...

    async def close(self) -> None: ...


class Asking(ABC):
    """A :class:`Taker`. ``live``: those that have not ended, itself among them while it lasts."""

    def __init__(
        self,
        ask: Ask,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        live: set[Asking],
        timeout_s: float,
        retries: int,
    ) -> None:
        self._ask = ask
        self._transport = transport
        self._loop = loop
        self._live = live
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = BACKOFF_S
        self._flight: Flight | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = 0.0  # when it began, or something last came
        self._begun = False
        self._over = False

    # --- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop.call_soon_threadsafe(self._start)

    def cancel(self) -> None:
        """Nobody wants it. Does not wait, and does nothing once it has ended."""
        if not self._over:
            with contextlib.suppress(RuntimeError):  # the loop has gone, and the request with it
                self._loop.call_soon_threadsafe(self.cut)

    # --- whom the answer goes to --------------------------------------------------------------------------------------

    @abstractmethod
    def ended(self, body: bytes) -> None:
        """The whole answer, or the end of a stream (empty)."""

    @abstractmethod
    def failed(self, error: Exception) -> None:
        """There is no answer, or no more of it."""

    def waits(self) -> bool:
        """Whether the silence is the reader's doing."""
        return False

    # --- an answer ----------------------------------------------------------------------------------------------------

    def complete(self, status: int, body: bytes, content_type: bytes) -> None:
        if status != 200:
            self.fail(refusal(status, body, {}))
        elif self._ask.stream:
            self.fail(EngineError(f"expected a stream, got {content_type.decode('latin-1')}; the server cannot stream"))
        elif self._end():
            self.ended(body)

    def begin(self, content_type: bytes) -> None:
        self._begun = True
        self._heard = self._loop.time()

    def piece(self, data: bytes) -> None:
        self._heard = self._loop.time()

    def finish(self, data: bytes) -> None:
        if self._end():
            self.ended(b"")

    def fail(self, error: Exception) -> None:
        if isinstance(error, ApiError) and error.status in RETRIED and self._retries and not self._begun:
            wait_s = self._backoff_s if error.retry_after_s is None else error.retry_after_s
            if self._loop.time() + wait_s < self._heard + self._timeout_s:
                self._retries -= 1
                self._backoff_s *= 2
                self._flight = None
                self._loop.call_later(wait_s, self._try)
                return
        self.cut()
        self.failed(error)

    def cut(self) -> None:
        """End it without a word."""
        if self._end() and self._flight is not None:
            self._flight.cancel()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._over:
            return
        self._live.add(self)
        self._heard = self._loop.time()
        self._timer = self._loop.call_at(self._heard + self._timeout_s, self._late)
        self._try()

    def _try(self) -> None:
        if not self._over:
            try:
                self._flight = self._transport.send(self._ask, self)
            except Exception as error:  # whatever it is, somebody waits for it in another thread
                self.fail(error)

    def _late(self) -> None:
        now = self._loop.time()
        if self.waits():
            self._heard = now
        if now < self._heard + self._timeout_s:
            self._timer = self._loop.call_at(self._heard + self._timeout_s, self._late)
        else:
            what = "nothing more" if self._begun else "no answer"
            self.cut()
            self.failed(NoAnswerInTime(f"{what} within {self._timeout_s:g} s; timeout_s is how long to wait"))

    def _end(self) -> bool:
        """Whether it had not ended yet."""
        if self._over:
            return False
        self._over = True
        self._live.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        return True


class AskingWhole(Asking):
    """For an answer in one piece; :attr:`answer` has it, and waiting for it is up to the caller."""

    def __init__(
        self,
        ask: Ask,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        live: set[Asking],
        timeout_s: float,
        retries: int,
    ) -> None:
        super().__init__(ask, transport, loop, live, timeout_s, retries)
        self.answer: Future[bytes] = Future()

    def ended(self, body: bytes) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
            self.answer.set_result(body)

    def failed(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)


Delivery: TypeAlias = list[bytes] | Exception | None
"""The data of events (none: the stream begins), why there are no more, or None: the end."""


class AskingStream(Asking):
    """For a stream. ``deliver`` is called in the loop's thread; RuntimeError from it: its reader has gone."""

    def __init__(
        self,
        ask: Ask,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        live: set[Asking],
        timeout_s: float,
        retries: int,
        deliver: Callable[[Delivery], None],
    ) -> None:
        super().__init__(ask, transport, loop, live, timeout_s, retries)
        self._deliver = deliver
        self._events = Events()
        self._given = 0  # events; written by the loop's thread only
        self._taken = 0  # by the reader's only
        self._paused = False

    def took(self, events: int) -> None:
        """From the reader's thread: it has read so many more."""
        self._taken += events
        # Set before the events that make it so are delivered, so whoever has read those sees it.
        if self._paused and self._given - self._taken <= AHEAD_MIN:
            self._loop.call_soon_threadsafe(self._go_on)

    def waits(self) -> bool:
        return self._paused

    def begin(self, content_type: bytes) -> None:
        super().begin(content_type)
        self._tell([])

    def piece(self, data: bytes) -> None:
        super().piece(data)
        self._pass_on(self._events.feed(data))

    def finish(self, data: bytes) -> None:
        self._pass_on(self._events.feed(data) + self._events.end())
        super().finish(data)

    def ended(self, body: bytes) -> None:
        self._tell(None)

    def failed(self, error: Exception) -> None:
        self._tell(error)

    def _pass_on(self, events: list[bytes]) -> None:
        error = None
        for place, event in enumerate(events):
            if event == b"[DONE]" or (error := refusal_in_stream(event)) is not None:
                events = events[:place]
                break
        if events and not self._over:
            self._given += len(events)
            if self._given - self._taken > AHEAD_MAX and not self._paused and self._flight is not None:
                self._paused = True
                self._flight.pause()
            self._tell(events)
        if error is not None:
            self.fail(error)

    def _tell(self, delivery: Delivery) -> None:
        try:
            self._deliver(delivery)
        except RuntimeError:
            self.cut()

    def _go_on(self) -> None:
        if self._paused and not self._over and self._flight is not None:
            self._paused = False
            self._flight.resume()
