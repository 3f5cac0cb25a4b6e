"""A policy of your own, outside the package.

    cd examples/tutorials
    sage run policy=user policy._target_=my_policy.shortest_first load.duration_s=30

The same file runs unchanged in simulation and live: a policy sees columns of facts and returns scores.
"""

from __future__ import annotations

from sage_core.policy import Policy
from sage_policies.limit import EngineLimit
from sage_policies.predict import TenantQuantile
from sage_policies.route import LeastInFlight
from sage_policies.rowwise import Row, rowwise


def expected_work(now: int, row: Row) -> float:
    """Lower goes first: the task with the least expected work, aged so that nothing waits for ever."""
    waited_s = (now - row.queued_at) / 1e9
    return row.input_tokens + 10.0 * row.output_tokens - 100.0 * waited_s


def shortest_first(limit_factor: float = 0.25) -> Policy:
    """Shortest predicted job first, at most a quarter of each engine's slots in use."""
    return Policy(
        name="shortest_first",
        admit=None,
        order=rowwise(expected_work),
        route=LeastInFlight(),
        limit=EngineLimit(limit_factor),
        predict=TenantQuantile(q=0.5),
    )
