"""Jobs in virtual time: how long things take follows from the spans, to the nanosecond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sage_core.cluster import Job, Needs, Node
from sage_core.jobs import JobEvent, JobManager, JobOptions, JobState, NodeJoined, NodeLeft, RestartAsked, Submitted
from sage_core.node_selector import NodeSelector
from sage_core.rng import Streams
from sage_core.units import NEVER, SECOND, Nanos
from sage_sim.job_actuator import JobChange, SimulatedActuator, Span

STARTUP, DRAIN = 40 * SECOND, 5 * SECOND
NODES = [Node("a", 4, 16), Node("b", 4, 16)]


def job(replicas: int = 1, cpus: float = 2) -> Job:
    return Job("j", "llm", "m", Needs(cpus, 2), replicas)


def lived(
    scheduled: Sequence[tuple[float, JobEvent]], until_s: float, uptime: Span | None = None, **options: Any
) -> list[JobChange]:
    manager = JobManager(NodeSelector(), NODES, JobOptions(jitter=0.0, **options))
    actuator = SimulatedActuator(manager, lambda _: STARTUP, lambda _: DRAIN, uptime)
    actuator.run([(Nanos(round(at * SECOND)), event) for at, event in scheduled], Nanos(round(until_s * SECOND)))
    return actuator.changes


def told(changes: Sequence[JobChange]) -> list[tuple[float, str, int]]:
    return [(each.at / SECOND, each.state.value, each.healthy) for each in changes]


def test_a_job_is_healthy_after_its_start_up() -> None:
    assert told(lived([(1, Submitted(job(2)))], 100)) == [(1, "starting", 0), (41, "healthy", 2)]


def test_a_rolling_restart_takes_a_drain_and_a_start_up_a_replica_and_never_lacks_more_than_one() -> None:
    changes = told(lived([(0, Submitted(job(3))), (100, RestartAsked("j"))], 1000))
    assert min(healthy for at, _, healthy in changes if at >= 40) == 2
    assert changes[-1] == (100 + 3 * (5 + 40), "healthy", 3)


def test_what_a_lost_node_ran_is_healthy_elsewhere_a_start_up_later() -> None:
    changes = told(lived([(0, Submitted(job(2))), (100, NodeLeft("a"))], 1000))
    assert changes[2:] == [(100, "starting", 0), (140, "healthy", 2)]


def test_without_room_elsewhere_it_waits_for_the_node() -> None:
    changes = told(lived([(0, Submitted(job(2, 4))), (100, NodeLeft("a")), (200, NodeJoined(NODES[0]))], 1000))
    assert changes[2:] == [(100, "submitted", 1), (200, "starting", 1), (240, "healthy", 2)]


def test_what_starts_slower_than_it_may_fails_in_the_end() -> None:
    changes = lived([(0, Submitted(job()))], 1000, start_timeout_ns=30 * SECOND, crashes_max=3)
    assert [each.state for each in changes] == [JobState.STARTING, *[JobState.UNHEALTHY, JobState.STARTING] * 2, *[JobState.UNHEALTHY, JobState.FAILED]]  # fmt: skip
    assert changes[-1].at == (30 + 1 + 30 + 2 + 30) * SECOND


def uptimes(seed: int) -> Callable[..., int]:
    random = Streams(seed).stream("crashes")
    return lambda _: round(random.exponential(300) * SECOND)


def test_crashes_from_a_seed_are_the_same_each_time() -> None:
    one, again, other = (lived([(0, Submitted(job(4)))], 3600, uptimes(seed)) for seed in (1, 1, 2))
    assert one == again != other and sum(each.state is JobState.UNHEALTHY for each in one) > 10


def test_never_is_never() -> None:
    assert len(lived([(0, Submitted(job()))], 3600, lambda _: NEVER)) == 2
