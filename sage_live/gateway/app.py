"""The gateway: OpenAI's endpoints over HTTP, the control plane behind them.

A request on the data path is parsed, checked, handed to the service, and answered from the engine's own bytes, all in
callbacks of one event loop. Everything else (management, documents) is a coroutine: see ``management.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from sage_core.commands import Fail, Reject, Respond
from sage_core.units import PoolKind, RequestKind
from sage_live import errors
from sage_live.call import Call
from sage_live.driver import Outcome
from sage_live.errors import ApiError
from sage_live.gateway import openapi
from sage_live.gateway.bodies import decode_chat, decode_completion, decode_embedding
from sage_live.gateway.headers import wishes
from sage_live.gateway.keyfile import Key
from sage_live.gateway.keys import ApiKeys
from sage_live.gateway.logs import AccessLog
from sage_live.gateway.management import Management
from sage_live.gateway.metrics import CONTENT_TYPE, OPERATIONS, EngineState, Metrics, Sources
from sage_live.gateway.process import LoopLag
from sage_live.gateway.rate import RateLimits
from sage_live.gateway.record import RequestRecord
from sage_live.gateway.tracing import Tracer
from sage_live.health import State
from sage_live.http.server import HttpServer, Limits, Request
from sage_live.service import InferenceService

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Endpoint: TypeAlias = Callable[[Request], None]

JSON: Final = b"application/json"

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

_encode = msgspec.json.Encoder().encode

OUTCOMES: Final = {Respond: "responded", Reject: "rejected", Fail: "failed"}
"""As in results; anything else is ``cancelled``."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """host, port: where to listen; 0 takes any port. grace_s: how long live requests may take to end at shutdown."""

    host: str = "127.0.0.1"
    port: int = 0
    grace_s: float = 30.0
    version: str = "0"
    http: Limits = field(default_factory=Limits)


class HttpAnswer:
    """Where the answer to an HTTP client goes."""

    __slots__ = ("_call", "_request", "_service", "headers", "piece", "request_id", "span")

    piece: Callable[[bytes], None]

    def __init__(self, request: Request, service: InferenceService) -> None:
        self._request = request
        self._service = service
        self._call: Call | None = None
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.request_id = b""
        self.span: Span | None = None

    def belongs_to(self, call: Call, request_id: bytes | None) -> None:
        """The call was taken: what the client should know of it, and what the service should know of the client."""
        self._call = call
        number = b"%d" % call.request
        self.request_id = number if request_id is None else request_id
        self.headers = ((b"x-request-id", self.request_id), (b"x-sage-request", number))
        self._request.on_disconnect = self._gone
        if call.stream:
            self._request.on_writable = self._writable

    def complete(self, status: int, body: bytes, content_type: bytes) -> None:
        self._call = None  # which holds this: no cycle is left to the collector
        self._request.respond(status, body, content_type, self.headers)

    def begin(self, content_type: bytes) -> None:
        self._request.start(200, content_type, (*self.headers, (b"cache-control", b"no-cache")))
        self.piece = self._request.write  # once a token: without a frame of ours
        if self._call is not None:
            self._call.relay = self._request.relay

    def finish(self, data: bytes) -> None:
        self._call = None
        self._request.end(data)

    def fail(self, error: ApiError) -> None:
        request = self._request
        if not request.started:
            request.respond(error.status, error.body(), headers=(*self.headers, *error.headers()))
        elif not request.answered:
            request.write(error.event())
            request.abort()  # without the last chunk: no client may take this for the whole answer

    def _gone(self) -> None:
        if self._call is not None:
            self._service.cancel(self._call.request)

    def _writable(self, yes: bool) -> None:
        flow = None if self._call is None else self._call.flow
        if flow is not None:
            flow.resume() if yes else flow.pause()


class Gateway:
    """Serves one :class:`sage_live.service.InferenceService`. Build inside a running event loop.

    keys: who may ask; None: anybody on this address. log, tracer: None where nobody wants them. policies: names that
    may be switched to. settings: what ``/v1/management/config`` shows.
    """

    def __init__(
        self,
        service: InferenceService,
        config: GatewayConfig,
        *,
        keys: ApiKeys | None = None,
        rates: RateLimits | None = None,
        log: AccessLog | None = None,
        tracer: Tracer | None = None,
        policies: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.service = service
        self.config = config
        self.policies = tuple(policies)
        self.settings = dict(settings or {})
        self.metrics = Metrics(config.version, _sources(service, log))
        self._keys = keys
        self._rates = rates
        self._log = log
        self._tracer = tracer
        self._server: HttpServer | None = None
        self._lag = LoopLag(asyncio.get_running_loop(), self.metrics.loop_lag.observe)
        self._running: set[asyncio.Task[None]] = set()
        self._started = int(time.time())
        self._document = _encode(openapi.document(config.version))
        self._management = Management(self)
        self._posts: dict[str, Endpoint] = {
            CHAT: self._chat,
            COMPLETIONS: self._complete,
            EMBEDDINGS: self._embed,
        }
        self._gets: dict[str, Endpoint] = {
            "/v1/models": self._models,
            "/health": self._health,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }
        service.observe = self._ended

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> int:
        """Listen; the port."""
        config = self.config
        self._server = await HttpServer.start(
            self.handle, config.host, config.port, limits=config.http, error_body=_error_body
        )
        return self._server.port

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return self._server.port

    async def close(self) -> None:
        """Take no more, let live requests end within the grace, then stop."""
        await self.service.drain(self.config.grace_s)
        await self.service.close()  # what is left is told so
        if self._server is not None:
            await self._server.close(1.0)
        self._lag.stop()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._log is not None:
            self._log.close()
        if self._tracer is not None:
            self._tracer.close()

    # --- dispatch -------------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> None:
        """One HTTP request."""
        try:
            endpoint = self._posts.get(request.path) if request.method == "POST" else None
            if endpoint is not None:
                endpoint(request)
            else:
                self._elsewhere(request)
        except ApiError as error:
            self.refuse(request, error)

    def refuse(self, request: Request, error: ApiError) -> None:
        """An answer that the gateway gives by itself."""
        self.metrics.refused(error.status, error.code)
        headers = error.headers()
        if (request_id := request.headers.get(b"x-request-id")) is not None:
            headers.append((b"x-request-id", request_id))
        request.respond(error.status, error.body(), headers=headers)

    def _elsewhere(self, request: Request) -> None:
        path = request.path
        if path in self._posts:
            raise errors.method_not_allowed(request.method, ["POST"])
        if path.startswith("/v1/models/"):
            endpoint: Endpoint | None = self._model
        else:
            endpoint = self._gets.get(path)
        if endpoint is not None:
            if request.method not in ("GET", "HEAD"):
                raise errors.method_not_allowed(request.method, ["GET"])
            endpoint(request)
            return
        if not path.startswith("/v1/management/"):
            raise errors.not_found(path)
        key = self.authorized(request)
        if key is not None and not key.manage:
            raise errors.forbidden("This key may not manage the gateway; `sage gateway key add --manage` makes one.")
        task = asyncio.get_running_loop().create_task(self._management.handle(request))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def authorized(self, request: Request) -> Key | None:
        """Whose request it is; None where there are no keys. ApiError for anybody else."""
        if self._keys is None:
            return None
        key = self._keys.check(request.headers.get(b"authorization"))
        if key is None:
            raise errors.unauthorized()
        return key

    # --- inference ------------------------------------------------------------------------------------------------

    def _chat(self, request: Request) -> None:
        key = self.authorized(request)
        body = decode_chat(_json(request))
        call = Call(
            HttpAnswer(request, self.service),
            RequestKind.LLM_CHAT,
            body.model,
            CHAT,
            request.body,
            stream=bool(body.stream),
            usage_asked=body.stream_options is not None and body.stream_options.include_usage is True,
        )
        self._submit(request, key, call, body.max_completion_tokens or body.max_tokens, body.n or 1)

    def _complete(self, request: Request) -> None:
        key = self.authorized(request)
        body = decode_completion(_json(request))
        call = Call(
            HttpAnswer(request, self.service),
            RequestKind.LLM_GENERATE,
            body.model,
            COMPLETIONS,
            request.body,
            stream=bool(body.stream),
            usage_asked=body.stream_options is not None and body.stream_options.include_usage is True,
        )
        prompts = len(body.prompt) if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else 1
        self._submit(request, key, call, body.max_tokens, prompts * (body.n or 1))

    def _embed(self, request: Request) -> None:
        key = self.authorized(request)
        body = decode_embedding(_json(request))
        call = Call(
            HttpAnswer(request, self.service),
            RequestKind.EMBEDDING,
            body.model,
            EMBEDDINGS,
            request.body,
        )
        self._submit(request, key, call, 0, 1)

    def _submit(self, request: Request, key: Key | None, call: Call, cap: int | None, answers: int) -> None:
        """cap: of one answer, None where the client states none, 0 where nothing is generated; answers: that it wants."""
        headers = request.headers
        wish = wishes(headers)
        call.tenant = key.tenant if key is not None else wish.tenant
        service = self.service
        served = service.check(call)
        trusted = service.config.trust_schedule
        cap = (service.config.output_tokens_max if cap is None else cap) * answers
        tokens = wish.input_tokens
        if trusted:
            cap = wish.output_tokens_max or cap
        elif tokens is not None:  # what a client says is believed within reason: it is charged and planned by it
            tokens = max(tokens, served.estimate(len(call.body)) // 4)
        if self._rates is not None:
            asked = (served.estimate(len(call.body)) if tokens is None else tokens) + cap
            wait_ns = self._rates.take(call.tenant, service.driver.now, asked)
            if wait_ns:
                raise errors.rate_limited(wait_ns / 1e9)
        scheduled_at = number = None
        request_id = headers.get(b"x-request-id") or None
        if trusted:
            if wish.scheduled_ns:
                scheduled_at = wish.scheduled_ns - service.driver.origin_ns
            if request_id is not None and len(request_id) < 20 and request_id.isdigit():
                number = int(request_id)
        call.exact = wish.input_tokens
        priority = wish.priority if key is None else max(wish.priority, key.priority_min)
        service.submit(
            call,
            priority=priority,
            output_tokens_max=cap,
            input_tokens=tokens,
            ttft_s=wish.ttft_s,
            e2e_s=wish.e2e_s,
            scheduled_at=scheduled_at,
            number=number,
        )
        self.metrics.arrived(call.model, call.kind)
        answer = call.answer
        assert isinstance(answer, HttpAnswer)
        answer.belongs_to(call, request_id)
        if self._tracer is not None:
            answer.span = self._tracer.begin(OPERATIONS[call.kind], call.model, call.arrived_ns, headers)
            call.traceparent = self._tracer.traceparent(answer.span)

    def _ended(self, call: Call, outcome: Outcome, status: int, now: int) -> None:
        arrived = call.arrived_ns
        queued = (now if call.dispatched_ns < 0 else call.dispatched_ns) - arrived
        if call.idle:
            self.metrics.idle_dispatch.observe(queued)
        self.metrics.ended(
            call.model,
            call.kind,
            OUTCOMES.get(type(outcome), "cancelled"),
            status,
            queued,
            None if call.first_token_ns < 0 else call.first_token_ns - arrived,
            now - arrived,
            call.prompt_tokens or call.input_tokens,
            call.output_tokens,
        )
        if self._log is not None or self._tracer is not None:
            self._tell(call, outcome, status, now)

    def _tell(self, call: Call, outcome: Outcome, status: int, now: int) -> None:
        """Log and trace: what costs something only where somebody wants it."""
        answer = call.answer
        assert isinstance(answer, HttpAnswer)
        record = RequestRecord(
            answer.request_id.decode("latin-1"),
            OPERATIONS[call.kind],
            call.model,
            call.tenant,
            OUTCOMES.get(type(outcome), "cancelled"),
            status,
            call.arrived_ns,
            now,
            None if call.dispatched_ns < 0 else call.dispatched_ns,
            None if call.first_token_ns < 0 else call.first_token_ns,
            call.request,
            call.engine or None,
            call.stream,
            call.prompt_tokens or call.input_tokens,
            call.output_tokens,
            len(call.body),
            len(call.reply),
        )
        if self._log is not None:
            self._log.write(record)
        if self._tracer is not None and answer.span is not None:
            self._tracer.ended(answer.span, record)

    # --- documents ------------------------------------------------------------------------------------------------

    def _models(self, request: Request) -> None:
        self.authorized(request)
        data = [self._model_card(name) for name in self.service.models]
        request.respond(200, _encode({"object": "list", "data": data}))

    def _model(self, request: Request) -> None:
        self.authorized(request)
        name = request.path.removeprefix("/v1/models/")
        if name not in self.service.models:
            raise errors.model_not_found(name, sorted(self.service.models))
        request.respond(200, _encode(self._model_card(name)))

    def _model_card(self, name: str) -> dict[str, object]:
        kind = "embedding" if self.service.models[name].kind is PoolKind.EMBEDDING else "llm"
        return {"id": name, "object": "model", "created": self._started, "owned_by": "sage", "kind": kind}

    def _health(self, request: Request) -> None:
        service = self.service
        if service.driver.broken is not None:
            raise errors.internal()
        if service.draining:
            raise errors.overloaded(5.0, "The gateway is shutting down.")
        healthy = sum(watch.state is State.HEALTHY for watch in service.watches.values())
        told = {"status": "ok" if healthy else "no engine", "engines": len(service.watches), "healthy": healthy}
        request.respond(200 if healthy else 503, _encode(told))

    def _metrics(self, request: Request) -> None:
        request.respond(200, self.metrics.render(), CONTENT_TYPE)

    def _openapi(self, request: Request) -> None:
        request.respond(200, self._document)


def _json(request: Request) -> bytes:
    """The body, if it says that it is JSON."""
    content_type = request.headers.get(b"content-type", JSON)
    if content_type != JSON and content_type.partition(b";")[0].strip().lower() != JSON:
        raise errors.unsupported_media(content_type.decode("latin-1"))
    return request.body


def _error_body(status: int, message: str) -> bytes:
    return ApiError(status if status in errors.TYPES else 400, message).body()


def _sources(service: InferenceService, log: AccessLog | None) -> Sources:
    driver = service.driver

    def engines() -> list[EngineState]:
        return [
            EngineState(
                name,
                watch.engine.spec.pool or watch.engine.spec.model,
                watch.state is State.HEALTHY,
                len(watch.engine.flights),
                watch.reported.get("running"),
                watch.reported.get("waiting"),
            )
            for name, watch in service.watches.items()
        ]

    return Sources(
        policy=lambda: service.policy,
        live_requests=lambda: driver.live,
        queue_depth=driver.plane.queue_depths,
        engines=engines,
        steps=lambda: driver.steps,
        control_ns=lambda: driver.control_ns,
        log_dropped=lambda: 0 if log is None else log.dropped,
    )
