"""A real engine as a backend of the driver: commands become HTTP requests, answers become events.

Several embedding tasks that the plane dispatched together become one request upstream, whose answer is split again; an
LLM task is a request of its own, because the engine batches those itself, iteration by iteration.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sage_core import events as e
from sage_core.commands import Cancel, Dispatch, Task
from sage_core.errors import ConfigError
from sage_core.units import Nanos, PoolKind, request_of
from sage_live import errors
from sage_live.adapters import Adapter, adapter
from sage_live.batch import Parts, put_together, split_answer, take_apart
from sage_live.call import Call
from sage_live.driver import Post
from sage_live.http.client import Exchange, Pool, UpstreamError
from sage_live.http.wire import Headers
from sage_live.pace import Pace
from sage_live.wire import COUNT_MAX, done_usage, number_after, with_field, without_usage

if TYPE_CHECKING:
    from sage_core._native import StreamRelay

JSON: Final[tuple[tuple[bytes, bytes], ...]] = ((b"content-type", b"application/json"),)

IDLE_S: Final = 4.0
"""vLLM closes a connection that was idle for 5 s."""

READ_GAP_S: Final = 0.005
"""Least time between two looks at which prompts should have been read."""

NOT_THE_CLIENT: Final = frozenset({401, 403, 407, 408, 424, 425, 429})
"""Of the 4xx, those that blame the gateway's own key, the moment or (424: TEI) the engine's own backend, not the request."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine in service.

    url: where it listens. model: what clients call what it serves; upstream_model: what the engine calls it ("" the
    same). pool: the plane's name for the engines of this model ("": the model's). name: "" takes host:port.
    tasks_max: requests that it may hold at once; an embedding engine gets at most so many tasks in one request.
    priority_scheduling: the engine was started with it, so ``priority`` is passed on. api_key: sent to the engine.
    The ``*_ns`` are what work on it is expected to cost (sage_core.events.ReplicaJoined); zero: unknown, to be learned.
    """

    url: str
    model: str
    kind: PoolKind = PoolKind.LLM
    adapter: str = "vllm"
    name: str = ""
    pool: str = ""
    upstream_model: str = ""
    node: str = "local"
    device: int = -1
    tasks_max: int = 256
    batch_tokens_max: int = 8192
    kv_tokens_max: int = 0
    priority_scheduling: bool = False
    api_key: str | None = None
    fixed_ns: float = 0.0
    input_token_ns: float = 0.0
    output_token_ns: float = 0.0
    output_seq_ns: float = 0.0

    @property
    def called(self) -> str:
        """Its name, in management and metrics."""
        return self.name or self.url.partition("://")[2].partition("/")[0]

    def __post_init__(self) -> None:
        adapter(self.adapter)
        if not self.model:
            raise ConfigError(f"engine {self.url}: model: expected the name that clients ask for, got ''")
        for key, low, high in (
            ("tasks_max", 1, 65536),
            ("batch_tokens_max", 1, COUNT_MAX),
            ("kv_tokens_max", 0, 1 << 40),
        ):
            if not low <= getattr(self, key) <= high:
                raise ConfigError(f"engine {self.url}: {key}: expected {low} to {high}, got {getattr(self, key)}")
        for key in ("fixed_ns", "input_token_ns", "output_token_ns", "output_seq_ns"):
            if not 0 <= getattr(self, key) <= 1e15:
                raise ConfigError(f"engine {self.url}: {key}: expected nanoseconds from 0, got {getattr(self, key)}")


def blames_request(status: int) -> bool:
    """Whether this answer would be the same from any other engine."""
    return 400 <= status < 500 and status not in NOT_THE_CLIENT


def _headers(call: Call) -> tuple[tuple[bytes, bytes], ...]:
    headers = JSON
    if call.exact is not None:  # an emulated engine has no tokenizer: it takes the client's word
        headers = (*headers, (b"x-sage-input-tokens", b"%d" % call.exact))
    if call.traceparent is not None:
        headers = (*headers, (b"traceparent", call.traceparent))
    return headers


class HttpEngine:
    """A :class:`sage_live.driver.Backend` with one replica, which comes and goes with the engine's health.

    calls: by request id; what a task's request says. Build inside the event loop.
    """

    def __init__(self, spec: EngineSpec, calls: Mapping[int, Call], device: int) -> None:
        headers = () if spec.api_key is None else ((b"authorization", f"Bearer {spec.api_key}".encode()),)
        self.spec = spec
        self.adapter: Adapter = adapter(spec.adapter)
        self.pool = Pool(spec.url, headers=headers, idle_s=IDLE_S)
        self.name = spec.called
        self.device = spec.device if spec.device >= 0 else device
        self.replica = -1
        """Of the plane; -1 while the engine is out of service."""
        self.on_trouble: Callable[[UpstreamError | str], None] | None = None
        """Told when an exchange failed in a way that says something about the engine's health."""
        self.on_idle: Callable[[], None] | None = None
        """Told when the last exchange is over."""
        self.flights: dict[int, _Flight] = {}
        self.served = 0
        self.heard_ns = 0
        """When it last said anything about work; of streams that are relayed, by the last :meth:`hear`."""
        self.idle_ns = 0
        """Since when it has nothing to do, where that is so."""
        self.pace = Pace()
        self._calls = calls
        self._unread: dict[int, int] = {}
        """Of tasks whose answer comes as a whole, in order: when their prompt should have been read."""
        self._read_timer: asyncio.TimerHandle | None = None

    # --- a backend ------------------------------------------------------------------------------------------------

    def joined(self) -> list[e.ReplicaJoined]:
        """None: the replica joins when the engine is found healthy."""
        return []

    def start(self, post: Post, now: Callable[[], Nanos]) -> None:
        """From now on commands come, and events go to ``post``."""
        self.post, self.now = post, now

    def carry_out(self, command: Dispatch | Cancel) -> None:
        """Send the tasks; cut what is no longer wanted."""
        if isinstance(command, Dispatch):
            if self.spec.kind is PoolKind.EMBEDDING:
                self._send_embeddings(command)
            else:
                for task in command.tasks:
                    call = self._call_of(task)
                    if call is None:
                        continue
                    try:
                        self._send(task, call)
                    except Exception as error:
                        self.unsendable(task.task, call, error)
        else:
            flight = self.flights.pop(command.task, None)
            self._forget_unread(command.task)
            if flight is not None:
                self._hear(flight)
                flight.forget(command.task)
                self._check_idle()

    async def close(self) -> None:
        """Cut everything."""
        self.drop()
        await self.pool.close()

    # --- for whoever watches its health ---------------------------------------------------------------------------

    def as_joined(self, replica: int, kv_tokens: int | None = None) -> e.ReplicaJoined:
        """What the engine says when it becomes healthy."""
        spec = self.spec
        self.replica = replica
        self.idle_ns = self.now()
        return e.ReplicaJoined(
            replica,
            spec.pool or spec.model,
            int(spec.kind),
            self.device,
            spec.node,
            spec.tasks_max,
            spec.batch_tokens_max,
            kv_tokens or spec.kv_tokens_max,
            spec.fixed_ns,
            spec.input_token_ns,
            spec.output_token_ns,
            spec.output_seq_ns,
        )

    def hear(self) -> None:
        """What streams say that are relayed is not seen here as it comes: look when the last of it was."""
        for flight in self.flights.values():
            self._hear(flight)

    def _hear(self, flight: _Flight) -> None:
        if flight.relay is not None and flight.relay.heard_ns >= 0:
            heard = Nanos(flight.relay.heard_ns + self.now() - time.monotonic_ns())
            self.heard_ns = max(self.heard_ns, heard)

    def drop(self) -> None:
        """Cut every exchange and say nothing of it: the replica has left."""
        self.replica = -1
        for task, flight in self.flights.items():
            flight.cut()
            call = flight.call_of(task)
            if call.error is None:
                call.error = errors.upstream_failed(
                    "The engine stopped answering, and the request could not be retried."
                )
        self.flights.clear()
        self._unread.clear()
        self._stop_waiting()

    # --- exchanges ------------------------------------------------------------------------------------------------

    def _send(self, task: Task, call: Call) -> None:
        body = call.body
        if self.spec.upstream_model:
            body = with_field(body, b"model", self.spec.upstream_model)
        if call.stream and not call.usage_asked and self.adapter.usage:
            body = with_field(body, b"stream_options", {"include_usage": True})
        # What the client wrote itself counts for nothing: whose turn it is has been decided here.
        if self.spec.priority_scheduling and self.adapter.priority and (task.priority or b'"priority"' in body):
            body = with_field(body, b"priority", task.priority * self.adapter.priority)
        flight = (_Stream if call.stream else _Whole)(self, task.task, call)
        self._fly(flight, task.task, call)
        if not call.stream:
            self._expect_read(task)
        flight.exchange = self.pool.send("POST", call.path, _headers(call), body, flight)

    def _call_of(self, task: Task) -> Call | None:
        """What is to be sent: the client's request, or a stage of it. None: it cannot be made, and the plane was told."""
        call = self._calls[request_of(task.task)]
        if call.run is None:
            return call
        if call.dispatched_ns < 0:
            call.dispatched_ns = self.now()
        try:
            return call.run.stage_call(task)
        except Exception as error:
            reason = errors.reason_of(error)
            call.error = errors.upstream_failed(f"A stage of the pipeline cannot be sent: {reason}.")
            self.post(e.TaskFailed(task.task, reason, False))
            return None

    def _send_embeddings(self, command: Dispatch) -> None:
        """Tasks that can share a request do."""
        calls = {each.task: call for each in command.tasks if (call := self._call_of(each)) is not None}
        if len(calls) == 1:
            self._send_whole(*next(iter(calls.items())))
            return
        shared: dict[bytes, list[tuple[int, Parts]]] = {}
        for task, call in calls.items():
            try:
                parts = take_apart(call.body)
            except Exception as error:
                self.unsendable(task, call, error)
                continue
            shared.setdefault(parts.key, []).append((task, parts))
        for members in shared.values():
            if len(members) == 1:
                self._send_whole(members[0][0], calls[members[0][0]])
                continue
            flight = _Batch(self, {task: (calls[task], parts) for task, parts in members})
            for task, _ in members:
                self._fly(flight, task, calls[task])
            headers: Headers = JSON
            if all(calls[task].exact is not None for task, _ in members):
                exact = sum(calls[task].exact or 0 for task, _ in members)
                headers = (*JSON, (b"x-sage-input-tokens", b"%d" % exact))
            self._post_embedding(flight, put_together([parts for _, parts in members]), headers)

    def _send_whole(self, task: int, call: Call) -> None:
        flight = _Whole(self, task, call)
        self._fly(flight, task, call)
        try:
            self._post_embedding(flight, call.body, _headers(call))
        except Exception as error:
            self.unsendable(task, call, error)

    def send_alone(self, task: int, call: Call) -> None:
        """An embedding task whose batch the engine refused."""
        flight = _Whole(self, task, call)
        flight.since = self.now()
        self.flights[task] = flight
        self._post_embedding(flight, call.body, _headers(call))

    def _post_embedding(self, flight: _Whole | _Batch, body: bytes, headers: Headers) -> None:
        if self.spec.upstream_model:
            body = with_field(body, b"model", self.spec.upstream_model)
        flight.exchange = self.pool.send("POST", self.adapter.embeddings, headers, body, flight)

    def _fly(self, flight: _Flight, task: int, call: Call) -> None:
        call.idle = not self.flights and self.idle_ns <= call.arrived_ns and call.dispatched_ns < 0
        call.dispatched_ns = flight.since = self.now()
        call.engine = self.name
        call.error = None
        call.tail = b""
        self.flights[task] = flight

    def _expect_read(self, task: Task) -> None:
        """Its first token will not be seen, and until then a policy takes its prompt for one that the engine has still to
        read. So the plane is told when that should be over by what the engine says of itself: prompts are read one after another."""
        now = self.now()
        begins = max(now, next(reversed(self._unread.values()), now))
        self._unread[task.task] = begins + round(self.spec.fixed_ns + self.spec.input_token_ns * task.input_tokens)
        if self._read_timer is None:
            self._wait_for_reading(now)

    def _wait_for_reading(self, now: Nanos) -> None:
        after_s = (next(iter(self._unread.values())) - now) / 1e9
        self._read_timer = asyncio.get_running_loop().call_later(max(after_s, READ_GAP_S), self._on_read)

    def _on_read(self) -> None:
        self._read_timer = None
        now = self.now()
        for task in [task for task, at in self._unread.items() if at <= now]:
            self._forget_unread(task)
            self.post(e.TokensProduced(task, 0))
        if self._unread:
            self._wait_for_reading(now)

    def _forget_unread(self, task: int) -> None:
        """Of those behind it the times stay: it may have been read in part."""
        self._unread.pop(task, None)
        if not self._unread:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def landed(self, task: int) -> None:
        """An exchange of this task is over."""
        self.flights.pop(task, None)
        self._forget_unread(task)
        self.served += 1
        self.heard_ns = self.now()
        self._check_idle()

    def _check_idle(self) -> None:
        if not self.flights:
            self.idle_ns = self.now()
            if self.on_idle is not None:
                self.on_idle()

    def failed(self, task: int, call: Call, status: int, body: bytes, content_type: bytes) -> None:
        """The engine said no."""
        if blames_request(status):
            call.verdict = (status, body)
            call.reply_type = content_type
        elif status in (429, 503):
            call.error = errors.overloaded(1.0, f"The engine has too much to do (it answered {status}).")
        else:
            call.error = errors.upstream_failed(f"The engine answered {status}, and the request could not be retried.")
        if status >= 500 and self.on_trouble is not None:
            self.on_trouble(f"answered {status}")
        self.post(e.TaskFailed(task, f"the engine answered {status}", not blames_request(status)))

    def unreadable(self, task: int, call: Call, why: str) -> None:
        """The engine said yes, and then nothing that can be passed on."""
        call.error = errors.upstream_failed(f"The engine's answer cannot be read: {why}.")
        self.post(e.TaskFailed(task, f"an answer that cannot be read: {why}", True))

    def unsendable(self, task: int, call: Call, error: Exception) -> None:
        """A body that nobody checked, or that cannot be taken apart: the end of its request, not of the control plane."""
        refusal = errors.bad_request(f"The body cannot be passed on to an engine: {error}", code="invalid_json")
        call.verdict = (refusal.status, refusal.body())
        self.flights.pop(task, None)
        self._forget_unread(task)
        self.post(e.TaskFailed(task, "a body that cannot be passed on", False))

    def broke(self, task: int, call: Call, error: UpstreamError) -> None:
        """The connection did."""
        call.error = (
            errors.upstream_failed("The engine failed in the middle of its answer.")
            if call.begun
            else errors.upstream_failed()
        )
        self.post(e.TaskFailed(task, f"connection: {error.reason.value}", True))


