"""Which replica a task goes to.

Every route here is ``live``: it reads the exact columns, in which tasks placed earlier in the same step already count,
so simultaneous tasks do not pile onto the replica that looked best when the step began. Ties go to the replica that
joined first. Capacity is not a route's business: the mechanism offers only open replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import Column, ReplicaView, Scores, TaskView
from sage_core.units import Nanos
from sage_policies.bounds import require


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """The replica whose turn was longest ago."""

    live = True
    load_weight = 0.0

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Number of the last dispatch, in every row."""
        return _same_for_all(tasks, replicas.last_dispatch)

    def native(self) -> Any:
        from sage_core import _native

        return _native.RoundRobin()


@dataclass(frozen=True, slots=True)
class LeastInFlight:
    """The replica with the fewest tasks dispatched and not finished."""

    live = True
    load_weight = 0.0

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Tasks in flight, in every row."""
        return _same_for_all(tasks, replicas.in_flight)

    def native(self) -> Any:
        from sage_core import _native

        return _native.LeastInFlight()


@dataclass(frozen=True, slots=True)
class LeastOutstandingTokens:
    """The replica with the fewest input and predicted output tokens in flight."""

    live = True
    load_weight = 0.0

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Tokens in flight, in every row."""
        return _same_for_all(tasks, replicas.kv_tokens)

    def native(self) -> Any:
        from sage_core import _native

        return _native.LeastOutstandingTokens()


@dataclass(frozen=True, slots=True)
class PredictedFinish:
    """The replica on which the task is expected to finish first, given what is in flight there.

    share_penalty: added fraction of the whole when another replica's work is on the same device (0 = devices are not
    shared, 1 = equal time slicing with one neighbour).
    """

    share_penalty: float = 0.5
    live = True
    load_weight = 0.0

    def __post_init__(self) -> None:
        require("route.share_penalty", self.share_penalty, 0.0)

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Expected residence, ns, plus one per task in flight.

        ``((input_token * prefill_tokens + output * (output_seq * (in_flight + 1))) * slowdown + own) * share + in_flight``
        with ``own = (fixed + input_token * input) + output * output_token``. The slowdown, which is what others did to
        tasks on the replica, counts for the part that others cause: equal replicas differ in it by chance, and on the
        whole residence such a difference would outweigh a queue of prompts. The last term decides between equals and,
        where costs are unknown (zero), makes this the least-in-flight route.
        """
        inputs = tasks.input_tokens.astype(np.float64)[:, None]
        outputs = tasks.output_tokens.astype(np.float64)[:, None]
        batch_ns = replicas.output_seq_ns * (replicas.in_flight + 1).astype(np.float64)
        others = replicas.input_token_ns * replicas.prefill_tokens.astype(np.float64) + outputs * batch_ns
        own = (replicas.fixed_ns + replicas.input_token_ns * inputs) + outputs * replicas.output_token_ns
        shared = replicas.device_in_flight > replicas.in_flight
        share = np.where(shared, 1.0 + self.share_penalty, 1.0)
        total: Scores = (others * replicas.slowdown + own) * share + replicas.in_flight.astype(np.float64)
        return total

    def native(self) -> Any:
        from sage_core import _native

        return _native.PredictedFinish(self.share_penalty)


def _same_for_all(tasks: TaskView, column: Column) -> Scores:
    return np.tile(column.astype(np.float64), (len(tasks), 1))
