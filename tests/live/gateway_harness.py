"""A real gateway in front of real sockets, for the tests of this folder: engines, gateway, and a client that counts bytes.

Put this folder on ``sys.path`` and import; importlib mode has no import path to siblings.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvloop

from sage_core import events as e
from sage_core.backend import ContentsOf, OutputTokens
from sage_core.commands import AnyCommand
from sage_core.declared import Declared
from sage_core.log import Step
from sage_core.native_plane import Plane, make_plane
from sage_core.pipeline import single_request_pipelines
from sage_core.policy import Policy
from sage_core.units import PoolKind
from sage_live.gateway.app import Gateway, GatewayConfig
from sage_live.health import HealthConfig, State
from sage_live.http.limits import Limits
from sage_live.http.server import HttpServer, Request
from sage_live.http_engine import EngineSpec
from sage_live.pipelines.pipeline import LivePipeline
from sage_live.retrieval.index import VectorIndex
from sage_live.servers.emulated import Behaviour, EmulatedServer, ServedEmbedding, ServedLlm
from sage_live.servers.emulated_metrics import KvCache
from sage_live.service import InferenceService, ServiceConfig
from sage_policies.presets import PRESETS, preset
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LLM, EMBED = "small", "vectors"
DONE = b"data: [DONE]\n\n"


def run(main: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
    """Under the loop that serves, with an end."""

    async def clean() -> Any:
        try:
            return await asyncio.wait_for(main, timeout_s)
        finally:
            for client in _clients:
                client.close()
            _clients.clear()
            await asyncio.sleep(0)

    return uvloop.run(clean())


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for it, or fail."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


# --- engines ----------------------------------------------------------------------------------------------------------


def constant(seconds: float) -> IterationTime:
    """Whatever is in the iteration."""
    return IterationTime(token_knots=(1,), token_ps=(round(seconds * 1e12),), head_knots=(1,), head_ps=(0,))


@asynccontextmanager
async def emulated(
    *,
    iteration_s: float = 0.001,
    batch_s: float = 0.001,
    batch_tasks: int = 8,
    priority: bool = False,
    **behaviour: Any,
) -> AsyncIterator[EmulatedServer]:
    """One device with an LLM engine (an iteration takes ``iteration_s``) and an embedding engine (a batch ``batch_s``)."""
    llm = LlmReplica(
        0, "llm", constant(iteration_s), max_num_seqs=64, max_num_batched_tokens=2048, block_size=16, kv_blocks=4000,
        priority_queue=priority,
    )  # fmt: skip
    embed = EmbedReplica(1, "embed", constant(batch_s), max_batch_tasks=batch_tasks, max_batch_tokens=8192)

    def make(output_tokens: OutputTokens, contents: ContentsOf) -> SimulatedDevice:
        return SimulatedDevice(0, "here", llm, embed, output_tokens, contents=contents)

    server = await EmulatedServer.start(
        make,
        llm=ServedLlm(LLM, 0, KvCache(llm.kv_blocks, llm.block_size, llm.prefix_caching), priority),
        embedding=ServedEmbedding(EMBED, tokens_max=512, dimensions=16),
        behaviour=Behaviour(**behaviour),
    )
    try:
        yield server
    finally:
        await server.close()


def llm_spec(port: int, **more: Any) -> EngineSpec:
    return EngineSpec(f"http://127.0.0.1:{port}", **({"model": LLM, "name": f"llm-{port}"} | more))


def embed_spec(port: int, **more: Any) -> EngineSpec:
    given: dict[str, Any] = {
        "model": EMBED,
        "name": f"embed-{port}",
        "kind": PoolKind.EMBEDDING,
        "tasks_max": 8,
        "batch_tokens_max": 8192,
    }
    return EngineSpec(f"http://127.0.0.1:{port}", **(given | more))


# --- the gateway ------------------------------------------------------------------------------------------------------


@dataclass
class Serving:
    """A gateway that listens, and what its plane was told and said."""

    gateway: Gateway
    service: InferenceService
    events: list[tuple[int, e.AnyEvent]] = field(default_factory=list)
    commands: list[tuple[int, AnyCommand]] = field(default_factory=list)
    log: list[Step] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.gateway.port

    def heard(self, kind: type[e.Event]) -> list[Any]:
        """Events of a kind, in order."""
        return [event for _, event in self.events if type(event) is kind]

    def said(self, kind: type) -> list[Any]:
        """Commands of a kind, in order."""
        return [command for _, command in self.commands if type(command) is kind]

    async def healthy(self, count: int) -> None:
        await until(lambda: sum(w.state is State.HEALTHY for w in self.service.watches.values()) >= count)


def plane_of(
    policy: str | Callable[[], Policy],
    mechanism: str = "native",
    attempts_max: int = 3,
    pipelines: Sequence[Declared] = (),
) -> Plane:
    """With every preset to switch to; ``policy`` may be one of the test's own making."""
    policies: dict[str, Callable[[], Policy]] = {name: lambda name=name: preset(name) for name in PRESETS}  # type: ignore[misc]
    if callable(policy):
        name = policy().name
        policies[name] = policy
    else:
        name = policy
    known = single_request_pipelines() | {each.pipeline.name: each.pipeline for each in pipelines}
    return make_plane(mechanism, known, policies, name, attempts_max=attempts_max)


