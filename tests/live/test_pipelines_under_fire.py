"""Declared pipelines whose functions, engines and clients misbehave: the plane goes on, and who asked is told what was wrong."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import weakref
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateway_harness import (
    ANSWER,
    CHAT,
    EMBED,
    EMBEDDINGS,
    LLM,
    Client,
    ask,
    chat,
    embed_spec,
    emulated,
    gateway,
    llm_spec,
    run,
    scripted,
    serving,
    sse,
    token,
    until,
)

from sage_core import events as e
from sage_core.declared import Declared, declared
from sage_core.errors import ConfigError
from sage_live.http.server import Request
from sage_live.service import ServiceConfig

POOLS = {"llm": LLM, "embed": EMBED}


def huge(text: str) -> int:
    return 10**30


def large(text: str) -> int:
    return 2**50


def surrogate(text: str) -> str:
    raise ValueError("\ud800 no character")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise Unspeakable


def unspeakable(text: str) -> str:
    raise Unspeakable


def endless(text: str) -> str:
    raise ValueError("x" * 10_000_000)


def half(text: str) -> str:
    return "\ud800"


def broken(text: str) -> str:
    raise ValueError("no such city")


def slow(text: str) -> str:
    time.sleep(0.3)
    return text


def is_long(text: str) -> int:
    return int(len(text.split()) > 3)


def here(name: str) -> str:
    """So that a pipeline finds this module, which pytest does not import by its name."""
    sys.modules["functions_under_fire"] = sys.modules[__name__]
    return f"functions_under_fire:{name}"


def pipeline(stages: dict[str, Any], output: str, **more: Any) -> Declared:
    return declared({"name": "flow", "stages": stages, "output": output, "pools": POOLS} | more)


def body(content: str = "Which port?", **more: Any) -> dict[str, Any]:
    return {"model": "flow", "messages": [{"role": "user", "content": content}], "max_tokens": 8} | more


def said(reply: Any) -> str:
    text: str = reply.json["error"]["message"]
    return text


@pytest.mark.parametrize("name", ["huge", "large"])
def test_a_decision_beyond_all_outcomes_fails_its_request_only(name: str) -> None:
    async def main() -> None:
        stages = {
            "test": {"op": "branch", "of": "request", "function": here(name), "chances": [1]},
            "answer": {"op": "chat", "prompt": "{request}", "when": {"test": 0}},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await ask(serving.port, CHAT, body())
            assert reply.status == 502 and "test" in said(reply), reply.body
            assert (await ask(serving.port, CHAT, chat())).status == 200

    run(main())


@pytest.mark.parametrize("name", ["surrogate", "unspeakable", "endless", "half"])
def test_what_a_function_raises_cannot_hurt_the_plane(name: str) -> None:
    async def main() -> None:
        stages = {"answer": {"op": "map", "of": "request", "function": here(name)}}
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await asyncio.wait_for(ask(serving.port, CHAT, body()), 5)
            assert reply.status == 502 and len(reply.body) < 5000, reply.body[:300]
            assert all(len(failed.reason) < 5000 for failed in serving.heard(e.TaskFailed))
            assert (await ask(serving.port, CHAT, chat())).status == 200

    run(main())


def test_functions_wait_in_the_plane_not_for_a_thread_with_the_clock_running() -> None:
    async def main() -> None:
        stages = {"answer": {"op": "tool", "of": "request", "function": here("slow"), "timeout_s": 0.5}}
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            replies = await asyncio.gather(*(ask(serving.port, CHAT, body(f"q{n}")) for n in range(12)))
            assert [reply.status for reply in replies] == [200] * 12, replies

    run(main())


def test_functions_cannot_share_the_pool_of_engines() -> None:
    async def main() -> None:
        flow = pipeline(
            {"answer": {"op": "map", "of": "request", "function": "sage_live.pipelines.functions:lines"}},
            "answer",
            pools=POOLS | {"cpu": LLM},
        )
        with pytest.raises(ConfigError, match=f"pool '{LLM}'"):
            async with gateway(pipelines=[flow]):
                pass

    run(main())


def test_an_engine_cannot_join_the_pool_of_functions() -> None:
    async def main() -> None:
        stages = {"answer": {"op": "map", "of": "request", "function": "sage_live.pipelines.functions:lines"}}
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, engine):
            pool = serving.service.pipelines["flow"].live.pipeline.stages[0].op.pool
            with pytest.raises(ConfigError, match=pool):
                serving.service.add_engine(llm_spec(engine.port, name="another", model="another", pool=pool))

    run(main())


def test_a_stage_must_be_work_for_the_engines_of_its_pool() -> None:
    async def main() -> None:
        flow = pipeline({"answer": {"op": "chat", "prompt": "{request}"}}, "answer", pools={"llm": EMBED})
        with pytest.raises(ConfigError, match=r"stage answer.*EMBEDDING"):
            async with gateway(pipelines=[flow]):
                pass

    run(main())


def test_the_result_of_a_skipped_join_is_not_used() -> None:
    async def main() -> None:
        stages = {
            "test": {"op": "branch", "of": "request", "function": here("is_long"), "chances": [1, 1]},
            "same": {"op": "map", "of": "request", "function": "sage_live.pipelines.functions:lines"},
            "long": {"op": "map", "of": "same", "function": "builtins:str.upper", "when": {"test": 1}},
            "short": {"op": "latest", "of": ["same"], "when": {"test": 0}},
            "both": {"op": "latest", "of": ["long", "short"]},
            "answer": {"op": "map", "of": "both", "function": "sage_live.pipelines.functions:lines"},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            for text, expected in (("a b", "a b"), ("a b c d e", "A B C D E")):
                reply = await ask(serving.port, CHAT, body(text))
                assert reply.json["choices"][0]["message"]["content"] == expected, reply.body

    run(main())


def test_sources_come_before_the_end_of_a_stream_whose_last_bytes_come_late() -> None:
    from test_pipelines import RAG, index

    def late(request: Request) -> None:
        request.start(200)
        request.write(sse(token("yes")))
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, request.write, b"data: [DONE]\n\n")
        loop.call_later(0.1, request.end)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            device = await stack.enter_async_context(emulated())
            engine = await stack.enter_async_context(scripted(late))
            rag = pipeline(RAG, "answer")
            made = await stack.enter_async_context(
                serving([llm_spec(engine.port), embed_spec(device.port)], pipelines=[rag], indexes={"docs": index()})
            )
            reply = await ask(made.port, CHAT, body(stream=True))
            assert reply.status == 200 and reply.whole
            assert reply.events[-1] == "[DONE]", reply.events
            assert reply.events[-2]["sources"]

    run(main())


def test_usage_that_was_asked_for_is_told_when_the_answer_comes_in_one_piece() -> None:
    async def main() -> None:
        stages = {
            "said": {"op": "chat", "prompt": "{request}", "output_tokens_max": 4},
            "answer": {"op": "map", "of": "said", "function": "sage_live.pipelines.functions:lines"},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (serving, _):
            reply = await ask(serving.port, CHAT, body(stream=True, stream_options={"include_usage": True}))
            *_, usage, done = reply.events
            assert done == "[DONE]"
            assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4, reply.events

    run(main())


def test_what_a_function_says_is_told_even_if_an_engine_was_lost_before() -> None:
    """The stage that the engine held was tried again and succeeded; what failed later is another."""

    async def main() -> None:
        held: list[Request] = []
        stages = {
            "said": {"op": "chat", "prompt": "{request}"},
            "answer": {"op": "map", "of": "said", "function": here("broken")},
        }
        async with AsyncExitStack() as stack:
            dying = await stack.enter_async_context(scripted(held.append))
            made = await stack.enter_async_context(
                serving([llm_spec(dying.port)], pipelines=[pipeline(stages, "answer")])
            )
            asked = asyncio.ensure_future(ask(made.port, CHAT, body()))
            await until(lambda: held)
            second = await stack.enter_async_context(scripted(lambda request: request.respond(200, ANSWER)))
            made.service.add_engine(llm_spec(second.port))
            await made.healthy(2)
            await made.service.remove_engine(f"llm-{dying.port}", drain=False)
            reply = await asked
            assert reply.status == 502 and "no such city" in said(reply), reply.body

    run(main())


def test_a_stage_whose_engine_dies_is_tried_again_elsewhere() -> None:
    async def main() -> None:
        stages = {
            "said": {"op": "chat", "prompt": "first {request}"},
            "answer": {"op": "chat", "prompt": "second {said}"},
        }

        def dies(request: Request) -> None:
            request.start(200, b"application/json")
            request.write(b'{"choices"')
            asyncio.get_running_loop().call_later(0.02, request.abort)

        async with AsyncExitStack() as stack:
            bad = await stack.enter_async_context(scripted(dies))
            made = await stack.enter_async_context(
                serving([llm_spec(bad.port)], pipelines=[pipeline(stages, "answer")], attempts_max=50)
            )
            asked = asyncio.ensure_future(ask(made.port, CHAT, body()))
            await until(lambda: bad.requests)
            good = await stack.enter_async_context(scripted(lambda request: request.respond(200, ANSWER)))
            made.service.add_engine(llm_spec(good.port))
            reply = await asked
            assert reply.status == 200, reply.body
            assert reply.json["choices"][0]["message"]["content"] == "yes"
            assert reply.json["usage"]["completion_tokens"] == 2  # one of each stage, none of what was lost
            assert [each["messages"][0]["content"] for each in good.bodies] == ["first Which port?", "second yes"]

    run(main())


def test_an_engine_that_dies_in_the_middle_of_the_answer_ends_it_with_an_error() -> None:
    def dies(request: Request) -> None:
        request.start(200)
        request.write(sse(token("yes")))
        asyncio.get_running_loop().call_later(0.05, request.abort)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            bad = await stack.enter_async_context(scripted(dies))
            flow = pipeline({"answer": {"op": "chat", "prompt": "{request}"}}, "answer")
            made = await stack.enter_async_context(serving([llm_spec(bad.port)], pipelines=[flow]))
            reply = await ask(made.port, CHAT, body(stream=True))
            assert reply.status == 200 and not reply.whole
            first, error = reply.events
            assert first["choices"] and "middle of its answer" in error["error"]["message"]
            assert len(bad.requests) == 1  # what has left cannot be said again

    run(main())


def test_a_client_that_leaves_in_the_middle_of_the_answer_frees_the_engine() -> None:
    def endless_answer(request: Request) -> None:
        request.start(200)
        request.write(sse(token("yes")))

    async def main() -> None:
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(scripted(endless_answer))
            flow = pipeline({"answer": {"op": "chat", "prompt": "{request}"}}, "answer")
            made = await stack.enter_async_context(serving([llm_spec(engine.port)], pipelines=[flow]))
            client = await Client.open(made.port)
            client.send(CHAT, body(stream=True))
            await client.head()
            assert b"yes" in await client.chunk()
            client.close()
            await until(lambda: engine.gone == 1)
            assert not made.service.calls

    run(main())


def test_a_client_that_leaves_lets_go_of_functions() -> None:
    async def main() -> None:
        flow = pipeline({"answer": {"op": "map", "of": "request", "function": here("slow")}}, "answer")
        async with gateway(pipelines=[flow]) as (made, _):
            client = await Client.open(made.port)
            client.send(CHAT, body())
            (engine,) = made.service._functions.values()
            await until(lambda: list(engine.at_work))
            client.close()
            await until(lambda: not list(engine.at_work))
            assert not made.service.calls

    run(main())


def test_a_gateway_that_closes_lets_go_of_functions(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        flow = pipeline({"answer": {"op": "map", "of": "request", "function": here("slow")}}, "answer")
        async with gateway(pipelines=[flow], grace_s=0.01) as (made, _):
            clients = [await Client.open(made.port) for _ in range(20)]
            for client in clients:
                client.send(CHAT, body())
            await until(lambda: len(made.service.calls) == 20)
            (engine,) = made.service._functions.values()
        await until(lambda: not list(engine.at_work))

    run(main())
    gc.collect()
    assert not [each for each in caplog.records if each.name == "asyncio"], caplog.text


def test_nothing_of_a_request_is_kept_when_it_has_ended() -> None:
    async def main() -> None:
        runs: list[weakref.ref[Any]] = []
        stages = {
            "said": {"op": "chat", "prompt": "{request}", "output_tokens_max": 2},
            "answer": {"op": "map", "of": "said", "function": "sage_live.pipelines.functions:lines"},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")]) as (made, _):
            submit = made.service.submit

            def watched(call: Any, **more: Any) -> int:
                number = submit(call, **more)
                runs.append(weakref.ref(call.run))
                return number

            made.service.submit = watched  # type: ignore[method-assign]
            gc.disable()
            try:
                assert (await ask(made.port, CHAT, body())).status == 200
                assert (await ask(made.port, CHAT, body(stream=True))).status == 200
                await until(lambda: not any(ref() for ref in runs), 2)
            finally:
                gc.enable()

    run(main())


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["text"]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": {"type": "text"}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "user", "content": "  "}],
    ],
    ids=str,
)
def test_messages_that_are_no_question_are_refused(messages: Any) -> None:
    async def main() -> None:
        flow = pipeline({"answer": {"op": "chat", "prompt": "{request}"}}, "answer")
        async with gateway(pipelines=[flow]) as (made, _):
            reply = await ask(made.port, CHAT, body(messages=messages))
            assert reply.status == 400 and reply.json["error"]["param"] == "messages", reply.body

    run(main())


def test_stages_and_clients_share_batches_and_each_gets_its_own_vector() -> None:
    """The emulated engine's vectors depend on the input, so a vector of another would be seen."""
    from test_pipelines import RAG, index

    async def main() -> None:
        seen: list[Any] = []
        rag = pipeline(RAG, "answer")
        async with gateway(pipelines=[rag], indexes={"docs": index()}, batch_s=0.02) as (made, _):
            found = made.service.pipelines["flow"].live.indexes["docs"]
            search = found.search

            def watched(query: Any, k: int) -> Any:
                seen.append(query)
                return search(query, k)

            found.search = watched  # type: ignore[method-assign, assignment]

            def embedding(n: int, **more: Any) -> dict[str, Any]:
                return {"model": EMBED, "input": f"text {n}", **more}

            alone = {n: (await ask(made.port, EMBEDDINGS, embedding(n))).json["data"][0]["embedding"] for n in range(9)}
            replies = await asyncio.gather(
                *(
                    ask(made.port, CHAT, body(f"text {n}"))
                    if n % 3 == 0
                    else ask(
                        made.port, EMBEDDINGS, embedding(n, **({"encoding_format": "base64"} if n % 3 == 1 else {}))
                    )
                    for n in range(9)
                )
            )
            assert [reply.status for reply in replies] == [200] * 9
            for n, reply in enumerate(replies):
                if n % 3 == 0:
                    assert any(np.allclose(query, alone[n], atol=1e-6) for query in seen)
                elif n % 3 == 1:
                    assert isinstance(reply.json["data"][0]["embedding"], str)
                else:
                    assert reply.json["data"][0]["embedding"] == alone[n]

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b'{"data":[]}',
        b'{"data":[{"embedding":[1,2]}]}',
        b'{"data":[{"embedding":"nonsense"}]}',
        b'{"data":[{"embedding":[]}]}',
        b'{"data":[{"embedding":["\\ud800"]}]}',
        b'{"data":[{"embedding":[null]}]}',
        b'{"data":5}',
        b"{",
    ],
    ids=str,
)
def test_a_vector_that_is_none_fails_its_request_only(answer: bytes) -> None:
    from test_pipelines import RAG, index

    async def main() -> None:
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(scripted(lambda request: request.respond(200, answer)))
            device = await stack.enter_async_context(emulated())
            made = await stack.enter_async_context(
                serving(
                    [llm_spec(device.port), embed_spec(engine.port)],
                    pipelines=[pipeline(RAG, "answer")],
                    indexes={"docs": index()},
                )
            )
            reply = await ask(made.port, CHAT, body())
            assert reply.status == 502 and "Error:" not in said(reply), reply.body
            assert (await ask(made.port, CHAT, chat())).status == 200

    run(main())


