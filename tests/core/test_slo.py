"""Objectives: when things are due, and which class a request is in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.slo import Slo, SloTable
from sage_core.units import NEVER, SECOND, RequestKind

CHAT, GENERATE, EMBEDDING = RequestKind


def test_without_an_objective_nothing_is_ever_due() -> None:
    assert (Slo().ttft_due_at(5), Slo().due_at(5, 100)) == (NEVER, NEVER)
    assert Slo(tpot_s=0.1).due_at(5, 100) == NEVER


def test_due_times_count_from_the_scheduled_arrival() -> None:
    slo = Slo(ttft_s=0.5, e2e_s=2.0)
    assert slo.ttft_due_at(3 * SECOND) == 3 * SECOND + SECOND // 2
    assert slo.due_at(3 * SECOND, 1000) == 5 * SECOND


@pytest.mark.parametrize(("cap", "tokens_after_the_first"), [(0, 0), (1, 0), (2, 1), (101, 100)])
def test_without_an_end_to_end_objective_the_due_time_follows_from_the_cap(
    cap: int, tokens_after_the_first: int
) -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.05)
    assert slo.due_at(7, cap) == 7 + SECOND + tokens_after_the_first * SECOND // 20


@given(
    scheduled_at=st.integers(0, 10**15), ttft=st.floats(1e-6, 1e3), tpot=st.floats(1e-6, 10), cap=st.integers(0, 10**5)
)
def test_the_whole_is_never_due_before_its_first_token(scheduled_at: int, ttft: float, tpot: float, cap: int) -> None:
    slo = Slo(ttft_s=ttft, tpot_s=tpot)
    assert scheduled_at <= slo.ttft_due_at(scheduled_at) <= slo.due_at(scheduled_at, cap) < NEVER


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "e2e_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "1", True])
def test_a_threshold_is_seconds_above_0(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"slo\.{name}: expected seconds above 0 or null, got"):
        Slo(**{name: value})


def test_the_more_specific_class_wins() -> None:
    urgent, chat = Slo(ttft_s=0.1), Slo(ttft_s=1.0)
    table = SloTable({"chat": chat, "chat/0": urgent, "generate/2": urgent})
    assert table.of(CHAT, 0) is urgent
    assert table.of(CHAT, 1) is chat
    assert table.of(GENERATE, 2) is urgent
    assert table.of(GENERATE, 0) == Slo()
    assert table.of(EMBEDDING, 0) == Slo()
    assert SloTable().of(CHAT, 0) == Slo()


@pytest.mark.parametrize(
    "key", ["talk", "", "chat/", "chat/urgent", "chat/-1", "chat/1/2", "Chat", "chat/01", "chat/²", "chat/٣"]
)
def test_a_class_that_no_request_is_in_is_an_error(key: str) -> None:
    """Above all one that looks right: an objective that never applies would make every figure better."""
    with pytest.raises(ConfigError, match=r"slo\.classes: unknown class .*; expected <kind> or <kind>/<priority>"):
        SloTable({key: Slo()})


@pytest.mark.parametrize("value", [{"ttft_s": 1.0}, None, 3])
def test_a_class_has_an_slo(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"slo\.classes\.chat: expected a sage_core\.slo\.Slo, got"):
        SloTable({"chat": value})
