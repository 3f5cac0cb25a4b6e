"""Deadline groups, and the route by expected wait."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.units import NEVER, SECOND
from sage_policies.qlm import DeadlineGroups
from sage_policies.wait import LeastExpectedWait


def ranks(scores):
    return np.argsort(scores, kind="stable").tolist()  # equal scores: by task id


def test_within_a_group_arrival_decides_and_between_groups_the_deadline(tasks):
    due = [2.9, 2.1, 1.9, 5.0, 2.5]
    view = tasks(due_at=[int(each * SECOND) for each in due])
    assert ranks(DeadlineGroups(SECOND).score(0, view)) == [2, 0, 1, 4, 3]
    assert ranks(DeadlineGroups(1).score(0, view)) == [2, 1, 4, 0, 3], "groups of one nanosecond are EDF"


def test_the_nearer_of_two_objectives_counts_and_those_without_are_the_last_group(tasks):
    view = tasks(ttft_due_at=[NEVER, NEVER, 5 * SECOND], due_at=[NEVER, 2**62, 90 * SECOND])
    assert ranks(DeadlineGroups(SECOND).score(0, view)) == [2, 1, 0]


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=8), st.integers(1, 10**10))
def test_nothing_goes_before_what_is_due_a_whole_group_earlier(tasks, due, group_ns):
    order = ranks(DeadlineGroups(group_ns).score(0, tasks(due_at=due)))
    for i, a in enumerate(order):
        assert all(due[a] - due[b] < group_ns for b in order[i:])


def test_the_route_takes_the_least_wait_not_the_fewest_tokens(tasks, replicas):
    fast_and_full = replicas(kv_tokens=[4000, 2000], output_token_ns=[1e7, 4e7], output_seq_ns=0.0)
    assert LeastExpectedWait().score(0, tasks(1), fast_and_full).argmin() == 0
    more_slots = replicas(kv_tokens=[4000, 2000], tasks_max=[64, 8])
    assert LeastExpectedWait().score(0, tasks(1), more_slots).argmin() == 0


def test_the_wait_is_the_stated_formula(tasks, replicas):
    view = replicas(
        in_flight=[3], prefill_tokens=[50], kv_tokens=[80], tasks_max=[4], input_token_ns=[2.0], output_token_ns=[8.0],
        output_seq_ns=[3.0], slowdown=[2.0],
    )  # fmt: skip
    assert LeastExpectedWait().score(0, tasks(1), view).tolist() == [[(2 * 50 + (8 + 3 * 4) / 4 * 80) * 2.0 + 3]]


def test_where_costs_are_unknown_it_is_least_in_flight(tasks, replicas):
    unknown = {"input_token_ns": 0.0, "output_token_ns": 0.0, "output_seq_ns": 0.0}
    assert LeastExpectedWait().score(0, tasks(1), replicas(in_flight=[2, 1, 3], **unknown)).argmin() == 1


def test_a_group_of_no_time_is_refused():
    with pytest.raises(ConfigError, match="group_ns"):
        DeadlineGroups(0)
