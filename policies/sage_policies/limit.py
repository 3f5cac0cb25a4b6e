"""How much each replica may hold: the engine's own concurrency, a multiple of it, or no limit at all.

What a limit keeps back waits in the plane's queue, where it can still be ordered; what it lets through waits in the
engine, first come first served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.errors import ConfigError
from sage_core.policy import Column, Limit, Limits, QueueView, ReplicaView, native_twin
from sage_core.units import NEVER, Nanos, PoolKind
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


@dataclass(frozen=True, slots=True)
class Partition:
    """A static split of devices: some serve LLM work only, some embeddings only; ``inner`` limits what they hold.

    Devices in neither part are not restricted, nor are operator pools. The split is kept even when a part has no replica
    left: that is what a static split costs. A limit and not a route: a replica of the other part is closed to every task
    alike, and a queue behind closed replicas need not be looked through.
    """

    inner: Limit
    llm_devices: Sequence[int] = ()
    embedding_devices: Sequence[int] = ()

    def __post_init__(self) -> None:
        both = sorted({*self.llm_devices} & {*self.embedding_devices})
        if both:
            raise ConfigError(f"policy.limit: devices {both} are in both parts; give each to LLM or to embedding")

    def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
        """The inner limits, no task at all on devices of the other part."""
        limits = self.inner.limit(now, replicas, queue)
        if queue.pool_kind == PoolKind.OPERATOR:
            return limits
        others = self.embedding_devices if queue.pool_kind == PoolKind.LLM else self.llm_devices
        closed = np.isin(replicas.device, np.array(others, dtype=np.int64))
        return dataclasses.replace(
            limits,
            tasks_max=np.where(closed, 0, limits.tasks_max),
            tasks_max_batch=np.where(closed, 0, limits.tasks_max_batch),
        )

    def native(self) -> Any:
        from sage_core import _native

        inner = native_twin(self.inner)
        if inner is self.inner:  # it has no twin, so neither has the split around it
            return self
        return _native.Partition(inner, list(self.llm_devices), list(self.embedding_devices))


def unlimited(replicas: int) -> Column:
    """A column no count reaches."""
    return np.full(replicas, NEVER, dtype=np.int64)


def share_of(column: Column, factor: float) -> Column:
    """``max(1, floor(column * factor))``, at most 2**62 so that it fits whatever the column says."""
    scaled = np.floor(column.astype(np.float64) * factor)
    share: Column = np.minimum(np.maximum(scaled, 1.0), 2.0**62).astype(np.int64)
    return share
