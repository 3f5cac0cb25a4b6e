"""How much each replica may hold: the engine's own concurrency, a multiple of it, or no limit at all.

What a limit keeps back waits in the plane's queue, where it can still be ordered; what it lets through waits in the
engine, first come first served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import Column, Limits, QueueView, ReplicaView
from sage_core.units import NEVER, Nanos
from sage_policies.bounds import require


@dataclass(frozen=True, slots=True)
class EngineLimit:
    """``factor`` times the engine's concurrency (at least one task); ``None`` makes the plane a plain router."""

    factor: float | None = 1.0

    def __post_init__(self) -> None:
        if self.factor is not None:
            require("limit_factor", self.factor, 0.0, 1e6)

    def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
        """``max(1, floor(tasks_max * factor))`` tasks of any priority; tokens unlimited; nothing held."""
        open_end = unlimited(len(replicas))
        tasks = open_end if self.factor is None else share_of(replicas.tasks_max, self.factor)
        return Limits(tasks, tasks, open_end, open_end, np.zeros(len(replicas), dtype=np.int64))

    def native(self) -> Any:
        from sage_core import _native

        return _native.EngineLimit(self.factor)


def unlimited(replicas: int) -> Column:
    """A column no count reaches."""
    return np.full(replicas, NEVER, dtype=np.int64)


def share_of(column: Column, factor: float) -> Column:
    """``max(1, floor(column * factor))``, at most 2**62 so that it fits whatever the column says."""
    scaled = np.floor(column.astype(np.float64) * factor)
    share: Column = np.minimum(np.maximum(scaled, 1.0), 2.0**62).astype(np.int64)
    return share
