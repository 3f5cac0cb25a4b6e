"""The load generator against real sockets: punctual, complete, honest about what went wrong and about itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_bench.loads import ClosedLoop, ConstantThink, Fixed, OpenLoop, RequestClass
from sage_core.errors import ConfigError, DataError
from sage_core.load import Arrivals, Contents
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import MILLISECOND, NEVER, SECOND, RequestKind
from sage_live.alarm import Alarm
from sage_live.loadgen.answer import Answer
from sage_live.loadgen.encode import Share
from sage_live.loadgen.generator import Effort, LoadGenerator, Measured, generate
from sage_live.loadgen.options import Model, Options
from sage_live.loadgen.overhead import measure_overhead
from sage_live.loadgen.processes import joined, run_processes
from sage_live.loadgen.prompts import Prompts, estimated
from sage_live.loadgen.schema import CLIENT, FIELDS, Error, client_table, write_client
from sage_live.loadgen.summary import summary
from sage_live.loadgen.worker import rows_file

EVENT = 'data: {"choices":[{"index":0,"delta":{%s},"finish_reason":%s}]}\n\n'
USAGE = 'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
ROLE, STOP, DONE = (
    EVENT % ('"role":"assistant","content":""', "null"),
    EVENT % ('"content":""', '"stop"'),
    "data: [DONE]\n\n",
)
WORDS = [EVENT % (f'"content":" {word}"', "null") for word in ("one", "two", "three")]
STREAM = [ROLE, *WORDS, STOP, USAGE, DONE]
WHOLE = b'{"choices":[{"index":0}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
EMBEDDING = b'{"data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":7}}'


@dataclass
class Request:
    """What the server got."""

    path: str
    headers: dict[str, str]
    body: dict[str, object]
    at: int  # CLOCK_MONOTONIC
    client: int  # port: tells connections apart
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


Handler = Callable[[Request], Awaitable[None]]


class Server:
    """An HTTP/1.1 server small enough to misbehave in every way that is asked of it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.requests: list[Request] = []
        self.clients: set[int] = set()
        self.failures: list[BaseException] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        assert not self.failures, self.failures

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = writer.get_extra_info("peername")[1]
        self.clients.add(client)
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in head[1:-2])
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                request = Request(head[0].split()[1], headers, body, time.monotonic_ns(), client, reader, writer)
                self.requests.append(request)
                await self._handler(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:
            self.failures.append(error)
        finally:
            writer.close()


def whole(status: int = 200, body: bytes = WHOLE, more: str = "") -> bytes:
    return f"HTTP/1.1 {status} Said\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(events: Sequence[str], end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event.encode()) for event in events)
    return head + chunks + (b"0\r\n\r\n" if end else b"")


async def proper(request: Request) -> None:
    """Answer as asked."""
    if request.path.endswith("embeddings"):
        request.writer.write(whole(body=EMBEDDING))
    else:
        request.writer.write(chunked(STREAM) if request.body.get("stream") else whole())


def says(answer: bytes, close: bool = False) -> Handler:
    async def handler(request: Request) -> None:
        request.writer.write(answer)
        if close:
            request.writer.close()

    return handler


class Columns:
    """An open loop of requests at given instants (ns)."""

    def __init__(self, at: Sequence[int], kind: RequestKind = RequestKind.LLM_CHAT, due_ns: int = NEVER, **of: object):
        self._at = np.array(at, np.int64)
        self._kind, self._due_ns, self._of = kind, due_ns, of

    def columns(self) -> Iterator[Arrivals]:
        def same(value: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.full(len(self._at), value, np.int64)

        due = same(NEVER) if self._due_ns == NEVER else self._at + self._due_ns
        columns = [same(v) for v in (0, self._kind, 0, 2, 40, 9)]
        made = Arrivals(["chat"], ["alice"], 0, self._at, *columns, due, same(NEVER), same(0), same(3))
        yield made._replace(**self._of)  # type: ignore[arg-type]


def options(url: str, **fields: object) -> Options:
    models = {pipeline: Model("m", estimated(seed=1)) for pipeline in ("chat", "generate", "embed")}
    return replace(Options(url, models, connections=1), **fields)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(handler: Handler = proper) -> AsyncIterator[Server]:
    server = Server(handler)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def run(load: object, handler: Handler = proper, stop_when: Callable[[Server], bool] | None = None, **fields: object):
    """Generate ``load`` against a server in the same loop: what was measured, its columns by name, the server."""

    async def go() -> tuple[Measured, Server]:
        async with serving(handler) as server, asyncio.timeout(60):
            stop = asyncio.Event()
            running = asyncio.ensure_future(generate(load, options(server.url, **fields), stop=stop))  # type: ignore[arg-type]
            if stop_when is not None:
                async with asyncio.timeout(10):
                    while not stop_when(server):
                        await asyncio.sleep(0.005)
                stop.set()
            return await running, server

    measured, server = uvloop.run(go())
    return measured, dict(zip(FIELDS, measured.rows.T, strict=True)), server


def every(number: int, gap_ms: float = 1.0) -> list[int]:
    return [round(i * gap_ms * MILLISECOND) for i in range(number)]


# --- what is sent ------------------------------------------------------------------------------------------------------


def test_each_request_says_what_the_load_says() -> None:
    measured, rows, server = run(Columns(every(20), due_ns=250 * MILLISECOND), api_key="secret")
    assert rows["request"].tolist() == list(range(20))
    assert rows["error"].tolist() == [Error.NONE] * 20
    assert measured.objective_ns == 250 * MILLISECOND
    by_id = {int(r.headers["x-request-id"]): r for r in server.requests}
    for i, at in enumerate(every(20)):
        headers = by_id[i].headers
        assert by_id[i].path == "/v1/chat/completions"
        assert int(headers["x-sage-scheduled-ns"]) == measured.start_ns + at
        assert headers["x-sage-tenant"] == "alice"
        assert headers["x-sage-priority"] == "2"
        assert headers["x-sage-ttft-ms"] == "250"
        assert "x-sage-e2e-ms" not in headers
        assert "x-sage-input-tokens" not in headers  # only an estimate
        assert headers["authorization"] == "Bearer secret"
        assert by_id[i].body["max_tokens"] == 9  # the cap: the true length stays untold
        assert by_id[i].body["stream"] is True
        assert by_id[i].body["model"] == "m"
    prompts = {json.dumps(r.body["messages"]) for r in server.requests}
    assert len(prompts) == 20


def test_fixed_lengths_are_asked_for_and_the_cap_is_told_apart() -> None:
    exact = Prompts([f"w{i}" for i in range(64)], seed=0, overhead=5)
    fields = {"models": {"chat": Model("m", exact)}, "fixed_lengths": True, "body": {"chat": {"temperature": 0}}}
    measured, rows, server = run(Columns(every(3)), **fields)
    body, headers = server.requests[0].body, server.requests[0].headers
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["temperature"]) == (3, 3, True, 0)
    assert headers["x-sage-output-tokens-max"] == "9"
    assert headers["x-sage-input-tokens"] == "40"
    assert len(body["messages"][0]["content"].split()) == 35  # type: ignore[index]
    assert rows["output_tokens_asked"].tolist() == [3, 3, 3]
    told = summary(measured, fixed_lengths=True)
    assert (told.output_tokens_off, told.input_tokens_off) == (0, 3)  # the server said 7


@pytest.mark.parametrize(
    ("kind", "path"), [(RequestKind.LLM_GENERATE, "/v1/completions"), (RequestKind.EMBEDDING, "/v1/embeddings")]
)
def test_other_kinds(kind: RequestKind, path: str) -> None:
    _, rows, server = run(Columns(every(3), kind), stream=False)
    assert {r.path for r in server.requests} == {path}
    assert {("prompt" if kind == RequestKind.LLM_GENERATE else "input") in r.body for r in server.requests} == {True}
    assert rows["error"].tolist() == [0, 0, 0]
    assert rows["input_tokens"].tolist() == [7, 7, 7]
    assert rows["first_token_ns"].tolist() == [-1, -1, -1]  # nothing was streamed


def test_a_load_of_the_project_both_ways() -> None:
    classes = {
        "talk": RequestClass("chat", 0.5, input_tokens=Fixed(30), output_tokens=Fixed(3), output_tokens_max=9),
        "text": RequestClass("embedding", 0.5, input_tokens=Fixed(20)),
    }
    load = OpenLoop(2000.0, classes, requests=100, streams=Streams(3), slo=SloTable({"chat": Slo(ttft_s=1.0)}))

    class Singly:
        arrivals, ended = load.arrivals, load.ended

    _, columns, _ = run(load)
    _, singly, _ = run(Singly())
    for name in ("request", "kind", "scheduled_ns", "error", "input_tokens_asked", "output_tokens_asked", "chunks"):
        assert columns[name].tolist() == singly[name].tolist()
    assert set(columns["kind"].tolist()) == {RequestKind.LLM_CHAT, RequestKind.EMBEDDING}
    assert columns["error"].tolist() == [0] * 100


# --- what is measured --------------------------------------------------------------------------------------------------


def test_a_stream_is_timed_by_its_content() -> None:
    second = asyncio.Event()

    async def slowly(request: Request) -> None:
        parts = [chunked(STREAM[:2], end=False), *(b"%x\r\n%b\r\n" % (len(e), e.encode()) for e in STREAM[2:])]
        request.writer.write(parts[0])
        with contextlib.suppress(TimeoutError):  # between its first token and the rest
            await asyncio.wait_for(second.wait(), 0.05)
        request.writer.write(b"".join(parts[1:]) + b"0\r\n\r\n")

    measured, rows, _ = run(Columns([0]), slowly, chunk_times=True)
    assert rows["chunks"].tolist() == [3]  # not the role, not the end
    assert (rows["input_tokens"][0], rows["output_tokens"][0]) == (7, 3)
    assert 0 <= rows["scheduled_ns"][0] <= rows["sent_ns"][0] < rows["first_token_ns"][0] < rows["ended_ns"][0]
    assert measured.gaps is not None
    assert len(measured.gaps) == 2
    assert measured.gaps[0] >= 40 * MILLISECOND
    assert measured.gaps[1] == 0  # came in one read
    assert rows["first_token_ns"][0] + measured.gaps.sum() <= rows["ended_ns"][0]


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 2000)), line=st.sampled_from(["\n", "\r\n"]))
def test_a_stream_means_the_same_however_it_is_cut(cuts: list[int], line: str) -> None:
    body = (": a comment\n\n" + "".join(STREAM)).replace("\n", line).encode()
    answer = Answer()
    edges = [0, *sorted(cut % len(body) for cut in cuts), len(body)]
    for now, (begin, end) in enumerate(itertools.pairwise(edges)):
        answer.stream(body[begin:end], now)
    assert answer.end(True) is Error.NONE
    assert (answer.chunks, answer.input_tokens, answer.output_tokens, len(answer.gaps)) == (3, 7, 3, 2)
    assert answer.first_ns + sum(answer.gaps) == answer.last_ns


