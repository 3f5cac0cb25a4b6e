"""The simulated actuator: what a job manager asks for happens in virtual time.

Instances take their time to start and to drain, and crash when they are made to; nothing runs. It answers how long a cluster
takes to come up, what a rolling restart costs, and what is left when a node goes, with the manager that decides for real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import simpy
from simpy.events import Event as SimpyEvent

from sage_core.jobs import (
    InstanceExited,
    InstanceHealthy,
    InstanceUnhealthy,
    JobAction,
    JobEvent,
    JobManager,
    JobState,
    Kill,
    NodeLeft,
    ReplicaPhase,
    Start,
    Stop,
)
from sage_core.units import NEVER, Nanos

Span = Callable[[Start], int]
"""Nanoseconds, for the instance that was started so."""


class JobChange(NamedTuple):
    """From ``at`` on the job is in ``state``, with so many replicas healthy."""

    at: Nanos
    job: str
    state: JobState
    healthy: int


class SimulatedActuator:
    """Pumps ``manager`` on a clock of its own, from 0.

    startup: from Start to healthy. drain: from Stop to exit. uptime: from healthy to a crash, NEVER for none; None: nobody
    crashes. ``changes`` has what became of the jobs, in order.
    """

    def __init__(self, manager: JobManager, startup: Span, drain: Span, uptime: Span | None = None) -> None:
        self.changes: list[JobChange] = []
        self._manager = manager
        self._startup, self._drain, self._uptime = startup, drain, uptime
        self._env = simpy.Environment(initial_time=0)
        self._live: dict[int, Start] = {}
        self._inbox: list[JobEvent] = []
        self._stepping = False
        self._last: dict[str, tuple[JobState, int]] = {}

    def run(self, scheduled: Sequence[tuple[Nanos, JobEvent]], until: Nanos) -> None:
        """Let ``scheduled`` happen at their instants, and go on to ``until``. IllegalEvent as of the manager."""
        for at, event in scheduled:
            self._later(at - self._now, event)
        self._env.run(until=until)

    @property
    def _now(self) -> Nanos:
        return Nanos(self._env.now)  # type: ignore[arg-type]  # whole numbers in, whole numbers out

    def _later(self, delay: int, event: JobEvent) -> None:
        self._at(delay, lambda: self._happens(event))

    def _at(self, delay: int, call: Callable[[], None]) -> None:
        timeout: SimpyEvent = self._env.timeout(delay)
        assert timeout.callbacks is not None
        timeout.callbacks.append(lambda _: call())

    def _happens(self, event: JobEvent) -> None:
        match event:
            case InstanceHealthy() | InstanceUnhealthy() | InstanceExited() if event.instance not in self._live:
                return
            case InstanceExited():
                del self._live[event.instance]
            case InstanceHealthy() if self._uptime is not None:
                uptime = self._uptime(self._live[event.instance])
                if uptime < NEVER:
                    self._later(uptime, InstanceExited(event.instance, "crashed"))
            case NodeLeft():
                self._live = {number: each for number, each in self._live.items() if each.node != event.node}
        self._inbox.append(event)
        if not self._stepping:  # what else happens at this instant comes before the step
            self._stepping = True
            self._at(0, self._step)

    def _step(self) -> None:
        self._stepping = False
        events, self._inbox = self._inbox, []
        now = self._now
        for action in self._manager.step(now, events):
            self._carry_out(action)
        wakeup = self._manager.wakeup_at
        if wakeup < NEVER:
            self._at(wakeup - now, lambda: self._wake(wakeup))
        for name, status in self._manager.jobs().items():
            seen = status.state, sum(each.state is ReplicaPhase.HEALTHY for each in status.instances)
            if self._last.get(name) != seen:
                self._last[name] = seen
                self.changes.append(JobChange(now, name, *seen))

    def _wake(self, at: Nanos) -> None:
        """Unless a step in between moved the instant."""
        if self._manager.wakeup_at == at:
            self._step()

    def _carry_out(self, action: JobAction) -> None:
        match action:
            case Start():
                self._live[action.instance] = action
                self._later(self._startup(action), InstanceHealthy(action.instance))
            case Stop():
                self._later(self._drain(self._live[action.instance]), InstanceExited(action.instance, "stopped"))
            case Kill():
                self._later(0, InstanceExited(action.instance, "killed"))
