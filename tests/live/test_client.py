"""The client's transport, streams and life, against a real HTTP server that answers whatever a test wants."""

from __future__ import annotations

import asyncio
import base64
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.client import UnifiedInferenceClient
from sage_core.errors import ConfigError, EngineError
from sage_live.client.answers import ChatMessage, read_embeddings
from sage_live.client.asking import AHEAD_MAX
from sage_live.client.refusals import NoAnswerInTime, refusal, refusal_in_stream
from sage_live.client.sse import Events
from sage_live.errors import TYPES, ApiError, rate_limited
from sage_live.http.server import HttpServer, Request

_T = TypeVar("_T")

CHAT, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/embeddings", "/v1/models"
WAIT_S = 10.0


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


def models(*cards: tuple[str, str | None]) -> bytes:
    return encode(
        {"object": "list", "data": [{"id": name, "object": "model"} | ({"kind": k} if k else {}) for name, k in cards]}
    )


def said(text: str) -> bytes:
    return encode({"id": "c", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def event(text: str) -> bytes:
    return b"data: " + encode({"choices": [{"index": 0, "delta": {"content": text}}]}) + b"\n\n"


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.002)


class Site:
    """A server in a loop of its own, as it would be in a process of its own. Replies are made by path, or told later."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.requests: list[Request] = []
        self.gone = 0
        self.replies: dict[str, Callable[[Request], None]] = {}
        self.server = self.run(HttpServer.start(self._handle, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.port}/v1"

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def tell(self, act: Callable[[], None]) -> None:
        """In the server's thread."""
        self.loop.call_soon_threadsafe(act)

    def _handle(self, request: Request) -> None:
        self.requests.append(request)
        request.on_disconnect = self._gone
        reply = self.replies.get(request.path)
        if reply is not None:
            reply(request)

    def _gone(self) -> None:
        self.gone += 1

    def close(self) -> None:
        self.run(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT_S)
        self.loop.close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@contextmanager
def client_of(site: Site, **options: Any) -> Iterator[UnifiedInferenceClient]:
    with UnifiedInferenceClient.create(site.url, **options) as client:
        yield client


# --- what is sent, what is read --------------------------------------------------------------------------------------


def test_a_request_says_what_was_asked_and_who_asks(site: Site) -> None:
    site.replies[CHAT] = lambda request: request.respond(200, said("hello"))
    with client_of(site, api_key="k") as client:
        answer = client.chat(
            "hi", model="m", tenant="acme", priority=2, ttft_s=0.5, e2e_s=3.0, input_tokens=7, temperature=0.5,
            extra_body={"guided_regex": "a+"},
        )  # fmt: skip
        assert answer.text == "hello" and answer.choices[0].message.role == "assistant"
        again = client.chat([{"role": "user", "content": "hi"}, answer.choices[0].message], model="m")
    assert again.text == "hello"
    first, second = site.requests
    assert msgspec.json.decode(first.body) == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "guided_regex": "a+",
    }  # fmt: skip
    sage = {name: value for name, value in first.headers.items() if name.startswith(b"x-sage-")}
    assert sage == {
        b"x-sage-tenant": b"acme", b"x-sage-priority": b"2", b"x-sage-input-tokens": b"7",
        b"x-sage-ttft-ms": b"500.0", b"x-sage-e2e-ms": b"3000.0",
    }  # fmt: skip
    assert first.headers[b"authorization"] == b"Bearer k"
    assert msgspec.json.decode(second.body)["messages"][1] == {"role": "assistant", "content": "hello"}
    assert not any(name.startswith(b"x-sage-") for name in second.headers)


def test_the_key_may_come_from_the_environment_and_v1_may_be_left_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_API_KEY", "from-env")
    monkeypatch.setenv("SAGE_GATEWAY_PORT", str(site.server.port))
    site.replies[MODELS] = lambda request: request.respond(200, models(("m", "llm")))
    with UnifiedInferenceClient.create(site.url.removesuffix("/v1")) as client:
        assert [model.id for model in client.models()] == ["m"]
    with UnifiedInferenceClient.create() as client:  # the gateway of this machine
        assert [model.id for model in client.models()] == ["m"]
    assert [request.headers[b"authorization"] for request in site.requests] == [b"Bearer from-env"] * 2


