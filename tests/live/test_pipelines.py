"""Declared pipelines behind the gateway: real sockets, emulated engines, functions that work, fail and hang."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateway_harness import (
    CHAT,
    COMPLETIONS,
    EMBED,
    LLM,
    Client,
    Serving,
    ask,
    gateway,
    plane_of,
    run,
    until,
)

from sage_core import events as e
from sage_core.commands import Cancel, Dispatch
from sage_core.declared import Declared, declared
from sage_core.errors import ConfigError
from sage_core.events import AnyEvent
from sage_core.replay import replay
from sage_core.units import request_of
from sage_live.pipelines.pipeline import LivePipeline
from sage_live.pipelines.values import part
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import VectorIndex

POOLS = {"llm": LLM, "embed": EMBED}

_held = threading.Event()
_seen: list[Any] = []


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    _held.clear()
    _seen.clear()
    yield
    _held.set()


def shout(text: str) -> str:
    _seen.append(text)
    return text.upper()


def hang(text: str) -> str:
    _held.wait(30)
    return text


def broken(text: str) -> str:
    raise ValueError("no such city")


def is_long(text: str) -> int:
    return int(len(text.split()) > 3)


def minus(text: str) -> int:
    return -1


def here(name: str) -> str:
    """So that a pipeline finds this module, which pytest does not import by its name."""
    sys.modules["pipeline_functions"] = sys.modules[__name__]
    return f"pipeline_functions:{name}"


def pipeline(stages: dict[str, Any], output: str, **more: Any) -> Declared:
    return declared({"name": "flow", "stages": stages, "output": output, "pools": POOLS} | more)


RAG = {
    "question": {"op": "embed", "of": "request"},
    "found": {"op": "retrieve", "query": "question", "index": "docs", "k": 4, "size": 40},
    "best": {"op": "rerank", "passages": "found", "keep": 2, "size": 20},
    "answer": {"op": "chat", "system": "Be brief.", "prompt": "{best}\n\nQ: {request}", "output_tokens_max": 8},
}


def index() -> VectorIndex:
    """Of the emulated engine's 16 dimensions."""
    rng = np.random.default_rng(5)
    chunks = [Chunk(f"passage number {n} about ports", f"doc{n % 3}.md", 0, n) for n in range(12)]
    return VectorIndex.build(rng.standard_normal((12, 16)).astype(np.float32), chunks, model=EMBED)


def body(content: str = "Which port?", **more: Any) -> dict[str, Any]:
    return {"model": "flow", "messages": [{"role": "user", "content": content}], "max_tokens": 8} | more


def tasks_of(serving: Serving) -> list[str]:
    """Names of the stages in order of dispatch."""
    stages = serving.service.pipelines["flow"].live.pipeline.stages
    return [stages[t.stage].name for d in serving.said(Dispatch) for t in d.tasks]


def test_rag_end_to_end_with_sources_and_replay() -> None:
    async def main() -> None:
        rag = pipeline(RAG, "answer")
        async with gateway(pipelines=[rag], indexes={"docs": index()}, policy="hybrid") as (serving, _):
            reply = await ask(serving.port, CHAT, body())
            assert reply.status == 200, reply.body
            assert reply.json["model"] == "flow"
            assert reply.json["choices"][0]["message"]["content"]
            assert set(reply.json["sources"]) <= {"doc0.md", "doc1.md", "doc2.md"} and len(reply.json["sources"]) >= 1
            assert reply.json["usage"]["completion_tokens"] == 8
            assert tasks_of(serving) == ["question", "found", "best", "answer"]
            models = (await ask(serving.port, "/v1/models")).json
            assert "flow" in [each["id"] for each in models["data"]]
            steps = list(serving.log)
        for mechanism in ("native", "reference"):
            assert replay(steps, plane_of("hybrid", mechanism, pipelines=[rag])).divergence is None

    run(main())


def test_a_streamed_answer_comes_in_pieces_and_names_its_sources_before_its_end() -> None:
    async def main() -> None:
        rag = pipeline(RAG, "answer")
        async with gateway(pipelines=[rag], indexes={"docs": index()}) as (serving, _):
            reply = await ask(serving.port, CHAT, body(stream=True))
            assert reply.status == 200 and reply.whole
            *events, told, done = reply.events
            assert done == "[DONE]"
            assert told["choices"] == [] and told["sources"]
            said = [each["choices"][0]["delta"].get("content") for each in events]
            assert len([piece for piece in said if piece]) > 1  # a late engine may put two tokens into one
            assert len(serving.heard(e.TokensProduced)) == 1  # of the stage that answers

    run(main())


