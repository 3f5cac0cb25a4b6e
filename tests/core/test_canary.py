"""Planes broken on purpose: each must be caught, or the checks that pass everywhere else would prove nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Respond
from sage_core.lifecycle import TaskState
from sage_core.plane import ControlPlane
from sage_core.rng import Streams
from sage_core.units import Nanos, request_of

STRUCK = 40
"""The request that the broken planes mistreat: any that arrives when the run is under way."""


class Sound(ControlPlane):
    """Not broken: what the others are compared with."""


class DropsAFinishedRequest(ControlPlane):
    """Its last task ends, and nobody answers the client."""

    def step(self, now: Nanos, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        return [c for c in super().step(now, events) if not (isinstance(c, Respond) and c.request > STRUCK)]


class AnswersTwice(ControlPlane):
    def step(self, now: Nanos, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        commands = super().step(now, events)
        return commands + [c for c in commands if isinstance(c, Respond) and c.request > STRUCK]


class LosesAQueuedTask(ControlPlane):
    """The task leaves the queue and goes nowhere; its request stays live for ever."""

    struck = False

    def step(self, now: Nanos, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        commands = super().step(now, events)
        queued = [task for task, held in self._tasks.items() if held.state is TaskState.QUEUED]
        if not self.struck and len(queued) > 3:
            self.struck = True
            self._mechanism.withdraw(queued[1])
            del self._tasks[queued[1]]
            self._requests[request_of(queued[1])].tasks.remove(queued[1])
        return commands


class SendsTwice(ControlPlane):
    def step(self, now: Nanos, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        commands = super().step(now, events)
        return commands + [c for c in commands if isinstance(c, Dispatch) and request_of(c.tasks[0].task) > STRUCK]


class SendsToADrainingReplica(ControlPlane):
    def _on_draining(self, now: Nanos, event: e.ReplicaDraining, commands: list[AnyCommand]) -> None:
        self._replica(event.replica, e.ReplicaDraining)  # and does not tell the mechanism


class TriesAgainAfterTokens(ControlPlane):
    """The client would read the beginning of the answer twice."""

    def _on_tokens(self, now: Nanos, event: e.TokensProduced, commands: list[AnyCommand]) -> None:
        self._known(event.task)


class NeverTriesAgain(ControlPlane):
    def _on_failed(self, now: Nanos, event: e.TaskFailed, commands: list[AnyCommand]) -> None:
        super()._on_failed(now, e.TaskFailed(event.task, event.reason, False), commands)


class LeavesWorkOfACancelledRequestRunning(ControlPlane):
    def step(self, now: Nanos, events: Sequence[e.AnyEvent]) -> list[AnyCommand]:
        return [c for c in super().step(now, events) if not isinstance(c, Cancel)]


class IgnoresACancellation(ControlPlane):
    def _on_cancelled(self, now: Nanos, event: e.RequestCancelled, commands: list[AnyCommand]) -> None:
        pass


class FailsWithoutCause(ControlPlane):
    def _on_finished(self, now: Nanos, event: e.TaskFinished, commands: list[AnyCommand]) -> None:
        super()._on_finished(now, event, commands)
        request = request_of(event.task)
        if request > STRUCK and request in self._requests:
            self._fail(request, "no patience", commands)


class OverfillsAReplica(ControlPlane):
    """Believes that engines are larger than they are."""

    def _on_joined(self, now: Nanos, event: e.ReplicaJoined, commands: list[AnyCommand]) -> None:
        fields = {name: getattr(event, name) for name in event.__struct_fields__}
        super()._on_joined(now, e.ReplicaJoined(**{**fields, "tasks_max": event.tasks_max + 1}), commands)


class Miscounts(ControlPlane):
    def _on_failed(self, now: Nanos, event: e.TaskFailed, commands: list[AnyCommand]) -> None:
        super()._on_failed(now, event, commands)
        self.counts.failed += 1


class FailsOnReplicaLoss(ControlPlane):
    """Loses what was on a replica that left, and says nothing."""

    def _on_left(self, now: Nanos, event: e.ReplicaLeft, commands: list[AnyCommand]) -> None:
        quiet: list[AnyCommand] = []
        super()._on_left(now, event, quiet)
        commands.extend(c for c in quiet if not isinstance(c, Fail))


BROKEN: Mapping[str, type[ControlPlane]] = {
    broken.__name__: broken
    for broken in (
        DropsAFinishedRequest,
        AnswersTwice,
        LosesAQueuedTask,
        SendsTwice,
        SendsToADrainingReplica,
        TriesAgainAfterTokens,
        NeverTriesAgain,
        LeavesWorkOfACancelledRequestRunning,
        IgnoresACancellation,
        FailsWithoutCause,
        OverfillsAReplica,
        Miscounts,
        FailsOnReplicaLoss,
    )
}


def walk(kind: type[ControlPlane], world: Callable[..., Any], make_plane: Callable[..., ControlPlane]) -> None:
    """A random run of 3,000 events on a plane of that kind, to its end."""
    here = world(make_plane("fifo", kind=kind), "fifo")
    here.wander(Streams(7).stream("canary"), 3_000)
    here.settle()
    here.close()


def test_a_sound_plane_passes(world: Callable[..., Any], make_plane: Callable[..., ControlPlane]) -> None:
    walk(Sound, world, make_plane)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plane_is_caught(
    name: str, world: Callable[..., Any], make_plane: Callable[..., ControlPlane]
) -> None:
    with pytest.raises(AssertionError):  # InvariantViolation is one too
        walk(BROKEN[name], world, make_plane)
