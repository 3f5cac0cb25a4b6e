"""The native mechanism against its meaning: the same calls must give the same decisions, facts and wakeups.

Hypothesis finds the small cases; seeded runs reach the states that small cases do not: deep queues, full replicas,
more than one chunk of a route that is not live, and switches and departures in the middle of it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core import _native, reference
from sage_core.errors import IllegalEvent, InvariantViolation, PolicyError
from sage_core.policy import Limits, QueueView, ReplicaView, Scores, TaskView
from sage_core.rng import Streams
from sage_core.units import NEVER, Nanos

# Coarse scores on purpose: ties everywhere, and sometimes 'not now' and 'not here'.


@dataclass
class HashOrder:
    static: bool
    salt: int

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        raw = (queued.input_tokens * 7 + queued.priority * 3 + self.salt) % 5
        if not self.static:
            raw = raw + (now // 10) % 3 + queued.tenant_service % 2 + (queued.task == queued.oldest) * queued.bypassed
        return np.where(raw == 4, math.inf, raw.astype(float))


@dataclass
class HashRoute:
    live: bool
    load_weight: float
    salt: int

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        score = (
            (tasks.input_tokens[:, None] + replicas.replica[None, :] * self.salt) % 3
            + replicas.in_flight[None, :] * 0.1
            + replicas.device_in_flight[None, :] * 0.01
            + replicas.slowdown[None, :]
        )
        return np.where((tasks.task[:, None] + replicas.replica[None, :]) % 7 == 0, math.inf, score)


@dataclass
class HashLimit:
    """``scale``: 1 keeps nearly everything queued; larger ones let replicas fill up."""

    salt: int
    scale: int = 1

    def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
        n = len(replicas)
        cap = self.scale * (1 + (replicas.replica + self.salt + queue.tasks) % 4)
        held = np.where((replicas.replica + now // 50 + self.salt) % 5 == 0, now + 17, 0)
        return Limits(
            cap,
            np.maximum(cap - 1, 1),
            np.full(n, self.scale * (400 + queue.input_tokens % 100)),
            np.where(replicas.replica % 2 == 0, self.scale * 900, NEVER),
            held,
        )


Call = tuple[Any, ...]
Make = Callable[[], Any]


def calls() -> st.SearchStrategy[list[Call]]:
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
            st.tuples(st.just("bind"), st.booleans(), st.booleans(), st.integers(0, 9), st.sampled_from((1, 20))),
            st.tuples(st.just("decide"), st.integers(0, 60)),
        ),
        max_size=120,
    )


class Both:
    """Applies each call to both mechanisms and compares everything that can be seen."""

    def __init__(self) -> None:
        self.pair: tuple[Any, Any] = (_native.Mechanism(), reference.Mechanism())
        self.now = 0
        self.tasks = 0
        self.replicas: list[int] = []
        self.flying: list[int] = []
        self.queued: list[list[int]] = [[], []]
        self.decisions = 0
        self.decisions_max = 0
        for mechanism in self.pair:
            assert mechanism.add_pool("llm", 0) == 0
            assert mechanism.add_pool("embed", 1) == 1
        self.bind(False, True, 1)

    def same(self, call: str, *args: Any) -> Any:
        answers = [getattr(mechanism, call)(*args) for mechanism in self.pair]
        assert answers[0] == answers[1], (call, args, answers)
        return answers[0]

    def bind(self, static: bool, live: bool, salt: int, scale: int = 1) -> None:
        for mechanism in self.pair:
            mechanism.bind(self.now, HashOrder(static, salt), HashRoute(live, 0.5, salt), HashLimit(salt, scale))

    def enqueue(self, pool: int, tokens: int, output: int, priority: int, tenant: int) -> None:
        task, due = self.tasks, self.now + tokens * 5
        sizes = (tokens, output, output // 2, 0)
        row = (task, task // 2, pool, tenant, priority, 0, self.now - 1, self.now, due, NEVER, *sizes)
        for mechanism in self.pair:
            mechanism.enqueue(self.now, pool, *row)
        self.queued[pool].append(task)
        self.tasks += 1

    def join(self, pool: int, device: int, fixed: float, per_token: float) -> None:
        replica = len(self.replicas)
        for mechanism in self.pair:
            mechanism.join(pool, replica, device, 8, 512, 4096, fixed, per_token, per_token * 3, per_token / 7)
        self.replicas.append(replica)

    def pick(self, among: list[int], index: int) -> int | None:
        return among[index % len(among)] if among else None

    def drain(self, index: int) -> None:
        if (replica := self.pick(self.replicas, index)) is not None and replica >= 0:
            self.same("drain", replica)

    def leave(self, index: int) -> None:
        if (replica := self.pick(self.replicas, index)) is not None and replica >= 0:
            lost = self.same("leave", replica)
            self.flying = [task for task in self.flying if task not in lost]
            self.replicas[replica] = -1

    def report(self, index: int, load: int) -> None:
        if (replica := self.pick(self.replicas, index)) is not None and replica >= 0:
            self.same("report", replica, self.now, load, load * 2, load * 3)

    def started(self, index: int) -> None:
        if (task := self.pick(self.flying, index)) is not None:
            self.same("started", task)

    def finished(self, index: int, output: int) -> None:
        if (task := self.pick(self.flying, index)) is not None:
            self.flying.remove(task)
            self.same("finished", self.now, task, output)

    def dropped(self, index: int) -> None:
        if (task := self.pick(self.flying, index)) is not None:
            self.flying.remove(task)
            self.same("dropped", task)

    def withdraw(self, task: int) -> None:
        if self.same("withdraw", task):
            self.queued = [[other for other in pool if other != task] for pool in self.queued]

    def decide(self, later: int) -> None:
        self.now += later
        placed = [task for _, task in self.same("decide", self.now)]
        self.flying += placed
        gone = set(placed)
        self.queued = [[task for task in pool if task not in gone] for pool in self.queued]
        self.decisions += len(placed)
        self.decisions_max = max(self.decisions_max, len(placed))
        self.compare()

    def compare(self) -> None:
        native, meaning = self.pair
        assert native.wakeup_at == meaning.wakeup_at
        assert (native.queued(), native.in_flight()) == (meaning.queued(), meaning.in_flight())
        assert (native.queued(), native.in_flight()) == (sum(map(len, self.queued)), len(self.flying))
        for pool in (0, 1):
            a, b = native.replica_view(pool), meaning.replica_view(pool)
            assert len(a) == len(b)
            for column in (*reference.REPLICA_COLUMNS, *reference.REPLICA_COSTS):
                assert getattr(a, column).tolist() == getattr(b, column).tolist(), column
            tasks = self.queued[pool][::-1]  # rows come in the order asked for
            a, b = native.task_view(pool, tasks), meaning.task_view(pool, tasks)
            assert len(a) == len(b) == len(tasks)
            for column in (*reference.TASK_COLUMNS, "tenant_service"):
                assert getattr(a, column).tolist() == getattr(b, column).tolist(), column
            for fact in ("pool", "pool_kind", "speed", "oldest", "bypassed"):
                assert getattr(a, fact) == getattr(b, fact), fact
        for mechanism in self.pair:
            mechanism.check()


@settings(max_examples=300, deadline=None)
@given(calls())
def test_native_decides_what_the_reference_decides(sequence: list[Call]) -> None:
    both = Both()
    for name, *args in sequence:
        getattr(both, name)(*args)
    both.decide(1)


@pytest.mark.parametrize("live", [True, False], ids=["live", "matrix"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_long_runs_with_deep_queues_and_full_replicas(static: bool, live: bool) -> None:
    """Hundreds of calls a seed: bursts of arrivals against few places, then places for all, with everything between."""
    decisions = deepest = 0
    for seed in range(3):
        random = Streams(seed).stream(f"mechanism.{static}.{live}")
        both = Both()
        both.bind(static, live, seed)
        for pool in (0, 0, 0, 1):
            both.join(pool, int(random.integers(0, 2)), 1e5, 10.0)
        for _ in range(350):
            draw = random.random()
            number = int(random.integers(0, 1000))
            if draw < 0.12:
                for _ in range(int(random.integers(1, 24))):
                    pool, priority, tenant = (int(n) for n in random.integers(0, (2, 3, 4)))
                    tokens, output = (int(n) for n in random.integers(0, 300, 2))
                    both.enqueue(pool, tokens, output, priority, tenant)
            elif draw < 0.55:
                both.finished(number, int(random.integers(0, 300)))
            elif draw < 0.62:
                both.started(number)
            elif draw < 0.65:
                both.dropped(number)
            elif draw < 0.70:
                both.withdraw(number % max(both.tasks, 1))
            elif draw < 0.73:
                both.report(number, number % 10)
            elif draw < 0.75:
                both.join(number % 2, number % 3, float(number), number / 10)
            elif draw < 0.76:
                both.drain(number)
            elif draw < 0.77:
                both.leave(number)
            elif draw < 0.79:
                both.bind(bool(random.random() < 0.5) ^ static, bool(random.random() < 0.5) ^ live, number % 10, 1)
            elif draw < 0.81:
                both.bind(static, live, number % 10, 1 + number % 8)
            else:
                both.decide(number % 60)
            deepest = max(deepest, max(map(len, both.queued)))
        for mechanism in both.pair:  # what is left goes out under a limit that never closes
            mechanism.bind(both.now, HashOrder(static, seed), HashRoute(live, 0.5, seed), HashLimit(seed, 10_000))
        for _ in range(40):
            both.decide(23)
        decisions += both.decisions
    assert decisions > 1_000, decisions
    assert deepest > 50, deepest


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_a_route_that_is_not_live_is_asked_chunk_by_chunk(static: bool) -> None:
    """700 queued tasks and room for all: three chunks in one round, with places running out between them."""
    both = Both()
    random = Streams(11).stream("chunks")
    both.bind(static, False, 3, scale=80)
    for pool in (0, 0, 0, 0, 1):
        both.join(pool, 0, 1e5, 10.0)
    for _ in range(700):
        tokens, output, priority, tenant = (int(n) for n in random.integers(0, (120, 300, 3, 4)))
        both.enqueue(0, tokens, output, priority, tenant)
    both.decide(1)
    assert both.decisions_max > reference.MATRIX_ROWS_MAX, both.decisions_max
    for _ in range(10):
        for index in range(0, 60):
            both.finished(index * 7, index)
        both.bind(not static, False, 4, scale=80)
        both.decide(31)
    assert both.decisions > 2 * reference.MATRIX_ROWS_MAX


@pytest.mark.parametrize("live", [True, False], ids=["live", "matrix"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_decisions_are_in_order_and_within_limits(static: bool, live: bool) -> None:
    """What the two agree on is also right: the total order, and the room that the limit gave."""

    class Count:
        def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
            n = len(replicas)
            open_end = np.full(n, NEVER)
            return Limits(np.full(n, 10), np.full(n, 7), open_end, open_end, np.zeros(n, np.int64))

    class Spread:
        load_weight = 1.0

        def __init__(self) -> None:
            self.live = live

        def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
            return np.tile(replicas.in_flight * (1.0 if live else 0.0), (len(tasks), 1))

    pair: tuple[Any, Any] = (_native.Mechanism(), reference.Mechanism())
    for mechanism in pair:
        mechanism.add_pool("llm", 0)
        order = HashOrder(static, 0)
        mechanism.bind(0, order, Spread(), Count())
        for replica in range(3):
            mechanism.join(0, replica, 0, 8, 512, 0, 0.0, 0.0, 0.0, 0.0)
        urgent = [task for task in range(60) if task % 4 == 0]
        for task in range(60):
            mechanism.enqueue(
                0, 0, task, task, 0, 0, 0 if task in urgent else 1, 0, 0, 0, NEVER, NEVER, 5 * (task % 3), 0, 0, 0
            )
        # Scores depend on input tokens and priority only: 5 * (task % 3) * 7 % 5 == 0, plus 3 for the less urgent.
        decisions = mechanism.decide(0)
        placed = [task for _, task in decisions]
        assert placed == urgent + [task for task in range(60) if task not in urgent][: 21 - len(urgent)]
        assert [sum(r == replica for r, _ in decisions) for replica in range(3)] == [7, 7, 7]
        assert [replica for replica, _ in decisions] == [0, 1, 2] * 7  # ties go to the one that joined first
        mechanism.check()


def test_canary_another_tie_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_canary_a_wrong_column_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reference forgot to lift the service of a tenant that comes back, the views must differ."""
    both = Both()
    both.bind(True, True, 0, 20)
    both.join(0, 0, 1.0, 1.0)
    both.enqueue(0, 10, 40, 0, 0)
    both.decide(1)
    both.enqueue(0, 10, 40, 0, 0)
    both.compare()
    both.pair[1]._pools[0].tenant_service[0] += 1
    with pytest.raises(AssertionError, match="tenant_service"):
        both.compare()


