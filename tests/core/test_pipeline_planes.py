"""The native plane and its reference on pipelines that branch, loop and fan out, with deadlines: the same commands.

The books here are kept by the run of each request (held to its meaning in test_executor.py): what is dispatched is
ready and was not dispatched before, and every request ends.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Respond, Task
from sage_core.declared import Branch, Declared, declared
from sage_core.native_plane import make_plane
from sage_core.pipeline import single_request_pipelines
from sage_core.policy import Policy
from sage_core.rng import Streams
from sage_core.units import NEVER, Nanos, PoolKind, request_of
from sage_policies.limit import EngineLimit
from sage_policies.predict import MaxPrediction
from sage_policies.presets import PRESETS, preset
from sage_policies.route import LeastInFlight

_spec = importlib.util.spec_from_file_location("declared_graphs", Path(__file__).parent / "graphs.py")
assert _spec is not None and _spec.loader is not None
graphs: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = graphs
_spec.loader.exec_module(graphs)

POOLS = {"llm": PoolKind.LLM, "embed": PoolKind.EMBEDDING, "retrieve": PoolKind.OPERATOR, "cpu": PoolKind.OPERATOR, "tool": PoolKind.OPERATOR}  # fmt: skip


class Both:
    """A native plane and a reference plane, and what runs on their replicas."""

    def __init__(self, found: Declared, policy: str) -> None:
        pipelines = {**single_request_pipelines(), found.pipeline.name: found.pipeline}
        policies = {name: (lambda name=name: preset(name)) for name in PRESETS}
        self.planes = [make_plane(kind, pipelines, policies, policy) for kind in ("native", "reference")]
        self.found = found
        self.now = 0
        self.replicas = 0
        self.flying: dict[int, tuple[Task, int]] = {}
        self.dispatched: Counter[tuple[int, int, int]] = Counter()
        self.ended: dict[int, type] = {}

    def step(self, events: list[e.AnyEvent], later: int = 1000) -> list[AnyCommand]:
        self.now += later
        native, reference = (plane.step(Nanos(self.now), events) for plane in self.planes)
        assert native == reference
        assert self.planes[0].wakeup_at == self.planes[1].wakeup_at
        assert self.planes[0].counts == self.planes[1].counts
        for command in native:
            if isinstance(command, Dispatch):
                for task in command.tasks:
                    self.flying[task.task] = task, command.replica
                    self.dispatched[request_of(task.task), task.stage, task.attempt] += 1
            elif isinstance(command, Cancel):
                self.flying.pop(command.task, None)
            else:
                assert command.request not in self.ended
                self.ended[command.request] = type(command)
        return native

    def joined(self, pool: str, speed: float = 1.0, tasks_max: int = 3) -> e.ReplicaJoined:
        self.replicas += 1
        return e.ReplicaJoined(
            self.replicas - 1, pool, int(POOLS[pool]), self.replicas, "node", tasks_max, 4096,
            fixed_ns=1e4 * speed, input_token_ns=10 * speed, output_token_ns=100 * speed,
        )  # fmt: skip

    def finished(self, task: int, random: np.random.Generator) -> e.TaskFinished:
        at, _ = self.flying.pop(task)
        declaration = self.found.stages[at.stage][-1].declaration
        top = 3 if isinstance(declaration, Branch) else at.output_tokens_max or 40
        return e.TaskFinished(task, int(random.integers(0, top + 1)))

    def settle(self, random: np.random.Generator, requests: int) -> None:
        self.step([self.joined(pool, tasks_max=64) for pool in POOLS])
        for _ in range(10_000):
            if len(self.ended) == requests:
                break
            assert self.flying, "requests are live and nothing runs"
            self.step([self.finished(task, random) for task in list(self.flying)])
        for plane in self.planes:
            plane.close(Nanos(self.now), "the test is over")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plain=graphs.declarations(), policy=st.sampled_from(sorted(PRESETS)), seed=st.integers(0, 10**6))
def test_same_commands_and_every_request_ends(plain: dict[str, Any], policy: str, seed: int) -> None:
    random = Streams(seed).stream("planes")
    both = Both(declared({**plain, "deadlines": ("critical_path", "request")[seed % 2]}), policy)
    both.step([both.joined(pool, speed) for pool in POOLS for speed in (1.0, 2.0)])
    requests = 0
    for _ in range(40):
        events: list[e.AnyEvent] = []
        draw = random.random()
        if draw < 0.4:
            for _ in range(int(random.integers(1, 4))):
                ttft, due = (
                    NEVER if random.random() < 0.4 else both.now + int(random.integers(1, 10**7)) for _ in "td"
                )
                events.append(e.RequestArrived(requests, "random", 0, "ada", int(random.integers(0, 2)), int(random.integers(1, 300)), 20, both.now, ttft, due))  # fmt: skip
                requests += 1
        elif draw < 0.8:
            events += [both.finished(task, random) for task in list(both.flying)[: int(random.integers(0, 5))]]
        elif draw < 0.9 and both.flying:
            task = int(random.choice(list(both.flying)))
            both.flying.pop(task)
            events.append(e.TaskFailed(task, "out of memory", bool(random.random() < 0.8)))
        elif draw < 0.95 and requests:
            request = int(random.integers(0, requests))
            events.append(e.RequestCancelled(request))
            if request not in both.ended:
                both.ended[request] = e.RequestCancelled
        else:
            events.append(both.joined(str(random.choice(list(POOLS))), float(random.integers(1, 4))))
        both.step(events, int(random.integers(1, 10**6)))
    both.settle(random, requests)
    assert set(both.dispatched.values()) <= {1}, "a stage was sent twice in one attempt"
    assert set(both.ended.values()) <= {Respond, Fail, e.RequestCancelled}
    assert len(both.ended) == requests


class Seen:
    """An order that notes what is due when; first come, first served."""

    static = False
    dues: ClassVar[dict[tuple[int, str], tuple[int, int]]] = {}

    def score(self, now: int, queued: Any) -> Any:
        for task, ttft, due in zip(
            queued.task.tolist(), queued.ttft_due_at.tolist(), queued.due_at.tolist(), strict=True
        ):
            Seen.dues[task, queued.pool] = ttft, due
        return queued.task.astype(np.float64)


def noted(found: Declared, kind: str, ttft_due_at: int, due_at: int) -> list[tuple[int, int]]:
    """(ttft_due_at, due_at) of each task of one request, in the order in which they were queued."""
    Seen.dues = {}
    policy = lambda: Policy("seen", None, Seen(), LeastInFlight(), EngineLimit(1.0), MaxPrediction())  # noqa: E731
    plane = make_plane(kind, {found.pipeline.name: found.pipeline}, {"seen": policy}, "seen")
    speed: Mapping[str, tuple[float, float, float]] = {
        "embed": (1000.0, 10.0, 0.0), "retrieve": (500.0, 1.0, 0.0), "llm": (5000.0, 3.0, 200.0)
    }  # fmt: skip
    joined = [
        e.ReplicaJoined(number, pool, int(POOLS[pool]), number, "n", 4, 4096, fixed_ns=fixed, input_token_ns=per, output_token_ns=out)
        for number, (pool, (fixed, per, out)) in enumerate(speed.items())
    ]  # fmt: skip
    commands = plane.step(Nanos(0), [*joined, e.RequestArrived(0, "rag", 0, "ada", 0, 100, 30, 0, ttft_due_at, due_at)])
    sizes, now = {0: 0, 1: 400, 2: 90, 3: 20}, 0
    while any(isinstance(command, Dispatch) for command in commands):
        (task,) = (task for command in commands if isinstance(command, Dispatch) for task in command.tasks)
        now += 1
        commands = plane.step(Nanos(now), [e.TaskFinished(task.task, sizes[task.stage])])
    assert commands == [Respond(0)]
    return [due for _, due in sorted(Seen.dues.items())]


RAG = {
    "name": "rag",
    "stages": {
        "question": {"op": "embed"},
        "found": {"op": "retrieve", "query": "question", "k": 5, "size": 400},
        "best": {"op": "rerank", "passages": "found", "size": 90},
        "answer": {"op": "chat", "prompt": "{best} {request}", "prompt_tokens": 10, "output_tokens": 20},
    },
    "output": "answer",
}


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_policies_see_due_times_by_the_critical_path_and_without_it_the_request_s_own(kind: str) -> None:
    """The times of test_executor.TestDue: 505, 1000, and 9600 for the answer, or 5600 to its first token."""
    found = declared(RAG)
    due = 1_000_000
    assert noted(found, kind, NEVER, due) == [
        (NEVER, due - 11_105), (NEVER, due - 10_600), (NEVER, due - 9_600), (NEVER, due)
    ]  # fmt: skip
    assert noted(found, kind, due, NEVER) == [
        (NEVER, due - 7_105), (NEVER, due - 6_600), (NEVER, due - 5_600), (due, NEVER)
    ]  # fmt: skip
    off = declared({**RAG, "deadlines": "request"})
    assert noted(off, kind, due, due + 7) == [(due, due + 7)] * 4
    assert noted(found, kind, NEVER, NEVER) == [(NEVER, NEVER)] * 4
