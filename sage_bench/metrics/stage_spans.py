"""Where the time of requests went, stage by stage, along the path that was taken.

A request is done when its last task is. What that task waited for is the task that ended when it was queued, and so on back to
the arrival: stages beside that path (a branch of a fan-out that was done earlier) cost the request nothing and are not on it.
Tries that failed are on it. Each task on the path has two spans::

    queue    queued in the plane -> dispatched
    service  dispatched -> its end known to the plane: network, the engine's own queue, and the work

Instants between tasks that neither covers (arrival -> first task queued, one task ended -> next queued, last task ended -> request
answered) are the gaps: network and control. Spans and gaps are the request's latency to the nanosecond; how much of it the spans
alone explain is :attr:`StageSpans.unexplained`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sage_bench.results.reader import Run
from sage_core.declared import DeclarationError, declared
from sage_core.errors import DataError

_TASKS: Final = (
    *(
        "request",
        "stage",
        "op",
        "pool",
        "attempt",
        "queued_ns",
        "dispatched_ns",
        "ended_ns",
        "output_tokens",
        "outcome",
    ),
)
_REQUESTS: Final = ("request", "pipeline", "outcome", "warmup", "scheduled_ns", "ended_ns", "e2e_ns")

TABLE: Final = ("pipeline", "stage", "name", "op", "pool", "requests", "queue_ns", "service_ns", "share")


class StageSpans(NamedTuple):
    """Of the counted requests that were answered.

    spans: a row for each task on a path, in order of time: request, pipeline, stage, name, op, pool, attempt, queue_ns,
    service_ns, gap_ns (before it). totals: a row for each request: request, pipeline, e2e_ns, spans_ns (queue and service), gaps_ns.
    """

    spans: pd.DataFrame
    totals: pd.DataFrame

    @property
    def unexplained(self) -> float:
        """Largest share of a request's latency that lies in gaps; 0 where there are no requests."""
        latency = self.totals["e2e_ns"].to_numpy(np.float64)
        gaps = self.totals["gaps_ns"].to_numpy(np.float64)
        return float(np.max(np.abs(gaps) / np.maximum(latency, 1.0), initial=0.0))

    def table(self) -> pd.DataFrame:
        """Columns :data:`TABLE`, a row a stage: on the path of how many requests, mean spans of those, and its share of the
        latency of all requests of its pipeline. The last row of a pipeline, stage -1, is its gaps."""
        rows = []
        for pipeline, of in self.totals.groupby("pipeline", observed=True, sort=True):
            latency = float(of["e2e_ns"].sum()) or 1.0
            mine = self.spans[self.spans["pipeline"] == pipeline]
            for stage, part in mine.groupby("stage", sort=True):
                first, on = part.iloc[0], part["request"].nunique()
                queue, service = float(part["queue_ns"].sum()), float(part["service_ns"].sum())
                share = (queue + service) / latency
                rows.append(
                    (pipeline, stage, first["name"], first["op"], first["pool"], on, queue / on, service / on, share)
                )
            gaps = float(of["gaps_ns"].sum())
            rows.append((pipeline, -1, "gaps", "", "", len(of), 0.0, gaps / len(of), gaps / latency))
        return pd.DataFrame(rows, columns=list(TABLE))


