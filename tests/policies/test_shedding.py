"""Probabilistic shedding: the published curve, who is spared, and that the draw is the request's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_policies.shedding import ShedAtSaturation

MANY = list(range(20_000))


def refused(tasks, replicas, saturation, **parameters):
    """Fraction refused of sheddable requests when each engine has ``saturation`` of 1,000 requests waiting."""
    view = replicas(2, waiting=round(1000 * saturation))
    arrivals = tasks(request=MANY, task=MANY, priority=[1] * len(MANY))
    return float(np.isinf(ShedAtSaturation(waiting_max=1000, **parameters).score(0, arrivals, view)).mean())


@pytest.mark.parametrize("saturation", [0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.32, 0.5, 2.0])
def test_the_fraction_refused_is_the_published_curve(tasks, replicas, saturation):
    assert refused(tasks, replicas, saturation) == pytest.approx(min(saturation**5 * 300, 1.0), abs=0.01)


def test_power_and_scale_are_what_they_say(tasks, replicas):
    assert refused(tasks, replicas, 0.5, power=1, scale=1.0) == pytest.approx(0.5, abs=0.01)
    assert refused(tasks, replicas, 0.5, power=2, scale=0.4) == pytest.approx(0.1, abs=0.01)


def test_urgent_requests_always_come_in(tasks, replicas):
    scores = ShedAtSaturation().score(0, tasks(priority=[0, 1, 2, 0]), replicas(waiting=[99]))
    assert np.isinf(scores).tolist() == [False, True, True, False]


def test_saturation_is_the_mean_over_replicas_of_the_larger_share(replicas):
    view = replicas(waiting=[5, 1, 0], kv_tokens=[0, 600, 400], kv_tokens_max=[1000, 1000, 1000])
    assert ShedAtSaturation(waiting_max=5, kv_fill=0.8).saturation(view) == pytest.approx((1.0 + 0.75 + 0.5) / 3)
    unknown = replicas(kv_tokens=[10**6], kv_tokens_max=[0])
    assert ShedAtSaturation().saturation(unknown) == 0.0


@given(request=st.integers(0, 2**40), waiting=st.integers(0, 400), more=st.integers(0, 400))
def test_what_is_refused_is_refused_at_any_higher_saturation(tasks, replicas, request, waiting, more):
    """The draw belongs to the request, not to the moment: the same answer twice, and no luck by trying at a worse time."""
    admit = ShedAtSaturation(waiting_max=1000)
    arrival = tasks(request=[request], priority=[1])
    now, later = (admit.score(0, arrival, replicas(1, waiting=each)) for each in (waiting, waiting + more))
    assert now <= later and now == admit.score(5, arrival, replicas(1, waiting=waiting))


def test_without_replicas_everything_waits_for_one(tasks, replicas):
    assert ShedAtSaturation().score(0, tasks(2, priority=1), replicas(0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wrong", [{"power": 0}, {"scale": -1.0}, {"waiting_max": 0}, {"kv_fill": 0.0}])
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ShedAtSaturation(**wrong)