def test_a_streamed_answer_is_the_pipelines_and_counts_the_tokens_of_all_stages() -> None:
    async def main() -> None:
        stages = {
            "draft": {"op": "chat", "prompt": "draft {request}", "output_tokens_max": 5},
            "answer": {"op": "chat", "prompt": "{draft}", "output_tokens_max": 8},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            whole = await ask(serving.port, CHAT, body())
            reply = await ask(serving.port, CHAT, body(stream=True, stream_options={"include_usage": True}))
            *events, counted, done = reply.events
            assert done == "[DONE]" and reply.whole
            assert {each["model"] for each in (*events, counted)} == {"flow"} == {whole.json["model"]}
            assert {each["id"] for each in (*events, counted)} == {"chatcmpl-1"}
            assert counted["usage"] == whole.json["usage"] and counted["usage"]["completion_tokens"] == 5 + 8
            assert all(not each.get("usage") for each in events)
            told = "".join(each["choices"][0]["delta"].get("content") or "" for each in events)
            assert told == whole.json["choices"][0]["message"]["content"]

    run(main())


def test_an_answer_that_no_engine_streams_is_one_event() -> None:
    async def main() -> None:
        stages = {
            "answer": {"op": "chat", "prompt": "{request}", "output_tokens_max": 8},
            "loud": {"op": "map", "of": "answer", "function": here("shout")},
        }
        async with gateway(pipelines=[pipeline(stages, "loud")]) as (serving, _):
            whole = await ask(serving.port, CHAT, body())
            reply = await ask(serving.port, CHAT, body(stream=True, stream_options={"include_usage": True}))
            told, counted, done = reply.events
            assert done == "[DONE]" and reply.whole and told["model"] == "flow"
            assert told["choices"][0]["delta"]["content"] == whole.json["choices"][0]["message"]["content"]
            assert counted["usage"] == whole.json["usage"]

    run(main())


def test_many_at_once_each_gets_its_own() -> None:
    async def main() -> None:
        stages = {
            "loud": {"op": "map", "of": "request", "function": here("shout")},
            "answer": {"op": "chat", "prompt": "{loud}", "output_tokens_max": 4},
            "echo": {"op": "map", "of": ["loud", "answer"], "function": "sage_live.pipelines.functions:lines"},
        }
        async with gateway(pipelines=[pipeline(stages, "echo")]) as (serving, _):
            replies = await asyncio.gather(*(ask(serving.port, CHAT, body(f"question {n}")) for n in range(40)))
            for n, reply in enumerate(replies):
                assert reply.json["choices"][0]["message"]["content"].splitlines()[0] == f"QUESTION {n}"

    run(main())


@pytest.mark.parametrize(("words", "expected"), [(2, ["test", "short"]), (9, ["test", "long"])])
def test_only_the_branch_that_was_taken_runs(words: int, expected: list[str]) -> None:
    async def main() -> None:
        stages = {
            "test": {"op": "branch", "of": "request", "function": here("is_long"), "chances": [1, 1]},
            "short": {"op": "chat", "prompt": "short {request}", "when": {"test": 0}, "output_tokens_max": 2},
            "long": {"op": "chat", "prompt": "long {request}", "when": {"test": 1}, "output_tokens_max": 4},
            "answer": {"op": "latest", "of": ["short", "long"]},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await ask(serving.port, CHAT, body(" ".join(["word"] * words)))
            assert reply.status == 200
            assert tasks_of(serving) == expected
            assert reply.json["usage"]["completion_tokens"] == (2 if expected[1] == "short" else 4)

    run(main())


def test_each_part_is_worked_on_and_all_of_the_text_arrives() -> None:
    async def main() -> None:
        stages = {
            "parts": {"op": "branch", "of": "request", "function": "sage_live.pipelines.functions:part_count", "chances": [1]},
            "loud": {
                "op": "each", "of": "request", "count": "parts", "most": 6, "gives": "one",
                "stages": {"one": {"op": "map", "of": "item", "function": here("shout")}},
            },
            "all": {"op": "map", "of": "loud", "function": "sage_live.pipelines.functions:lines"},
        }  # fmt: skip
        async with gateway(pipelines=[pipeline(stages, "all")]) as (serving, _):
            text = " ".join(f"w{n}" for n in range(400))
            reply = await ask(serving.port, CHAT, body(text))
            assert reply.json["choices"][0]["message"]["content"].split() == text.upper().split()
            assert len(_seen) == 3  # of 150 words each

    run(main())


def test_parts_cover_a_text_without_cutting_words() -> None:
    text = " ".join(f"w{n}" for n in range(17))
    assert " ".join(part(text, n, 4) for n in range(4)) == text


def test_a_loop_ends_when_its_branch_says_so() -> None:
    async def main() -> None:
        stages = {
            "work": {
                "op": "repeat", "of": "request", "times": 4, "gives": "next", "again": "more",
                "stages": {
                    "next": {"op": "map", "of": "state", "function": here("shout")},
                    "more": {"op": "branch", "of": "next", "contains": "again", "chances": [1, 1]},
                },
            },
        }  # fmt: skip
        flow = pipeline(stages, "work")
        async with gateway(pipelines=[flow]) as (serving, _):
            assert (await ask(serving.port, CHAT, body("stop"))).json["choices"][0]["message"]["content"] == "STOP"
            assert len(_seen) == 1
            _seen.clear()
            reply = await ask(serving.port, CHAT, body("once again"))
            assert reply.json["choices"][0]["message"]["content"] == "ONCE AGAIN"
            assert len(_seen) == 4  # and no more than that

    run(main())


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"op": "map", "of": "request", "function": "BROKEN"}, "tool last: raised: ValueError: no such city"),
        ({"op": "tool", "of": "request", "function": "HANG", "timeout_s": 0.1}, "tool last: timed out"),
        (
            {"op": "branch", "of": "request", "function": "MINUS", "chances": [1]},
            "a branch decides for a number from 0",
        ),
    ],
    ids=["raises", "hangs", "decides nonsense"],
)
def test_a_function_that_fails_is_named_and_the_gateway_goes_on(stage: dict[str, Any], said: str) -> None:
    names = {"BROKEN": "broken", "HANG": "hang", "MINUS": "minus"}
    stage = stage | {"function": here(names[stage["function"]])}

    async def main() -> None:
        stages = {"last": stage, "answer": {"op": "chat", "prompt": "{request} {last}"}}
        if stage["op"] == "branch":
            stages["answer"] = {"op": "chat", "prompt": "{request}", "when": {"last": 0}}
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await ask(serving.port, CHAT, body())
            assert reply.status == 502
            assert said in reply.json["error"]["message"]
            ok = await ask(
                serving.port, CHAT, {"model": LLM, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            )
            assert ok.status == 200

    run(main())


def test_a_client_that_goes_away_frees_every_stage() -> None:
    async def main() -> None:
        stages = {
            "one": {"op": "chat", "prompt": "one {request}", "output_tokens_max": 500},
            "two": {"op": "chat", "prompt": "two {request}", "output_tokens_max": 500},
            "both": {"op": "join", "of": ["one", "two"]},
        }
        async with gateway(pipelines=[pipeline(stages, "both")], iteration_s=0.02) as (serving, _):
            client = await Client.open(serving.port)
            client.send(CHAT, body(max_tokens=500, min_tokens=500))
            await until(lambda: sum(len(d.tasks) for d in serving.said(Dispatch)) == 2)
            client.close()
            await until(lambda: len(serving.said(Cancel)) == 2)
            assert serving.service.driver.live == 0

    run(main())


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"tools": [{}]}, "knows no tools"), ({"n": 2}, "gives one answer")],
)
def test_what_a_pipeline_cannot_be_asked_is_told(changes: dict[str, Any], said: str) -> None:
    async def main() -> None:
        stages = {"answer": {"op": "chat", "prompt": "{request}"}}
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await ask(serving.port, CHAT, body(**changes))
            assert reply.status == 400 and said in reply.json["error"]["message"]
            other = await ask(serving.port, COMPLETIONS, {"model": "flow", "prompt": "x"})
            assert other.status == 400 and "/v1/chat/completions" in other.json["error"]["message"]

    run(main())