@pytest.mark.parametrize(
    ("choice", "counts"),
    [
        ('"delta":{"role":"assistant","content":"Hi"}', True),
        ('"delta":{"role":"assistant","content":""}', False),
        ('"delta":{"role":"assistant","content":null}', False),
        ('"delta":{"content":""}', True),  # a token that completes no character
        ('"delta":{},"finish_reason":"length"', False),
        ('"delta":{"content":""},"finish_reason":"stop"', False),
        ('"delta":{"content":"x"},"finish_reason":"length"', True),
        ('"delta":{"reasoning_content":"hm"}', True),
        ('"delta":{"tool_calls":[{"index":0}]}', True),
        ('"text":"x"', True),
        ('"text":"","finish_reason":"stop"', False),
    ],
)
def test_what_counts_as_content(choice: str, counts: bool) -> None:
    answer = Answer()
    answer.stream(b'data: {"choices":[{%b}]}\n\n' % choice.encode(), 5)
    assert answer.chunks == counts


def test_an_answer_that_does_not_come_holds_nothing_up() -> None:
    async def mute(request: Request) -> None:
        if int(request.headers["x-request-id"]) >= 10:
            await proper(request)

    measured, rows, server = run(Columns(every(60)), mute, timeout_s=0.2)
    assert rows["error"].tolist() == [Error.TIMEOUT] * 10 + [Error.NONE] * 50
    assert len(server.clients) >= 11  # one more for each that is stuck
    assert np.all(rows["ended_ns"][10:] < rows["ended_ns"][:10].min())
    assert np.all(rows["ended_ns"][:10] - rows["sent_ns"][:10] >= 200 * MILLISECOND)
    assert summary(measured, fixed_lengths=False).failures == {"timeout": 10}


