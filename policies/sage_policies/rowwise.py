"""The on-ramp: a policy as the scalar function of a paper's pseudocode.

``rowwise(lambda now, row: row.due_at - now)`` is an order. One Python call a task is slow; it is meant for trying an
idea, and for stating what a vectorised or native order must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sage_core.errors import PolicyError
from sage_core.policy import Order, Scores, Speed, TaskView
from sage_core.units import Nanos, PoolKind


class Row(NamedTuple):
    """One queued task: the columns of ``TaskView``, then the facts that all tasks of the pool share."""

    task: int
    request: int
    kind: int
    tenant: int
    priority: int
    attempt: int
    arrived_at: int
    queued_at: int
    ttft_due_at: int
    due_at: int
    input_tokens: int
    output_tokens_max: int
    output_tokens: int
    prefix: int
    tenant_service: int
    pool: str
    pool_kind: PoolKind
    speed: Speed
    oldest: int
    bypassed: int


COLUMNS = Row._fields[:15]


def rows(view: TaskView) -> list[Row]:
    """The view, one task at a time, as Python integers."""
    columns = (getattr(view, name).tolist() for name in COLUMNS)
    facts = (view.pool, view.pool_kind, view.speed, view.oldest, view.bypassed)
    return [Row._make((*values, *facts)) for values in zip(*columns, strict=True)]


def rowwise(score: Callable[[Nanos, Row], float], *, static: bool = False) -> Order:
    """``score(now, row) -> float`` lifted to an order; lower goes first, ``inf`` means not now.

    static: the score depends on neither ``now`` nor anything that changes while the task is queued.
    """
    return _Rowwise(score, static)


class _Rowwise:
    def __init__(self, score: Callable[[Nanos, Row], float], static: bool) -> None:
        self.name = getattr(score, "__name__", type(score).__name__)
        self.static = static
        self._score = score

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        scores = [self._score(now, row) for row in rows(queued)]
        try:
            return np.array(scores, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise PolicyError(f"order {self.name}: expected one number a task, got {scores[:3]!r}") from error
