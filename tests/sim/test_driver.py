"""The SimPy driver with a device small enough to be right by inspection: a server, or several, first come first served.

Times are worked out by hand or by Lindley's recursion, and means are held against M/M/1 and M/D/1. Run as a script it
prints the digest of one busy run, for the tests that compare processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond, Task
from sage_core.errors import ConfigError, IllegalEvent, PolicyError
from sage_core.load import Arrival
from sage_core.log import Step
from sage_core.native_plane import Plane, make_plane
from sage_core.pipeline import Docs, Pipeline, Text, Value, Vector, Work, op, single_request_pipelines, trace
from sage_core.policy import Limits, Policy
from sage_core.replay import replay
from sage_core.rng import Streams
from sage_core.units import MILLISECOND, NEVER, SECOND, Nanos, PoolKind, request_of
from sage_policies.presets import PRESETS, preset
from sage_sim.driver import Finish, SimDriver
from sage_sim.faults import Fault
from sage_sim.network import NetworkConfig

MS = MILLISECOND
INSTANT = NetworkConfig(0.0)
POOLS = {"llm": PoolKind.LLM, "embed": PoolKind.EMBEDDING, "cpu": PoolKind.OPERATOR}


@op(pool="cpu")
def look_up(text: Value[Text]) -> Work[Docs]:
    return Work(text.tokens)


@op(pool="embed")
def encode(text: Value[Text]) -> Work[Vector]:
    return Work(text.tokens)


@op(pool="llm")
def answer(prompt: Value[Text], docs: Value[Docs], query: Value[Vector]) -> Work[Text]:
    return Work(prompt.tokens, None)


PIPELINES: dict[str, Pipeline] = {
    **single_request_pipelines(),
    "fan": trace("fan", lambda text: answer(text, look_up(text), encode(text))),
}


class Server:
    """``servers`` in parallel, one queue. A task takes its true output tokens times ``token_ns`` (or ``task_ns``).

    fails: requests whose task is given back, undone, when its time is up. streams: a first token at half time.
    """

    def __init__(
        self,
        replica: int,
        truth: Callable[[int], int],
        *,
        pool: str = "llm",
        device: int = 0,
        servers: int = 1,
        tasks_max: int = 1,
        token_ns: int = 1,
        task_ns: int | None = None,
        fails: Sequence[int] = (),
        retryable: bool = True,
        streams: bool = False,
    ) -> None:
        self.replica, self.truth, self.pool, self.device = replica, truth, pool, device
        self.servers, self.tasks_max, self.token_ns, self.task_ns = servers, tasks_max, token_ns, task_ns
        self.fails, self.retryable, self.streams = set(fails), retryable, streams
        self.waiting: deque[tuple[Task, int]] = deque()
        self.running: dict[int, tuple[int, int, int]] = {}  # task -> (first token, end, output tokens)
        self.now = 0

    def joined(self) -> list[e.ReplicaJoined]:
        return [
            e.ReplicaJoined(
                self.replica,
                self.pool,
                int(POOLS[self.pool]),
                self.device,
                "node",
                self.tasks_max,
                batch_tokens_max=4096,
            )
        ]

    @property
    def wakeup_at(self) -> Nanos:
        instants = [instant for first, end, _ in self.running.values() for instant in (first, end)]
        return Nanos(min((instant for instant in instants if instant > self.now), default=NEVER))

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[e.AnyEvent]:
        assert now >= self.now, "time went back"
        assert now <= self.wakeup_at, "called later than asked for"
        self.now = now
        events: list[e.AnyEvent] = []
        for task, (first, end, tokens) in [*self.running.items()]:
            if first == now:
                events.append(e.TokensProduced(task, 1))
            if end == now:
                del self.running[task]
                if request_of(task) in self.fails:
                    events.append(e.TaskFailed(task, "broken", self.retryable))
                else:
                    events.append(e.TaskFinished(task, tokens))
        for command in commands:
            if isinstance(command, Dispatch):
                assert command.replica == self.replica
                self.waiting.extend((task, self.truth(request_of(task.task), task.stage)) for task in command.tasks)
            elif isinstance(command, Cancel):
                self.running.pop(command.task, None)
                self.waiting = deque(item for item in self.waiting if item[0].task != command.task)
        while self.waiting and len(self.running) < self.servers:
            begun, tokens = self.waiting.popleft()
            span = tokens * self.token_ns if self.task_ns is None else self.task_ns
            self.running[begun.task] = (now + span // 2 if self.streams else NEVER, now + span, tokens)
        return events

    def report(self, now: Nanos) -> list[e.ReplicaReported]:
        return [e.ReplicaReported(self.replica, len(self.running), len(self.waiting), 0)]


class Script:
    """An open loop: these arrivals. ``(at, output_tokens[, pipeline])``."""

    def __init__(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self.rows = rows

    def arrivals(self) -> Iterator[Arrival]:
        for request, (at, tokens, *pipeline) in enumerate(self.rows):
            yield arrival(request, at, tokens, *pipeline)

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        return None


class Users:
    """A closed loop: each of ``users`` asks again ``think_ns`` after an answer, until ``requests`` were sent."""

    def __init__(self, users: int, requests: int, tokens: int, think_ns: int = 0) -> None:
        self.users, self.requests, self.tokens, self.think_ns = users, requests, tokens, think_ns
        self.sent = 0

    def _next(self, at: int) -> Arrival:
        self.sent += 1
        return arrival(self.sent - 1, at, self.tokens)

    def arrivals(self) -> Iterator[Arrival]:
        for _ in range(self.users):
            yield self._next(0)

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        return self._next(now + self.think_ns) if self.sent < self.requests else None


def arrival(request: int, at: int, tokens: int, pipeline: str = "chat") -> Arrival:
    kind = 2 if pipeline == "embed" else 0
    cap = 0 if pipeline == "embed" else 1 << 36
    return Arrival(
        Nanos(at), e.RequestArrived(request, pipeline, kind, f"t{request % 3}", request % 2, 10, cap, at), tokens
    )


class Told(NamedTuple):
    now: int
    events: tuple[e.AnyEvent, ...]
    commands: tuple[AnyCommand, ...]
    step: Step


@pytest.fixture(autouse=True, params=["native", "reference"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test below runs over the native plane and loop, and over their meaning in Python."""
    name = str(request.param)
    monkeypatch.setattr(Run, "mechanism", name)
    return name


