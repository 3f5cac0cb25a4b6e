"""A run's requests and engines as a Chrome trace: JSON that Perfetto and ``chrome://tracing`` open.

Format: *Trace Event Format*, JSON object form. Three kinds of tracks:

* process *requests*: a slice a request from scheduled arrival to end, its phases (queued, prefill, decode or service)
  inside it;
* a process for each replica: a slice a task from dispatch to end (where the run kept its tasks), and counters of its reports;
* process *plane*: the number of queued tasks of each pool.

Slices of one thread may not overlap unless one holds the other, so what runs at the same time is spread over *lanes*, the
lowest free one first. Only complete events (``ph: X``), counters (``C``) and names (``M``) are used. Instants are whole
microseconds from the start of the run, cut off: with fractions, the sum of begin and duration of one slice and the begin of
the next would differ in the last bit, and viewers take that for an overlap.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from sage_bench.results.reader import Run
from sage_bench.results.writer import output_error
from sage_core.errors import ConfigError
from sage_core.units import SECOND

REQUESTS: Final = 1
PLANE: Final = 2
REPLICA: Final = 10
"""Process ids; replica ``r`` is ``REPLICA + r``."""

_US: Final = 1000
"""Nanoseconds of a microsecond, the unit of the format."""

_LAST_S: Final = 9e9
"""About what 64 bits of nanoseconds hold, in seconds."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exported:
    """How much of a run went into a trace; the stretch is ``[start_ns, stop_ns)``. tasks: None where the run kept none."""

    requests: int
    tasks: int | None
    events: int
    start_ns: int
    stop_ns: int


def export(run: Run, out: Path, *, requests: int, start_s: float = 0.0, stop_s: float | None = None) -> Exported:
    """Write ``out`` (compressed if it ends in ``.gz``): what began in the stretch, of at most ``requests`` requests.

    Where more are scheduled in it, the stretch ends before the first that is too many; where they are all scheduled at one
    instant, it ends at the next, and the requests beyond ``requests`` are left out. Raises :class:`DataError`,
    :class:`ConfigError` for a stretch with nothing in it, and :class:`OutputError`.
    """
    if requests < 1:
        raise ConfigError(f"--requests: expected 1 or more, got {requests}")
    for name, value in (("--from", start_s), ("--to", stop_s)):
        if value is not None and not abs(value) <= _LAST_S:
            raise ConfigError(f"{name}: expected seconds of the run, up to {_LAST_S:g}, got {value:g}")
    if stop_s is not None and stop_s <= start_s:
        raise ConfigError(f"--to: expected more than --from, {start_s:g}, got {stop_s:g}")
    rows = run.frame("requests").sort_values(["scheduled_ns", "request"], kind="stable")
    start = round(start_s * SECOND)
    stop = math.inf if stop_s is None else round(stop_s * SECOND)
    kept = rows[rows["scheduled_ns"].between(start, stop, inclusive="left")]
    if len(kept) > requests:
        at = kept["scheduled_ns"]
        cut = int(at.iloc[requests])
        if at.iloc[0] < cut:
            kept, stop = kept[at < cut], cut
        else:
            kept, stop = kept.iloc[:requests], min([stop, *at[at > cut].iloc[:1].tolist()])
    if kept.empty:
        last = rows["scheduled_ns"].max() / SECOND if len(rows) else 0.0
        raise ConfigError(
            f"--from, --to, --requests: no request of {run.manifest.run_id} begins there; its last is scheduled at {last:.3f} s"
        )
    end = int(min(stop, max(run.manifest.duration_ns, int(kept["scheduled_ns"].max())) + 1))
    events = list(_requests(kept))
    written: int | None = None
    if run.has("tasks"):
        every = run.frame("tasks")
        tasks = every[every["dispatched_ns"].between(start, end, inclusive="left")]
        events += _tasks(tasks, run.manifest.duration_ns)
        written = len(tasks)
        events += _queued(every, start, end)
    events += _reports(run.frame("replicas"), start, end)
    events += _replicas(run, {event["pid"] for event in events})
    names = [event for event in events if event["ph"] == "M"]
    timed = sorted((event for event in events if event["ph"] != "M"), key=_order)
    document = {
        "displayTimeUnit": "ms",
        "otherData": {"run": run.manifest.run_id, "policy": run.manifest.policy.name, "seed": run.manifest.seed},
        "traceEvents": [*names, *timed],
    }
    _write(out, document)
    return Exported(len(kept), written, len(names) + len(timed), start, end)


def _requests(rows: pd.DataFrame) -> Iterator[Event]:
    yield _named("process_name", REQUESTS, 0, "requests")
    lanes = _Lanes(REQUESTS)
    for row in rows.to_dict("records"):
        began, ended = int(row["scheduled_ns"]), int(row["ended_ns"])
        lane = lanes.take(began, ended)
        about = {
            name: row[name]
            for name in (
                "tenant",
                "priority",
                "pipeline",
                "input_tokens",
                "output_tokens",
                "outcome",
                "reason",
                "node",
                "retries",
                "good",
            )
        }
        yield _slice(
            f"{row['kind']} {row['request']}",
            "request",
            REQUESTS,
            lane,
            began,
            ended,
            _plain({"request": row["request"], **about}),
        )
        for name, left, right in _phases(row):
            yield _slice(name, "phase", REQUESTS, lane, left, right, {"request": int(row["request"])})
    yield from lanes.names()


