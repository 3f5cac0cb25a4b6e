"""Reads that are passed on as they are: the client, the plane and the call see what they see without a relay."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core import events as e
from sage_core._native import StreamRelay
from sage_core.commands import Cancel
from sage_core.events import AnyEvent
from sage_core.units import Nanos, RequestKind
from sage_live.call import Call
from sage_live.errors import ApiError
from sage_live.http.client import ClientConnection
from sage_live.http.exchange import Exchange
from sage_live.http.request import Request
from sage_live.http_engine import EngineSpec, HttpEngine, _Stream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
NO_USAGE = TOKEN.replace(b"]}\n", b'],"usage" : null}\n')
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Wire(asyncio.Transport):
    """Takes what is written."""

    def __init__(self, protocol: object = None) -> None:
        super().__init__()
        self.protocol = protocol  # as a loop's transport does: what its write belongs to holds its reader
        self.writes: list[bytes] = []
        self.cut = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.cut

    def abort(self) -> None:
        self.cut = True

    close = abort


class Client:
    """What a request needs of its connection."""

    def __init__(self) -> None:
        self.transport = Wire(self)
        self.current: Request | None = None
        self.written = 0

    def answer_head(self, status: int, content_type: bytes, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\n"

    def streams(self, request: Request) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self.transport.write(data)

    def answered(self, request: Request) -> None:
        self.current = None

    def abort(self) -> None:
        self.transport.abort()


@dataclass
class Ask:
    """One streamed answer from an engine's reads to a client's bytes, with the relay or without."""

    relays: bool
    usage_asked: bool = True
    method: str = "POST"
    http10: bool = False
    posted: list[AnyEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = Client()
        self.request = Request(
            self.client, self.method, "/", "", {}, b"", "", True, self.http10,  # type: ignore[arg-type]
        )  # fmt: skip
        self.client.current = self.request
        self.call = Call(self, RequestKind.LLM_CHAT, "m", "/", b"{}", stream=True, usage_asked=self.usage_asked)
        self.engine = HttpEngine(EngineSpec("http://127.0.0.1:9", "m"), {}, 0)
        self.engine.start(self.posted.append, lambda: Nanos(5))
        self.stream = self.engine.flights[1] = _Stream(self.engine, 1, self.call)
        self.exchange = self.stream.exchange = Exchange(b"", self.stream)
        self.connection = ClientConnection(self.engine.pool)
        self.connection.connection_made(Wire())
        self.connection.carry(self.exchange, False)

    def begin(self, content_type: bytes) -> None:
        self.request.start(200, content_type)
        if self.relays:
            self.call.relay = self.request.relay

    def piece(self, data: bytes) -> None:
        self.request.write(data)

    def complete(self, status: int, body: bytes, content_type: bytes) -> None: ...
    def finish(self, data: bytes) -> None: ...
    def fail(self, error: ApiError) -> None: ...

    async def hear(self, reads: list[bytes], ends: bool = True) -> Ask:
        for read in reads:
            self.connection.data_received(read)
        if ends:
            self.connection.connection_lost(None)
        for event in self.posted:
            if isinstance(event, e.TaskFinished):
                self.request.end(self.call.tail) if self.call.begun else None
            elif isinstance(event, e.TaskFailed):
                self.request.abort()
        await self.engine.pool.close() if ends else None
        return self

    @property
    def relayed(self) -> int:
        return 0 if self.stream.relay is None else self.stream.relay.events

    def told(self) -> dict[str, Any]:
        """All that anybody learns."""
        raw = b"".join(self.client.transport.writes)
        head, _, body = raw.partition(b"\r\n\r\n")
        assert self.client.written + self.request.relayed == len(raw)
        return {
            "head": head,
            "content": body if self.http10 else unchunked(body),
            "cut": self.client.transport.cut,
            "posted": self.posted,
            "call": (self.call.prompt_tokens, self.call.output_tokens, self.call.first_token_ns, self.call.tail),
            "error": None if self.call.error is None else self.call.error.body(),
        }


def unchunked(body: bytes) -> tuple[bytes, bool]:
    """The content, and whether the last chunk came. Each chunk that was written is whole events."""
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        n = int(size, 16)
        if n == 0:
            return content, body == b"\r\n"
        assert body[n : n + 2] == b"\r\n"
        content += body[:n]
        body = body[n + 2 :]
    return content, False


def both(reads: list[bytes], **options: Any) -> tuple[Ask, Ask]:
    async def main() -> tuple[Ask, Ask]:
        return await Ask(True, **options).hear(reads), await Ask(False, **options).hear(reads)

    with_relay, without = asyncio.run(main())
    assert with_relay.told() == without.told()
    return with_relay, without


HALF = b": half\r\n" + TOKEN
ERROR = b'data: {"error":{"message":"no"}}\n\n'
QUOTING = TOKEN.replace(b" word", b'say \\"usage\\" [DONE]')
EVENTS = st.sampled_from(
    [TOKEN, NO_USAGE, USAGE, DONE, b": ping\n\n", TOKEN.replace(b"\n", b"\r\n"), HALF, ERROR, QUOTING, b"\n\n\n"]
)
CUTS = st.lists(st.floats(0, 1), max_size=8)


def cut(data: bytes, at: list[float]) -> list[bytes]:
    places = sorted({0, len(data), *(int(x * len(data)) for x in at)})
    return [data[a:b] for a, b in pairwise(places)]


@settings(max_examples=400, deadline=None)
@given(
    events=st.lists(EVENTS, max_size=12),
    done=st.booleans(),
    whole=st.booleans(),
    aligned=st.booleans(),
    chunk_cuts=CUTS,
    read_cuts=CUTS,
    odd=st.sampled_from([b"%x\r\n", b"%X\r\n", b"%06x\r\n", b"%x;a=b\r\n", b"%010x\r\n"]),
    ends=st.sampled_from([END, b"", b"0\r\nx: y\r\n\r\n"]),
    usage_asked=st.booleans(),
)
def test_whatever_comes_however_it_is_cut(
    events: list[bytes],
    done: bool,
    whole: bool,
    aligned: bool,
    chunk_cuts: list[float],
    read_cuts: list[float],
    odd: bytes,
    ends: bytes,
    usage_asked: bool,
) -> None:
    content = [TOKEN, *events, *([DONE] if done else [])]
    chunks = content if whole else cut(b"".join(content), chunk_cuts)
    framed = [odd % len(each) + each + b"\r\n" for each in chunks]
    reads = [HEAD, *framed, *([ends] if ends else [])]
    if not aligned:
        reads = cut(b"".join(reads), read_cuts)
    both(reads, usage_asked=usage_asked)


@pytest.mark.parametrize("special", [USAGE, USAGE.replace(b":", b" : "), HALF, ERROR, QUOTING, DONE])
def test_what_matters_to_somebody_takes_the_long_way(special: bytes) -> None:
    both([HEAD + chunk(TOKEN), chunk(special), chunk(TOKEN), chunk(DONE) + END], usage_asked=False)


@pytest.mark.parametrize("at", [10, -2, -1])
def test_half_an_event_waits_for_the_other(at: int) -> None:
    halves = [chunk(TOKEN[:at]), chunk(TOKEN[at:])]
    assert both([HEAD + chunk(TOKEN), *halves, chunk(TOKEN), chunk(DONE) + END])[0].relayed == 1


def test_tokens_that_say_there_is_no_usage_yet_are_relayed() -> None:
    assert both([HEAD + chunk(NO_USAGE), chunk(NO_USAGE), chunk(USAGE), chunk(DONE) + END])[0].relayed == 1


def test_tokens_are_relayed() -> None:
    one, _ = both([HEAD + chunk(TOKEN), chunk(TOKEN), chunk(TOKEN) + chunk(TOKEN), chunk(USAGE), chunk(DONE) + END])
    assert one.relayed == 3
    assert one.client.transport.writes[1:3] == [chunk(TOKEN), 2 * chunk(TOKEN)]
    assert one.call.output_tokens == 3


@pytest.mark.parametrize("first", [[HEAD, chunk(TOKEN)], [HEAD + chunk(TOKEN)], [HEAD + chunk(TOKEN)[:-1], b"\n"]])
def test_a_relay_begins_where_the_framing_is_known(first: list[bytes]) -> None:
    assert both([*first, chunk(TOKEN), chunk(DONE) + END])[0].relayed == 1


@pytest.mark.parametrize("first", [[HEAD + b"3", chunk(TOKEN)[1:]], [HEAD + chunk(TOKEN)[:9], chunk(TOKEN)[9:]]])
def test_and_nowhere_else(first: list[bytes]) -> None:
    assert both([*first, chunk(TOKEN), chunk(DONE) + END])[0].relayed == 0


@pytest.mark.parametrize("body", [TOKEN + DONE, chunk(TOKEN) + b"\n\n" + DONE])
def test_a_body_without_chunks_has_none(body: bytes) -> None:
    """Not even one that looks like some."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    assert both([head + body[: len(chunk(TOKEN)) + 2], chunk(TOKEN), body[len(chunk(TOKEN)) + 2 :]])[0].relayed == 0