def test_an_engine_that_refuses_a_stage_is_told_as_it_said_it() -> None:
    async def main() -> None:
        stages = {"answer": {"op": "chat", "prompt": "{request}", "output_tokens_max": 10**9}}
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await ask(serving.port, CHAT, body(max_tokens=None) | {"max_tokens": 2 * 10**9})
            assert reply.status in (400, 502), reply.body
            assert json.loads(reply.body)["error"]["message"]

    run(main())


def test_what_is_missing_is_told_before_anything_serves() -> None:
    async def main() -> None:
        with pytest.raises(
            ConfigError, match="needs index 'docs', and none was given; build one with `sage index build`"
        ):
            LivePipeline(pipeline(RAG, "answer"), {})
        flow = pipeline({"answer": {"op": "map", "of": "request", "function": "no_such_module:f"}}, "answer")
        with pytest.raises(ConfigError, match="no_such_module"):
            LivePipeline(flow, {})
        chat = declared(
            {"name": "flow", "stages": {"answer": {"op": "chat", "prompt": "{request}"}}, "output": "answer"}
        )
        with pytest.raises(ConfigError, match="no engine is in pool 'llm', which it needs"):
            async with gateway(pipelines=[chat]):
                pass

    run(main())


def test_stage_spans_add_up_to_the_latency() -> None:
    async def main() -> None:
        rag = pipeline(RAG, "answer")
        async with gateway(pipelines=[rag], indexes={"docs": index()}, iteration_s=0.004) as (serving, _):
            for n in range(5):
                assert (await ask(serving.port, CHAT, body(f"question {n}"))).status == 200
            events: list[tuple[int, AnyEvent]] = serving.events
            arrived = {x.request: at for at, x in events if type(x) is e.RequestArrived}
            sent = {t.task: (at, t) for at, d in serving.commands if type(d) is Dispatch for t in d.tasks}
            ended = {x.task: at for at, x in events if type(x) is e.TaskFinished}
            unexplained = []
            for request, began in arrived.items():
                own = [task for task in ended if request_of(task) == request]
                spans = sum(ended[task] - sent[task][1].queued_at for task in own)
                whole = max(ended[task] for task in own) - began
                unexplained.append(1 - spans / whole)
            # A busy machine can stop this process between any two tasks: of most.
            assert min(unexplained) >= 0 and np.median(unexplained) < 0.01

    run(main())
