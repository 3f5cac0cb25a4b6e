"""Power of two choices: the draw is of two distinct replicas, the same whenever asked, fair; and the better one wins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.units import NEVER, PoolKind
from sage_policies.hashing import mix, uniform
from sage_policies.limit import EngineLimit
from sage_policies.order import Fifo
from sage_policies.power_of_two import PowerOfTwo

native = pytest.importorskip("sage_core._native", reason="the extension is not built: pip install -e .")


def drawn(tasks, replicas, count, ids):
    return np.isfinite(PowerOfTwo().score(0, tasks(task=ids, request=ids), replicas(count)))


@given(count=st.integers(1, 20), ids=st.lists(st.integers(0, 2**50), min_size=1, max_size=20, unique=True))
def test_two_distinct_replicas_are_drawn_and_the_same_at_every_call(tasks, replicas, count, ids):
    first = drawn(tasks, replicas, count, ids)
    assert (first.sum(axis=1) == min(count, 2)).all()
    assert (drawn(tasks, replicas, count, ids) == first).all()


def test_the_one_with_less_expected_wait_is_taken_however_idle_a_third_is(tasks, replicas):
    ids = list(range(200))
    view = replicas(prefill_tokens=[9000, 100, 5000, 0], kv_tokens=[9000, 100, 5000, 0])
    scores = PowerOfTwo().score(0, tasks(task=ids, request=ids), view)
    taken = scores.argmin(axis=1)
    by_wait = [3, 1, 2, 0]  # least first
    for row, best in zip(np.isfinite(scores), taken.tolist(), strict=True):
        assert best == min(np.flatnonzero(row), key=by_wait.index)
    assert (taken == 1).any() and (taken == 2).any(), "the idle one is not always among the two"
    assert not (taken == 0).any()


def test_the_wait_is_of_the_machine_not_a_count(tasks, replicas):
    view = replicas(in_flight=[1, 5], kv_tokens=[200, 1000], output_token_ns=[5e8, 2e6])
    assert PowerOfTwo().score(0, tasks(1), view).argmin() == 1, (
        "five tasks on the fast one are done before one on the slow"
    )


def test_two_choices_balance_where_one_does_not():
    """What the paper is named after: the fullest of 32 bins is a few over the mean, not a multiple of the deviation."""
    mechanism = native.Mechanism()
    mechanism.add_pool("llm", int(PoolKind.LLM))
    for replica in range(32):
        mechanism.join(0, replica, replica, 1, 0, 0, 0.0, 0.0, 1e7, 0.0)
    mechanism.bind(0, Fifo().native(), PowerOfTwo().native(), EngineLimit(None).native())
    for task in range(3200):
        mechanism.enqueue(0, 0, task, task, 0, 0, 0, 0, 0, 0, NEVER, NEVER, 10, 10, 10, 0)
    taken = np.bincount([replica for replica, _ in mechanism.decide(0)])
    alone = np.bincount((mix(np.arange(3200)) % np.uint64(32)).astype(np.int64))
    assert taken.sum() == alone.sum() == 3200
    assert taken.max() <= 103 < 110 < alone.max(), (taken.max(), alone.max())


def test_draws_are_spread_evenly(tasks, replicas):
    counts = drawn(tasks, replicas, 8, list(range(4000))).sum(axis=0)
    assert counts.min() > 900 and counts.max() < 1100, "1,000 each, standard deviation 27"


def test_mix_is_splitmix64():
    """First outputs of the published generator seeded with 0: its state steps by the same constant that mix adds."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.arange(3, dtype=np.uint64) * step
    assert [int(each) for each in mix(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("shift", [0, 16])
def test_uniform_draws_are_uniform(shift):
    draws = uniform(np.arange(20_000) << shift)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert np.histogram(draws, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 2000), abs=200)
