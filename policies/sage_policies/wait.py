"""How long a replica will be busy with what it has: the estimate behind routes that balance waiting, not counts.

The estimate is QLM's (Patke et al., SoCC'24): tokens ahead over the rate at which a full batch makes them. The prompts
that were not started yet are added at prefill speed. Two simplifications are ours: a batch counts as full, and a prompt
that is already in the cache counts as tokens to be made, because no column tells the two apart. Both exaggerate every
replica of a pool alike, and a route only compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import ReplicaView, Scores, TaskView
from sage_core.units import Nanos


def expected_wait(replicas: ReplicaView) -> Scores:
    """(replicas,) ns until what is in flight is done, plus one per task in flight: it decides where costs are unknown.

    ``(input_token * prefill_tokens + (output_token + output_seq * tasks_max) * kv_tokens / tasks_max) * slowdown
    + in_flight``
    """
    slots = replicas.tasks_max.astype(np.float64)
    prompts = replicas.input_token_ns * replicas.prefill_tokens.astype(np.float64)
    token_ns = (replicas.output_token_ns + replicas.output_seq_ns * slots) / slots
    busy = prompts + token_ns * replicas.kv_tokens.astype(np.float64)
    wait: Scores = busy * replicas.slowdown + replicas.in_flight.astype(np.float64)
    return wait


@dataclass(frozen=True, slots=True)
class LeastExpectedWait:
    """The replica that will be done with its work first."""

    live = True
    load_weight = 0.0

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """``expected_wait``, in every row."""
        return np.tile(expected_wait(replicas), (len(tasks), 1))

    def native(self) -> Any:
        from sage_core import _native

        return _native.LeastExpectedWait()
