"""Pipeline parallelism as groups of sequences: what follows from the model, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sage_core.commands import Cancel, Dispatch, Respond, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, TaskFinished, TokensProduced
from sage_core.units import NEVER, Nanos, task_id
from sage_sim.engine import LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime
from sage_sim.pipelined import PipelinedDevice

# 10 us an iteration, whatever is in it.
LAW = IterationTime(token_knots=(1,), token_ps=(10_000_000,), head_knots=(1,), head_ps=(0,))
REPLICA = LlmReplica(3, "llm", LAW, max_num_seqs=4, max_num_batched_tokens=64, block_size=16, kv_blocks=20)


def task(request: int, tokens: int = 16) -> Task:
    return Task(task_id(request, 0), 0, 0, 0, 0, tokens, 5)


def device(stages: int, hop_ns: int = 0, replica: LlmReplica = REPLICA) -> PipelinedDevice:
    return PipelinedDevice(0, "node", replica, stages, hop_ns, lambda request, stage: 5)


def play(
    of: PipelinedDevice | SimulatedDevice, commands: Sequence[Dispatch | Cancel] = (), at: int = 0
) -> list[tuple[int, AnyEvent]]:
    told: list[tuple[int, AnyEvent]] = [(at, event) for event in of.step(Nanos(at), commands)]
    while (now := of.wakeup_at) < NEVER:
        told += [(now, event) for event in of.step(now, ())]
    return told


def finished(told: Sequence[tuple[int, AnyEvent]]) -> dict[int, int]:
    return {event.task >> 16: now for now, event in told if isinstance(event, TaskFinished)}


def test_one_stage_is_the_engine_itself() -> None:
    tasks = Dispatch(3, tuple(task(request) for request in range(4)))
    plain = SimulatedDevice(0, "node", REPLICA, None, lambda request, stage: 5)
    piped = device(1)
    assert piped.joined() == plain.joined()
    assert play(piped, [tasks]) == play(plain, [tasks])


def test_groups_work_side_by_side_and_hops_add_to_each_iteration() -> None:
    told = play(device(2, hop_ns=1_000), [Dispatch(3, (task(0), task(1)))])
    # Each in a group of its own: a prefill and four decodes of 10 us, and a hop of 1 us in each.
    assert finished(told) == {0: 55_000, 1: 55_000}
    assert [now for now, event in told if isinstance(event, TokensProduced)] == [11_000, 11_000]


def test_tasks_go_to_the_group_with_the_fewest_tokens() -> None:
    piped = device(2)
    piped.step(Nanos(0), [Dispatch(3, (task(0, tokens=64), task(1), task(2), task(3)))])
    # 69 tokens in one group; 21, 42 and 63 in the other, which runs two at a time.
    (report,) = piped.report(Nanos(1))
    assert (report.running, report.waiting) == (3, 1)
    (usage,) = piped.usage(Nanos(20_000))
    assert usage.busy_ns == 40_000


def test_room_is_that_of_all_groups() -> None:
    (joined,) = device(2).joined()
    assert (joined.replica, joined.tasks_max, joined.batch_tokens_max, joined.kv_tokens_max) == (3, 4, 128, 320)
    (report,) = device(2).report(Nanos(0))
    assert report.kv_blocks_free == 20


def test_what_is_cancelled_makes_room_in_its_group() -> None:
    piped = device(2)
    piped.step(Nanos(0), [Dispatch(3, (task(0, tokens=64), task(1)))])
    piped.step(Nanos(1), [Cancel(3, task_id(0, 0)), Dispatch(3, (task(2),))])
    piped.step(Nanos(1), [Cancel(3, task_id(0, 0))])  # a second time changes nothing
    assert finished(play(piped, at=1)) == {1: 50_000, 2: 60_000}  # the iteration of the cancelled one runs on


@pytest.mark.parametrize("stages", [0, 5])
def test_stages_are_checked(stages: int) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel of replica 3: expected 1 to 4 .*, got"):
        device(stages)


def test_commands_for_others() -> None:
    for command in (Dispatch(4, (task(0),)), Cancel(4, 1), Respond(1)):
        with pytest.raises(IllegalEvent, match="is not for replica 3"):
            device(2).step(Nanos(0), [command])
