"""The control plane against the books of the world around it, under whatever Hypothesis or a seed can think of.

The native and the reference mechanism take every step side by side and must give the same commands and wakeups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sage_core.native_plane import Plane
from sage_core.rng import Streams
from sage_core.units import NEVER
from sage_policies.presets import PRESETS

EVENTS = 100_000
RUNS = 10
NAMES = tuple(PRESETS)

index = st.integers(0, 10**6)


class Rules(RuleBasedStateMachine):
    """Events gather until ``step`` hands them over at once."""

    world_of: ClassVar[Callable[..., Any]]
    plane_of: ClassVar[Callable[..., Plane]]

    @initialize(policy=st.sampled_from(NAMES), pools=st.lists(st.sampled_from(("llm", "embed", "cpu")), max_size=3))
    def begin(self, policy: str, pools: list[str]) -> None:
        make = type(self).plane_of
        self.world = type(self).world_of(make(policy), policy, make(policy, mechanism="reference"))
        for pool in pools:
            self.world.join(pool, tasks_max=2)
        self.world.step()

    def pick(self, among: list[int], number: int) -> int:
        return among[number % len(among)]

    @rule(
        pipeline=st.sampled_from(("chat", "embed", "generate", "rag", "fan", "chat@llm", "embed@cpu")),
        tenant=st.sampled_from(("ada", "bob", "cyd")),
        priority=st.integers(0, 2),
        tokens=st.integers(0, 3000),
        due=st.one_of(st.just(NEVER), st.integers(0, 10**9)),
        many=st.integers(1, 4),
    )
    def arrive(self, pipeline: str, tenant: str, priority: int, tokens: int, due: int, many: int) -> None:
        for _ in range(many):
            self.world.arrive(pipeline, tenant=tenant, priority=priority, input_tokens=tokens, ttft_due_at=due)

    @precondition(lambda self: self.world.requests > 0)
    @rule(number=index)
    def cancel(self, number: int) -> None:
        self.world.cancel(number % self.world.requests)

    @precondition(lambda self: self.world.where)
    @rule(number=index, count=st.integers(0, 2))
    def tokens(self, number: int, count: int) -> None:
        self.world.tokens(self.pick([*self.world.where], number), count)

    @precondition(lambda self: self.world.where)
    @rule(number=index, output_tokens=st.integers(0, 40))
    def finish(self, number: int, output_tokens: int) -> None:
        self.world.finish(self.pick([*self.world.where], number), output_tokens)

    @precondition(lambda self: self.world.where)
    @rule(number=index, retryable=st.booleans())
    def fail(self, number: int, retryable: bool) -> None:
        self.world.fail(self.pick([*self.world.where], number), retryable=retryable)

    @precondition(lambda self: self.world.over)
    @rule(number=index, verb=st.sampled_from(("tokens", "finish", "fail")))
    def late_news(self, number: int, verb: str) -> None:
        getattr(self.world, verb)(self.pick(self.world.over, number))

    @rule(pool=st.sampled_from(("llm", "embed", "cpu")), device=st.integers(0, 2), tasks_max=st.integers(1, 4))
    def join(self, pool: str, device: int, tasks_max: int) -> None:
        self.world.join(pool, device=device, tasks_max=tasks_max, fixed_ns=1e6, input_token_ns=1e3 * (1 + device))

    @precondition(lambda self: self.world.on)
    @rule(number=index)
    def drain(self, number: int) -> None:
        self.world.drain(self.pick([*self.world.on], number))

    @precondition(lambda self: self.world.on)
    @rule(number=index)
    def leave(self, number: int) -> None:
        self.world.leave(self.pick([*self.world.on], number))

    @precondition(lambda self: self.world.on or self.world.gone)
    @rule(number=index, load=st.integers(0, 50))
    def report(self, number: int, load: int) -> None:
        self.world.report(self.pick([*self.world.on, *self.world.gone], number), load)

    @rule(policy=st.sampled_from(NAMES))
    def switch(self, policy: str) -> None:
        self.world.switch(policy)

    @rule(later=st.sampled_from((0, 1, 1_000, 5_000_000, 10**9)))
    def step(self, later: int) -> None:
        self.world.step(later)

    @invariant()
    def the_mechanism_is_whole(self) -> None:
        self.world.plane.check()
        assert self.world.twin.counts == self.world.plane.counts

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.step()
            self.world.settle()
            self.world.close()


def test_whatever_happens_nothing_is_lost_and_both_mechanisms_agree(
    world: Callable[..., Any], make_plane: Callable[..., Plane]
) -> None:
    class Machine(Rules):
        world_of = staticmethod(world)
        plane_of = staticmethod(make_plane)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


@pytest.mark.parametrize("run", range(RUNS))
def test_a_hundred_thousand_random_events(
    world: Callable[..., Any], make_plane: Callable[..., Plane], run: int
) -> None:
    """10**5 events over the runs; half of the runs end in the middle of things, half when everybody has been served."""
    seed, policy = 2026 + run, NAMES[run % len(NAMES)]
    here = world(make_plane(policy), policy, make_plane(policy, mechanism="reference"))
    try:
        here.wander(Streams(seed).stream("events"), EVENTS // RUNS)
        if run % 2:
            here.settle()
        here.close()
    except BaseException as error:
        error.add_note(f"seed {seed}, policy {policy}, step {here.steps}, {here.events} events given")
        raise
    assert here.events >= EVENTS // RUNS
    # The run met what it was made to meet.
    assert all(here.ends[how] > 50 for how in ("responded", "cancelled", "failed")), here.ends
    assert here.retries > 50
    assert len(here.gone) > 10
    assert here.queued_max > 50