@pytest.mark.parametrize("as_base64", [True, False], ids=["base64", "float"])
def test_vectors_come_in_the_order_of_the_inputs_in_either_encoding(site: Site, as_base64: bool) -> None:
    wanted = np.arange(12, dtype=np.float32).reshape(3, 4) / 7

    def reply(request: Request) -> None:
        assert msgspec.json.decode(request.body)["encoding_format"] == "base64"
        values = [base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist() for row in wanted]
        data = [{"object": "embedding", "index": index, "embedding": values[index]} for index in (2, 0, 1)]
        request.respond(200, encode({"data": data, "model": "e", "usage": {"prompt_tokens": 9, "total_tokens": 9}}))

    site.replies[EMBEDDINGS] = reply
    with client_of(site) as client:
        answer = client.embed(["a", "b", "c"], model="e")
    assert answer.vectors.dtype == np.float32 and np.array_equal(answer.vectors, wanted)
    assert answer.usage.prompt_tokens == 9 and [item.index for item in answer.data] == [0, 1, 2]
    answer.vectors[0, 0] = 1.0  # the caller's own


def test_an_answer_that_is_not_openais_is_the_servers_fault() -> None:
    for body in (
        b"nonsense", b'{"data": [{"embedding": [1.0], "index": 1}]}', b'{"data": [{"embedding": "A", "index": 0}]}',
        b'{"data": [{"embedding": [1.0], "index": 0}, {"embedding": [1.0, 2.0], "index": 1}]}',
    ):  # fmt: skip
        with pytest.raises(EngineError):
            read_embeddings(body)


def test_the_model_need_not_be_named_where_there_is_one_of_its_kind(site: Site) -> None:
    site.replies[MODELS] = lambda request: request.respond(200, models(("talks", "llm"), ("embeds", "embedding")))
    site.replies[CHAT] = lambda request: request.respond(200, said(msgspec.json.decode(request.body)["model"]))
    with client_of(site) as client:
        assert client.chat("hi").text == "talks" and client.chat("hi").text == "talks"
        assert [request.path for request in site.requests].count(MODELS) == 1  # remembered
        site.replies[MODELS] = lambda request: request.respond(200, models(("b", "llm"), ("a", None)))
        client.models()
        with pytest.raises(ConfigError, match=r"model: 2 models could be meant; choose one of a, b"):
            client.chat("hi")
        assert asyncio.run(client.aio.models())[0].id == "b"
        site.replies[MODELS] = lambda request: request.respond(200, models(("embeds", "embedding")))
        client.models()
        with pytest.raises(ConfigError, match="no llm model is served"):
            client.chat("hi")


def test_a_message_can_be_sent_as_it_was_received() -> None:
    assert encode(ChatMessage("assistant", "x")) == b'{"role":"assistant","content":"x"}'


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", sorted(TYPES))
def test_what_the_gateway_refuses_is_raised_as_it_was_meant(site: Site, status: int) -> None:
    error = ApiError(status, "no", code="c", param="p", retry_after_s=0.25)
    site.replies[CHAT] = lambda request: request.respond(status, error.body(), headers=error.headers())
    with client_of(site) as client, pytest.raises(ApiError) as raised:
        client.chat("hi", model="m")
    told = raised.value
    assert (told.status, told.message, told.type, told.code, told.param) == (status, "no", error.type, "c", "p")
    assert told.retry_after_s == 0.25


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object":"error","message":"old vllm","type":"BadRequestError","param":null,"code":400}', "old vllm"),
        (b'{"detail":"not found"}', "not found"),
        (b'{"error":"plain"}', "plain"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", "The server answered 418."),
        (b"[1]", "[1]"),
    ],
)
def test_other_servers_errors_are_understood(body: bytes, message: str) -> None:
    error = refusal(418, body, {b"retry-after": b"Wed, 21 Oct 2026 07:28:00 GMT"})
    assert (error.status, error.message, error.retry_after_s) == (418, message, None)


