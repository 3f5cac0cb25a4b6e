"""Prefill and decode on engines of their own: instants worked out by hand, and the books over random loads."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.commands import Cancel, Dispatch, Respond, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, TaskFailed, TaskFinished, TokensProduced
from sage_core.units import NEVER, Nanos, task_id
from sage_sim.disaggregated import DisaggregatedDevice, KvLink
from sage_sim.engine import LlmReplica
from sage_sim.iteration import IterationTime

# A prefill iteration takes 2 us and a decode iteration 1 us, whatever is in it.
FLAT = IterationTime(token_ps=(1_000_000,), prefill_ps=(1_000_000,))
LLM = LlmReplica(4, "llm", FLAT, max_num_seqs=8, max_num_batched_tokens=64, block_size=4, kv_blocks=100)
LINK = KvLink(bytes_per_token=1_000, bytes_per_s=10**10, latency_ns=50)  # 100 ns a token


def device(prefill: int = 1, decode: int = 1, **changes: Any) -> DisaggregatedDevice:
    given: dict[str, Any] = {"link": LINK, "output_tokens": lambda request, stage: 5} | changes
    return DisaggregatedDevice(2, "node0", [LLM] * prefill, [LLM] * decode, **given)


def task(request: int, input_tokens: int = 32) -> Task:
    return Task(task_id(request, 0), 0, 1, 0, 0, input_tokens, 100)


def drained(simulated: DisaggregatedDevice) -> list[tuple[int, AnyEvent]]:
    told = []
    while (at := simulated.wakeup_at) != NEVER:
        told += [(int(at), event) for event in simulated.step(at, ())]
    return told


@pytest.mark.parametrize("reference", [False, True])
def test_prefill_transfer_decode(reference: bool) -> None:
    simulated = device(reference=reference)
    assert simulated.step(Nanos(0), [Dispatch(4, (task(1), task(2)))]) == []
    # Both are prefilled until 2,000; 3,250 ns each on the link; the first joins at 5,250, the second at 9,250, because
    # it comes at 8,500 during an iteration.
    assert drained(simulated) == [
        (6_250, TokensProduced(task_id(1, 0), 1)),
        (10_250, TaskFinished(task_id(1, 0), 5)),
        (10_250, TokensProduced(task_id(2, 0), 1)),
        (14_250, TaskFinished(task_id(2, 0), 5)),
    ]


def test_engines_are_chosen_by_what_they_have() -> None:
    simulated = device(2, 2)
    simulated.step(Nanos(0), [Dispatch(4, (task(1, 60), task(2, 10), task(3, 10), task(4, 10)))])
    # Tasks 2 to 4 go to the other prefill engine, whose link carries them one after another.
    firsts = [(at, event.task) for at, event in drained(simulated) if isinstance(event, TokensProduced)]
    assert [request for _, request in firsts] == [task_id(n, 0) for n in (2, 3, 4, 1)]
    assert firsts[0][0] == 2_000 + 1_050 + 1_000
    assert firsts[-1][0] == 2_000 + 6_050 + 1_000


def test_a_transfer_that_was_cancelled_arrives_for_nobody() -> None:
    simulated = device()
    simulated.step(Nanos(0), [Dispatch(4, (task(1), task(2)))])
    simulated.step(Nanos(3_000), [Cancel(4, task_id(1, 0))])
    assert [(at, type(event)) for at, event in drained(simulated)] == [
        (9_500, TokensProduced),  # the link was busy until 5,250 all the same
        (13_500, TaskFinished),
    ]


def test_cancel_in_every_place() -> None:
    for at in (0, 1_000, 2_500, 5_500, 8_000):
        simulated = device()
        simulated.step(Nanos(0), [Dispatch(4, (task(1),))])
        told = simulated.step(Nanos(at), [Cancel(4, task_id(1, 0)), Cancel(4, task_id(9, 0))])
        assert not any(isinstance(event, TaskFinished) for event in told)
        assert drained(simulated) == []
        (report,) = simulated.report(Nanos(10**6))
        assert (report.running, report.waiting, report.kv_blocks_free) == (0, 0, 100)
        simulated.step(Nanos(10**6), [Dispatch(4, (task(2),))])
        assert len(drained(simulated)) == 2


def test_report_and_usage() -> None:
    simulated = device()
    simulated.step(Nanos(0), [Dispatch(4, (task(1),))])
    assert simulated.report(Nanos(1_000))[0].running == 1
    simulated.step(Nanos(2_000), ())
    assert (simulated.report(Nanos(3_000))[0].running, simulated.report(Nanos(3_000))[0].waiting) == (0, 1)
    drained(simulated)
    (usage,) = simulated.usage(Nanos(10**6))
    assert (usage.replica, usage.busy_ns, usage.prefill_busy_ns) == (4, 7_000, 2_000)
    assert (usage.iterations, usage.itl_count, usage.itl_sum_ns) == (6, 4, 4_000)
    assert usage.seen.prefill_tokens == 32
    (joined,) = simulated.joined()
    assert (joined.replica, joined.pool, joined.tasks_max, joined.kv_tokens_max) == (4, "llm", 8, 400)
    assert joined.input_token_ns == pytest.approx(100)  # FLAT: all of it is the link


def test_what_can_never_fit_fails() -> None:
    small = dataclasses.replace(LLM, kv_blocks=4)
    for prefill, decode, needed in ((small, LLM, 8), (LLM, small, 9)):
        simulated = DisaggregatedDevice(2, "node0", [prefill], [decode], LINK, lambda request, stage: 5)
        told = simulated.step(Nanos(0), [Dispatch(4, (task(1),))]) + [event for _, event in drained(simulated)]
        reason = f"KV cache too small: the task needs {needed} blocks, the replica has 4"
        assert told == [TaskFailed(task_id(1, 0), reason, retryable=False)]


def test_crash_and_startup() -> None:
    slow = dataclasses.replace(LLM, startup_ns=9)
    simulated = DisaggregatedDevice(2, "node0", [LLM], [slow], LINK, lambda request, stage: 5)
    assert simulated.startup_ns() == 9
    simulated.step(Nanos(0), [Dispatch(4, (task(1), task(2)))])
    simulated.step(Nanos(2_000), ())
    simulated.crash(Nanos(2_500))
    assert simulated.wakeup_at == NEVER
    simulated.step(Nanos(3_000), [Dispatch(4, (task(1),))])
    assert [at for at, _ in drained(simulated)] == [9_250, 13_250]


def test_misuse_is_refused() -> None:
    for command in (Dispatch(6, (task(1),)), Respond(1), Cancel(7, 1)):
        with pytest.raises(IllegalEvent, match=r"device 2: .* is not for a replica of this device"):
            device().step(Nanos(0), [command])
    with pytest.raises(ConfigError, match="request 1: 32 input and 0 output tokens"):
        device(output_tokens=lambda request, stage: 0).step(Nanos(0), [Dispatch(4, (task(1),))])
    with pytest.raises(ConfigError, match="device 2 on node0: expected at least one prefill and one decode engine"):
        device(0)
    with pytest.raises(ConfigError, match="KV link: bytes_per_s: expected a whole number from 1, got 0"):
        KvLink(bytes_per_token=1, bytes_per_s=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_every_task_ends_once_and_engines_agree(seed: int, asynchronous: bool) -> None:
    """Native engines and the reference give the same events at the same nanoseconds, and nothing is lost."""
    rng = random.Random(seed)
    llm = dataclasses.replace(LLM, kv_blocks=30, prefix_caching=rng.random() < 0.5, async_scheduling=asynchronous)
    shape = (rng.randint(1, 2), rng.randint(1, 2))
    devices = [
        DisaggregatedDevice(
            2,
            "n",
            [llm] * shape[0],
            [llm] * shape[1],
            LINK,
            lambda request, stage: 1 + request % 17,
            reference=reference,
        )
        for reference in (False, True)
    ]
    ends: Counter[int] = Counter()
    cancelled: set[int] = set()
    now = 0

    def both(commands: list[Any]) -> None:
        native, reference = (simulated.step(Nanos(now), commands) for simulated in devices)
        assert native == reference
        for event in native:
            if isinstance(event, TaskFinished | TaskFailed):
                ends[event.task] += 1

    for request in range(25):
        at = now + rng.randint(0, 3_000)
        while (wakeup := devices[0].wakeup_at) <= at:
            assert wakeup == devices[1].wakeup_at
            now = int(wakeup)
            both([])
        now = at
        both([Dispatch(4, (task(request, rng.randint(1, 90)),))])
        if rng.random() < 0.1:
            cancelled.add(task_id(rng.randint(0, request), 0))
            both([Cancel(4, task) for task in sorted(cancelled)])
    while (wakeup := devices[0].wakeup_at) != NEVER:
        now = int(wakeup)
        both([])
    assert all(ends[task_id(request, 0)] == 1 or task_id(request, 0) in cancelled for request in range(25))
    assert max(ends.values()) == 1
    for simulated in devices:
        assert simulated.report(Nanos(now))[0].kv_blocks_free == 30 * shape[1]
