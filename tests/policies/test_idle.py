"""Invariant 8: under hybrid no replica is idle while work that it may take is queued."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.ops import make_mechanism
from sage_core.policy import native_twin
from sage_core.units import NEVER, SECOND
from sage_policies.presets import hybrid

MILLION = 1_000_000

steps = st.lists(
    st.tuples(
        st.integers(0, 50 * MILLION),  # later by
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 3000), st.integers(0, 2)), max_size=12),
        st.integers(0, 6),  # how many of those in flight finish
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(script=steps, reserve=st.sampled_from([0.0, 0.1, 0.9, 1.0]), depth=st.sampled_from([0.0, 0.5, 2.0]))
def test_no_replica_is_idle_while_its_pool_has_work(script: Any, reserve: float, depth: float) -> None:
    for name in ("native", "reference"):
        mechanism: Any = make_mechanism(name)
        policy = hybrid(reserve=reserve, prefill_depth=depth)
        parts = (policy.order, policy.route, policy.limit)
        mechanism.bind(0, *(map(native_twin, parts) if name == "native" else parts))
        for pool, kind in ((0, 0), (1, 1)):
            mechanism.add_pool(f"pool{pool}", kind)
            for replica in range(3):
                mechanism.join(
                    pool, 3 * pool + replica, replica, 4, 2048, 100_000 * (1 - pool), 1e6, 4e4, 9e6 * (1 - pool), 1e5
                )
        now, task = 0, 0
        flying: list[int] = []
        queued = [0, 0]
        pool_of: dict[int, int] = {}
        for later, arrivals, ends in script:
            now += later
            for _ in range(min(ends, len(flying))):
                mechanism.finished(now, flying.pop(0), 10)
            for pool, priority, tokens, due in arrivals:
                due_at = (NEVER, now + SECOND // 10, now + 5 * SECOND)[due]
                mechanism.enqueue(
                    now, pool, task, task, 0, task % 3, priority, 0, now, now, due_at, NEVER, tokens, 64, 32, 0
                )
                pool_of[task] = pool
                queued[pool] += 1
                task += 1
            for _, placed in mechanism.decide(now):
                flying.append(placed)
                queued[pool_of[placed]] -= 1
            for pool in (0, 1):
                idle = int((mechanism.replica_view(pool).in_flight == 0).sum())
                assert queued[pool] == 0 or idle == 0, (
                    f"{name}: {queued[pool]} queued beside {idle} idle in pool {pool}"
                )
