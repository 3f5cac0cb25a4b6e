"""The hybrid policy of the published upstream system, reimplemented from a description of what it does.

It splits work into LLM and embedding. Embeddings are packed first-fit, per model, into batches of at most 32 texts, and
a batch goes to the engine that is least by (model match, serves embeddings only, embedding load, load). LLM requests go
by priority, then arrival, to the least loaded engine. Loads are those of the last report and are not updated while a
call places requests, so all that is placed in one call goes to the same engine.

In the terms of this core: pools are per model, so the model matches; a task is one text, so first-fit in order of
arrival makes batches of 32 in that order, and since a call knows one load, all batches of a call go the same way (the
core asks again every 256 tasks, which is where counted loads move). What the description does not bound, in flight per
engine, is not bounded here. Kept out, in its favour: it polls every 100 ms, and loses requests when it returns fewer
decisions than it was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sage_core.policy import ReplicaView, Scores, TaskView
from sage_core.units import Nanos, PoolKind
from sage_policies.order import Fifo, PriorityOrder

SPAN: Final = 2.0**26
"""Distance between loads in a packed score; loads are clipped below it."""


@dataclass(frozen=True, slots=True)
class UpstreamOrder:
    """Embeddings by arrival; everything else by priority, then arrival."""

    static = True

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """The score of ``Fifo`` or of ``PriorityOrder``."""
        order = Fifo() if queued.pool_kind == PoolKind.EMBEDDING else PriorityOrder()
        return order.score(now, queued)

    def native(self) -> Any:
        from sage_core import _native

        return _native.UpstreamOrder()


class UpstreamRoute:
    """The least loaded replica as last reported; embeddings prefer devices that serve nothing else.

    shared_devices: devices that host an LLM engine too. counted: loads as the plane counts them when the call begins,
    in place of the last report: how the policy would do if its reports were never stale.
    """

    live = False
    load_weight = 0.0

    def __init__(self, shared_devices: Sequence[int] = (), counted: bool = False) -> None:
        self.shared_devices = tuple(sorted(shared_devices))
        self.counted = counted

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Load; for embeddings shared, load of the replica and load of its device, packed in that order. The device's
        is counted by the core (no report tells it), which favours the policy."""
        load = replicas.in_flight if self.counted else replicas.running + replicas.waiting
        score = load.astype(np.float64)
        if tasks.pool_kind == PoolKind.EMBEDDING:
            shared = np.isin(replicas.device, np.array(self.shared_devices, dtype=np.int64)).astype(np.float64)
            device = np.minimum(replicas.device_in_flight.astype(np.float64), SPAN - 1.0)
            score = (shared * SPAN + np.minimum(score, SPAN - 1.0)) * SPAN + device
        return np.tile(score, (len(tasks), 1))

    def native(self) -> Any:
        from sage_core import _native

        return _native.UpstreamRoute(list(self.shared_devices), self.counted)
