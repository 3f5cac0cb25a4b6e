"""The HTTP client against raw sockets and against our server: framing, reuse, retry, abort, flow."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_live.http.client import Exchange, Pool, Reason, UpstreamError
from sage_live.http.request import Request
from sage_live.http.server import Handler, HttpServer

Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]

PATIENCE_S = 20.0
"""For what happens at once on a quiet machine."""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def with_time_out(main: Coroutine[Any, Any, None]) -> None:
        request.param(asyncio.wait_for(main, 3 * PATIENCE_S))

    return with_time_out


class Answer:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.error: UpstreamError | None = None
        self.ended = False
        self.calls = 0

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def over(self) -> bool:
        return self.ended or self.error is not None

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        assert not self.status and not self.over
        self.calls += 1
        self.status, self.headers = status, headers

    def on_body(self, data: bytes) -> None:
        assert self.status and not self.over and data
        self.calls += 1
        self.pieces.append(data)

    def on_end(self) -> None:
        assert self.status and not self.over
        self.calls += 1
        self.ended = True

    def on_error(self, error: UpstreamError) -> None:
        assert not self.over
        self.calls += 1
        self.error = error

    async def whole(self) -> Answer:
        await until(lambda: self.over)
        return self

    async def failure(self) -> tuple[Reason, bool, bool]:
        error = (await self.whole()).error
        assert error is not None
        return error.reason, error.sent, error.received


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def pool_to(port: int, **options: Any) -> AsyncIterator[Pool]:
    pool = Pool(f"http://127.0.0.1:{port}", **options)
    try:
        yield pool
    finally:
        await pool.close()
        assert pool.connections == pool.idle == 0


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[HttpServer]:
    server = await HttpServer.start(handler, "127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.close()


class Peer:
    """A server that says what a test wants it to: a script for each connection, with an entry for each request: what
    to answer (None: nothing) and whether to close then. Connections beyond the scripts are answered OK."""

    def __init__(self, *scripts: Sequence[tuple[bytes | None, bool]]) -> None:
        self._scripts = iter(scripts)
        self.requests: list[tuple[int, bytes]] = []
        """Number of the connection, and the request."""
        self._tasks: list[asyncio.Task[None]] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        number = len(self._tasks)
        self._tasks.append(task)
        try:
            for answer, close in next(self._scripts, itertools.repeat((OK, False))):
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                self.requests.append((number, head + await reader.readexactly(int(length or b"0"))))
                if answer is not None:
                    writer.write(answer)
                if close:
                    return
            await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    @asynccontextmanager
    async def up(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def get(pool: Pool, path: str = "/") -> Answer:
    answer = Answer()
    pool.send("GET", path, (), b"", answer)
    return answer


def echo(request: Request) -> None:
    request.respond(200, f"{request.method} {request.path}?{request.query} ".encode() + request.body)


# --- answers --------------------------------------------------------------------------------------------------------


def test_request_and_answer(run: Run) -> None:
    seen: list[Request] = []

    def handler(request: Request) -> None:
        seen.append(request)
        echo(request)

    async def main() -> None:
        async with serving(handler) as server:
            pool = Pool(f"http://127.0.0.1:{server.port}/base/", headers=[(b"authorization", b"Bearer k")])
            answer = Answer()
            pool.send("POST", "/a%20b?c=d", [(b"x-a", b"b")], b"body", answer)
            await answer.whole()
            assert (answer.status, answer.body) == (200, b"POST /base/a b?c=d body")
            assert answer.headers[b"content-type"] == b"application/json"
            assert (await get(pool).whole()).body == b"GET /base/? "
            await pool.close()
        first, second = seen
        host = f"127.0.0.1:{server.port}".encode()
        common = {b"host": host, b"authorization": b"Bearer k"}
        assert first.headers == {**common, b"x-a": b"b", b"content-length": b"4"}
        assert second.headers == common

    run(main())


ANSWERS: dict[str, tuple[bytes, bool, int, bytes]] = {
    # bytes; whether the connection can be used again; status; body
    "length": (OK, True, 200, b"ok"),
    "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True, 200, b""),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", True, 204, b""),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
        True,
        200,
        b"abcdefg",
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
        True,
        200,
        b"abc",
    ),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, True, 200, b"ok"),
    "close": (b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno", False, 500, b"no"),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False, 200, b"ok"),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nall there is", False, 200, b"all there is"),
    "two answers": (OK + OK, False, 200, b"ok"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_framing_and_whether_the_connection_is_used_again(run: Run, name: str) -> None:
    data, reusable, status, body = ANSWERS[name]

    async def main() -> None:
        peer = Peer([(data, name == "until close"), (OK, False)])
        async with peer.up() as port, pool_to(port) as pool:
            answer = await get(pool, "/1").whole()
            assert answer.ended
            assert (answer.status, answer.body) == (status, body)
            assert b"x-t" not in answer.headers
            assert pool.idle == int(reusable)
            assert (await get(pool, "/2").whole()).body == b"ok"
            assert [number for number, _ in peer.requests] == [0, 0 if reusable else 1]

    run(main())


async def fed(pieces: list[bytes]) -> Answer:
    """The answer that comes of these reads. The connection is real; the reads are not left to the kernel, which would
    join them."""
    async with Peer([(None, False)]).up() as port, pool_to(port) as pool:
        answer = get(pool)
        await until(lambda: pool.connections == 1 and next(iter(pool._open))._exchange is not None)
        connection = next(iter(pool._open))
        for piece in pieces:
            before = answer.calls
            connection.data_received(piece)
            assert answer.calls - before <= 3, "what one read brings is told at once"
        if not answer.over:
            connection.transport.close()
        return await answer.whole()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(set(ANSWERS) - {"two answers"})), st.data())
def test_an_answer_cut_anywhere_is_the_same_answer(name: str, data: st.DataObject) -> None:
    stream, _, status, body = ANSWERS[name]
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    edges = [0, *sorted(cuts), len(stream)]

    async def main() -> None:
        answer = await fed([stream[a:b] for a, b in itertools.pairwise(edges) if a < b])
        assert (answer.ended, answer.status, answer.body) == (True, status, body)
        answer = await fed([stream[at : at + 1] for at in range(len(stream))])
        assert (answer.ended, answer.status, answer.body) == (True, status, body)

    uvloop.run(main())


def test_a_stream_comes_piece_by_piece(run: Run) -> None:
    asked: list[Request] = []

    async def main() -> None:
        async with serving(asked.append) as server, pool_to(server.port) as pool:
            answer = get(pool)
            await until(lambda: bool(asked))
            asked[0].start(200)
            await until(lambda: answer.status == 200)
            for number in range(1, 4):
                asked[0].write(b"piece %d" % number)
                await until(lambda n=number: len(answer.pieces) == n)  # type: ignore[misc]
            assert not answer.ended
            asked[0].end()
            await answer.whole()
            assert answer.pieces == [b"piece 1", b"piece 2", b"piece 3"]

    run(main())


def test_the_last_piece_is_known_where_its_read_brings_the_end(run: Run) -> None:
    class Lasts(Answer):
        exchange: Exchange

        def on_body(self, data: bytes) -> None:
            super().on_body(data)
            lasts.append(self.exchange.last)

    lasts: list[bool] = []
    asked: list[Request] = []

    async def main() -> None:
        async with serving(asked.append) as server, pool_to(server.port) as pool:
            answer = Lasts()
            answer.exchange = pool.send("GET", "/", (), b"", answer)
            await until(lambda: bool(asked))
            asked[0].start(200)
            asked[0].write(b"first")
            await until(lambda: lasts == [False])
            asked[0].end(b"last")
            assert (await answer.whole()).pieces == [b"first", b"last"]
            assert lasts == [False, True]

    run(main())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.CLOSED),
        (b"HTTP/1.1 200", Reason.CLOSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", Reason.CLOSED),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", Reason.CLOSED),
        (b"SSH-2.0-OpenSSH\r\n", Reason.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", Reason.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", Reason.MALFORMED),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nxyz", Reason.MALFORMED),
    ],
)
def test_half_an_answer_is_an_error(run: Run, data: bytes, reason: Reason) -> None:
    async def main() -> None:
        peer = Peer([(data, True)])
        async with peer.up() as port, pool_to(port) as pool:
            answer = get(pool)
            assert await answer.failure() == (reason, True, bool(data))
            assert str(port) in str(answer.error)
            assert (await get(pool).whole()).body == b"ok"
            assert len(peer.requests) == 2  # nothing was sent twice

    run(main())


# --- the pool -------------------------------------------------------------------------------------------------------


def test_the_connection_used_last_is_taken_first(run: Run) -> None:
    asked: list[Request] = []

    async def main() -> None:
        async with serving(asked.append) as server, pool_to(server.port) as pool:
            answers = [get(pool, f"/{number}") for number in range(3)]
            await until(lambda: len(asked) == 3)
            for request in asked:
                request.respond(200, b"")
                await answers[int(request.path[1:])].whole()
            last = asked[-1]._connection
            assert (pool.connections, pool.idle) == (3, 3)
            for _ in range(5):
                answer = get(pool)
                await until(lambda: not asked[-1].answered)
                assert asked[-1]._connection is last
                asked[-1].respond(200, b"")
                await answer.whole()

    run(main())


def test_above_the_maximum_requests_wait_in_order(run: Run) -> None:
    asked: list[Request] = []

    async def main() -> None:
        async with serving(asked.append) as server, pool_to(server.port, connections_max=2) as pool:
            answers = [get(pool, f"/{number}") for number in range(10)]
            assert pool.waiting == 10
            for number in range(10):
                await until(lambda n=number: len(asked) > n)  # type: ignore[misc]
                assert server.connections <= 2
                asked[number].respond(200, asked[number].path.encode())
                await until(lambda n=number: answers[int(asked[n].path[1:])].over)  # type: ignore[misc]
            assert [request.path for request in asked] == [f"/{number}" for number in range(10)]
            assert [answer.body for answer in answers] == [f"/{number}".encode() for number in range(10)]
            assert (pool.connections, pool.waiting) == (2, 0)

    run(main())


def test_a_request_may_be_sent_from_within_an_answer(run: Run) -> None:
    class Again(Answer):
        def __init__(self, pool: Pool, left: int) -> None:
            super().__init__()
            self.pool, self.left = pool, left

        def on_end(self) -> None:
            super().on_end()
            if self.left:
                self.pool.send("GET", "/", (), b"", Again(self.pool, self.left - 1))
            else:
                done.append(self)

    done: list[Answer] = []

    async def main() -> None:
        async with serving(echo) as server, pool_to(server.port) as pool:
            pool.send("GET", "/", (), b"", Again(pool, 200))
            await until(lambda: bool(done))
            assert pool.connections == 1

    run(main())


def test_a_connection_that_the_peer_closes_while_idle_is_not_used(run: Run) -> None:
    async def main() -> None:
        peer = Peer([(OK, True)])
        async with peer.up() as port, pool_to(port) as pool:
            assert (await get(pool).whole()).body == b"ok"
            await until(lambda: pool.idle == pool.connections == 0)
            assert (await get(pool).whole()).body == b"ok"

    run(main())


def test_a_connection_that_speaks_unasked_is_not_used(run: Run) -> None:
    async def main() -> None:
        peer = Peer([(OK, False)])
        async with peer.up() as port, pool_to(port) as pool:
            await get(pool).whole()
            next(iter(pool._open)).data_received(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            assert pool.idle == 0
            assert (await get(pool).whole()).status == 200
            assert [number for number, _ in peer.requests] == [0, 1]

    run(main())


def test_a_connection_whose_end_was_seen_is_not_used(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, pool_to(server.port) as pool:
            await get(pool).whole()
            connection = next(iter(pool._open))
            connection.eof_received()
            assert pool.idle == 0
            connection.transport.close()  # as the loop does after this call

    run(main())


def test_a_stale_connection_is_made_good_once(run: Run) -> None:
    async def main() -> None:
        peer = Peer([(OK, False), (None, True)])  # takes the second request of its connection and closes
        async with peer.up() as port, pool_to(port) as pool:
            assert (await get(pool, "/1").whole()).body == b"ok"
            assert pool.idle == 1
            answer = Answer()
            pool.send("POST", "/2", (), b"body", answer)
            assert (await answer.whole()).body == b"ok"
            first, lost, again = peer.requests
            assert (first[0], lost[0], again[0]) == (0, 0, 1)
            assert lost[1] == again[1]
            assert lost[1].endswith(b"body")

    run(main())


def test_nothing_is_sent_a_third_time(run: Run) -> None:
    async def main() -> None:
        peer = Peer([(OK, False), (None, True)], [(None, True)])
        async with peer.up() as port, pool_to(port) as pool:
            await get(pool).whole()
            assert await get(pool).failure() == (Reason.CLOSED, True, False)
            assert [number for number, _ in peer.requests] == [0, 0, 1]

    run(main())


def test_a_stale_connection_whose_answer_had_begun_is_an_error(run: Run) -> None:
    async def main() -> None:
        peer = Peer([(OK, False), (b"HTTP/1.1", True)])
        async with peer.up() as port, pool_to(port) as pool:
            await get(pool).whole()
            assert await get(pool).failure() == (Reason.CLOSED, True, True)
            assert len(peer.requests) == 2

    run(main())


def test_time_outs() -> None:
    """All at once, because each takes seconds."""

    async def no_answer() -> None:
        peer = Peer([(None, False)])
        async with peer.up() as port, pool_to(port, head_s=1) as pool:
            assert await get(pool).failure() == (Reason.TIMEOUT, True, False)
            await until(lambda: pool.connections == 0)

    async def slow_body() -> None:
        """Only the head is waited for so impatiently."""
        asked: list[Request] = []
        async with serving(asked.append) as server, pool_to(server.port, head_s=1) as pool:
            answer = get(pool)
            await until(lambda: bool(asked))
            asked[0].start(200)
            await asyncio.sleep(2.5)
            asked[0].end()
            assert (await answer.whole()).ended

    async def lost_by_the_peer() -> None:
        """After seconds, a request that is lost on a reused connection was not a stale connection's."""
        asked: list[Request] = []

        def handler(request: Request) -> None:
            asked.append(request)
            if len(asked) == 1:
                request.respond(200, b"")
            else:
                asyncio.get_running_loop().call_later(2.5, request.abort)

        async with serving(handler) as server, pool_to(server.port) as pool:
            await get(pool).whole()
            assert await get(pool).failure() == (Reason.CLOSED, True, False)
            assert len(asked) == 2

    async def idle() -> None:
        async with serving(echo) as server, pool_to(server.port, idle_s=1) as pool:
            await get(pool).whole()
            assert pool.idle == 1
            await until(lambda: pool.connections == 0)
            await until(lambda: server.connections == 0)

    async def main() -> None:
        await asyncio.gather(no_answer(), slow_body(), lost_by_the_peer(), idle())

    uvloop.run(main())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_nobody_listens(run: Run) -> None:
    async def main() -> None:
        async with pool_to(free_port(), connections_max=2) as pool:
            answers = [get(pool) for _ in range(20)]
            for answer in answers:
                assert await answer.failure() == (Reason.CONNECT, False, False)
                assert str(pool.port) in str(answer.error)
            assert pool.waiting == 0

    run(main())