def test_latency_counts_from_the_scheduled_instant_and_the_lag_is_told() -> None:
    async def stalling(request: Request) -> None:
        if int(request.headers["x-request-id"]) == 20:
            time.sleep(0.2)  # the generator shares the loop: it is late, as on a machine that is too small
        await proper(request)

    measured, rows, _ = run(Columns(every(100)), stalling)
    lag = rows["sent_ns"] - rows["scheduled_ns"]
    assert lag.min() >= 0
    assert lag.max() >= 100 * MILLISECOND
    late = int(np.argmax(lag))
    assert rows["ended_ns"][late] - rows["scheduled_ns"][late] > lag[late]
    told = summary(measured, fixed_lengths=False)
    assert not told.valid
    assert "send lag" in told.invalid[0]


def test_a_process_that_was_held_up_at_the_start_is_late_and_says_so() -> None:
    async def go() -> Measured:
        async with serving() as server:
            generator = LoadGenerator(Columns(every(100)), options(server.url))
            await generator.prepare()
            return await generator.run(time.monotonic_ns() - 200 * MILLISECOND)

    measured = asyncio.run(go())
    rows = dict(zip(FIELDS, measured.rows.T, strict=True))
    assert rows["error"].tolist() == [0] * 100
    assert rows["scheduled_ns"].tolist() == every(100)
    assert (rows["sent_ns"] - rows["scheduled_ns"]).min() >= 100 * MILLISECOND
    assert "send lag" in summary(measured, fixed_lengths=False).invalid[0]


