"""The native event loop behind the interface of :class:`sage_sim.loop_reference.Loop`, which is its meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from sage_core.commands import AnyCommand
from sage_core.events import AnyEvent
from sage_core.load import Arrival, Arrivals, Contents
from sage_core.log import decode_events
from sage_core.native_plane import NativePlane
from sage_core.ops import extension
from sage_core.stepper import ColumnRecorder, Recorder
from sage_core.units import Nanos
from sage_sim.device import Device, Why
from sage_sim.engine import SimulatedDevice
from sage_sim.network import Way

if TYPE_CHECKING:
    from sage_core import _native

_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(AnyCommand).decode
_decode_commands = msgspec.msgpack.Decoder(list[AnyCommand]).decode


class NativeLoop:
    """Arguments, verbs and errors are those of :class:`sage_sim.loop_reference.Loop`."""

    def __init__(self, plane: NativePlane, record: Recorder | ColumnRecorder | None) -> None:
        told = record.native if isinstance(record, ColumnRecorder) else None if record is None else _decoding(record)
        self._native: _native.Loop = extension().Loop(plane.native, told)

    def add_slot(self, to_device: Way, to_plane: Way) -> int:
        """A place for a device and its two ways; its number."""
        return self._native.add_slot(to_device.delay_ns, to_device.draw, to_plane.draw)

    def join(self, now: int, slot: int, device: Device) -> None:
        """The device is there, empty; the plane hears of its replicas."""
        joined = _encode(device.joined())
        if isinstance(device, SimulatedDevice) and device.native is not None:
            llm, embed = (-1 if replica is None else replica for replica in device.replicas)
            self._native.join_engine(now, slot, device, device.native, llm, embed, device.cached_block_size, joined)
        else:
            self._native.join_python(now, slot, _Outside(device), joined)

    def drain(self, now: int, slot: int) -> None:
        """Finish what is there, then leave."""
        self._native.drain(now, slot)

    def leave(self, now: int, slot: int) -> None:
        """Gone at once, with all that is on it."""
        self._native.leave(now, slot)

    def present(self, slot: int) -> bool:
        """Whether there is a device in the slot."""
        return self._native.present(slot)

    def feed(self, arrivals: Sequence[Arrival] | Arrivals) -> None:
        """The next arrivals, in time order."""
        if isinstance(arrivals, Arrivals):
            self._native.feed(*arrivals)
        else:
            for arrival in arrivals:
                self._native.feed_one(arrival.at, _encode((arrival.request,)), *arrival[2:])

    def begin_arrivals(self) -> None:
        """Schedule the first one fed; the others follow one another."""
        self._native.begin_arrivals()

    def end_arrivals(self) -> None:
        """No more will be fed."""
        self._native.end_arrivals()

    def arrive(self, now: int, arrival: Arrival) -> None:
        """A request from outside arrives now."""
        self._native.arrive(now, _encode((arrival.request,)), *arrival[2:])

    def expect(self, more: int) -> None:
        """So many more requests are on their way outside; negative: they have come."""
        self._native.expect(more)

    def on_ended(self, call: Callable[[int, int], None]) -> None:
        """Call ``call(now, request)`` whenever a request has ended."""
        self._native.on_ended(call)

    def scrape(self, now: int) -> None:
        """Every device reports; the plane sees it when the network has carried it."""
        self._native.scrape(now)

    def run(self, until: int, budget: int) -> Why:
        """Handle what comes before ``until``, at most ``budget`` entries; why it stopped."""
        return Why(self._native.run(until, budget))

    def stop_at(self, instant: int) -> None:
        """From within a callback: something outside will happen then."""
        self._native.stop_at(instant)

    def step(self, now: int, events: Sequence[AnyEvent]) -> None:
        """A step of the plane outside the loop; its commands are recorded and carried out by nobody."""
        self._native.step(now, _encode(events))

    def output_tokens(self, request: int, stage: int) -> int:
        """The true size of a result of a live request: the oracle."""
        return self._native.output_tokens(request, stage)

    def contents(self, request: int) -> Contents | None:
        """What the prompt of a live request begins with."""
        block_tokens, blocks = self._native.contents(request)
        return Contents(block_tokens, tuple(blocks)) if blocks else None

    @property
    def now(self) -> int:
        """The instant last handled (ns)."""
        return self._native.now

    @property
    def idle(self) -> bool:
        """Every request has ended and no more will come."""
        return self._native.idle

    @property
    def next_at(self) -> int:
        """Instant of the next entry; NEVER if there is none."""
        return self._native.next_at

    @property
    def only_reports(self) -> bool:
        """Nothing but reports is on its way."""
        return self._native.only_reports

    @property
    def deciding(self) -> bool:
        """A step of the plane was left by an exception."""
        return self._native.deciding

    @property
    def steps(self) -> int:
        """Steps of the plane."""
        return self._native.steps

    @property
    def control_ns(self) -> int:
        """CPU time of this thread inside the plane, estimated from every 64th step: the clock costs as much as a step."""
        return self._native.control_ns

    @property
    def digest(self) -> bytes:
        """Of the last step."""
        return self._native.digest


class _Outside:
    """A device written in Python, as the native loop calls it: bytes in, bytes out."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def step(self, now: int, command: bytes) -> bytes:
        """Events after ``command`` (empty: none)."""
        return _encode(self._device.step(Nanos(now), (_decode_command(command),) if command else ()))

    @property
    def wakeup_at(self) -> int:
        """The device's."""
        return self._device.wakeup_at

    def report(self, now: int) -> bytes:
        """The device's reports."""
        return _encode(self._device.report(Nanos(now)))


def _decoding(record: Recorder) -> Callable[[int, bytes, bytes, bytes], None]:
    steps = 0

    def told(now: int, events: bytes, commands: bytes, digest: bytes) -> None:
        nonlocal steps
        record(now, decode_events(steps, events), _decode_commands(commands), events, digest)
        steps += 1

    return told