@pytest.mark.parametrize("make", [_native.Mechanism, reference.Mechanism], ids=["native", "reference"])
class TestErrors:
    def mechanism(self, make: Make, order: Any = None, route: Any = None, limit: Any = None) -> Any:
        mechanism = make()
        mechanism.add_pool("llm", 0)
        mechanism.bind(0, order or HashOrder(False, 1), route or HashRoute(True, 0.0, 1), limit or HashLimit(1))
        mechanism.join(0, 1, 0, 8, 512, 0, 0.0, 0.0, 0.0, 0.0)
        return mechanism

    def row(self, task: int = 0) -> tuple[int, ...]:
        return (task, 0, 0, 0, 0, 0, 0, 0, NEVER, NEVER, 10, 5, 5, 0)

    def test_nan_order_names_the_policy_and_the_task(self, make: Make) -> None:
        class Broken:
            static = False

            def score(self, now: Nanos, queued: Any) -> Any:
                return np.full(len(queued), math.nan)

        mechanism = self.mechanism(make, order=Broken())
        mechanism.enqueue(0, 0, *self.row(7))
        with pytest.raises(PolicyError, match=r"order Broken: score of task 7 is NaN at now=3"):
            mechanism.decide(3)

    def test_nan_route_names_task_and_replica(self, make: Make) -> None:
        class Broken:
            live, load_weight = True, 0.0

            def score(self, now: Nanos, tasks: Any, replicas: Any) -> Any:
                return np.full((len(tasks), len(replicas)), math.nan)

        mechanism = self.mechanism(make, route=Broken())
        mechanism.enqueue(0, 0, *self.row(7))
        with pytest.raises(PolicyError, match=r"route Broken: score of task 7 on replica 1 is NaN at now=3"):
            mechanism.decide(3)

    @pytest.mark.parametrize("answer", [np.zeros(3), "text", None])
    def test_wrong_shape_or_type_names_the_policy(self, make: Make, answer: Any) -> None:
        class Broken:
            static = False

            def score(self, now: Nanos, queued: Any) -> Any:
                return answer

        mechanism = self.mechanism(make, order=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(
            PolicyError, match=r"order Broken: (expected scores of shape|scores must be numbers|score of)"
        ):
            mechanism.decide(0)

    def test_limit_of_the_wrong_length(self, make: Make) -> None:
        class Broken:
            def limit(self, now: Nanos, replicas: Any, queue: Any) -> Limits:
                return Limits(*(np.zeros(2, np.int64) for _ in range(5)))

        mechanism = self.mechanism(make, limit=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(
            PolicyError, match=r"limit Broken: tasks_max must have one entry a replica, \(1,\); got \(2,\)"
        ):
            mechanism.decide(0)

    @pytest.mark.parametrize("column", [np.array([np.inf]), np.array([2.5]), ["many"], [None]], ids=str)
    def test_a_limit_that_is_not_whole_numbers(self, make: Make, column: Any) -> None:
        """Infinity would be cast to the most negative number: not 'no limit', but 'nothing at all'."""

        class Broken:
            def limit(self, now: Nanos, replicas: Any, queue: Any) -> Limits:
                most = np.full(1, NEVER)
                return Limits(most, most, most, column, np.zeros(1, np.int64))

        mechanism = self.mechanism(make, limit=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(PolicyError, match="limit Broken: kv_tokens_max must be whole numbers"):
            mechanism.decide(0)

    def test_what_a_policy_raises_reaches_its_author(self, make: Make) -> None:
        class Broken:
            static = False

            def score(self, now: Nanos, queued: Any) -> Any:
                raise KeyError("my own mistake")

        mechanism = self.mechanism(make, order=Broken())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(KeyError, match="my own mistake"):
            mechanism.decide(0)

    def test_views_are_read_only(self, make: Make) -> None:
        class Meddler:
            static = False

            def score(self, now: Nanos, queued: Any) -> Any:
                queued.due_at[0] = 0
                return np.zeros(len(queued))

        mechanism = self.mechanism(make, order=Meddler())
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(ValueError, match="read-only"):
            mechanism.decide(0)

    def test_a_task_cannot_be_queued_twice(self, make: Make) -> None:
        mechanism = self.mechanism(make)
        mechanism.enqueue(0, 0, *self.row())
        with pytest.raises(InvariantViolation, match="invariant 3"):
            mechanism.enqueue(0, 0, *self.row())

    def test_unknown_subjects(self, make: Make) -> None:
        mechanism = self.mechanism(make)
        unknown: tuple[Callable[[], object], ...] = (
            lambda: mechanism.finished(0, 5, 1),
            lambda: mechanism.started(5),
            lambda: mechanism.dropped(5),
            lambda: mechanism.drain(9),
            lambda: mechanism.leave(9),
            lambda: mechanism.report(9, 0, 0, 0, 0),
            lambda: mechanism.join(0, 1, 0, 8, 512, 0, 0.0, 0.0, 0.0, 0.0),
        )
        for call in unknown:
            with pytest.raises(IllegalEvent):
                call()
