"""A fused pipeline does the same work in fewer tasks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.declared import Branch, Declared, Filter, Map, declared, typical
from sage_core.executor import Run

_spec = importlib.util.spec_from_file_location("declared_graphs", Path(__file__).parent / "graphs.py")
assert _spec is not None and _spec.loader is not None
graphs: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = graphs
_spec.loader.exec_module(graphs)


def chain(**changes: Any) -> dict[str, Any]:
    """one -> two -> three -> answer, cheap but for the last."""
    stages: dict[str, Any] = {
        "one": {"op": "map", "of": "request", "function": "m:f", "size": 30},
        "two": {"op": "map", "of": "one", "function": "m:f"},
        "three": {"op": "map", "of": ["two", "request"], "function": "m:f", "size": 7},
        "answer": {"op": "chat", "prompt": "{three}", "prompt_tokens": 1},
    }
    for name, change in changes.items():
        stages[name] = {**stages.get(name, {}), **change}
    return {"name": "chain", "stages": stages, "output": "answer"}


def groups(plain: dict[str, Any]) -> list[list[str]]:
    return [[part.name for part in parts] for parts in declared(plain).stages]


class TestWhatIsFused:
    def test_a_run_of_cheap_stages_of_one_pool(self) -> None:
        assert groups(chain()) == [["one", "two", "three"], ["answer"]]
        assert groups({**chain(), "fuse": False}) == [["one"], ["two"], ["three"], ["answer"]]

    def test_not_what_somebody_else_waits_for(self) -> None:
        assert groups(chain(answer={"prompt": "{one} {three}"})) == [["one"], ["two", "three"], ["answer"]]

    def test_not_over_pools(self) -> None:
        assert groups(chain(two={"pool": "gpu"})) == [["one"], ["two"], ["three"], ["answer"]]

    def test_not_what_takes_its_time(self) -> None:
        assert groups(chain(two={"op": "tool"})) == [["one"], ["two"], ["three"], ["answer"]]

    def test_not_past_the_answer(self) -> None:
        plain = {**chain(), "output": "three"}
        del plain["stages"]["answer"]
        assert groups(plain) == [["one", "two", "three"]]

    def test_a_branch_may_be_the_last_of_them(self) -> None:
        decided = {"op": "branch", "of": "two", "contains": "x", "chances": [1, 1]}
        plain = chain(decided=decided, three={"of": "request", "when": {"decided": 1}})
        assert groups(plain) == [["one", "two", "decided"], ["three"], ["answer"]]
        pipeline = declared(plain).pipeline
        assert pipeline.stages[1].guards[0].on == 0

    def test_stages_with_the_same_guards_but_not_over_a_guard(self) -> None:
        decided = {"op": "branch", "of": "request", "contains": "x", "chances": [1, 1]}
        same = {"when": {"decided": 1}}
        assert groups(chain(decided=decided, one=same, two=same, three=same)) == [
            ["decided"], ["one", "two", "three"], ["answer"]
        ]  # fmt: skip
        assert groups(chain(decided=decided, two=same, three=same)) == [
            ["one"], ["decided"], ["two", "three"], ["answer"]
        ]  # fmt: skip

    def test_within_a_turn_of_a_loop(self) -> None:
        block = {
            "said": {"op": "chat", "prompt": "{state}"},
            "cut": {"op": "map", "of": "said", "function": "m:f"},
            "kept": {"op": "map", "of": "cut", "function": "m:f"},
            "more": {"op": "branch", "of": "said", "contains": "x", "chances": [1, 1]},
        }
        turns = {"op": "repeat", "times": 2, "stages": block, "gives": "kept", "again": "more"}
        plain = {"name": "loop", "stages": {"turns": turns}, "output": "turns"}
        fused = [group for group in groups(plain) if len(group) > 1]
        assert fused == [["turns0_cut", "turns0_kept"], ["turns1_cut", "turns1_kept"]]


class TestTheSameWork:
    def test_work_and_result_of_a_fused_stage(self) -> None:
        found = declared(chain())
        run = Run(found.pipeline, 100)
        fused = found.pipeline.stages[0]
        assert run.work(fused, 9) == (100 + 30 + (30 + 100), 0)
        assert typical(found.stages[0][-1].declaration) == 7

    def test_a_result_as_large_as_its_input_stays_so(self) -> None:
        found = declared(chain(three={"size": None}))
        run = Run(found.pipeline, 100)
        assert run.work(found.pipeline.stages[0], 9) == (30 + 100, 0)

    @settings(max_examples=150, deadline=None)
    @given(plain=graphs.declarations(fuse=False), data=st.data())
    def test_of_random_pipelines(self, plain: dict[str, Any], data: st.DataObject) -> None:
        """The same stages run, in the same order but for what is one task, on inputs of the same size. A result within a
        fused stage is the typical one."""
        apart, together = declared(plain), declared({**plain, "fuse": True})
        outcomes = {
            parts[-1].name: data.draw(st.integers(0, 3))
            for parts in together.stages
            if isinstance(parts[-1].declaration, Branch)
        }
        names = [stage.name for stage in apart.pipeline.stages]
        assert sorted(part.name for parts in together.stages for part in parts) == sorted(names)
        alone = ran(apart, outcomes, names)
        fused = ran(together, outcomes, names)
        assert [part for parts, _ in fused for part in parts if part == parts[-1]] == [
            parts[-1] for parts, _ in alone if any(parts[-1] == group[-1] for group, _ in fused)
        ]
        assert sorted(part for parts, _ in fused for part in parts) == sorted(parts[0] for parts, _ in alone)
        works = {parts[-1]: work for parts, work in alone}
        for parts, work in fused:
            if len(parts) == 1:
                assert work == works[parts[0]]

    @given(plain=graphs.declarations(fuse=True))
    @settings(max_examples=50, deadline=None)
    def test_only_cheap_stages_of_one_pool_are_fused(self, plain: dict[str, Any]) -> None:
        for stage, parts in zip(declared(plain).pipeline.stages, declared(plain).stages, strict=True):
            if len(parts) > 1:
                assert all(isinstance(part.declaration, Map | Filter | Branch) for part in parts)
                assert {part.declaration.pool or part.declaration.POOL for part in parts} == {stage.op.pool}


def ran(found: Declared, outcomes: dict[str, int], order: list[str]) -> list[tuple[list[str], tuple[int, int]]]:
    """(names, work) of each task that runs, first come in ``order`` first, as a simulator would size their results."""
    pipeline = found.pipeline
    run, waiting, tasks = Run(pipeline, 100), [*pipeline.first], []
    while waiting:
        stage = min(waiting, key=lambda each: order.index(found.stages[each.index][-1].name))
        waiting.remove(stage)
        parts = found.stages[stage.index]
        work = run.work(stage, 30)
        last = parts[-1]
        size = outcomes.get(last.name, typical(last.declaration))
        tasks.append(([part.name for part in parts], work))
        waiting += run.finished(stage.index, work[0] if size is None else size)
    assert run.done
    return tasks
