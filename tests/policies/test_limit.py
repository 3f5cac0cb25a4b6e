"""Limits: the engine's own, and what hybrid makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.policy import QueueView
from sage_core.units import MILLISECOND, NEVER, PoolKind
from sage_policies.hybrid import HybridLimit
from sage_policies.limit import EngineLimit, Partition

EMPTY = QueueView(PoolKind.LLM, 0, 0, NEVER, NEVER)


def embedding_queue(tasks=1, input_tokens=10, oldest=0, due=NEVER):
    return QueueView(PoolKind.EMBEDDING, tasks, input_tokens, oldest, due)


def test_engine_limit_is_a_multiple_of_the_engine_and_at_least_one(replicas):
    view = replicas(tasks_max=[8, 3, 1])
    assert EngineLimit(0.5).limit(0, view, EMPTY).tasks_max.tolist() == [4, 1, 1]
    assert EngineLimit().limit(0, view, EMPTY).tasks_max.tolist() == [8, 3, 1]


def test_a_router_has_no_limit(replicas):
    limits = EngineLimit(None).limit(0, replicas(2), EMPTY)
    assert limits.tasks_max.tolist() == [NEVER, NEVER] and limits.hold_until.tolist() == [0, 0]


def test_engine_limit_survives_an_engine_without_a_maximum(replicas):
    assert EngineLimit(1.0).limit(0, replicas(tasks_max=[NEVER]), EMPTY).tasks_max[0] >= 2**62


def test_partition_keeps_each_kind_on_its_devices(replicas):
    split = Partition(EngineLimit(), llm_devices=[0, 1], embedding_devices=[2])
    view = replicas(device=[0, 1, 2, 3], tasks_max=[8, 8, 8, 8])
    for kind, held in ((PoolKind.LLM, [8, 8, 0, 8]), (PoolKind.EMBEDDING, [0, 0, 8, 8]), (PoolKind.OPERATOR, [8] * 4)):
        limits = split.limit(0, view, QueueView(kind, 0, 0, NEVER, NEVER))
        assert limits.tasks_max.tolist() == limits.tasks_max_batch.tolist() == held


def test_partition_refuses_a_device_in_both_parts():
    with pytest.raises(ConfigError, match=r"devices \[1\]"):
        Partition(EngineLimit(), [0, 1], [1, 2])


def test_hybrid_keeps_slots_for_urgent_work_and_bounds_prompts_and_memory(replicas):
    view = replicas(tasks_max=[64, 1], batch_tokens_max=[2048, 0], kv_tokens_max=[100_000, 0])
    limits = HybridLimit(reserve=0.1, prefill_depth=1.5, kv_fill=0.9).limit(0, view, EMPTY)
    assert limits.tasks_max.tolist() == [64, 1]
    assert limits.tasks_max_batch.tolist() == [57, 1]
    assert limits.prefill_tokens_max.tolist() == [3072, NEVER]
    assert limits.kv_tokens_max.tolist() == [90_000, NEVER]
    assert limits.hold_until.tolist() == [0, 0]


def test_an_idle_embedding_engine_never_waits(replicas):
    limits = HybridLimit().limit(1000, replicas(in_flight=[0]), embedding_queue(oldest=1000))
    assert limits.hold_until[0] <= 1000
    assert (limits.tasks_max[0], limits.prefill_tokens_max[0]) == (8, 1000)


def test_a_busy_embedding_engine_takes_one_more_batch_when_its_window_ends(replicas):
    limit = HybridLimit(window_ns=5 * MILLISECOND)
    limits = limit.limit(MILLISECOND, replicas(in_flight=[3]), embedding_queue(oldest=MILLISECOND))
    assert limits.hold_until[0] == 6 * MILLISECOND
    assert (limits.tasks_max[0], limits.prefill_tokens_max[0]) == (16, 2000)


@pytest.mark.parametrize("full", [{"tasks": 8}, {"input_tokens": 1000}])
def test_a_full_batch_leaves_at_once(replicas, full):
    limits = HybridLimit().limit(0, replicas(in_flight=[3]), embedding_queue(**full))
    assert limits.hold_until[0] == 0


def test_a_near_due_time_opens_before_the_window_ends(replicas):
    # 100 tokens at 1e4 ns and 1e6 ns fixed: a batch of 2 ms.
    limit = HybridLimit(window_ns=50 * MILLISECOND, margin_ns=MILLISECOND)
    queue = embedding_queue(input_tokens=100, due=10 * MILLISECOND)
    assert limit.limit(0, replicas(in_flight=[3]), queue).hold_until[0] == 7 * MILLISECOND


def test_a_due_time_out_of_reach_does_not_break_up_batches(replicas):
    limit = HybridLimit(window_ns=50 * MILLISECOND)
    queue = embedding_queue(input_tokens=100, due=10 * MILLISECOND)
    assert limit.limit(9 * MILLISECOND, replicas(in_flight=[3]), queue).hold_until[0] == 50 * MILLISECOND


def test_a_batch_has_no_more_work_than_asked(replicas):
    # 1e4 ns a token and 1e6 ns fixed: 500 tokens work 5 ms; ten times the fixed time is 1,000 tokens.
    queue = embedding_queue(input_tokens=600)
    for batch_ns, batch in ((12 * MILLISECOND, 1200), (5 * MILLISECOND, 1000), (1, 1000)):
        limit = HybridLimit(batch_ns=batch_ns)
        view = replicas(in_flight=[3, 0], batch_tokens_max=[1100, 0], tasks_max=[64, 64])
        limits = limit.limit(0, view, queue)
        assert limits.prefill_tokens_max.tolist() == [2 * min(batch, 1100), batch]
    cheap = replicas(in_flight=[3], batch_tokens_max=[0], fixed_ns=[0.0], input_token_ns=[1e4])
    assert HybridLimit(batch_ns=5 * MILLISECOND).limit(0, cheap, queue).hold_until[0] == 0, (
        "600 tokens are a full batch"
    )
    assert HybridLimit(batch_ns=7 * MILLISECOND).limit(0, cheap, queue).hold_until[0] > 0
    off = HybridLimit(batch_ns=0).limit(0, replicas(in_flight=[3], batch_tokens_max=[1100]), queue)
    assert off.prefill_tokens_max[0] == 2200, "the engine's own size"
    unknown = replicas(in_flight=[0], batch_tokens_max=[0], input_token_ns=[0.0])
    assert HybridLimit().limit(0, unknown, queue).prefill_tokens_max[0] == NEVER


@pytest.mark.parametrize(("in_flight", "room"), [(1, True), (2, False)])
def test_behind_one_text_there_is_room_for_another_however_long(replicas, in_flight, room):
    view = replicas(
        in_flight=[in_flight], prefill_tokens=[5000], batch_tokens_max=[0], fixed_ns=[0.0], input_token_ns=[1e4]
    )
    limits = HybridLimit(batch_ns=5 * MILLISECOND).limit(0, view, embedding_queue(input_tokens=5000))
    assert (int(limits.prefill_tokens_max[0]) > 5000) is room and limits.hold_until[0] == 0


def test_when_held_it_opens_at_the_instant_it_said(replicas):
    limit = HybridLimit(window_ns=50 * MILLISECOND)
    busy = replicas(in_flight=[3])
    queue = embedding_queue(input_tokens=100, due=10 * MILLISECOND + 1)
    opens = int(limit.limit(0, busy, queue).hold_until[0])
    assert opens > 0
    assert limit.limit(opens, busy, queue).hold_until[0] <= opens


@pytest.mark.parametrize("kind", PoolKind)
def test_switched_off_it_is_the_engine_limit(replicas, kind):
    view = replicas(in_flight=[3, 0], kv_tokens_max=100)
    off = HybridLimit(in_flight_limits=False, embedding_batches=False)
    queue = QueueView(kind, 1, 10, 0, 5)
    for got, want in zip(columns(off.limit(0, view, queue)), columns(EngineLimit().limit(0, view, queue)), strict=True):
        np.testing.assert_array_equal(got, want)


@given(data=st.data())
def test_every_limit_admits_something_and_is_int64(any_replicas, any_queue, data):
    view, queue = data.draw(any_replicas), data.draw(any_queue)
    now = data.draw(st.integers(0, 10**14))
    for limit in (EngineLimit(), EngineLimit(None), HybridLimit(), HybridLimit(reserve=1.0, prefill_depth=0.0)):
        limits = limit.limit(now, view, queue)
        for column in columns(limits):
            assert column.shape == (len(view),) and column.dtype == np.int64
        assert min(limits.tasks_max.min(), limits.tasks_max_batch.min(), limits.prefill_tokens_max.min()) >= 1
        assert (limits.tasks_max_batch <= limits.tasks_max).all()


@pytest.mark.parametrize(
    "wrong", [{"reserve": 1.5}, {"kv_fill": -1.0}, {"window_ns": -1}, {"prefill_depth": float("nan")}]
)
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(ConfigError, match=f"policy.{next(iter(wrong))}"):
        HybridLimit(**wrong)


def columns(limits):
    return (
        limits.tasks_max,
        limits.tasks_max_batch,
        limits.prefill_tokens_max,
        limits.kv_tokens_max,
        limits.hold_until,
    )


def test_the_reserve_is_lifted_while_the_oldest_task_starves(replicas):
    limit = HybridLimit(reserve=0.5, starvation_ns=1000)
    view = replicas(in_flight=[0])
    waiting = QueueView(PoolKind.LLM, 1, 10, 5, NEVER)
    full = int(view.tasks_max[0])
    assert limit.limit(1005, view, waiting).tasks_max_batch.tolist() == [full // 2]
    assert limit.limit(1006, view, waiting).tasks_max_batch.tolist() == [full]