@asynccontextmanager
async def serving(
    specs: Sequence[EngineSpec],
    *,
    policy: str | Callable[[], Policy] = "fifo",
    attempts_max: int = 3,
    service: ServiceConfig | None = None,
    health: HealthConfig | None = None,
    limits: Limits | None = None,
    slo: Any = None,
    grace_s: float = 5.0,
    healthy: int | None = None,
    pipelines: Sequence[Declared] = (),
    indexes: Mapping[str, VectorIndex] | None = None,
    **more: Any,
) -> AsyncIterator[Serving]:
    """Composed as ``sage gateway start`` does, and ready: every engine is healthy (or ``healthy`` of them)."""
    box: list[Serving] = []

    def record(
        now: int, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None:
        made = box[0]
        made.events += [(now, event) for event in events]
        made.commands += [(now, command) for command in commands]
        made.log.append(Step(now, encoded, digest))

    inference = InferenceService(
        plane_of(policy, attempts_max=attempts_max, pipelines=pipelines),
        service,
        slo=slo,
        health=health or HealthConfig(interval_s=0.05, scrape_s=0.05),
        record=record,
    )
    gateway = Gateway(
        inference, GatewayConfig(grace_s=grace_s, http=limits or Limits()), policies=sorted(PRESETS), **more
    )
    box.append(Serving(gateway, inference))
    try:
        for spec in specs:
            inference.add_engine(spec)
        for each in pipelines:
            inference.add_pipeline(LivePipeline(each, indexes or {}))
        await gateway.start()
        await box[0].healthy(len(specs) if healthy is None else healthy)
        yield box[0]
    finally:
        await gateway.close()
        assert inference.driver.broken is None, inference.driver.broken
        inference.driver.plane.check()


@asynccontextmanager
async def gateway(**more: Any) -> AsyncIterator[tuple[Serving, EmulatedServer]]:
    """A gateway before one emulated device. Keys of :func:`emulated` go there, the others to :func:`serving`."""
    theirs = {"iteration_s", "batch_s", "batch_tasks", "priority", "slow", "hang_after", "fail_rate", "interval"}
    own = {key: value for key, value in more.items() if key in theirs}
    specs = more.pop("specs", None)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(emulated(**own))
        wanted = [llm_spec(engine.port), embed_spec(engine.port)] if specs is None else specs(engine.port)
        rest = {key: value for key, value in more.items() if key not in theirs}
        yield await stack.enter_async_context(serving(wanted, **rest)), engine


# --- the client -------------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """An answer. ``whole``: whether it ended as its framing says, and not because the connection was cut."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream: each event's data, decoded but for ``[DONE]``."""
        pieces = self.body.decode().split("\n\n")
        assert pieces.pop() == ""
        data = [piece.removeprefix("data: ") for piece in pieces]
        return [each if each == "[DONE]" else json.loads(each) for each in data]


def request_bytes(method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: test"]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")


def encoded(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()


_clients: list[Client] = []


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.body = b""
        self._chunked = False

    @classmethod
    async def open(cls, port: int) -> Client:
        """Closed at the end of :func:`run`, if not before."""
        client = cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**20))
        _clients.append(client)
        return client

    def send(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> None:
        given = encoded(body)
        self.writer.write(request_bytes(method or ("GET" if body is None else "POST"), path, given, headers))

    async def head(self) -> tuple[int, dict[str, str]]:
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._chunked = headers.get("transfer-encoding") == "chunked"
        return int(first.split(" ")[1]), headers

    async def chunk(self) -> bytes:
        """The next piece of a stream; b"" at its end. IncompleteReadError when it is cut."""
        line = await self.reader.readuntil(b"\r\n")
        data = await self.reader.readexactly(int(line, 16))
        await self.reader.readexactly(2)
        return data

    async def reply(self, *, bodiless: bool = False) -> Reply:
        status, headers = await self.head()
        if bodiless or status in (204, 304):
            return Reply(status, headers, b"")
        if not self._chunked:
            return Reply(status, headers, await self.reader.readexactly(int(headers["content-length"])))
        body = b""
        try:
            while data := await self.chunk():
                body += data
        except (asyncio.IncompleteReadError, ConnectionError):
            return Reply(status, headers, body, False)
        return Reply(status, headers, body)

    def close(self) -> None:
        self.writer.transport.abort()


async def ask(port: int, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> Reply:
    """One request on a connection of its own."""
    client = await Client.open(port)
    try:
        client.send(path, body, headers, method)
        return await client.reply(bodiless=method == "HEAD")
    finally:
        client.close()


def chat(content: str = "Hello there", **more: Any) -> dict[str, Any]:
    """A body; ``min_tokens`` fixes the length."""
    return {"model": LLM, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "min_tokens": 8} | more


def embedding(given: Any = "Hello there", **more: Any) -> dict[str, Any]:
    return {"model": EMBED, "input": given} | more


def is_openai_error(body: bytes) -> bool:
    """Whether an OpenAI client could read it."""
    error = json.loads(body)["error"]
    return isinstance(error["message"], str) and isinstance(error["type"], str) and {"param", "code"} <= set(error)


# --- engines that do as they are told ---------------------------------------------------------------------------------


class Scripted:
    """An engine in a test's hands: healthy, and every other request goes to ``handler``."""

    def __init__(self, handler: Callable[[Request], None]) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.gone = 0
        """Requests whose client went away before the answer."""
        self.port = 0

    def handle(self, request: Request) -> None:
        if request.path in ("/health", "/metrics"):
            request.respond(200, b"")
            return
        self.requests.append(request)
        request.on_disconnect = self._left
        self.handler(request)

    def _left(self) -> None:
        self.gone += 1

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(request.body) for request in self.requests]


@asynccontextmanager
async def scripted(handler: Callable[[Request], None]) -> AsyncIterator[Scripted]:
    engine = Scripted(handler)
    server = await HttpServer.start(engine.handle, "127.0.0.1", 0)
    engine.port = server.port
    try:
        yield engine
    finally:
        await server.close()


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
) -> AsyncIterator[int]:
    """A socket of a test's own, and its port; nothing of it is left at the end."""
    tasks: set[asyncio.Task[None]] = set()

    async def serving_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serving_one, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.sleep(0)


@asynccontextmanager
async def raw_engine(answer: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A socket that answers every POST with these bytes, HTTP or not, and then hangs up. Port and requests."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length or 0))
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                continue
            seen.append(body)
            writer.write(answer)
            writer.close()
            await writer.wait_closed()
            return

    async with listening(serve) as port:
        yield port, seen


def sse(*events: Any) -> bytes:
    """Server-sent events, a chunk of a stream."""
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def token(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]} | more


USAGE = {"id": "x", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}
ANSWER = json.dumps(
    {"id": "x", "choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
).encode()
