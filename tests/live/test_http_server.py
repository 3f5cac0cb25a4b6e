"""The HTTP server against raw sockets: framing, order, limits, time-outs, disconnects, drain."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_live.http.limits import Limits
from sage_live.http.request import Request
from sage_live.http.server import Handler, HttpServer

Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
Answer: TypeAlias = tuple[int, dict[bytes, bytes], bytes]

PATIENCE_S = 20.0
"""For what happens at once on a quiet machine."""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def with_time_out(main: Coroutine[Any, Any, None]) -> None:
        request.param(asyncio.wait_for(main, 3 * PATIENCE_S))

    return with_time_out


class Failures(list[tuple[Request, Exception]]):
    def __call__(self, request: Request, error: Exception) -> None:
        self.append((request, error))


@asynccontextmanager
async def serving(
    handler: Handler, limits: Limits | None = None, failures: Failures | None = None
) -> AsyncIterator[HttpServer]:
    """A handler that fails fails the test, unless ``failures`` are collected."""
    unexpected = Failures()
    on_failure = unexpected if failures is None else failures
    server = await HttpServer.start(handler, "127.0.0.1", 0, limits=limits, on_failure=on_failure)
    try:
        yield server
    finally:
        await server.close()
    assert not unexpected


class Client:
    """A socket that speaks what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, method: str = "GET") -> Answer:
        """The next one, whole."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        first, *lines = head[:-4].split(b"\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
        status = int(first.split(b" ")[1])
        if method == "HEAD" or status in (100, 204):
            return status, headers, b""
        return status, headers, await asyncio.wait_for(self._body(headers), PATIENCE_S)

    async def _body(self, headers: dict[bytes, bytes]) -> bytes:
        if b"content-length" in headers:
            return await self.reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"transfer-encoding") != b"chunked":
            return await self.reader.read()
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        return await asyncio.wait_for(self.reader.read(), PATIENCE_S)

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@asynccontextmanager
async def client(server: HttpServer) -> AsyncIterator[Client]:
    it = Client(*await asyncio.open_connection("127.0.0.1", server.port, limit=2**26))
    try:
        yield it
    finally:
        await it.close()


async def once(server: HttpServer, data: bytes, method: str = "GET") -> Answer:
    """The answer to ``data`` on a connection of its own."""
    async with client(server) as c:
        c.send(data)
        return await c.answer(method)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


def get(path: str = "/", *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: here", *headers, "", ""]).encode()


def post(body: bytes, path: str = "/", *headers: str) -> bytes:
    return get(path, f"Content-Length: {len(body)}", *headers, method="POST") + body


def chunked(*pieces: bytes, path: str = "/") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return get(path, "Transfer-Encoding: chunked", method="POST") + body


def echo(request: Request) -> None:
    request.respond(200, f"{request.method} {request.path}?{request.query} ".encode() + request.body)


# --- requests and answers -------------------------------------------------------------------------------------------


def test_a_connection_carries_one_request_after_another(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, client(server) as c:
            for number in range(3):
                c.send(post(b"body", f"/{number}?a=%20"))
                status, headers, body = await c.answer()
                assert (status, body) == (200, f"POST /{number}?a=%20 body".encode())
                assert headers[b"content-type"] == b"application/json"
                assert b"connection" not in headers
            assert server.connections == 1

    run(main())


def test_what_the_handler_is_given(run: Run) -> None:
    seen: list[Request] = []

    def handler(request: Request) -> None:
        seen.append(request)
        request.respond(204, b"")

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.send(post(b"\0\xff", "/a%20b/%C3%A9?x=%2F", "X-Twice: 1", "x-twice: 2", "X-Empty:"))
            assert (await c.answer())[:1] == (204,)
            c.send(get("http://elsewhere/p?q"))
            await c.answer()
            c.send(get("*", method="OPTIONS"))
            await c.answer()

    run(main())
    first, second, third = seen
    assert (first.method, first.path, first.query, first.body) == ("POST", "/a b/é", "x=%2F", b"\0\xff")
    assert first.headers == {b"host": b"here", b"content-length": b"2", b"x-twice": b"1, 2", b"x-empty": b""}
    assert first.peer == "127.0.0.1"
    assert (second.path, second.query) == ("/p", "q")
    assert (third.method, third.path) == ("OPTIONS", "*")


def test_pipelined_requests_are_handed_over_and_answered_in_order(run: Run) -> None:
    waiting: list[Request] = []

    async def main() -> None:
        async with serving(waiting.append) as server, client(server) as c:
            c.send(b"".join(post(b"%d" % number, f"/{number}") for number in range(5)))
            for number in range(5):
                await until(lambda: bool(waiting))
                assert [request.path for request in waiting] == [f"/{number}"]
                request = waiting.pop()
                request.respond(200, request.body)
                assert (await c.answer())[2] == b"%d" % number

    run(main())


def test_more_pipelined_requests_than_the_queue_holds_are_answered_all(run: Run) -> None:
    def later(request: Request) -> None:
        asyncio.get_running_loop().call_soon(request.respond, 200, request.body)

    async def main() -> None:
        async with serving(later, Limits(pipelined_max=4)) as server, client(server) as c:
            for burst in range(3):
                numbers = range(100 * burst, 100 * burst + 100)
                c.send(b"".join(post(b"%d" % number) for number in numbers))
                assert [int((await c.answer())[2]) for _ in numbers] == list(numbers)

    run(main())


def test_ten_thousand_pipelined_requests_answered_at_once_do_not_recurse(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, client(server) as c:
            c.send(get() * 10_000)
            for _ in range(10_000):
                assert (await c.answer())[0] == 200

    run(main())


def test_a_stream_is_chunked_and_the_connection_goes_on(run: Run) -> None:
    def handler(request: Request) -> None:
        loop = asyncio.get_running_loop()
        request.start(200, b"text/event-stream", [(b"x-a", b"b")])
        pieces = iter([b"one", b"", b"x" * 5000, b"three"])

        def step() -> None:
            piece = next(pieces, None)
            if piece is None:
                request.end(b"end" if request.path == "/last" else b"")
            else:
                request.write(piece)
                loop.call_soon(step)

        loop.call_later(0.01, step) if request.path == "/later" else step()

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            for path in ("/now", "/later", "/last", "/now"):
                c.send(get(path))
                status, headers, body = await c.answer()
                assert (status, body) == (200, b"one" + b"x" * 5000 + b"three" + b"end" * (path == "/last"))
                assert headers[b"content-type"] == b"text/event-stream"
                assert headers[b"x-a"] == b"b"

    run(main())


def test_a_streams_head_does_not_wait_for_its_first_piece(run: Run) -> None:
    seen: list[Request] = []

    def handler(request: Request) -> None:
        seen.append(request)
        request.start(200)

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.send(get())
            head = await asyncio.wait_for(c.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            seen[0].end()
            assert await c.reader.readexactly(5) == b"0\r\n\r\n"

    run(main())


def test_head_and_no_content_have_no_body(run: Run) -> None:
    def handler(request: Request) -> None:
        if request.path == "/stream":
            request.start(200)
            request.write(b"something")
            request.end(b"more")
        else:
            request.respond(204 if request.path == "/none" else 200, b"something")

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.send(get("/", method="HEAD"))
            status, headers, _ = await c.answer("HEAD")
            assert (status, headers[b"content-length"]) == (200, b"9")
            c.send(get("/stream", method="HEAD"))
            assert (await c.answer("HEAD"))[0] == 200
            c.send(get("/none"))
            status, headers, _ = await c.answer()
            assert status == 204
            assert b"content-length" not in headers
            c.send(get("/", "Connection: close"))
            assert (await c.answer())[2] == b"something"
            assert await c.rest() == b""

    run(main())


def test_http_1_0(run: Run) -> None:
    def handler(request: Request) -> None:
        if request.path == "/stream":
            request.start(200)
            request.write(b"one")
            request.end(b"two")
        else:
            request.respond(200, b"all")

    async def main() -> None:
        async with serving(handler) as server:
            _, headers, body = await once(server, b"GET / HTTP/1.0\r\n\r\n")
            assert (headers[b"connection"], body) == (b"close", b"all")
            _, headers, body = await once(server, b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert b"transfer-encoding" not in headers
            assert body == b"onetwo"
            async with client(server) as c:
                for _ in range(2):
                    c.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                    _, headers, body = await c.answer()
                    assert (headers[b"connection"], body) == (b"keep-alive", b"all")

    run(main())


def test_expect_100_continue(run: Run) -> None:
    waiting: list[Request] = []

    async def main() -> None:
        async with serving(waiting.append) as server, client(server) as c:
            head = get("/", "Content-Length: 4", "Expect: 100-continue", method="POST")
            c.send(get("/first") + head)
            await until(lambda: len(waiting) == 1)
            waiting.pop().respond(200, b"")
            assert (await c.answer())[0] == 200
            assert (await c.answer())[0] == 100  # after the answer to the first
            c.send(b"body")
            await until(lambda: len(waiting) == 1)
            request = waiting.pop()
            request.respond(200, request.body)
            assert (await c.answer())[2] == b"body"

    run(main())


def test_a_wish_for_another_protocol_is_ignored(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, client(server) as c:
            wish = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
            c.send(post(b"one", "/1", *wish) + get("/2", *wish) + post(b"three", "/3"))
            assert (await c.answer())[2] == b"POST /1? one"
            assert (await c.answer())[2] == b"GET /2? "
            assert (await c.answer())[2] == b"POST /3? three"
            assert (await once(server, get("here:1", method="CONNECT")))[0] == 405

    run(main())


def test_big_bodies_both_ways(run: Run) -> None:
    async def main() -> None:
        async with serving(lambda request: request.respond(200, request.body)) as server, client(server) as c:
            body = bytes(range(256)) * (32 * 1024)  # 8 MiB
            c.send(post(body))
            assert (await c.answer())[2] == body
            c.send(chunked(body[:1_000_000], b"x", body[:70_000]))
            assert (await c.answer())[2] == body[:1_000_000] + b"x" + body[:70_000]

    run(main())


def test_nagle_is_off(run: Run) -> None:
    seen: list[int] = []

    def handler(request: Request) -> None:
        sock = request._connection.transport.get_extra_info("socket")
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        request.respond(200, b"")

    async def main() -> None:
        async with serving(handler) as server:
            await once(server, get())

    run(main())
    assert seen and seen[0] != 0


# --- framing --------------------------------------------------------------------------------------------------------

MESSAGES = {
    "get": get("/a%20b?c=d", "X-Long: " + "y" * 40),
    "post": post(b'{"model": "m"}', "/v1/chat/completions", "Content-Type: application/json"),
    "chunked": chunked(b"one", b"twotwo", b"\r\n0\r\n\r\n", path="/c"),
    "trailers": chunked(b"one", path="/t")[:-2] + b"X-Trailer: 1\r\nHost: evil\r\n\r\n",
    "upgrade": post(b"up", "/u", "Connection: upgrade", "Upgrade: h2c"),
    "blank lines before": b"\r\n\r\n" + get("/blank"),
}

Fields: TypeAlias = tuple[str, str, str, dict[bytes, bytes], bytes]


async def fed(pieces: list[bytes]) -> list[Fields]:
    """The requests that come of these reads, in this order and size. The connection is real; the reads are not left to
    the kernel, which would join them."""
    seen: list[Fields] = []

    def handler(request: Request) -> None:
        seen.append((request.method, request.path, request.query, request.headers, request.body))
        request.respond(200, b"")

    async with serving(handler) as server, client(server):
        await until(lambda: server.connections == 1)
        connection = next(iter(server._connections))
        for piece in pieces:
            connection.data_received(piece)
        assert not connection.in_progress
    return seen


@pytest.mark.parametrize("name", MESSAGES)
def test_a_request_cut_at_any_byte_is_the_same_request(name: str) -> None:
    data = MESSAGES[name] + MESSAGES["post"]

    async def main() -> None:
        whole = await fed([data])
        assert len(whole) == 2
        assert whole[1][2:] == ("", whole[1][3], b'{"model": "m"}')
        assert whole[1][3][b"host"] == b"here"
        for cut in range(1, len(data)):
            assert await fed([data[:cut], data[cut:]]) == whole, cut
        assert await fed([data[at : at + 1] for at in range(len(data))]) == whole

    uvloop.run(main())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(sorted(MESSAGES)), min_size=1, max_size=5), st.data())
def test_a_pipeline_cut_anywhere_is_the_same_pipeline(names: list[str], data: st.DataObject) -> None:
    stream = b"".join(MESSAGES[name] for name in names)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    edges = [0, *sorted(cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]

    async def main() -> None:
        alone = [fields for name in names for fields in await fed([MESSAGES[name]])]
        assert await fed(pieces) == alone

    uvloop.run(main())


REFUSED = {
    "both lengths": (400, get("/", "Content-Length: 5", "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n"),
    "both, the other way": (400, get("/", "Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n"),
    "two lengths": (400, get("/", "Content-Length: 1", "Content-Length: 1", method="POST") + b"x"),
    "two lengths in a list": (400, get("/", "Content-Length: 1, 1", method="POST") + b"x"),
    "signed length": (400, get("/", "Content-Length: +1", method="POST") + b"x"),
    "length beyond 64 bits": (400, get("/", f"Content-Length: {10**25}", method="POST")),
    "blank before the colon": (400, get("/", "Content-Length : 1", method="POST") + b"x"),
    "folded header": (400, get("/", "X: a", " b")),
    "bare line feeds": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "null in a value": (400, get("/", "X: a\0b")),
    "transfer coding not understood": (501, get("/", "Transfer-Encoding: gzip, chunked", method="POST")),
    "transfer coding not last": (400, get("/", "Transfer-Encoding: chunked, gzip", method="POST")),
    "transfer coding that only looks like it": (501, get("/", "Transfer-Encoding: xchunked", method="POST")),
    "transfer coding in 1.0": (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunk size that is none": (400, chunked()[:-5] + b"zz\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, get("/", "Host: there")),
    "path not UTF-8": (400, get("/%ff")),
    "path with raw high bytes": (400, b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"),
    "not HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "unknown method": (400, b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "HTTP/2.0": (505, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "HTTP/2 by prior knowledge": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "no HTTP version": (400, b"GET / HTTX/1.1\r\n\r\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_framed_is_refused_and_the_connection_closed(name: str) -> None:
    expected, data = REFUSED[name]
    seen: list[str] = []

    def handler(request: Request) -> None:
        seen.append(request.path)
        request.respond(200, b"")

    async def main() -> None:
        async with serving(handler) as server:
            async with client(server) as c:
                c.send(get("/before") + data + get("/smuggled"))
                assert (await c.answer())[0] == 200
                status, headers, body = await c.answer()
                assert (status, headers[b"connection"]) == (expected, b"close")
                assert b'"error"' in body
                assert await c.rest() == b""
            assert (await once(server, get("/after")))[0] == 200

    uvloop.run(main())
    assert seen == ["/before", "/after"]


def test_a_refusal_waits_for_the_answers_before_it(run: Run) -> None:
    waiting: list[Request] = []

    async def main() -> None:
        async with serving(waiting.append) as server, client(server) as c:
            c.send(get("/1") + get("/2") + b"rubbish\r\n\r\n")
            for path in ("/1", "/2"):
                await until(lambda: bool(waiting))
                request = waiting.pop()
                assert request.path == path
                request.respond(200, path.encode())
                assert (await c.answer())[2] == path.encode()
            assert (await c.answer())[0] == 400

    run(main())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(sorted(MESSAGES.values()))), max_size=6))
def test_no_bytes_take_the_server_down(pieces: list[bytes]) -> None:
    async def main() -> None:
        async with serving(echo) as server:
            async with client(server):
                await until(lambda: server.connections == 1)
                connection = next(iter(server._connections))
                for piece in pieces:
                    connection.data_received(piece)
            assert (await once(server, get()))[0] == 200

    uvloop.run(main())


# --- limits ---------------------------------------------------------------------------------------------------------


def test_the_size_of_a_body_is_bounded_exactly(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Limits(body_bytes_max=1000)) as server:
            assert (await once(server, post(b"x" * 1000)))[0] == 200
            assert (await once(server, chunked(b"x" * 999, b"y")))[0] == 200
            assert (await once(server, get("/", "Content-Length: 1001", method="POST")))[0] == 413
            assert (await once(server, chunked(b"x" * 999, b"yy")))[0] == 413
            assert (await once(server, get("/", "Transfer-Encoding: chunked") + b"1000\r\n" + b"x" * 1001))[0] == 413

    run(main())


def test_a_client_that_is_still_sending_can_read_why_it_was_refused(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Limits(body_bytes_max=1000)) as server, client(server) as c:
            c.send(post(b"x" * 20_000_000))
            assert (await c.answer())[0] == 413

    run(main())


def test_the_size_of_the_headers_is_bounded_in_one_read_and_in_many() -> None:
    def of(size: int) -> bytes:
        return get("/", "X: " + "y" * (size - len(get("/", "X: "))))

    async def status(server: HttpServer, pieces: list[bytes]) -> int:
        async with client(server) as c:
            await until(lambda: server.connections == 1)
            connection = next(iter(server._connections))
            for piece in pieces:
                connection.data_received(piece)
            return (await c.answer())[0]

    async def main() -> None:
        async with serving(echo, Limits(head_bytes_max=2000)) as server:
            for size, expected in ((1990, 200), (2100, 431), (9000, 431)):
                data = of(size)
                assert await status(server, [data]) == expected
                await until(lambda: server.connections == 0)
                assert await status(server, [data[at : at + 100] for at in range(0, size, 100)]) == expected
                await until(lambda: server.connections == 0)
            # A big body in the same read does not count.
            assert await status(server, [post(b"x" * 9000)]) == 200
            await until(lambda: server.connections == 0)
            # Nor does what came before in the pipeline.
            assert await status(server, [get() * 200 + of(1500)[:1400], of(1500)[1400:]]) == 200

    uvloop.run(main())


def test_endless_headers_trailers_and_chunk_extensions_are_cut(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Limits(head_bytes_max=2000)) as server:
            for start, more, expected in (
                (b"GET / HTTP/1.1\r\nX: ", b"y", 431),
                (b"GET / HTTP/1.1\r\n", b"X: y\r\n", 431),
                (chunked()[:-2], b"X: y\r\n", 400),
                (chunked()[:-5] + b"1;", b"y", 400),
            ):
                async with client(server) as c:
                    c.send(start)
                    for _ in range(100):
                        c.send(more * 100)
                        await asyncio.sleep(0)
                    assert (await c.answer())[0] == expected
            async with client(server) as c:  # which is no reason to refuse small chunks
                c.send(chunked(*[b"x"] * 5000))
                assert (await c.answer())[0] == 200

    run(main())


def test_too_many_connections(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Limits(connections_max=2)) as server:
            async with client(server) as first, client(server) as second:
                for c in (first, second):
                    c.send(get())
                    await c.answer()
                status, headers, _ = await once(server, get())
                assert (status, headers[b"connection"]) == (503, b"close")
                first.send(get())
                assert (await first.answer())[0] == 200
            await until(lambda: server.connections == 0)
            assert (await once(server, get()))[0] == 200

    run(main())


def test_time_outs() -> None:
    """All at once, because each takes seconds."""
    streaming: list[Request] = []
    gone: list[str] = []

    def handler(request: Request) -> None:
        if request.path == "/stalls":
            streaming.append(request)
            request.on_disconnect = lambda: gone.append(request.path)
            request.start(200)
            request.write(b"x" * 50_000_000)
        elif request.path == "/takes-long":
            asyncio.get_running_loop().call_later(2.5, request.respond, 200, b"at last")
        else:
            echo(request)

    async def dribble(c: Client, data: bytes) -> None:
        for at in range(len(data)):
            c.send(data[at : at + 1])
            await asyncio.sleep(0.05)

    async def slow(server: HttpServer, start: bytes, drip: bytes, expected: bytes) -> None:
        async with client(server) as c:
            c.send(start)
            task = asyncio.create_task(dribble(c, drip))
            assert (await c.rest())[:12] == expected
            task.cancel()

    async def stalls(server: HttpServer) -> None:
        async with client(server) as c:
            c.writer.transport.pause_reading()  # type: ignore[attr-defined]
            c.send(get("/stalls"))
            await until(lambda: gone == ["/stalls"])

    async def works_slowly(server: HttpServer) -> None:
        async with client(server) as c:
            for _ in range(8):
                c.send(get())
                await c.answer()
                await asyncio.sleep(0.3)

    async def waits(server: HttpServer) -> None:
        async with client(server) as c:
            c.send(get("/takes-long"))
            assert (await c.answer())[2] == b"at last"
            tick = server.tick
            await until(lambda: server.tick > tick)
            c.send(get())  # idle began with the answer, not with the request
            assert (await c.answer())[0] == 200

    async def main() -> None:
        limits = Limits(head_s=1, body_s=1, body_bytes_per_s_min=1000, idle_s=1, stalled_s=1, linger_s=1)
        async with serving(handler, limits) as server:
            await asyncio.gather(
                slow(server, b"", b"GET / HTTP/1.1\r\n" + b"x" * 300, b"HTTP/1.1 408"),
                slow(server, get("/", "Content-Length: 999", method="POST"), b"x" * 300, b"HTTP/1.1 408"),
                slow(server, get("/", "Transfer-Encoding: chunked"), b"1\r\nx\r\n" * 50, b"HTTP/1.1 408"),
                slow(server, b"", b"", b""),  # idle from the start
                slow(server, get(), b"", b"HTTP/1.1 200"),  # idle after an answer
                slow(server, b"", b"\r\n" * 100, b""),  # blank lines are nothing
                stalls(server),
                works_slowly(server),
                waits(server),
            )
            await until(lambda: server.connections == 0)

    uvloop.run(main())


# --- disconnects and flow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("state", ["waiting", "streaming", "more behind"])
def test_a_disconnect_is_told_once_and_at_once(run: Run, how: str, state: str) -> None:
    requests: list[Request] = []
    told: list[str] = []

    def handler(request: Request) -> None:
        requests.append(request)
        request.on_disconnect = lambda: told.append(request.path)
        if state == "streaming":
            request.start(200)
            request.write(b"first")

    async def main() -> None:
        async with serving(handler) as server:
            async with client(server) as c:
                c.send(get("/1") + (get("/2") if state == "more behind" else b""))
                await until(lambda: len(requests) == 1)
                assert not told
                if how == "reset":
                    c.writer.transport.abort()
                elif how == "half-close":
                    c.writer.write_eof()
                else:
                    await c.close()
                await until(lambda: bool(told))
                await until(lambda: server.connections == 0)
            assert told == ["/1"]
            assert len(requests) == 1  # what was behind is not worth doing
            request = requests[0]
            assert request.answered
            request.respond(200, b"too late")  # nothing happens
            request.write(b"too late")
            request.end()
            request.abort()

    run(main())


def test_no_disconnect_is_told_of_after_the_answer(run: Run) -> None:
    told: list[str] = []

    def handler(request: Request) -> None:
        request.on_disconnect = lambda: told.append(request.path)
        request.respond(200, b"")

    async def main() -> None:
        async with serving(handler) as server:
            await once(server, get())
            await until(lambda: server.connections == 0)

    run(main())
    assert not told


def test_a_slow_reader_is_told_to_the_handler(run: Run) -> None:
    flow: list[bool] = []
    piece = b"x" * 65_536

    def handler(request: Request) -> None:
        request.start(200)
        request.on_writable = flow.append
        for _ in range(1000):
            if flow:
                break
            request.write(piece)
            request_bytes.append(len(piece))
        streaming.append(request)

    request_bytes: list[int] = []
    streaming: list[Request] = []

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.writer.transport.pause_reading()  # type: ignore[attr-defined]
            c.send(get())
            await until(lambda: bool(streaming))
            assert flow == [False]
            c.writer.transport.resume_reading()  # type: ignore[attr-defined]
            answer = asyncio.create_task(c.answer())
            await until(lambda: flow == [False, True])
            streaming[0].write(b"end")
            streaming[0].end()
            assert len((await answer)[2]) == sum(request_bytes) + 3

    run(main())


def test_a_stream_that_begins_behind_unread_answers_is_told_to_wait(run: Run) -> None:
    flow: list[bool] = []

    def handler(request: Request) -> None:
        if request.path == "/big":
            request.respond(200, b"x" * 16_000_000)
        else:
            request.on_writable = flow.append
            request.start(200)
            request.end()

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.writer.transport.pause_reading()  # type: ignore[attr-defined]
            c.send(get("/big") + get("/stream"))
            await until(lambda: bool(flow))
            assert flow == [False]

    run(main())


def test_an_aborted_stream_does_not_end_properly(run: Run) -> None:
    def handler(request: Request) -> None:
        request.start(200)
        request.write(b"some")
        asyncio.get_running_loop().call_soon(request.abort)

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.send(get())
            with suppress(ConnectionResetError):
                assert not (await c.rest()).endswith(b"0\r\n\r\n")

    run(main())


# --- handlers that fail ---------------------------------------------------------------------------------------------


def test_a_handler_that_raises(run: Run) -> None:
    failures = Failures()

    def handler(request: Request) -> None:
        if request.path == "/in-stream":
            request.start(200)
            request.write(b"some")
        if request.path == "/after":
            request.respond(200, b"answered")
        if request.path != "/works":
            raise LookupError("a defect")
        request.respond(200, b"")

    async def main() -> None:
        async with serving(handler, failures=failures) as server:
            async with client(server) as c:
                c.send(get("/fails") + get("/after") + get("/works"))
                status, _, body = await c.answer()
                assert status == 500
                assert b"a defect" not in body
                assert (await c.answer())[2] == b"answered"
                assert (await c.answer())[0] == 200
                c.send(get("/in-stream"))
                with suppress(ConnectionResetError):
                    assert not (await c.rest()).endswith(b"0\r\n\r\n")
            assert (await once(server, get("/works")))[0] == 200

    run(main())
    assert [request.path for request, _ in failures] == ["/fails", "/after", "/in-stream"]
    assert all(isinstance(error, LookupError) for _, error in failures)


def test_a_disconnect_callback_that_raises(run: Run) -> None:
    failures = Failures()
    seen: list[Request] = []

    def handler(request: Request) -> None:
        seen.append(request)

        def fail() -> None:
            raise LookupError("a defect")

        request.on_disconnect = fail

    async def main() -> None:
        async with serving(handler, failures=failures) as server:
            async with client(server) as c:
                c.send(get("/fails"))
                await until(lambda: bool(seen))
            await until(lambda: bool(failures))
            await until(lambda: server.connections == 0)

    run(main())
    assert len(failures) == 1


@pytest.mark.parametrize("bad", [b"a\r\nSet-Cookie: x", b"a\nb", b"a\rb"])
@pytest.mark.parametrize("where", ["value", "name", "type"])
def test_our_headers_cannot_be_broken_out_of(bad: bytes, where: str) -> None:
    tried: list[str] = []

    def handler(request: Request) -> None:
        headers = [(b"x-a", bad)] if where == "value" else [(bad, b"v")] if where == "name" else []
        kind = bad if where == "type" else b"text/plain"
        with pytest.raises(ValueError, match="line break"):
            request.respond(200, b"", kind, headers)
        with pytest.raises(ValueError, match="line break"):
            request.start(200, kind, headers)
        tried.append(request.path)
        request.respond(200, b"clean")

    async def main() -> None:
        async with serving(handler) as server:
            _, headers, body = await once(server, get())
            assert body == b"clean"
            assert b"set-cookie" not in headers

    uvloop.run(main())
    assert tried == ["/"]


def test_to_answer_twice_is_a_defect(run: Run) -> None:
    tried: list[str] = []

    def handler(request: Request) -> None:
        with pytest.raises(RuntimeError, match="not started"):
            request.write(b"early")
        request.respond(200, b"once")
        with pytest.raises(RuntimeError, match="twice"):
            request.respond(200, b"twice")
        with pytest.raises(RuntimeError, match="twice"):
            request.start(200)
        with pytest.raises(RuntimeError, match="ended"):
            request.end()
        tried.append(request.path)

    async def main() -> None:
        async with serving(handler) as server, client(server) as c:
            c.send(get() * 2)
            assert (await c.answer())[2] == b"once"
            assert (await c.answer())[2] == b"once"

    run(main())
    assert len(tried) == 2


# --- start and end --------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken() -> None:
    async def main() -> None:
        async with serving(echo) as server:
            with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}"):
                await HttpServer.start(echo, "127.0.0.1", server.port)

    asyncio.run(main())


def test_drain(run: Run) -> None:
    waiting: list[Request] = []

    async def main() -> None:
        server = await HttpServer.start(waiting.append, "127.0.0.1", 0)
        async with client(server) as idle, client(server) as busy, client(server) as streams, client(server) as sends:
            busy.send(get("/busy"))
            streams.send(get("/streams"))
            sends.send(post(b"body", "/sends")[:-2])
            await until(lambda: len(waiting) == 2 and all(c.in_progress for c in list(server._connections)[1:]))
            by_path = {request.path: request for request in waiting}
            by_path["/streams"].start(200)
            closing = asyncio.create_task(server.close(PATIENCE_S))
            assert await idle.rest() == b""
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", server.port)
            sends.send(b"dy")  # a request that had begun is taken
            await until(lambda: len(waiting) == 3)
            waiting[2].respond(200, b"sent")
            assert (await sends.answer())[1][b"connection"] == b"close"
            by_path["/busy"].respond(200, b"done")
            status, headers, body = await busy.answer()
            assert (status, headers[b"connection"], body) == (200, b"close", b"done")
            assert not closing.done()
            by_path["/streams"].write(b"last")
            by_path["/streams"].end()
            assert (await streams.answer())[2] == b"last"
            assert await streams.rest() == b""
            await closing
            assert server.connections == 0

    run(main())


def test_what_outlasts_the_grace_is_cut(run: Run) -> None:
    told: list[str] = []

    def handler(request: Request) -> None:
        request.on_disconnect = lambda: told.append(request.path)

    async def main() -> None:
        server = await HttpServer.start(handler, "127.0.0.1", 0)
        async with client(server) as c:
            c.send(get("/stuck"))
            await until(lambda: any(one.in_progress for one in server._connections))
            await server.close(0.05)
            assert server.connections == 0

    run(main())
    assert told == ["/stuck"]
