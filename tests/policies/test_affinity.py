"""Prefix affinity: a prefix stays where it is while the load allows, and moves only as far as it must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.units import PoolKind
from sage_policies.affinity import PrefixAffinity, PrefixHome
from sage_policies.hashing import draws
from sage_policies.route import LeastInFlight

PREFIXES = list(range(1, 301))


def homes(tasks, replicas, ids, **columns):
    view = replicas(replica=ids, device=ids, **columns)
    return np.array(ids)[PrefixAffinity().score(0, tasks(prefix=PREFIXES), view).argmin(axis=1)]


def test_a_prefix_has_one_home_and_homes_are_spread(tasks, replicas):
    first = homes(tasks, replicas, [0, 1, 2, 3])
    assert (homes(tasks, replicas, [3, 1, 0, 2]) == first).all(), "the order of joining does not matter"
    assert np.bincount(first).min() > 50, "75 each, standard deviation 7.5"


def test_a_replica_that_leaves_moves_only_its_own_prefixes(tasks, replicas):
    before, after = homes(tasks, replicas, [0, 1, 2, 3]), homes(tasks, replicas, [0, 1, 3])
    assert (after[before != 2] == before[before != 2]).all()
    assert set(after[before == 2]) == {0, 1, 3}, "and those go everywhere, not to one neighbour"


def test_a_full_home_spills_to_the_next_in_the_prefix_s_own_ranking(tasks, replicas):
    idle = PrefixAffinity().score(0, tasks(prefix=PREFIXES), replicas(3))
    crowded = PrefixAffinity().score(0, tasks(prefix=PREFIXES), replicas(3, in_flight=[8, 1, 1]))
    for calm, busy in zip(idle, crowded, strict=True):
        first, second = calm.argsort()[:2]
        assert busy.argmin() == (second if first == 0 else first)


@given(
    loads=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    factor=st.floats(1.0, 3.0),
    prefix=st.integers(1, 10**6),
)
def test_no_replica_is_given_more_than_its_bound(tasks, replicas, loads, factor, prefix):
    chosen = PrefixAffinity(factor).score(0, tasks(prefix=[prefix]), replicas(in_flight=loads)).argmin()
    assert loads[chosen] + 1 <= np.ceil(factor * ((sum(loads) + 1.0) / len(loads)))


def test_what_shares_nothing_goes_to_the_least_in_flight(tasks, replicas):
    assert PrefixAffinity().score(0, tasks(prefix=[0]), replicas(in_flight=[3, 1, 2])).argmin() == 1


def test_a_bound_below_the_mean_is_refused():
    with pytest.raises(ConfigError, match="load_factor"):
        PrefixAffinity(0.9)


# --- homes ----------------------------------------------------------------------------------------------------------------


def homed(in_flight, tasks, replicas, *, now=0, kind=PoolKind.LLM, prefix=(7,), **columns):
    view = tasks(prefix=list(prefix), pool_kind=kind, queued_at=[0] * len(prefix))
    return PrefixHome(LeastInFlight()).score(now, view, replicas(len(in_flight), in_flight=in_flight, **columns))


def with_home(in_flight, value, tasks, replicas):
    """``in_flight`` with ``value`` at the home of prefix 7, and which that is."""
    view = replicas(len(in_flight))
    home = int(draws(np.array([7]), view.replica)[0].argmin())
    return [value if i == home else each for i, each in enumerate(in_flight)], home


def test_a_prompt_goes_nowhere_but_home_while_the_home_has_its_share(tasks, replicas):
    in_flight, home = with_home([4, 4, 4], 4, tasks, replicas)
    scores = homed(in_flight, tasks, replicas)[0]
    assert scores[home] == 4
    assert np.isinf(np.delete(scores, home)).all()


@pytest.mark.parametrize(
    ("value", "columns", "now"),
    [
        (9, {}, 0),  # more than its share
        (0, {}, 0),  # idle: if something keeps it closed, nothing would open it again
        (4, {"tasks_max": [4, 4, 4]}, 0),  # no slot left
        (4, {}, 3_000_000_001),  # waited long enough
    ],
)
def test_a_home_that_is_not_worth_the_wait_is_like_any_other(tasks, replicas, value, columns, now):
    in_flight, _ = with_home([4, 4, 4], value, tasks, replicas)
    assert homed(in_flight, tasks, replicas, now=now, **columns)[0].tolist() == in_flight


def test_a_slow_replica_is_no_home_and_nobody_waits_for_the_only_fast_one(tasks, replicas):
    slow = {"input_token_ns": [1e4, 1e5], "output_token_ns": [1e7, 1e8]}
    for prefix in range(1, 40):
        assert homed([4, 4], tasks, replicas, prefix=[prefix], **slow)[0].tolist() == [4, 4]


def test_only_prompts_have_homes(tasks, replicas):
    in_flight, _ = with_home([4, 4, 4], 4, tasks, replicas)
    assert homed(in_flight, tasks, replicas, kind=PoolKind.EMBEDDING)[0].tolist() == in_flight
    assert homed(in_flight, tasks, replicas, prefix=[0])[0].tolist() == in_flight


@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=8), prefixes=st.lists(st.integers(0, 99), min_size=1))
def test_every_prompt_may_go_somewhere_or_waits_for_a_replica_that_has_work(tasks, replicas, loads, prefixes):
    scores = homed(loads, tasks, replicas, prefix=prefixes)
    for row in scores:
        allowed = np.flatnonzero(np.isfinite(row))
        assert len(allowed) == len(loads) or (len(allowed) == 1 and loads[allowed[0]] > 0)