class Run:
    """One run, with everything that was recorded of it."""

    mechanism = "native"

    def __init__(
        self,
        load: Any,
        *servers: dict[str, Any],
        policy: str = "fifo",
        mechanism: str | None = None,
        network: NetworkConfig = INSTANT,
        report_interval_s: float = 0.0,
        seed: int = 1,
        attempts_max: int = 3,
        each_step: Callable[[int], None] | None = None,
        policies: dict[str, Callable[[], Policy]] | None = None,
        **options: Any,
    ) -> None:
        self.told: list[Told] = []
        self.each_step = each_step
        named = {name: lambda name=name: preset(name) for name in PRESETS} | (policies or {})
        self.make_plane: Callable[[], Plane] = lambda: make_plane(
            mechanism or self.mechanism, PIPELINES, named, policy, attempts_max=attempts_max
        )
        self.plane = self.make_plane()
        makers = [
            lambda replica, i=i, s=s: Server(
                replica, lambda request, stage: self.driver.output_tokens(request, stage), **{"device": i, **s}
            )
            for i, s in enumerate(servers or ({},))
        ]
        self.driver = SimDriver(
            self.plane,
            load,
            makers,
            Streams(seed),
            network=network,
            report_interval_s=report_interval_s,
            record=self.record,
            **options,
        )

    def record(
        self, now: int, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None:
        self.told.append(Told(now, tuple(events), tuple(commands), Step(now, encoded, digest)))
        if self.each_step is not None:
            self.each_step(len(self.told))

    def go(self, tick: Any = None) -> Run:
        self.finish: Finish = self.driver.run(tick)
        counts = self.driver.counts
        ends = [counts.responded, counts.rejected, counts.cancelled, counts.failed]
        assert sum(ends) == counts.arrived
        assert self.plane.live == 0
        assert self.finish.steps == len(self.told)
        assert self.finish.digest == self.told[-1].step.digest
        assert [told.now for told in self.told] == sorted(told.now for told in self.told)
        return self

    def all(self, kind: type[Any]) -> list[tuple[int, Any]]:
        """(instant, event or command) of that type, in order."""
        return [
            (told.now, item) for told in self.told for item in (*told.events, *told.commands) if isinstance(item, kind)
        ]

    def responded_at(self) -> dict[int, int]:
        return {command.request: now for now, command in self.all(Respond)}


class TestByHand:
    def test_the_plane_keeps_the_queue_and_every_message_takes_its_time(self) -> None:
        """One place, 15 ms of service, 1 ms each way. The next task leaves only when the last one is known to be done."""
        load = Script([(0, 15 * MS), (10 * MS, 15 * MS), (20 * MS, 15 * MS)])
        run = Run(load, network=NetworkConfig(0.001)).go()
        assert [(now, command.tasks[0].task >> 16) for now, command in run.all(Dispatch)] == [
            (0, 0),
            (17 * MS, 1),
            (34 * MS, 2),
        ]
        assert run.responded_at() == {0: 17 * MS, 1: 34 * MS, 2: 51 * MS}
        assert run.finish.now == 51 * MS

    def test_a_plain_router_keeps_the_queue_in_the_engine(self) -> None:
        """The same load; the engine starts the next task as it ends the last: no way between them."""
        load = Script([(0, 15 * MS), (10 * MS, 15 * MS), (20 * MS, 15 * MS)])
        run = Run(load, policy="round_robin", network=NetworkConfig(0.001)).go()
        assert [now for now, _ in run.all(Dispatch)] == [0, 10 * MS, 20 * MS]
        assert run.responded_at() == {0: 17 * MS, 1: 32 * MS, 2: 47 * MS}

    def test_tokens_are_seen_when_they_arrive(self) -> None:
        run = Run(Script([(0, 10 * MS)]), {"streams": True}, network=NetworkConfig(0.002)).go()
        assert [now for now, _ in run.all(e.TokensProduced)] == [(2 + 5 + 2) * MS]
        assert run.responded_at() == {0: 14 * MS}

    def test_what_happens_at_one_instant_is_one_step(self) -> None:
        """At 10 ms request 0 ends, requests 1 and 2 arrive, and a report comes in."""
        load = Script([(0, 10 * MS), (10 * MS, 5 * MS), (10 * MS, 5 * MS)])
        run = Run(load, report_interval_s=0.01).go()
        (step,) = (told for told in run.told if told.now == 10 * MS)
        assert sorted(type(event).__name__ for event in step.events) == [
            "ReplicaReported",
            "RequestArrived",
            "RequestArrived",
            "TaskFinished",
        ]
        assert [type(command) for command in step.commands] == [Respond, Dispatch]

    def test_stages_of_a_pipeline_run_side_by_side_and_join(self) -> None:
        servers = ({"pool": "cpu", "task_ns": 3 * MS}, {"pool": "embed", "task_ns": 5 * MS}, {"task_ns": 7 * MS})
        run = Run(Script([(0, 1, "fan")]), *servers, network=NetworkConfig(0.001)).go()
        assert run.responded_at() == {0: (1 + 5 + 1 + 1 + 7 + 1) * MS}

    def test_work_that_is_held_back_leaves_when_its_time_comes_though_nothing_else_happens(self) -> None:
        fifo = preset("fifo")

        class Hold:
            def limit(self, now: Nanos, replicas: Any, queue: Any) -> Limits:
                most = np.full(len(replicas), NEVER)
                return Limits(most, most, most, most, np.full(len(replicas), queue.oldest_queued_at + 3 * MS))

        policies = {"hold": lambda: Policy("hold", None, fifo.order, fifo.route, Hold(), fifo.predict)}
        run = Run(Script([(5 * MS, MS), (6 * MS, MS)]), policy="hold", policies=policies).go()
        assert [(now, len(command.tasks)) for now, command in run.all(Dispatch)] == [(8 * MS, 2)]

    def test_reports_are_as_old_as_the_network_makes_them(self) -> None:
        load = Script([(0, 25 * MS)])
        run = Run(load, report_interval_s=0.01, network=NetworkConfig(0.001)).go()
        assert [(now, report.running) for now, report in run.all(e.ReplicaReported)] == [(11 * MS, 1), (21 * MS, 1)]

    def test_until_ends_the_run_there(self) -> None:
        load = Script([(n * 10 * MS, 15 * MS) for n in range(100)])
        run = Run(load, until_s=0.1).go()
        assert run.finish.now <= 100 * MS
        assert run.driver.counts.arrived == 11  # one every 10 ms, both ends included
        assert run.driver.counts.responded == 6
        assert {command.reason for _, command in run.all(Fail)} == {"run ended with the request unserved"}

    def test_a_load_without_requests_ends_at_once(self) -> None:
        run = Run(Script([]), report_interval_s=1.0).go()
        assert (run.finish.now, run.driver.counts.arrived) == (0, 0)

    def test_the_load_may_come_after_a_long_silence(self) -> None:
        run = Run(Script([(3600 * SECOND, MS)]), report_interval_s=60.0).go()
        assert run.responded_at() == {0: 3600 * SECOND + MS}


class TestQueueingTheory:
    """Zero delay, one server, FIFO in the plane: the run is a G/G/1 queue and nothing else."""

    REQUESTS = 20_000

    def rows(self, rate_hz: float, service_s: float, *, exponential: bool) -> list[tuple[int, int]]:
        streams = Streams(2026)
        gaps = streams.stream("gaps").exponential(SECOND / rate_hz, self.REQUESTS)
        spans = streams.stream("spans").exponential(service_s * SECOND, self.REQUESTS)
        at = np.cumsum(gaps).astype(np.int64).tolist()
        work = (
            np.maximum(spans, 1).astype(np.int64).tolist()
            if exponential
            else [round(service_s * SECOND)] * self.REQUESTS
        )
        return list(zip(at, work, strict=True))

    def waits(self, run: Run, rows: list[tuple[int, int]]) -> list[int]:
        answered = run.responded_at()
        return [answered[request] - at - span for request, (at, span) in enumerate(rows)]

    @pytest.mark.parametrize(
        ("exponential", "load"), [(True, 0.5), (True, 0.7), (False, 0.7)], ids=["M/M/1-50", "M/M/1-70", "M/D/1-70"]
    )
    def test_waits_are_lindleys_and_their_mean_is_the_theorys(self, exponential: bool, load: float) -> None:
        service_s = 0.02
        rows = self.rows(load / service_s, service_s, exponential=exponential)
        waits = self.waits(Run(Script(rows)).go(), rows)

        exact = [0]  # Lindley: W(n+1) = max(0, W(n) + S(n) - A(n+1))
        for (at, span), (following, _) in pairwise(rows):
            exact.append(max(0, exact[-1] + span - (following - at)))
        assert waits == exact

        mean_s = service_s * load / (1 - load) * (1 if exponential else 0.5)
        batches = np.array(waits[2000:]).reshape(20, -1).mean(axis=1) / SECOND
        error = batches.std(ddof=1) / np.sqrt(len(batches))
        assert abs(batches.mean() - mean_s) < 3 * error, (batches.mean(), mean_s, error)
        assert error < 0.1 * mean_s  # the interval is narrow enough to mean something

    def test_two_servers_wait_less_than_one_of_twice_the_speed_and_answer_later(self) -> None:
        """M/M/2 against M/M/1 of twice the speed (Kleinrock, Queueing Systems 1, ch. 3 and 5)."""
        rows = self.rows(70.0, 0.02, exponential=True)
        halved = [(at, span // 2) for at, span in rows]
        wait_two = np.mean(self.waits(Run(Script(rows), {"servers": 2, "tasks_max": 2}).go(), rows)) / SECOND
        wait_fast = np.mean(self.waits(Run(Script(halved)).go(), halved)) / SECOND
        # Erlang C for 1.4 erlangs on two servers is 0.5765, so the mean wait is 0.5765 / (2 * 50 - 70) = 19.2 ms.
        assert wait_two == pytest.approx(0.0192, rel=0.12)
        assert wait_fast == pytest.approx(0.7 / 30, rel=0.12)
        assert wait_two < wait_fast
        assert wait_fast + 0.01 < wait_two + 0.02


class TestClosedLoop:
    def test_each_user_has_one_request_at_a_time(self) -> None:
        run = Run(Users(3, 50, 10 * MS), {"servers": 2, "tasks_max": 2}).go()
        assert run.driver.counts.responded == 50
        live = most = 0
        for told in run.told:
            for item in (*told.events, *told.commands):
                live += isinstance(item, e.RequestArrived) - isinstance(item, Respond)
            most = max(most, live)
        assert most == 3
        # Two servers, always busy, 10 ms each: 50 requests take 25 rounds.
        assert run.finish.now == 250 * MS

    def test_thinking_takes_its_time(self) -> None:
        run = Run(Users(1, 5, 10 * MS, think_ns=30 * MS)).go()
        assert [now for now, _ in run.all(e.RequestArrived)] == [n * 40 * MS for n in range(5)]

    def test_a_user_whose_request_failed_goes_on(self) -> None:
        run = Run(Users(2, 20, MS), {"fails": (3, 4), "retryable": False}).go()
        assert (run.driver.counts.arrived, run.driver.counts.failed) == (20, 2)


class TestFaults:
    def load(self, count: int = 200) -> Script:
        return Script([(n * 5 * MS, 8 * MS) for n in range(count)])

    def test_a_crash_loses_the_work_and_not_the_request(self) -> None:
        run = Run(self.load(), {}, {}, faults=[Fault(0.203, 0)], network=NetworkConfig(0.0005)).go()
        assert run.driver.counts.responded == 200
        assert run.driver.counts.retries == 1
        assert [(now, event.replica) for now, event in run.all(e.ReplicaLeft)] == [(203 * MS, 0)]
        assert {command.replica for now, command in run.all(Dispatch) if now >= 203 * MS} == {1}

    def test_a_restart_is_a_new_replica_on_the_same_device(self) -> None:
        run = Run(self.load(), {}, faults=[Fault(0.2, 0, restart_after_s=0.1)]).go()
        assert run.driver.counts.responded == 200
        assert [(now, event.replica, event.device) for now, event in run.all(e.ReplicaJoined)] == [
            (0, 0, 0),
            (300 * MS, 1, 0),
        ]
        assert not [now for now, _ in run.all(Dispatch) if 200 * MS <= now < 300 * MS]

    def test_what_a_dead_device_said_last_is_lost_with_it(self) -> None:
        """It ends its task at 8 ms and dies at 9; the news would have come at 18."""
        run = Run(Script([(0, 4 * MS)]), {}, {}, faults=[Fault(0.015, 0)], network=NetworkConfig(0.01)).go()
        assert run.all(e.ReplicaLeft)[0][0] == 15 * MS
        assert run.driver.counts.retries == 1
        assert run.responded_at() == {0: (15 + 10 + 4 + 10) * MS}

    def test_it_is_lost_even_if_the_device_is_back_before_it_would_have_come(self) -> None:
        faults = [Fault(0.015, 0, restart_after_s=0.001)]
        run = Run(Script([(0, 4 * MS)]), {}, faults=faults, network=NetworkConfig(0.01)).go()
        assert [now for now, _ in run.all(e.TaskFinished)] == [(16 + 10 + 4 + 10) * MS]

    def test_what_was_on_its_way_to_a_dead_device_does_not_reach_the_one_that_replaced_it(self) -> None:
        faults = [Fault(0.005, 0, restart_after_s=0.001)]
        run = Run(Script([(0, 4 * MS)]), {}, faults=faults, network=NetworkConfig(0.01)).go()
        assert [(now, command.replica) for now, command in run.all(Dispatch)] == [(0, 0), (6 * MS, 1)]
        assert run.responded_at() == {0: (6 + 10 + 4 + 10) * MS}

    def test_a_drained_device_whose_last_task_is_cancelled_leaves(self) -> None:
        servers: tuple[dict[str, Any], ...] = (
            {"pool": "cpu", "task_ns": 20 * MS, "fails": (0,), "retryable": False},
            {"pool": "embed", "task_ns": SECOND},
            {},
        )
        load = Script([(0, 1, "fan"), (50 * MS, MS)])
        run = Run(load, *servers, faults=[Fault(0.01, 1, "drain")], network=NetworkConfig(0.001)).go()
        assert [(now, command.replica) for now, command in run.all(Cancel)] == [(22 * MS, 1)]
        assert [(now, event.replica) for now, event in run.all(e.ReplicaLeft)] == [(22 * MS, 1)]

    def test_a_drained_device_ends_what_it_has_and_leaves(self) -> None:
        run = Run(self.load(), {}, {}, faults=[Fault(0.202, 0, "drain")]).go()
        assert (run.driver.counts.responded, run.driver.counts.retries) == (200, 0)
        ((drained, _),) = run.all(e.ReplicaDraining)
        ((left, _),) = run.all(e.ReplicaLeft)
        finished = [now for now, event in run.all(e.TaskFinished)]
        assert drained == 202 * MS < left
        assert left in finished
        assert {command.replica for now, command in run.all(Dispatch) if now >= drained} == {1}

    def test_an_idle_device_leaves_as_soon_as_it_is_drained(self) -> None:
        run = Run(Script([(0, MS), (50 * MS, MS)]), {}, {}, faults=[Fault(0.02, 1, "drain")]).go()
        ((left, _),) = run.all(e.ReplicaLeft)
        assert left == 20 * MS

    def test_a_drain_that_takes_too_long_is_cut_short_by_the_restart(self) -> None:
        run = Run(Script([(0, 500 * MS)]), {}, faults=[Fault(0.1, 0, "drain", restart_after_s=0.2)]).go()
        assert [now for now, _ in run.all(e.ReplicaLeft)] == [300 * MS]
        assert run.driver.counts.retries == 1
        assert run.responded_at() == {0: 800 * MS}

    def test_a_fault_of_a_dead_device_does_not_kill_the_one_that_replaced_it(self) -> None:
        faults = [Fault(0.1, 0, restart_after_s=0.1), Fault(0.15, 0, restart_after_s=0.1)]
        run = Run(self.load(), {}, faults=faults).go()
        assert [now for now, _ in run.all(e.ReplicaJoined)] == [0, 200 * MS]
        assert [now for now, _ in run.all(e.ReplicaLeft)] == [100 * MS]
        assert run.driver.counts.responded == 200

    def test_faults_after_the_last_answer_do_not_prolong_the_run(self) -> None:
        run = Run(Script([(0, MS)]), {}, report_interval_s=1.0, faults=[Fault(3600.0, 0, restart_after_s=60.0)]).go()
        assert run.finish.now == MS

    def test_many_faults_lose_nobody(self) -> None:
        random = Streams(4).stream("faults")
        faults = [
            Fault(
                float(random.uniform(0, 3)),
                int(random.integers(0, 4)),
                ("crash", "drain")[int(random.integers(0, 2))],
                restart_after_s=float(random.uniform(0, 0.3)),
            )
            for _ in range(40)
        ]
        load = Script([(n * 4 * MS, int(random.integers(1, 14)) * MS) for n in range(700)])
        servers = [{"streams": bool(i % 2), "tasks_max": 2} for i in range(4)]
        run = Run(load, *servers, faults=faults, network=NetworkConfig(0.0005, 0.001), report_interval_s=0.1).go()
        counts = run.driver.counts
        assert (counts.arrived, counts.responded + counts.failed) == (700, 700)
        assert counts.retries > 10
        assert counts.failed > 0  # those that had streamed
        assert {command.reason.split()[0] for _, command in run.all(Fail)} == {"replica"}

    def test_a_branch_that_fails_while_another_is_on_its_way(self) -> None:
        """Request 1 fails in ``cpu`` while the dispatch of its other branch travels: the device asks about a request
        that has ended."""
        servers = (
            {"pool": "cpu", "servers": 4, "tasks_max": 4, "task_ns": 5 * MS, "fails": (1,), "retryable": False},
            {"pool": "embed", "task_ns": 5 * MS},
            {"task_ns": 5 * MS},
        )
        # The second embedding is dispatched at 25 ms, when the first is known to be done, and arrives at 35 ms;
        # the failure of request 1 is known at 1 + 10 + 5 + 10 = 26 ms.
        load = Script([(0, 1, "fan"), (1 * MS, 1, "fan")])
        run = Run(load, *servers, network=NetworkConfig(0.01)).go()
        assert [now for now, _ in run.all(Fail)] == [26 * MS]
        assert [(now, command.replica) for now, command in run.all(Cancel)] == [(26 * MS, 1)]
        assert list(run.responded_at()) == [0]

    @pytest.mark.parametrize(
        "network", [NetworkConfig(0.001), NetworkConfig(2.5, 1.0)], ids=["fast", "slower than reports"]
    )
    def test_a_pool_without_replicas_ends_the_run_instead_of_waiting_for_ever(self, network: NetworkConfig) -> None:
        run = Run(Script([(0, MS), (0, 0, "embed"), (5 * MS, MS)]), report_interval_s=1.0, network=network).go()
        assert (run.driver.counts.responded, run.driver.counts.failed) == (2, 1)
        ((_, failed),) = run.all(Fail)
        assert (failed.request, failed.reason) == (1, "run ended with the request unserved")

    def test_the_last_replica_crashing_ends_the_run(self) -> None:
        run = Run(self.load(), {}, faults=[Fault(0.5, 0)], report_interval_s=0.05).go()
        counts = run.driver.counts
        assert (counts.arrived, counts.responded + counts.failed) == (200, 200)
        assert counts.failed > 50


class TestInterrupts:
    """Ctrl-C may come at any moment; what is left behind must be whole, and the log must replay."""

    def load(self) -> Script:
        return Script([(n * 5 * MS, 8 * MS) for n in range(500)])

    def check(self, run: Run) -> None:
        assert run.finish.interrupted
        counts = run.driver.counts
        assert 0 < counts.arrived < 500
        assert counts.failed > 0
        assert {command.reason for _, command in run.all(Fail)} == {"run was interrupted"}

    def test_raised_by_the_recorder(self) -> None:
        def each_step(count: int) -> None:
            if count == 100:
                raise KeyboardInterrupt

        run = Run(self.load(), each_step=each_step).go()
        self.check(run)
        assert len(run.told) == 101

    def test_raised_by_the_tick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(10**9))
        monkeypatch.setattr("sage_sim.driver.time.monotonic", lambda: 2.0 * next(clock))

        def tick(now: int, plane: Plane) -> None:
            if now > 0:
                assert plane.live > 0
                raise KeyboardInterrupt

        load = Script([(n * 5 * MS, 8 * MS) for n in range(3000)])
        run = Run(load).go(tick)
        assert run.finish.interrupted
        assert 0 < run.driver.counts.arrived < 3000

    def test_the_signal_waits_for_the_end_of_the_step(self) -> None:
        """It arrives inside the plane, between taking a task out of the queue and sending it."""
        fifo = preset("fifo")

        asked: list[int] = []

        class Signalling:
            live = True
            load_weight = 0.0

            def score(self, now: Nanos, tasks: Any, replicas: Any) -> Any:
                asked.append(now)
                if len(asked) == 50:
                    signal.raise_signal(signal.SIGINT)
                return np.zeros((len(tasks), len(replicas)))

        policies = {
            "signalling": lambda: Policy("signalling", None, fifo.order, Signalling(), fifo.limit, fifo.predict)
        }
        run = Run(self.load(), policy="signalling", policies=policies).go()
        self.check(run)
        assert run.told[-1].now == asked[49]  # the step it came in is the last one, but for the end of the run
        assert run.plane.counts.decisions == 50
        assert replay([told.step for told in run.told], run.make_plane()).divergence is None

    def test_a_second_one_inside_a_policy_is_raised_as_it_is(self) -> None:
        """Nobody knows what was decided, so nothing is pretended to have ended in order."""
        fifo = preset("fifo")

        class Impatient:
            live = True
            load_weight = 0.0
            asked = 0

            def score(self, now: Nanos, tasks: Any, replicas: Any) -> Any:
                self.asked += 1
                if self.asked == 50:
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGINT)
                return np.zeros((len(tasks), len(replicas)))

        policies = {"impatient": lambda: Policy("impatient", None, fifo.order, Impatient(), fifo.limit, fifo.predict)}
        with pytest.raises(KeyboardInterrupt):
            Run(self.load(), policy="impatient", policies=policies).go()

    def test_a_run_outside_the_main_thread_leaves_signals_alone(self) -> None:
        runs: list[Run] = []
        thread = threading.Thread(target=lambda: runs.append(Run(self.load()).go()))
        thread.start()
        thread.join(60)
        assert [run.driver.counts.responded for run in runs] == [500]

    def test_the_signal_handler_is_put_back(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        Run(Script([(0, MS)])).go()
        assert signal.getsignal(signal.SIGINT) is before

    def test_the_log_of_an_interrupted_run_replays_to_its_end(self) -> None:
        def each_step(count: int) -> None:
            if count == 100:
                signal.raise_signal(signal.SIGINT)

        run = Run(self.load(), each_step=each_step).go()
        self.check(run)
        replayed = replay([told.step for told in run.told], run.make_plane())
        assert replayed.divergence is None
        assert replayed.digest == run.finish.digest


def busy(mechanism: str | None = None, policy: str = "hybrid", seed: int = 1) -> Run:
    """Everything at once: pipelines, faults, jitter, reports, an end in the middle of it."""
    random = Streams(seed).stream("load")
    at = np.cumsum(random.exponential(4 * MS, 400)).astype(np.int64).tolist()
    names = [("chat", "embed", "fan")[int(n)] for n in random.integers(0, 3, 400)]
    rows = [(a, int(random.integers(1, 20)) * MS, name) for a, name in zip(at, names, strict=True)]
    servers: list[dict[str, Any]] = [
        *({"tasks_max": 3, "servers": 3, "streams": True} for _ in range(3)),
        *({"pool": "embed", "task_ns": 3 * MS, "tasks_max": 4, "device": 0} for _ in range(2)),
        {"pool": "cpu", "task_ns": 2 * MS, "servers": 4, "tasks_max": 4},
    ]
    return Run(
        Script(rows),
        *servers,
        policy=policy,
        mechanism=mechanism,
        seed=seed,
        network=NetworkConfig(0.0005, 0.0005),
        report_interval_s=0.05,
        faults=[Fault(0.3, 0, restart_after_s=0.2), Fault(0.5, 3, "drain"), Fault(0.6, 5, restart_after_s=0.1)],
        until_s=1.5,
    ).go()


class TestDeterminism:
    def test_the_busy_run_is_busy(self) -> None:
        counts = busy().driver.counts
        assert counts.responded > 250
        assert counts.failed > 0
        assert counts.retries > 0

    def test_the_same_seed_gives_the_same_digest_and_another_another(self) -> None:
        assert busy().finish.digest == busy().finish.digest
        assert busy(seed=2).finish.digest != busy().finish.digest

    @pytest.mark.parametrize("policy", PRESETS)
    def test_native_and_reference_give_the_same_digest(self, policy: str) -> None:
        assert busy("native", policy).finish.digest == busy("reference", policy).finish.digest

    def test_presets_differ(self) -> None:
        digests = {
            policy: busy(policy=policy).finish.digest for policy in ("fifo", "priority", "round_robin", "hybrid")
        }
        assert len(set(digests.values())) == len(digests)

    @pytest.mark.parametrize("by", ["native", "reference"])
    def test_the_log_replays_to_the_last_byte(self, by: str) -> None:
        run = busy()
        replayed = replay([told.step for told in run.told], busy(by).make_plane())
        assert replayed.divergence is None
        assert (replayed.steps, replayed.digest) == (run.finish.steps, run.finish.digest)

    def test_processes_with_other_hash_seeds_agree(self) -> None:
        digests = {
            subprocess.run(
                [sys.executable, __file__, mechanism],
                env={**os.environ, "PYTHONHASHSEED": hash_seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for hash_seed, mechanism in (("0", "native"), ("1", "native"), ("77", "reference"))
        }
        assert digests == {busy().finish.digest.hex()}


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"until_s": 0.0}, "until_s: expected seconds above 0, got 0.0"),
            ({"until_s": float("nan")}, "until_s: expected seconds above 0, got nan"),
            ({"report_interval_s": -1.0}, "report_interval_s: expected seconds from 0, got -1.0"),
            ({"report_interval_s": float("inf")}, "report_interval_s: expected seconds from 0, got inf"),
            ({"faults": [Fault(1.0, 3)]}, "fault.device: expected 0 to 0, got 3"),
        ],
    )
    def test_what_cannot_be_run(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Run(Script([]), **options)

    def test_no_devices(self) -> None:
        with pytest.raises(ConfigError, match="cluster: no devices"):
            SimDriver(Run(Script([])).plane, Script([]), [], Streams(1))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Fault(-1.0, 0),
            lambda: Fault(float("nan"), 0),
            lambda: Fault(1.0, 0, restart_after_s=-1.0),
            lambda: Fault(1.0, 0, "explode"),
            lambda: NetworkConfig(-1.0),
            lambda: NetworkConfig(0.0, float("nan")),
        ],
    )
    def test_faults_and_networks_that_cannot_be(self, make: Callable[[], object]) -> None:
        with pytest.raises(ConfigError, match=r"fault|network"):
            make()

    def test_a_device_that_wakes_in_the_past_is_named(self) -> None:
        class Late(Server):
            wakeup_at = Nanos(0)

            def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[e.AnyEvent]:
                return []

        run = Run(Script([(5, MS)]))
        driver = SimDriver(run.plane, Script([(5, MS)]), [lambda replica: Late(replica, lambda _: 1)], Streams(1))
        with pytest.raises(IllegalEvent, match="device 0 wants to wake at 0, not after"):
            driver.run()

    def test_a_policy_that_answers_nan_ends_the_run_with_its_name(self) -> None:
        fifo = preset("fifo")

        class Broken:
            static = False

            def score(self, now: Nanos, queued: Any) -> Any:
                return np.full(len(queued), np.nan)

        policies = {"broken": lambda: Policy("broken", None, Broken(), fifo.route, fifo.limit, fifo.predict)}
        with pytest.raises(PolicyError, match="order Broken: score of task 0 is NaN"):
            Run(Script([(5, MS)]), policy="broken", policies=policies).go()

    def test_rejected_requests_are_over(self) -> None:
        run = Run(Script([(0, MS, "summon"), (0, MS)])).go()
        assert [(now, command.request) for now, command in run.all(Reject)] == [(0, 0)]
        assert run.driver.counts.responded == 1


if __name__ == "__main__":
    print(busy(sys.argv[1]).finish.digest.hex())
