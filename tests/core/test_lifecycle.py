"""The tables: total where they should be, closed where they should be, and what the plane really goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import pytest

from sage_core import commands as c
from sage_core import events as e
from sage_core import plane as plane_module
from sage_core.errors import IllegalEvent
from sage_core.lifecycle import REPLICA, REQUEST, TASK, ReplicaState, RequestState, TaskState, advance
from sage_core.plane import ControlPlane
from sage_core.rng import Streams

TABLES: tuple[tuple[Mapping[tuple[Any, type], Any], type[Enum], Enum], ...] = (
    (REQUEST, RequestState, RequestState.LIVE),
    (TASK, TaskState, TaskState.QUEUED),
    (REPLICA, ReplicaState, ReplicaState.SERVING),
)
IDS = ("request", "task", "replica")
TRIGGERS = sorted({trigger for table, _, _ in TABLES for _, trigger in table}, key=lambda trigger: trigger.__name__)
ENDS = {
    RequestState.RESPONDED,
    RequestState.REJECTED,
    RequestState.CANCELLED,
    RequestState.FAILED,
    TaskState.FINISHED,
    TaskState.CANCELLED,
    TaskState.FAILED,
    TaskState.LOST,
    ReplicaState.LEFT,
}


@pytest.mark.parametrize(("table", "states", "first"), TABLES, ids=IDS)
def test_every_state_is_reached_from_the_first_and_none_leaves_an_end(
    table: Mapping[tuple[Any, type], Any], states: type[Enum], first: Enum
) -> None:
    reached, front = {first}, [first]
    while front:
        state = front.pop()
        for (before, _), after in table.items():
            if before is state and after not in reached:
                reached.add(after)
                front.append(after)
    assert reached == set(states)
    assert {before for before, _ in table} == set(states) - ENDS


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.__name__)
def test_triggers_are_events_and_commands(trigger: type) -> None:
    assert issubclass(trigger, e.Event | c.Command)


@pytest.mark.parametrize(("table", "states", "first"), TABLES, ids=IDS)
def test_what_is_in_the_table_happens_and_what_is_not_cannot(
    table: Mapping[tuple[Any, type], Any], states: type[Enum], first: Enum
) -> None:
    for state in states:
        for trigger in TRIGGERS:
            if (state, trigger) in table:
                assert advance(table, state, trigger, "task", 7) is table[state, trigger]
            else:
                message = f"^task 7: {trigger.__name__} cannot happen while {state.value}$"
                with pytest.raises(IllegalEvent, match=message):
                    advance(table, state, trigger, "task", 7)


def test_the_error_has_no_cause_for_the_user_to_wade_through() -> None:
    with pytest.raises(IllegalEvent) as caught:
        advance(TASK, TaskState.QUEUED, e.TokensProduced, "task", 7)
    assert caught.value.__suppress_context__


def test_every_entry_is_used_by_the_plane(
    monkeypatch: pytest.MonkeyPatch, world: Callable[..., Any], make_plane: Callable[..., ControlPlane]
) -> None:
    """Random runs, which switch policies now and then, go through each row of the tables."""
    used: set[tuple[Enum, type]] = set()

    def spy(table: Any, state: Any, trigger: type, subject: str, number: int) -> Any:
        used.add((state, trigger))
        return advance(table, state, trigger, subject, number)

    monkeypatch.setattr(plane_module, "advance", spy)
    for seed in range(3):
        here = world(make_plane("fifo", mechanism="reference"), "fifo")
        here.wander(Streams(seed).stream("lifecycle"), 5_000)
        here.close()
    dispatched = {(TaskState.QUEUED, c.Dispatch)}  # checked in place: once per decision, and the reason is ours
    assert {*REQUEST, *TASK, *REPLICA} - used == dispatched
