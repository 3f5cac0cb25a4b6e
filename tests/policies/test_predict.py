"""Predictors of output length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_policies.predict import MaxPrediction, NoPrediction, Oracle, TenantQuantile


def ask(predictor, tenant="a", kind=0, cap=1000, request=0):
    return predictor.predict(request, tenant, kind, 50, cap)


def test_none_and_max():
    assert ask(NoPrediction()) == 0
    assert ask(MaxPrediction(), cap=77) == 77


def test_the_prior_holds_until_enough_was_seen_and_the_cap_always():
    predictor = TenantQuantile(q=0.5, prior=300, samples_min=2)
    assert ask(predictor) == 300 and ask(predictor, cap=100) == 100
    predictor.observe("a", 0, 40)
    assert ask(predictor) == 300
    predictor.observe("a", 0, 60)
    assert ask(predictor) == 60 and ask(predictor, cap=50) == 50


def test_tenants_and_kinds_are_apart():
    predictor = TenantQuantile(prior=7, samples_min=1)
    predictor.observe("a", 0, 500)
    assert (ask(predictor, "a", 0), ask(predictor, "a", 1), ask(predictor, "b", 0)) == (500, 7, 7)


def test_an_embedding_generates_nothing():
    assert ask(TenantQuantile(), kind=2, cap=0) == 0


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    window=st.integers(1, 20),
    q=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
)
def test_it_is_the_exact_quantile_of_the_window(lengths, window, q):
    predictor = TenantQuantile(q=q, window=window, samples_min=1)
    for length in lengths:
        predictor.observe("a", 0, length)
    last = sorted(lengths[-window:])
    assert ask(predictor) == last[min(int(q * len(last)), len(last) - 1)]
    if q in (0.0, 1.0):
        assert ask(predictor) == (last[0] if q == 0.0 else last[-1])


def test_the_oracle_knows_and_is_labelled():
    predictor = Oracle()
    with pytest.raises(ConfigError, match="only in simulation"):
        ask(predictor)
    predictor.bind({3: 123}.__getitem__)
    assert ask(predictor, request=3) == 123 and ask(predictor, request=3, cap=100) == 100
    assert Oracle.name == "oracle"


@pytest.mark.parametrize("wrong", [{"q": 1.1}, {"window": 0}, {"prior": -1}, {"samples_min": 0}, {"samples_min": 999}])
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(ConfigError, match=f"policy.predict.{next(iter(wrong))}"):
        TenantQuantile(**wrong)