class _Flight(ABC):
    """An exchange with the engine; the sink of its answer."""

    __slots__ = ("content_type", "engine", "exchange", "paused", "pieces", "relay", "since", "status")

    def __init__(self, engine: HttpEngine) -> None:
        self.engine = engine
        self.exchange: Exchange | None = None
        self.status = 0
        self.content_type = b"application/json"
        self.pieces: list[bytes] = []
        self.paused = False
        """Whether the engine waits for us, because our client reads too slowly."""
        self.since = Nanos(0)
        self.relay: StreamRelay | None = None
        """Of a stream: what passes on tokens past this."""

    @property
    def body(self) -> bytes:
        """All that came."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.content_type = headers.get(b"content-type", b"application/json")

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def cut(self) -> None:
        if self.exchange is not None:
            self.exchange.abort()

    @abstractmethod
    def call_of(self, task: int) -> Call:
        """What was sent for it."""

    def forget(self, task: int) -> None:
        """This task's answer is not wanted."""
        self.cut()


class _Whole(_Flight):
    """One task, answered as a whole."""

    __slots__ = ("call", "task")

    def __init__(self, engine: HttpEngine, task: int, call: Call) -> None:
        super().__init__(engine)
        self.task = task
        self.call = call

    def call_of(self, task: int) -> Call:
        return self.call

    def on_end(self) -> None:
        engine, call, body = self.engine, self.call, self.body
        engine.landed(self.task)
        if self.status != 200:
            engine.failed(self.task, call, self.status, body, self.content_type)
        elif not body[:8].lstrip().startswith(b"{"):
            engine.unreadable(self.task, call, "it is not a JSON object")
        else:
            call.reply, call.reply_type = body, self.content_type
            call.prompt_tokens = number_after(body, b'"prompt_tokens":')
            if engine.spec.kind is PoolKind.LLM:
                call.output_tokens = number_after(body, b'"completion_tokens":')
            engine.pace.saw(engine.heard_ns, engine.heard_ns - self.since, call.input_tokens, call.output_tokens)
            engine.post(e.TaskFinished(self.task, call.output_tokens))

    def on_error(self, error: UpstreamError) -> None:
        self.engine.landed(self.task)
        self.engine.broke(self.task, self.call, error)
        if self.engine.on_trouble is not None:
            self.engine.on_trouble(error)


