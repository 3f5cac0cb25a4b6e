"""Whatever is sent to the gateway, it answers in OpenAI's error shape, never with a 500, and goes on serving."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import (
    CHAT,
    COMPLETIONS,
    EMBED,
    EMBEDDINGS,
    LLM,
    Client,
    ask,
    chat,
    embedding,
    gateway,
    is_openai_error,
    request_bytes,
    run,
)

from sage_core.slo import Slo, SloTable
from sage_live.http.limits import Limits
from sage_live.service import ServiceConfig

BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "not JSON": b"hello",
    "cut": b'{"model":"small","messages":[{"role":"user","content":"x"}]',
    "two values": b'{"model":"small","messages":[{"role":"user"}]} {}',
    "null": b"null",
    "a list": b"[]",
    "a number": b"1e999",
    "no model": b'{"messages":[{"role":"user","content":"x"}]}',
    "no messages": b'{"model":"small"}',
    "empty messages": b'{"model":"small","messages":[]}',
    "model of the wrong type": b'{"model":5,"messages":[{"role":"user"}]}',
    "an empty model": b'{"model":"","messages":[{"role":"user"}]}',
    "an unknown model": b'{"model":"gpt-17","messages":[{"role":"user"}]}',
    "a model with control characters": b'{"model":"a\\u0000\\r\\nset-cookie: x","messages":[{"role":"user"}]}',
    "messages of the wrong type": b'{"model":"small","messages":{"role":"user"}}',
    "stream of the wrong type": b'{"model":"small","messages":[{"role":"user"}],"stream":"yes"}',
    "negative tokens": b'{"model":"small","messages":[{"role":"user"}],"max_tokens":-1}',
    "a huge number": b'{"model":"small","messages":[{"role":"user"}],"max_tokens":' + b"9" * 5000 + b"}",
    "a fraction": b'{"model":"small","messages":[{"role":"user"}],"max_tokens":1.5}',
    "NaN": b'{"model":"small","messages":[{"role":"user"}],"max_tokens":NaN}',
    "invalid UTF-8": b'{"model":"small\xff","messages":[{"role":"user"}]}',
    "invalid UTF-8 within a text": b'{"model":"small","messages":[{"role":"user","content":"a\xc3\x28"}]}',
    "invalid UTF-8 where nobody looks": b'{"model":"small","messages":[{"role":"user"}],"x":{"y":"\xed\xa0\x80"}}',
    "NUL": b'{"model":"small","messages":[{"role":"user","content":"\x00"}]}',
    "UTF-16": '{"model":"small"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model":"small","messages":[{"role":"user"}]}',
    "deep": b'{"model":"small","messages":[{"role":"user","content":' + b"[" * 200_000 + b"]" * 200_000 + b"}]}",
    "deep in a field that passes": b'{"model":"small","messages":[{"role":"user"}],"x":' + b"[" * 9999 + b"]" * 9999 + b"}",
    "duplicate keys": b'{"model":"small","model":"none","messages":[{"role":"user"}]}',
    "half a surrogate pair as a key": b'{"model":"small","messages":[{"role":"user"}],"\\ud800":1}',
}  # fmt: skip


def test_bad_bodies_are_the_clients_error() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            for name, body in BAD_BODIES.items():
                for path in (CHAT, COMPLETIONS, EMBEDDINGS, "/v1/management/engines"):
                    reply = await ask(served.port, path, body)
                    assert 400 <= reply.status < 500 and is_openai_error(reply.body), (name, path, reply)
            assert not served.service.calls
            assert (await ask(served.port, CHAT, chat())).status == 200

    run(main())


def test_what_is_odd_but_right_is_served() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            for body in (
                b' {"model" : "small",\n"messages":[{"role":"user","content":"\\ud83d\\ude42"}] , "max_tokens":1}\n',
                b'{"model":"none","model":"small","messages":[{"role":"user","content":"x"}],"max_tokens":1}',
                b'{"\\u006dodel":"small","messages":[{"role":"user","content":"x"}],"max_tokens":1}',
                b'{"model":"small","messages":[{"role":"user","content":"x"}],"max_tokens":1,"x":' + b"[" * 90 + b"]" * 90 + b"}",
                b'{"model":"small","messages":[{"role":"user","content":"x"}],"max_tokens":1,"stream":null,"n":null}',
            ):  # fmt: skip
                reply = await ask(served.port, CHAT, body)
                assert reply.status == 200, reply
            for content_type in ("application/json", "Application/JSON; charset=utf-8"):
                reply = await ask(served.port, CHAT, chat(), {"content-type": content_type})
                assert reply.status == 200

    run(main())


def test_wrong_methods_paths_and_types() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            for method, path, status in (
                ("GET", CHAT, 405),
                ("DELETE", EMBEDDINGS, 405),
                ("POST", "/v1/models", 405),
                ("PUT", "/metrics", 405),
                ("OPTIONS", CHAT, 405),
                ("TRACE", "/", 404),
                ("GET", "/", 404),
                ("POST", "/v1/chat/completions/", 404),
                ("POST", "/v1/../v1/embeddings", 404),
                ("GET", "/%2e%2e/etc/passwd", 404),
                ("GET", "/%ff", 400),
                ("GET", "/v1/models/%00", 404),
                ("POST", "//v1/embeddings", 404),
            ):
                reply = await ask(served.port, path, b"" if method != "GET" else None, method=method)
                assert reply.status == status and is_openai_error(reply.body), (method, path, reply)
                if status == 405:
                    assert reply.headers["allow"]
            for content_type in ("text/plain", "application/jsonx", "multipart/form-data; boundary=x"):
                reply = await ask(served.port, CHAT, chat(), {"content-type": content_type})
                assert reply.status == 415 and is_openai_error(reply.body)

    run(main())


def test_nothing_can_be_injected_into_headers() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            body = json.dumps(chat()).encode()
            for value in (b"a\r\nx-evil: 1", b"a\rx-evil: 1", b"a\nx-evil: 1", b"a\x00b", b"a\r\n x-evil: 1", b"\x0b"):
                client = await Client.open(served.port)
                head = b"POST %b HTTP/1.1\r\nhost: x\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n"
                client.writer.write(head % (CHAT.encode(), value, len(body)) + body)
                reply = await client.reply()
                assert "x-evil" not in reply.headers
                # A line break of HTTP's own makes two headers of the request; anything else is refused.
                assert reply.status == (200 if value == b"a\r\nx-evil: 1" else 400), (value, reply)
                client.close()
            for name in ("x-sage-tenant", "x-sage-priority", "authorization"):
                reply = await ask(served.port, CHAT, chat(), {name: "\xff\xfe" * 50})
                assert reply.status in (200, 400) and not set(reply.headers) & {"x-evil"}
            many = {f"x-h{i}": "v" * 50 for i in range(2000)}
            reply = await ask(served.port, CHAT, chat(), many)
            assert reply.status == 431 and is_openai_error(reply.body)
            reply = await ask(served.port, CHAT, chat(), {f"x-h{i}": "v" for i in range(500)})
            assert reply.status == 200
            long = await ask(served.port, "/" + "a" * 100_000)
            assert long.status == 431 and is_openai_error(long.body)

    run(main())


def test_garbage_behind_a_request_does_not_reach_its_answer() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            client = await Client.open(served.port)
            good = request_bytes("POST", CHAT, json.dumps(chat()).encode())
            client.writer.write(good + b"\x00\x01garbage\r\n\r\n" + good)
            first, second = await client.reply(), await client.reply()
            assert (first.status, second.status) == (200, 400)
            assert await client.reader.read() == b""  # and that was it

    run(main())


def test_slow_loris_clients_are_told_and_cut_while_others_are_served() -> None:
    async def main() -> None:
        limits = Limits(head_s=1.0, body_s=1.0)
        async with gateway(limits=limits) as (served, _):

            async def drip(data: bytes) -> int:
                client = await Client.open(served.port)
                answer = asyncio.create_task(client.reply())
                for at in range(len(data)):
                    if answer.done():
                        break
                    client.writer.write(data[at : at + 1])
                    await asyncio.sleep(0.05)
                return (await answer).status

            whole = request_bytes("POST", CHAT, json.dumps(chat("x" * 500)).encode())
            head_only, _, body = whole.partition(b"\r\n\r\n")
            slow = [asyncio.create_task(drip(head_only))]
            client = await Client.open(served.port)
            client.writer.write(head_only + b"\r\n\r\n" + body[:10])
            while not all(task.done() for task in slow):
                assert (await ask(served.port, CHAT, chat())).status == 200
                await asyncio.sleep(0.05)
            assert [task.result() for task in slow] == [408]
            late = await client.reply()
            assert late.status == 408 and is_openai_error(late.body)

    run(main())


# --- by machine -------------------------------------------------------------------------------------------------------


class Background:
    """A gateway in a thread of its own, for tools that block."""

    def __init__(self) -> None:
        self.port = 0
        self.served: Any = None
        self._ready = threading.Event()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        slo = SloTable({"chat": Slo(ttft_s=1.0, tpot_s=0.1), "embedding": Slo(e2e_s=1.0)})
        service = ServiceConfig(request_s=5.0, trust_schedule=True)
        async with gateway(slo=slo, policy="hybrid", iteration_s=0.0001, service=service) as (served, _):
            self.port, self.served = served.port, served
            self._ready.set()
            await self._stop.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def sane(self) -> None:
        """It serves, and nothing broke."""
        assert self.served.service.driver.broken is None
        body = json.dumps(chat()).encode()
        assert self.sends(request_bytes("POST", CHAT, body))[0] == 200

    def sends(self, data: bytes, wait_s: float = 10.0) -> tuple[int, bytes]:
        """Status and body of the first answer; 0 if there is none within the time."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as connection:
            got = b""
            try:
                connection.sendall(data)
                while b"\r\n\r\n" not in got:
                    more = connection.recv(65536)
                    if not more:
                        return 0, got
                    got += more
                head, _, body = got.partition(b"\r\n\r\n")
                length = int((head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) or 0)
                while len(body) < length:
                    more = connection.recv(65536)
                    if not more:
                        break
                    body += more
                return int(head[9:12]), body[:length]
            except (TimeoutError, ConnectionError):
                return 0, got


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.stop()
    assert made.served.service.driver.broken is None