def test_a_stage_that_waits_for_an_engine_that_is_gone_is_given_up() -> None:
    async def main() -> None:
        stages = {
            "said": {"op": "map", "of": "request", "function": here("slow")},
            "answer": {"op": "chat", "prompt": "{said}"},
        }
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(scripted(lambda request: request.respond(200, ANSWER)))
            made = await stack.enter_async_context(
                serving(
                    [llm_spec(engine.port)],
                    pipelines=[pipeline(stages, "answer")],
                    service=ServiceConfig(no_engine_s=0.5),
                )
            )
            asked = asyncio.ensure_future(ask(made.port, CHAT, body()))
            await until(lambda: made.service.calls)
            await made.service.remove_engine(f"llm-{engine.port}", drain=False)
            reply = await asyncio.wait_for(asked, 10)
            assert reply.status == 503 and "No engine" in said(reply), reply.body

    run(main())


def test_times_of_a_pipeline_that_are_told_are_times() -> None:
    async def main() -> None:
        flow = pipeline({"answer": {"op": "chat", "prompt": "{request}", "output_tokens_max": 4}}, "answer")
        async with gateway(pipelines=[flow]) as (made, _):
            told: list[Any] = []
            observe = made.service.observe
            assert observe is not None

            def watched(call: Any, *more: Any) -> None:
                told.append((call.arrived_ns, call.dispatched_ns, call.first_token_ns))
                observe(call, *more)

            made.service.observe = watched  # type: ignore[assignment]
            assert (await ask(made.port, CHAT, body(stream=True))).status == 200
            ((arrived, dispatched, first),) = told
            assert 0 < arrived <= dispatched < first

    run(main())


