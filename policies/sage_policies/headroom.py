"""Routing by predicted latency against the objective, as llm-d's latency scorer does it (llm-d router, 2026).

Each replica's first-token and response times are predicted for this very task. *Headroom* is what is left of the
tighter objective. Replicas that are predicted to meet the objectives go before those that are not; among those that
miss, the least miss. Among those that meet it, ``pack`` takes the least headroom (llm-d's default: fill one machine,
keep others free for bursts), else the most.

How it differs from ``PredictedFinish``: that takes the least response time and knows no objective. This one takes a
replica that answers later but starts in time over one that starts too late; and with ``pack`` it prefers a loaded
replica that is good enough. Without objectives both take the least response time (here the
slowdown multiplies all of it, there what others cause).

Ours: costs of ``ReplicaJoined`` and the observed slowdown predict, not a model trained online; the nearer objective
decides, not a weighted blend; the best replica is taken, not drawn by weight; nothing is explored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sage_core.policy import Column, ReplicaView, Scores, TaskView
from sage_core.units import NEVER, Nanos

MISSED_NS: Final = 2.0**60
"""Where replicas begin that are predicted to miss; 36 years."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """The replica that is predicted to meet the task's objectives with the most headroom, or the least (``pack``)."""

    pack: bool = False
    live = True
    load_weight = 0.0

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Headroom (``pack``) or its negative, ns; ``MISSED_NS`` plus the miss; the response time without objectives.
        In each case plus one per task in flight, which decides between equals."""
        inputs = (replicas.prefill_tokens[None, :] + tasks.input_tokens[:, None]).astype(np.float64)
        outputs = tasks.output_tokens.astype(np.float64)[:, None]
        token_ns = replicas.output_token_ns + replicas.output_seq_ns * (replicas.in_flight + 1).astype(np.float64)
        prefill = replicas.fixed_ns + replicas.input_token_ns * inputs
        whole = (prefill + outputs * token_ns) * replicas.slowdown
        left = np.minimum(
            _left(now, tasks.ttft_due_at, prefill * replicas.slowdown),
            _left(now, tasks.due_at, whole),
        )
        met = left if self.pack else -left
        score = np.where(left < 0.0, MISSED_NS - left, np.where(left < np.inf, met, whole))
        total: Scores = score + replicas.in_flight.astype(np.float64)
        return total

    def native(self) -> Any:
        from sage_core import _native

        return _native.Headroom(self.pack)


def _left(now: Nanos, due_at: Column, predicted_ns: Scores) -> Scores:
    """(tasks, replicas) ns left at the due time, ``inf`` where nothing is due."""
    left = (due_at - now).astype(np.float64)[:, None] - predicted_ns
    return np.where((due_at < NEVER)[:, None], left, np.inf)