class _Stream(_Whole):
    """One task, answered in pieces that are passed on as they come, whole events only. Its client may make it wait.

    After the first piece a relay may take over those that hold tokens only: they do not come by here.
    """

    __slots__ = ("broken", "events", "final", "rest", "slowed", "streams")

    def __init__(self, engine: HttpEngine, task: int, call: Call) -> None:
        super().__init__(engine, task, call)
        self.streams = False
        self.broken = False  # the engine said so
        self.slowed = False  # by the client
        self.events = 0
        self.final = b""  # what came last
        self.rest = b""

    def pause(self) -> None:
        if self.exchange is not None:
            self.paused = self.slowed = True
            self.exchange.pause()

    def resume(self) -> None:
        if self.exchange is not None:
            self.paused = False
            self.engine.heard_ns = self.engine.now()  # it could not say anything before
            self.exchange.resume()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        super().on_head(status, headers)
        self.streams = status == 200 and self.content_type.startswith(b"text/event-stream")
        if self.streams:
            self.call.reply_type = self.content_type

    def on_body(self, data: bytes) -> None:
        if not self.streams:
            self.pieces.append(data)
            return
        if self.broken:
            return
        call, exchange = self.call, self.exchange
        assert exchange is not None
        self.engine.heard_ns = now = self.engine.now()
        if b"\r" in data:  # some end lines the other way; within JSON it would be escaped
            data = data.replace(b"\r", b"")
        if self.rest:
            data, self.rest = self.rest + data, b""
        if not data.endswith(b"\n\n"):
            cut = data.rfind(b"\n\n") + 2
            if cut == 1:  # not one whole event yet
                self.rest = data
                return
            data, self.rest = data[:cut], data[cut:]
        if b'data: {"error"' in data:  # the engine broke while it answered: a status can no longer say so
            data = data[: data.index(b'data: {"error"')]
            self.broken = True
            exchange.relay = None
            if not data:
                return
        if not self.events:
            call.first_token_ns = now
            self.engine.post(e.TokensProduced(self.task, 1))
        self.events += data.count(b"\n\n")
        self.final = data
        if b"[DONE]" in data:
            exchange.relay = None
        if b'"usage"' in data:
            usage = done_usage(data)
            if usage is not None:
                call.prompt_tokens, call.output_tokens = usage
                if not call.usage_asked:
                    data = without_usage(data)
        if exchange.last:  # it goes with the end, in one system call
            call.tail += data
            return
        first = not call.begun
        if first:
            call.begun = True
            call.flow = self
            call.answer.begin(self.content_type)
        if data:
            call.answer.piece(data)
            if first and call.relay is not None and not self.broken and b"[DONE]" not in data:
                exchange.relay = self.relay = call.relay()

    def on_end(self) -> None:
        engine, call = self.engine, self.call
        if not self.streams:
            if self.status != 200:
                super().on_end()
            else:
                engine.landed(self.task)
                engine.unreadable(self.task, call, "it is not a stream of events")
            return
        if b"[DONE]" in self.rest:  # the last event, not ended by a blank line; anything else was cut off
            rest, self.rest = self.rest, b""
            self.on_body(rest.rstrip() + b"\n\n")
        call.flow = None  # it has dried up
        engine.landed(self.task)
        if self.broken or b"[DONE]" not in self.final[-32:]:
            why = "reported an error in the stream" if self.broken else "ended the stream too early"
            call.error = errors.upstream_failed(f"The engine {why}.")
            engine.post(e.TaskFailed(self.task, f"the engine {why}", True))
            return
        if not call.output_tokens:
            # No usage: an event a token, but the role's and [DONE].
            events = self.events + (0 if self.relay is None else self.relay.events)
            call.output_tokens = max(1, events - 2)
        if not self.slowed:
            engine.pace.saw(engine.heard_ns, engine.heard_ns - self.since, call.input_tokens, call.output_tokens)
        engine.post(e.TaskFinished(self.task, call.output_tokens))


