"""CPU workers: first come, first served."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sage_core.commands import Cancel, Dispatch, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import ReplicaReported, TaskFinished
from sage_core.load import AS_INPUT
from sage_core.units import NEVER, Nanos, PoolKind
from sage_sim.operator import OperatorDevice, OperatorReplica


def device(workers: int = 2, **changes: Any) -> OperatorDevice:
    operator = OperatorReplica(3, "rerank", workers, **{"fixed_ns": 100, **changes})
    return OperatorDevice(1, "cpu0", operator, lambda request, stage: 7 if stage == 1 else AS_INPUT)


def task(number: int, input_tokens: int = 0) -> Task:
    return Task(number, 0, 1, 0, 0, input_tokens, 0)


def drained(operator: OperatorDevice) -> list[tuple[int, int]]:
    told = []
    while (at := operator.wakeup_at) != NEVER:
        told += [(int(at), event.task) for event in operator.step(at, ()) if isinstance(event, TaskFinished)]
    return told


def test_queueing() -> None:
    operator = device(input_token_ns=10)
    operator.step(Nanos(0), [Dispatch(3, (task(1, 5), task(2, 1), task(3), task(4)))])
    assert operator.report(Nanos(50)) == [ReplicaReported(3, 2, 2, 0)]
    assert drained(operator) == [(110, 2), (150, 1), (210, 3), (250, 4)]
    assert operator.busy_ns(Nanos(1_000)) == 150 + 110 + 100 + 100


def test_a_function_that_started_is_finished_for_nobody() -> None:
    operator = device(workers=1)
    operator.step(Nanos(0), [Dispatch(3, (task(1), task(2), task(3)))])
    operator.step(Nanos(10), [Cancel(3, 1), Cancel(3, 2), Cancel(3, 99)])
    assert drained(operator) == [(200, 3)]
    operator.step(Nanos(300), [Cancel(3, 3)])
    assert drained(operator) == []


def test_no_time_at_all() -> None:
    operator = device(fixed_ns=0)
    of_stage_1 = Task(3, 1, 0, 0, 0, 9, 0)
    # The size of a result is what the load says of that stage; where it says nothing, that of what it was made of.
    assert operator.step(Nanos(5), [Dispatch(3, (task(1, 9), task(2), of_stage_1))]) == [
        TaskFinished(1, 9),
        TaskFinished(2, 0),
        TaskFinished(3, 7),
    ]
    assert operator.wakeup_at == NEVER


@pytest.mark.parametrize("seed", range(5))
def test_against_the_definition_of_first_come_first_served(seed: int) -> None:
    rng = random.Random(seed)
    workers = rng.randint(1, 4)
    operator = device(workers=workers, input_token_ns=1)
    free_at, expected, told, at = [0] * workers, [], [], 0
    for number in range(200):
        at += rng.randint(0, 150)
        while operator.wakeup_at <= at:
            now = operator.wakeup_at
            told += [(int(now), event.task) for event in operator.step(now, ()) if isinstance(event, TaskFinished)]
        tokens = rng.randint(0, 300)
        worker = free_at.index(min(free_at))
        free_at[worker] = max(at, free_at[worker]) + 100 + tokens
        expected.append((free_at[worker], number))
        assert operator.step(Nanos(at), [Dispatch(3, (task(number, tokens),))]) == []
    assert sorted(told + drained(operator)) == sorted(expected)


def test_crash_forgets() -> None:
    operator = device(workers=1)
    operator.step(Nanos(0), [Dispatch(3, (task(1), task(2)))])
    operator.crash(Nanos(40))
    assert operator.wakeup_at == NEVER
    assert operator.report(Nanos(50)) == [ReplicaReported(3, 0, 0, 0)]
    assert operator.busy_ns(Nanos(50)) == 40


def test_joined() -> None:
    (joined,) = device(workers=3, input_token_ns=4).joined()
    assert (joined.replica, joined.pool_kind, joined.tasks_max) == (3, PoolKind.OPERATOR, 3)
    assert (joined.fixed_ns, joined.input_token_ns) == (100.0, 4.0)


def test_misuse_is_refused() -> None:
    operator = device()
    operator.step(Nanos(0), [Dispatch(3, (task(1),))])
    with pytest.raises(IllegalEvent, match="task 1 was submitted twice"):
        operator.step(Nanos(0), [Dispatch(3, (task(1),))])
    with pytest.raises(IllegalEvent, match="device 1 has replica 3 only"):
        operator.step(Nanos(0), [Dispatch(4, (task(2),))])
    with pytest.raises(ConfigError, match="workers of replica 3: expected a whole number from 1, got 0"):
        device(workers=0)