def test_an_overloaded_generator_is_invalid() -> None:
    """No machine sends ten million requests a second from Python."""
    measured, rows, _ = run(Columns([i * 100 for i in range(4000)]))
    told = summary(measured, fixed_lengths=False)
    assert len(rows["request"]) == 4000  # nothing lost all the same
    assert not told.valid
    assert told.achieved_rate < 0.99 * told.requested_rate
    assert [reason.split()[0] for reason in told.invalid][:2] == ["send", f"{round(told.achieved_rate * 399_900e-9)}"]


def rows_of(lag_ms: Sequence[float], gap_ms: float = 10.0) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    rows = np.zeros((len(lag_ms), len(FIELDS)), np.int64)
    rows[:, 0] = np.arange(len(lag_ms))
    rows[:, FIELDS.index("scheduled_ns")] = np.arange(len(lag_ms)) * gap_ms * MILLISECOND
    rows[:, FIELDS.index("sent_ns")] = rows[:, FIELDS.index("scheduled_ns")] + np.array(lag_ms) * MILLISECOND
    return rows


def test_validity_is_held_against_the_objective() -> None:
    def told(lag_ms: Sequence[float], objective_ns: int = NEVER, busy: float = 0.1) -> list[str]:
        measured = Measured(rows_of(lag_ms), None, 0, objective_ns, [Effort(1.0, 0.1), Effort(1.0, busy)])
        return summary(measured, fixed_lengths=False).invalid

    assert told([0.1] * 1000) == []
    assert told([0.1] * 980 + [8.0] * 20) == ["send lag p99 8.0 ms, above 5.0 ms"]
    assert told([0.1] * 980 + [8.0] * 20, 200 * MILLISECOND) == []  # 5 % of 200 ms is 10
    assert told([0.1] * 100 + [8.0]) == ["send lag max 8.0 ms, above 5.0 ms"]  # too few for a p99
    assert told([0.1] * 1000, busy=0.95) == ["generator busy 95 % of a core, above 90 %"]


