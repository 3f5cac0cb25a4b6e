"""The native control plane behind the interface of :class:`sage_core.plane.ControlPlane`, which is its meaning.

Events and commands cross as MessagePack, the encoding of the log. A runtime that is native itself (the event loop of
the simulator) takes :attr:`NativePlane.native` and pays for no crossing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from sage_core import events as e
from sage_core.commands import AnyCommand
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent
from sage_core.ops import extension
from sage_core.pipeline import Pipeline
from sage_core.plane import ControlPlane, Counts, unknown_policy
from sage_core.policy import Policy, native_twin
from sage_core.units import Nanos

if TYPE_CHECKING:
    from sage_core import _native

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[AnyCommand]).decode


class NativePlane:
    """Arguments, verbs and errors are those of :class:`sage_core.plane.ControlPlane`."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        policies: Mapping[str, Callable[[], Policy]],
        policy: str,
        *,
        attempts_max: int = 3,
    ) -> None:
        if attempts_max < 1:
            raise ConfigError(f"attempts_max: expected 1 or more, got {attempts_max}")
        self._maker = _Maker(policies)
        self.native: _native.Plane = extension().Plane(dict(pipelines), self._maker, policy, attempts_max)

    def step(self, now: Nanos, events: Sequence[AnyEvent]) -> list[AnyCommand]:
        """One decision round; see :meth:`sage_core.plane.ControlPlane.step`."""
        try:
            encoded = _encode(events)
        except (TypeError, OverflowError) as error:
            raise IllegalEvent(f"events that no log can hold: {events!r} ({error})") from error
        try:
            return _decode(self.native.step(now, encoded))
        except IllegalEvent:
            for event in events:
                if not isinstance(event, e.Event):
                    raise IllegalEvent(f"not an event: {event!r}") from None
            raise

    @property
    def wakeup_at(self) -> Nanos:
        """Call ``step(now, [])`` no later than this; NEVER when only events matter."""
        return Nanos(self.native.wakeup_at)

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return self.native.live

    @property
    def policy(self) -> Policy:
        """The active policy."""
        assert self._maker.policy is not None
        return self._maker.policy

    @property
    def tasks_queued(self) -> int:
        """Tasks waiting in the plane."""
        return self.native.tasks_queued

    def queue_depths(self) -> dict[str, int]:
        """The same by pool, of every pool that there has been."""
        return self.native.queue_depths()

    @property
    def counts(self) -> Counts:
        """How many requests arrived, and how they ended."""
        return Counts(*self.native.counts)

    def close(self, now: Nanos, reason: str) -> list[AnyCommand]:
        """The step of ``RunEnded(reason)``, then :meth:`check`."""
        commands = self.step(now, (e.RunEnded(reason),))
        self.check()
        return commands

    def check(self) -> None:
        """Conservation and the mechanism's own invariants over the whole state."""
        self.native.check()


class _Maker:
    """Makes policies for the native plane. An object of its own: the collector cannot see references in native code, so
    what it holds must not lead back here."""

    def __init__(self, policies: Mapping[str, Callable[[], Policy]]) -> None:
        self._policies = dict(policies)
        self.policy: Policy | None = None  # the last one made

    def __call__(self, name: str) -> tuple[Any, ...]:
        make = self._policies.get(name)
        if make is None:
            raise unknown_policy(name, self._policies)
        policy = self.policy = make()
        parts = (policy.admit, policy.order, policy.route, policy.limit, policy.predict)
        return (policy.name, *(native_twin(part) for part in parts))


Plane: TypeAlias = ControlPlane | NativePlane

MechanismName: TypeAlias = Literal["native", "reference"]


def make_plane(
    mechanism: str,
    pipelines: Mapping[str, Pipeline],
    policies: Mapping[str, Callable[[], Policy]],
    policy: str,
    *,
    attempts_max: int = 3,
) -> Plane:
    """``native`` (C++) or ``reference`` (Python); equal by differential test. ConfigError for another name."""
    if mechanism == "native":
        return NativePlane(pipelines, policies, policy, attempts_max=attempts_max)
    if mechanism == "reference":
        return ControlPlane(pipelines, policies, policy, attempts_max=attempts_max)
    raise ConfigError(f"mechanism: expected native or reference, got {mechanism!r}")
