"""What is outside a control plane, for tests: requests to send, replicas to join, and books kept independently of it.

``World`` plays client, network and backends. It carries out every command, so the events it makes are ones that a real
driver could send (late and duplicate ones included), and it checks each step against its own books: that is how a
plane that loses a request, sends a task twice or forgets a replica is found from outside, by its commands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pytest

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond, Task
from sage_core.native_plane import Plane
from sage_core.native_plane import make_plane as plane_of
from sage_core.pipeline import (
    REQUEST_INPUT,
    Docs,
    Pipeline,
    Text,
    Value,
    Vector,
    Work,
    op,
    pipeline_of,
    single_request_pipelines,
    trace,
)
from sage_core.plane import ControlPlane
from sage_core.policy import Policy
from sage_core.units import NEVER, Nanos, PoolKind, request_of
from sage_policies.limit import EngineLimit
from sage_policies.presets import PRESETS, preset

ATTEMPTS_MAX: Final = 3
PRESETS_UNBOUNDED: Final = tuple(  # plain routers: the queue is in the engines
    name for name in PRESETS if preset(name).limit == EngineLimit(None)
)
POOLS: Final = {"llm": PoolKind.LLM, "embed": PoolKind.EMBEDDING, "cpu": PoolKind.OPERATOR}
TENANTS: Final = ("ada", "bob", "cyd")


@op(pool="cpu")
def look_up(text: Value[Text]) -> Work[Docs]:
    return Work(text.tokens)


@op(pool="embed")
def encode(text: Value[Text]) -> Work[Vector]:
    return Work(text.tokens)


@op(pool="cpu")
def retrieve(query: Value[Vector], *, k: int = 4) -> Work[Docs]:
    return Work(k)


@op(pool="llm")
def answer(prompt: Value[Text], docs: Value[Docs], query: Value[Vector]) -> Work[Text]:
    return Work(prompt.tokens + docs.tokens + query.tokens, None)


def _pipelines() -> dict[str, Pipeline]:
    """The single-request ones, ``rag`` (a chain and a join: 3 stages) and ``fan`` (two roots and a join: 3 stages)."""

    def rag(text: Value[Text]) -> Value[Text]:
        query = encode(text)
        return answer(text, retrieve(query), query)

    def fan(text: Value[Text]) -> Value[Text]:
        return answer(text, look_up(text), encode(text))

    return {**single_request_pipelines(), "rag": trace("rag", rag), "fan": trace("fan", fan)}


PIPELINES: Final = _pipelines()


def _pipeline(name: str) -> Pipeline:
    found = pipeline_of(PIPELINES, name)
    assert found is not None, "a request is live whose pipeline nobody knows"
    return found


def _ask(request: int, pipeline: str = "chat", **changes: Any) -> e.RequestArrived:
    fields: dict[str, Any] = {
        "kind": 2 if pipeline == "embed" else 0,
        "tenant": "ada",
        "priority": 0,
        "input_tokens": 100,
        "output_tokens_max": 0 if pipeline == "embed" else 20,
        "scheduled_at": 0,
        **changes,
    }
    return e.RequestArrived(request, pipeline, **fields)


def _join(replica: int, pool: str = "llm", **changes: Any) -> e.ReplicaJoined:
    fields: dict[str, Any] = {
        "pool_kind": int(POOLS[pool]),
        "device": replica,
        "node": "node",
        "tasks_max": 4,
        "batch_tokens_max": 2048,
        **changes,
    }
    return e.ReplicaJoined(replica, pool, **fields)


def _plane(
    policy: str = "fifo", mechanism: str = "native", kind: type[ControlPlane] | None = None, **options: Any
) -> Plane:
    policies: Mapping[str, Callable[[], Policy]] = {name: lambda name=name: preset(name) for name in PRESETS}  # type: ignore[misc]
    options = {"attempts_max": ATTEMPTS_MAX, **options}
    if kind is not None:
        return kind(PIPELINES, policies, policy, **options)
    return plane_of(mechanism, PIPELINES, policies, policy, **options)


class World:
    """Everything outside ``plane``. Queue events with the verbs, then :meth:`step`; or let :meth:`wander` choose.

    twin: a second plane that is given the same steps and must give the same commands.
    Books: ``live`` requests by id; ``done`` their finished stages; ``ended`` how each ended; ``on`` the tasks on each replica; ``sent`` every task
    ever dispatched.
    """

    def __init__(self, plane: Plane, policy: str = "fifo", twin: Plane | None = None) -> None:
        self.plane = plane
        self.twin = twin
        self.policy = policy
        self.now = 0
        self.events = 0
        self.steps = 0
        self.pending: list[e.AnyEvent] = []
        self.requests = 0
        self.live: dict[int, e.RequestArrived] = {}
        self.done: dict[int, set[int]] = {}  # finished stages of live requests
        self.ended: dict[int, str] = {}
        self.ends = {"responded": 0, "rejected": 0, "cancelled": 0, "failed": 0}
        self.joined: dict[int, e.ReplicaJoined] = {}  # serving
        self.draining: dict[int, e.ReplicaJoined] = {}
        self.replicas = 0
        self.on: dict[int, dict[int, Task]] = {}
        self.where: dict[int, int] = {}  # task in flight -> replica
        self.sent: dict[int, Task] = {}
        self.streamed: set[int] = set()
        self.over: list[int] = []  # tasks that ended lately, for late news
        self.retries = 0
        self.queued_max = 0
        self.gone: list[int] = []  # replicas that left
        self._leaving: set[int] = set()  # replicas that leave or drain in the pending step

    # --- verbs: each queues one event -----------------------------------------------------------------------------

    def arrive(self, pipeline: str = "chat", **changes: Any) -> int:
        request = self.requests
        self.requests += 1
        self.pending.append(_ask(request, pipeline, **{"scheduled_at": self.now, **changes}))
        return request

    def cancel(self, request: int) -> None:
        self.pending.append(e.RequestCancelled(request))

    def tokens(self, task: int, count: int = 1) -> None:
        self.pending.append(e.TokensProduced(task, count))

    def finish(self, task: int, output_tokens: int | None = None) -> None:
        most = self.sent[task].output_tokens_max
        self.pending.append(e.TaskFinished(task, most if output_tokens is None else min(output_tokens, most)))

    def fail(self, task: int, *, retryable: bool = True) -> None:
        self.pending.append(e.TaskFailed(task, "out of memory", retryable))

    def join(self, pool: str = "llm", **changes: Any) -> int:
        replica = self.replicas
        self.replicas += 1
        self.pending.append(_join(replica, pool, **changes))
        return replica

    def drain(self, replica: int) -> None:
        if replica not in self._leaving:
            self._leaving.add(replica)
            self.pending.append(e.ReplicaDraining(replica))

    def leave(self, replica: int) -> None:
        if replica not in self._leaving:
            self._leaving.add(replica)
            self.pending.append(e.ReplicaLeft(replica))

    def report(self, replica: int, load: int = 0) -> None:
        self.pending.append(e.ReplicaReported(replica, load, load // 2, 100 - load))

    def switch(self, policy: str) -> None:
        self.pending.append(e.PolicyChanged(policy))

    # --- steps ----------------------------------------------------------------------------------------------------

    def step(self, later: int = 1) -> list[AnyCommand]:
        """Give what is pending to the plane ``later`` ns from now, carry out its commands, check everything."""
        self.now += later
        events, self.pending = self.pending, []
        self._leaving.clear()
        commands = self.plane.step(Nanos(self.now), events)
        if self.twin is not None:
            assert self.twin.step(Nanos(self.now), events) == commands, "the twin decided otherwise"
            assert self.twin.wakeup_at == self.plane.wakeup_at
        self.events += len(events)
        self.steps += 1
        self.queued_max = max(self.queued_max, self.plane.tasks_queued)
        self._account(events, commands)
        return commands

    def close(self) -> list[AnyCommand]:
        """End the run; every request that arrived has ended afterwards."""
        commands = self.plane.close(Nanos(self.now), "the run is over")
        if self.twin is not None:
            assert self.twin.close(Nanos(self.now), "the run is over") == commands
        self._carry_out(commands, set(self.live), set(), {})
        assert not self.live
        assert not self.where
        assert sorted(self.ended) == list(range(self.requests))
        self._compare_counts()
        return commands

    def settle(self) -> None:
        """Every pool gets a replica and every task an end, until nothing is live: nobody may be stuck."""
        for pool in POOLS:
            self.join(pool, tasks_max=64, batch_tokens_max=1 << 20)
        self.switch("fifo")
        self.step()
        rounds = 0
        while self.live:
            assert self.where, f"requests {list(self.live)[:10]} are live, but none of their tasks is on a replica"
            for task in list(self.where):
                self.finish(task)
            self.step()
            rounds += 1
            assert rounds < 10_000

    # --- books ----------------------------------------------------------------------------------------------------

    def _account(self, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand]) -> None:
        must_fail: set[int] = set()
        must_respond: set[int] = set()
        went_away: set[int] = set()
        left_with: dict[int, int] = {}  # tasks of ended requests on replicas that left after that, in this step

        def ended(task: int) -> bool:
            """An earlier event of this step ended the task's request: news of the task come too late."""
            request = request_of(task)
            return request in must_fail or request in must_respond or request in went_away

        def undone(task: int, retryable: bool) -> None:
            held = self._off(task)
            answers = held.stage == _pipeline(self.live[request_of(task)].pipeline).output
            seen = task in self.streamed and answers  # by the client, who sees nothing of a stage in between
            if retryable and not seen and held.attempt + 1 < ATTEMPTS_MAX:
                self.retries += 1
            else:
                must_fail.add(request_of(task))

        for event in events:
            match event:
                case e.RequestArrived():
                    self.live[event.request] = event
                    self.done[event.request] = set()
                case e.RequestCancelled():
                    if event.request in self.live and event.request not in must_fail | must_respond:
                        went_away.add(event.request)
                case e.TokensProduced():
                    if event.count and event.task in self.where and not ended(event.task):
                        self.streamed.add(event.task)
                case e.TaskFinished():
                    if event.task in self.where and not ended(event.task):
                        task = self._off(event.task)
                        request = request_of(event.task)
                        self.done[request].add(task.stage)
                        if task.stage == _pipeline(self.live[request].pipeline).output:
                            must_respond.add(request)
                case e.TaskFailed():
                    if event.task in self.where and not ended(event.task):
                        undone(event.task, event.retryable)
                case e.ReplicaJoined():
                    self.joined[event.replica] = event
                    self.on[event.replica] = {}
                case e.ReplicaDraining():
                    if event.replica in self.joined:
                        self.draining[event.replica] = self.joined.pop(event.replica)
                case e.ReplicaLeft():
                    for held in sorted(self.on[event.replica]):
                        if ended(held):
                            left_with[held] = event.replica
                            self._off(held)
                        else:
                            undone(held, True)
                    del self.on[event.replica]
                    self.gone.append(event.replica)
                    self.joined.pop(event.replica, None)
                    self.draining.pop(event.replica, None)
                case e.PolicyChanged():
                    self.policy = event.policy
        self._carry_out(commands, must_fail, must_respond, left_with)
        for number in sorted(went_away):
            self._end(number, "cancelled")
        for number in sorted(must_fail | must_respond):
            assert number in self.ended, f"request {number} should have ended in this step"
        for flying in self.where:
            assert request_of(flying) in self.live, f"task {flying} runs on for a request that has ended"
        assert self.plane.wakeup_at > self.now, "a wakeup that is already past would spin"
        self._compare_counts()

    def _unfinished(self) -> int:
        """Stages of live requests that are ready and not finished: each has one task, queued or on a replica."""
        return sum(
            stage.index not in done and all(i in done or i == REQUEST_INPUT for i in stage.inputs)
            for request, done in self.done.items()
            for stage in _pipeline(self.live[request].pipeline).stages
        )

    def _off(self, task: int) -> Task:
        self.over.append(task)
        return self.on[self.where.pop(task)].pop(task)

    def _end(self, request: int, how: str) -> None:
        assert request in self.live, f"request {request} {how}, but it is {self.ended.get(request, 'unknown')}"
        del self.live[request], self.done[request]
        self.ended[request] = how
        self.ends[how] += 1

    def _carry_out(
        self,
        commands: Sequence[AnyCommand],
        may_fail: set[int],
        may_respond: set[int],
        left_with: Mapping[int, int],
    ) -> None:
        for command in commands:
            match command:
                case Respond():
                    assert command.request in may_respond, f"{command}: its last stage has not finished"
                    self._end(command.request, "responded")
                case Fail():
                    assert command.request in may_fail, f"{command}: nothing happened that would fail it"
                    self._end(command.request, "failed")
                case Reject():
                    self._end(command.request, "rejected")
                case Cancel():
                    if left_with.get(command.task) != command.replica:
                        assert self.where.get(command.task) == command.replica, f"{command}: it is not there"
                        self._off(command.task)
                case Dispatch():
                    self._dispatch(command)

    def _dispatch(self, command: Dispatch) -> None:
        joined = self.joined.get(command.replica)
        assert joined is not None, f"{command}: the replica does not serve"
        assert command.tasks
        here = self.on[command.replica]
        for task in command.tasks:
            request = self.live.get(request_of(task.task))
            assert request is not None, f"task {task.task} was sent for a request that is not live"
            assert task.task not in self.sent, f"task {task.task} was sent twice"
            assert 0 <= task.attempt < ATTEMPTS_MAX
            assert task.queued_at <= self.now
            assert _pipeline(request.pipeline).stages[task.stage].op.pool == joined.pool
            self.sent[task.task] = task
            self.where[task.task] = command.replica
            here[task.task] = task
            assert len(here) <= self._room(joined), f"{len(here)} tasks on {joined} under {self.policy}"

    def _room(self, joined: e.ReplicaJoined) -> float:
        if self.policy in PRESETS_UNBOUNDED:
            return float("inf")
        if self.policy == "hybrid" and joined.pool_kind == PoolKind.EMBEDDING:
            return 2 * joined.tasks_max
        return joined.tasks_max

    def _compare_counts(self) -> None:
        counts = self.plane.counts
        assert (counts.arrived, self.plane.live) == (self.requests, len(self.live))
        assert {how: getattr(counts, how) for how in self.ends} == self.ends
        assert (counts.retries, counts.decisions) == (self.retries, len(self.sent))
        assert sum(self.ends.values()) + len(self.live) == self.requests
        assert self.plane.tasks_queued + len(self.where) == self._unfinished(), "a task is lost or made up"

    # --- random events --------------------------------------------------------------------------------------------

    def wander(self, random: np.random.Generator, events: int, *, check_every: int = 97) -> None:
        """Random but possible events, several a step, until ``events`` more were given to the plane."""
        goal = self.events + events
        for pool in POOLS:
            self.join(pool, tasks_max=3)
        while self.events < goal:
            for draw in random.random(1 + int(random.integers(0, 6))):
                self._happen(float(draw), random)
            wakeup = self.plane.wakeup_at
            later = int(random.integers(0, 2_000_000))
            if wakeup < NEVER and random.random() < 0.5:
                later = wakeup - self.now
            self.step(later)
            if self.steps % check_every == 0:
                self.plane.check()

    def _happen(self, draw: float, random: np.random.Generator) -> None:
        flying = [*self.where][:64]
        serving = [*self.joined]
        pick: Callable[[Sequence[Any]], Any] = lambda among: among[int(random.integers(0, len(among)))]  # noqa: E731
        if draw < 0.22:
            due = self.now + int(random.integers(1, 10**9))
            self.arrive(
                pick(("chat", "embed", "generate", "rag", "fan")),
                tenant=pick(TENANTS),
                priority=int(random.integers(0, 3)),
                input_tokens=int(random.integers(0, 600)),
                ttft_due_at=due if random.random() < 0.5 else NEVER,
                due_at=due * 2 if random.random() < 0.5 else NEVER,
            )
        elif draw < 0.25 and self.requests:
            # Mostly somebody who is still there; sometimes one who has ended, perhaps in this very step.
            among = [*self.live] if self.live and random.random() < 0.8 else range(self.requests)
            self.cancel(int(pick(among)))
        elif draw < 0.40 and flying:
            self.tokens(pick(flying), self.requests % 4)
        elif draw < 0.84 and flying:
            self.finish(pick(flying), int(random.integers(0, 30)))
        elif draw < 0.88 and flying:
            self.fail(pick(flying), retryable=random.random() < 0.8)
        elif draw < 0.92 and self.over:
            late = pick(self.over[-32:])
            pick((self.tokens, self.finish, self.fail))(late)
        elif draw < 0.96 and self.on:
            self.report(pick([*self.on, *self.gone[-3:]]), int(random.integers(0, 50)))
        elif draw < 0.975:
            if len(self.joined) + len(self.draining) < 12:
                cost = float(random.integers(0, 1000))
                self.join(
                    pick((*POOLS,)),
                    device=int(random.integers(0, 4)),
                    tasks_max=int(random.integers(1, 6)),
                    batch_tokens_max=int(random.integers(1, 4096)),
                    fixed_ns=cost * 100,
                    input_token_ns=cost,
                    output_token_ns=cost * 10,
                )
        elif draw < 0.985 and self.on:
            self.drain(pick([*self.on]))  # one that drains already may be told so again
        elif draw < 0.995 and (self.joined or self.draining):
            self.leave(pick([*self.draining, *serving]))
        else:
            self.switch(pick((*PRESETS,)))


@pytest.fixture(scope="session")
def pipelines() -> dict[str, Pipeline]:
    """chat, generate, embed; ``rag``: encode, retrieve, answer; ``fan``: look_up and encode, then answer."""
    return dict(PIPELINES)


@pytest.fixture(scope="session")
def ask() -> Callable[..., e.RequestArrived]:
    """``ask(request, pipeline="chat", **fields)``."""
    return _ask


@pytest.fixture(scope="session")
def join() -> Callable[..., e.ReplicaJoined]:
    """``join(replica, pool="llm", **fields)``."""
    return _join


@pytest.fixture(scope="session")
def make_plane() -> Callable[..., Plane]:
    """``make_plane(policy="fifo", attempts_max=3, mechanism="native", kind=None)`` over every preset and the pipelines above."""
    return _plane


@pytest.fixture(scope="session")
def world() -> Callable[..., Any]:
    """``world(plane, policy="fifo", twin=None) -> World``."""
    return World
