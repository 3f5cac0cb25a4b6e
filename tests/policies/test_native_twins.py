"""Native twins: every score and limit is the Python part's, bit by bit; and whole runs decide the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core import reference
from sage_core.policy import QueueView, native_twin
from sage_core.units import MILLISECOND, NEVER, SECOND, PoolKind
from sage_policies.affinity import PrefixAffinity, PrefixHome
from sage_policies.headroom import Headroom
from sage_policies.hybrid import HybridLimit, HybridOrder
from sage_policies.limit import EngineLimit, Partition
from sage_policies.order import EarliestDeadline, Fifo, PriorityOrder, ShortestFirst, WeightedSum
from sage_policies.power_of_two import PowerOfTwo
from sage_policies.presets import PRESETS, separate
from sage_policies.qlm import DeadlineGroups
from sage_policies.route import LeastInFlight, LeastOutstandingTokens, PredictedFinish, RoundRobin
from sage_policies.shedding import ShedAtSaturation
from sage_policies.upstream import UpstreamOrder, UpstreamRoute
from sage_policies.vtc import LeastServed
from sage_policies.wait import LeastExpectedWait
from sage_policies.work import ShortestWork

native = pytest.importorskip("sage_core._native", reason="the extension is not built: pip install -e .")

ORDERS = [Fifo(), PriorityOrder(), EarliestDeadline(), HybridOrder()]
ORDERS += [HybridOrder(**{flag: False}) for flag in ("laxity", "classes", "demotion", "starvation", "fairness")]
ORDERS += [HybridOrder(budget_ns=(1, 2, 3), late_margin=0.9, starvation_ns=0, starvation_bypass=0)]
ORDERS += [HybridOrder(fairness_weight=0.3, fairness_cap_ns=7, priority_spacing_ns=123_456_789)]
ORDERS += [
    ShortestWork(),
    ShortestWork(3),
    DeadlineGroups(),
    DeadlineGroups(7_000_003),
    LeastServed(),
    LeastServed(2),
    UpstreamOrder(),
]
ROUTES = [RoundRobin(), LeastInFlight(), LeastOutstandingTokens(), PredictedFinish(), PredictedFinish(0.3)]
ROUTES += [LeastExpectedWait(), PowerOfTwo(), PrefixAffinity(), PrefixAffinity(1.0), Headroom(), Headroom(pack=True)]
ROUTES += [PrefixHome(PredictedFinish()), PrefixHome(LeastInFlight(), 1.0, 10**13)]
ROUTES += [UpstreamRoute(), UpstreamRoute([0, 2]), UpstreamRoute([1], counted=True)]
ADMITS = [
    ShedAtSaturation(),
    ShedAtSaturation(power=1, scale=0.3),
    ShedAtSaturation(3, 2.0, waiting_max=7, kv_fill=0.3),
]
LIMITS = [EngineLimit(), EngineLimit(0.37), EngineLimit(None), HybridLimit()]
LIMITS += [HybridLimit(in_flight_limits=False), HybridLimit(embedding_batches=False)]
LIMITS += [HybridLimit(starvation_ns=0, reserve=0.5)]
LIMITS += [Partition(EngineLimit(), [0, 1], [2]), Partition(HybridLimit(), [2], [0])]
LIMITS += [HybridLimit(reserve=0.33, prefill_depth=0.7, kv_fill=0.123, batch_ns=3_000_000, window_ns=0, margin_ns=0)]

instants = st.integers(0, 10**13)
dues = st.one_of(st.just(NEVER), st.integers(0, 2 * 10**13))
costs = st.one_of(st.just(0.0), st.floats(0.0, 1e9))
task_rows = st.tuples(
    st.integers(0, 2),  # kind
    st.integers(0, 4),  # tenant
    st.integers(0, 3),  # priority
    st.one_of(st.integers(0, 10**11), st.sampled_from([0, 30 * SECOND, 30 * SECOND + 1])),  # age; 30 s: starvation
    dues,
    dues,
    st.integers(0, 10**5),  # input tokens
    st.integers(0, 4000),  # output tokens
)
replica_rows = st.tuples(
    st.integers(0, 3),  # device
    st.integers(1, 64),  # tasks_max
    st.one_of(st.just(0), st.integers(1, 10**5)),
    st.one_of(st.just(0), st.integers(1, 10**6)),
    costs,
    costs,
    costs,
    costs,
)


@st.composite
def states(draw):
    """(now, pool kind, queued, replicas): queued tasks, after others were placed, finished and started."""
    return (
        draw(st.integers(10**11, 10**13)),
        draw(st.sampled_from(PoolKind)),
        draw(st.lists(task_rows, min_size=2, max_size=20)),
        draw(st.lists(replica_rows, min_size=1, max_size=5)),
        draw(st.integers(0, 5)),
    )


def fill(mechanism, state, limit, route):
    """Bring a mechanism to a state in which counters, slowness and tenant service are not all zero."""
    now, kind, queued, pool, rounds = state
    mechanism.add_pool("pool", int(kind))
    for replica, row in enumerate(pool):
        mechanism.join(0, replica, *row)
        mechanism.report(replica, 0, 3 * replica % 5, 2 * replica % 3, 10)
    mechanism.bind(0, Fifo(), route, limit)
    next_task = 0
    for _ in range(rounds):
        for task_kind, tenant, priority, age, ttft, due, inputs, outputs in queued[:3]:
            at, prefix = now - age, next_task % 4
            row = (
                next_task,
                next_task,
                task_kind,
                tenant,
                priority,
                0,
                at,
                at,
                ttft,
                due,
                inputs,
                outputs,
                outputs,
                prefix,
            )
            mechanism.enqueue(at, 0, *row)
            next_task += 1
        for i, (_, task) in enumerate(mechanism.decide(now)):
            if i % 3 == 0:
                mechanism.finished(now + 1000 * i, task, i)
            elif i % 3 == 1:
                mechanism.started(task)
    tasks = []
    for task_kind, tenant, priority, age, ttft, due, inputs, outputs in queued:
        at, prefix = now - age, next_task % 4
        row = (
            next_task,
            next_task,
            task_kind,
            tenant,
            priority,
            0,
            at,
            at,
            ttft,
            due,
            inputs,
            outputs,
            outputs,
            prefix,
        )
        mechanism.enqueue(at, 0, *row)
        tasks.append(next_task)
        next_task += 1
    return now, tasks


def both(state, limit=None, route=None):
    """The same state in the native mechanism and in the reference."""
    limit, route = limit or EngineLimit(), route or LeastInFlight()
    here, there = native.Mechanism(), reference.Mechanism()
    now, tasks = fill(here, state, limit, route)
    assert fill(there, state, limit, route) == (now, tasks)
    return now, tasks, here, there


def assert_same_bits(got, want):
    np.testing.assert_array_equal(np.asarray(got).view(np.int64), np.asarray(want).view(np.int64))


@given(state=states(), order=st.sampled_from(ORDERS))
@settings(max_examples=200, deadline=None)
def test_orders(state, order):
    now, _, here, there = both(state)
    ids, scores = native.order_scores(order.native(), now, here, 0)
    want = order.score(now, there.task_view(0, ids.tolist()))
    assert_same_bits(scores, want)
    assert_same_bits(order.score(now, here.task_view(0, ids.tolist())), want)


@given(state=states(), route=st.sampled_from(ROUTES))
@settings(max_examples=200, deadline=None)
def test_routes(state, route):
    now, tasks, here, there = both(state)
    twin = route.native()
    want = route.score(now, there.task_view(0, tasks), there.replica_view(0))
    got = np.array([native.route_scores(twin, now, here, 0, task) for task in tasks])
    assert_same_bits(got, want)


@given(state=states(), admit=st.sampled_from(ADMITS))
@settings(max_examples=100, deadline=None)
def test_admissions(state, admit):
    now, tasks, here, there = both(state)
    want = admit.score(now, there.task_view(0, tasks), there.replica_view(0))
    assert_same_bits(np.array(admit.native().score(now, here, 0, tasks)), want)


@given(state=states(), limit=st.sampled_from(LIMITS))
@settings(max_examples=200, deadline=None)
def test_limits(state, limit):
    kind = state[1]
    now, tasks, here, there = both(state)
    view = there.task_view(0, tasks)
    everything, _ = native.order_scores(Fifo().native(), now, here, 0)
    queue_view = there.task_view(0, sorted(everything.tolist()))
    queue = QueueView(
        kind,
        len(queue_view),
        int(queue_view.input_tokens.sum()),
        int(there.task_view(0, [view.oldest]).queued_at[0]),
        int(min(queue_view.ttft_due_at.min(), queue_view.due_at.min())),
    )
    want = limit.limit(now, there.replica_view(0), queue)
    columns = (want.tasks_max, want.tasks_max_batch, want.prefill_tokens_max, want.kv_tokens_max, want.hold_until)
    for got, column in zip(native.limits(limit.native(), now, here, 0), columns, strict=True):
        np.testing.assert_array_equal(got, column)


@pytest.mark.parametrize("queued", [1, 2, 3])
@pytest.mark.parametrize(("tasks_max", "batch_tokens_max"), [(2, 1000), (64, 200), (64, 0)])
@pytest.mark.parametrize("due", [NEVER, 8 * MILLISECOND, 8 * MILLISECOND + 1, 8 * MILLISECOND - 1])
def test_embedding_limits_where_a_batch_becomes_full_or_too_late(queued, tasks_max, batch_tokens_max, due):
    """100 tokens a task: 1 ms and 1 ms a task for the batch behind the one that is running."""
    limit, rows = HybridLimit(), []
    for mechanism in (native.Mechanism(), reference.Mechanism()):
        mechanism.add_pool("pool", int(PoolKind.EMBEDDING))
        mechanism.join(0, 0, 0, tasks_max, batch_tokens_max, 0, 1e6, 1e4, 0.0, 0.0)
        mechanism.bind(0, Fifo(), LeastInFlight(), EngineLimit())
        for task in range(1 + queued):
            mechanism.enqueue(0, 0, task, task, 2, 0, 0, 0, 0, 0, NEVER, due, 100, 0, 0, 0)
            if task == 0:
                mechanism.decide(0)
        rows.append(mechanism)
    for now in (0, 6 * MILLISECOND, 7 * MILLISECOND):
        queue = QueueView(PoolKind.EMBEDDING, queued, 100 * queued, 0, due)
        want = limit.limit(now, rows[1].replica_view(0), queue)
        got = native.limits(limit.native(), now, rows[0], 0)
        assert [int(got[2][0]), int(got[4][0])] == [int(want.prefill_tokens_max[0]), int(want.hold_until[0])]


@pytest.mark.parametrize("name", PRESETS)
@given(state=states(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_whole_runs_decide_the_same(name, state, seed):
    """Native mechanism with native parts, native mechanism with Python parts, reference with Python parts."""
    policy = separate(shared_devices=[0, 1, 2, 3]) if name == "separate" else PRESETS[name]()
    parts = (policy.order, policy.route, policy.limit)
    twins = tuple(native_twin(part) for part in parts)
    assert all(twin is not part for twin, part in zip(twins, parts, strict=True)), "every preset part has a twin"
    logs = [
        run(native.Mechanism(), twins, state, seed),
        run(native.Mechanism(), parts, state, seed),
        run(reference.Mechanism(), parts, state, seed),
    ]
    assert logs[0] == logs[1] == logs[2]


def run(mechanism, parts, state, seed):
    """Forty instants of arrivals, first tokens, ends and decisions; what was decided, and when it wants to wake."""
    _, kind, shapes, pool, _ = state
    mechanism.add_pool("pool", int(kind))
    for replica, row in enumerate(pool):
        mechanism.join(0, replica, *row)
    mechanism.bind(0, *parts)
    rng = np.random.default_rng(seed)
    log, flying, now = [], [], 0
    for step in range(40):
        now += int(rng.integers(1, 50)) * MILLISECOND
        for _ in range(int(rng.integers(0, 5))):
            task_kind, tenant, priority, _, ttft, due, inputs, outputs = shapes[int(rng.integers(len(shapes)))]
            task = (step << 20) | int(rng.integers(2**20))
            relative = [NEVER if instant == NEVER else now + instant % (10 * SECOND) for instant in (ttft, due)]
            row = (task, task, task_kind, tenant, priority, 0, now, now, *relative, inputs, outputs, outputs, task % 5)
            mechanism.enqueue(now, 0, *row)
        for task in [task for task in flying if rng.random() < 0.3]:
            if rng.random() < 0.5:
                mechanism.started(task)
            else:
                flying.remove(task)
                mechanism.finished(now, task, int(rng.integers(0, 500)))
        if step % 4 == 0:
            for replica in range(len(pool)):
                mechanism.report(replica, now, int(rng.integers(0, 9)), int(rng.integers(0, 3)), 0)
        decisions = mechanism.decide(now)
        flying += [task for _, task in decisions]
        log.append((now, decisions, mechanism.wakeup_at))
    mechanism.check()
    return log


def test_parts_without_a_twin_stay_python():
    for part in (ShortestFirst(), WeightedSum([Fifo()], [1.0])):
        assert native_twin(part) is part

    class Mine(EngineLimit):
        native = None

    split = Partition(Mine(), [0], [1])
    assert native_twin(split) is split
