"""The SimPy driver: one simulated run.

SimPy is the clock of what happens *to* the system: faults, restarts, scrapes, users who come back after thinking, the
end of the run. Between two such instants nothing outside changes, and the event loop (native, or its meaning in
Python) carries messages and steps devices and plane on its own: what SimPy need not see it does not see. What SimPy
brings comes before everything else at the same instant.
"""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import simpy
from simpy.events import Event as SimpyEvent

from sage_core import events as e
from sage_core.errors import ConfigError
from sage_core.load import Arrival, Arrivals, ColumnLoad, Contents, Load
from sage_core.native_plane import NativePlane, Plane
from sage_core.plane import Counts
from sage_core.rng import Streams
from sage_core.stepper import ColumnRecorder, Recorder
from sage_core.units import NEVER, Nanos, seconds
from sage_sim.device import Device, MakeDevice, Metered, Starting, Why
from sage_sim.engine import ReplicaUsage
from sage_sim.faults import Fault
from sage_sim.loop import NativeLoop
from sage_sim.loop_reference import Loop
from sage_sim.network import NetworkConfig, Way

BUDGET = 4096
"""Entries the loop may handle before it lets Python look at signals and progress."""


@dataclass(frozen=True, slots=True)
class Finish:
    """How a run ended. CPU figures are of this process while it was inside the plane (``control``) and in all."""

    now: int
    digest: bytes
    steps: int
    control_s: float
    total_s: float
    interrupted: bool


class SimDriver:
    """One simulated run. Build, call :meth:`run` once.

    plane: a native one is stepped by the native loop, one in Python by the loop in Python. report_interval_s: how often
    each device is scraped; a report is as old as the network made it when the plane sees it, and up to one interval
    older when the plane uses it. 0 switches reports off.
    """

    def __init__(
        self,
        plane: Plane,
        load: Load,
        devices: Sequence[MakeDevice],
        streams: Streams,
        *,
        network: NetworkConfig | None = None,
        report_interval_s: float = 1.0,
        faults: Sequence[Fault] = (),
        until_s: float | None = None,
        record: Recorder | ColumnRecorder | None = None,
    ) -> None:
        if not devices:
            raise ConfigError("cluster: no devices; a run needs at least one")
        if not 0 <= report_interval_s < float("inf"):
            raise ConfigError(f"report_interval_s: expected seconds from 0, got {report_interval_s!r}")
        if until_s is not None and not until_s > 0:
            raise ConfigError(f"until_s: expected seconds above 0, got {until_s!r}")
        for fault in faults:
            if not 0 <= fault.device < len(devices):
                raise ConfigError(f"fault.device: expected 0 to {len(devices) - 1}, got {fault.device}")
        self._plane = plane
        self._load = load
        self._report_interval = seconds(report_interval_s)
        self._faults = list(faults)
        self._until = NEVER if until_s is None else seconds(until_s)
        self._env = simpy.Environment(initial_time=0)
        self._loop: Loop | NativeLoop
        if isinstance(plane, NativePlane):
            self._loop = NativeLoop(plane, record)
        elif isinstance(record, ColumnRecorder):
            raise ConfigError(
                "record: a plane in Python is recorded step by step; a recorder of columns needs a native one"
            )
        else:
            self._loop = Loop(plane, record)
        self._columns = record if isinstance(record, ColumnRecorder) else None
        self._slots = [_Slot(make) for make in devices]
        config = network or NetworkConfig()
        for index in range(len(devices)):
            self._loop.add_slot(
                Way(config, streams.stream(f"network.to_device.{index}")),
                Way(config, streams.stream(f"network.to_plane.{index}")),
            )
        self._replica_next = 0
        self._usage: dict[int, ReplicaUsage] = {}
        self._feed: Iterator[Sequence[Arrival] | Arrivals] = iter(())
        self._started = time.process_time()

    @property
    def counts(self) -> Counts:
        """How many requests arrived, and how they ended."""
        return self._plane.counts

    def output_tokens(self, request: int, stage: int) -> int:
        """The oracle, for simulated devices only: the true size of a result of a live request."""
        return self._loop.output_tokens(request, stage)

    def contents(self, request: int) -> Contents | None:
        """What the prompt of a live request begins with; for simulated devices only."""
        return self._loop.contents(request)

    def run(self, tick: Callable[[int, Plane], None] | None = None) -> Finish:
        """Run to the end of the load and of every request, or to ``until_s``; then fail what is left.

        ``tick(now, plane)`` is called about once a second of wall time, for progress. Ctrl-C ends the run early, between
        two steps: everything decided so far is recorded and every live request failed as interrupted.
        """
        for index in range(len(self._slots)):
            self._join(index)
        for fault in self._faults:
            self._at(seconds(fault.at_s), self._on_fault, fault)
        self._begin_load()
        if self._report_interval:
            self._at(self._report_interval, self._on_scrape, None)
        reason = "run ended with the request unserved"
        interrupted = False
        try:
            with _interrupts_held(lambda: self._loop.stop_at(0)) as interrupt:
                self._pump(tick, interrupt)
            interrupted = interrupt.came
        except KeyboardInterrupt:  # the second one, or from a recorder or a tick
            if self._loop.deciding:
                raise  # in the middle of a policy: nobody knows what was decided
            interrupted = True
        if interrupted:
            reason = "run was interrupted"
        if self._plane.live:
            self._loop.step(self._loop.now, (e.RunEnded(reason),))
        self._plane.check()
        return self.finish(interrupted)

    def finish(self, interrupted: bool = False) -> Finish:
        """Where the run stands: how it ended, or how far it came before an exception."""
        loop = self._loop
        total_s = time.process_time() - self._started
        return Finish(loop.now, loop.digest, loop.steps, loop.control_ns / 1e9, total_s, interrupted)

    def usage(self) -> dict[int, ReplicaUsage]:
        """What each replica that ever joined has done, by its id; when it left, or now. Without devices that do not
        know."""
        for slot in self._slots:
            self._take_usage(slot)
        return dict(self._usage)

    def _take_usage(self, slot: _Slot) -> None:
        # A device that drained is idle since: asking it later gives the same.
        if isinstance(slot.device, Metered):
            self._usage.update((usage.replica, usage) for usage in slot.device.usage(Nanos(self._loop.now)))

    # --- virtual time ---------------------------------------------------------------------------------------------

    def _pump(self, tick: Callable[[int, Plane], None] | None, interrupt: _Interrupt) -> None:
        loop = self._loop
        told = time.monotonic()
        while not interrupt.came:
            outside = self._outside_at
            why = loop.run(min(outside, self._until + 1), BUDGET)
            if why is Why.IDLE or interrupt.came:
                return
            if self._columns is not None and why is Why.FULL:
                self._columns.flush()
            elif why is Why.STARVED:
                self._feed_more()
                loop.begin_arrivals()
            elif why is Why.REACHED:
                outside = self._outside_at  # the loop's callbacks may have brought it forward
                if outside > self._until or outside == NEVER or loop.next_at < outside:
                    return
                self._env.step()
                if loop.idle:
                    return
            if tick is not None and time.monotonic() - told > 1.0:
                told = time.monotonic()
                tick(loop.now, self._plane)

    @property
    def _outside_at(self) -> int:
        queue = self._env._queue  # env.peek() answers with a float where there is nothing
        return int(queue[0][0]) if queue else NEVER

    @property
    def _now(self) -> Nanos:
        return self._env.now  # type: ignore[return-value]  # whole numbers in, whole numbers out

    def _at(self, when: int, call: Callable[[Any], None], value: Any) -> None:
        event = SimpyEvent(self._env)
        event._ok = True
        event._value = value
        event.callbacks = [lambda fired: call(fired._value)]
        self._env.schedule(event, delay=when - self._env.now)

    # --- load -----------------------------------------------------------------------------------------------------

    def _begin_load(self) -> None:
        load = self._load
        if isinstance(load, ColumnLoad) and isinstance(self._loop, NativeLoop):
            self._feed = (columns for columns in load.columns() if len(columns.at))
        else:
            # A closed loop numbers its requests as they are issued: none may be drawn before its time.
            self._feed = ((arrival,) for arrival in load.arrivals())
            ended = weakref.WeakMethod(self._on_ended)  # the loop is ours, and may be native
            self._loop.on_ended(lambda now, request: ended()(now, request))  # type: ignore[misc]  # alive while it runs
        self._feed_more()
        self._loop.begin_arrivals()

    def _feed_more(self) -> None:
        more = next(self._feed, None)
        if more is None:
            self._loop.end_arrivals()
        else:
            self._loop.feed(more)  # type: ignore[arg-type]  # columns go to the native loop only

    def _on_ended(self, now: int, request: int) -> None:
        following = self._load.ended(Nanos(now), request)
        if following is not None:
            self._loop.expect(1)
            self._at(following.at, self._on_arrival, following)
            self._loop.stop_at(following.at)

    def _on_arrival(self, arrival: Arrival) -> None:
        self._loop.expect(-1)
        self._loop.arrive(self._now, arrival)

    # --- devices --------------------------------------------------------------------------------------------------

    def _join(self, index: int) -> None:
        slot = self._slots[index]
        self._take_usage(slot)
        device = slot.device = slot.make(self._replica_next)
        slot.life += 1
        self._replica_next = max(self._replica_next, *(joined.replica + 1 for joined in device.joined()))
        self._loop.join(self._now, index, device)

    def _on_scrape(self, _: Any) -> None:
        if self._loop.only_reports and not self._env._queue:
            return  # nothing else will ever happen: live requests wait for a replica that does not come
        self._loop.scrape(self._now)
        self._at(self._now + self._report_interval, self._on_scrape, None)

    # --- faults ---------------------------------------------------------------------------------------------------

    def _on_fault(self, fault: Fault) -> None:
        if fault.restart_after_s is not None:
            life = self._slots[fault.device].life
            self._at(self._now + seconds(fault.restart_after_s), self._on_restart, (fault.device, life))
        if not self._loop.present(fault.device):
            return
        if fault.kind == "crash":
            self._crash(fault.device)
        else:
            self._loop.drain(self._now, fault.device)

    def _on_restart(self, failed: tuple[int, int]) -> None:
        index, life = failed
        if self._slots[index].life != life:
            return  # another restart was faster
        if self._loop.present(index):  # still draining: its time is up
            self._crash(index)
        slot = self._slots[index]
        slot.life += 1
        device = slot.make(self._replica_next)
        ready = self._now + (device.startup_ns() if isinstance(device, Starting) else 0)
        self._at(ready, self._on_started, (index, slot.life))

    def _on_started(self, started: tuple[int, int]) -> None:
        index, life = started
        if self._slots[index].life == life:
            self._join(index)

    def _crash(self, index: int) -> None:
        self._loop.leave(self._now, index)
        self._take_usage(self._slots[index])
        self._slots[index].device = None  # what it was doing is not done


class _Interrupt:
    """Whether Ctrl-C came."""

    came = False


@contextmanager
def _interrupts_held(stop: Callable[[], None]) -> Iterator[_Interrupt]:
    """Ctrl-C and SIGTERM are noted, so that they cannot land in the middle of a step of the plane or lose the run;
    ``stop`` is called for the first one.

    The second one is raised as KeyboardInterrupt. Outside the main thread, where signals never arrive, nothing is changed.
    """
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: object) -> None:
        if interrupt.came:
            raise KeyboardInterrupt
        interrupt.came = True
        stop()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Slot:
    """A place for a device, which may die and come back; ``life`` counts how often it came."""

    def __init__(self, make: MakeDevice) -> None:
        self.make = make
        self.device: Device | None = None
        self.life = 0
