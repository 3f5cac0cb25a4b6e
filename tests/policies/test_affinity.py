"""Prefix affinity: a prefix stays where it is while the load allows, and moves only as far as it must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_policies.affinity import AWAY, PrefixAffinity, PrefixHome
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


def homed(in_flight, tasks, replicas, prefix=(7,)):
    return PrefixHome(LeastInFlight()).score(
        0, tasks(prefix=list(prefix)), replicas(len(in_flight), in_flight=in_flight)
    )


def home_of(count, tasks, replicas):
    return int(homed([0] * count, tasks, replicas)[0].argmin())


def test_a_prompt_goes_nowhere_but_home_while_the_home_has_its_share(tasks, replicas):
    home = home_of(3, tasks, replicas)
    in_flight = [4, 4, 4]
    scores = homed(in_flight, tasks, replicas)[0]
    assert scores[home] == 4
    assert np.isinf(np.delete(scores, home)).all()


def test_what_a_home_holds_beyond_its_share_goes_anywhere(tasks, replicas):
    home = home_of(3, tasks, replicas)
    in_flight = [4, 4, 4]
    in_flight[home] = 9
    assert homed(in_flight, tasks, replicas)[0].tolist() == in_flight, "the inner route decides"


def test_an_idle_home_is_preferred_and_not_waited_for(tasks, replicas):
    """If something keeps it closed, nothing would ever open it again."""
    home = home_of(3, tasks, replicas)
    in_flight = [4, 4, 4]
    in_flight[home] = 0
    scores = homed(in_flight, tasks, replicas)[0]
    assert scores.argmin() == home
    assert np.isfinite(scores).all() and (np.delete(scores, home) >= AWAY).all()


def test_what_has_no_prefix_has_no_home(tasks, replicas):
    assert homed([3, 1, 2], tasks, replicas, prefix=[0])[0].tolist() == [3, 1, 2]


@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=8), prefixes=st.lists(st.integers(0, 99), min_size=1))
def test_every_prompt_may_go_somewhere_or_waits_for_a_replica_that_has_work(tasks, replicas, loads, prefixes):
    scores = homed(loads, tasks, replicas, prefixes)
    for row in scores:
        allowed = np.flatnonzero(np.isfinite(row))
        assert len(allowed) == len(loads) or (len(allowed) == 1 and loads[allowed[0]] > 0)