# --- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "error", "status"),
    [
        (says(whole(429, b"{}")), Error.STATUS, 429),
        (says(whole(500, b"no")), Error.STATUS, 500),
        (says(chunked(STREAM[:-1])), Error.TRUNCATED, 200),
        (says(whole()), Error.TRUNCATED, 200),  # a stream was asked for
        (says(chunked(STREAM[:3], end=False), close=True), Error.RESET, 200),
        (says(b"", close=True), Error.RESET, -1),
        (says(chunked([ROLE, 'data: {"error":{"message":"dead"}}\n\n', DONE])), Error.EVENT, 200),
        (says(chunked([ROLE, "data: {broken\n\n", DONE])), Error.MALFORMED, 200),
        (says(b"SSH-2.0-nonsense\r\n\r\n"), Error.MALFORMED, -1),
    ],
)
def test_every_failure_has_a_class(handler: Handler, error: Error, status: int) -> None:
    measured, rows, _ = run(Columns(every(3)), handler)
    assert rows["error"].tolist() == [error] * 3
    assert set(rows["status"].tolist()) <= {status, 0 if status < 0 else status}
    assert np.all(rows["ended_ns"] >= rows["sent_ns"])
    name = f"status_{status}" if error is Error.STATUS else error.name.lower()
    assert summary(measured, fixed_lengths=False).failures == {name: 3}


@pytest.mark.parametrize("body", [b"{}", b"{", b'{"choices":[]}', b'{"choices":3}'])
def test_a_body_that_is_no_answer(body: bytes) -> None:
    _, rows, _ = run(Columns([0]), says(whole(body=body)), stream=False)
    assert rows["error"].tolist() == [Error.MALFORMED]


def test_interim_answers_and_bodies_that_end_with_the_connection() -> None:
    async def hinting(request: Request) -> None:
        request.writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await asyncio.sleep(0.02)  # so that it is a read of its own
        await proper(request)

    _, rows, _ = run(Columns([0]), hinting, stream=False)
    assert (rows["error"].tolist(), rows["status"].tolist()) == ([0], [200])
    _, rows, _ = run(Columns([0]), says(b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE, close=True), stream=False)
    assert rows["error"].tolist() == [0]
    _, rows, _ = run(
        Columns([0]), says(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n" + WHOLE[:-9], close=True), stream=False
    )
    assert rows["error"].tolist() == [Error.RESET]


def test_a_server_that_goes_away() -> None:
    """What was in flight is reset, what comes later finds nobody; each has its row."""

    async def go() -> Measured:
        server = Server(proper)

        async def dying(request: Request) -> None:
            if int(request.headers["x-request-id"]) == 20:
                server._server.close()
                request.writer.transport.abort()
            else:
                await proper(request)

        server._handler = dying
        await server.start()
        return await generate(Columns(every(60)), options(server.url, connections=4, idle_s=0.0))

    measured = asyncio.run(go())
    rows = dict(zip(FIELDS, measured.rows.T, strict=True))
    assert rows["request"].tolist() == list(range(60))
    assert rows["error"][:20].tolist() == [0] * 20
    assert rows["error"][20] == Error.RESET
    assert set(rows["error"][21:].tolist()) <= {Error.NONE, Error.CONNECT, Error.RESET}


def test_keep_alive_is_used_and_its_end_is_heeded() -> None:
    _, rows, server = run(Columns(every(40, 2.0)))
    assert rows["error"].tolist() == [0] * 40
    assert len(server.clients) < 20
    _, rows, server = run(Columns(every(10, 2.0)), says(whole(more="connection: close\r\n"), close=True), stream=False)
    assert rows["error"].tolist() == [0] * 10
    assert len(server.clients) == 10


def test_stopping_loses_nothing() -> None:
    """In flight: cut, and the server sees the connection close. Not yet due: not part of the run."""
    gone: list[bytes] = []

    async def mute(request: Request) -> None:
        gone.append(await request.reader.read())

    load = Columns([*every(20), 3600 * SECOND])
    measured, rows, _ = run(load, mute, stop_when=lambda server: len(server.requests) == 20)
    assert rows["request"].tolist() == list(range(20))
    assert rows["error"].tolist() == [Error.CUT] * 20
    assert np.all(rows["ended_ns"] > rows["sent_ns"])
    assert gone == [b""] * 20
    assert summary(measured, fixed_lengths=False).failures == {"cut": 20}


def test_what_was_due_and_not_sent_when_stopped_has_a_row() -> None:
    measured, rows, _ = run(Columns([0] * 50_000), stop_when=lambda server: len(server.requests) > 10)
    assert len(rows["request"]) == 50_000
    unsent = rows["error"] == Error.UNSENT
    assert unsent.sum() > 1000
    assert np.all(rows["sent_ns"][unsent] == -1)
    assert not summary(measured, fixed_lengths=False).valid


# --- closed loop, several processes --------------------------------------------------------------------------------------


def test_closed_loop_users_wait_for_their_answers() -> None:
    open_now, most = 0, 0

    async def counting(request: Request) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0)
        open_now -= 1
        await proper(request)

    classes = {"talk": RequestClass("chat", 1.0, input_tokens=Fixed(9), output_tokens=Fixed(3), output_tokens_max=9)}
    load = ClosedLoop(4, classes, ConstantThink(0.002), requests=60, streams=Streams(1), slo=SloTable())
    _, rows, server = run(load, counting)
    assert sorted(rows["request"].tolist()) == list(range(60))
    assert rows["error"].tolist() == [0] * 60
    assert 1 <= most <= 4
    assert load.in_flight == 0
    assert len(server.clients) <= 5
    with pytest.raises(ConfigError, match="closed loop"):
        LoadGenerator(load, options("http://127.0.0.1:1"), Share(0, 2))