def test_nobody_accepts(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            fillers = [socket.socket() for _ in range(8)]  # once the backlog is full, the kernel drops what comes
            for filler in fillers:
                filler.setblocking(False)
                with suppress(BlockingIOError):
                    filler.connect(("127.0.0.1", port))
            async with pool_to(port, connect_s=0.2) as pool:
                start = loop.time()
                assert await get(pool).failure() == (Reason.CONNECT, False, False)
                assert loop.time() - start >= 0.19
            for filler in fillers:
                filler.close()

    run(main())


def test_a_closed_pool(run: Run) -> None:
    asked: list[Request] = []

    async def main() -> None:
        async with serving(asked.append) as server:
            pool = Pool(f"http://127.0.0.1:{server.port}", connections_max=1)
            underway, waiting = get(pool), get(pool)
            await until(lambda: bool(asked))
            await pool.close()
            assert await underway.failure() == (Reason.SHUTDOWN, True, False)
            assert await waiting.failure() == (Reason.SHUTDOWN, False, False)
            late = get(pool)
            assert not late.over
            assert await late.failure() == (Reason.SHUTDOWN, False, False)
            await until(lambda: server.connections == 0)

    run(main())


# --- abort and flow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["waiting", "streaming"])
def test_an_abort_is_seen_by_the_peer(run: Run, state: str) -> None:
    asked: list[Request] = []
    gone: list[str] = []

    def handler(request: Request) -> None:
        asked.append(request)
        request.on_disconnect = lambda: gone.append(request.path)
        if request.path == "/works":
            request.respond(200, b"")
        elif state == "streaming":
            request.start(200)
            request.write(b"first")

    async def main() -> None:
        async with serving(handler) as server, pool_to(server.port) as pool:
            answer = Answer()
            exchange = pool.send("POST", "/aborted", (), b"body", answer)
            await until(lambda: bool(asked) and (state == "waiting" or answer.body == b"first"))
            calls = answer.calls
            exchange.abort()
            exchange.abort()
            exchange.pause()
            exchange.resume()
            await until(lambda: gone == ["/aborted"])
            await until(lambda: pool.connections == 0)
            assert answer.calls == calls
            assert (await get(pool, "/works").whole()).ended

    run(main())


def test_an_abort_of_a_request_that_waits_for_a_connection(run: Run) -> None:
    asked: list[Request] = []

    async def main() -> None:
        async with serving(asked.append) as server, pool_to(server.port, connections_max=1) as pool:
            answers = [Answer() for _ in range(3)]
            exchanges = [pool.send("GET", f"/{n}", (), b"", answer) for n, answer in enumerate(answers)]
            exchanges[1].abort()
            await until(lambda: len(asked) == 1)
            asked[0].respond(200, b"")
            await until(lambda: len(asked) == 2)
            asked[1].respond(200, b"")
            await answers[2].whole()
            assert [request.path for request in asked] == ["/0", "/2"]
            assert answers[1].calls == 0
            exchanges[2].abort()  # it is over
            assert pool.idle == 1

    run(main())


def test_an_abort_from_within_the_answer(run: Run) -> None:
    class Impatient(Answer):
        exchange: Exchange

        def on_body(self, data: bytes) -> None:
            super().on_body(data)
            self.exchange.abort()

    async def main() -> None:
        async with serving(echo) as server, pool_to(server.port) as pool:
            answer = Impatient()
            answer.exchange = pool.send("GET", "/", (), b"", answer)
            await until(lambda: bool(answer.pieces))
            await until(lambda: pool.connections == 0)
            assert not answer.over

    run(main())


class Fountain:
    """Writes 32 MiB, as fast as it may."""

    TOTAL = 32 * 2**20

    def __init__(self, request: Request) -> None:
        self._request = request
        self.written = 0
        request.on_writable = self.flow
        request.start(200)
        self.flow(True)

    def flow(self, writable: bool) -> None:
        self.writable = writable
        while self.writable and self.written < self.TOTAL:
            self.written += 65_536
            self._request.write(b"x" * 65_536)
        if self.writable:
            self._request.end()


def test_a_paused_answer_stops_the_peer(run: Run) -> None:
    fountains: list[Fountain] = []

    def handler(request: Request) -> None:
        if request.path == "/works":
            request.respond(200, b"")
        else:
            fountains.append(Fountain(request))

    class Paused(Answer):
        exchange: Exchange

        def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
            super().on_head(status, headers)
            self.exchange.pause()
            self.exchange.pause()

    async def main() -> None:
        async with serving(handler) as server, pool_to(server.port) as pool:
            answer = Paused()
            answer.exchange = pool.send("GET", "/", (), b"", answer)
            await until(lambda: answer.status == 200 and not fountains[0].writable)
            got = len(answer.body)
            await asyncio.sleep(0.05)
            assert len(answer.body) == got
            assert fountains[0].written < Fountain.TOTAL
            answer.exchange.resume()
            await answer.whole()
            assert len(answer.body) == Fountain.TOTAL
            assert (await get(pool, "/works").whole()).ended

    run(main())


def test_a_pause_does_not_outlive_its_answer(run: Run) -> None:
    class Paused(Answer):
        exchange: Exchange

        def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
            super().on_head(status, headers)
            self.exchange.pause()

    async def main() -> None:
        async with serving(echo) as server, pool_to(server.port) as pool:
            answer = Paused()
            answer.exchange = pool.send("GET", "/", (), b"", answer)
            await answer.whole()
            assert (await get(pool).whole()).ended
            assert pool.connections == 1

    run(main())


def test_a_request_paused_before_it_has_a_connection_and_after_its_end(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, pool_to(server.port) as pool:
            answer = Answer()
            exchange = pool.send("GET", "/", (), b"", answer)
            exchange.pause()
            await until(lambda: pool.connections == 1)
            assert not next(iter(pool._open)).transport.is_reading()
            exchange.resume()
            await answer.whole()
            exchange.pause()  # it is over: the connection is another's
            assert (await get(pool).whole()).ended

    run(main())


def test_a_disconnect_passes_through_a_proxy(run: Run) -> None:
    """Server and client together, as in the gateway."""
    asked: list[Request] = []
    gone: list[str] = []

    def engine(request: Request) -> None:
        asked.append(request)
        request.on_disconnect = lambda: gone.append(request.path)

    async def main() -> None:
        async with serving(engine) as upstream, pool_to(upstream.port) as inner:

            def proxy(request: Request) -> None:
                request.on_disconnect = inner.send("POST", request.path, (), request.body, Answer()).abort

            async with serving(proxy) as server, pool_to(server.port) as outer:
                exchange = outer.send("POST", "/x", (), b"", Answer())
                await until(lambda: bool(asked))
                exchange.abort()
                await until(lambda: gone == ["/x"])

    run(main())


# --- what a caller may not write ------------------------------------------------------------------------------------


def test_a_request_cannot_be_broken_out_of(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, pool_to(server.port) as pool:
            for method, path, headers in (
                ("GET", "/a\r\nX: y", []),
                ("GET", "/a b", []),
                ("GET", "a", []),
                ("GET", "/é", []),
                ("GET /x", "/", []),
                ("HEAD", "/", []),
                ("GET", "/", [(b"x", b"a\r\nY: z")]),
                ("GET", "/", [(b"x\n", b"a")]),
            ):
                with pytest.raises(ValueError):
                    pool.send(method, path, headers, b"", Answer())
            with pytest.raises(ValueError):
                Pool("http://127.0.0.1", headers=[(b"x", b"a\nb")])
            assert (await get(pool).whole()).ended

    run(main())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:80",
        "ftp://h",
        "http://",
        "http://h:port",
        "http://h:99999",
        "http://h?q",
        "http://h#f",
        "http://[x",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
            Pool(url)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://h", b"h"),
        ("http://h:80/", b"h"),
        ("http://h:8001", b"h:8001"),
        ("https://h", b"h"),
        ("https://h:80", b"h:80"),
        ("http://[::1]:8001", b"[::1]:8001"),
    ],
)
def test_the_host_header(url: str, host: bytes) -> None:
    async def main() -> None:
        pool = Pool(url)
        assert pool._line("GET", "/p") == b"GET /p HTTP/1.1\r\nhost: " + host + b"\r\n"
        await pool.close()

    asyncio.run(main())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate of the test server")
def test_tls(run: Run, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {certificate} -days 2"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost".split(),
        check=True,
        capture_output=True,
    )
    serves = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serves.load_cert_chain(certificate, key)
    trusts = ssl.create_default_context(cafile=str(certificate))

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(OK)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(peer, "localhost", 0, ssl=serves, family=socket.AF_INET)
        port = server.sockets[0].getsockname()[1]
        pool = Pool(f"https://localhost:{port}", tls=trusts)
        for _ in range(2):
            assert (await get(pool).whole()).body == b"ok"
        assert pool.connections == 1
        await pool.close()
        stranger = Pool(f"https://localhost:{port}")
        assert await get(stranger).failure() == (Reason.CONNECT, False, False)
        await stranger.close()
        server.close()

    run(main())
