"""How busy replicas, nodes and devices were, from the rows of the tasks: exact to the event.

A replica is busy while it holds a task; a device with an engine is idle while none of its replicas does. Each is measured
over the part of the window in which it was there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sage_bench.metrics.queueing import busy_ns, gaps_ns
from sage_bench.results.manifest import ReplicaFact
from sage_bench.results.reader import Run
from sage_core.units import NEVER, SECOND, PoolKind

PARTS: Final = 20
"""Stretches of equal length of a series over time."""


def device_metrics(run: Run, tasks: pd.DataFrame, start_ns: int, end_ns: int) -> dict[str, float]:
    """``utilisation``, ``utilisation_sd`` (two nodes or more), ``idle_ns``, ``idle_gaps`` and ``idle_gap_ns_max`` of the
    window; empty if no replica was there. tasks: the columns replica, dispatched_ns and ended_ns of ``tasks.parquet``."""
    replicas, on = run.manifest.replicas, _by_replica(tasks)
    alone = _held(on, ([each] for each in replicas), start_ns, end_ns)
    if not alone:
        return {}
    row = {"utilisation": float(np.mean([each.share for each in alone]))}
    nodes = {each.node for each in alone}
    if len(nodes) > 1:
        row["utilisation_sd"] = float(
            np.std([np.mean([each.share for each in alone if each.node == node]) for node in nodes])
        )
    lives: dict[tuple[int, int], list[ReplicaFact]] = {}
    for each in replicas:
        if each.pool_kind != PoolKind.OPERATOR:
            lives.setdefault((each.device, each.joined_ns), []).append(each)
    gaps = [gaps_ns(*held.spans) for held in _held(on, lives.values(), start_ns, end_ns)]
    if gaps:
        row["idle_ns"] = int(sum(each.sum() for each in gaps))
        row["idle_gaps"] = sum(len(each) for each in gaps)
        row["idle_gap_ns_max"] = int(max(each.max(initial=0) for each in gaps))
    return row


def node_series(run: Run, start_ns: int, end_ns: int) -> pd.DataFrame:
    """Utilisation of each node over :data:`PARTS` stretches of the window: columns node, start_s, utilisation (mean over the
    replicas that were there). Empty without ``tasks.parquet``."""
    rows = []
    if run.has("tasks"):
        on = _by_replica(run.frame("tasks", ("replica", "dispatched_ns", "ended_ns")))
        edges = np.linspace(start_ns, end_ns, PARTS + 1).round().astype(np.int64).tolist()
        for start, end in pairwise(edges):
            alone = _held(on, ([each] for each in run.manifest.replicas), start, end)
            for node in sorted({each.node for each in alone}):
                share = float(np.mean([each.share for each in alone if each.node == node]))
                rows.append((node, start / SECOND, share))
    return pd.DataFrame(rows, columns=["node", "start_s", "utilisation"])


class _Held(NamedTuple):
    """The tasks on some replicas of a node, and the stretch they are looked at in."""

    node: str
    spans: tuple[NDArray[np.int64], NDArray[np.int64], int, int]  # began, ended, start, end

    @property
    def share(self) -> float:
        """Of the stretch, with at least one task."""
        return busy_ns(*self.spans) / (self.spans[3] - self.spans[2])


_Spans = tuple[NDArray[np.int64], NDArray[np.int64]]
_NONE: Final[_Spans] = (np.empty(0, np.int64), np.empty(0, np.int64))


def _by_replica(tasks: pd.DataFrame) -> dict[int, _Spans]:
    """When the tasks of each replica began and ended; those still there when the run ended never end."""
    ended = tasks["ended_ns"].fillna(NEVER).astype(np.int64)
    parts = tasks.assign(ended_ns=ended).groupby("replica")
    return {int(str(key)): (rows["dispatched_ns"].to_numpy(), rows["ended_ns"].to_numpy()) for key, rows in parts}


def _held(on: Mapping[int, _Spans], groups: Iterable[Sequence[ReplicaFact]], start_ns: int, end_ns: int) -> list[_Held]:
    """One for each group of replicas (which join and leave together) that was there in the window."""
    found = []
    for group in groups:
        first = group[0]
        start = max(first.joined_ns, start_ns)
        end = end_ns if first.left_ns is None else min(first.left_ns, end_ns)
        if end > start:
            began, ended = zip(*(on.get(each.replica, _NONE) for each in group), strict=True)
            found.append(_Held(first.node, (np.concatenate(began), np.concatenate(ended), start, end)))
    return found