def test_several_processes_are_one_load() -> None:
    async def go() -> tuple[Measured, Server]:
        async with serving() as server:
            load = Columns(every(300, 0.5), due_ns=SECOND)
            return await run_processes(load, options(server.url, chunk_times=True), 2), server

    measured, server = asyncio.run(go())
    rows = dict(zip(FIELDS, measured.rows.T, strict=True))
    assert rows["request"].tolist() == list(range(300))
    assert rows["scheduled_ns"].tolist() == every(300, 0.5)
    assert rows["error"].tolist() == [0] * 300
    assert len(measured.efforts) == 2
    assert measured.objective_ns == SECOND
    assert {int(r.headers["x-sage-scheduled-ns"]) - measured.start_ns for r in server.requests} == set(every(300, 0.5))
    by_client = {
        c: {int(r.headers["x-request-id"]) % 2 for r in server.requests if r.client == c} for c in server.clients
    }
    assert sorted(map(tuple, filter(None, by_client.values())))[0] == (0,)
    assert all(len(shares) <= 1 for shares in by_client.values())
    assert measured.gaps is not None
    assert len(measured.gaps) == 600
    table = client_table(measured.rows, measured.gaps, 0)
    span = rows["ended_ns"] - rows["first_token_ns"]
    assert all(sum(gaps) <= s for gaps, s in zip(table["itl_ns"].to_pylist(), span.tolist(), strict=True))


def test_gaps_stay_with_their_rows(tmp_path: Path) -> None:
    rows = rows_of([0.0] * 5)
    chunks = FIELDS.index("chunks")
    rows[:, chunks] = (3, 0, 1, 2, 4)  # 2, 0, 0, 1 and 3 gaps
    np.savez(tmp_path / rows_file(0), rows=rows[::2], gaps=np.array([1, 2, 41, 42, 43]))
    np.savez(tmp_path / rows_file(1), rows=rows[1::2], gaps=np.array([31]))
    measured = joined(tmp_path, 0, [{"cpu_s": 1.0, "busy": 0.1, "objective_ns": n} for n in (NEVER, 5)])
    assert measured.rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    told = client_table(measured.rows, measured.gaps, 0)["itl_ns"].to_pylist()
    assert told == [[1, 2], [], [], [31], [41, 42, 43]]
    assert measured.objective_ns == 5


def test_stopping_several_processes() -> None:
    async def go() -> Measured:
        async with serving() as server:
            stop = asyncio.Event()
            load = Columns([*every(20), 3600 * SECOND, 3600 * SECOND])
            running = asyncio.ensure_future(run_processes(load, options(server.url), 2, stop=stop))
            async with asyncio.timeout(60):
                while len(server.requests) < 20:
                    await asyncio.sleep(0.01)
                stop.set()
                return await running

    measured = asyncio.run(go())
    assert measured.rows[:, 0].tolist() == list(range(20))


def test_a_process_that_cannot_begin_says_why() -> None:
    with pytest.raises(ConfigError, match="nothing answers at"):
        asyncio.run(run_processes(Columns([0, 1]), options(f"http://127.0.0.1:{free_port()}"), 2))


# --- the rest ------------------------------------------------------------------------------------------------------------


