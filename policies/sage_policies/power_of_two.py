"""Two replicas drawn for each task, and the better of them: nearly the balance of looking at all, without the herd that
follows one stale minimum (Mitzenmacher, *The power of two choices in randomized load balancing*, IEEE TPDS 2001).

The draw is a hash of the task's id: no state, and a replay draws the same. A retry is another task, so it is drawn
anew. Compared is the expected wait, not the queue's length, so that unlike machines compare fairly; that is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sage_core.policy import ReplicaView, Scores, TaskView
from sage_core.units import Nanos
from sage_policies.hashing import mix
from sage_policies.wait import expected_wait


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The replica with less expected wait, of two drawn by the task's id. Meant for a plain router: under a limit, a
    task waits for one of its two."""

    live = True
    load_weight = 0.0

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """The expected wait of the two, ``inf`` elsewhere."""
        count = len(replicas)
        scores = np.full((len(tasks), count), np.inf)
        if not count:
            return scores
        wait = expected_wait(replicas)
        bits = mix(tasks.task)
        first = (bits % np.uint64(count)).astype(np.int64)
        others = np.uint64(max(count - 1, 1))
        second = (first + 1 + (mix(bits) % others).astype(np.int64)) % count
        for drawn in (first, second):
            scores[np.arange(len(tasks)), drawn] = wait[drawn]
        return scores

    def native(self) -> Any:
        from sage_core import _native

        return _native.PowerOfTwo()
