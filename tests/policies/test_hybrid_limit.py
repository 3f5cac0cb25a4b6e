"""How many tasks hybrid lets an LLM engine hold: no more than keep the time per output token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.policy import QueueView
from sage_core.units import MILLISECOND, NEVER, PoolKind
from sage_policies.hybrid import HybridLimit
from sage_policies.presets import hybrid

QUEUE = QueueView(PoolKind.LLM, 100, 100_000, 0, NEVER)
COSTS = {"output_token_ns": 10.0 * MILLISECOND, "output_seq_ns": 0.1 * MILLISECOND, "tasks_max": 256}


def tasks_max(limit, view):
    return limit.limit(0, view, QUEUE).tasks_max.tolist()


def test_an_engine_holds_what_keeps_the_time_per_token(replicas):
    # 10 ms and 0.1 ms a task: 300 tasks take 40 ms; twice as slow, 100; eight times, not one.
    view = replicas(slowdown=[1.0, 2.0, 8.0], **COSTS)
    assert tasks_max(HybridLimit(tpot_ns=40 * MILLISECOND), view) == [256, 100, 1]


def test_the_reserve_is_part_of_what_it_holds(replicas):
    limits = HybridLimit(tpot_ns=40 * MILLISECOND, reserve=0.1).limit(0, replicas(slowdown=[2.0], **COSTS), QUEUE)
    assert (limits.tasks_max[0], limits.tasks_max_batch[0]) == (100, 90)


@pytest.mark.parametrize("off", [{"tpot_limit": False}, {"tpot_ns": 0}])
def test_without_the_objective_the_engine_alone_decides(replicas, off):
    assert tasks_max(HybridLimit(**off), replicas(slowdown=[8.0], **COSTS)) == [256]


def test_where_costs_are_unknown_the_engine_alone_decides(replicas):
    view = replicas(slowdown=[8.0], output_token_ns=0.0, output_seq_ns=0.0, tasks_max=256)
    assert tasks_max(HybridLimit(), view) == [256]


@given(data=st.data())
def test_one_task_more_would_take_too_long(any_replicas, data):
    view = data.draw(any_replicas)
    limit = HybridLimit(tpot_ns=data.draw(st.integers(1, 10**9)))
    tasks = np.array(tasks_max(limit, view))
    assert ((tasks >= 1) & (tasks <= view.tasks_max)).all()
    limited = tasks < view.tasks_max
    more = (view.output_token_ns + view.output_seq_ns * (tasks + 1)) * view.slowdown
    assert (more[limited] >= limit.tpot_ns * (1 - 1e-9)).all()


def test_the_preset_takes_a_fraction_of_the_objective():
    assert hybrid(tpot_s=0.1, tpot_fill=0.5).limit.tpot_ns == 50 * MILLISECOND
    assert hybrid(tpot_s=None).limit.tpot_ns == 0
    with pytest.raises(ConfigError, match=r"policy\.tpot_fill"):
        hybrid(tpot_fill=-1.0)
    with pytest.raises(ConfigError, match=r"policy\.tpot_s"):
        hybrid(tpot_s=-1.0)
