"""The emulated engine over real sockets: vLLM's protocol, the model's instants, and nothing left behind by who leaves."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.backend import ContentsOf, OutputTokens
from sage_core.commands import Dispatch, Task
from sage_core.units import NEVER, task_id
from sage_live.servers.emulated import Behaviour, EmulatedServer, ServedEmbedding, ServedLlm, shared_out
from sage_live.servers.emulated_metrics import KvCache
from sage_live.servers.synthetic import TOKEN_BYTES, Words, content_ids, estimated_tokens, output_length, seed_of
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime

ITERATION_S = 0.004
# The same time whatever is in it.
LLM = IterationTime(token_knots=(1,), token_ps=(round(ITERATION_S * 1e12),), head_knots=(1,), head_ps=(0,))
EMBED = IterationTime(token_knots=(1,), token_ps=(1_000_000_000,), head_knots=(1,), head_ps=(0,))

CHAT = "/v1/chat/completions"


def replica(**more: Any) -> LlmReplica:
    given: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "block_size": 16, "kv_blocks": 1000}
    return LlmReplica(0, "llm", LLM, **(given | more))


@asynccontextmanager
async def engine(llm: LlmReplica | None = None, **behaviour: Any) -> AsyncIterator[EmulatedServer]:
    llm = llm or replica()
    embed = EmbedReplica(1, "embed", EMBED, max_batch_tasks=8, max_batch_tokens=4096)

    def make(output_tokens: OutputTokens, contents: ContentsOf) -> SimulatedDevice:
        return SimulatedDevice(0, "here", llm, embed, output_tokens, contents=contents)

    server = await EmulatedServer.start(
        make,
        llm=ServedLlm(
            "small",
            llm.max_model_len,
            KvCache(llm.kv_blocks, llm.block_size, llm.prefix_caching),
            llm.priority_queue,
        ),
        embedding=ServedEmbedding("vectors", tokens_max=512, dimensions=32),
        behaviour=Behaviour(**behaviour),
    )
    try:
        yield server
    finally:
        await server.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def head(path: str, body: bytes, headers: dict[str, str], method: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
    lines += [f"{key}: {value}" for key, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def opened(
    server: EmulatedServer, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    writer.write(head(path, raw, headers or {}, method))
    return reader, writer


async def status_and_head(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    text = await reader.readuntil(b"\r\n\r\n")
    return int(text.split(b" ", 2)[1]), text.lower()


async def asked(
    server: EmulatedServer, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
) -> tuple[int, Any]:
    """Status and body: parsed, or as text where it is no JSON."""
    reader, writer = await opened(server, path, body, headers, method or ("GET" if body is None else "POST"))
    status, text = await status_and_head(reader)
    length = int(text.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    raw = await reader.readexactly(length)
    writer.close()
    try:
        return status, json.loads(raw)
    except ValueError:
        return status, raw.decode()


async def events(reader: asyncio.StreamReader) -> list[tuple[float, Any]]:
    """Of a stream: when each came (s), and what it was; the last is None for [DONE]."""
    came: list[tuple[float, Any]] = []
    while True:
        size = int(await reader.readline(), 16)
        if size == 0:
            break
        chunk = await reader.readexactly(size)
        await reader.readexactly(2)
        now = time.monotonic()
        for event in chunk.decode().split("\n\n")[:-1]:
            data = event.removeprefix("data: ")
            came.append((now, None if data == "[DONE]" else json.loads(data)))
    return came


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def chat(content: str = "Hello there", **more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}


async def metric(server: EmulatedServer, name: str) -> float:
    _, text = await asked(server, "/metrics")
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return float(line.rpartition(" ")[2])


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_long_as_asked_and_the_same_each_time() -> None:
    async def main() -> None:
        async with engine() as server:
            status, first = await asked(server, CHAT, chat(ignore_eos=True), {"x-request-id": "abc-1"})
            _, again = await asked(server, CHAT, chat(ignore_eos=True))
            _, other = await asked(server, CHAT, chat("Another", ignore_eos=True))
        assert status == 200
        assert first["id"] == "chatcmpl-abc-1"
        assert (first["object"], first["model"]) == ("chat.completion", "small")
        (choice,) = first["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["role"] == "assistant"
        assert len(choice["message"]["content"].split()) == 12
        # "user\nHello there" is 16 bytes, and a message has 4 tokens more.
        assert first["usage"] == {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}
        assert again["choices"] == first["choices"] != other["choices"]

    run(main())


def test_a_stream_says_what_the_whole_answer_says() -> None:
    async def main() -> None:
        async with engine() as server:
            for path, body in ((CHAT, chat()), ("/v1/completions", {"prompt": [5, 6, 7]})):
                _, whole = await asked(server, path, body)
                options = {"stream": True, "stream_options": {"include_usage": True}}
                reader, writer = await opened(server, path, {**body, **options})
                status, lines = await status_and_head(reader)
                told = [event for _, event in await events(reader)]
                writer.close()
                assert status == 200
                assert b"content-type: text/event-stream" in lines
                *pieces, usage, done = told
                assert done is None
                assert usage["choices"] == []
                assert usage["usage"] == whole["usage"]
                choices = [piece["choices"][0] for piece in pieces]
                said = "".join(each["delta"]["content"] if path == CHAT else each["text"] for each in choices)
                (choice,) = whole["choices"]
                assert said == (choice["message"]["content"] if path == CHAT else choice["text"])
                assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
                assert pieces[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
                assert {piece["id"] for piece in pieces} == {usage["id"]}

    run(main())


def test_tokens_come_as_the_model_makes_them_and_never_before() -> None:
    async def main() -> None:
        async with engine() as server:
            started = time.monotonic()
            reader, writer = await opened(server, CHAT, chat(max_tokens=40, ignore_eos=True, stream=True))
            await status_and_head(reader)
            told = await events(reader)
            writer.close()
        tokens, instants = 0, []
        for came, event in told:
            if event is None or "role" in event["choices"][0]["delta"]:
                continue
            tokens += len(event["choices"][0]["delta"]["content"]) // TOKEN_BYTES
            instants.append(came)
            assert came - started > tokens * ITERATION_S
        assert tokens == 40
        assert len(instants) > 8, "tokens came in bursts"
        assert instants[-1] - instants[0] > 20 * ITERATION_S

    run(main())


def test_an_answer_takes_what_the_model_says() -> None:
    """Beside the same request in virtual time: no sooner, and late by what the event loop needs."""
    device = SimulatedDevice(0, "here", replica(), None, lambda request, stage: 50)
    device.step(0, (Dispatch(0, (Task(task_id(0, 0), 0, 0, 0, 0, 300, 50),)),))  # type: ignore[arg-type]
    ends = 0
    while (at := device.wakeup_at) < NEVER:
        device.step(at, ())
        ends = at

    async def main() -> None:
        async with engine() as server:
            body = {"prompt": [1] * 300, "max_tokens": 50, "ignore_eos": True}
            started = time.monotonic()
            await asked(server, "/v1/completions", body)
            took = time.monotonic() - started
            assert ends / 1e9 < took < 10 * ends / 1e9
            assert server.engine.lateness.count > 0
            assert server.engine.lateness.sum < took

    run(main())


def test_an_interval_makes_fewer_events_of_as_many_tokens() -> None:
    async def main() -> None:
        async with engine(interval=10) as server:
            reader, writer = await opened(server, CHAT, chat(max_tokens=40, ignore_eos=True, stream=True))
            await status_and_head(reader)
            told = await events(reader)
            writer.close()
        contents = [event["choices"][0]["delta"]["content"] for _, event in told if event is not None]
        sizes = [len(content) // TOKEN_BYTES for content in contents if content]
        assert sizes[0] == 1
        assert sum(sizes) == 40
        assert all(size >= 10 for size in sizes[1:-1])

    run(main())


def test_many_at_once_get_what_is_theirs() -> None:
    async def one(server: EmulatedServer, number: int) -> None:
        tokens = 1 + number % 30
        body = chat(f"Number {number}", max_tokens=tokens, ignore_eos=True)
        if number % 2:
            _, answer = await asked(server, CHAT, body)
            assert answer["usage"]["completion_tokens"] == tokens
            return
        reader, writer = await opened(server, CHAT, {**body, "stream": True})
        await status_and_head(reader)
        told = await events(reader)
        writer.close()
        said = "".join(event["choices"][0]["delta"]["content"] for _, event in told if event is not None)
        assert len(said.split()) == tokens

    async def main() -> None:
        async with engine() as server:
            await asyncio.gather(*(one(server, number) for number in range(120)))
            assert server.engine.live == 0
            assert await metric(server, "vllm:generation_tokens_total") == sum(1 + n % 30 for n in range(120))

    run(main())


def test_who_leaves_the_end_to_the_model_gets_a_drawn_length() -> None:
    async def main() -> None:
        async with engine(output_tokens_mean=10) as server:
            lengths, reasons = [], set()
            for number in range(25):
                _, answer = await asked(server, "/v1/completions", {"prompt": f"Draw {number}", "max_tokens": 15})
                length, reason = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
                assert (reason == "length") == (length == 15)
                lengths.append(length)
                reasons.add(reason)
            assert len(set(lengths)) > 3
            assert reasons == {"stop", "length"}
            _, seeded = await asked(server, "/v1/completions", {"prompt": "Draw 0", "max_tokens": 15, "seed": 4})
            _, answer = await asked(server, "/v1/completions", {"prompt": "Draw 0", "max_tokens": 15})
            assert seeded["choices"] != answer["choices"]
            _, least = await asked(server, "/v1/completions", {"prompt": "x", "max_tokens": 15, "min_tokens": 15})
            assert least["usage"]["completion_tokens"] == 15

    run(main())


def test_input_tokens_are_stated_or_counted_or_estimated() -> None:
    async def main() -> None:
        async with engine() as server:

            async def prompt_tokens(path: str, body: Any, headers: dict[str, str] | None = None) -> int:
                _, answer = await asked(server, path, {"max_tokens": 1, **body}, headers)
                return int(answer["usage"]["prompt_tokens"])

            assert await prompt_tokens("/v1/completions", {"prompt": "x" * 41}) == 11
            assert await prompt_tokens("/v1/completions", {"prompt": list(range(41))}) == 41
            assert await prompt_tokens(CHAT, chat("hi"), {"x-sage-input-tokens": "777"}) == 777
            parts = [{"type": "text", "text": "x" * 11}, {"type": "image_url", "image_url": {"url": "data:"}}]
            assert await prompt_tokens(CHAT, chat(parts)) == 8 + 1  # type: ignore[arg-type]
            assert (await asked(server, CHAT, chat(), {"x-sage-input-tokens": "-1"}))[0] == 400

    run(main())


def test_a_prompt_seen_before_is_cached() -> None:
    async def main() -> None:
        async with engine(replica(prefix_caching=True)) as server:
            for last in ("first", "second"):
                await asked(server, "/v1/completions", {"prompt": "shared words " * 40 + last, "max_tokens": 1})
            assert await metric(server, "vllm:prefix_cache_hits_total") == 13 * 40 // 64 * 16

    run(main())


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_equal_for_equal_inputs_in_their_order() -> None:
    async def main() -> None:
        async with engine() as server:
            body = {"model": "vectors", "input": ["a", "b", "a"]}
            status, answer = await asked(server, "/v1/embeddings", body)
            _, packed = await asked(server, "/v1/embeddings", {**body, "encoding_format": "base64"})
            _, tokens = await asked(server, "/v1/embeddings", {"input": [[1, 2], [3, 4, 5]], "dimensions": 8})
            _, single = await asked(server, "/v1/embeddings", {"input": [3, 4, 5], "dimensions": 8})
        assert status == 200
        assert [item["index"] for item in answer["data"]] == [0, 1, 2]
        a, b, same = (np.array(item["embedding"], np.float32) for item in answer["data"])
        assert np.array_equal(a, same)
        assert abs(a @ b) < 0.9
        assert a @ a == pytest.approx(1, abs=1e-5)
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        for vector, item in zip((a, b, same), packed["data"], strict=True):
            assert np.array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), vector)
        assert tokens["usage"]["prompt_tokens"] == 5
        assert [len(item["embedding"]) for item in tokens["data"]] == [8, 8]
        assert single["data"][0]["embedding"] == tokens["data"][1]["embedding"]

    run(main())


def test_stated_tokens_are_shared_out_over_inputs() -> None:
    async def main() -> None:
        async with engine() as server:
            body = {"input": ["x" * 4, "x" * 12], "model": "vectors"}
            _, answer = await asked(server, "/v1/embeddings", body, {"x-sage-input-tokens": "40"})
            assert answer["usage"]["prompt_tokens"] == 40
            assert (await asked(server, "/v1/embeddings", body, {"x-sage-input-tokens": "1"}))[0] == 400

    run(main())


# --- who leaves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_who_disconnects_frees_the_engine_within_an_iteration(stream: bool) -> None:
    async def main() -> None:
        async with engine() as server:
            body = chat(max_tokens=5000, ignore_eos=True, stream=stream)
            reader, writer = await opened(server, CHAT, body)
            if stream:
                await status_and_head(reader)
            await until(lambda: server.engine.reports()[0].running == 1)
            assert server.engine.reports()[0].kv_blocks_free < 1000
            writer.close()
            await until(lambda: server.engine.live == 0)
            iterations = server.engine.usage()[0].iterations
            await until(lambda: server.engine.reports()[0].running == 0)
            assert server.engine.usage()[0].iterations <= iterations + 1
            assert server.engine.reports()[0].kv_blocks_free == 1000
            _, text = await asked(server, "/metrics")
            assert 'finished_reason="abort"} 1' in text

    run(main())


def test_who_disconnects_while_waiting_never_runs() -> None:
    async def main() -> None:
        async with engine(replica(max_num_seqs=1)) as server:
            _, first = await opened(server, CHAT, chat(max_tokens=5000, ignore_eos=True))
            await until(lambda: server.engine.reports()[0].running == 1)
            _, second = await opened(server, CHAT, chat(max_tokens=5000, ignore_eos=True))
            await until(lambda: server.engine.reports()[0].waiting == 1)
            second.close()
            await until(lambda: server.engine.reports()[0].waiting == 0)
            assert server.engine.reports()[0].running == 1
            first.close()
            await until(lambda: server.engine.live == 0)

    run(main())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT, b"{", 400, "not valid JSON"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "not valid JSON"),
        ("/v1/completions", b'{"prompt": ' + b"[" * 100_000, 400, "not valid JSON"),
        (CHAT, [], 400, "Expected `object`"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, chat(model="large"), 404, "large"),
        (CHAT, chat(max_tokens="ten"), 400, "max_tokens"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens"),
        (CHAT, chat(n=2), 400, "n: "),
        (CHAT, chat(max_tokens=16_000), 400, "maximum context length"),
        (CHAT, chat(min_tokens=13), 400, "min_tokens"),
        (CHAT, chat(priority=3), 400, "priority"),
        ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo"),
        ("/v1/completions", {"prompt": ["x", "y"]}, 400, "one text"),
        ("/v1/completions", {"prompt": [1, "x"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/embeddings", {"input": []}, 400, "input"),
        ("/v1/embeddings", {"input": "x", "model": "small"}, 404, "small"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, 400, "hex"),
        ("/v1/embeddings", {"input": "x", "dimensions": 33}, 400, "dimensions"),
        ("/v1/embeddings", {"input": "x" * 3000}, 400, "maximum context length"),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
        ("/v1/models", {}, 405, "GET"),
    ],
)
def test_what_is_wrong_is_told_in_openais_shape(path: str, body: Any, status: int, said: str) -> None:
    async def main() -> None:
        async with engine() as server:
            got, answer = await asked(server, path, body)
            assert got == status, answer
            assert said in answer["error"]["message"]
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert (await asked(server, CHAT, chat()))[0] == 200

    run(main())


def test_priority_is_taken_where_the_engine_schedules_by_it() -> None:
    async def main() -> None:
        async with engine(replica(max_num_seqs=1, priority_queue=True)) as server:
            order: list[int] = []

            async def one(priority: int, tokens: int = 5) -> None:
                await asked(server, CHAT, chat("x", priority=priority, max_tokens=tokens, ignore_eos=True))
                order.append(priority)

            first = asyncio.ensure_future(one(0, 60))
            await until(lambda: server.engine.reports()[0].running == 1)
            rest = []
            for priority in (3, 2, 1):
                rest.append(asyncio.ensure_future(one(priority)))
                await until(lambda: server.engine.live > len(rest) or first.done())
            await asyncio.gather(first, *rest)
            assert order == [0, 1, 2, 3]

    run(main())


# --- the rest of the API ----------------------------------------------------------------------------------------------


def test_it_says_what_it_is() -> None:
    async def main() -> None:
        async with engine(replica(max_model_len=4096)) as server:
            _, models = await asked(server, "/v1/models")
            assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [
                ("small", 4096),
                ("vectors", 512),
            ]
            assert (await asked(server, "/health")) == (200, "")
            assert (await asked(server, "/version"))[1]["engine"] == "sage-emulated"

    run(main())


def test_metrics_have_vllms_names_and_add_up() -> None:
    async def main() -> None:
        async with engine() as server:
            for _ in range(3):
                await asked(server, CHAT, chat(ignore_eos=True))
            await asked(server, "/v1/embeddings", {"input": ["a", "b"]})
            values = {
                name: await metric(server, name)
                for name in (
                    "vllm:num_requests_running",
                    "vllm:num_requests_waiting",
                    "vllm:kv_cache_usage_perc",
                    "vllm:prompt_tokens_total",
                    "vllm:generation_tokens_total",
                    "vllm:time_to_first_token_seconds_count",
                    "vllm:e2e_request_latency_seconds_count",
                    "sage_emulated_embedded_texts_total",
                )
            }
            assert [*values.values()] == [0, 0, 0, 3 * 8 + 2, 36, 3, 3, 2]
            _, text = await asked(server, "/metrics")
            assert 'block_size="16"' in text
            assert 'num_gpu_blocks="1001"' in text
            assert await metric(server, "sage_emulated_lateness_seconds_count") > 0

    run(main())


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_hanging_engine_accepts_and_never_answers() -> None:
    async def main() -> None:
        async with engine(hang_after=1) as server:
            assert (await asked(server, CHAT, chat()))[0] == 200
            reader, writer = await opened(server, CHAT, chat())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.2)
            assert (await asked(server, "/health"))[0] == 200
            writer.close()

    run(main())


def test_a_failing_engine_fails_the_share_asked_for() -> None:
    async def main() -> None:
        async with engine(fail_rate=0.25) as server:
            statuses = [(await asked(server, CHAT, chat()))[0] for _ in range(8)]
            assert statuses == [200, 200, 200, 500] * 2

    run(main())


def test_a_slow_engine_takes_so_many_times_as_long() -> None:
    async def main() -> None:
        async with engine(slow=5.0) as server:
            started = time.monotonic()
            await asked(server, CHAT, chat(ignore_eos=True))
            assert time.monotonic() - started > 5 * 12 * ITERATION_S

    run(main())


# --- what is made up --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 40_000), st.integers(0, 40_000))
def test_any_stretch_of_the_text_is_a_slice(seed: int, first: int, second: int) -> None:
    whole = WORDS.text(seed, 0, first + second)
    assert WORDS.text(seed, 0, first) + WORDS.text(seed, first, second) == whole
    assert len(whole.split()) == first + second
    assert estimated_tokens(whole) == max(1, first + second)


WORDS = Words()


@given(st.integers(0, 10_000), st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_shares_add_up(more: int, sizes: list[int]) -> None:
    shares = shared_out(len(sizes) + more, sizes)
    assert sum(shares) == len(sizes) + more
    assert len(shares) == len(sizes)
    assert min(shares) >= 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.lists(st.integers(0, 3), min_size=1, max_size=80))
def test_blocks_are_equal_as_far_as_prompts_are(one: list[int], other: list[int]) -> None:
    alike = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for prompts in ((one, other), (bytes(one), bytes(other))):
        step = 4 if isinstance(prompts[0], list) else 4 * TOKEN_BYTES
        ids = [content_ids(prompt, 1000, 4) for prompt in prompts]
        assert [len(each) for each in ids] == [len(prompt) // step for prompt in prompts]
        same = sum(a == b for a, b in zip(*ids, strict=False))
        assert same == alike // step
        assert ids[0][:same] == ids[1][:same]


def test_drawn_lengths_have_the_mean_that_is_stated() -> None:
    lengths = [output_length(seed_of(f"prompt {n}".encode(), None), 100, 10**6, 0) for n in range(4000)]
    assert np.mean(lengths) == pytest.approx(100, rel=0.1)
    assert np.median(lengths) == pytest.approx(70, rel=0.15)
