"""A tenant never gets more than its allowance, in any window, and never waits longer than it must."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.units import SECOND
from sage_live.gateway.rate import BURST_S, SWEEP_MIN, Limits, RateLimits

_GAPS = st.lists(st.tuples(st.integers(0, 8 * SECOND), st.integers(1, 400)), min_size=1, max_size=40)


def _allowed(requests: int | None, tokens: int | None, gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    rates, now, allowed = RateLimits(Limits(requests, tokens)), 10**15, []
    for gap, size in gaps:
        now += gap
        if rates.take("t", now, size) == 0:
            allowed.append((now, size))
    return allowed


@given(st.integers(1, 600), _GAPS)
def test_never_more_requests_than_the_allowance_in_any_window(per_minute: int, gaps: list[tuple[int, int]]) -> None:
    allowed = [at for at, _ in _allowed(per_minute, None, gaps)]
    burst = max(BURST_S * per_minute / 60, 1)
    for i, start in enumerate(allowed):
        for j, end in enumerate(allowed[i:], 1):
            assert j <= burst + (end - start) * per_minute / (60 * SECOND)


@given(st.integers(1, 60_000), _GAPS)
def test_never_more_tokens_than_the_allowance_in_any_window(per_minute: int, gaps: list[tuple[int, int]]) -> None:
    allowed = _allowed(None, per_minute, gaps)
    largest = max((size for _, size in allowed), default=0)
    for i, (start, _) in enumerate(allowed):
        tokens = 0
        for end, size in allowed[i:]:
            tokens += size
            window = (end - start) * per_minute / (60 * SECOND)
            assert tokens <= max(BURST_S * per_minute / 60, 1, largest) + window


@given(st.integers(1, 600), st.integers(1, 60_000), _GAPS)
def test_who_waits_as_told_gets_in_and_not_a_moment_earlier(
    requests: int, tokens: int, gaps: list[tuple[int, int]]
) -> None:
    rates, now = RateLimits(Limits(requests, tokens)), 0
    for gap, size in gaps:
        now += gap
        wait = rates.take("t", now, size)
        if wait:
            assert rates.take("t", now + wait - 1, size) == 1
            assert rates.take("t", now + wait, size) == 0
            now += wait


def test_the_whole_rate_is_usable() -> None:
    rates, admitted = RateLimits(Limits(requests_per_minute=60)), 0
    for second in range(600):
        admitted += rates.take("t", second * SECOND, 1) == 0
    assert admitted == 600


def test_a_refused_request_costs_nothing_in_either_bucket() -> None:
    rates = RateLimits(Limits(requests_per_minute=6, tokens_per_minute=600))
    assert rates.take("t", 0, 100) == 0
    assert rates.take("t", 0, 100) == 10 * SECOND
    assert rates.take("t", 10 * SECOND, 100) == 0


def test_a_request_larger_than_the_burst_passes_an_empty_bucket_and_is_paid_for_afterwards() -> None:
    rates = RateLimits(Limits(tokens_per_minute=60))
    assert rates.take("t", 0, 3000) == 0
    assert rates.take("t", SECOND, 1) == (3000 - 1) * SECOND - BURST_S * SECOND + SECOND
    assert rates.take("t", 3000 * SECOND, 3000) == 0


def test_tenants_are_apart_and_overrides_are_obeyed_when_they_change() -> None:
    overrides = {"big": Limits()}
    rates = RateLimits(Limits(requests_per_minute=1), overrides)
    assert [rates.take("a", 0, 1) > 0 for _ in range(2)] == [False, True]
    assert rates.take("b", 0, 1) == 0
    assert all(rates.take("big", 0, 1) == 0 for _ in range(100))
    overrides["big"] = Limits(requests_per_minute=1)
    assert [rates.take("big", 0, 1) > 0 for _ in range(2)] == [False, True]


def test_tenants_out_of_debt_are_forgotten_and_the_others_are_not() -> None:
    rates = RateLimits(Limits(requests_per_minute=60))
    for n in range(5 * SWEEP_MIN):  # each owes for a second; ten newcomers a second
        assert rates.take(f"tenant {n}", n * SECOND // 10, 1) == 0
    assert len(rates) <= SWEEP_MIN + 10

    rates = RateLimits(Limits(requests_per_minute=1))
    assert rates.take("owes", 0, 1) == 0
    for n in range(3 * SWEEP_MIN):
        rates.take(f"tenant {n}", 1, 1)
    assert rates.take("owes", 2, 1) > 0


@pytest.mark.parametrize("value", [0, -1, 10**13])
def test_a_limit_that_cannot_be_is_the_users_error(value: int) -> None:
    with pytest.raises(ConfigError, match="tokens_per_minute"):
        Limits(tokens_per_minute=value)
