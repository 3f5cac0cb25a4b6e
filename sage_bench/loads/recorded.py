"""The requests of a recorded run as a load: what the same clients would have asked of another system.

A request arrives at the instant of the step that brought it; its scheduled instant, from which latencies count, and its
due times stay as they were. Its output length is what its task told when it finished. Where it did not, the log does
not hold the truth:

* a request whose client left is kept with the tokens that it had been given, and left out if there were none: no load
  makes a client give up;
* any other (rejected, failed, cut off by the end of the run) is given the length of a finished request of the same
  pipeline, tenant and priority, drawn among those longer than what it had been given; its cap where there is none. A
  policy cannot see lengths, so among equals those that it turned away are like the others.

What prompts share is not in a log: simulated prompts share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from sage_bench.core_speed import NAME as CORE_SPEED
from sage_bench.core_speed import CoreSpeed, Reference, probes_of
from sage_bench.loads.mix import Limits
from sage_bench.replaying import read_log
from sage_bench.results.manifest import Manifest, read_manifest
from sage_bench.results.reader import Run
from sage_core import events as e
from sage_core.errors import ConfigError, DataError
from sage_core.load import Arrival
from sage_core.log import decode_events
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import NEVER, Nanos, RequestKind, request_of, seconds

_ARRIVED = e.RequestArrived.__name__.encode()
_INSTANTS = ("scheduled_at", "ttft_due_at", "due_at")


class RecordedLoad:
    """A :class:`sage_core.load.Load`. run: the folder of a run that wrote its log. Ids are those of the log.

    notes: what of the run cannot be repeated, a sentence each. limits: the end of the run's own load where it had one,
    so that its cool-down is the same. began: when that load began, for its warm-up: live, after the gateway.

    probe_us, probe_power: every instant is told in work time of the core that was watched in the run, by this reference
    (:mod:`sage_bench.core_speed`); None: in seconds.
    """

    def __init__(
        self,
        run: str | None,
        probe_us: float | None = None,
        probe_power: float = 1.0,
        *,
        streams: Streams,
        slo: SloTable,
    ) -> None:
        if run is None:
            raise ConfigError(
                "load.run: expected the folder of a run, as in load=recorded load.run=results/run/<run id>"
            )
        folder = Path(run)
        manifest = read_manifest(folder)
        self.log = folder / "steps.parquet"
        seen = _Seen()
        for number, step in enumerate(read_log(self.log), start=1):
            for event in decode_events(number, step.events):
                seen.take(event)
        if not seen.group_of:
            raise DataError(f"{self.log}: no request arrived in this run; choose one with requests")
        self._results = _results(folder)
        self._lengths, unknown = seen.lengths(streams.stream("load/recorded/output_tokens"))
        self._speed = None
        if probe_us is not None and (probes := probes_of(folder)) is not None:
            self._speed = CoreSpeed(probes, Reference(probe_us, probe_power))
        end = _load_end(manifest)
        self.limits = Limits(None, None if end is None else self._timed(end))
        self.began = self._timed(max(manifest.warmup_ns - seconds(float(manifest.config.get("warmup_s", 0.0))), 0))
        self.notes = seen.notes(manifest, unknown)

    def arrivals(self) -> Iterator[Arrival]:
        """Arrivals in the order of the log."""
        lengths = self._lengths
        for number, step in enumerate(read_log(self.log), start=1):
            if _ARRIVED not in step.events:
                continue
            for event in decode_events(number, step.events):
                if isinstance(event, e.RequestArrived) and event.request in lengths:
                    results = self._results.get(event.request, ())
                    now, timed = self._timed(step.now), event
                    if self._speed is not None:
                        due = {name: self._timed(getattr(event, name)) for name in _INSTANTS}
                        timed = msgspec.structs.replace(event, **due)
                    yield Arrival(now, timed, lengths[event.request], None, results)

    def _timed(self, instant: int) -> Nanos:
        if self._speed is None or instant == NEVER:
            return Nanos(instant)
        return Nanos(max(round(self._speed.work(instant)), 0))

    def ended(self, now: int, request: int) -> Arrival | None:
        """None: the recorded instants stand, even those of a closed loop, whatever happens now."""
        return None

    def files(self) -> list[str]:
        """Files the load reads: what a manifest has to give checksums of."""
        beside = (self.log.parent / name for name in ("tasks.parquet", "requests.parquet", *_speeds(self._speed)))
        return [str(self.log), *(str(path) for path in beside if path.exists())]


def _speeds(speed: CoreSpeed | None) -> tuple[str, ...]:
    return () if speed is None else (CORE_SPEED,)


def _results(folder: Path) -> dict[int, tuple[int, ...]]:
    """Sizes of the results of each stage, of answered requests that went through several; 0 for a stage that did not run.
    They stand in ``tasks.parquet``: the log knows tasks, not stages."""
    path = folder / "tasks.parquet"
    if not path.exists():
        return {}
    rows = Run(folder).frame("tasks", ("request", "stage", "output_tokens", "outcome"))
    if not (rows["stage"] > 0).any():
        return {}
    requests = Run(folder).frame("requests", ("request", "outcome"))
    answered = requests.loc[requests["outcome"] == "responded", "request"]
    several = rows.loc[rows["stage"] > 0, "request"]
    staged = rows[rows["request"].isin(several) & rows["request"].isin(answered)]
    done = staged[staged["outcome"] == "finished"]
    stages = int(rows["stage"].max()) + 1
    found: dict[int, list[int]] = {}
    for request, stage, size in zip(done["request"], done["stage"], done["output_tokens"], strict=True):
        found.setdefault(int(request), [0] * stages)[int(stage)] = int(size)
    return {request: tuple(sizes) for request, sizes in found.items()}


class _Seen:
    """What the events of a log tell of its requests. A group is a pipeline, tenant and priority."""

    def __init__(self) -> None:
        self.group_of: dict[int, int] = {}
        self._groups: dict[tuple[str, str, int], int] = {}
        self._cap: dict[int, int] = {}
        self._generates: dict[int, bool] = {}
        self._finished: dict[int, int] = {}
        self._given: dict[int, int] = {}  # tokens so far, by task that has not finished
        self._left: set[int] = set()
        self._with_prefix = 0
        self._replicas_lost = 0
        self._policy_changes = 0

    def take(self, event: e.AnyEvent) -> None:
        """The next event of the log."""
        match event:
            case e.TokensProduced(task, count) if count:
                self._given[task] = self._given.get(task, 0) + count
            case e.TaskFinished(task, output_tokens):
                self._task_finished(task, output_tokens)
            case e.RequestArrived():
                self._request_arrived(event)
            case e.RequestCancelled(request) if request not in self._finished:
                self._left.add(request)
            case e.ReplicaLeft() | e.ReplicaDraining():
                self._replicas_lost += 1
            case e.PolicyChanged():
                self._policy_changes += 1

    def lengths(self, draws: np.random.Generator) -> tuple[dict[int, int], int]:
        """Output tokens of every request that is kept, and of how many of them the length is not known."""
        given: dict[int, int] = {}
        for task, tokens in self._given.items():
            given[request_of(task)] = max(given.get(request_of(task), 0), tokens)
        finished = self._finished_by_group()
        kept: dict[int, int] = {}
        unknown = 0
        for request, group in self.group_of.items():
            if request in self._finished:
                kept[request] = self._finished[request]
            elif request in self._left:
                if given.get(request):
                    kept[request] = given[request]
            elif not self._generates[request]:
                kept[request] = 0
            else:
                unknown += 1
                longer = finished[group][np.searchsorted(finished[group], given.get(request, 0), side="right") :]
                place = draws.random()
                kept[request] = (
                    int(longer[int(place * len(longer))])
                    if len(longer)
                    else max(self._cap[request], given.get(request, 0), 1)
                )
        return kept, unknown

    def notes(self, manifest: Manifest, unknown: int) -> list[str]:
        """What of the run cannot be repeated."""
        found = []
        if unknown:
            found.append(
                f"{unknown:,} requests did not finish in the recorded run: their output lengths are drawn from finished "
                "requests of the same pipeline, tenant and priority"
            )
        if self._left:
            found.append(
                f"{len(self._left):,} clients left in the recorded run: their requests are kept with the tokens that they had been "
                "given, and left out where there were none"
            )
        if self._with_prefix:
            found.append(
                f"{self._with_prefix:,} requests name a shared prefix, but not its contents: simulated prompts share nothing "
                "in a prefix cache"
            )
        if self._policy_changes:
            found.append(f"the policy was changed {self._policy_changes} times in the recorded run; here it is not")
        if self._replicas_lost and manifest.source != "simulation":
            found.append(
                f"{self._replicas_lost} times a replica left or was drained in the recorded run; a simulation repeats "
                "only what cluster.faults says"
            )
        return found

    def _request_arrived(self, event: e.RequestArrived) -> None:
        request = event.request
        self.group_of[request] = self._groups.setdefault(
            (event.pipeline, event.tenant, event.priority), len(self._groups)
        )
        self._cap[request] = event.output_tokens_max
        self._generates[request] = event.kind != RequestKind.EMBEDDING
        self._with_prefix += event.prefix != 0

    def _task_finished(self, task: int, output_tokens: int) -> None:
        request = request_of(task)
        if request not in self.group_of:
            return  # a step was cut out of the log: replaying it says which
        if request in self._left:  # an engine may finish what was cancelled a moment ago: cut short, or whole
            self._given[task] = max(self._given.get(task, 0), output_tokens)
            return
        self._given.pop(task, None)
        if self._generates[request]:
            # Of several generating stages the last one counts; one that generates nothing tells nothing.
            self._finished[request] = output_tokens or self._finished.get(request, 1)
        else:
            self._finished[request] = 0

    def _finished_by_group(self) -> list[NDArray[np.int64]]:
        """Sorted output lengths of the finished requests of each group."""
        lengths: list[list[int]] = [[] for _ in self._groups]
        for request, tokens in self._finished.items():
            lengths[self.group_of[request]].append(tokens)
        return [np.sort(np.array(each, np.int64)) for each in lengths]


def _load_end(manifest: Manifest) -> int | None:
    """When the load of the recorded run ended, as far as its cool-down tells."""
    if manifest.cooldown_at_ns is None:
        return None
    return manifest.cooldown_at_ns + seconds(float(manifest.config.get("cooldown_s", 0.0)))
