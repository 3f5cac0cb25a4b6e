"""The mirror image of the control plane: a simulated replica takes commands and gives events.

``ControlPlane.step : (now, events) -> commands``; ``BackendModel.step : (now, commands) -> events``. Both publish
``wakeup_at``. A driver that pumps one pumps the other; under the asyncio driver a model becomes an emulated engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from sage_core.commands import AnyCommand
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported
from sage_core.load import Contents
from sage_core.units import Nanos

OutputTokens: TypeAlias = Callable[[int, int], int]
"""True size of the result of (request id, stage): output tokens, or an outcome; :data:`sage_core.load.AS_INPUT` where it
is that of the input. Only backends hold it: this is the oracle boundary."""

ContentsOf: TypeAlias = Callable[[int], Contents | None]
"""What the prompt of a request id begins with; also on this side of the oracle boundary."""


class BackendModel(Protocol):
    """One device with one or more replicas on it, in virtual time.

    Rules: ``now`` never goes back. ``step`` processes everything that happened up to and including ``now`` and returns
    it as events *that happened at ``now``*; the driver therefore calls no later than ``wakeup_at``, and calls with no
    commands at ``wakeup_at``. Only ``Dispatch`` and ``Cancel`` for this model's replicas are passed in.
    """

    def joined(self) -> list[ReplicaJoined]:
        """What each replica on the device says when it becomes healthy."""

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]:
        """Advance to ``now``, apply ``commands``, return what the plane should know."""

    @property
    def wakeup_at(self) -> Nanos:
        """Next instant at which something visible happens if no command comes; ``NEVER`` when idle."""

    def report(self, now: Nanos) -> list[ReplicaReported]:
        """Load as the engine itself would publish it at ``now`` (its ``/metrics``)."""
