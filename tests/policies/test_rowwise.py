"""rowwise: a scalar function is the same order as its vectorised form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import PolicyError
from sage_core.units import NEVER
from sage_policies.order import EarliestDeadline, Fifo, PriorityOrder, ShortestFirst
from sage_policies.rowwise import Row, rowwise


def fifo(now, row):
    return row.arrived_at


def priority(now, row):
    return row.priority * 2.0**50 + min(row.arrived_at, 2**50 - 2**30)


def deadline(now, row):
    due = min(row.ttft_due_at, row.due_at)
    return min(due, 2**52 - 1) if due < NEVER else 2.0**52 + min(row.arrived_at, 2**52 - 1)


def shortest(now, row):
    return row.speed.input_token_ns * row.input_tokens + row.speed.output_token_ns * row.output_tokens


PAIRS = [(fifo, Fifo()), (priority, PriorityOrder()), (deadline, EarliestDeadline()), (shortest, ShortestFirst())]


@pytest.mark.parametrize(("scalar", "order"), PAIRS)
@given(data=st.data())
def test_rowwise_equals_vectorised(any_tasks, scalar, order, data):
    now, view = data.draw(any_tasks)
    np.testing.assert_array_equal(rowwise(scalar).score(now, view), order.score(now, view))


def test_rows_are_plain_numbers_of_every_column(tasks):
    seen = []
    rowwise(lambda now, row: seen.append(row) or 0.0).score(0, tasks(2, oldest=1, bypassed=3))
    assert [row.task for row in seen] == [0, 1]
    assert all(type(value) is int for value in seen[0][:15])
    assert (seen[0].pool, seen[0].oldest, seen[0].bypassed) == ("pool", 1, 3)
    assert len(seen[0]) == len(Row._fields)


def test_it_is_named_after_the_function_and_static_when_told():
    assert rowwise(fifo).name == "fifo" and not rowwise(fifo).static
    assert rowwise(fifo, static=True).static


def test_a_function_that_returns_no_number_is_blamed(tasks):
    def soon(now, row):
        return "soon"

    with pytest.raises(PolicyError, match="order soon: expected one number a task"):
        rowwise(soon).score(0, tasks(2))
