"""Routes: which replica each prefers, and that a static split is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_policies.route import LeastInFlight, LeastOutstandingTokens, PredictedFinish, RoundRobin


def best(route, tasks_view, replicas_view):
    return route.score(0, tasks_view, replicas_view).argmin(axis=1).tolist()


def test_round_robin_takes_the_one_whose_turn_was_longest_ago(tasks, replicas):
    assert best(RoundRobin(), tasks(2), replicas(last_dispatch=[7, 5, 6])) == [1, 1]


def test_least_in_flight_counts_tasks_and_outstanding_counts_tokens(tasks, replicas):
    view = replicas(in_flight=[2, 1], kv_tokens=[10, 9000])
    assert best(LeastInFlight(), tasks(1), view) == [1]
    assert best(LeastOutstandingTokens(), tasks(1), view) == [0]


@pytest.mark.parametrize(
    "better_second",
    [
        {"fixed_ns": [9e6, 1e6]},
        {"prefill_tokens": [5000, 0]},
        {"in_flight": [5, 1], "device_in_flight": [5, 1]},
        {"output_token_ns": [2e7, 1e7]},
        {"input_token_ns": [2e4, 1e4]},
        {"slowdown": [3.0, 1.0]},
        {"device_in_flight": [1, 0]},
    ],
)
def test_predicted_finish_minds_every_term(tasks, replicas, better_second):
    assert best(PredictedFinish(), tasks(1), replicas(2)) == [0], "equals: the one that joined first"
    assert best(PredictedFinish(), tasks(1), replicas(**better_second)) == [1]


def test_predicted_finish_is_the_stated_formula(tasks, replicas):
    view = replicas(
        in_flight=[3],
        device_in_flight=[4],
        prefill_tokens=[50],
        fixed_ns=[7.0],
        input_token_ns=[2.0],
        output_token_ns=[11.0],
        output_seq_ns=[3.0],
        slowdown=[2.0],
    )
    score = PredictedFinish(share_penalty=0.5).score(0, tasks(input_tokens=[100], output_tokens=[10]), view)
    assert score.tolist() == [[((2 * 50 + 10 * (3 * 4)) * 2.0 + (7 + 2 * 100) + 10 * 11) * 1.5 + 3]]


def test_predicted_finish_without_costs_is_least_in_flight(tasks, replicas):
    unknown = {"fixed_ns": 0.0, "input_token_ns": 0.0, "output_token_ns": 0.0, "output_seq_ns": 0.0}
    assert best(PredictedFinish(), tasks(1), replicas(in_flight=[2, 1, 3], **unknown)) == [1]


def test_a_negative_penalty_is_refused():
    with pytest.raises(ConfigError, match="share_penalty"):
        PredictedFinish(share_penalty=-0.1)


@given(data=st.data())
def test_scores_are_numbers_for_every_task_and_replica(any_tasks, any_replicas, data):
    now, view = data.draw(any_tasks)
    pool = data.draw(any_replicas)
    for route in (RoundRobin(), LeastInFlight(), LeastOutstandingTokens(), PredictedFinish()):
        scores = route.score(now, view, pool)
        assert scores.shape == (len(view), len(pool)) and np.isfinite(scores).all()
