"""Shortest predicted work first, weighted by priority or not.

Unweighted it is SPJF, which has the least mean response time of all orders that cannot preempt and know the work
(Smith, *Various optimizers for single-stage production*, 1956); weighted, the same for weighted means (WSPT), the queue
policy ``(1 + priority) / work`` of NVIDIA Dynamo's router (2026). Dynamo counts the prompt tokens that are not cached,
and there a higher priority is more urgent. Here work is the predicted service time, output included, on the pool's
fastest replica; and since our priority 0 is the most urgent, the weight counts the levels below a task. Both starve
long work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import Scores, TaskView
from sage_core.units import Nanos
from sage_policies.bounds import require


@dataclass(frozen=True, slots=True)
class ShortestWork:
    """Least predicted work over weight first. levels: priorities 0 to ``levels - 1`` have weights ``levels`` to 1, and
    any beyond has 1; with one level, priority does not count."""

    levels: int = 1
    static = True

    def __post_init__(self) -> None:
        require("levels", self.levels, 1, 1000)

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """``(input_token * input + output_token * output) / (1 + max(levels - 1 - priority, 0))``, ns."""
        speed = queued.speed
        work = speed.input_token_ns * queued.input_tokens + speed.output_token_ns * queued.output_tokens
        weight = 1.0 + np.maximum(float(self.levels - 1) - queued.priority.astype(np.float64), 0.0)
        score: Scores = work / weight
        return score

    def native(self) -> Any:
        from sage_core import _native

        return _native.ShortestWork(self.levels)