def names_two(text: str) -> bool:
    return "number 2 " in text


def test_sources_are_those_that_the_answer_was_made_from() -> None:
    """Not of passages that were dropped on the way; those of another retrieval too."""
    from test_pipelines import index

    async def main() -> None:
        stages = {
            "question": {"op": "embed", "of": "request"},
            "all": {"op": "retrieve", "query": "question", "index": "docs", "k": 12, "size": 40},
            "some": {"op": "filter", "of": "all", "function": here("names_two"), "size": 10},
            "more": {"op": "retrieve", "query": "question", "index": "docs", "k": 12, "size": 40},
            "best": {"op": "rerank", "query": "request", "passages": "more", "keep": 1, "size": 10},
            "answer": {"op": "chat", "prompt": "{some} {best}", "output_tokens_max": 2},
        }
        async with gateway(pipelines=[pipeline(stages, "answer")], indexes={"docs": index()}) as (made, _):
            for stream in (False, True):
                reply = await ask(made.port, CHAT, body("passage number 4", stream=stream))
                told = reply.events[-2] if stream else reply.json
                assert sorted(told["sources"]) == ["doc0.md", "doc2.md"], reply.body

    run(main())


def test_what_an_engine_refuses_is_told_even_if_another_was_lost_before() -> None:
    async def main() -> None:
        held: list[Request] = []
        stages = {
            "said": {"op": "chat", "prompt": "first {request}"},
            "answer": {"op": "chat", "prompt": "second {said}"},
        }

        def picky(request: Request) -> None:
            if b"second" in request.body:
                request.respond(400, b'{"error":{"message":"too long","type":"invalid_request_error"}}')
            else:
                request.respond(200, ANSWER)

        async with AsyncExitStack() as stack:
            dying = await stack.enter_async_context(scripted(held.append))
            made = await stack.enter_async_context(
                serving([llm_spec(dying.port)], pipelines=[pipeline(stages, "answer")])
            )
            asked = asyncio.ensure_future(ask(made.port, CHAT, body()))
            await until(lambda: held)
            second = await stack.enter_async_context(scripted(picky))
            made.service.add_engine(llm_spec(second.port))
            await made.healthy(2)
            await made.service.remove_engine(f"llm-{dying.port}", drain=False)
            reply = await asked
            assert reply.status == 400 and said(reply) == "too long", reply.body

    run(main())
