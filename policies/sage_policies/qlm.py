"""Order by deadline groups, after QLM (Patke et al., *Queue management for SLO-oriented large language model serving*,
SoCC'24).

QLM puts requests of one model and objective into groups, orders the groups in virtual queues (one an instance), serves
each group first come first served, and lets instances pull. What a plane can do of it: the groups (same pool, due
within the same span of time), their order by deadline, the pull (a limit keeps the queue in the plane), and the virtual
queue that will be free first (``wait.LeastExpectedWait``, QLM's waiting-time estimate). Left out: the linear program
that orders groups (by deadline here, which is what it yields when all can be met), eviction of running requests and
model swapping, which need the engine; and a group is not bound to an instance before it is pulled, which favours it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import Scores, TaskView
from sage_core.units import NEVER, SECOND, Nanos
from sage_policies.bounds import require
from sage_policies.order import NO_DUE_NS


@dataclass(frozen=True, slots=True)
class DeadlineGroups:
    """Groups of tasks due within the same ``group_ns``, by due time; first come first served within; those without a
    deadline are the last group."""

    group_ns: int = SECOND
    static = True

    def __post_init__(self) -> None:
        require("group_ns", self.group_ns, 1, 2**50)

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """Where the group begins, ns; equal scores go by task id, which is arrival."""
        due = np.minimum(queued.ttft_due_at, queued.due_at)
        group = np.minimum((due // self.group_ns * self.group_ns).astype(np.float64), NO_DUE_NS - 1.0)
        return np.where(due < NEVER, group, NO_DUE_NS)

    def native(self) -> Any:
        from sage_core import _native

        return _native.DeadlineGroups(self.group_ns)
