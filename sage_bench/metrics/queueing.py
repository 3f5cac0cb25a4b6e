"""What the rows say about queues and servers, exact to the event: depth, blocking, utilisation.

All functions take columns of equal length in nanoseconds and a window; an interval counts for its part in the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]


def depth(queued_ns: Column, left_ns: Column, start_ns: int, end_ns: int) -> tuple[float, int]:
    """Time average and maximum of the number of intervals ``[queued, left)`` that hold an instant of the window.

    Tasks that leave at the instant they came were never queued. NaN for an empty window.
    """
    if end_ns <= start_ns:
        return math.nan, 0
    came = np.clip(queued_ns, start_ns, end_ns)
    left = np.clip(left_ns, start_ns, end_ns)
    waited = left > came
    if not waited.any():
        return 0.0, 0
    came, left = came[waited], left[waited]
    instants = np.concatenate([came, left])
    change = np.concatenate([np.ones(len(came), np.int64), np.full(len(left), -1, np.int64)])
    # Departures first among the simultaneous: a task that takes a place does not stand beside the one that left it.
    order = np.lexsort((change, instants))
    at = np.cumsum(change[order])
    return float(np.sum(left - came)) / (end_ns - start_ns), int(at.max())


def blocked(queued_ns: Column, dispatched_ns: Column, priority: Column, pool: NDArray[Any]) -> NDArray[np.bool_]:
    """Head-of-line blocking: which tasks were queued while a less urgent task was dispatched from the same pool.

    priority: lower is more urgent. pool: any label. The rule is about order alone; whether the task would have fitted is
    not asked, and tasks dispatched at the same instant do not block each other.
    """

    def rule(queued: Column, dispatched: Column, _: Column, theirs: Column) -> NDArray[np.bool_]:
        theirs = np.sort(theirs)
        return np.searchsorted(theirs, queued, "left") < np.searchsorted(theirs, dispatched, "left")

    return _by_urgency(rule, queued_ns, dispatched_ns, priority, pool)


def overtaken(queued_ns: Column, dispatched_ns: Column, priority: Column, pool: NDArray[Any]) -> NDArray[np.bool_]:
    """Of the :func:`blocked`, the tasks whose less urgent task had been queued after them: FIFO never does that."""

    def rule(queued: Column, dispatched: Column, came: Column, theirs: Column) -> NDArray[np.bool_]:
        order = np.argsort(came, kind="stable")
        # Earliest dispatch among this and all later ones of the less urgent; after the last there is none.
        earliest = np.append(np.minimum.accumulate(theirs[order][::-1])[::-1], np.iinfo(np.int64).max)
        return earliest[np.searchsorted(came[order], queued, "right")] < dispatched

    return _by_urgency(rule, queued_ns, dispatched_ns, priority, pool)


def busy_ns(began_ns: Column, ended_ns: Column, start_ns: int, end_ns: int) -> int:
    """Length of the union of the intervals ``[began, ended)`` within the window."""
    return max(end_ns - start_ns, 0) - int(gaps_ns(began_ns, ended_ns, start_ns, end_ns).sum())


def gaps_ns(began_ns: Column, ended_ns: Column, start_ns: int, end_ns: int) -> Column:
    """Lengths of the stretches of the window that no interval ``[began, ended)`` covers, in order of time."""
    if end_ns <= start_ns:
        return np.empty(0, np.int64)
    began, ended = np.clip(began_ns, start_ns, end_ns), np.clip(ended_ns, start_ns, end_ns)
    order = np.argsort(began, kind="stable")
    order = order[ended[order] > began[order]]  # what takes no time ends no gap
    began, ended = np.append(began[order], end_ns), np.append(start_ns, ended[order])
    length: Column = began - np.maximum.accumulate(ended)
    return length[length > 0]


def _by_urgency(
    rule: Callable[[Column, Column, Column, Column], NDArray[np.bool_]],
    queued_ns: Column,
    dispatched_ns: Column,
    priority: Column,
    pool: NDArray[Any],
) -> NDArray[np.bool_]:
    """``rule`` of (queued, dispatched) of each level of urgency and of (queued, dispatched) of all less urgent tasks."""
    found = np.zeros(len(queued_ns), np.bool_)
    for each in np.unique(pool):
        inside = pool == each
        for level in np.unique(priority[inside])[:-1]:
            mine = np.flatnonzero(inside & (priority == level))
            less = inside & (priority > level)
            found[mine] = rule(queued_ns[mine], dispatched_ns[mine], queued_ns[less], dispatched_ns[less])
    return found