def check(status: int, body: bytes) -> None:
    assert status != 500, body
    if status >= 400:
        assert is_openai_error(body)


SEEDS = [
    request_bytes("POST", CHAT, json.dumps(chat()).encode(), {"x-sage-priority": "1", "x-request-id": "7"}),
    request_bytes("POST", EMBEDDINGS, json.dumps(embedding(["a", "b"])).encode(), {"x-sage-e2e-ms": "500"}),
    request_bytes("GET", "/v1/models", None),
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    request_bytes("PUT", "/v1/management/policy", b'{"name":"fifo"}'),
]


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["insert", "delete", "replace", "copy"]))
        piece = draw(
            st.binary(max_size=6) | st.sampled_from([b"\r\n", b"\0", b'"', b"{", b"9" * 30, b": ", b"\xff", b" "])
        )
        if kind == "insert":
            data[at:at] = piece
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 20))]
        elif kind == "replace":
            data[at : at + len(piece)] = piece
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


BOUNDED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@BOUNDED
@given(data=mangled() | st.binary(max_size=60))
def test_mangled_bytes_never_break_it(background: Background, data: bytes) -> None:
    check(*background.sends(data, wait_s=0.05))
    background.sane()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([LLM, EMBED, "user", "base64", 2**31 - 1, 128]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "input",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "n",
        "user",
        "dimensions",
        "encoding_format",
        "priority",
        "seed",
        "temperature",
    ]
)


