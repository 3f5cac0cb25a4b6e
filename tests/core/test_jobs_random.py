"""The job manager through random lives: a world that carries out its actions, and counts for itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.cluster import Gpu, Job, Needs, Node, Strategy
from sage_core.job_lifecycle import LIVE, ReplicaPhase
from sage_core.jobs import (
    Cancelled,
    InstanceExited,
    InstanceHealthy,
    InstanceUnhealthy,
    JobEvent,
    JobManager,
    JobOptions,
    JobState,
    Kill,
    NodeJoined,
    NodeLeft,
    Paused,
    RestartAsked,
    Resumed,
    Scaled,
    Start,
    Submitted,
)
from sage_core.node_selector import STRATEGIES, NodeSelector
from sage_core.rng import Streams
from sage_core.units import NEVER, SECOND, Nanos

LABELS: tuple[dict[str, str], ...] = ({}, {"zone": "x"}, {"zone": "y"})
OPTIONS = JobOptions(crashes_max=3, crash_window_ns=600 * SECOND, stable_ns=60 * SECOND, start_timeout_ns=120 * SECOND)


def random_node(name: str, random: np.random.Generator) -> Node:
    gpus = tuple(Gpu(("l4", "t4")[k], 24.0, int(random.integers(1, 4))) for k in range(int(random.integers(0, 3))))
    return Node(
        name, float(random.choice([4, 8, 16])), 64.0, gpus, float(random.integers(1, 5)), LABELS[random.integers(0, 3)]
    )


def random_job(name: str, random: np.random.Generator) -> Job:
    alternatives = []
    for _ in range(int(random.integers(1, 3))):
        cpus, memory = float(random.choice([0.3, 1, 2])), float(random.choice([0.5, 2, 10]))
        labels = LABELS[random.integers(0, 3)] if random.random() < 0.3 else {}
        if random.random() < 0.5:
            kind = (None, "l4", "t4")[random.integers(0, 3)]
            each = float(random.choice([0, 6, 11]))
            alternatives.append(Needs(cpus, memory, int(random.integers(1, 3)), each, kind, labels))
        else:
            alternatives.append(Needs(cpus, memory, labels=labels))
    apart = (f"j{random.integers(0, 12)}",) if random.random() < 0.3 else ()
    service = ("llm", "embedding")[random.integers(0, 2)]
    replicas, anti = int(random.integers(1, 5)), bool(random.random() < 0.3)
    return Job(name, service, "m", tuple(alternatives), replicas, anti, apart, priority=int(random.integers(0, 3)))


class World:
    """What the actuator would see. Every invariant is checked from actions and events, not from the manager's own books."""

    def __init__(self, strategy: Strategy, seed: int) -> None:
        self.random = Streams(seed).stream("world")
        self.strategy: Strategy = strategy
        self.nodes = {f"n{i}": random_node(f"n{i}", self.random) for i in range(5)}
        self.away: dict[str, Node] = {}
        self.manager = JobManager(NodeSelector(strategy), [*self.nodes.values()], OPTIONS)
        self.now = 0
        self.live: dict[int, tuple[Job, Start]] = {}
        self.jobs: dict[str, Job] = {}
        self.states: dict[str, str] = {}  # of each job, what was asked for: running, paused, cancelled
        self.stopping: set[int] = set()
        self.issued = 0
        self.events = 0

    def step(self, events: list[JobEvent], later: int) -> None:
        self.now += later
        self.events += len(events)
        actions = self.manager.step(Nanos(self.now), events)
        for action in actions:
            match action:
                case Start():
                    assert action.instance == self.issued, "ids are dense and never used again"
                    self.issued += 1
                    self.live[action.instance] = (self.jobs[action.job], action)
                case Kill():
                    assert action.instance in self.live
                    self.stopping.add(action.instance)
                case _:
                    assert action.instance in self.live and action.instance not in self.stopping
                    self.stopping.add(action.instance)
        assert self.manager.wakeup_at > self.now, "a wakeup that is already past would spin"

    def check(self) -> None:
        """Nothing over capacity, nothing where it cannot run, nothing lost, nothing twice."""
        statuses = self.manager.jobs()
        assert set(statuses) == set(self.jobs)
        seen: list[int] = []
        for name, status in statuses.items():
            assert status.job == self.jobs[name] and isinstance(status.state, JobState)
            ids = [each.id for each in status.instances if each.id is not None]
            assert len({each.replica for each in status.instances}) == len(status.instances)
            assert all((each.id is not None) == (each.state in LIVE) for each in status.instances)
            placeless = (ReplicaPhase.SUBMITTED, ReplicaPhase.FAILED)
            assert all((each.node is None) == (each.state in placeless) for each in status.instances)
            going = [each for each in status.instances if each.id in self.stopping]
            if status.state in (JobState.STOPPED, JobState.PAUSED):
                assert not status.instances
            elif status.state is not JobState.DRAINING:
                assert len(status.instances) - len(going) <= status.job.replicas <= len(status.instances)
            seen += ids
        assert sorted(seen) == sorted(self.live), "an instance was lost, or made up"
        for name, node in self.nodes.items():
            self._check_node(node, [(job, start) for job, start in self.live.values() if start.node == name])
        assert {start.node for _, start in self.live.values()} <= set(self.nodes)

    def _check_node(self, node: Node, on: list[tuple[Job, Start]]) -> None:
        gpus = [(gpu.type, gpu.memory_gib) for gpu in node.gpus for _ in range(gpu.count)]
        assert sum(start.needs.cpus for _, start in on) <= node.cpus + 1e-6
        assert sum(start.needs.memory_gib for _, start in on) <= node.memory_gib
        taken: Counter[int] = Counter()
        for job, start in on:
            assert start.needs in job.alternatives and len(set(start.gpus)) == start.needs.gpus
            assert node.labels.items() >= start.needs.labels.items()
            assert start.needs.gpu_type in (None, *(gpus[each][0] for each in start.gpus))
            assert len({gpus[each][0] for each in start.gpus}) <= 1
            for each in start.gpus:
                taken[each] += start.needs.gpu_memory_gib or gpus[each][1]  # type: ignore[assignment]
        assert all(used <= gpus[each][1] for each, used in taken.items())
        names = Counter(job.name for job, _ in on)
        for job, _ in on:
            assert not (job.anti_affinity and names[job.name] > 1)
            assert not any(names[other] for other in job.apart_from if other != job.name)

    # --- random but possible events -----------------------------------------------------------------------------------

    def wander(self, events: int, *, check_every: int = 1) -> None:
        goal, steps = self.events + events, 0
        while self.events < goal:
            batch: list[JobEvent] = []
            for _ in range(1 + int(self.random.integers(0, 3))):
                batch += self._event()
            wakeup = self.manager.wakeup_at
            later = int(self.random.integers(0, 10 * SECOND))
            if wakeup < NEVER and self.random.random() < 0.5:
                later = wakeup - self.now
            self.step(batch, later)
            steps += 1
            if steps % check_every == 0:
                self.check()

    def _event(self) -> list[JobEvent]:
        draw, random = float(self.random.random()), self.random
        live = [*self.live]
        states = self.states
        pick: Any = lambda among: among[int(random.integers(0, len(among)))]  # noqa: E731
        running = [name for name, state in states.items() if state == "running"]
        if draw < 0.40 and live:
            return [InstanceHealthy(pick(live))]
        if draw < 0.50 and live:
            return [InstanceUnhealthy(pick(live), "no answer")]
        if draw < 0.72 and live:
            stopping = sorted(self.stopping & set(live))
            gone = pick(stopping) if stopping and random.random() < 0.7 else pick(live)
            self._gone(gone)
            return [InstanceExited(gone, "exited")]
        if draw < 0.76 and self.issued:
            return (
                [InstanceExited(int(gone), "late")]
                if (gone := random.integers(0, self.issued)) not in self.live
                else []
            )
        if draw < 0.82:
            name = f"j{random.integers(0, 12)}"
            status = self.manager.jobs().get(name)
            if name in states and (
                states[name] != "cancelled" or status is None or status.state is not JobState.STOPPED
            ):
                return []
            job = random_job(name, random)
            self.jobs.pop(name, None)
            self.jobs[name], states[name] = job, "running"
            return [Submitted(job)]
        if draw < 0.86 and running:
            name, replicas = pick(running), int(random.integers(1, 6))
            self._now_is(name, replicas)
            return [Scaled(name, replicas)]
        if draw < 0.89 and running:
            return [RestartAsked(pick(running))]
        if draw < 0.92 and states:
            name = pick([*states])
            return self._switch(name, states)
        if draw < 0.94 and running:
            name = pick(running)
            states[name] = "cancelled"
            return [Cancelled(name)]
        if draw < 0.97 and len(self.nodes) > 1:
            name = pick([*self.nodes])
            self.away[name] = self.nodes.pop(name)
            for instance in [each for each, (_, start) in self.live.items() if start.node == name]:
                self._gone(instance)
            return [NodeLeft(name)]
        if self.away:
            name = pick([*self.away])
            del self.away[name]
            self.nodes[name] = random_node(name, random)
            return [NodeJoined(self.nodes[name])]
        return []

    def _switch(self, name: str, states: dict[str, str]) -> list[JobEvent]:
        if states[name] == "running":
            states[name] = "paused"
            return [Paused(name)]
        if states[name] == "paused":
            states[name] = "running"
            return [Resumed(name)]
        return []

    def _now_is(self, name: str, replicas: int) -> None:
        before = self.jobs[name]
        self.jobs[name] = Job(
            name, before.service, before.model, before.needs, replicas, before.anti_affinity, before.apart_from,
            priority=before.priority,
        )  # fmt: skip

    def _gone(self, instance: int) -> None:
        del self.live[instance]
        self.stopping.discard(instance)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(STRATEGIES), st.integers(0, 2**32))
