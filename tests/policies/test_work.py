"""Shortest predicted work first, weighted and not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.policy import Speed
from sage_policies.order import ShortestFirst
from sage_policies.work import ShortestWork


def test_unweighted_it_is_shortest_first_whatever_the_priority(tasks):
    view = tasks(
        input_tokens=[1000, 10, 10], output_tokens=[1, 500, 5], priority=[0, 1, 2], speed=Speed(0.0, 1.0, 100.0)
    )
    assert ShortestWork().score(0, view).tolist() == [1100.0, 50010.0, 510.0]
    assert ShortestWork().score(0, view).tolist() == ShortestFirst().score(0, view).tolist()


def test_weights_fall_with_priority_and_stop_at_one(tasks):
    view = tasks(
        input_tokens=[600] * 6, output_tokens=[0] * 6, priority=[0, 1, 2, 3, 9, -1], speed=Speed(0.0, 1.0, 0.0)
    )
    assert ShortestWork(levels=3).score(0, view).tolist() == [200.0, 300.0, 600.0, 600.0, 600.0, 150.0]


def test_a_weight_buys_that_much_work_and_no_more(tasks):
    """Urgent work goes before batch work up to twice as short, unlike strict priority."""
    view = tasks(input_tokens=[199, 100, 201], output_tokens=[0, 0, 0], priority=[0, 1, 0], speed=Speed(0.0, 1.0, 0.0))
    assert ShortestWork(levels=2).score(0, view).argsort().tolist() == [0, 1, 2]


@given(jobs=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), min_size=1, max_size=6))
def test_no_order_has_a_smaller_weighted_sum_of_completion_times(tasks, jobs):
    """Smith's rule, against every permutation."""
    work, priority = zip(*jobs, strict=True)
    view = tasks(input_tokens=work, output_tokens=[0] * len(jobs), priority=priority, speed=Speed(0.0, 1.0, 0.0))

    def cost(order):
        ends = itertools.accumulate(work[i] for i in order)
        return sum((3 - priority[i]) * end for i, end in zip(order, ends, strict=True))

    ranked = ShortestWork(levels=3).score(0, view).argsort(kind="stable").tolist()
    assert cost(ranked) == min(map(cost, itertools.permutations(range(len(jobs)))))


def test_no_levels_are_refused():
    with pytest.raises(ConfigError, match=r"policy\.levels"):
        ShortestWork(0)
