"""Views made from columns, so that a policy part can be tested without a plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from sage_core.policy import QueueView, Speed
from sage_core.units import NEVER, PoolKind

TASK_DEFAULTS = {
    "kind": 0,
    "tenant": 0,
    "priority": 0,
    "attempt": 0,
    "arrived_at": 0,
    "queued_at": 0,
    "ttft_due_at": NEVER,
    "due_at": NEVER,
    "input_tokens": 100,
    "output_tokens_max": 100,
    "output_tokens": 100,
    "prefix": 0,
    "tenant_service": 0,
}
REPLICA_DEFAULTS = {
    "in_flight": 0,
    "device_in_flight": 0,
    "prefill_tokens": 0,
    "kv_tokens": 0,
    "tasks_max": 8,
    "batch_tokens_max": 1000,
    "kv_tokens_max": 0,
    "running": 0,
    "waiting": 0,
    "kv_blocks_free": 0,
    "reported_at": 0,
    "last_dispatch": 0,
}
COST_DEFAULTS = {
    "fixed_ns": 1e6,
    "input_token_ns": 1e4,
    "output_token_ns": 1e7,
    "output_seq_ns": 1e5,
    "slowdown": 1.0,
}


class View:
    """Read-only columns as attributes; a scalar fills its column, ``rows`` says how long when all are scalars."""

    def __init__(self, rows: int, columns: dict[str, Any], dtypes: dict[str, type], **facts: Any) -> None:
        self._rows = rows
        for name, values in columns.items():
            column = np.array(np.broadcast_to(values, rows), dtype=dtypes[name])
            column.flags.writeable = False
            setattr(self, name, column)
        for name, fact in facts.items():
            setattr(self, name, fact)

    def __len__(self) -> int:
        return self._rows


def _rows(columns: dict[str, Any], rows: int | None) -> int:
    lengths = {len(column) for column in columns.values() if np.ndim(column)}
    assert len(lengths) <= 1, f"columns of different lengths: {lengths}"
    return lengths.pop() if lengths else 1 if rows is None else rows


def make_tasks(
    rows: int | None = None,
    *,
    pool_kind: PoolKind = PoolKind.LLM,
    speed: Speed | None = None,
    oldest: int = -1,
    bypassed: int = 0,
    **columns: Any,
) -> Any:
    n = _rows(columns, rows)
    ids = np.arange(n, dtype=np.int64)
    named = {"task": ids, "request": ids, **TASK_DEFAULTS, **columns}
    unknown = named.keys() - {"task", "request", *TASK_DEFAULTS}
    assert not unknown, unknown
    return View(
        n,
        named,
        dict.fromkeys(named, np.int64),
        pool="pool",
        pool_kind=pool_kind,
        speed=Speed(1e6, 1e4, 1e7) if speed is None else speed,
        oldest=oldest,
        bypassed=bypassed,
    )


def make_replicas(rows: int | None = None, **columns: Any) -> Any:
    n = _rows(columns, rows)
    ids = np.arange(n, dtype=np.int64)
    named = {"replica": ids, "device": ids, **REPLICA_DEFAULTS, **COST_DEFAULTS, **columns}
    unknown = named.keys() - {"replica", "device", *REPLICA_DEFAULTS, *COST_DEFAULTS}
    assert not unknown, unknown
    dtypes = {name: np.float64 if name in COST_DEFAULTS else np.int64 for name in named}
    return View(n, named, dtypes)


@pytest.fixture(scope="session")
def tasks() -> Callable[..., Any]:
    """``tasks(rows=None, *, pool_kind, speed, oldest, bypassed, **columns) -> TaskView``."""
    return make_tasks


@pytest.fixture(scope="session")
def replicas() -> Callable[..., Any]:
    """``replicas(rows=None, **columns) -> ReplicaView``."""
    return make_replicas


_instants = st.integers(0, 10**14)
_due = st.one_of(st.just(NEVER), st.integers(0, 2 * 10**14))
_cost = st.one_of(st.just(0.0), st.floats(0.0, 1e9))


@st.composite
def _any_tasks(draw: st.DrawFn, rows_max: int = 6) -> Any:
    """(now, TaskView): anything the plane may show, unknown costs and overdue tasks included."""
    n = draw(st.integers(1, rows_max))
    now = draw(_instants)

    def column(values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=n, max_size=n))

    earlier = st.integers(max(0, now - 10**11), now)
    ids = draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n, unique=True))
    view = make_tasks(
        task=ids,
        request=ids,
        kind=column(st.integers(0, 2)),
        priority=column(st.integers(0, 5)),
        arrived_at=column(earlier),
        queued_at=column(earlier),
        ttft_due_at=column(_due),
        due_at=column(_due),
        input_tokens=column(st.integers(0, 200_000)),
        output_tokens=column(st.integers(0, 10_000)),
        tenant_service=column(st.integers(0, 10**9)),
        pool_kind=draw(st.sampled_from(PoolKind)),
        speed=Speed(draw(_cost), draw(_cost), draw(_cost)),
        oldest=draw(st.sampled_from([*ids, -1])),
        bypassed=draw(st.integers(0, 20)),
    )
    return now, view


@st.composite
def _any_replicas(draw: st.DrawFn, rows_max: int = 5) -> Any:
    """ReplicaView, unknown costs and capacities included."""
    n = draw(st.integers(1, rows_max))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=n, max_size=n))

    in_flight = column(st.integers(0, 40))
    return make_replicas(
        device=column(st.integers(0, 3)),
        in_flight=in_flight,
        device_in_flight=[count + draw(st.integers(0, 3)) for count in in_flight],
        prefill_tokens=column(st.integers(0, 10**6)),
        kv_tokens=column(st.integers(0, 10**7)),
        tasks_max=column(st.integers(1, 300)),
        batch_tokens_max=column(st.one_of(st.just(0), st.integers(1, 10**6))),
        kv_tokens_max=column(st.one_of(st.just(0), st.integers(1, 10**7))),
        last_dispatch=column(st.integers(0, 10**6)),
        fixed_ns=column(_cost),
        input_token_ns=column(_cost),
        output_token_ns=column(_cost),
        output_seq_ns=column(_cost),
        slowdown=column(st.floats(0.125, 8.0)),
    )


@st.composite
def _any_queue(draw: st.DrawFn, pool_kind: PoolKind | None = None) -> QueueView:
    tasks = draw(st.integers(0, 400))
    return QueueView(
        pool_kind=draw(st.sampled_from(PoolKind)) if pool_kind is None else pool_kind,
        tasks=tasks,
        input_tokens=draw(st.integers(0, 10**6)) if tasks else 0,
        oldest_queued_at=draw(_instants) if tasks else NEVER,
        earliest_due_at=draw(_due) if tasks else NEVER,
    )


@pytest.fixture(scope="session")
def any_tasks() -> st.SearchStrategy[Any]:
    """Strategy of (now, TaskView)."""
    return _any_tasks()


@pytest.fixture(scope="session")
def any_replicas() -> st.SearchStrategy[Any]:
    """Strategy of ReplicaView."""
    return _any_replicas()


@pytest.fixture(scope="session")
def any_queue() -> st.SearchStrategy[QueueView]:
    """Strategy of QueueView."""
    return _any_queue()
