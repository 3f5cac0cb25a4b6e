"""Probabilistic shedding at saturation, after the ``probabilistic-admitter`` of llm-d's router (2026).

Urgent requests (priority 0) always come in. Others are refused with probability ``min(saturation**power * scale, 1)``:
nothing happens at low load (2 % are refused at a saturation of 0.15) and everything sheddable is refused from 0.32 on.
Saturation is the mean over replicas of the larger of two shares: requests that the engine reports waiting over
``waiting_max``, and KV cache in use over ``kv_fill`` of it. The draw is a hash of the request's id.

Ours: KV in use is counted by the core (input and predicted output in flight, exact) where llm-d scrapes it; a replica
that never reported counts as idle, where llm-d counts it as full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import ReplicaView, Scores, TaskView
from sage_core.units import SECOND, Nanos
from sage_policies.bounds import require
from sage_policies.hashing import uniform


@dataclass(slots=True)
class ShedAtSaturation:
    """Refuses requests of priority above 0 by chance, the more the fuller the engines are.

    power: whole number. scale: of the probability. waiting_max: requests waiting in an engine that count as full.
    kv_fill: fraction of the KV cache that counts as full.
    """

    power: int = 5
    scale: float = 300.0
    waiting_max: int = 5
    kv_fill: float = 0.8
    retry_after_ns: int = SECOND

    def __post_init__(self) -> None:
        require("power", self.power, 1, 100)
        require("scale", self.scale, 0.0, 1e9)
        require("waiting_max", self.waiting_max, 1)
        require("kv_fill", self.kv_fill, 1e-6, 1.0)
        require("admit.retry_after_ns", self.retry_after_ns, 0)

    def score(self, now: Nanos, arrivals: TaskView, replicas: ReplicaView) -> Scores:
        """0 to admit, ``inf`` to reject."""
        if not len(replicas):
            return np.zeros(len(arrivals))
        saturation = power = self.saturation(replicas)
        for _ in range(self.power - 1):  # products and sums one by one: the native twin gives the same bits
            power = power * saturation
        refused = (arrivals.priority > 0) & (uniform(arrivals.request) < power * self.scale)
        return np.where(refused, np.inf, 0.0)

    def saturation(self, replicas: ReplicaView) -> float:
        """0 when idle; 1 when engines are full on average, and it may be more."""
        waiting = replicas.waiting.astype(np.float64) / float(self.waiting_max)
        room = self.kv_fill * np.maximum(replicas.kv_tokens_max, 1).astype(np.float64)
        kv = np.where(replicas.kv_tokens_max > 0, replicas.kv_tokens.astype(np.float64) / room, 0.0)
        return float(np.cumsum(np.maximum(waiting, kv))[-1] / float(len(replicas)))

    def native(self) -> Any:
        from sage_core import _native

        return _native.ShedAtSaturation(self.power, self.scale, self.waiting_max, self.kv_fill, self.retry_after_ns)