def test_client_parquet(tmp_path: Path) -> None:
    async def mixed(request: Request) -> None:
        number = int(request.headers["x-request-id"])
        request.writer.write(whole(503, b"") if number == 1 else chunked(STREAM[: 3 if number == 2 else 7]))

    measured, _, _ = run(Columns(every(4)), mixed, chunk_times=True)
    write_client(tmp_path / "client.parquet", client_table(measured.rows, measured.gaps, 2 * MILLISECOND))
    table = pq.read_table(tmp_path / "client.parquet")
    assert table.schema.names == CLIENT.names
    rows = table.to_pylist()
    assert [r["error"] for r in rows] == [None, "status", "truncated", None]
    assert [r["status"] for r in rows] == [200, 503, 200, 200]
    assert [r["chunks"] for r in rows] == [3, 0, 2, 3]
    assert [len(r["itl_ns"]) for r in rows] == [2, 0, 1, 2]
    assert [r["output_tokens"] for r in rows] == [3, None, None, 3]
    assert rows[1]["first_token_ns"] is None
    assert [r["kind"] for r in rows] == ["chat"] * 4
    assert [r["warmup"] for r in rows] == [True, True, False, False]
    without = client_table(measured.rows, None, 0)
    assert without["itl_ns"].to_pylist() == [None] * 4
    assert client_table(measured.rows[:0], None, 0).schema == CLIENT


def test_overhead_is_asked_of_the_server() -> None:
    async def counting(request: Request) -> None:
        words = len(request.body["messages"][0]["content"].split())  # type: ignore[index]
        request.writer.write(whole(body=b'{"choices":[{}],"usage":{"prompt_tokens":%d}}' % (words + 11)))

    async def go(handler: Handler) -> int:
        async with serving(handler) as server:
            return await measure_overhead(options(server.url), "chat", RequestKind.LLM_CHAT)

    assert asyncio.run(go(counting)) == 11
    with pytest.raises(DataError, match="status 404"):
        asyncio.run(go(says(whole(404, b"{}"))))


def test_mistakes_are_explained() -> None:
    with pytest.raises(ConfigError, match="start the gateway or engine first"):
        asyncio.run(generate(Columns([0]), options(f"http://127.0.0.1:{free_port()}")))
    for url in ("https://127.0.0.1:1", "127.0.0.1:8888", "http://127.0.0.1:x", "http://"):
        with pytest.raises(ConfigError, match="url: expected http://HOST:PORT"):
            options(url)
    with pytest.raises(ConfigError, match="body: unknown kind"):
        options("http://127.0.0.1:1", body={"talk": {}})
    with pytest.raises(ConfigError, match="api_key"):
        options("http://127.0.0.1:1", api_key="a\r\nx-evil: 1")
    with pytest.raises(ConfigError, match="tenant"):
        run(Columns([0], tenants=["a\r\nx-evil: 1"]))
    with pytest.raises(ConfigError, match="pipeline 'rag', which has no model; known: chat"):
        run(Columns([0], pipelines=["rag"]))


def test_shared_beginnings_reach_the_wire() -> None:
    shared = Contents(16, (3, 4))
    _, _, server = run(Columns(every(3), contents=[shared, shared, None]))
    texts = [str(r.body["messages"][0]["content"]).split() for r in sorted(server.requests, key=lambda r: r.at)]  # type: ignore[index]
    assert texts[0][:32] == texts[1][:32]
    assert texts[0][32:] != texts[1][32:]
    assert texts[2][:16] != texts[0][:16]


def test_the_alarm_never_rings_early_and_keeps_the_last_setting() -> None:
    async def go() -> list[tuple[int, int]]:
        rung: list[int] = []
        came = asyncio.Event()

        def ring() -> None:
            rung.append(time.monotonic_ns())
            came.set()

        alarm = Alarm(ring)
        told = []
        for delay_ns in (0, 50_000, 700_000, 3 * MILLISECOND):
            at = time.monotonic_ns() + delay_ns
            alarm.set(at + SECOND)
            alarm.set(at)
            async with asyncio.timeout(5):
                await came.wait()
            came.clear()
            told.append((at, rung[-1]))
        assert len(rung) == 4
        alarm.close()
        return told

    assert all(rung >= at for at, rung in uvloop.run(go()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
