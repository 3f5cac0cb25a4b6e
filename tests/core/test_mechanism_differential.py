"""The native mechanism against its meaning: the same calls must give the same decisions, facts and wakeups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core import _native, reference
from sage_core.errors import IllegalEvent, InvariantViolation, PolicyError
from sage_core.policy import Limits
from sage_core.units import NEVER

# Coarse scores on purpose: ties everywhere, and sometimes 'not now' and 'not here'.


@dataclass
class HashOrder:
    static: bool
    salt: int

    def score(self, now, queued):
        raw = (queued.input_tokens * 7 + queued.priority * 3 + self.salt) % 5
        if not self.static:
            raw = raw + (now // 10) % 3 + queued.tenant_service % 2 + (queued.task == queued.oldest) * queued.bypassed
        return np.where(raw == 4, math.inf, raw.astype(float))


@dataclass
class HashRoute:
    live: bool
    load_weight: float
    salt: int

    def score(self, now, tasks, replicas):
        score = (
            (tasks.input_tokens[:, None] + replicas.replica[None, :] * self.salt) % 3
            + replicas.in_flight[None, :] * 0.1
            + replicas.device_in_flight[None, :] * 0.01
            + replicas.slowdown[None, :]
        )
        return np.where((tasks.task[:, None] + replicas.replica[None, :]) % 7 == 0, math.inf, score)


@dataclass
class HashLimit:
    salt: int

    def limit(self, now, replicas, queue):
        n = len(replicas)
        cap = 1 + (replicas.replica + self.salt + queue.tasks) % 4
        held = np.where((replicas.replica + now // 50 + self.salt) % 5 == 0, now + 17, 0)
        return Limits(
            cap,
            np.maximum(cap - 1, 1),
            np.full(n, 400 + queue.input_tokens % 100),
            np.where(replicas.replica % 2 == 0, 900, NEVER),
            held,
        )


def calls():
    token = st.integers(0, 300)
    pool = st.integers(0, 1)
    return st.lists(
        st.one_of(
            st.tuples(st.just("enqueue"), pool, token, token, st.integers(0, 2), st.integers(0, 3)),
            st.tuples(st.just("join"), pool, st.integers(0, 2), st.floats(0, 1e6), st.floats(0, 1e3)),
            st.tuples(st.just("drain"), st.integers(0, 30)),
            st.tuples(st.just("leave"), st.integers(0, 30)),
            st.tuples(st.just("report"), st.integers(0, 30), st.integers(0, 9)),
            st.tuples(st.just("started"), st.integers(0, 200)),
            st.tuples(st.just("finished"), st.integers(0, 200), token),
            st.tuples(st.just("dropped"), st.integers(0, 200)),
            st.tuples(st.just("withdraw"), st.integers(0, 200)),
            st.tuples(st.just("bind"), st.booleans(), st.booleans(), st.integers(0, 9)),
            st.tuples(st.just("decide"), st.integers(0, 60)),
        ),
        max_size=120,
    )


class Both:
    """Applies each call to both mechanisms and compares everything that can be seen."""

    def __init__(self) -> None:
        self.pair = (_native.Mechanism(), reference.Mechanism())
        self.now = 0
        self.tasks = 0
        self.replicas: list[int] = []
        self.flying: list[int] = []
        for mechanism in self.pair:
            assert mechanism.add_pool("llm", 0) == 0
            assert mechanism.add_pool("embed", 1) == 1
        self.bind(False, True, 1)

    def same(self, call, *args):
        answers = [getattr(mechanism, call)(*args) for mechanism in self.pair]
        assert answers[0] == answers[1], (call, args, answers)
        return answers[0]

    def bind(self, static, live, salt):
        for mechanism in self.pair:
            mechanism.bind(self.now, HashOrder(static, salt), HashRoute(live, 0.5, salt), HashLimit(salt))

    def enqueue(self, pool, tokens, output, priority, tenant):
        due = self.now + tokens * 5
        row = (self.tasks, self.tasks // 2, pool, tenant, priority, 0, self.now - 1, self.now, due, NEVER, tokens, output, output // 2, 0)
        for mechanism in self.pair:
            mechanism.enqueue(self.now, pool, *row)
        self.tasks += 1

    def join(self, pool, device, fixed, per_token):
        replica = len(self.replicas)
        for mechanism in self.pair:
            mechanism.join(pool, replica, device, 8, 512, 4096, fixed, per_token, per_token * 3, per_token / 7)
        self.replicas.append(replica)

    def pick(self, among, index):
        return among[index % len(among)] if among else None

    def drain(self, index):
        if (replica := self.pick(self.replicas, index)) is not None and replica >= 0:
            self.same("drain", replica)

    def leave(self, index):
        if (replica := self.pick(self.replicas, index)) is not None and replica >= 0:
            lost = self.same("leave", replica)
            self.flying = [task for task in self.flying if task not in lost]
            self.replicas[replica] = -1

    def report(self, index, load):
        if (replica := self.pick(self.replicas, index)) is not None and replica >= 0:
            self.same("report", replica, self.now, load, load * 2, load * 3)

    def started(self, index):
        if (task := self.pick(self.flying, index)) is not None:
            self.same("started", task)

    def finished(self, index, output):
        if (task := self.pick(self.flying, index)) is not None:
            self.flying.remove(task)
            self.same("finished", self.now, task, output)

    def dropped(self, index):
        if (task := self.pick(self.flying, index)) is not None:
            self.flying.remove(task)
            self.same("dropped", task)

    def withdraw(self, task):
        self.same("withdraw", task)

    def decide(self, later):
        self.now += later
        self.flying += [task for _, task in self.same("decide", self.now)]
        native, meaning = self.pair
        assert native.wakeup_at == meaning.wakeup_at
        assert (native.queued(), native.in_flight()) == (meaning.queued(), meaning.in_flight())
        for pool in (0, 1):
            a, b = native.replica_view(pool), meaning.replica_view(pool)
            for column in (*reference.REPLICA_COLUMNS, *reference.REPLICA_COSTS):
                # device_in_flight is brought up to date when a round of the pool begins
                if column != "device_in_flight":
                    assert getattr(a, column).tolist() == getattr(b, column).tolist(), column
        for mechanism in self.pair:
            mechanism.check()


@settings(max_examples=300, deadline=None)
@given(calls())
def test_native_decides_what_the_reference_decides(sequence):
    both = Both()
    for name, *args in sequence:
        getattr(both, name)(*args)
    both.decide(1)


def test_canary_another_tie_rule_is_noticed(monkeypatch):
    """If the reference broke ties by the highest id, the comparison above must fail."""
    monkeypatch.setattr(
        reference.Mechanism,
        "_ranked",
        lambda self, now, pool: sorted(pool.queue.values(), key=lambda row: -row.task),
    )
    both = Both()
    both.bind(True, True, 1)
    both.join(0, 0, 1.0, 1.0)
    for _ in range(8):
        both.enqueue(0, 10, 10, 0, 0)
    with pytest.raises(AssertionError):
        both.decide(1)


@pytest.mark.parametrize("make", [_native.Mechanism, reference.Mechanism], ids=["native", "reference"])
class TestErrors:
    def mechanism(self, make, order=None, route=None, limit=None):
        mechanism = make()
        mechanism.add_pool("llm", 0)
        mechanism.bind(0, order or HashOrder(False, 1), route or HashRoute(True, 0.0, 1), limit or HashLimit(1))
        mechanism.join(0, 1, 0, 8, 512, 0, 0.0, 0.0, 0.0, 0.0)
        return mechanism

    def row(self, task=0):
        return (task, 0, 0, 0, 0, 0, 0, 0, NEVER, NEVER, 10, 5, 5, 0)

    def test_nan_order_names_the_policy_and_the_task(self, make):
        class Broken:
            static = False

            def score(self, now, queued):
                return np.full(len(queued), math.nan)

        mechanism = self.mechanism(make, order=Broken())
        mechanism.enqueue(0, 0, *self.row(7))
        with pytest.raises(PolicyError, match=r"order Broken: score of task 7 is NaN at now=3"):
            mechanism.decide(3)

    def test_nan_route_names_task_and_replica(self, make):
        class Broken:
            live, load_weight = True, 0.0

            def score(self, now, tasks, replicas):
                return np.full((len(tasks), len(replicas)), math.nan)

        mechanism = self.mechanism(make, route=Broken())
        mechanism.enqueue(0, 0, *self.row(7))
        with pytest.raises(PolicyError, match=r"route Broken: score of task 7 on replica 1 is NaN at now=3"):
            mechanism.decide(3)

    @pytest.mark.parametrize("answer", [np.zeros(3), "text", None])
    def test_wrong_shape_or_type_names_the_policy(self, make, answer):
        class Broken:
            static = False

            def score(self, now, queued):
                return answer

        mechanism = self.mechanism(make, order=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(PolicyError, match="order Broken: (expected scores of shape|scores must be numbers|score of)"):
            mechanism.decide(0)

    def test_limit_of_the_wrong_length(self, make):
        class Broken:
            def limit(self, now, replicas, queue):
                return Limits(*(np.zeros(2, np.int64) for _ in range(5)))

        mechanism = self.mechanism(make, limit=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(PolicyError, match=r"limit Broken: tasks_max must have one entry a replica, \(1,\); got \(2,\)"):
            mechanism.decide(0)

    def test_what_a_policy_raises_reaches_its_author(self, make):
        class Broken:
            static = False

            def score(self, now, queued):
                raise KeyError("my own mistake")

        mechanism = self.mechanism(make, order=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(KeyError, match="my own mistake"):
            mechanism.decide(0)

    def test_views_are_read_only(self, make):
        class Meddler:
            static = False

            def score(self, now, queued):
                queued.due_at[0] = 0
                return np.zeros(len(queued))

        mechanism = self.mechanism(make, order=Meddler())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(ValueError, match="read-only"):
            mechanism.decide(0)

    def test_a_task_cannot_be_queued_twice(self, make):
        mechanism = self.mechanism(make)
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(InvariantViolation, match="invariant 3"):
            mechanism.enqueue(0, 0, *self.row())

    def test_unknown_subjects(self, make):
        mechanism = self.mechanism(make)
        for call in (
            lambda: mechanism.finished(0, 5, 1),
            lambda: mechanism.started(5),
            lambda: mechanism.dropped(5),
            lambda: mechanism.drain(9),
            lambda: mechanism.leave(9),
            lambda: mechanism.report(9, 0, 0, 0, 0),
            lambda: mechanism.join(0, 1, 0, 8, 512, 0, 0.0, 0.0, 0.0, 0.0),
        ):
            with pytest.raises(IllegalEvent):
                call()
