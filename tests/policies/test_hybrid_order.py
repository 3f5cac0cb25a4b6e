"""The hybrid order: what each ingredient is for, and that its switch removes exactly it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.policy import Speed
from sage_core.units import NEVER, SECOND
from sage_policies.hybrid import TIER_NS, HybridOrder

NOW = 100 * SECOND
SPEED = Speed(0.0, 1e5, 2e7)  # 10k input tokens/s, 50 output tokens/s


@pytest.fixture(scope="session")
def tasks(tasks):
    """As everywhere, but just arrived unless a case says otherwise."""
    return lambda rows=None, **columns: tasks(rows, **{"arrived_at": NOW, **columns})


def ranks(order, view, now=NOW):
    return np.argsort(order.score(now, view), kind="stable").tolist()


def test_least_laxity_is_not_earliest_deadline(tasks):
    # Due later, but with so much more to generate that it must start first.
    view = tasks(due_at=[NOW + 8 * SECOND, NOW + 12 * SECOND], output_tokens=[10, 400], speed=SPEED)
    assert ranks(HybridOrder(), view) == [1, 0]


def test_the_nearer_of_first_token_and_response_counts(tasks):
    view = tasks(
        ttft_due_at=[NOW + 2 * SECOND, NOW + 4 * SECOND],
        due_at=[NOW + 60 * SECOND, NOW + 4 * SECOND],
        output_tokens=[10, 120],
        speed=SPEED,
    )
    assert ranks(HybridOrder(), view) == [1, 0]


def test_work_without_an_objective_ages_toward_its_soft_due_time(tasks):
    view = tasks(
        arrived_at=[NOW - 59 * SECOND, NOW], ttft_due_at=[NEVER, NOW + 10 * SECOND], output_tokens=0, speed=SPEED
    )
    assert ranks(HybridOrder(), view) == [0, 1]
    assert ranks(HybridOrder(budget_ns=(90 * SECOND,) * 3), view) == [1, 0]


def test_budgets_are_per_kind(tasks):
    view = tasks(kind=[0, 1, 2], output_tokens=0, arrived_at=NOW)
    assert ranks(HybridOrder(budget_ns=(30 * SECOND, 20 * SECOND, 10 * SECOND)), view) == [2, 1, 0]


def test_interactive_goes_before_batch_at_equal_laxity_but_not_for_ever(tasks):
    equal = tasks(priority=[1, 0], due_at=NOW + 20 * SECOND)
    assert ranks(HybridOrder(), equal) == [1, 0]
    waited = tasks(priority=[1, 0], due_at=[NOW + 14 * SECOND, NOW + 20 * SECOND])
    assert ranks(HybridOrder(), waited) == [0, 1]


def test_late_work_goes_behind_all_work_that_can_still_be_in_time(tasks):
    view = tasks(due_at=[NOW - SECOND, NOW + 50 * SECOND, NEVER], arrived_at=NOW, priority=[0, 3, 7])
    assert ranks(HybridOrder(), view) == [1, 2, 0]


def test_a_missed_first_token_makes_a_task_late_whatever_its_response_time(tasks):
    view = tasks(ttft_due_at=[NOW - 1, NOW + 50 * SECOND], due_at=NOW + 60 * SECOND)
    assert ranks(HybridOrder(), view) == [1, 0]


def test_late_work_goes_by_class_then_arrival(tasks):
    view = tasks(due_at=1, arrived_at=[30, 20, 10], priority=[0, 0, 1])
    assert ranks(HybridOrder(), view) == [1, 0, 2]


def test_the_margin_demotes_earlier(tasks):
    view = tasks(arrived_at=NOW - 4 * SECOND, due_at=[NOW + 3 * SECOND, NOW + 50 * SECOND], output_tokens=0)
    assert ranks(HybridOrder(late_margin=0.0), view) == [0, 1]
    assert ranks(HybridOrder(late_margin=0.5), view) == [1, 0]


@pytest.mark.parametrize(
    ("queued_at", "bypassed", "first"),
    [(NOW - 31 * SECOND, 32, 0), (NOW - 31 * SECOND, 31, 1), (NOW - 29 * SECOND, 32, 1)],
)
def test_the_oldest_goes_first_when_it_waited_long_and_was_passed_over(tasks, queued_at, bypassed, first):
    view = tasks(due_at=[1, NOW + SECOND], queued_at=[queued_at, NOW], oldest=0, bypassed=bypassed, output_tokens=0)
    assert ranks(HybridOrder(), view)[0] == first


def test_an_overserved_tenant_yields_up_to_the_cap(tasks):
    view = tasks(tenant_service=[30_000, 0], due_at=[NOW + 10 * SECOND, NOW + 12 * SECOND], speed=SPEED)
    order = HybridOrder(fairness_cap_ns=5 * SECOND)
    assert ranks(order, view) == [1, 0], "30k tokens at 1e5 ns are 3 s of laxity"
    assert ranks(replace(order, fairness_cap_ns=SECOND), view) == [0, 1]
    assert ranks(replace(order, fairness_weight=0.5), view) == [0, 1]


def test_only_differences_between_tenants_count(tasks):
    served, more = (tasks(tenant_service=[n, n + 500], due_at=NOW + SECOND, speed=SPEED) for n in (0, 10**9))
    np.testing.assert_array_equal(HybridOrder().score(NOW, served), HybridOrder().score(NOW, more))


def test_of_tasks_due_together_the_one_with_less_work_goes_first(tasks):
    view = tasks(ttft_due_at=NOW + SECOND, input_tokens=[4000, 500], output_tokens=[50, 50], speed=SPEED)
    assert ranks(HybridOrder(), view) == [1, 0]
    assert ranks(HybridOrder(shortest=False), view) == [0, 1], "least laxity starts the longer prompt first"


def test_an_output_token_is_as_much_work_as_two_of_a_prompt(tasks):
    view = tasks(ttft_due_at=NOW + SECOND, input_tokens=100, output_tokens=[60, 50], speed=SPEED)
    more, less = HybridOrder(work_weight=3.0).score(NOW, view)
    assert more - less == 3.0 * SPEED.input_token_ns * 2 * 10


def test_work_is_worth_a_bounded_time_of_laxity(tasks):
    """3,500 tokens more are 1.75 s at this speed and weight: a task due sooner than that goes first, however long it is."""
    soon, later = NOW + SECOND, NOW + SECOND + 1750 * SECOND // 1000
    equal = {"input_tokens": [4000, 500], "output_tokens": 0, "speed": Speed(0.0, 1e5, 0.0)}
    order = HybridOrder(work_weight=6.0)  # one unit of it only undoes that the longer task must start sooner
    assert ranks(order, tasks(ttft_due_at=[soon, later - 1], **equal)) == [1, 0]
    assert ranks(order, tasks(ttft_due_at=[soon, later + 1], **equal)) == [0, 1]


ABLATIONS = {  # the second task goes first because of this ingredient alone
    "laxity": {"due_at": [NOW + 90 * SECOND, NOW + 5 * SECOND], "arrived_at": [NOW - 2, NOW - 1]},
    "shortest": {"input_tokens": [200, 100]},
    "classes": {"priority": [1, 0]},
    "demotion": {"due_at": [1, NOW + 5 * SECOND]},
    "starvation": {"due_at": [NOW + 5 * SECOND, 1], "queued_at": [NOW, 1], "oldest": 1, "bypassed": 33},
    "fairness": {"tenant_service": [9000, 0]},
}


@pytest.mark.parametrize("switch", ABLATIONS)
def test_every_switch_turns_its_ingredient_off_and_on_by_itself(tasks, switch):
    view = tasks(rows=2, output_tokens=0, speed=SPEED, **ABLATIONS[switch])
    assert ranks(HybridOrder(), view) == [1, 0]
    assert ranks(replace(HybridOrder(), **{switch: False}), view) == [0, 1]
    nothing = replace(HybridOrder(), **dict.fromkeys(ABLATIONS, False))
    assert ranks(replace(nothing, **{switch: True}), view) == [1, 0]
    assert ranks(nothing, view) == [0, 1], "arrival and task id"


def test_an_empty_queue_has_no_scores(tasks):
    assert HybridOrder().score(0, tasks(task=[])).shape == (0,)


def test_tiers_never_mix_at_the_extremes(tasks):
    now = 2**50
    order = HybridOrder(fairness_cap_ns=2**50, fairness_weight=1e9)
    view = tasks(
        arrived_at=now,
        due_at=[2**62, 0, NEVER, 0],
        priority=[10**6, -(10**6), -(10**6), 10**6],
        tenant_service=[2**60, 0, 0, 2**60],
        input_tokens=[0, 10**15, 10**9, 10**15],
        output_tokens=0,
        speed=Speed(0.0, 1.0, 0.0),
    )
    furthest_on_time, least_late, soonest_on_time, most_late = order.score(now, view).tolist()
    assert -TIER_NS < soonest_on_time < furthest_on_time < least_late < most_late < 2**53


@given(data=st.data())
def test_scores_are_whole_exact_and_at_most_one_is_starving(any_tasks, data):
    now, view = data.draw(any_tasks)
    flags = {name: data.draw(st.booleans()) for name in ABLATIONS}
    scores = HybridOrder(**flags).score(now, view)
    assert scores.shape == (len(view),) and np.isfinite(scores).all()
    assert (scores == np.floor(scores)).all() and np.abs(scores).max() < 2.0**53, "whole and exact"
    assert (scores == -TIER_NS).sum() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"work_weight": -1.0},
        {"starvation_ns": -1},
        {"fairness_weight": -0.5},
        {"budget_ns": (1, -2, 3)},
        {"late_margin": 1.5},
    ],
)
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(ConfigError, match=f"policy.{next(iter(wrong))}"):
        HybridOrder(**wrong)
