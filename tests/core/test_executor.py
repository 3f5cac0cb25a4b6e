"""The run of one request through a declared graph: what runs, in any order of finishing, and when it is due."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.declared import Branch, Declared, declared
from sage_core.executor import Run
from sage_core.pipeline import REQUEST_INPUT, Pipeline, Stage
from sage_core.policy import Speed
from sage_core.units import NEVER

_spec = importlib.util.spec_from_file_location("declared_graphs", Path(__file__).parent / "graphs.py")
assert _spec is not None and _spec.loader is not None
graphs: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = graphs
_spec.loader.exec_module(graphs)

CAP = 30


def outcomes_of(found: Declared, data: st.DataObject) -> dict[str, int]:
    """A result size for every stage that takes time."""
    sizes = {}
    for stage, parts in zip(found.pipeline.stages, found.stages, strict=True):
        top = 4 if isinstance(parts[-1].declaration, Branch) else 50
        sizes[stage.name] = data.draw(st.integers(0, top))
    return sizes


def oracle(pipeline: Pipeline, results: Mapping[str, int]) -> tuple[set[int], dict[int, int]]:
    """(stages that run and take time, sizes of all that are not skipped), by the meaning of guards and joins alone."""
    sizes = {REQUEST_INPUT: 100}
    ran = set()
    for stage in pipeline.stages:
        there = [i in sizes for i in stage.inputs]
        allowed = all(on in sizes and low <= sizes[on] <= high for on, low, high in stage.guards)
        if not allowed or not (any(there) if stage.op.joins else all(there)):
            continue
        if stage.op.pool:
            ran.add(stage.index)
            sizes[stage.index] = results[stage.name]
        else:
            sizes[stage.index] = stage.work(sizes).input_tokens
    return ran, sizes


def walk(run: Run, results: Mapping[str, int], data: st.DataObject) -> list[Stage]:
    """Finish ready stages in an order that Hypothesis chooses; all that became ready, in order."""
    waiting = [*run.pipeline.first]
    ready = [*waiting]
    while waiting:
        assert not run.done, "a request that is done has work left"
        stage = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        tokens, most = run.work(stage, CAP)  # an input that is missing raises
        assert tokens >= 0 and most >= 0
        new = run.finished(stage.index, results[stage.name])
        ready += new
        waiting += new
    return ready


class TestEveryStageIsSettledOnce:
    @settings(max_examples=150, deadline=None)
    @given(plain=graphs.declarations(), data=st.data())
    def test_in_any_order_and_whatever_the_outcomes(self, plain: dict[str, Any], data: st.DataObject) -> None:
        found = declared(plain)
        pipeline, results = found.pipeline, outcomes_of(found, data)
        should_run, _ = oracle(pipeline, results)
        run = Run(pipeline, 100)
        ready = [stage.index for stage in walk(run, results, data)]
        assert run.done, "nothing is left to do, and the request is not done"
        assert len(set(ready)) == len(ready), "a stage became ready twice"
        assert set(ready) == should_run, "a skipped stage ran, or one that should have run did not"

    @settings(max_examples=50, deadline=None)
    @given(plain=graphs.declarations(), data=st.data())
    def test_two_orders_give_every_stage_the_same_work(self, plain: dict[str, Any], data: st.DataObject) -> None:
        found = declared(plain)
        results = outcomes_of(found, data)
        works = []
        for _ in range(2):
            run = Run(found.pipeline, 100)
            works.append({stage.index: run.work(stage, CAP) for stage in walk(run, results, data)})
        assert works[0] == works[1]

    def test_an_answer_that_is_skipped_ends_the_request(self) -> None:
        plain = {
            "name": "maybe",
            "stages": {
                "decision": {"op": "branch", "contains": "x", "chances": [1, 1]},
                "answer": {"op": "chat", "prompt": "{request}", "when": {"decision": 1}},
            },
            "output": "answer",
        }
        run = Run(declared(plain).pipeline, 5)
        assert run.finished(0, 0) == [] and run.done
        run = Run(declared(plain).pipeline, 5)
        assert [stage.name for stage in run.finished(0, 1)] == ["answer"] and not run.done


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
EMBED, RETRIEVE, LLM = Speed(1000.0, 10.0), Speed(500.0, 1.0), Speed(5000.0, 3.0, 200.0)
SPEEDS = {"embed": EMBED, "retrieve": RETRIEVE, "llm": LLM, "cpu": Speed(40.0, 1.0), "tool": Speed(700.0)}


def speeds(pipeline: Pipeline) -> list[Speed]:
    return [SPEEDS.get(stage.op.pool, Speed()) for stage in pipeline.stages]


class TestDue:
    def test_of_the_rag_by_hand(self) -> None:
        """A request of 100 tokens. found: 500 + 5; best: 500 + (100 + 400); answer: 5000 + 3 * (10 + 90 + 100) to its first
        token, 20 * 200 more to its last."""
        pipeline = declared(RAG).pipeline
        run, of = Run(pipeline, 100), speeds(pipeline)
        found, best, first, answer = 505, 1000, 5600, 9600
        due = [run.due(stage, NEVER, 1_000_000, CAP, of) for stage in pipeline.stages]
        assert due == [
            (NEVER, 1_000_000 - answer - best - found),
            (NEVER, 1_000_000 - answer - best),
            (NEVER, 1_000_000 - answer),
            (NEVER, 1_000_000),
        ]
        due = [run.due(stage, 500_000, NEVER, CAP, of) for stage in pipeline.stages]
        assert due == [
            (NEVER, 500_000 - first - best - found),
            (NEVER, 500_000 - first - best),
            (NEVER, 500_000 - first),
            (500_000, NEVER),
        ]
        # The earlier of both: the last token is asked for 2000 ns after the first, and takes 4000.
        assert run.due(pipeline.stages[2], 500_000, 502_000, CAP, of) == (NEVER, 502_000 - answer)

    def test_what_is_known_takes_the_place_of_what_is_typical(self) -> None:
        pipeline = declared(RAG).pipeline
        run, of = Run(pipeline, 100), speeds(pipeline)
        run.finished(0, 0)
        run.finished(1, 4000)  # ten times as long as declared
        assert run.due(pipeline.stages[2], NEVER, 1_000_000, CAP, of) == (NEVER, 1_000_000 - 9600)
        run.finished(2, 900)  # 810 more: no matter now, the answer is due when it is due
        assert run.due(pipeline.stages[3], NEVER, 1_000_000, CAP, of) == (NEVER, 1_000_000)

    def test_the_longer_of_two_ways_counts_and_a_way_not_expected_does_not(self) -> None:
        plain: dict[str, Any] = {
            "name": "ways",
            "stages": {
                "start": {"op": "map", "function": "m:f", "size": 10},
                "slow": {"op": "branch", "of": "start", "contains": "x", "chances": [9, 1], "pool": "tool"},
                "long": {"op": "tool", "of": "start", "function": "m:f", "size": 10, "when": {"slow": 1}},
                "short": {"op": "map", "of": "start", "function": "m:f", "size": 10},
                "end": {"op": "latest", "of": ["short", "long"]},
                "last": {"op": "map", "of": "end", "function": "m:f"},
            },
            "output": "last",
            "fuse": False,
        }
        pipeline = declared(plain).pipeline
        of, index = speeds(pipeline), {stage.name: stage.index for stage in pipeline.stages}
        run = Run(pipeline, 7)
        # start; then slow (700) beside short (40 + 10); long is not expected to run; then last (40 + 10), which cannot
        # start before slow has said so.
        assert run.due(pipeline.stages[index["start"]], NEVER, 10_000, CAP, of)[1] == 10_000 - 700 - 50
        run.finished(index["start"], 10)
        assert run.due(pipeline.stages[index["slow"]], NEVER, 10_000, CAP, of)[1] == 10_000 - 50
        assert run.due(pipeline.stages[index["short"]], NEVER, 10_000, CAP, of)[1] == 10_000 - 50
        run.finished(index["slow"], 1)  # it runs after all
        assert run.due(pipeline.stages[index["long"]], NEVER, 10_000, CAP, of)[1] == 10_000 - 50
        likely = {**plain["stages"], "slow": {**plain["stages"]["slow"], "chances": [1, 9]}}
        pipeline = declared({**plain, "stages": likely}).pipeline
        assert Run(pipeline, 7).due(pipeline.stages[0], NEVER, 10_000, CAP, of)[1] == 10_000 - 700 - 700 - 50

    def test_a_turn_that_is_expected_to_be_followed_by_another_is_not_the_answer(self) -> None:
        def loop(chances: list[int]) -> Pipeline:
            block = {
                "said": {"op": "chat", "prompt": "{state}", "output_tokens": 5},
                "more": {"op": "branch", "of": "said", "contains": "x", "chances": chances},
            }
            turns = {"op": "repeat", "times": 2, "stages": block, "gives": "said", "again": "more"}
            return declared({"name": "loop", "stages": {"turns": turns}, "output": "turns"}).pipeline

        on, over = loop([1, 9]), loop([9, 1])
        # The decision takes 40 + 5, then a turn would take 5000 + 3 * (fixed words 1 + 5) to its first token.
        assert Run(over, 10).due(over.stages[0], 50_000, 90_000, CAP, speeds(over)) == (50_000, 90_000 - 45)
        assert Run(on, 10).due(on.stages[0], 50_000, 90_000, CAP, speeds(on)) == (NEVER, 50_000 - 45 - 5018)

    @settings(max_examples=150, deadline=None)
    @given(plain=graphs.declarations(), data=st.data())
    def test_never_later_than_the_request_and_earlier_by_what_follows(
        self, plain: dict[str, Any], data: st.DataObject
    ) -> None:
        found = declared(plain)
        pipeline, results = found.pipeline, outcomes_of(found, data)
        of = speeds(pipeline)
        run = Run(pipeline, 100)
        waiting = [*pipeline.first]
        for _ in range(data.draw(st.integers(0, len(pipeline.stages)))):  # somewhere on the way
            if not waiting:
                break
            stage = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            waiting += run.finished(stage.index, results[stage.name])
        ttft_due_at, due_at = data.draw(st.sampled_from([(NEVER, 10**9), (10**9, NEVER), (10**9, 10**9 + 1000)]))
        costs = run.forecast(CAP, of).costs
        dues = {
            stage.index: min(run.due(stage, ttft_due_at, due_at, CAP, of))
            for stage in pipeline.stages
            if stage.index in costs
        }
        for index, due in dues.items():
            assert due <= min(ttft_due_at, due_at) or index in pipeline.answering
            assert due <= max(ttft_due_at, due_at)
            for follower in pipeline.stages[index].followers:
                if follower in dues:
                    assert due <= dues[follower], "a stage is due after what waits for it"
                    if ttft_due_at == NEVER:  # one nanosecond for rounding to whole ones
                        assert due <= dues[follower] - costs[follower].ns + 1


def test_a_stage_in_no_pool_is_never_a_task() -> None:
    for stage in declared({**RAG, "name": "again"}).pipeline.stages:
        assert not stage.free
    plain = {
        "name": "free",
        "stages": {"one": {"op": "map", "function": "m:f"}, "both": {"op": "join", "of": ["one", "request"]}},
        "output": "both",
    }
    run = Run(declared(plain).pipeline, 5)
    assert run.finished(0, 7) == [] and run.done


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_join_sees_what_is_there(order: tuple[int, int]) -> None:
    plain = {
        "name": "joined",
        "stages": {
            "which": {"op": "branch", "contains": "x", "chances": [1, 1]},
            "always": {"op": "map", "function": "m:f", "size": 5},
            "sometimes": {"op": "map", "of": "request", "function": "m:f", "when": {"which": 1}},
            "both": {"op": "join", "of": ["always", "sometimes"]},
            "answer": {"op": "generate", "prompt": "{both}", "prompt_tokens": 1, "output_tokens": 3},
        },
        "output": "answer",
    }
    pipeline = declared(plain).pipeline
    index = {stage.name: stage.index for stage in pipeline.stages}
    run = Run(pipeline, 5)
    ready = []
    for turn in order:
        ready += run.finished(*[(index["which"], 0), (index["always"], 40)][turn])
    (answer,) = ready
    assert run.work(answer, CAP) == (1 + 40, CAP)
