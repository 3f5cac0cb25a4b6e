"""The job manager by examples: one behaviour a test, instants in seconds. Random lives are in test_jobs_random.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sage_core.cluster import Gpu, Job, Needs, Node
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.job_lifecycle import JOB, LIVE, REPLICA, Dismissed, ReplicaPhase
from sage_core.jobs import (
    Cancelled,
    InstanceExited,
    InstanceHealthy,
    InstanceUnhealthy,
    JobAction,
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
    Stop,
    Submitted,
)
from sage_core.node_selector import NodeSelector
from sage_core.units import NEVER, SECOND, Nanos

CPU = Needs(2, 2)
OPTIONS: dict[str, Any] = {"jitter": 0.0, "grace_ns": 30 * SECOND}


def job(name: str = "j", replicas: int = 1, needs: Needs = CPU, **fields: Any) -> Job:
    return Job(name, "llm", "m", needs, replicas, **fields)


class Shop:
    """A manager over nodes a, b, ... of 4 CPUs each."""

    def __init__(self, nodes: int = 2, **options: Any) -> None:
        self.nodes = [Node(chr(ord("a") + i), 4, 16, (Gpu("l4", 24),)) for i in range(nodes)]
        self.manager = JobManager(NodeSelector(), self.nodes, JobOptions(**{**OPTIONS, **options}))
        self.now_s = 0.0

    def step(self, *events: JobEvent, at: float | None = None) -> list[JobAction]:
        self.now_s = self.now_s if at is None else at
        return self.manager.step(Nanos(round(self.now_s * SECOND)), events)

    def up(self, job: Job) -> list[int]:
        """Submit it and have every instance healthy: their ids."""
        ids = [each.instance for each in self.step(Submitted(job))]
        self.step(*(InstanceHealthy(each) for each in ids))
        return ids

    def state(self, name: str = "j") -> JobState:
        return self.manager.jobs()[name].state

    def reason(self, name: str = "j") -> str:
        return self.manager.jobs()[name].reason

    def phases(self, name: str = "j") -> list[str]:
        return [each.state.value for each in self.manager.jobs()[name].instances]

    @property
    def wakeup_s(self) -> float:
        return self.manager.wakeup_at / SECOND


def started(actions: Sequence[JobAction]) -> list[tuple[int, str]]:
    return [(each.instance, each.node) for each in actions if isinstance(each, Start)]


# --- from submission to health --------------------------------------------------------------------------------------------


def test_a_job_is_placed_started_and_healthy() -> None:
    shop = Shop()
    needs = Needs(1, 1, gpus=1)
    assert shop.step(Submitted(job(needs=needs))) == [Start(0, "j", "a", (0,), needs)]
    assert shop.state() is JobState.STARTING and shop.wakeup_s == 600
    assert shop.step(InstanceHealthy(0), at=5) == []
    assert shop.state() is JobState.HEALTHY and shop.manager.wakeup_at == NEVER
    status = shop.manager.jobs()["j"].instances[0]
    assert (status.id, status.node, status.gpus, status.restarts, status.reason) == (0, "a", (0,), 0, "")


def test_what_has_no_place_waits_says_why_and_starts_when_there_is_one() -> None:
    shop = Shop(1)
    first = shop.up(job("first", 2))
    assert shop.step(Submitted(job("second", needs=Needs(4, 1)))) == []
    assert shop.state("second") is JobState.SUBMITTED
    assert shop.reason("second") == "no node has room: a: 0 of 4 CPUs free"
    shop.step(Cancelled("first"))
    assert shop.step(InstanceExited(first[0], "done")) == []
    assert started(shop.step(InstanceExited(first[1], "done"))) == [(2, "a")]
    assert shop.step(NodeJoined(Node("z", 1, 1))) == []


def test_those_who_wait_are_placed_by_priority_then_size() -> None:
    shop = Shop(0)
    shop.step(
        Submitted(job("small")), Submitted(job("large", needs=Needs(4, 4))), Submitted(job("urgent", priority=-1))
    )
    assert shop.reason("small") == "no node has room: the cluster has no nodes"
    assert [each.job for each in shop.step(NodeJoined(Node("a", 8, 16))) if isinstance(each, Start)] == [
        "urgent",
        "large",
        "small",
    ]


def test_a_node_starts_so_many_at_one_time() -> None:
    shop = Shop(2, starting_max=1)
    assert started(shop.step(Submitted(job(replicas=4)))) == [(0, "a"), (1, "b")]
    assert shop.state() is JobState.PLACED
    assert started(shop.step(InstanceHealthy(1))) == [(2, "b")]
    assert started(shop.step(InstanceExited(0, "x"))) == [(3, "a")]  # it is in backoff, and the next one's turn


# --- crashes --------------------------------------------------------------------------------------------------------------


def test_a_crash_is_followed_by_a_delay_that_doubles_up_to_the_limit_in_the_same_place() -> None:
    shop = Shop(crashes_max=99, backoff_max_ns=5 * SECOND)
    shop.step(Submitted(job()))
    delays = []
    for instance in range(5):
        shop.step(InstanceExited(instance, "exit code 1"))
        assert shop.state() is JobState.UNHEALTHY and shop.reason() == "exit code 1"
        delays.append(shop.wakeup_s - shop.now_s)
        assert shop.step(at=shop.wakeup_s - 1e-6) == []
        again = shop.step(at=shop.wakeup_s)
        assert started(again) == [(instance + 1, "a")]
    assert delays == [1, 2, 4, 5, 5]
    assert shop.manager.jobs()["j"].instances[0].restarts == 5


@pytest.mark.parametrize(("healthy_s", "delay_s"), [(599, 4), (600, 1)])
def test_after_a_stable_time_the_delay_starts_from_the_beginning(healthy_s: float, delay_s: float) -> None:
    shop = Shop()
    shop.step(Submitted(job()))
    for instance in range(2):
        shop.step(InstanceExited(instance, "x"))
        shop.step(at=shop.wakeup_s)
    shop.step(InstanceHealthy(2))
    shop.step(InstanceExited(2, "x"), at=shop.now_s + healthy_s)
    assert shop.wakeup_s - shop.now_s == delay_s


def test_jitter_shortens_the_delay_and_comes_from_the_seed() -> None:
    def delay(seed: int) -> float:
        shop = Shop(jitter=0.5, seed=seed)
        shop.step(Submitted(job()))
        shop.step(InstanceExited(0, "x"))
        return shop.wakeup_s

    delays = [delay(seed) for seed in range(8)]
    assert all(0.5 <= each <= 1 for each in delays) and len(set(delays)) == 8
    assert delays == [delay(seed) for seed in range(8)]


def test_a_crash_loop_fails_keeps_its_reason_and_gives_its_place_back() -> None:
    shop = Shop(1, crashes_max=3)
    shop.step(Submitted(job(needs=Needs(4, 1))), Submitted(job("next", needs=Needs(3, 1))))
    for instance in range(3):
        actions = shop.step(InstanceExited(instance, "CUDA out of memory"))
        if instance < 2:
            shop.step(at=shop.wakeup_s)
    assert shop.state() is JobState.FAILED
    assert shop.reason() == "crashed 3 times within 3600 s, last: CUDA out of memory"
    assert started(actions) == [(3, "a")]  # the next job, in its place
    assert shop.step(at=shop.now_s + 10_000) == [Kill(3, "a")]  # which never got healthy; the failed one stays down
    shop.step(Cancelled("next"), InstanceExited(3, "killed"))
    assert started(shop.step(RestartAsked("j"))) == [(4, "a")]


def test_old_crashes_do_not_count() -> None:
    shop = Shop(crashes_max=2, crash_window_ns=100 * SECOND)
    shop.step(Submitted(job()))
    for instance in range(4):
        shop.step(InstanceExited(instance, "x"), at=shop.now_s + 200)
        shop.step(at=shop.wakeup_s)
    assert shop.state() is JobState.STARTING


def test_what_does_not_start_in_time_is_killed_until_it_exits_and_counts_as_a_crash() -> None:
    shop = Shop()
    shop.step(Submitted(job()))
    assert shop.step(at=599) == []
    assert shop.step(at=600) == [Kill(0, "a")]
    assert shop.step(InstanceHealthy(0), at=605) == []  # too late
    assert shop.step(at=610) == [Kill(0, "a")]
    shop.step(InstanceExited(0, "signal 9"), at=611)
    assert shop.phases() == ["backoff"] and shop.reason() == "not healthy within 600 s of its start"


def test_what_stays_unhealthy_is_stopped_and_started_again() -> None:
    shop = Shop()
    shop.up(job())
    shop.step(InstanceUnhealthy(0, "no answer"), at=10)
    assert shop.state() is JobState.UNHEALTHY and shop.reason() == "no answer"
    shop.step(InstanceUnhealthy(0, "still none"), at=50)
    shop.step(InstanceHealthy(0), at=60)
    assert shop.state() is JobState.HEALTHY and shop.reason() == "" and shop.manager.wakeup_at == NEVER
    shop.step(InstanceUnhealthy(0, "no answer"), at=70)
    assert shop.step(at=130) == [Stop(0, "a", 30 * SECOND)]
    assert shop.state() is JobState.UNHEALTHY
    assert shop.step(at=160) == [Kill(0, "a")]
    shop.step(InstanceExited(0, "signal 9"), at=161)
    assert shop.reason() == "unhealthy for 60 s: no answer" and shop.phases() == ["backoff"]


# --- what is asked for ----------------------------------------------------------------------------------------------------


def test_cancelling_drains_then_kills_and_frees_the_room() -> None:
    shop = Shop(1)
    shop.up(job(replicas=2))
    assert shop.step(Cancelled("j"), at=1) == [Stop(1, "a", 30 * SECOND), Stop(0, "a", 30 * SECOND)]
    assert shop.state() is JobState.DRAINING
    shop.step(InstanceExited(0, "done"), at=2)
    assert shop.step(at=31) == [Kill(1, "a")]
    assert shop.manager.capacity.cpus_free.tolist() == [2000]
    shop.step(InstanceExited(1, "signal 9"), at=32)
    assert shop.state() is JobState.STOPPED and shop.manager.capacity.cpus_free.tolist() == [4000]
    assert started(shop.step(Submitted(job()))) == [(2, "a")]  # the name is free again


def test_a_paused_job_gives_its_places_back_and_comes_back() -> None:
    shop = Shop()
    shop.up(job())
    assert shop.step(Paused("j")) == [Stop(0, "a", 30 * SECOND)]
    shop.step(InstanceExited(0, "done"))
    assert shop.state() is JobState.PAUSED and shop.manager.capacity.replicas.tolist() == [0, 0]
    shop.step(Scaled("j", 2))
    assert [node for _, node in started(shop.step(Resumed("j")))] == ["a", "a"]


def test_scaling_up_starts_and_scaling_down_stops_those_of_least_use() -> None:
    shop = Shop()
    shop.up(job(replicas=2))
    assert started(shop.step(Scaled("j", 4))) == [(2, "b"), (3, "b")]
    shop.step(InstanceHealthy(3))
    assert shop.step(Scaled("j", 2)) == [Stop(2, "b", 30 * SECOND), Stop(3, "b", 30 * SECOND)]
    shop.step(InstanceExited(2, ""), InstanceExited(3, ""))
    assert shop.state() is JobState.HEALTHY and shop.phases() == ["healthy", "healthy"]


def test_a_rolling_restart_waits_for_each_replacement_to_be_healthy() -> None:
    shop = Shop()
    shop.up(job(replicas=3))
    assert shop.step(RestartAsked("j")) == [Stop(0, "a", 30 * SECOND)]
    assert shop.step(InstanceHealthy(1)) == []
    assert started(shop.step(InstanceExited(0, "done"))) == [(3, "a")]
    assert shop.phases() == ["starting", "healthy", "healthy"]
    assert shop.step(InstanceUnhealthy(3, "loading"), InstanceHealthy(2)) == []
    assert shop.step(InstanceHealthy(3)) == [Stop(1, "a", 30 * SECOND)]
    assert started(shop.step(InstanceExited(1, "done"))) == [(4, "a")]
    shop.step(InstanceExited(4, "crash"))  # the replacement crashed: the last one stays up
    assert started(shop.step(at=shop.wakeup_s)) == [(5, "a")]
    assert shop.step(InstanceHealthy(5)) == [Stop(2, "b", 30 * SECOND)]
    assert started(shop.step(InstanceExited(2, "done"))) == [(6, "b")]
    assert shop.step(InstanceHealthy(6)) == [] and shop.state() is JobState.HEALTHY


def test_a_rolling_restart_replaces_first_what_is_down_anyway() -> None:
    shop = Shop()
    shop.up(job(replicas=2))
    shop.step(InstanceUnhealthy(1, "x"))
    assert shop.step(RestartAsked("j")) == [Stop(1, "a", 30 * SECOND)]


def test_the_place_of_what_is_being_replaced_is_not_given_away() -> None:
    shop = Shop(1)
    shop.up(job(needs=Needs(4, 1)))
    shop.step(RestartAsked("j"), Submitted(job("thief", priority=-9)))
    assert started(shop.step(InstanceExited(0, "done"))) == [(1, "a")] and shop.state("thief") is JobState.SUBMITTED


# --- nodes ----------------------------------------------------------------------------------------------------------------


def test_what_ran_on_a_lost_node_starts_elsewhere_at_once_and_late_news_of_it_is_ignored() -> None:
    shop = Shop()
    shop.up(job(replicas=2))
    assert started(shop.step(NodeLeft("a"))) == [(2, "b"), (3, "b")]
    assert shop.step(InstanceExited(0, "lost"), InstanceHealthy(1)) == []
    assert shop.phases() == ["starting", "starting"] and shop.manager.jobs()["j"].instances[0].restarts == 1


def test_what_was_to_end_has_ended_with_its_node() -> None:
    shop = Shop()
    shop.up(job())
    shop.step(Cancelled("j"))
    assert shop.step(NodeLeft("a")) == [] and shop.state() is JobState.STOPPED


def test_a_node_that_comes_back_is_used() -> None:
    shop = Shop(1)
    shop.up(job())
    assert shop.step(NodeLeft("a")) == [] and shop.state() is JobState.SUBMITTED
    assert started(shop.step(NodeJoined(shop.nodes[0]))) == [(1, "a")]


# --- what cannot happen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (InstanceHealthy(7), "instance 7: InstanceHealthy, but it was never started"),
        (InstanceExited(-1, ""), "instance -1: InstanceExited, but it was never started"),
        (Submitted(job()), "job 'j': Submitted, but there is one of that name; cancel it first"),
        (Cancelled("x"), "job 'x': Cancelled, but there is no such job"),
        (Resumed("j"), "job 'j': Resumed cannot happen while running"),
        (Scaled("j", 0), "job 'j': expected 1 replica or more, got 0; pause it instead"),
        (NodeJoined(Node("a", 1, 1)), "node 'a': NodeJoined, but it is there already"),
        (NodeLeft("x"), "node 'x': NodeLeft, but it is not there"),
    ],
)
def test_an_illegal_event_is_named_and_changes_nothing(event: JobEvent, told: str) -> None:
    shop = Shop()
    shop.up(job())
    shop.up(job("other"))
    before = shop.manager.snapshot()
    with pytest.raises(IllegalEvent, match=told.replace(".", r"\.")):
        shop.step(event)
    assert shop.manager.snapshot() == before


def test_what_happened_before_an_illegal_event_is_not_lost() -> None:
    shop = Shop()
    with pytest.raises(IllegalEvent):
        shop.step(Submitted(job()), Cancelled("x"))
    assert started(shop.step()) == [(0, "a")]


def test_time_does_not_go_back() -> None:
    shop = Shop()
    shop.step(at=5)
    with pytest.raises(IllegalEvent, match="time went back"):
        shop.step(at=4)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"jobs\.grace_ns: expected 1 ns or more, got 0"):
        JobOptions(grace_ns=0)
    with pytest.raises(ConfigError, match="crashes_max from 1"):
        JobOptions(crashes_max=0)


def test_a_snapshot_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="snapshot of jobs: "):
        JobManager.restore(NodeSelector(), b"\x81")


# --- the tables -----------------------------------------------------------------------------------------------------------


def test_every_phase_can_be_left_but_the_last_and_every_replica_can_be_dismissed() -> None:
    left = {phase for phase, _ in REPLICA}
    assert left == set(ReplicaPhase) - {ReplicaPhase.STOPPED}
    reached = {ReplicaPhase.SUBMITTED, *REPLICA.values()}
    assert reached == set(ReplicaPhase)
    undismissed = {phase for phase in left if (phase, Dismissed) not in REPLICA}
    assert undismissed == {ReplicaPhase.STARTING, ReplicaPhase.HEALTHY, ReplicaPhase.UNHEALTHY}  # those drain first
    assert all((phase, Stop) in REPLICA for phase in undismissed) and undismissed < LIVE
    assert {phase for phase, _ in JOB} < {*JOB.values()}