def test_nobody_there_is_an_engine_error(site: Site) -> None:
    port = site.server.port
    with UnifiedInferenceClient.create(f"http://127.0.0.1:{port}/v1") as client:
        site.run(site.server.close())
        with pytest.raises(EngineError, match=f"cannot connect to 127.0.0.1:{port}"):
            client.chat("hi", model="m")


def test_a_connection_cut_in_the_middle_of_an_answer_is_an_engine_error(site: Site) -> None:
    def reply(request: Request) -> None:
        request.start(200)
        request.write(event("one"))
        site.loop.call_later(0.02, request.abort)

    site.replies[CHAT] = reply
    with client_of(site) as client:
        stream = client.chat("hi", model="m", stream=True)
        assert next(stream).text == "one"
        with pytest.raises(EngineError, match="in the middle"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_an_answer_that_does_not_come_in_time_cuts_the_request(site: Site) -> None:
    with client_of(site, timeout_s=30.0) as client:
        with pytest.raises(NoAnswerInTime, match=r"no answer within 0\.05 s"):
            client.chat("hi", model="m", timeout_s=0.05)
        until(lambda: site.gone == 1)
        with pytest.raises(TimeoutError):
            asyncio.run(client.aio.chat("hi", model="m", stream=True, timeout_s=0.05))
        until(lambda: site.gone == 2)


def test_a_stream_may_take_longer_than_its_timeout_while_something_comes(site: Site) -> None:
    def reply(request: Request) -> None:
        request.start(200)

        def write(left: int) -> None:
            request.write(event(str(left)))
            if left:
                site.loop.call_later(0.1, write, left - 1)

        write(12)

    site.replies[CHAT] = reply
    with client_of(site) as client:
        stream = client.chat("hi", model="m", stream=True, timeout_s=1.0)
        began = time.monotonic()
        texts = [next(stream).text for _ in range(13)]
        assert texts == [str(left) for left in range(12, -1, -1)] and time.monotonic() - began > 1.0
        with pytest.raises(NoAnswerInTime, match="nothing more within"):
            next(stream)


# --- retries ---------------------------------------------------------------------------------------------------------


def busy_twice(site: Site, retry_after_s: float) -> None:
    def reply(request: Request) -> None:
        if len(site.requests) <= 2:
            error = rate_limited(retry_after_s)
            request.respond(error.status, error.body(), headers=error.headers())
        else:
            request.respond(200, said("at last"))

    site.replies[CHAT] = reply


def test_nothing_is_retried_unless_asked(site: Site) -> None:
    busy_twice(site, 0.01)
    with client_of(site) as client, pytest.raises(ApiError) as raised:
        client.chat("hi", model="m")
    assert raised.value.status == 429 and len(site.requests) == 1


def test_a_client_that_may_comes_back_when_it_was_told_to(site: Site) -> None:
    busy_twice(site, 0.05)
    with client_of(site, retries=2) as client:
        began = time.monotonic()
        assert client.chat("hi", model="m").text == "at last"
        assert time.monotonic() - began >= 0.1 and len(site.requests) == 3
        site.requests.clear()
        busy_twice(site, 30.0)
        with pytest.raises(ApiError):  # not worth waiting for
            client.chat("hi", model="m", timeout_s=5.0)
        assert len(site.requests) == 1


# --- streams ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=9).map(base64.b64encode), max_size=8), st.lists(st.integers(1, 7)), st.booleans())
def test_events_survive_any_cut(payloads: list[bytes], cuts: list[int], crlf: bool) -> None:
    wanted = [payload for payload in payloads if payload]
    stream = b": hello\n\n" + b"".join(b"event: x\ndata: %b\n\n" % payload for payload in wanted)
    if crlf:
        stream = stream.replace(b"\n", b"\r\n")
    events, found, at = Events(), [], 0
    for cut in cuts:
        found += events.feed(stream[at : at + cut])
        at += cut
    found += events.feed(stream[at:])
    assert found + events.end() == wanted


def test_an_event_not_closed_by_a_blank_line_counts_and_lines_of_data_are_joined() -> None:
    events = Events()
    assert events.feed(b"data: a\ndata: b\n\ndata:c") == [b"a\nb"] and events.end() == [b"c"]


def test_an_error_in_a_stream_is_raised_after_what_came_before(site: Site) -> None:
    def reply(request: Request) -> None:
        request.start(200)
        request.write(event("one") + ApiError(502, "it died", code="upstream_failed").event())
        request.abort()

    site.replies[CHAT] = reply
    with client_of(site) as client:
        stream = client.chat("hi", model="m", stream=True)
        assert next(stream).text == "one"
        with pytest.raises(ApiError) as raised:
            next(stream)
    assert (raised.value.status, raised.value.code, raised.value.message) == (502, "upstream_failed", "it died")


def test_what_only_looks_like_an_error_is_text() -> None:
    assert refusal_in_stream(b'{"choices": [{"delta": {"content": "\\"error\\""}}]}') is None
    assert refusal_in_stream(b'{"choices": [{"error": 1}]}') is None
    error = refusal_in_stream(b'{"error": {"message": "m", "type": "BadRequestError", "code": 400}}')
    assert error is not None and error.status == 400


def endless(site: Site) -> None:
    def reply(request: Request) -> None:
        request.start(200)
        going = [True]

        def write() -> None:
            if not request.answered and going[0]:
                request.write(event("x" * 50) * 20)
                site.loop.call_later(0.001, write)

        def writable(yes: bool) -> None:
            was, going[0] = going[0], yes
            if yes and not was:
                write()

        request.on_writable = writable
        write()

    site.replies[CHAT] = reply


def test_leaving_the_loop_closing_and_letting_go_each_end_the_request(site: Site) -> None:
    endless(site)
    with client_of(site) as client:
        held = client.chat("hi", model="m", stream=True)
        for _ in held:
            break
        until(lambda: site.gone == 1)
        assert list(held) == []
        closed = client.chat("hi", model="m", stream=True)
        closed.close()
        until(lambda: site.gone == 2)
        with client.chat("hi", model="m", stream=True) as stream:
            next(stream)
        until(lambda: site.gone == 3)
        stream = client.chat("hi", model="m", stream=True)
        del stream
        gc.collect()
        until(lambda: site.gone == 4)


def test_the_same_for_coroutines_and_a_cancelled_task(site: Site) -> None:
    endless(site)

    async def leave(client: UnifiedInferenceClient) -> None:
        held = await client.aio.chat("hi", model="m", stream=True)
        async for _ in held:
            break
        await asyncio.to_thread(until, lambda: site.gone == 1)
        async with await client.aio.chat("hi", model="m", stream=True) as stream:
            assert (await anext(stream)).text
        await asyncio.to_thread(until, lambda: site.gone == 2)
        site.replies.clear()  # nobody answers from here
        for ask in (client.aio.chat("hi", model="m"), client.aio.chat("hi", model="m", stream=True)):
            site.requests.clear()
            site.gone = 0
            task = asyncio.create_task(ask)
            await asyncio.to_thread(until, lambda: site.requests)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(until, lambda: site.gone == 1)

    with client_of(site) as client:
        asyncio.run(leave(client))


def test_a_reader_that_falls_behind_holds_the_server_back(site: Site) -> None:
    written = [0]

    def reply(request: Request) -> None:
        request.start(200)
        on = [True]

        def write() -> None:
            while on[0] and written[0] < 100_000 and not request.answered:
                request.write(event(str(written[0])))
                written[0] += 1
            if written[0] == 100_000 and not request.answered:
                request.write(b"data: [DONE]\n\n")
                request.end()

        def writable(yes: bool) -> None:
            on[0] = yes
            if yes:
                write()

        request.on_writable = writable
        write()

    site.replies[CHAT] = reply
    with client_of(site) as client:
        stream = client.chat("hi", model="m", stream=True, timeout_s=1.0)
        before = -1
        while written[0] != before:  # until nothing moves any more
            before = written[0]
            time.sleep(0.3)
        assert AHEAD_MAX < before < 100_000
        time.sleep(1.2)  # waiting for the reader is not the server's delay
        assert [chunk.text for chunk in stream] == [str(number) for number in range(100_000)]


# --- life ------------------------------------------------------------------------------------------------------------


def test_create_is_the_only_constructor() -> None:
    with pytest.raises(TypeError, match="create"):
        UnifiedInferenceClient()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "http://h", "cluster": "small"}, "expected one of base_url, engines and cluster"),
        ({"base_url": "http://h", "policy": "fifo"}, "the gateway's business"),
        ({"base_url": "ftp://h"}, "expected http"),
        ({"base_url": "http://h", "api_key": "a\nb"}, "api_key"),
        ({"base_url": "http://h", "timeout_s": 0}, "timeout_s"),
        ({"base_url": "http://h", "retries": -1}, "retries"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnifiedInferenceClient.create(**arguments)


def test_a_wrong_option_is_told_as_the_gateway_would(site: Site) -> None:
    with client_of(site) as client, pytest.raises(ApiError) as raised:
        client.chat("hi", model="m", tenant="a\r\nx-evil: 1")
    assert raised.value.status == 400 and raised.value.param == "x-sage-tenant" and not site.requests


def test_many_threads_share_a_client(site: Site) -> None:
    site.replies[CHAT] = lambda request: request.respond(
        200, said(msgspec.json.decode(request.body)["messages"][0]["content"])
    )
    wrong: list[str] = []
    with client_of(site) as client:

        def ask(thread: int) -> None:
            for number in range(25):
                text = f"{thread}/{number}"
                if client.chat(text, model="m").text != text:
                    wrong.append(text)

        threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert not wrong and len(site.requests) == 200 and site.gone == 0


def test_a_closed_client_fails_what_is_underway_and_says_so(site: Site) -> None:
    client = UnifiedInferenceClient.create(site.url)
    failed: list[Exception] = []

    def ask() -> None:
        try:
            client.chat("hi", model="m")
        except EngineError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: site.requests)
    client.close()
    thread.join(WAIT_S)
    assert "the client was closed" in str(failed[0])
    until(lambda: site.gone == 1)
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.chat("hi", model="m")
    with pytest.raises(ConfigError, match="closed"):
        asyncio.run(client.aio.chat("hi", model="m", stream=True))


