"""Virtual token counters: the defining algorithm, one task at a time, and the bound it gives on unfairness."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage_core.reference import Mechanism
from sage_core.units import NEVER, PoolKind
from sage_policies.presets import vtc
from sage_policies.vtc import LeastServed

jobs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500), st.integers(0, 200)), min_size=1, max_size=15)


def one_at_a_time(queue, served):
    """VTC as published: the tenant with the least counter, its oldest task, its counter charged; again."""
    queue, served, order = list(queue), dict(served), []
    while queue:
        heads = {tenant: min(task for task, of, *_ in queue if of == tenant) for _, tenant, *_ in queue}
        tenant = min(heads, key=lambda each: (served[each], heads[each]))
        chosen = next(row for row in queue if row[0] == heads[tenant])
        queue.remove(chosen)
        served[tenant] += chosen[2] + 2 * chosen[3]
        order.append(chosen[0])
    return order


@given(jobs=jobs, served=st.lists(st.integers(0, 2000), min_size=4, max_size=4))
def test_a_round_is_what_vtc_does_task_by_task(tasks, jobs, served):
    queue = [(task, *job) for task, job in enumerate(jobs)]
    view = tasks(
        tenant=[job[0] for job in jobs],
        input_tokens=[job[1] for job in jobs],
        output_tokens=[job[2] for job in jobs],
        tenant_service=[served[job[0]] for job in jobs],
    )
    scores = LeastServed().score(0, view)
    ranked = sorted(range(len(jobs)), key=lambda i: (scores[i], i))
    assert ranked == one_at_a_time(queue, dict(enumerate(served)))


class Server:
    """One engine with one slot, every task done as soon as it is asked for."""

    def __init__(self):
        policy = vtc()
        self.mechanism = Mechanism()
        self.mechanism.add_pool("llm", PoolKind.LLM)
        self.mechanism.join(0, 0, 0, 1, 2048, 0, 1e6, 1e5, 2e7, 1e5)
        self.mechanism.bind(0, policy.order, policy.route, policy.limit)
        self.task = 0

    def queue(self, tenant, tasks, tokens=100):
        for _ in range(tasks):
            row = (self.task, self.task, 0, tenant, 0, 0, 0, 0, NEVER, NEVER, tokens, 50, 50, 0)
            self.mechanism.enqueue(0, 0, *row)
            self.task += 1

    def serve(self, tasks):
        done = []
        for _ in range(tasks):
            ((_, task),) = self.mechanism.decide(0)
            self.mechanism.finished(1, task, 50)
            done.append(task)
        return done


def test_a_flood_of_one_tenant_delays_another_by_no_more_than_its_turn():
    server = Server()
    server.queue(0, 100)
    server.queue(1, 3)
    assert [task for task in server.serve(6) if task >= 100] == [100, 101, 102]


def test_who_asks_for_twice_as_much_at_a_time_gets_half_as_many():
    server = Server()
    server.queue(0, 30, tokens=300)  # 400 with its output
    server.queue(1, 30, tokens=100)  # 200
    served = server.serve(30)
    assert sum(task < 30 for task in served) == 10


@given(data=st.data())
def test_between_backlogged_tenants_service_differs_by_no_more_than_one_task(data):
    """The bound of the paper, for charges at dispatch: whoever is ahead was behind when its last task was chosen."""
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=2, max_size=3))
    server = Server()
    for tenant, size in enumerate(sizes):
        server.queue(tenant, 10, tokens=size)
    work = [size + 2 * 50 for size in sizes]
    served = [0] * len(sizes)
    while max(served[tenant] / work[tenant] for tenant in range(len(sizes))) < 10:  # everybody is still queued
        (task,) = server.serve(1)
        served[task // 10] += work[task // 10]
        assert max(served) - min(served) <= max(work)


def test_a_tenant_that_returns_collects_no_credit_for_being_away():
    server = Server()
    server.queue(0, 100)
    server.serve(50)
    server.queue(1, 50)
    assert sum(task < 100 for task in server.serve(20)) == 10, "they share from now on; tenant 1 is not paid back"
