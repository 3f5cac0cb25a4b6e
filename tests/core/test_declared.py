"""Pipelines as data: what a declaration becomes, and what is said of one that is wrong."""

from __future__ import annotations

import contextlib
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.declared import OPS, DeclarationError, Lognormal, Size, Uniform, declared
from sage_core.executor import Run

GOOD: dict[str, Any] = {
    "name": "good",
    "stages": {
        "question": {"op": "embed"},
        "found": {"op": "retrieve", "query": "question", "size": 300},
        "kind": {"op": "branch", "contains": "why", "chances": [3, 1]},
        "long": {"op": "chat", "prompt": "{found} {request}", "when": {"kind": 1}},
        "short": {"op": "generate", "prompt": "{request}", "when": {"kind": 0}},
        "answer": {"op": "latest", "of": ["short", "long"]},
    },
    "output": "answer",
}
LOOP: dict[str, Any] = {
    "op": "repeat",
    "times": 3,
    "stages": {
        "said": {"op": "chat", "prompt": "{state}"},
        "more": {"op": "branch", "of": "said", "contains": "MORE", "chances": [1, 1]},
    },
    "gives": "said",
    "again": "more",
}
FAN: dict[str, Any] = {
    "op": "each",
    "count": "kind",
    "of": "request",
    "most": 2,
    "stages": {"part": {"op": "chat", "prompt": "{item}"}},
    "gives": "part",
}


def changed(at: str, value: Any, base: dict[str, Any] = GOOD) -> dict[str, Any]:
    """``base`` with ``value`` at a path of keys; DELETE takes the key away."""
    made = deepcopy(base)
    *path, last = at.split(".")
    node = made
    for key in path:
        node = node[key]
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    return made


DELETE = object()


