"""The asyncio driver: pumps the control plane in real time.

Everything that happens within one turn of the event loop is one step of the plane, taken at the end of the turn: a burst
of arrivals costs one decision round, and an arriving request whose engine is idle leaves in the step that it arrives in.
The log has the form of a simulated run's, so it replays the same way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from sage_core import events as e
from sage_core.commands import Cancel, Dispatch, Fail, Reject, Respond
from sage_core.errors import IllegalEvent
from sage_core.native_plane import Plane
from sage_core.stepper import ColumnRecorder, Recorder, Stepper
from sage_core.units import NEVER, Nanos

_log = logging.getLogger(__name__)

Post: TypeAlias = Callable[[e.AnyEvent], None]
"""Tells the driver what happened."""

Outcome: TypeAlias = Respond | Reject | Fail | e.RequestCancelled
"""How a request ended."""

Ended: TypeAlias = Callable[[Outcome], None]
"""Told once how a request ended."""


class Backend(Protocol):
    """One device with one or more replicas on it. Everything is called in the event loop's thread; nothing may block."""

    def joined(self) -> Sequence[e.ReplicaJoined]:
        """What each replica says when it becomes healthy; none yet is fine, it may be posted later."""

    def start(self, post: Post, now: Callable[[], Nanos]) -> None:
        """From now on commands come, and events go to ``post``."""

    def carry_out(self, command: Dispatch | Cancel) -> None:
        """Do it, now."""

    async def close(self) -> None:
        """Stop; nothing more is posted."""


class LiveDriver:
    """Build inside a running event loop; ``now`` counts nanoseconds from then on.

    A policy or a backend that breaks its contract ends everything: every live request is failed by :attr:`broken`, and
    every later call raises it.
    """

    def __init__(self, plane: Plane, record: Recorder | ColumnRecorder | None = None) -> None:
        self._stepper = Stepper(plane, record)
        self._plane = plane
        self._loop = asyncio.get_running_loop()
        self.origin_ns = time.monotonic_ns()
        self._inbox: list[e.AnyEvent] = []
        self._turn: asyncio.Handle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = NEVER
        self._backends: dict[Backend, None] = {}
        self._backend_of: dict[int, Backend] = {}
        self._ends: dict[int, Ended] = {}
        self._replica_next = 0
        self.broken: Exception | None = None
        self.on_broken: Callable[[Exception], None] | None = None
        """Told once, when the plane, a policy or a backend has broken its contract."""
        self.steps = 0
        self.control_ns = 0
        """CPU spent deciding: from the events of a turn to the commands, the log and the rows."""

    @property
    def now(self) -> Nanos:
        """Nanoseconds since the start."""
        return self.clock()

    def clock(self) -> Nanos:
        """The same, to hand out: backends ask for every piece of an answer."""
        return time.monotonic_ns() - self.origin_ns  # type: ignore[return-value]  # Nanos() is a call

    @property
    def plane(self) -> Plane:
        """The plane that is pumped: to look at, not to step."""
        return self._plane

    @property
    def digest(self) -> bytes:
        """Of the last step."""
        return self._stepper.digest

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._ends)

    def replica_number(self) -> int:
        """An id for a replica that is going to join; each is given out once."""
        self._replica_next += 1
        return self._replica_next - 1

    def add(self, backend: Backend) -> None:
        """A backend joins with the replicas that it has by now."""
        self._check()
        self._backends[backend] = None
        backend.start(self.post, self.clock)
        for joined in backend.joined():
            self.join(backend, joined)

    def join(self, backend: Backend, joined: e.ReplicaJoined) -> None:
        """A replica of a backend that was added is healthy."""
        self._backend_of[joined.replica] = backend
        self._replica_next = max(self._replica_next, joined.replica + 1)
        self.post(joined)

    def leave(self, replica: int) -> None:
        """A replica is gone with whatever it held; its backend gets no more commands for it."""
        if self._backend_of.pop(replica, None) is not None:
            self.post(e.ReplicaLeft(replica))

    async def remove(self, backend: Backend) -> None:
        """A backend goes, with the replicas that it still has."""
        for replica in [replica for replica, owner in self._backend_of.items() if owner is backend]:
            self.leave(replica)
        if self._backends.pop(backend, self) is None:
            await backend.close()

    def submit(self, request: e.RequestArrived, ended: Ended) -> None:
        """A client asks; ``ended`` is told how it ended, in the loop's thread."""
        self._check()
        if request.request in self._ends:
            raise IllegalEvent(f"request {request.request} was submitted twice")
        self._ends[request.request] = ended
        self.post(request)

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
        if self.broken is None:
            self._step((e.RunEnded(reason),))
        if self._alarm is not None:
            self._alarm.cancel()
        for backend in self._backends:
            await backend.close()
        if self._turn is not None:  # what the backends said last: nobody is there to hear it
            self._turn.cancel()
        if self.broken is None:
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
        if self.broken is not None:
            return
        try:
            started = time.monotonic_ns()
            commands = self._stepper.step(Nanos(started - self.origin_ns), events)
            self.control_ns += time.monotonic_ns() - started
            self.steps += 1
            for command in commands:
                if isinstance(command, (Dispatch, Cancel)):  # a union would be made each time
                    backend = self._backend_of.get(command.replica)
                    if backend is not None:  # else it left in this turn, and the plane hears of it in the next
                        backend.carry_out(command)
                else:
                    self._ended(command.request, command)
            for event in events:
                if type(event) is e.RequestCancelled:
                    self._ended(event.request, event)
        except Exception as error:
            self._break(error)
            return
        wakeup = self._plane.wakeup_at
        if wakeup != self._alarm_at:
            self._arm(wakeup)

    def _ended(self, request: int, outcome: Outcome) -> None:
        ended = self._ends.pop(request, None)
        if ended is not None:
            ended(outcome)

    def _arm(self, wakeup: Nanos) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = wakeup
        if wakeup < NEVER:
            self._alarm = self._loop.call_later(max(0, wakeup - self.now) / 1e9, self._on_alarm)

    def _break(self, error: Exception) -> None:
        self.broken = error
        _log.error("the control plane broke", exc_info=error)
        ends, self._ends = self._ends, {}
        for request, ended in ends.items():
            ended(Fail(request, f"the control plane broke: {error}"))
        if self.on_broken is not None:
            self.on_broken(error)

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken
