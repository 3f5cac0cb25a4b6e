"""What the event loop of a simulated run needs of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from sage_core.commands import AnyCommand
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported
from sage_core.units import Nanos

if TYPE_CHECKING:
    from sage_sim.engine import ReplicaUsage


class Device(Protocol):
    """A simulated device: a BackendModel that can crash."""

    def joined(self) -> list[ReplicaJoined]: ...
    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]: ...
    @property
    def wakeup_at(self) -> Nanos: ...
    def report(self, now: Nanos) -> list[ReplicaReported]: ...


@runtime_checkable
class Metered(Protocol):
    """A device that knows what its replicas have done."""

    def usage(self, now: Nanos) -> list[ReplicaUsage]: ...


@runtime_checkable
class Starting(Protocol):
    """A device that takes its time to become healthy after a restart."""

    def startup_ns(self) -> int: ...


MakeDevice: TypeAlias = Callable[[int], Device]
"""A device whose first replica has the given id, the others the ids after it."""


class Why(IntEnum):
    """Why the loop stopped."""

    REACHED = 0  # nothing is left before the given instant
    STARVED = 1  # the last known arrival has happened: feed more, or say that there are none
    IDLE = 2  # every request has ended and no more will come
    FULL = 3  # the recorder wants to be emptied
    BUDGET = 4  # as many entries as allowed have been handled
