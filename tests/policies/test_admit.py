"""Admission by feasibility."""

from __future__ import annotations

import numpy as np
import pytest

from sage_core.errors import ConfigError
from sage_core.policy import Speed
from sage_core.units import MILLISECOND, NEVER, SECOND
from sage_policies.admit import Feasible

SPEED = Speed(0.0, 1e5, 2e7)


def refused(admit, arrivals, replicas):
    return np.isinf(admit.score(0, arrivals, replicas)).tolist()


def test_refuses_what_no_replica_could_finish_in_time(tasks, replicas):
    # 100 input tokens are 2 ms to the first token, 10 output tokens at 10.1 ms each 103 ms to the response.
    view = tasks(
        output_tokens=10,
        ttft_due_at=[NEVER, 3 * MILLISECOND, MILLISECOND, NEVER],
        due_at=[NEVER, SECOND, SECOND, 50 * MILLISECOND],
    )
    assert refused(Feasible(), view, replicas(2)) == [False, False, True, True]


def test_work_in_flight_counts_and_one_free_replica_is_enough(tasks, replicas):
    view = tasks(1, output_tokens=0, ttft_due_at=5 * MILLISECOND)
    assert refused(Feasible(), view, replicas(prefill_tokens=[9000, 9000])) == [True]
    assert refused(Feasible(), view, replicas(prefill_tokens=[9000, 0])) == [False]
    assert refused(Feasible(), view, replicas(slowdown=[4.0])) == [True]
    assert refused(Feasible(margin_ns=SECOND), view, replicas(prefill_tokens=[9000, 9000])) == [False]


def test_without_replicas_everything_may_wait(tasks, replicas):
    assert refused(Feasible(), tasks(2, due_at=1), replicas(replica=[])) == [False, False]


def test_wrong_parameters_are_named():
    with pytest.raises(ConfigError, match="retry_after_ns"):
        Feasible(retry_after_ns=-1)
