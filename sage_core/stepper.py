"""One logged step after another: what a driver in real time does with a plane.

Step the plane, chain the digest, tell the recorder. With a native plane and a native recorder all of that is one
crossing; otherwise it is done here, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import msgspec

from sage_core.commands import AnyCommand
from sage_core.errors import IllegalEvent
from sage_core.events import AnyEvent
from sage_core.log import Chain
from sage_core.native_plane import NativePlane, Plane
from sage_core.ops import extension
from sage_core.units import Nanos

if TYPE_CHECKING:
    from sage_core import _native

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[AnyCommand]).decode


@runtime_checkable
class ColumnRecorder(Protocol):
    """A recorder whose native half is told of the steps; whoever takes them calls :meth:`flush` when it is full."""

    native: _native.Recorder

    def flush(self) -> None: ...


Recorder: TypeAlias = Callable[[int, Sequence[AnyEvent], Sequence[AnyCommand], bytes, bytes], None]
"""Told of every step: instant, what happened, what was decided, and the log entry (events as MessagePack, digest)."""


class Stepper:
    """``record``: a :class:`ColumnRecorder` needs a native plane; a :data:`Recorder` takes any."""

    def __init__(self, plane: Plane, record: Recorder | ColumnRecorder | None = None) -> None:
        self.plane = plane
        self._record: Recorder | None = None
        self._columns: ColumnRecorder | None = None
        if isinstance(record, ColumnRecorder):
            self._columns = record
        else:
            self._record = record
        self._native = (
            extension().Stepper(plane.native, None if self._columns is None else self._columns.native)
            if isinstance(plane, NativePlane) and self._record is None
            else None
        )
        if self._native is None and self._columns is not None:
            raise TypeError("a recorder of columns needs a native plane")
        self._chain = Chain()

    @property
    def digest(self) -> bytes:
        """Of the last step."""
        return self._chain.digest if self._native is None else self._native.digest

    def step(self, now: Nanos, events: Sequence[AnyEvent]) -> list[AnyCommand]:
        """One decision round, logged; errors as of ``plane.step``."""
        if self._native is None:
            commands = self.plane.step(now, events)
            step = self._chain.step(now, events, commands)
            if self._record is not None:
                self._record(now, events, commands, step.events, step.digest)
            return commands
        try:
            encoded = _encode(events)
        except (TypeError, OverflowError) as error:
            raise IllegalEvent(f"events that no log can hold: {events!r} ({error})") from error
        commands = _decode(self._native.step(now, encoded))
        if self._columns is not None and self._native.full:
            self._columns.flush()
        return commands
