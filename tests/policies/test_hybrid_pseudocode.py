"""docs/hybrid.md is executable: its code blocks, run one row at a time, equal the implementation to the bit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.units import NEVER, PoolKind
from sage_policies.affinity import PrefixHome
from sage_policies.hashing import draws
from sage_policies.hybrid import FIXED_TIMES, TOKENS_MAX, HybridLimit, HybridOrder
from sage_policies.presets import hybrid
from sage_policies.route import PredictedFinish
from sage_policies.rowwise import rows

DOC = Path(__file__).parents[2] / "docs" / "hybrid.md"
FLAGS = ("laxity", "shortest", "classes", "demotion", "starvation", "fairness")
REPLICA_COLUMNS = (
    *("replica", "in_flight", "device_in_flight", "prefill_tokens", "tasks_max", "batch_tokens_max", "kv_tokens_max"),
    *("fixed_ns", "input_token_ns", "output_token_ns", "output_seq_ns", "slowdown"),
)


@pytest.fixture(scope="session")
def doc():
    """The names that the page's blocks define."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5, "laxity, order, limit, route, home"
    names = {
        "INF": math.inf,
        "NEVER": NEVER,
        "LLM": PoolKind.LLM,
        "EMBEDDING": PoolKind.EMBEDDING,
        "ceil": math.ceil,
        "floor": math.floor,
        "FIXED_TIMES": FIXED_TIMES,
        "TOKENS_MAX": TOKENS_MAX,
        "draw": lambda prefix, replica: int(draws(np.array([prefix]), np.array([replica]))[0, 0]),
    }
    exec(compile("\n".join(blocks), str(DOC), "exec"), names)
    return SimpleNamespace(**names)


def replica_rows(view):
    columns = [getattr(view, name).tolist() for name in REPLICA_COLUMNS]
    return [SimpleNamespace(**dict(zip(REPLICA_COLUMNS, row, strict=True))) for row in zip(*columns, strict=True)]


@given(data=st.data())
def test_order(doc, any_tasks, data):
    now, view = data.draw(any_tasks)
    order = HybridOrder(**{flag: data.draw(st.booleans()) for flag in FLAGS})
    queued = rows(view)
    queue = SimpleNamespace(tasks=queued, speed=view.speed, oldest=view.oldest, bypassed=view.bypassed)
    assert order.score(now, view).tolist() == [doc.order_score(now, task, queue, order) for task in queued]


@given(data=st.data())
def test_limit(doc, any_replicas, any_queue, data):
    view, queue = data.draw(any_replicas), data.draw(any_queue)
    now = data.draw(st.integers(0, 10**14))
    flags = {name: data.draw(st.booleans()) for name in ("in_flight_limits", "tpot_limit", "embedding_batches")}
    part = HybridLimit(
        **flags,
        tpot_ns=data.draw(st.one_of(st.just(0), st.integers(1, 10**9))),
        batch_ns=data.draw(st.integers(0, 10**10)),
    )
    got = part.limit(now, view, queue)
    columns = (got.tasks_max, got.tasks_max_batch, got.prefill_tokens_max, got.kv_tokens_max, got.hold_until)
    want = [doc.limit(now, replica, queue, part) for replica in replica_rows(view)]
    assert [tuple(row) for row in zip(*(column.tolist() for column in columns), strict=True)] == want


@given(data=st.data())
def test_route(doc, any_tasks, any_replicas, data):
    now, view = data.draw(any_tasks)
    pool = data.draw(any_replicas)
    route = PredictedFinish(data.draw(st.floats(0.0, 2.0)))
    homes = PrefixHome(route, data.draw(st.floats(1.0, 3.0)), data.draw(st.integers(0, 10**14)))
    replicas = replica_rows(pool)
    want = [[doc.route_score(task, replica, route) for replica in replicas] for task in rows(view)]
    assert route.score(now, view, pool).tolist() == want
    if view.pool_kind == PoolKind.LLM:
        want = [doc.homed_score(now, task, replicas, of, homes) for of, task in zip(want, rows(view), strict=True)]
    assert homes.score(now, view, pool).tolist() == want


def test_the_table_of_switches_lists_every_boolean_of_the_preset():
    listed = re.findall(r"^\| `(\w+)` \|", DOC.read_text(), flags=re.MULTILINE)
    switches = [name for name, kind in hybrid.__annotations__.items() if kind == "bool"]
    assert listed == switches