def test_the_asynchronous_half_lives_by_itself_and_closes_both(site: Site) -> None:
    site.replies[CHAT] = lambda request: request.respond(200, said("x"))

    async def main() -> None:
        async with UnifiedInferenceClient.create(site.url).aio as aio:
            gc.collect()  # the client itself is gone
            texts = await asyncio.gather(*(aio.chat("hi", model="m") for _ in range(50)))
            assert {answer.text for answer in texts} == {"x"}

    asyncio.run(main())
    until(lambda: site.server.connections == 0)


def test_a_client_that_nobody_holds_closes_its_connections(site: Site) -> None:
    site.replies[CHAT] = lambda request: request.respond(200, said("x"))
    client = UnifiedInferenceClient.create(site.url)
    client.chat("hi", model="m")
    assert site.server.connections == 1
    del client
    gc.collect()
    until(lambda: site.server.connections == 0)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_process_ends_cleanly_with_an_open_client_and_a_live_stream(site: Site) -> None:
    endless(site)
    done = python(
        "import sys\n"
        "from sage_bench.client import UnifiedInferenceClient\n"
        "client = UnifiedInferenceClient.create(sys.argv[1])\n"
        "stream = client.chat('hi', model='m', stream=True)\n"
        "print(len(next(stream).text))\n",
        site.url,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "50\n", "")
    until(lambda: site.gone == 1)


def test_a_forked_process_needs_a_client_of_its_own(site: Site) -> None:
    site.replies[CHAT] = lambda request: request.respond(200, said("x"))
    done = python(
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"  # newer Pythons warn of forking with threads
        "from sage_bench.client import UnifiedInferenceClient\n"
        "from sage_core.errors import ConfigError\n"
        "client = UnifiedInferenceClient.create(sys.argv[1])\n"
        "client.chat('hi', model='m')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        client.chat('hi', model='m')\n"
        "    except ConfigError as error:\n"
        "        print(error, flush=True)\n"
        "    with UnifiedInferenceClient.create(sys.argv[1]) as own:\n"
        "        print(own.chat('hi', model='m').text, flush=True)\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print(client.chat('hi', model='m').text)\n",
        site.url,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, *rest = done.stdout.splitlines()
    assert "is a fork" in first and rest == ["x", "x"]
