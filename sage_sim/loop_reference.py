"""The event loop of a simulated run, in plain Python: the meaning of ``sage_core._native.Loop``.

Between two instants at which somebody outside must look (a fault, a scrape, a user who has finished thinking: SimPy's
events), the loop carries messages, steps devices and the plane, and writes the log.

Order: by instant, then in order of scheduling; what happens outside comes before everything here at the same instant,
and the plane's step after it, so that events of one instant are one step.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch
from sage_core.errors import IllegalEvent, PolicyError
from sage_core.load import Arrival, Contents
from sage_core.log import Chain
from sage_core.plane import ControlPlane
from sage_core.stepper import Recorder
from sage_core.units import NEVER, Nanos, request_of
from sage_sim.device import Device, Why
from sage_sim.network import Way

HELD_MAX = 10_000
"""Wakeups in a row that decide nothing: a policy that always wants to wait a little longer would never end."""


class Loop:
    """Slots are places for devices, which may leave and come back; ``now`` (ns) is the instant last handled."""

    def __init__(self, plane: ControlPlane, record: Recorder | None) -> None:
        self.now = 0
        self.steps = 0
        self.deciding = False  # true where a step of the plane was left by an exception
        self.control_ns = 0  # CPU time of this thread inside the plane
        self._plane = plane
        self._record = record
        self._queue: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._sequence = 0
        self._slots: list[_Slot] = []
        self._slot_of: dict[int, _Slot] = {}
        self._arrivals: deque[Arrival] = deque()
        self._loading = True
        self._starved = False
        self._expected = 0
        self._on_ended: Callable[[int, int], None] | None = None
        self._truth: dict[int, Arrival] = {}
        self._until = 0
        self._inbox: list[e.AnyEvent] = []
        self._pump_due = False
        self._plane_wakeup = NEVER
        self._reports_due = 0
        self._held = 0  # wakeups since anything but a report happened
        self._chain = Chain()

    # --- what the driver uses -------------------------------------------------------------------------------------

    def add_slot(self, to_device: Way, to_plane: Way) -> int:
        """A place for a device and its two ways; its number."""
        self._slots.append(_Slot(len(self._slots), to_device, to_plane))
        return len(self._slots) - 1

    def join(self, now: int, slot: int, device: Device) -> None:
        """The device is there, empty; the plane hears of its replicas."""
        self.now = now
        at = self._slots[slot]
        at.device = device
        at.life += 1
        at.draining = False
        at.tasks.clear()
        at.armed_at = NEVER
        at.replicas.clear()
        for joined in device.joined():
            at.replicas.append(joined.replica)
            self._slot_of[joined.replica] = at
            self._post(joined)

    def drain(self, now: int, slot: int) -> None:
        """Finish what is there, then leave."""
        self.now = now
        at = self._slots[slot]
        at.draining = True
        for replica in at.replicas:
            self._post(e.ReplicaDraining(replica))
        if not at.tasks:
            self._leave(at)

    def leave(self, now: int, slot: int) -> None:
        """Gone at once, with all that is on it."""
        self.now = now
        self._leave(self._slots[slot])

    def present(self, slot: int) -> bool:
        """Whether there is a device in the slot."""
        return self._slots[slot].device is not None

    def feed(self, arrivals: Sequence[Arrival]) -> None:
        """The next arrivals, in time order."""
        self._arrivals.extend(arrivals)

    def begin_arrivals(self) -> None:
        """Schedule the first one fed; the others follow one another."""
        if self._arrivals:
            self._at(self._arrivals[0].at, self._on_arrival, None)
        elif self._loading:
            self._starved = True

    def end_arrivals(self) -> None:
        """No more will be fed."""
        self._loading = False

    def arrive(self, now: int, arrival: Arrival) -> None:
        """A request from outside arrives now."""
        self.now = now
        self._arrive(arrival)

    def expect(self, more: int) -> None:
        """So many more requests are on their way outside; negative: they have come."""
        self._expected += more

    def on_ended(self, call: Callable[[int, int], None]) -> None:
        """Call ``call(now, request)`` whenever a request has ended."""
        self._on_ended = call

    def scrape(self, now: int) -> None:
        """Every device reports; the plane sees it when the network has carried it."""
        self.now = now
        for slot in self._slots:
            if slot.device is not None:
                for report in slot.device.report(Nanos(now)):
                    self._reports_due += 1
                    self._at(slot.to_plane.arrives_at(now), self._on_report, (slot, slot.life, report))

    def run(self, until: int, budget: int) -> Why:
        """Handle what comes before ``until``, at most ``budget`` entries; why it stopped."""
        self._until = until
        queue = self._queue
        for _ in range(budget):
            pump_next = self._pump_due and (not queue or queue[0][0] > self.now)
            if not pump_next and not queue:
                return Why.REACHED
            if (self.now if pump_next else queue[0][0]) >= self._until:
                return Why.REACHED
            if pump_next:
                self._pump()
            else:
                self.now, _, handle, value = heapq.heappop(queue)
                handle(value)
            if self._starved:
                self._starved = False
                return Why.STARVED
            if self.idle:
                return Why.IDLE
        return Why.BUDGET

    def stop_at(self, instant: int) -> None:
        """From within a callback: something outside will happen then."""
        self._until = min(self._until, instant)

    def step(self, now: int, events: Sequence[e.AnyEvent]) -> None:
        """A step of the plane outside the loop; its commands are recorded and carried out by nobody."""
        self.now = now
        self._decide_and_record(events)

    def output_tokens(self, request: int, stage: int) -> int:
        """The true size of a result of a live request: the oracle."""
        return self._truth[request].result(stage)

    def contents(self, request: int) -> Contents | None:
        """What the prompt of a live request begins with."""
        return self._truth[request].contents

    @property
    def idle(self) -> bool:
        """Every request has ended and no more will come."""
        return not (self._truth or self._loading or self._expected)

    @property
    def next_at(self) -> int:
        """Instant of the next entry; NEVER if there is none."""
        if self._pump_due:
            return self.now
        return self._queue[0][0] if self._queue else NEVER

    @property
    def only_reports(self) -> bool:
        """Nothing but reports is on its way."""
        return not self._pump_due and len(self._queue) == self._reports_due

    @property
    def digest(self) -> bytes:
        """Of the last step."""
        return self._chain.digest

    # --- time -----------------------------------------------------------------------------------------------------

    def _at(self, when: int, handle: Callable[[Any], None], value: Any) -> None:
        heapq.heappush(self._queue, (when, self._sequence, handle, value))
        self._sequence += 1

    def _post(self, event: e.AnyEvent) -> None:
        self._inbox.append(event)
        self._pump_due = True

    def _decide_and_record(self, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        now = Nanos(self.now)
        before = time.thread_time_ns()
        self.deciding = True
        commands = self._plane.step(now, events)
        self.deciding = False
        self.control_ns += time.thread_time_ns() - before
        self.steps += 1
        step = self._chain.step(now, events, commands)
        if self._record is not None:
            self._record(now, events, commands, step.events, step.digest)
        return commands

    def _pump(self) -> None:
        self._pump_due = False
        events, self._inbox = self._inbox, []
        commands = self._decide_and_record(events)
        for command in commands:
            if isinstance(command, Dispatch | Cancel):
                self._send(command)
            else:
                self._ended(command.request)
        for event in events:
            if isinstance(event, e.RequestCancelled):
                self._ended(event.request)
        if commands or (events and not isinstance(events[0], e.ReplicaReported)):
            self._held = 0
        elif not events:
            self._held += 1
            if self._held > HELD_MAX:
                raise PolicyError(
                    f"policy {self._plane.policy.name}: its limit has put off the queued tasks {HELD_MAX:,} times in a row "
                    "(hold_until) and nothing else happens; a hold must end"
                )
        wakeup = self._plane.wakeup_at
        if wakeup < NEVER and not self.now < self._plane_wakeup <= wakeup:
            self._plane_wakeup = wakeup
            self._at(wakeup, self._on_plane_wakeup, wakeup)

    def _on_plane_wakeup(self, when: int) -> None:
        if when == self._plane_wakeup:
            self._plane_wakeup = NEVER
            self._pump_due = True

    # --- load -----------------------------------------------------------------------------------------------------

    def _on_arrival(self, _: None) -> None:
        self._arrive(self._arrivals.popleft())
        self.begin_arrivals()

    def _arrive(self, arrival: Arrival) -> None:
        self._truth[arrival.request.request] = arrival
        self._post(arrival.request)

    def _ended(self, request: int) -> None:
        # Where the request was cancelled after it had ended there is nothing to forget.
        if self._truth.pop(request, None) is not None and self._on_ended is not None:
            self._on_ended(self.now, request)

    # --- devices --------------------------------------------------------------------------------------------------

    def _leave(self, slot: _Slot) -> None:
        slot.device = None
        for replica in slot.replicas:
            del self._slot_of[replica]
            self._post(e.ReplicaLeft(replica))

    def _send(self, command: Dispatch | Cancel) -> None:
        slot = self._slot_of.get(command.replica)
        if slot is None:
            return  # the replica has left; the plane will hear of it
        if isinstance(command, Dispatch):
            slot.tasks.update(task.task for task in command.tasks)
        else:
            slot.tasks.discard(command.task)
            if slot.draining and not slot.tasks:
                self._leave(slot)
                return
        self._at(slot.to_device.arrives_at(self.now), self._on_command, (slot, slot.life, command))

    def _on_command(self, delivery: tuple[_Slot, int, Dispatch | Cancel]) -> None:
        slot, life, command = delivery
        if slot.life != life or slot.device is None:
            return
        if isinstance(command, Dispatch):
            # A request that ended while its task was on the way; the Cancel is right behind it.
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
        now = Nanos(self.now)
        for event in device.step(now, commands):
            self._at(slot.to_plane.arrives_at(now), self._post_from, (slot, slot.life, event))
        wakeup = device.wakeup_at
        if wakeup <= now:
            raise IllegalEvent(f"device {slot.index} wants to wake at {wakeup}, not after {now}")
        if wakeup < NEVER and wakeup != slot.armed_at:
            slot.armed_at = wakeup
            self._at(wakeup, self._on_device_wakeup, (slot, slot.life, wakeup))

    def _on_report(self, sent: tuple[_Slot, int, e.AnyEvent]) -> None:
        self._reports_due -= 1
        self._post_from(sent)

    def _post_from(self, sent: tuple[_Slot, int, e.AnyEvent]) -> None:
        slot, life, event = sent
        if slot.life != life or slot.device is None:
            return  # what a dead device said last is lost with the connection
        self._post(event)
        if isinstance(event, e.TaskFinished | e.TaskFailed):
            slot.tasks.discard(event.task)
            if slot.draining and not slot.tasks:
                self._leave(slot)


class _Slot:
    def __init__(self, index: int, to_device: Way, to_plane: Way) -> None:
        self.index = index
        self.to_device = to_device
        self.to_plane = to_plane
        self.device: Device | None = None
        self.life = 0
        self.draining = False
        self.tasks: set[int] = set()  # sent and not known to have ended; never iterated
        self.armed_at: int = NEVER
        self.replicas: list[int] = []
