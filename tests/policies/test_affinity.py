"""Prefix affinity: a prefix stays where it is while the load allows, and moves only as far as it must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_policies.affinity import PrefixAffinity

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