def _phases(row: dict[Any, Any]) -> list[tuple[str, int, int]]:
    """Queued until the first dispatch; then, of what generates, prefill until the first token and decode after it. In a
    pipeline of several stages *prefill* is everything between. What took less than can be shown is
    left out."""
    began, ended = int(row["scheduled_ns"]), int(row["ended_ns"])
    dispatched = ended if pd.isna(row["dispatched_ns"]) else int(row["dispatched_ns"])
    token = ended if pd.isna(row["first_token_ns"]) else int(row["first_token_ns"])
    phases = [("queued", began, dispatched)]
    if row["kind"] == "embedding":
        phases.append(("service", dispatched, ended))
    else:
        phases += [("prefill", dispatched, token), ("decode", token, ended)]
    return [phase for phase in phases if phase[2] // _US > phase[1] // _US]


def _tasks(rows: pd.DataFrame, run_end: int) -> Iterator[Event]:
    for replica in sorted(rows["replica"].unique().tolist()):
        part = rows[rows["replica"] == replica]
        pid = REPLICA + replica
        lanes = _Lanes(pid)
        for row in part.sort_values(["dispatched_ns", "task"]).to_dict("records"):
            began = int(row["dispatched_ns"])
            ended = run_end if pd.isna(row["ended_ns"]) else int(row["ended_ns"])
            about = {
                name: row[name]
                for name in (
                    "task",
                    "request",
                    "stage",
                    "attempt",
                    "batch",
                    "batch_tasks",
                    "input_tokens",
                    "output_tokens",
                    "outcome",
                )
            }
            yield _slice(str(row["op"]), "task", pid, lanes.take(began, ended), began, ended, _plain(about))
        yield from lanes.names()


def _queued(rows: pd.DataFrame, start: int, end: int) -> Iterator[Event]:
    """Queued tasks of each pool, at every instant at which their number changes. Tasks that were never dispatched have no
    row, so they are not counted."""
    yield _named("process_name", PLANE, 0, "plane")
    for pool, part in rows.groupby("pool", sort=True, observed=True):
        came, left = part["queued_ns"].to_numpy(np.int64), part["dispatched_ns"].to_numpy(np.int64)
        waited = left > came
        instants = np.concatenate([came[waited], left[waited]])
        change = np.concatenate([np.ones(waited.sum(), np.int64), np.full(waited.sum(), -1, np.int64)])
        order = np.argsort(instants, kind="stable")
        at, depth = instants[order], np.cumsum(change[order])
        last = np.flatnonzero(np.append(at[1:] != at[:-1], True)) if len(at) else np.empty(0, np.int64)
        before = depth[last[at[last] < start]]
        yield _counter(f"queued {pool}", PLANE, start, {"tasks": int(before[-1]) if len(before) else 0})
        for i in last:
            if start <= at[i] < end:
                yield _counter(f"queued {pool}", PLANE, int(at[i]), {"tasks": int(depth[i])})


def _replicas(run: Run, shown: set[int]) -> Iterator[Event]:
    """Names of the replicas that have events; a run that keeps no tasks still has what they reported."""
    for fact in run.manifest.replicas:
        if (pid := REPLICA + fact.replica) in shown:
            yield _named("process_name", pid, 0, f"replica {fact.replica}: {fact.pool} on {fact.node}")


def _reports(rows: pd.DataFrame, start: int, end: int) -> Iterator[Event]:
    for row in rows[rows["at_ns"].between(start, end, inclusive="left")].to_dict("records"):
        counts = {name: int(row[name]) for name in ("running", "waiting")}
        yield _counter("reported", REPLICA + int(row["replica"]), int(row["at_ns"]), counts)


class _Lanes:
    """Threads of a process: each slice takes the lowest that is free. Ask in order of begin."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._free: list[int] = []
        self._busy: list[tuple[int, int]] = []
        self._n = 0

    def take(self, began: int, ended: int) -> int:
        while self._busy and self._busy[0][0] <= began:
            heapq.heappush(self._free, heapq.heappop(self._busy)[1])
        if self._free:
            lane = heapq.heappop(self._free)
        else:
            self._n += 1
            lane = self._n
        heapq.heappush(self._busy, (max(ended, began + 1), lane))
        return lane

    def names(self) -> Iterator[Event]:
        for lane in range(1, self._n + 1):
            yield _named("thread_name", self._pid, lane, f"lane {lane}")


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(name: str, category: str, pid: int, tid: int, began: int, ended: int, about: Event) -> Event:
    span = {"ts": began // _US, "dur": ended // _US - began // _US}
    return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, **span, "args": about}


def _counter(name: str, pid: int, at: int, values: dict[str, int]) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": at // _US, "args": values}


def _order(event: Event) -> tuple[int, int]:
    """By instant; of slices that begin together the longer first, since it holds the other."""
    return event["ts"], -event.get("dur", 0)


def _plain(about: dict[str, Any]) -> Event:
    """Without what is not known, and in JSON's own types."""
    kept = {name: value for name, value in about.items() if not pd.isna(value)}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in kept.items()}


def _write(out: Path, document: Event) -> None:
    """One event a line, so that a text tool can read it too. The same run gives the same bytes."""
    events: Sequence[Event] = document.pop("traceEvents")
    head = json.dumps(document, ensure_ascii=False)[:-1]
    lines = ",\n".join(json.dumps(event, ensure_ascii=False, allow_nan=False) for event in events)
    text = f'{head}, "traceEvents": [\n{lines}\n]}}\n'.encode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(gzip.compress(text, mtime=0) if out.suffix == ".gz" else text)
    except OSError as error:
        raise output_error(out, error) from error