def test_random_lives_keep_every_rule(strategy: Strategy, seed: int) -> None:
    World(strategy, seed).wander(120)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(STRATEGIES), st.integers(0, 2**32), st.integers(1, 80))
def test_a_restored_manager_goes_on_as_the_first_would_have(strategy: Strategy, seed: int, events: int) -> None:
    one, other = World(strategy, seed), World(strategy, seed)
    one.wander(events)
    other.wander(events)
    assert one.manager.snapshot() == other.manager.snapshot(), "not deterministic"
    other.manager = JobManager.restore(NodeSelector(strategy), other.manager.snapshot())
    assert other.manager.wakeup_at == one.manager.wakeup_at
    one.wander(80)
    other.wander(80)
    assert one.live == other.live and one.now == other.now
    assert one.manager.snapshot() == other.manager.snapshot()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_when_nothing_more_goes_wrong_every_job_that_fits_is_healthy(strategy: Strategy) -> None:
    world = World(strategy, seed=11)
    world.wander(2_000, check_every=50)
    for _ in range(400):
        events: list[JobEvent] = [InstanceHealthy(each) for each in world.live if each not in world.stopping]
        for gone in sorted(world.stopping & set(world.live)):
            world._gone(gone)
            events.append(InstanceExited(gone, "done"))
        later = min(world.manager.wakeup_at - world.now, SECOND)
        world.step(events, later)
    world.check()
    settled = {
        JobState.HEALTHY,
        JobState.PAUSED,
        JobState.STOPPED,
        JobState.FAILED,
        JobState.SUBMITTED,
        JobState.UNHEALTHY,
    }
    for name, status in world.manager.jobs().items():
        assert status.state in settled, name
        for each in status.instances:
            phases = (ReplicaPhase.HEALTHY, ReplicaPhase.FAILED, ReplicaPhase.SUBMITTED)
            assert each.state in phases, f"{name}: {each}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hundred_thousand_events_in_all_break_no_rule(strategy: Strategy) -> None:
    world = World(strategy, seed=2026)
    world.wander(25_000, check_every=10)
    assert world.issued > 1_000