@BOUNDED
@given(
    path=st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS]),
    changed=st.dictionaries(FIELDS, JSON, max_size=3),
    headers=st.dictionaries(
        st.sampled_from(
            [
                "x-sage-tenant",
                "x-sage-priority",
                "x-sage-ttft-ms",
                "x-sage-e2e-ms",
                "x-sage-input-tokens",
                "x-sage-scheduled-ns",
                "x-sage-output-tokens-max",
                "x-request-id",
                "authorization",
                "content-type",
                "traceparent",
            ]
        ),
        st.sampled_from(
            ["", "0", "1", "-1", "1e308", "nan", "9" * 40, "9" * 5000, "1e-300", "\xff", "2147483647", "a,b"]
        )
        | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8),
        max_size=3,
    ),
)
def test_bodies_and_headers_of_any_kind_never_break_it(
    background: Background, path: str, changed: dict[str, Any], headers: dict[str, str]
) -> None:
    base = {CHAT: chat(), COMPLETIONS: {"model": LLM, "prompt": "x", "max_tokens": 2}, EMBEDDINGS: embedding()}[path]
    body = json.dumps(base | changed).encode("utf-8", "surrogatepass")
    status, answer = background.sends(request_bytes("POST", path, body, headers))
    assert status
    check(status, answer)
    background.sane()


def test_everything_in_its_own_document_keeps_what_the_document_says(background: Background) -> None:
    """schemathesis, over every operation but the one whose URLs would be connected to."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{background.port}/openapi.json")
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if (operation.method.upper(), operation.path) == ("POST", "/v1/management/engines"):
            continue
        tried += 1
        strategy = operation.as_strategy()
        settings(
            max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )(given(case=strategy)(as_documented))()
    assert tried >= 12
    background.sane()


def as_documented(case: Any) -> None:
    response = case.call()
    check(response.status_code, response.content)
    assert str(response.status_code) in case.operation.definition.raw["responses"], response.content
