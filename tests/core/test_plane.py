"""The control plane, one rule a test."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond
from sage_core.errors import ConfigError, IllegalEvent, InvariantViolation, PolicyError
from sage_core.native_plane import Plane
from sage_core.native_plane import make_plane as plane_of
from sage_core.pipeline import Pipeline
from sage_core.policy import Limits, QueueView, ReplicaView, Scores, TaskView
from sage_core.units import NEVER, Nanos, task_id
from sage_policies.presets import preset

Ask = Callable[..., e.RequestArrived]
Join = Callable[..., e.ReplicaJoined]
MakePlane = Callable[..., Plane]


def dispatched(commands: list[AnyCommand]) -> list[tuple[int, list[int]]]:
    """(replica, tasks) of each Dispatch."""
    return [(c.replica, [task.task for task in c.tasks]) for c in commands if isinstance(c, Dispatch)]


@pytest.fixture(params=["native", "reference"])
def plane(request: pytest.FixtureRequest, make_plane: MakePlane) -> Plane:
    """FIFO, three attempts."""
    return make_plane(mechanism=request.param)


@dataclass
class RefuseLong:
    """Admits inputs of up to ``most`` tokens."""

    most: int
    retry_after_ns: int = 7_000

    def score(self, now: Nanos, arrivals: TaskView, replicas: ReplicaView) -> Scores:
        return np.where(arrivals.input_tokens > self.most, math.inf, 0.0)


def plane_with(pipelines: dict[str, Pipeline], mechanism: str = "native", **parts: Any) -> Plane:
    """A plane under ``fifo`` with some parts replaced."""
    return plane_of(mechanism, pipelines, {"mine": lambda: replace(preset("fifo"), **parts)}, "mine")


class TestRequests:
    def test_a_request_is_dispatched_when_it_arrives_and_answered_when_its_task_ends(
        self, plane: Plane, ask: Ask, join: Join
    ) -> None:
        commands = plane.step(Nanos(5), [join(0), ask(0, input_tokens=9, output_tokens_max=3, priority=2, prefix=8)])
        (sent,) = commands
        assert isinstance(sent, Dispatch)
        (task,) = sent.tasks
        assert (sent.replica, task.task, task.stage, task.attempt) == (0, task_id(0, 0), 0, 0)
        assert (task.priority, task.queued_at, task.input_tokens, task.output_tokens_max, task.prefix) == (
            2,
            5,
            9,
            3,
            8,
        )
        assert plane.step(Nanos(6), [e.TokensProduced(task.task, 1)]) == []
        assert plane.step(Nanos(9), [e.TaskFinished(task.task, 3)]) == [Respond(0)]
        assert (plane.counts.arrived, plane.counts.responded, plane.counts.decisions) == (1, 1, 1)
        assert plane.live == 0

    def test_an_unknown_pipeline_is_rejected_by_name(self, plane: Plane, ask: Ask) -> None:
        assert plane.step(Nanos(0), [ask(0, "summon")]) == [Reject(0, "unknown pipeline summon", 0)]
        assert (plane.counts.arrived, plane.counts.rejected, plane.live) == (1, 1, 0)
        assert plane.step(Nanos(0), [e.RequestCancelled(0)]) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"request": 0}, "request 0 arrived twice"),
            ({"scheduled_at": 11}, "invariant 4: request 1 is scheduled at 11, after 10"),
            ({"input_tokens": -1}, "request 1: token counts must be from 0"),
            ({"output_tokens_max": -1}, "request 1: token counts must be from 0"),
            ({"input_tokens": 1 << 41}, f"request 1: token counts must be from 0 to {1 << 40}"),
            ({"output_tokens_max": 2**62}, f"request 1: token counts must be from 0 to {1 << 40}"),
            ({"kind": 3}, "request 1: kind 3 is not a RequestKind"),
            ({"kind": -1}, "request 1: kind -1 is not a RequestKind"),
        ],
    )
    def test_an_impossible_arrival_is_the_drivers_fault(
        self, plane: Plane, ask: Ask, changes: dict[str, int], message: str
    ) -> None:
        plane.step(Nanos(10), [ask(0)])
        with pytest.raises(IllegalEvent, match=message):
            plane.step(Nanos(10), [ask(**{"request": 1, **changes})])

    def test_cancelled_while_queued_leaves_nothing_behind(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [ask(0), ask(1)])
        assert plane.tasks_queued == 2
        assert plane.step(Nanos(1), [e.RequestCancelled(0)]) == []
        assert (plane.tasks_queued, plane.live, plane.counts.cancelled) == (1, 1, 1)
        assert dispatched(plane.step(Nanos(2), [join(0)])) == [(0, [task_id(1, 0)])]

    def test_cancelled_while_in_flight_stops_the_task_where_it_is(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(3, tasks_max=1), ask(0), ask(1)])
        commands = plane.step(Nanos(1), [e.RequestCancelled(0)])
        assert commands[0] == Cancel(3, task_id(0, 0))
        assert dispatched(commands) == [(3, [task_id(1, 0)])]  # its place is free at once
        plane.check()

    def test_a_cancelled_pipeline_stops_every_branch(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0, "cpu"), join(1, "embed"), ask(0, "fan")])
        commands = plane.step(Nanos(1), [e.RequestCancelled(0)])
        assert commands == [Cancel(0, task_id(0, 0)), Cancel(1, task_id(0, 1))]

    def test_cancelled_in_the_step_it_arrives_in(self, plane: Plane, ask: Ask, join: Join) -> None:
        assert plane.step(Nanos(0), [join(0), ask(0), e.RequestCancelled(0)]) == []
        assert (plane.counts.arrived, plane.counts.cancelled, plane.tasks_queued) == (1, 1, 0)

    def test_cancelled_before_it_arrived_is_impossible(self, plane: Plane) -> None:
        with pytest.raises(IllegalEvent, match="invariant 4: request 0 was cancelled before it arrived"):
            plane.step(Nanos(0), [e.RequestCancelled(0)])

    def test_late_news_of_an_ended_request_change_nothing(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        task = task_id(0, 0)
        plane.step(Nanos(1), [e.TaskFinished(task, 1)])
        late: list[e.AnyEvent] = [
            e.TokensProduced(task, 1),
            e.TaskFinished(task, 2),
            e.TaskFailed(task, "late", True),
            e.RequestCancelled(0),
        ]
        assert plane.step(Nanos(2), late) == []
        assert (plane.counts.responded, plane.counts.cancelled, plane.counts.failed) == (1, 0, 0)

    @pytest.mark.parametrize(
        "event",
        [e.TokensProduced(task_id(4, 0), 1), e.TaskFinished(task_id(4, 0), 1), e.TaskFailed(task_id(4, 0), "x", True)],
        ids=lambda event: type(event).__name__,
    )
    def test_news_of_a_request_never_seen_are_impossible(self, plane: Plane, ask: Ask, event: e.AnyEvent) -> None:
        plane.step(Nanos(0), [ask(3)])
        with pytest.raises(IllegalEvent, match=rf"invariant 4: task {task_id(4, 0)} belongs to no request"):
            plane.step(Nanos(1), [event])

    @pytest.mark.parametrize(
        "event",
        [e.TokensProduced(0, 1), e.TaskFinished(0, 1), e.TaskFailed(0, "x", True)],
        ids=lambda event: type(event).__name__,
    )
    def test_news_of_a_task_that_was_never_sent_are_impossible(self, plane: Plane, ask: Ask, event: e.AnyEvent) -> None:
        plane.step(Nanos(0), [ask(0)])
        with pytest.raises(IllegalEvent, match=f"task 0: {type(event).__name__} cannot happen while queued"):
            plane.step(Nanos(1), [event])

    @pytest.mark.parametrize("tokens", [-1, 2**62])
    def test_an_output_of_no_possible_length(self, plane: Plane, ask: Ask, join: Join, tokens: int) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        with pytest.raises(IllegalEvent, match=f"task 0 finished with {tokens} output tokens"):
            plane.step(Nanos(1), [e.TaskFinished(0, tokens)])


class TestTime:
    def test_time_going_back_is_impossible(self, plane: Plane) -> None:
        plane.step(Nanos(10), [])
        plane.step(Nanos(10), [])
        with pytest.raises(IllegalEvent, match="invariant 5: time went back from 10 to 9"):
            plane.step(Nanos(9), [])

    def test_something_that_is_not_an_event(self, plane: Plane) -> None:
        with pytest.raises(IllegalEvent, match="not an event: 'hello'"):
            plane.step(Nanos(0), ["hello"])  # type: ignore[list-item]

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_what_is_held_back_is_decided_at_the_wakeup(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        class Hold:
            def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
                most = np.full(len(replicas), NEVER)
                return Limits(most, most, most, most, np.full(len(replicas), queue.oldest_queued_at + 50))

        plane = plane_with(pipelines, mechanism, limit=Hold())
        assert plane.step(Nanos(10), [join(0), ask(0)]) == []
        assert plane.wakeup_at == 60
        assert plane.step(Nanos(59), []) == []
        assert plane.wakeup_at == 60
        assert dispatched(plane.step(Nanos(60), [])) == [(0, [0])]
        assert plane.wakeup_at == NEVER


class TestAdmission:
    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_refused_with_a_time_to_come_back(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        plane = plane_with(pipelines, mechanism, admit=RefuseLong(50))
        commands = plane.step(Nanos(0), [join(0), ask(0, input_tokens=51), ask(1, input_tokens=50)])
        assert commands[0] == Reject(0, "admission: RefuseLong", 7_000)
        assert dispatched(commands) == [(0, [task_id(1, 0)])]
        assert (plane.counts.rejected, plane.live) == (1, 1)
        plane.check()

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_a_request_refused_for_one_branch_is_not_asked_about_for_the_next(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask
    ) -> None:
        """``fan`` starts in two pools; refused in the first, it is gone when the second is asked."""
        plane = plane_with(pipelines, mechanism, admit=RefuseLong(50))
        commands = plane.step(Nanos(0), [ask(0, "fan", input_tokens=51), ask(1, "fan", input_tokens=50)])
        assert commands == [Reject(0, "admission: RefuseLong", 7_000)]
        assert (plane.live, plane.tasks_queued) == (1, 2)

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_only_arrivals_are_asked_about(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        """A later stage or another attempt is never refused: work has been done for it."""
        plane = plane_with(pipelines, mechanism, admit=RefuseLong(50))
        plane.step(Nanos(0), [join(0), join(1, "embed"), join(2, "cpu"), ask(0, "rag", input_tokens=50)])
        plane.step(Nanos(1), [e.TaskFailed(0, "flaky", True)])
        plane.step(Nanos(2), [e.TaskFinished(task_id(0, 1), 0)])
        commands = plane.step(Nanos(3), [e.TaskFinished(task_id(0, 2), 500)])
        assert dispatched(commands) == [(0, [task_id(0, 3)])]
        assert plane.counts.rejected == 0

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda n: np.full(n, math.nan), r"admit Broken: score of task 0 is NaN at now=4"),
            (lambda n: np.zeros(n + 1), r"admit Broken: expected scores of shape \(1,\), got \(2,\)"),
            (lambda n: "yes", r"admit Broken: scores must be numbers, got str"),
        ],
    )
    def test_what_is_no_decision_is_blamed_on_its_author(
        self, pipelines: dict[str, Pipeline], ask: Ask, answer: Callable[[int], Any], message: str
    ) -> None:
        class Broken:
            retry_after_ns = 0

            def score(self, now: Nanos, arrivals: TaskView, replicas: ReplicaView) -> Any:
                return answer(len(arrivals))

        with pytest.raises(PolicyError, match=message):
            plane_with(pipelines, admit=Broken()).step(Nanos(4), [ask(0)])

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_admission_sees_what_is_in_flight_on_the_device_now(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        """The columns that the core counts are exact, those of neighbours on the device included."""
        seen: list[list[int]] = []

        class Look:
            retry_after_ns = 0

            def score(self, now: Nanos, arrivals: TaskView, replicas: ReplicaView) -> Scores:
                seen.append(replicas.device_in_flight.tolist())
                return np.zeros(len(arrivals))

        plane = plane_with(pipelines, mechanism, admit=Look())
        plane.step(Nanos(0), [join(0, device=7), join(1, "embed", device=7), ask(0), ask(1, "embed")])
        plane.step(Nanos(1), [ask(2)])
        plane.step(Nanos(2), [e.TaskFinished(task_id(1, 0), 0), ask(3)])
        # Step 1: llm, then embed; nothing is in flight. Step 2: requests 0 and 1. Step 3: requests 0 and 2.
        assert seen == [[0], [0], [2], [2]]


class TestRetries:
    def test_another_attempt_is_another_task(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        commands = plane.step(Nanos(7), [e.TaskFailed(0, "flaky", True)])
        (sent,) = commands
        assert isinstance(sent, Dispatch)
        (task,) = sent.tasks
        assert (task.task, task.attempt, task.queued_at) == (task_id(0, 1), 1, 7)
        assert plane.counts.retries == 1

    def test_attempts_are_used_up(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        for attempt in (0, 1):
            plane.step(Nanos(1), [e.TaskFailed(task_id(0, attempt), "flaky", True)])
        assert plane.step(Nanos(2), [e.TaskFailed(task_id(0, 2), "flaky again", True)]) == [Fail(0, "flaky again")]
        assert (plane.counts.retries, plane.counts.failed, plane.live) == (2, 1, 0)

    def test_what_the_backend_calls_hopeless_is_not_tried_again(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        assert plane.step(Nanos(1), [e.TaskFailed(0, "prompt too long", False)]) == [Fail(0, "prompt too long")]

    def test_never_after_the_client_has_seen_a_token(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        plane.step(Nanos(1), [e.TokensProduced(0, 1)])
        assert plane.step(Nanos(2), [e.TaskFailed(0, "flaky", True)]) == [Fail(0, "flaky")]
        assert plane.counts.retries == 0

    def test_one_failed_branch_stops_the_others(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0, "cpu"), join(1, "embed"), ask(0, "fan")])
        commands = plane.step(Nanos(1), [e.TaskFailed(task_id(0, 0), "no index", False)])
        assert commands == [Cancel(1, task_id(0, 1)), Fail(0, "no index")]

    def test_attempts_of_one_stage_do_not_count_for_the_next(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0, "embed"), join(1, "cpu"), ask(0, "rag")])
        plane.step(Nanos(1), [e.TaskFailed(task_id(0, 0), "flaky", True)])
        plane.step(Nanos(2), [e.TaskFailed(task_id(0, 1), "flaky", True)])
        commands = plane.step(Nanos(3), [e.TaskFinished(task_id(0, 2), 0)])
        (sent,) = commands
        assert isinstance(sent, Dispatch)
        assert (sent.replica, sent.tasks[0].stage, sent.tasks[0].attempt) == (1, 1, 0)


class TestReplicas:
    def test_a_step_sends_one_command_a_replica(self, plane: Plane, ask: Ask, join: Join) -> None:
        commands = plane.step(Nanos(0), [join(0), join(1), *(ask(n) for n in range(5))])
        assert dispatched(commands) == [(0, [task_id(n, 0) for n in (0, 2, 4)]), (1, [task_id(n, 0) for n in (1, 3)])]

    def test_a_task_waits_for_a_pool_that_has_not_joined(self, plane: Plane, ask: Ask, join: Join) -> None:
        assert plane.step(Nanos(0), [join(0, "llm"), ask(0, "embed")]) == []
        assert plane.tasks_queued == 1
        assert dispatched(plane.step(Nanos(9), [join(1, "embed")])) == [(1, [0])]

    def test_a_draining_replica_gets_no_new_work_and_its_old_work_still_counts(
        self, plane: Plane, ask: Ask, join: Join
    ) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        assert plane.step(Nanos(1), [e.ReplicaDraining(0), ask(1)]) == []
        assert plane.tasks_queued == 1
        assert plane.step(Nanos(2), [e.TaskFinished(0, 1)]) == [Respond(0)]
        assert plane.step(Nanos(3), [e.ReplicaLeft(0)]) == []
        assert (plane.counts.responded, plane.counts.retries, plane.live) == (1, 0, 1)
        plane.check()

    def test_work_on_a_replica_that_left_is_tried_elsewhere(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0, tasks_max=2), ask(0), ask(1)])
        commands = plane.step(Nanos(1), [e.ReplicaLeft(0), join(1)])
        assert dispatched(commands) == [(1, [task_id(0, 1), task_id(1, 1)])]
        assert plane.counts.retries == 2

    def test_a_replica_that_left_with_a_streaming_task_fails_its_request(
        self, plane: Plane, ask: Ask, join: Join
    ) -> None:
        plane.step(Nanos(0), [join(0), ask(0)])
        plane.step(Nanos(1), [e.TokensProduced(0, 1)])
        assert plane.step(Nanos(2), [e.ReplicaLeft(0)]) == [Fail(0, "replica 0 left")]

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    @pytest.mark.parametrize("first_streams", [True, False], ids=["first", "second"])
    def test_a_replica_that_left_with_two_tasks_of_one_request(
        self, make_plane: MakePlane, ask: Ask, join: Join, mechanism: str, first_streams: bool
    ) -> None:
        """One of them cannot be tried again: the request fails once, nothing of it stays, nobody is told to cancel."""
        from sage_core.pipeline import Text, Value, Work, op, trace
        from sage_core.pipeline import join as together

        @op(pool="llm")
        def draft(text: Value[Text]) -> Work[Text]:
            return Work(text.tokens, 5)

        twice = trace("twice", lambda text: together(draft(text), draft(text)))  # both answer
        plane = plane_of(mechanism, {"twice": twice}, {"fifo": lambda: preset("fifo")}, "fifo")
        plane.step(Nanos(0), [join(0), ask(0, "twice")])
        plane.step(Nanos(1), [e.TokensProduced(task_id(0, 0 if first_streams else 1), 1)])
        assert plane.step(Nanos(2), [e.ReplicaLeft(0)]) == [Fail(0, "replica 0 left")]
        assert (plane.live, plane.tasks_queued, plane.counts.failed) == (0, 0, 1)
        plane.check()

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_a_stage_in_between_is_tried_again_though_it_has_made_tokens(
        self, mechanism: str, ask: Ask, join: Join
    ) -> None:
        """The client has seen none of them."""
        from sage_core.pipeline import chat, trace

        twice = trace("twice", lambda text: chat(chat(text)))
        plane = plane_of(mechanism, {"twice": twice}, {"fifo": lambda: preset("fifo")}, "fifo")
        plane.step(Nanos(0), [join(0), ask(0, "twice")])
        plane.step(Nanos(1), [e.TokensProduced(task_id(0, 0), 1)])
        assert plane.step(Nanos(2), [e.ReplicaLeft(0)]) == []
        assert (plane.live, plane.tasks_queued, plane.counts.retries) == (1, 1, 1)
        plane.step(Nanos(3), [join(1)])
        plane.step(Nanos(4), [e.TaskFinished(task_id(0, 1), 4)])
        plane.step(Nanos(5), [e.TokensProduced(task_id(0, 2), 1)])
        assert plane.step(Nanos(6), [e.ReplicaLeft(1)]) == [Fail(0, "replica 1 left")]  # of this one it has
        plane.check()

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_a_prompt_that_should_have_been_read_makes_room_and_its_task_can_be_tried_again(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        """Of an answer that comes as a whole nobody has seen anything yet."""

        class OnePrompt:
            def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
                most = np.full(len(replicas), NEVER)
                return Limits(most, most, np.full(len(replicas), 1), most, np.zeros(len(replicas), np.int64))

        plane = plane_with(pipelines, mechanism, limit=OnePrompt())
        plane.step(Nanos(0), [join(0), ask(0), ask(1)])
        assert dispatched(plane.step(Nanos(1), [e.TokensProduced(0, 0)])) == [(0, [task_id(1, 0)])]
        assert plane.step(Nanos(2), [e.ReplicaLeft(0)]) == []
        assert (plane.live, plane.tasks_queued, plane.counts.retries) == (2, 2, 2)
        plane.check()

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_queued_tasks_are_counted_by_pool(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        plane = plane_with(pipelines, mechanism)
        assert plane.queue_depths() == {}
        plane.step(Nanos(0), [ask(0), ask(1), ask(2, "embed")])
        assert plane.queue_depths() == {"llm": 2, "embed": 1}
        plane.step(Nanos(1), [join(0)])
        assert plane.queue_depths() == {"llm": 0, "embed": 1}
        plane.step(Nanos(2), [e.RequestCancelled(2)])
        assert plane.queue_depths() == {"llm": 0, "embed": 0} and plane.tasks_queued == 0

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_a_first_token_says_that_the_prompt_has_been_read(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        class OnePrompt:
            def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
                most = np.full(len(replicas), NEVER)
                return Limits(most, most, np.full(len(replicas), 1), most, np.zeros(len(replicas), np.int64))

        plane = plane_with(pipelines, mechanism, limit=OnePrompt())
        commands = plane.step(Nanos(0), [join(0), ask(0), ask(1)])
        assert dispatched(commands) == [(0, [task_id(0, 0)])]
        assert dispatched(plane.step(Nanos(1), [e.TokensProduced(0, 1)])) == [(0, [task_id(1, 0)])]
        plane.check()

    def test_reports_of_a_replica_that_left_are_late_not_wrong(self, plane: Plane, join: Join) -> None:
        plane.step(Nanos(0), [join(0), e.ReplicaReported(0, 1, 2, 3)])
        assert plane.step(Nanos(1), [e.ReplicaLeft(0), e.ReplicaReported(0, 1, 2, 3)]) == []

    @pytest.mark.parametrize(
        ("event", "message"),
        [
            (e.ReplicaReported(5, 0, 0, 0), "replica 5 is not known to the plane: ReplicaReported"),
            (e.ReplicaDraining(5), "replica 5 is not known to the plane: ReplicaDraining"),
            (e.ReplicaLeft(5), "replica 5 is not known to the plane: ReplicaLeft"),
            (e.ReplicaLeft(1), "replica 1: ReplicaLeft cannot happen while left"),
            (e.ReplicaDraining(1), "replica 1: ReplicaDraining cannot happen while left"),
        ],
    )
    def test_what_a_replica_cannot_do(self, plane: Plane, join: Join, event: e.AnyEvent, message: str) -> None:
        plane.step(Nanos(0), [join(0), join(1), e.ReplicaLeft(1)])
        with pytest.raises(IllegalEvent, match=message):
            plane.step(Nanos(1), [event])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"replica": 0}, "replica 0 joined twice"),
            ({"replica": 1, "tasks_max": 0}, "replica 1: tasks_max and batch_tokens_max must be from 1"),
            ({"replica": 1, "batch_tokens_max": 0}, "replica 1: tasks_max and batch_tokens_max must be from 1"),
            ({"replica": 1, "pool_kind": 2}, "replica 1: pool llm is LLM, not OPERATOR"),
        ],
    )
    def test_a_replica_that_cannot_join(self, plane: Plane, join: Join, changes: dict[str, int], message: str) -> None:
        plane.step(Nanos(0), [join(0)])
        with pytest.raises(IllegalEvent, match=message):
            plane.step(Nanos(1), [join(**changes)])


class TestPolicies:
    def test_queued_work_is_decided_again_under_another_policy(self, plane: Plane, ask: Ask, join: Join) -> None:
        waiting = [ask(n, priority=2 - n % 3) for n in range(6)]
        plane.step(Nanos(0), [join(0, tasks_max=1), *waiting])  # FIFO: request 0 runs
        assert plane.policy.name == "fifo"
        commands = plane.step(Nanos(1), [e.PolicyChanged("priority"), e.TaskFinished(0, 1)])
        assert plane.policy.name == "priority"
        assert dispatched(commands) == [(0, [task_id(2, 0)])]  # the first of priority 0
        order = []
        while plane.live:
            (sent,) = dispatched(commands)
            order.append(sent[1][0] >> 16)
            commands = plane.step(Nanos(2), [e.TaskFinished(sent[1][0], 1)])
        assert order == [2, 5, 1, 4, 3]

    def test_an_unknown_policy_lists_the_known_ones(self, plane: Plane, make_plane: MakePlane) -> None:
        with pytest.raises(ConfigError, match=r"unknown policy 'best'; known: .*fifo, hybrid, .*slo_aware"):
            make_plane("best")
        with pytest.raises(ConfigError, match="unknown policy 'best'"):
            plane.step(Nanos(0), [e.PolicyChanged("best")])

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    @pytest.mark.parametrize(
        ("verb", "message"),
        [
            ("order", "order Broken: score of task 0 is NaN at now=3"),
            ("route", "route Broken: score of task 0 on replica 0 is NaN at now=3"),
        ],
    )
    def test_nan_is_blamed_on_the_policys_author(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join, verb: str, message: str
    ) -> None:
        class Broken:
            static = False
            live = True
            load_weight = 0.0

            def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView | None = None) -> Scores:
                return np.full((len(tasks),) if replicas is None else (len(tasks), len(replicas)), math.nan)

        plane = plane_with(pipelines, mechanism, **{verb: Broken()})
        plane.step(Nanos(0), [join(0)])
        with pytest.raises(PolicyError, match=message):
            plane.step(Nanos(3), [ask(0)])

    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_a_view_that_a_policy_kept_outlives_the_plane(
        self, pipelines: dict[str, Pipeline], mechanism: str, ask: Ask, join: Join
    ) -> None:
        """A policy should not, but when it does, it reads old news and not freed memory."""
        kept: list[tuple[TaskView, ReplicaView]] = []

        class Hoarder:
            live = True
            load_weight = 0.0

            def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
                kept.append((tasks, replicas))
                return np.zeros((len(tasks), len(replicas)))

        plane = plane_with(pipelines, mechanism, route=Hoarder())
        plane.step(Nanos(0), [join(5), ask(0)])
        del plane
        gc.collect()
        ((tasks, replicas),) = kept
        assert (tasks.pool, replicas.replica.tolist()) == ("llm", [5])

    def test_predictors_are_told_the_truth_about_what_generates_and_only_that(
        self, pipelines: dict[str, Pipeline], ask: Ask, join: Join
    ) -> None:
        told: list[tuple[str, int, int]] = []
        asked: list[tuple[str, int, int]] = []

        class Spy:
            name = "spy"

            def predict(self, request: int, tenant: str, kind: int, input_tokens: int, output_tokens_max: int) -> int:
                asked.append((tenant, input_tokens, output_tokens_max))
                return 1

            def observe(self, tenant: str, kind: int, output_tokens: int) -> None:
                told.append((tenant, kind, output_tokens))

        plane = plane_with(pipelines, predict=Spy())
        plane.step(Nanos(0), [join(0), join(1, "embed"), ask(0, tenant="bob"), ask(1, "embed")])
        plane.step(Nanos(1), [e.TaskFinished(task_id(0, 0), 13), e.TaskFinished(task_id(1, 0), 0)])
        assert asked == [("bob", 100, 20)]
        assert told == [("bob", 0, 13)]


class TestEnd:
    def test_close_fails_the_rest_and_stops_what_runs(self, plane: Plane, ask: Ask, join: Join) -> None:
        plane.step(Nanos(0), [join(0, tasks_max=1), ask(0), ask(1)])
        commands = plane.close(Nanos(5), "the run is over")
        assert commands == [Cancel(0, task_id(0, 0)), Fail(0, "the run is over"), Fail(1, "the run is over")]
        assert (plane.live, plane.tasks_queued, plane.counts.failed) == (0, 0, 2)
        assert plane.close(Nanos(5), "again") == []

    def test_the_end_is_an_event_so_that_a_log_replays_to_it(self, make_plane: MakePlane, ask: Ask, join: Join) -> None:
        closed, stepped = make_plane(), make_plane()
        for plane in (closed, stepped):
            plane.step(Nanos(0), [join(0), ask(0), ask(1, "embed")])
        assert closed.close(Nanos(5), "over") == stepped.step(Nanos(5), [e.RunEnded("over")])
        assert closed.counts == stepped.counts

    def test_close_notices_a_request_that_was_lost(self, make_plane: MakePlane, ask: Ask) -> None:
        plane = make_plane(mechanism="reference")
        plane.step(Nanos(0), [ask(0)])
        plane.counts.arrived += 1
        with pytest.raises(InvariantViolation, match="invariant 1"):
            plane.close(Nanos(1), "over")

    def test_a_number_beyond_64_bits_is_the_drivers_fault(self, make_plane: MakePlane, ask: Ask) -> None:
        for tokens in (2**63, 2**64, 10**30):
            with pytest.raises(IllegalEvent):
                make_plane().step(Nanos(0), [ask(0, input_tokens=tokens)])

    @pytest.mark.parametrize("attempts_max", [0, -1])
    def test_attempts_max(self, make_plane: MakePlane, attempts_max: int) -> None:
        with pytest.raises(ConfigError, match=f"attempts_max: expected 1 or more, got {attempts_max}"):
            make_plane(attempts_max=attempts_max)

    def test_one_attempt_means_no_retry(self, make_plane: MakePlane, ask: Ask, join: Join) -> None:
        plane = make_plane(attempts_max=1)
        plane.step(Nanos(0), [join(0), ask(0)])
        assert plane.step(Nanos(1), [e.TaskFailed(0, "flaky", True)]) == [Fail(0, "flaky")]

    def test_an_unknown_mechanism(self, make_plane: MakePlane) -> None:
        with pytest.raises(ConfigError, match="mechanism: expected native or reference, got 'rust'"):
            make_plane(mechanism="rust")