def test_events_are_counted_where_no_usage_is_told() -> None:
    one, other = both([HEAD + chunk(TOKEN), *[chunk(TOKEN)] * 5, chunk(DONE) + END])
    assert one.relayed == 5 and one.call.output_tokens == other.call.output_tokens == 5


@pytest.mark.parametrize("options", [{"http10": True}, {"method": "HEAD"}])
def test_a_client_that_gets_no_chunks_has_no_relay(options: dict[str, Any]) -> None:
    assert both([HEAD + chunk(TOKEN), chunk(TOKEN), chunk(DONE) + END], **options)[0].stream.relay is None


@pytest.mark.parametrize("leave", ["gone", "end", "abort"])
def test_whoever_leaves_stops_it_and_nothing_is_held(leave: str) -> None:
    async def main() -> weakref.ref[Any]:
        ask = await Ask(True).hear([HEAD + chunk(TOKEN), chunk(TOKEN)], ends=False)
        assert ask.relayed == 1
        getattr(ask.request, leave)()
        assert ask.stream.relay is not None and not ask.stream.relay.pass_on(chunk(TOKEN))
        ask.connection.connection_lost(None)
        await ask.engine.pool.close()
        return weakref.ref(ask.client)

    gone = asyncio.run(main())
    gc.collect()
    assert gone() is None


def test_a_stream_that_is_relayed_is_heard_of_when_somebody_looks() -> None:
    async def main() -> None:
        ask = Ask(True)
        zero = time.monotonic_ns()
        ask.engine.start(ask.posted.append, lambda: Nanos(time.monotonic_ns() - zero))
        await ask.hear([HEAD + chunk(TOKEN)], ends=False)
        engine, news = ask.engine, list[bool]()
        for reads in ([], [chunk(TOKEN)], [], [chunk(TOKEN)]):
            before = engine.now()
            await ask.hear(reads, ends=False)
            assert engine.heard_ns < before
            engine.hear()
            news.append(before <= engine.heard_ns <= engine.now())
        assert news == [False, True, False, True]
        before = engine.now()
        await ask.hear([chunk(TOKEN)], ends=False)
        engine.carry_out(Cancel(0, 1))
        assert engine.heard_ns >= before, "the last words of one that was cancelled"
        ask.connection.connection_lost(None)
        await engine.pool.close()

    asyncio.run(main())


def test_what_the_client_says_to_a_write_is_told() -> None:
    def refuse(data: bytes) -> None:
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        StreamRelay(refuse, time.monotonic_ns).pass_on(chunk(TOKEN))
