"""The asyncio driver: pumps the control plane in real time.

Everything that happens within one turn of the event loop is one step of the plane, taken at the end of the turn: a burst
of arrivals costs one decision round, and an arriving request whose engine is idle leaves in the step that it arrives in.
The log has the form of a simulated run's, so it replays the same way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond
from sage_core.errors import IllegalEvent
from sage_core.log import Chain
from sage_core.native_plane import Plane
from sage_core.units import NEVER, Nanos

Post: TypeAlias = Callable[[e.AnyEvent], None]
"""Tells the driver what happened."""

Outcome: TypeAlias = Respond | Reject | Fail | e.RequestCancelled
"""How a request ended."""


class Backend(Protocol):
    """One device with one or more replicas on it. Everything is called in the event loop's thread; nothing may block."""

    def joined(self) -> list[e.ReplicaJoined]: ...

    def start(self, post: Post, now: Callable[[], Nanos]) -> None:
        """From now on commands come, and events go to ``post``."""

    def carry_out(self, command: Dispatch | Cancel) -> None: ...

    async def close(self) -> None: ...


class Recorder(Protocol):
    """Told of every step: what happened, what was decided, and the log entry."""

    def __call__(
        self, now: int, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None: ...


class LiveDriver:
    """Build inside a running event loop; ``now`` counts nanoseconds from then on.

    A policy or a backend that breaks its contract ends everything: every live request's future raises its error, and so
    does every later call.
    """

    def __init__(self, plane: Plane, record: Recorder | None = None) -> None:
        self._plane = plane
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._origin = time.monotonic_ns()
        self._chain = Chain()
        self._inbox: list[e.AnyEvent] = []
        self._turn: asyncio.Handle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = NEVER
        self._backends: list[Backend] = []
        self._backend_of: dict[int, Backend] = {}
        self._ends: dict[int, asyncio.Future[Outcome]] = {}
        self._broken: BaseException | None = None
        self.steps = 0

    @property
    def now(self) -> Nanos:
        """Nanoseconds since the start."""
        return Nanos(time.monotonic_ns() - self._origin)

    @property
    def digest(self) -> bytes:
        """Of the last step."""
        return self._chain.digest

    def add(self, backend: Backend) -> None:
        """A backend joins with all its replicas."""
        self._check()
        self._backends.append(backend)
        backend.start(self.post, lambda: self.now)
        for joined in backend.joined():
            self._backend_of[joined.replica] = backend
            self.post(joined)

    def submit(self, request: e.RequestArrived) -> asyncio.Future[Outcome]:
        """A client asks; the future tells how it ended."""
        self._check()
        if request.request in self._ends:
            raise IllegalEvent(f"request {request.request} was submitted twice")
        end = self._ends[request.request] = self._loop.create_future()
        self.post(request)
        return end

    def cancel(self, request: int) -> None:
        """The client went away. Nothing happens if the request has ended."""
        if request in self._ends:
            self.post(e.RequestCancelled(request))

    def post(self, event: e.AnyEvent) -> None:
        """Something happened; the plane hears of it at the end of this turn of the loop."""
        self._inbox.append(event)
        if self._turn is None:
            self._turn = self._loop.call_soon(self._pump)

    async def close(self, reason: str = "the driver was closed") -> None:
        """Fail what is live, stop the backends."""
        if self._turn is not None:
            self._turn.cancel()
            self._pump()
        if self._broken is None:
            self._step((e.RunEnded(reason),))
        if self._alarm is not None:
            self._alarm.cancel()
        for backend in self._backends:
            await backend.close()
        if self._broken is None:
            self._plane.check()

    # --- a step ---------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        self._turn = None
        events, self._inbox = self._inbox, []
        self._step(events)

    def _on_alarm(self) -> None:
        self._alarm, self._alarm_at = None, NEVER
        if self._turn is None:
            self._turn = self._loop.call_soon(self._pump)

    def _step(self, events: Sequence[e.AnyEvent]) -> None:
        if self._broken is not None:
            return
        now = self.now
        try:
            commands = self._plane.step(now, events)
            step = self._chain.step(now, events, commands)
            self.steps += 1
            if self._record is not None:
                self._record(now, events, commands, step.events, step.digest)
            for command in commands:
                if isinstance(command, Dispatch | Cancel):
                    self._backend_of[command.replica].carry_out(command)
                else:
                    self._ended(command.request, command)
            for event in events:
                if isinstance(event, e.RequestCancelled):
                    self._ended(event.request, event)
        except Exception as error:
            self._break(error)
            return
        self._arm(self._plane.wakeup_at)

    def _ended(self, request: int, outcome: Outcome) -> None:
        end = self._ends.pop(request, None)
        if end is not None and not end.done():  # done: its waiter was cancelled
            end.set_result(outcome)

    def _arm(self, wakeup: int) -> None:
        if wakeup == self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = Nanos(wakeup)
        if wakeup < NEVER:
            self._alarm = self._loop.call_later(max(0, wakeup - self.now) / 1e9, self._on_alarm)

    def _break(self, error: Exception) -> None:
        self._broken = error
        ends, self._ends = self._ends, {}
        for end in ends.values():
            if not end.done():
                end.set_exception(error)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken
