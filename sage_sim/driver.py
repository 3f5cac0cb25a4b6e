"""The SimPy driver: pumps the control plane and the simulated devices through virtual time.

SimPy is the clock and nothing else. Events that happen at one instant are handed to the plane in one step, after all of
them are known: the pump runs at a lower priority than everything else at that instant. What SimPy need not see it does
not see: a device publishes when it next has something to say, and is asked then.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import simpy
from simpy.events import Event as SimpyEvent

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch
from sage_core.errors import ConfigError, IllegalEvent, PolicyError
from sage_core.load import Arrival, Load
from sage_core.log import Chain
from sage_core.plane import ControlPlane, Counts
from sage_core.rng import Streams
from sage_core.units import NEVER, Nanos, request_of, seconds
from sage_sim.faults import Fault
from sage_sim.network import NetworkConfig, Way

HELD_MAX = 10_000
"""Wakeups in a row that decide nothing: a policy that always wants to wait a little longer would never end."""

_PUMP_PRIORITY = 9  # after everything else at the same instant; SimPy's own are 0 and 1


class Device(Protocol):
    """What the driver needs of a simulated device: a BackendModel that can crash."""

    def joined(self) -> list[e.ReplicaJoined]: ...
    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[e.AnyEvent]: ...
    @property
    def wakeup_at(self) -> Nanos: ...
    def report(self, now: Nanos) -> list[e.ReplicaReported]: ...


MakeDevice = Callable[[int], Device]
"""A device whose first replica has the given id, the others the ids after it."""


class Recorder(Protocol):
    """Told of every step: what happened, what was decided, and the log entry."""

    def __call__(
        self, now: int, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None: ...


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

    report_interval_s: how often each device is scraped; a report is as old as the network made it when the plane sees
    it, and up to one interval older when the plane uses it. 0 switches reports off.
    """

    def __init__(
        self,
        plane: ControlPlane,
        load: Load,
        devices: Sequence[MakeDevice],
        streams: Streams,
        *,
        network: NetworkConfig | None = None,
        report_interval_s: float = 1.0,
        faults: Sequence[Fault] = (),
        until_s: float | None = None,
        record: Recorder | None = None,
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
        self._make = list(devices)
        self._streams = streams
        self._network = network or NetworkConfig()
        self._report_interval = seconds(report_interval_s)
        self._faults = list(faults)
        self._until = NEVER if until_s is None else seconds(until_s)
        self._record = record
        self._env = simpy.Environment(initial_time=0)
        self._inbox: list[e.AnyEvent] = []
        self._pump_due = False
        self._plane_wakeup = NEVER
        self._chain = Chain()
        self._truth: dict[int, int] = {}
        self._slots: list[_Slot] = []
        self._slot_of: dict[int, _Slot] = {}
        self._replica_next = 0
        self._arrivals: Iterator[Arrival] = iter(())
        self._loading = True
        self._pending = 0  # closed-loop arrivals on their way
        self._reports_due = 0  # reports on their way
        self._steps = 0
        self._held = 0  # wakeups since anything but a report happened
        self._control_ns = 0
        self._started = time.process_time()

    @property
    def counts(self) -> Counts:
        """How many requests arrived, and how they ended."""
        return self._plane.counts

    def output_tokens(self, request: int) -> int:
        """The oracle, for simulated devices only: the true output length of a live request."""
        return self._truth[request]

    def run(self, tick: Callable[[int, ControlPlane], None] | None = None) -> Finish:
        """Run to the end of the load and of every request, or to ``until_s``; then fail what is left.

        ``tick(now, plane)`` is called about once a second of wall time, for progress. Ctrl-C ends the run early, between
        two steps: everything decided so far is recorded and every live request failed as interrupted.
        """
        for index, make in enumerate(self._make):
            self._slots.append(_Slot(index, make, self._network, self._streams))
            self._join(self._slots[-1])
        for fault in self._faults:
            self._at(seconds(fault.at_s), self._on_fault, fault)
        self._arrivals = self._load.arrivals()
        self._next_arrival()
        if self._report_interval:
            self._at(self._report_interval, self._on_scrape, None)
        reason = "run ended with the request unserved"
        interrupted = False
        try:
            with _interrupts_held() as interrupt:
                self._loop(tick, interrupt)
            interrupted = interrupt.came
        except KeyboardInterrupt:  # from a recorder or a tick
            interrupted = True
        if interrupted:
            reason = "run was interrupted"
        now = self._now
        if self._plane.live:
            self._chain_and_record(now, (e.RunEnded(reason),), self._plane.close(now, reason))
        else:
            self._plane.check()
        return self.finish(interrupted)

    def finish(self, interrupted: bool = False) -> Finish:
        """Where the run stands: how it ended, or how far it came before an exception."""
        return Finish(
            self._now,
            self._chain.digest,
            self._steps,
            self._control_ns / 1e9,
            time.process_time() - self._started,
            interrupted,
        )

    # --- virtual time ---------------------------------------------------------------------------------------------

    def _loop(self, tick: Callable[[int, ControlPlane], None] | None, interrupt: _Interrupt) -> None:
        env = self._env
        step = env.step
        queue = env._queue  # the test SimPy itself makes; env.peek() costs a call per event
        told = time.monotonic()
        count = 0
        while queue and queue[0][0] <= self._until and not interrupt.came:
            step()
            count += 1
            if tick is not None and not count & 0xFFF and time.monotonic() - told > 1.0:
                told = time.monotonic()
                tick(self._now, self._plane)
            if not (self._truth or self._loading or self._pending):
                break

    @property
    def _now(self) -> Nanos:
        return self._env.now  # type: ignore[return-value]  # whole numbers in, whole numbers out

    def _at(self, when: int, call: Callable[[Any], None], value: Any) -> None:
        event = SimpyEvent(self._env)
        event._ok = True
        event._value = value
        event.callbacks = [lambda fired: call(fired._value)]
        self._env.schedule(event, delay=when - self._env.now)

    def _post(self, event: e.AnyEvent) -> None:
        self._inbox.append(event)
        if not self._pump_due:
            self._pump_at_once()

    def _pump_at_once(self) -> None:
        self._pump_due = True
        event = SimpyEvent(self._env)
        event._ok = True
        event._value = None
        event.callbacks = [self._on_pump]
        self._env.schedule(event, priority=_PUMP_PRIORITY)  # type: ignore[arg-type]

    def _on_pump(self, _: Any) -> None:
        self._pump_due = False
        events, self._inbox = self._inbox, []
        now = self._now
        before = time.thread_time_ns()
        commands = self._plane.step(now, events)
        self._control_ns += time.thread_time_ns() - before
        self._chain_and_record(now, events, commands)
        for command in commands:
            kind = type(command)
            if kind is Dispatch or kind is Cancel:
                self._send(now, command)  # type: ignore[arg-type]
            else:
                self._ended(now, command.request)  # type: ignore[union-attr]
        for event in events:
            if type(event) is e.RequestCancelled:
                self._ended(now, event.request)
        if commands or (events and type(events[0]) is not e.ReplicaReported):
            self._held = 0
        elif not events:
            self._held += 1
            if self._held > HELD_MAX:
                raise PolicyError(
                    f"policy {self._plane.policy.name}: its limit has put off the queued tasks {HELD_MAX:,} times in a row "
                    "(hold_until) and nothing else happens; a hold must end"
                )
        wakeup = self._plane.wakeup_at
        if wakeup < NEVER and not now < self._plane_wakeup <= wakeup:
            self._plane_wakeup = wakeup
            self._at(wakeup, self._on_plane_wakeup, wakeup)

    def _on_plane_wakeup(self, when: int) -> None:
        if when == self._plane_wakeup:
            self._plane_wakeup = NEVER
            if not self._pump_due:
                self._pump_at_once()

    def _chain_and_record(self, now: Nanos, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand]) -> None:
        self._steps += 1
        step = self._chain.step(now, events, commands)
        if self._record is not None:
            self._record(now, events, commands, step.events, step.digest)

    # --- load -----------------------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._loading = False
        else:
            self._at(arrival.at, self._on_arrival, arrival)

    def _on_arrival(self, arrival: Arrival) -> None:
        self._arrive(arrival)
        self._next_arrival()

    def _arrive(self, arrival: Arrival) -> None:
        self._truth[arrival.request.request] = arrival.output_tokens
        self._post(arrival.request)

    def _on_closed_loop_arrival(self, arrival: Arrival) -> None:
        self._pending -= 1
        self._arrive(arrival)

    def _ended(self, now: Nanos, request: int) -> None:
        if self._truth.pop(request, None) is None:
            return  # cancelled after it had ended
        following = self._load.ended(now, request)
        if following is not None:
            self._pending += 1
            self._at(following.at, self._on_closed_loop_arrival, following)

    # --- devices --------------------------------------------------------------------------------------------------

    def _join(self, slot: _Slot) -> None:
        slot.device = slot.make(self._replica_next)
        slot.life += 1
        slot.draining = False
        slot.tasks.clear()
        slot.armed_at = NEVER
        slot.replicas = slot.device.joined()
        for joined in slot.replicas:
            self._replica_next = max(self._replica_next, joined.replica + 1)
            self._slot_of[joined.replica] = slot
            self._post(joined)

    def _send(self, now: Nanos, command: Dispatch | Cancel) -> None:
        slot = self._slot_of.get(command.replica)
        if slot is None:
            return  # the replica has left; the plane will hear of it
        if type(command) is Dispatch:
            slot.tasks.update(task.task for task in command.tasks)
        else:
            slot.tasks.discard(command.task)  # type: ignore[union-attr]
            if slot.draining and not slot.tasks:
                self._leave(slot)
                return
        self._at(slot.to_device.arrives_at(now), self._on_command, (slot, slot.life, command))

    def _on_command(self, delivery: tuple[_Slot, int, Dispatch | Cancel]) -> None:
        slot, life, command = delivery
        if slot.life != life or slot.device is None:
            return
        if type(command) is Dispatch and any(request_of(task.task) not in self._truth for task in command.tasks):
            # Such a request failed or was cancelled while its task was on the way; the Cancel is right behind it.
            live = tuple(task for task in command.tasks if request_of(task.task) in self._truth)
            if not live:
                return
            command = Dispatch(command.replica, live)
        self._step_device(slot, (command,))

    def _on_device_wakeup(self, due: tuple[_Slot, int, int]) -> None:
        slot, life, when = due
        if slot.life == life and slot.device is not None and slot.armed_at == when:
            slot.armed_at = NEVER
            self._step_device(slot, ())

    def _step_device(self, slot: _Slot, commands: Sequence[AnyCommand]) -> None:
        device = slot.device
        assert device is not None
        now = self._now
        for event in device.step(now, commands):
            self._at(slot.to_plane.arrives_at(now), self._post_from, (slot, slot.life, event))
        wakeup = device.wakeup_at
        if wakeup <= now:
            raise IllegalEvent(f"device {slot.index} wants to wake at {wakeup}, not after {now}")
        if wakeup < NEVER and wakeup != slot.armed_at:
            slot.armed_at = wakeup
            self._at(wakeup, self._on_device_wakeup, (slot, slot.life, wakeup))

    def _post_from(self, sent: tuple[_Slot, int, e.AnyEvent]) -> None:
        slot, life, event = sent
        if slot.life != life or slot.device is None:
            return  # what a dead device said last is lost with the connection
        self._post(event)
        if isinstance(event, e.TaskFinished | e.TaskFailed):
            slot.tasks.discard(event.task)
            if slot.draining and not slot.tasks:
                self._leave(slot)

    def _on_scrape(self, _: Any) -> None:
        now = self._now
        if len(self._env._queue) == self._reports_due:
            return  # nothing else will ever happen: live requests wait for a replica that does not come
        for slot in self._slots:
            if slot.device is not None:
                for report in slot.device.report(now):
                    self._reports_due += 1
                    self._at(slot.to_plane.arrives_at(now), self._on_report, (slot, slot.life, report))
        self._at(now + self._report_interval, self._on_scrape, None)

    def _on_report(self, sent: tuple[_Slot, int, e.AnyEvent]) -> None:
        self._reports_due -= 1
        self._post_from(sent)

    # --- faults ---------------------------------------------------------------------------------------------------

    def _on_fault(self, fault: Fault) -> None:
        slot = self._slots[fault.device]
        if fault.restart_after_s is not None:
            self._at(self._now + seconds(fault.restart_after_s), self._on_restart, (slot, slot.life))
        if slot.device is None:
            return
        if fault.kind == "crash":
            self._leave(slot)
        else:
            slot.draining = True
            for joined in slot.replicas:
                self._post(e.ReplicaDraining(joined.replica))
            if not slot.tasks:
                self._leave(slot)

    def _leave(self, slot: _Slot) -> None:
        slot.device = None
        for joined in slot.replicas:
            del self._slot_of[joined.replica]
            self._post(e.ReplicaLeft(joined.replica))

    def _on_restart(self, failed: tuple[_Slot, int]) -> None:
        slot, life = failed
        if slot.life != life:
            return  # another restart was faster
        if slot.device is not None:  # still draining: its time is up
            self._leave(slot)
        self._join(slot)


class _Interrupt:
    """Whether Ctrl-C came."""

    came = False


@contextmanager
def _interrupts_held() -> Iterator[_Interrupt]:
    """Ctrl-C and SIGTERM are noted, so that they cannot land in the middle of a step of the plane or lose the run.

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

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Slot:
    """A place for a device, which may die and come back."""

    def __init__(self, index: int, make: MakeDevice, network: NetworkConfig, streams: Streams) -> None:
        self.index = index
        self.make = make
        self.device: Device | None = None
        self.life = 0
        self.draining = False
        self.tasks: set[int] = set()  # sent and not known to have ended; never iterated
        self.armed_at: int = NEVER
        self.replicas: list[e.ReplicaJoined] = []
        self.to_device = Way(network, streams.stream(f"network.to_device.{index}"))
        self.to_plane = Way(network, streams.stream(f"network.to_plane.{index}"))
