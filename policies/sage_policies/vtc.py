"""Fairness between tenants by virtual token counters (Sheng et al., *Fairness in serving large language models*,
OSDI'24).

The tenant that was served least goes next. What was served is the core's ``tenant_service``: input tokens plus twice
the output tokens dispatched, and a tenant that returns is lifted to the least of those waiting, so that nobody collects
credit by being away. As in the paper's variant with predicted lengths, output is charged when a task is dispatched and
as predicted; the correction when it ends is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import Scores, TaskView
from sage_core.units import Nanos
from sage_policies.bounds import require


@dataclass(frozen=True, slots=True)
class LeastServed:
    """The next task of the tenant that was served least, counted task by task although a round may place many.

    depth: up to so many tasks of one tenant a round; what a long queue has behind them shares one score.
    """

    depth: int = 64
    static = False

    def __post_init__(self) -> None:
        require("depth", self.depth, 1)

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """What the tenant will have been served when it is this task's turn: its service, plus the work of its tasks
        with lower ids (``depth`` of them at most). Taking the lowest again and again is VTC, one task at a time."""
        rows = np.lexsort((queued.task, queued.tenant))
        tenant = queued.tenant[rows]
        work = (queued.input_tokens + 2 * queued.output_tokens)[rows]
        before = np.cumsum(work) - work
        first = np.searchsorted(tenant, tenant, side="left")
        counted = np.minimum(np.arange(len(rows)), first + self.depth)
        scores = np.empty(len(rows))
        scores[rows] = (queued.tenant_service[rows] + (before[counted] - before[first])).astype(np.float64)
        return scores

    def native(self) -> Any:
        from sage_core import _native

        return _native.LeastServed(self.depth)