class _Batch(_Flight):
    """Several embedding tasks in one request. ``members``: call and inputs of each that was sent, in order."""

    __slots__ = ("members", "parts")

    def __init__(self, engine: HttpEngine, members: dict[int, tuple[Call, Parts]]) -> None:
        super().__init__(engine)
        self.members = members
        self.parts = [(task, parts) for task, (_, parts) in members.items()]

    def call_of(self, task: int) -> Call:
        return self.members[task][0]

    def forget(self, task: int) -> None:
        """The others still want theirs; if nobody does, the exchange is cut."""
        self.members.pop(task, None)
        if not self.members:
            self.cut()

    def on_end(self) -> None:
        engine, body = self.engine, self.body
        if blames_request(self.status):
            # One client's bad input must not fail the others: each is asked again, alone.
            for task, (call, _) in self.members.items():
                try:
                    engine.send_alone(task, call)
                except Exception as error:
                    engine.unsendable(task, call, error)
            return
        for task in self.members:
            engine.landed(task)
        if self.status != 200:
            for task, (call, _) in self.members.items():
                engine.failed(task, call, self.status, body, self.content_type)
            return
        try:
            answers = split_answer(body, [parts for _, parts in self.parts])
        except ValueError as error:
            for task, (call, _) in self.members.items():
                engine.unreadable(task, call, str(error))
            return
        asked = sum(call.input_tokens for call, _ in self.members.values())
        engine.pace.saw(engine.heard_ns, engine.heard_ns - self.since, asked, 0)
        for (task, _), (reply, tokens) in zip(self.parts, answers, strict=True):
            if task in self.members:
                call, _ = self.members[task]
                call.reply, call.prompt_tokens = reply, tokens
                engine.post(e.TaskFinished(task, 0))

    def on_error(self, error: UpstreamError) -> None:
        for task, (call, _) in self.members.items():
            self.engine.landed(task)
            self.engine.broke(task, call, error)
        if self.engine.on_trouble is not None:
            self.engine.on_trouble(error)
