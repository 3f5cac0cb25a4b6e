"""Tracing, the plan, and the run of one request through the graph."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.executor import Run
from sage_core.pipeline import (
    REQUEST_INPUT,
    Docs,
    Op,
    Outcome,
    Pipeline,
    Text,
    Value,
    Vector,
    Work,
    chat,
    each,
    join,
    latest,
    op,
    pipeline_of,
    repeat,
    single_request_pipelines,
    trace,
    when,
)


@op(pool="embed")
def encode(text: Value[Text]) -> Work[Vector]:
    return Work(text.tokens)


@op(pool="cpu")
def retrieve(query: Value[Vector], *, k: int = 4) -> Work[Docs]:
    return Work(k)


@op(pool="llm")
def answer(prompt: Value[Text], docs: Value[Docs]) -> Work[Text]:
    return Work(prompt.tokens + docs.tokens, None)


@op(pool="llm")
def merge(left: Value[Text], right: Value[Text]) -> Work[Text]:
    return Work(left.tokens + right.tokens, 8)


def rag(text: Value[Text]) -> Value[Text]:
    return answer(text, retrieve(encode(text), k=3))


def diamond(text: Value[Text]) -> Value[Text]:
    first = chat(text)
    return merge(chat(first), chat(first))


class TestTrace:
    def test_stages_in_topological_order_with_their_inputs_and_followers(self) -> None:
        pipeline = trace("rag", rag)
        assert [stage.op.name for stage in pipeline.stages] == ["encode", "retrieve", "answer"]
        assert [stage.inputs for stage in pipeline.stages] == [(REQUEST_INPUT,), (0,), (REQUEST_INPUT, 1)]
        assert [stage.followers for stage in pipeline.stages] == [(1,), (2,), ()]
        assert pipeline.output == 2
        assert dict(pipeline.stages[1].constants) == {"k": 3}

    def test_the_plan_is_text_and_deterministic(self) -> None:
        assert trace("rag", rag).plan() == (
            "pipeline rag\n"
            "  encode#0 on embed(request)\n"
            "  retrieve#1 on cpu(encode#0) k=3\n"
            "  answer#2 on llm(request, retrieve#1)  -> response"
        )
        assert trace("rag", rag).plan() == trace("rag", rag).plan()

    def test_an_op_may_be_used_more_than_once(self) -> None:
        pipeline = trace("diamond", diamond)
        assert [stage.followers for stage in pipeline.stages] == [(1, 2), (3,), (3,), ()]

    def test_single_request_pipelines(self) -> None:
        pipelines = single_request_pipelines()
        assert {name: [stage.op.pool for stage in p.stages] for name, p in pipelines.items()} == {
            "chat": ["llm"],
            "generate": ["llm"],
            "embed": ["embed"],
        }
        assert Run(pipelines["chat"], 7).work(pipelines["chat"].stages[0], 9) == (7, 9)
        assert Run(pipelines["embed"], 7).work(pipelines["embed"].stages[0], 0) == (7, 0)

    def test_a_branch_on_a_value_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="cannot branch on a value"):
            trace("bad", lambda text: chat(text) if text else encode(text))

    def test_a_size_is_not_known_while_tracing(self) -> None:
        with pytest.raises(ConfigError, match="a size is known only while a pipeline runs"):
            trace("bad", lambda text: retrieve(encode(text), k=text.tokens))

    @pytest.mark.parametrize(
        "body", [lambda text: text, lambda text: None, lambda text: 3], ids=["input", "none", "int"]
    )
    def test_the_body_must_return_the_result_of_an_op(self, body: Any) -> None:
        with pytest.raises(ConfigError, match="pipeline bad: the body must return the result of an op"):
            trace("bad", body)

    def test_work_that_nobody_uses_is_refused_by_name(self) -> None:
        def wasteful(text: Value[Text]) -> Value[Text]:
            retrieve(encode(text))
            return chat(text)

        with pytest.raises(ConfigError, match="pipeline wasteful: nothing uses the result of encode, retrieve"):
            trace("wasteful", wasteful)

    def test_values_are_positional_and_constants_keywords(self) -> None:
        with pytest.raises(ConfigError, match="op retrieve: values are positional, constants are keywords"):
            trace("bad", lambda text: retrieve(query=encode(text)))
        with pytest.raises(ConfigError, match="op answer: values are positional, constants are keywords"):
            trace("bad", lambda text: answer(text, 3))  # type: ignore[arg-type]

    def test_an_op_outside_a_trace(self) -> None:
        with pytest.raises(ConfigError, match="op chat: called outside trace"):
            chat(Value(3))

    def test_values_of_two_pipelines_do_not_mix(self) -> None:
        kept: list[Value[Text]] = []
        trace("one", lambda text: kept.append(text) or chat(text))  # type: ignore[func-returns-value]
        with pytest.raises(
            ConfigError, match="op merge: called outside trace\\(\\), or on values of different pipelines"
        ):
            trace("two", lambda text: merge(text, kept[0]))

    @pytest.mark.parametrize("work", [Work(-1), Work(3, -1), None, 7], ids=repr)
    def test_what_an_op_says_about_its_work_is_checked(self, work: Any) -> None:
        broken: Op[Any, Text] = Op("broken", "llm", lambda text: work)
        pipeline = trace("p", lambda text: broken(text))
        with pytest.raises(ConfigError, match="op broken: expected Work with token counts from 0"):
            Run(pipeline, 1).work(pipeline.stages[0], 1)


class TestRun:
    def test_sizes_flow_from_stage_to_stage(self) -> None:
        pipeline = trace("rag", rag)
        run = Run(pipeline, 50)
        assert [stage.index for stage in pipeline.first] == [0]
        assert run.work(pipeline.stages[0], 99) == (50, 0)
        assert [stage.index for stage in run.finished(0, 0)] == [1]
        assert run.work(pipeline.stages[1], 99) == (3, 0)
        assert [stage.index for stage in run.finished(1, 600)] == [2]
        assert run.work(pipeline.stages[2], 99) == (650, 99)  # the client's cap
        assert not run.done
        assert run.finished(2, 10) == []
        assert run.done

    def test_a_join_waits_for_all_of_its_inputs(self) -> None:
        run = Run(trace("diamond", diamond), 5)
        assert [stage.index for stage in run.finished(0, 10)] == [1, 2]
        assert run.finished(2, 20) == []
        (join,) = run.finished(1, 30)
        assert run.work(join, 99) == (50, 8)

    def test_an_input_used_twice_counts_once(self) -> None:
        run = Run(trace("twice", lambda text: (lambda once: merge(once, once))(chat(text))), 5)
        (join,) = run.finished(0, 7)
        assert run.work(join, 99) == (14, 8)

    @given(st.data())
    def test_every_stage_becomes_ready_exactly_once_in_any_order_of_finishing(self, data: st.DataObject) -> None:
        pipeline = data.draw(graphs())
        run = Run(pipeline, 3)
        waiting = [*pipeline.first]
        seen = [stage.index for stage in waiting]
        while waiting:
            assert not run.done
            stage = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            tokens, _ = run.work(stage, 4)  # raises if an input is missing
            assert tokens >= 0
            ready = run.finished(stage.index, data.draw(st.integers(0, 50)))
            seen += [follower.index for follower in ready]
            waiting += ready
        assert run.done
        assert sorted(seen) == [stage.index for stage in pipeline.stages]


@st.composite
def graphs(draw: st.DrawFn) -> Pipeline:
    """A graph of up to 9 stages; what is left over at the end is merged into the output."""

    def body(text: Value[Text]) -> Value[Text]:
        values = [text]
        used: set[int] = {REQUEST_INPUT}
        for _ in range(draw(st.integers(0, 4))):
            left, right = (values[draw(st.integers(0, len(values) - 1))] for _ in range(2))
            used.update((left.stage, right.stage))
            values.append(merge(left, right))
        result = chat(values[-1])
        used.add(values[-1].stage)
        for value in values:
            if value.stage not in used:
                result = merge(result, value)
        return result

    return trace("random", body)


def test_a_single_request_pipeline_on_a_pool_of_its_own() -> None:
    pipelines = single_request_pipelines()
    served = pipeline_of(pipelines, "chat@qwen2.5-7b")
    assert served is not None and served is pipelines["chat@qwen2.5-7b"]
    assert [(stage.op.name, stage.op.pool) for stage in served.stages] == [("chat", "qwen2.5-7b")]
    assert served.single is True and pipeline_of(pipelines, "embed@minilm").single is False  # type: ignore[union-attr]
    assert Run(served, 7).work(served.stages[0], 50) == (7, 50)


@pytest.mark.parametrize("name", ["summon", "chat@", "@llm", "rag@llm", "summon@llm"])
def test_no_other_pipeline_can_be_asked_for_by_name(name: str) -> None:
    pipelines = {**single_request_pipelines(), "rag": trace("rag", lambda text: answer(text, retrieve(encode(text))))}
    assert pipeline_of(pipelines, name) is None
    assert name not in pipelines


@op(pool="cpu")
def decide(text: Value[Text]) -> Work[Outcome]:
    return Work(text.tokens)


@op(pool="llm")
def finish(notes: Value[Any]) -> Work[Text]:
    return Work(notes.tokens, None)


def names(pipeline: Pipeline, stages: list[Any]) -> list[str]:
    return [pipeline.called(stage.index) for stage in stages]


class TestWhatDependsOnOutcomes:
    def test_a_branch(self) -> None:
        def body(text: Value[Text]) -> Value[Text]:
            which = decide(text)
            with when(which, 1, 3):
                long = chat(text)
            with when(which, 0):
                short = chat(text)
            return latest(short, long)

        pipeline = trace("branch", body)
        assert pipeline.plan() == (
            "pipeline branch\n"
            "  decide#0 on cpu(request)\n"
            "  chat#1 on llm(request) when decide#0 1..3\n"
            "  chat#2 on llm(request) when decide#0 = 0\n"
            "  latest#3(chat#2, chat#1)  -> response"
        )
        for outcome, taken in ((0, ["chat#2"]), (1, ["chat#1"]), (3, ["chat#1"])):
            run = Run(pipeline, 5)
            (chosen,) = run.finished(0, outcome)
            assert names(pipeline, [chosen]) == taken and not run.done
            assert run.finished(chosen.index, 9) == [] and run.done
        run = Run(pipeline, 5)
        assert run.finished(0, 4) == [] and run.done  # neither: there is no answer, and nothing is left to do
        assert pipeline.answering == {1, 2}

    def test_what_needs_a_skipped_stage_is_skipped_and_guards_nest(self) -> None:
        def body(text: Value[Text]) -> Value[Any]:
            first = decide(text)
            with when(first, 1):
                second = decide(chat(text))
                with when(second, 1):
                    inner = chat(text)
            return finish(join(chat(text), finish(inner)))

        pipeline = trace("nested", body)
        inner = next(stage for stage in pipeline.stages if len(stage.guards) == 2)
        assert [guard.on for guard in inner.guards] == [0, 2]
        run = Run(pipeline, 5)
        assert run.finished(0, 0) == []
        (end,) = run.finished(4, 8)
        assert run.work(end, 99) == (8, 99)

    @pytest.mark.parametrize(("outcomes", "turns"), [([0], 1), ([2, 0], 2), ([1, 1, 1], 3)])
    def test_a_loop_of_bounded_length(self, outcomes: list[int], turns: int) -> None:
        def turn(state: Value[Text]) -> tuple[Value[Text], Value[Outcome]]:
            said = chat(state)
            return said, decide(said)

        pipeline = trace("loop", lambda text: finish(repeat(chat(text), turn, times=3)))
        assert [stage.op.name for stage in pipeline.stages].count("decide") == 2  # after the last turn nobody asks
        run = Run(pipeline, 5)
        ready, decided, said = [*pipeline.first], iter(outcomes), 0
        for stage in ready:
            if stage.op.name == "decide":
                ready += run.finished(stage.index, next(decided))
            else:
                said += stage.op.name == "chat"
                ready += run.finished(stage.index, 10 * said)
        assert run.done and said == 1 + turns
        assert run.work(pipeline.stages[-1], 99) == (10 * said, 99)  # the last turn's

    @pytest.mark.parametrize("count", [0, 1, 3, 9])
    def test_a_fan_out_of_bounded_width(self, count: int) -> None:
        def body(text: Value[Text]) -> Value[Text]:
            return finish(each(decide(text), lambda number: chat(text), most=3))

        run = Run(trace("fan", body), 5)
        wide = run.finished(0, count)
        assert len(wide) == min(count, 3)
        ready = [stage for part in wide for stage in run.finished(part.index, 4)]
        assert [run.work(stage, 99) for stage in ready] == [(4 * min(count, 3), 99)] * (count > 0)
        assert run.done == (count == 0)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (lambda text: repeat(text, lambda state: (chat(state), decide(state)), times=0), "repeat: expected times from 1, got 0"),
            (lambda text: each(decide(text), lambda number: chat(text), most=0), "each: expected most from 1, got 0"),
            (lambda text: guarded(text, 2, 1), "when: expected outcomes from 0, the least first, got 2 and 1"),
            (lambda text: guarded(text, -1, None), "when: expected outcomes from 0"),
            (lambda text: on_request(text), "when: expected the result of an op of the pipeline being traced"),
            (lambda text: join(text), "op join: takes no time, so it needs the result of an op that does"),
            (lambda text: repeat(text, lambda state: (chat(state), decide(state)), times=600), "pipeline bad: more than 1000 stages"),
        ],
    )  # fmt: skip
    def test_wrong(self, body: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            trace("bad", body)

    def test_an_error_in_a_block_does_not_leave_its_guard_behind(self) -> None:
        def body(text: Value[Text]) -> Value[Text]:
            which = decide(text)
            with pytest.raises(ZeroDivisionError), when(which, 1):
                raise ZeroDivisionError
            return merge(chat(text), finish(which))

        assert all(not stage.guards for stage in trace("kept", body).stages)


def guarded(text: Value[Text], least: int, most: int | None) -> Value[Text]:
    with when(decide(text), least, most):
        return chat(text)


def on_request(text: Value[Text]) -> Value[Text]:
    with when(text, 1):
        return chat(text)