class TestWhatItBecomes:
    def test_the_plan(self) -> None:
        assert declared(GOOD).pipeline.plan() == (
            "pipeline good\n"
            "  question on embed(request)\n"
            "  kind on cpu(request)\n"
            "  found on retrieve(question)\n"
            "  short on llm(request) when kind = 0\n"
            "  long on llm(found, request) when kind = 1\n"
            "  answer(short, long)  -> response"
        )

    def test_pools_may_have_other_names(self) -> None:
        named = {**GOOD, "pools": {"llm": "qwen", "embed": "minilm"}}
        pools = {stage.op.pool for stage in declared(named).pipeline.stages}
        assert pools == {"qwen", "minilm", "retrieve", "cpu", ""}
        own = declared(changed("stages.short.pool", "small", named)).pipeline
        assert [stage.op.pool for stage in own.stages if stage.name == "short"] == ["small"]

    @given(data=st.data())
    @settings(max_examples=30, deadline=None)
    def test_the_order_of_stages_in_a_file_means_nothing(self, data: st.DataObject) -> None:
        names = data.draw(st.permutations(list(GOOD["stages"])))
        plan = declared({**GOOD, "stages": {name: GOOD["stages"][name] for name in names}}).pipeline.plan()
        assert sorted(plan.splitlines()) == sorted(declared(GOOD).pipeline.plan().splitlines())

    def test_a_block_may_use_stages_that_come_later_in_the_file(self) -> None:
        block = {**LOOP["stages"], "kept": {"op": "tool", "of": ["said", "found"], "function": "m:f", "size": 16}}
        loop = {**LOOP, "stages": block, "gives": "kept"}
        stages = {"turns": loop, **GOOD["stages"], "short": {"op": "chat", "prompt": "{turns}", "when": {"kind": 0}}}
        assert "turns2_kept" in [stage.name for stage in declared({**GOOD, "stages": stages}).pipeline.stages]

    def test_deadlines_may_be_those_of_the_request(self) -> None:
        assert declared(GOOD).pipeline.critical_path
        assert not declared({**GOOD, "deadlines": "request"}).pipeline.critical_path

    @pytest.mark.parametrize(("outcomes", "turns"), [([0], 1), ([1, 0], 2), ([1, 1], 3)])
    def test_a_loop_goes_on_while_its_branch_says_so(self, outcomes: list[int], turns: int) -> None:
        found = declared({"name": "loop", "stages": {"turns": LOOP}, "output": "turns"})
        run, ready, said = Run(found.pipeline, 10), [*found.pipeline.first], []
        for stage in ready:
            decides = stage.name.endswith("_more")
            if not decides:
                said.append(run.work(stage, 99)[0])
            ready += run.finished(stage.index, outcomes[len(said) - 1] if decides else 100 * len(said))
        assert run.done
        assert said == [11, 101, 201][:turns]  # each turn works on what the one before it said, and a fixed word

    @pytest.mark.parametrize("count", [0, 1, 2, 5])
    def test_a_fan_out_is_as_wide_as_its_branch_says_and_not_wider_than_most(self, count: int) -> None:
        stages = {
            "kind": {"op": "branch", "contains": "x", "chances": [1]},
            "parts": FAN,
            "answer": {"op": "chat", "prompt": "{parts} {request}", "prompt_tokens": 1},
        }
        run = Run(declared({"name": "fan", "stages": stages, "output": "answer"}).pipeline, 60)
        ready = run.finished(0, count)
        assert run.done == (count == 0)  # nothing to join: the answer is skipped
        assert [run.work(stage, 9)[0] for stage in ready] == [1 + 60 // max(min(count, 2), 1)] * min(count, 2)
        for stage in list(ready):
            ready += run.finished(stage.index, 7)
        if count:
            assert run.work(ready[-1], 9) == (1 + 60 + 7 * min(count, 2), 9)

    def test_a_fan_out_need_not_cut_its_input(self) -> None:
        """Several answers to the same question."""
        stages = {
            "kind": {"op": "branch", "contains": "x", "chances": [1]},
            "tries": {**FAN, "stages": {"part": {"op": "chat", "prompt": "{request}"}}},
        }
        pipeline = declared({"name": "votes", "stages": stages, "output": "tries"}).pipeline
        assert [stage.name for stage in pipeline.stages] == ["kind", "tries0_part", "tries1_part", "tries"]

    def test_tokens_of_a_prompt(self) -> None:
        prompt = {"op": "chat", "prompt": "Answer in one word: {request}", "system": "Be kind."}

        def work(**more: Any) -> tuple[int, int]:
            pipeline = declared({"name": "p", "stages": {"a": {**prompt, **more}}, "output": "a"}).pipeline
            return Run(pipeline, 100).work(pipeline.stages[0], 50)

        assert work() == (100 + 8, 50)  # six words of 4/3 tokens
        assert work(prompt_tokens=3, output_tokens_max=20) == (103, 20)

    @pytest.mark.parametrize(
        ("size", "middle"),
        [
            (Size(fixed=7), 7),
            (Size(uniform=Uniform(low=4, high=8)), 6),
            (Size(lognormal=Lognormal(median=30.4, sigma=1)), 30),
            (Size(lognormal=Lognormal(median=30.4, sigma=1, low=40)), 40),
        ],
    )
    def test_typical_sizes(self, size: Size, middle: int) -> None:
        assert size.typical == middle


SIZE = "expected a number of tokens, or one of fixed, uniform, lognormal"
WRONG = [
    # the whole
    ([], "", "expected keys and values, got list"),
    (changed("output", DELETE), "", "key 'output' is missing"),
    (changed("outptu", "answer"), "outptu", "unknown key 'outptu'; did you mean 'output'?"),
    (changed("output", "anwser"), "output", "no stage is called 'anwser'; did you mean 'answer'?"),
    (changed("output", "request"), "output", "no stage is called 'request'"),
    (changed("stages", {}), "stages", "expected at least one stage"),
    (changed("stages", []), "stages", "expected keys and values, got a list"),
    (changed("name", "a b"), "name", "expected letters, digits and . _ + -, got 'a b'"),
    (changed("name", "chat@x"), "name", "expected letters"),
    (changed("deadlines", "never"), "deadlines", "expected critical_path or request, got 'never'"),
    (changed("fuse", "maybe"), "fuse", "expected `bool`, got `str`"),
    ({**GOOD, "pools": {"lm": "qwen"}}, "pools.lm", "no op has this pool; did you mean 'llm'?"),
    ({**GOOD, "pools": {"llm": ""}}, "pools.llm", "expected the name of a pool, got nothing"),
    # a stage
    (changed("stages.long", "chat"), "stages.long", "expected a stage with op: one of embed, retrieve, rerank"),
    (changed("stages.long.op", "chatt"), "stages.long.op", "unknown op 'chatt'; did you mean 'chat'?"),
    (changed("stages.long.op", "item"), "stages.long.op", "unknown op 'item'"),
    (changed("stages.long.op", 3), "stages.long.op", "unknown op 3"),
    (changed("stages.long.promt", "x"), "stages.long.promt", "unknown key 'promt'; did you mean 'prompt'?"),
    (changed("stages.long.prompt", DELETE), "stages.long", "key 'prompt' is missing"),
    (changed("stages.long.temperature", "hot"), "stages.long.temperature", "expected `float`, got `str`"),
    (changed("stages.long.temperature", 3), "stages.long.temperature", "expected `float` <= 2.0"),
    (changed("stages.found.k", 0), "stages.found.k", "expected `int` >= 1"),
    (changed("stages.found.size", DELETE), "stages.found", "key 'size' is missing"),
    (changed("stages.found.size", "big"), "stages.found.size", f"{SIZE}, got 'big'"),
    (changed("stages.found.size", {}), "stages.found.size", SIZE),
    (changed("stages.found.size", {"fixed": 1, "uniform": {"low": 1, "high": 2}}), "stages.found.size", SIZE),
    (changed("stages.found.size", {"normal": 1}), "stages.found.size", "object contains unknown field `normal`"),
    (changed("stages.found.size", {"uniform": {"low": 9, "high": 2}}), "stages.found.size", "expected low up to high, got 9 and 2"),
    (changed("stages.long.output_tokens", {"lognormal": {"median": 9, "sigma": 1, "low": 9, "high": 2}}), "stages.long.output_tokens", "expected low up to high"),
    (changed("stages.kind.chances", []), "stages.kind.chances", "expected a list of length >= 1"),
    (changed("stages.kind.chances", [0, 0]), "stages.kind.chances", "expected at least one chance above 0"),
    (changed("stages.kind.function", "m:f"), "stages.kind", "function and contains both decide; keep one"),
    (changed("stages.answer.of", []), "stages.answer.of", "expected at least one stage"),
    (changed("stages.request", {"op": "embed"}), "stages.request", "expected a name (letters, digits, _) that is not request"),
    (changed("stages.a-b", {"op": "embed"}), "stages.a-b", "expected a name"),
    # how they hang together
    (changed("stages.found.query", "qestion"), "stages.found.query", "no stage is called 'qestion'; did you mean 'question'?"),
    (changed("stages.long.prompt", "{fuond}"), "stages.long.prompt", "no stage is called 'fuond'; did you mean 'found'?"),
    (changed("stages.long.prompt", "why"), "stages.long.prompt", "expected {request}, or a stage in braces, in it"),
    (changed("stages.long.prompt", "{state}"), "stages.long.prompt", "no stage is called 'state'; there is one within repeat only"),
    (changed("stages.long.prompt", "{item}"), "stages.long.prompt", "no stage is called 'item'; there is one within each only"),
    (changed("stages.long.prompt", "{question}"), "stages.long.prompt", "expected text or docs, but 'question' is a vector"),
    (changed("stages.found.query", "request"), "stages.found.query", "expected vector, but 'request' is a text"),
    (changed("stages.question.of", "kind"), "stages.question.of", "expected text or docs, but 'kind' is an outcome"),
    (changed("stages.long.when", {"found": 1}), "stages.long.when", "'found' is a docs, no branch"),
    (changed("stages.long.when", {"knd": 1}), "stages.long.when", "no stage is called 'knd'; did you mean 'kind'?"),
    (changed("stages.long.when", {"kind": [1]}), "stages.long.when", "expected an outcome or [least, most], got [1]"),
    (changed("stages.long.when", {"kind": [2, 1]}), "stages.long.when", "expected outcomes from 0, the least first, got 2 and 1"),
    (changed("stages.long.when", {"kind": -1}), "stages.long.when", "expected outcomes from 0"),
    (changed("stages.long.when", {"kind": "yes"}), "stages.long.when", "expected"),
    (changed("stages.kind.of", "long"), "stages.kind", "stages wait for one another in a circle: kind -> long -> kind; break it"),
    (changed("stages.found.query", "found"), "stages.found", "in a circle: found -> found"),
    (changed("stages.more", {"op": "embed"}), "stages.more", "nothing uses its result; name it in another stage"),
    (changed("stages.answer", {"op": "join", "of": ["request"]}), "stages.answer", "takes no time, so it needs the result of an op that does"),
    # blocks
    (changed("stages.turns", {**LOOP, "gives": "sad"}), "stages.turns.gives", "no stage of this block is called 'sad'; did you mean 'said'?"),
    (changed("stages.turns", {**LOOP, "gives": "request"}), "stages.turns.gives", "no stage of this block is called 'request'"),
    (changed("stages.turns", {**LOOP, "again": "kind"}), "stages.turns.again", "no stage of this block is called 'kind'"),
    (changed("stages.turns", {**LOOP, "again": "said"}), "stages.turns.again", "expected outcome, but 'said' is a text"),
    (changed("stages.turns", {**LOOP, "gives": "more"}), "stages.turns.gives", "expected text or docs, but 'more' is an outcome"),
    (changed("stages.turns", {**LOOP, "times": 0}), "stages.turns.times", "expected `int` >= 1"),
    (changed("stages.turns", changed("stages.said.prompt", "{stat}", LOOP)), "stages.turns", "no stage is called 'stat'"),
    (changed("stages.turns", changed("stages.said.op", "chart", LOOP)), "stages.turns.stages.said.op", "unknown op 'chart'"),
    (changed("stages.turns", changed("stages.said.of", 3, LOOP)), "stages.turns.stages.said.of", "unknown key 'of'"),
    (changed("stages.turns", changed("stages.kind", {"op": "embed"}, LOOP)), "stages.turns.stages.kind", "a stage outside of this block has that name"),
    ({"name": "l", "stages": {"turns": changed("stages.idle", {"op": "embed"}, LOOP)}, "output": "turns"}, "stages.turns.stages.idle", "nothing uses its result"),
    (changed("stages.parts", {**FAN, "count": "found"}), "stages.parts.count", "expected outcome, but 'found' is a docs"),
    (changed("stages.parts", {**FAN, "most": 500}), "stages.parts.most", "expected `int` <= 200"),
    (changed("stages.turns", {**LOOP, "times": 100, "stages": {"deep": {**LOOP, "times": 100}, "ok": {"op": "branch", "of": "deep", "contains": "x", "chances": [1]}}, "gives": "deep", "again": "ok"}), "stages.turns.stages.deep.stages", "more than 1000 stages"),
]  # fmt: skip


@pytest.mark.parametrize(("plain", "path", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_told_with_its_path(plain: Any, path: str, message: str) -> None:
    with pytest.raises(DeclarationError) as told:
        declared(plain)
    assert message in str(told.value)
    assert ".".join(told.value.path).startswith(path) if path.endswith("stages") else ".".join(told.value.path) == path


def test_two_stages_that_would_have_one_name() -> None:
    plain = changed("stages.turns0_said", {"op": "chat", "prompt": "{turns}"})
    plain["stages"]["turns"] = LOOP
    with pytest.raises(DeclarationError, match=r"a stage called 'turns0_said' is made of .* too; give"):
        declared(plain)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["request", "kind"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(data=st.data(), value=json)
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_a_file_is_a_pipeline_or_an_error_with_a_path(data: st.DataObject, value: Any) -> None:
    paths = [
        "name",
        "output",
        "deadlines",
        "fuse",
        "stages",
        "stages.turns",
        "stages.parts",
        "stages.turns.stages.said",
    ]
    base = changed("stages.parts", FAN, changed("stages.turns", LOOP))
    for stage, node in [*GOOD["stages"].items(), ("turns", LOOP), ("parts", FAN)]:
        paths += [f"stages.{stage}.{key}" for key in node]
    plain = changed(data.draw(st.sampled_from(paths)), value, base)
    with contextlib.suppress(DeclarationError):
        declared(plain)


def test_every_op_is_covered_here() -> None:
    assert set(OPS) == {
        "embed", "retrieve", "rerank", "chat", "generate", "tool", "map", "filter", "branch", "join", "latest", "repeat", "each"
    }  # fmt: skip
