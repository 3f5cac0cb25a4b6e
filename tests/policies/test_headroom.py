"""Predicted latency against the objective: where it decides otherwise than the least response time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.units import MILLISECOND, NEVER, SECOND
from sage_policies.headroom import MISSED_NS, Headroom
from sage_policies.route import PredictedFinish

BOTH = [Headroom(), Headroom(pack=True)]


def test_a_first_token_in_time_beats_an_earlier_end(tasks, replicas):
    """Replica 0 decodes twice as fast but has a long prompt before it."""
    view = replicas(prefill_tokens=[100_000, 0], output_token_ns=[1e7, 2e7], output_seq_ns=0.0)
    task = tasks(1, ttft_due_at=SECOND, due_at=60 * SECOND, output_tokens=500)
    assert PredictedFinish(0.0).score(0, task, view).argmin() == 0
    for route in BOTH:
        assert route.score(0, task, view).argmin() == 1


def test_packing_takes_the_loaded_replica_that_is_good_enough_and_spreading_does_not(tasks, replicas):
    view = replicas(prefill_tokens=[0, 40_000, 200_000], kv_tokens=[0, 40_000, 200_000], in_flight=[0, 4, 20])
    task = tasks(1, ttft_due_at=SECOND)
    assert Headroom(pack=True).score(0, task, view).argmin() == 1, "0.4 s of prompts are in time, 2 s are not"
    assert Headroom().score(0, task, view).argmin() == 0


@pytest.mark.parametrize("route", BOTH)
def test_where_all_would_miss_the_least_miss_is_taken(tasks, replicas, route):
    view = replicas(prefill_tokens=[300_000, 200_000, 250_000])
    scores = route.score(0, tasks(1, ttft_due_at=SECOND), view)
    assert scores.argmin() == 1 and (scores > MISSED_NS).all()


@pytest.mark.parametrize("route", BOTH)
def test_the_nearer_of_two_objectives_decides(tasks, replicas, route):
    slow_start = replicas(fixed_ns=[500 * MILLISECOND, 0.0], output_token_ns=[1e6, 1e7], output_seq_ns=0.0)
    columns = {"input_tokens": 0, "output_tokens": 100}
    tight_start = tasks(1, ttft_due_at=100 * MILLISECOND, due_at=5 * SECOND, **columns)
    tight_end = tasks(1, ttft_due_at=SECOND, due_at=800 * MILLISECOND, **columns)
    assert route.score(0, tight_start, slow_start).argmin() == 1
    assert route.score(0, tight_end, slow_start).argmin() == 0


@pytest.mark.parametrize("route", BOTH)
def test_without_objectives_it_is_predicted_finish(tasks, replicas, route):
    view = replicas(prefill_tokens=[500, 0, 90], in_flight=[5, 1, 2], slowdown=1.0)
    task = tasks(1, ttft_due_at=NEVER, due_at=NEVER)
    np.testing.assert_array_equal(route.score(0, task, view), PredictedFinish(0.0).score(0, task, view))


@given(data=st.data())
def test_scores_are_finite_numbers(any_tasks, any_replicas, data):
    now, view = data.draw(any_tasks)
    pool = data.draw(any_replicas)
    for route in BOTH:
        scores = route.score(now, view, pool)
        assert scores.shape == (len(view), len(pool)) and np.isfinite(scores).all()