def stage_spans(run: Run) -> StageSpans:
    """The spans of ``run``, simulated or live. Raises :class:`DataError` where it recorded no tasks."""
    if not run.has("tasks"):
        raise DataError(f"{run.folder}: has no tasks.parquet, from which spans are made; run it with record.tasks=true")
    requests = run.frame("requests", _REQUESTS)
    requests = requests[~requests["warmup"] & (requests["outcome"] == "responded")]
    tasks = run.frame("tasks", _TASKS)
    tasks = tasks[tasks["request"].isin(requests["request"]) & tasks["ended_ns"].notna()]
    tasks = tasks.sort_values(["request", "ended_ns", "stage", "attempt"], kind="stable")
    columns = {
        name: tasks[name].to_numpy(np.int64) for name in ("request", "stage", "attempt", "queued_ns", "dispatched_ns")
    }
    ended = tasks["ended_ns"].to_numpy(np.int64)
    first = np.searchsorted(columns["request"], requests["request"].to_numpy(), "left")
    after = np.searchsorted(columns["request"], requests["request"].to_numpy(), "right")
    rows: list[int] = []
    owners: list[int] = []
    gaps: list[int] = []
    totals = []
    facts = zip(*(requests[name].to_numpy(np.int64) for name in ("scheduled_ns", "ended_ns", "e2e_ns")), strict=True)
    for i, (scheduled, answered, e2e) in enumerate(facts):
        path = _path(
            range(first[i], after[i]), columns["queued_ns"], ended, columns["stage"], columns["attempt"], answered
        )
        before = [scheduled, *ended[path[:-1]].tolist()]
        gap = [int(columns["queued_ns"][at]) - int(end) for at, end in zip(path, before, strict=True)]
        spans = sum(int(ended[at]) - int(columns["queued_ns"][at]) for at in path)
        rows += path
        owners += [i] * len(path)
        gaps += gap
        totals.append((spans, int(e2e) - spans))
    pipeline = requests["pipeline"].astype(str).to_numpy()
    found = pd.DataFrame(
        {
            "request": columns["request"][rows],
            "pipeline": pipeline[owners],
            "stage": columns["stage"][rows],
            "name": "",
            "op": tasks["op"].astype(str).to_numpy()[rows],
            "pool": tasks["pool"].astype(str).to_numpy()[rows],
            "attempt": columns["attempt"][rows],
            "queue_ns": columns["dispatched_ns"][rows] - columns["queued_ns"][rows],
            "service_ns": ended[rows] - columns["dispatched_ns"][rows],
            "gap_ns": np.array(gaps, np.int64),
        }
    )
    names = _names(run)
    found["name"] = [
        names.get((of, stage), op) for of, stage, op in zip(found["pipeline"], found["stage"], found["op"], strict=True)
    ]
    spans_ns, gaps_ns = (np.array([each[k] for each in totals], np.int64) for k in (0, 1))
    ids = {
        "request": requests["request"].to_numpy(),
        "pipeline": pipeline,
        "e2e_ns": requests["e2e_ns"].to_numpy(np.int64),
    }
    return StageSpans(found, pd.DataFrame({**ids, "spans_ns": spans_ns, "gaps_ns": gaps_ns}))


def stage_means(runs: Sequence[Run]) -> pd.DataFrame:
    """The mean of the tables of several runs, a row a stage; empty if none went through a declared pipeline."""
    tables = [stage_spans(run).table() for run in runs if _declares(run) and run.has("tasks")]
    if not tables:
        return pd.DataFrame(columns=list(TABLE))
    every = pd.concat(tables, ignore_index=True)
    keys, values = list(TABLE[:5]), list(TABLE[5:])
    means: pd.DataFrame = every.groupby(keys, sort=False, as_index=False)[values].mean()
    return means


def _declares(run: Run) -> bool:
    return bool(dict(run.manifest.config.get("pipeline") or {}).get("stages"))


def _path(
    rows: Sequence[int],
    queued: NDArray[np.int64],
    ended: NDArray[np.int64],
    stage: NDArray[np.int64],
    attempt: NDArray[np.int64],
    answered: int,
) -> list[int]:
    """Of the rows of one request, by end: those on the path, in order of time."""
    path: list[int] = []
    at = next((row for row in reversed(rows) if ended[row] <= answered), None)
    while at is not None:
        path.append(at)
        later = (int(stage[at]), int(attempt[at]))
        at = next(
            (r for r in reversed(rows) if ended[r] <= queued[at] and (int(stage[r]), int(attempt[r])) < later),
            None,
        )
    return path[::-1]


def _names(run: Run) -> dict[tuple[str, int], str]:
    """Names of the stages of the pipeline that the run's configuration declares, by (pipeline, stage)."""
    plain = run.manifest.config.get("pipeline")
    try:
        pipeline = declared(plain).pipeline
    except DeclarationError:  # single requests, or a pipeline declared by another version
        return {}
    return {(pipeline.name, stage.index): stage.name for stage in pipeline.stages}
