"""Who is turned away at the door. No ``Admit`` part at all (``None``) admits everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sage_core.policy import Column, ReplicaView, Scores, TaskView
from sage_core.units import NEVER, SECOND, Nanos
from sage_policies.bounds import require
from sage_policies.route import PredictedFinish


@dataclass(frozen=True, slots=True)
class Feasible:
    """Rejects what would miss its objective even if it were placed at once on the best replica.

    It sees what is in flight, not the plane's queue: with a plain router (no queue in the plane) that is all the
    backlog; elsewhere it sheds only what no order could save. Rejected requests count as offered, so shedding never
    improves attainment by itself. margin_ns: how late the prediction may be before the request is refused.
    """

    margin_ns: int = 0
    retry_after_ns: int = SECOND

    def __post_init__(self) -> None:
        require("admit.margin_ns", self.margin_ns, 0)
        require("admit.retry_after_ns", self.retry_after_ns, 0)

    def score(self, now: Nanos, arrivals: TaskView, replicas: ReplicaView) -> Scores:
        """0 to admit, ``inf`` to reject. Without replicas everything is admitted and waits for one."""
        if not len(replicas):
            return np.zeros(len(arrivals))
        inputs = (replicas.prefill_tokens[None, :] + arrivals.input_tokens[:, None]).astype(np.float64)
        first_ns = ((replicas.fixed_ns + replicas.input_token_ns * inputs) * replicas.slowdown).min(axis=1)
        whole_ns = PredictedFinish(share_penalty=0.0).score(now, arrivals, replicas).min(axis=1)
        missed = _missed(now, arrivals.ttft_due_at, first_ns, self.margin_ns)
        missed |= _missed(now, arrivals.due_at, whole_ns, self.margin_ns)
        return np.where(missed, np.inf, 0.0)


def _missed(now: Nanos, due_at: Column, expected_ns: Scores, margin_ns: int) -> NDArray[np.bool_]:
    return (due_at < NEVER) & ((due_at - now).astype(np.float64) + float(margin_ns) < expected_ns)
