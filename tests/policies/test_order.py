"""The classical orders: each one's defining property, and that packed scores never mix classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.policy import Speed
from sage_core.units import NEVER, SECOND
from sage_policies.order import EarliestDeadline, Fifo, PriorityOrder, ShortestFirst, WeightedSum

DAYS_13 = 2**50 - 2**30


def ranks(scores):
    return np.argsort(scores, kind="stable").tolist()


def test_fifo_is_arrival_of_the_request_not_of_the_stage(tasks):
    view = tasks(arrived_at=[30, 10, 20], queued_at=[31, 99, 21])
    assert ranks(Fifo().score(100, view)) == [1, 2, 0]


def test_priority_then_arrival(tasks):
    view = tasks(priority=[1, 0, 1, 0], arrived_at=[5, 50, 4, 40])
    assert ranks(PriorityOrder().score(100, view)) == [3, 1, 2, 0]


@given(data=st.data())
def test_priority_is_lexicographic_to_the_nanosecond(tasks, data):
    rows = data.draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, DAYS_13)), min_size=2, max_size=8))
    view = tasks(priority=[row[0] for row in rows], arrived_at=[row[1] for row in rows])
    assert ranks(PriorityOrder().score(0, view)) == sorted(range(len(rows)), key=lambda i: rows[i])


def test_priority_classes_never_mix_however_long_the_run(tasks):
    view = tasks(priority=[3, 4, 100, 101], arrived_at=[2**62, 0, 2**62, 0])
    scores = PriorityOrder().score(0, view)
    assert (np.diff(scores) > 0).all()


def test_earliest_deadline_takes_the_nearer_of_two_and_puts_no_deadline_last(tasks):
    view = tasks(
        ttft_due_at=[NEVER, 70, NEVER, NEVER, 90],
        due_at=[80, 900, NEVER, NEVER, 60],
        arrived_at=[0, 1, 3, 2, 4],
    )
    assert ranks(EarliestDeadline().score(50, view)) == [4, 1, 0, 3, 2]


@given(data=st.data())
def test_earliest_deadline_is_lexicographic(tasks, data):
    due = st.one_of(st.just(NEVER), st.integers(0, 2**52 - 1))
    rows = data.draw(st.lists(st.tuples(due, due, st.integers(0, 2**51)), min_size=2, max_size=8))
    ttft, end, arrived = zip(*rows, strict=True)
    scores = EarliestDeadline().score(0, tasks(ttft_due_at=ttft, due_at=end, arrived_at=arrived))

    def key(i):
        first = min(rows[i][:2])
        return (1, rows[i][2]) if first == NEVER else (0, first)

    assert ranks(scores) == sorted(range(len(rows)), key=key)


def test_shortest_first_is_predicted_work(tasks):
    view = tasks(input_tokens=[1000, 10, 10], output_tokens=[1, 500, 5], speed=Speed(0.0, 1.0, 100.0))
    assert ShortestFirst().score(0, view).tolist() == [1100.0, 50010.0, 510.0]


def test_weighted_sum_adds_and_is_static_only_when_all_parts_are(tasks):
    view = tasks(arrived_at=[0, SECOND], ttft_due_at=[9 * SECOND, 2 * SECOND])
    both = WeightedSum([Fifo(), EarliestDeadline()], [1.0, 0.5])
    assert both.score(0, view).tolist() == [4.5 * SECOND, 2.0 * SECOND]
    assert both.static

    class Moving(Fifo):
        static = False

    assert not WeightedSum([Fifo(), Moving()], [1.0, 1.0]).static


def test_weighted_sum_drops_parts_of_weight_zero(tasks):
    class Refuses:
        static = True

        def score(self, now, queued):
            return np.full(len(queued), np.inf)

    assert WeightedSum([Refuses(), Fifo()], [0.0, 1.0]).score(0, tasks(arrived_at=[7])).tolist() == [7.0]


@pytest.mark.parametrize(("orders", "weights"), [([], []), ([Fifo()], [1.0, 2.0]), ([Fifo()], [-1.0]), ([{}], [1.0])])
def test_weighted_sum_refuses_what_is_not_orders_with_weights(orders, weights):
    with pytest.raises(ConfigError, match=r"policy\.order"):
        WeightedSum(orders, weights)


@given(data=st.data())
def test_scores_are_finite_numbers(any_tasks, data):
    now, view = data.draw(any_tasks)
    for order in (Fifo(), PriorityOrder(), EarliestDeadline(), ShortestFirst()):
        scores = order.score(now, view)
        assert scores.shape == (len(view),) and scores.dtype == np.float64 and np.isfinite(scores).all()
