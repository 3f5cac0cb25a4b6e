"""The reimplemented upstream policy: what its description says it does, herd and all."""

from __future__ import annotations

import pytest

from sage_core.reference import Mechanism
from sage_core.units import NEVER, PoolKind
from sage_policies.presets import upstream_hybrid
from sage_policies.upstream import UpstreamOrder, UpstreamRoute


def ranks(scores):
    return scores.argsort(kind="stable").tolist()


def test_llm_requests_go_by_priority_then_arrival_and_embeddings_by_arrival(tasks):
    columns = {"priority": [1, 0, 0], "arrived_at": [1, 3, 2]}
    assert ranks(UpstreamOrder().score(9, tasks(**columns))) == [2, 1, 0]
    assert ranks(UpstreamOrder().score(9, tasks(pool_kind=PoolKind.EMBEDDING, **columns))) == [0, 2, 1]


def test_llm_requests_go_to_the_least_loaded_by_the_last_report(tasks, replicas):
    view = replicas(running=[3, 2, 0], waiting=[0, 0, 4], in_flight=[0, 9, 9])
    assert UpstreamRoute().score(0, tasks(1), view).argmin() == 1
    assert UpstreamRoute(counted=True).score(0, tasks(1), view).argmin() == 0


@pytest.mark.parametrize(
    ("columns", "best"),
    [
        ({}, 1),  # 0 is shared
        ({"running": [0, 50, 0]}, 2),  # embedding load before load
        ({"running": [0, 5, 5], "device_in_flight": [0, 9, 8]}, 2),  # then load
        ({"running": [0, 10**9, 10**9], "device_in_flight": [0, 10**9, 10**9]}, 1),  # however high, shared comes last
    ],
)
def test_a_batch_of_texts_minimises_shared_then_embedding_load_then_load(tasks, replicas, columns, best):
    texts = tasks(1, pool_kind=PoolKind.EMBEDDING)
    assert UpstreamRoute(shared_devices=[0]).score(0, texts, replicas(3, **columns)).argmin() == best


@pytest.mark.parametrize("counted", [False, True])
def test_one_call_sends_everything_to_one_engine_past_its_capacity(counted):
    """No load is updated inside a call: the defect that in-call accounting exists to avoid."""
    policy = upstream_hybrid(counted=counted)
    mechanism = Mechanism()
    mechanism.add_pool("llm", PoolKind.LLM)
    for replica in range(8):
        mechanism.join(0, replica, replica, 4, 2048, 0, 1e6, 1e5, 2e7, 1e5)
    mechanism.bind(0, policy.order, policy.route, policy.limit)
    for replica in range(8):
        mechanism.report(replica, 0, 1 if replica != 5 else 0, 0, 0)

    def send(tasks):
        for task in tasks:
            mechanism.enqueue(0, 0, task, task, 0, 0, 0, 0, 0, 0, NEVER, NEVER, 100, 100, 100, 0)
        return {replica for replica, _ in mechanism.decide(0)}

    first = 0 if counted else 5
    assert send(range(100)) == {first}
    assert mechanism.queued() == 0
    assert send(range(100, 200)) == ({1} if counted else {5}), "a report that does not come changes nothing"
