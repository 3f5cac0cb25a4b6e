"""To a control plane in this process: what a gateway does with a request, without HTTP in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from sage_core.units import PoolKind, RequestKind
from sage_live.call import Call
from sage_live.client.answers import Model
from sage_live.client.ask import CHAT, COMPLETIONS, MODELS, Ask
from sage_live.client.asking import Taker
from sage_live.gateway.bodies import decode_chat, decode_completion, decode_embedding
from sage_live.gateway.headers import wishes
from sage_live.service import InferenceService

_encode = msgspec.json.Encoder().encode


class ServiceTransport:
    """Build inside the event loop. ``close``: ends the service and whatever was started for it."""

    def __init__(self, service: InferenceService, close: Callable[[], Awaitable[None]]) -> None:
        self.service = service
        self._close = close

    def send(self, ask: Ask, taker: Taker) -> ServiceFlight:
        """ApiError for what a gateway would refuse."""
        if ask.endpoint == MODELS:
            body = _encode({"data": self._models()})
            asyncio.get_running_loop().call_soon(taker.complete, 200, body, b"application/json")
            return ServiceFlight(self.service, None)
        wish = wishes(dict(ask.headers))
        call, cap = _call(ask, taker)
        call.tenant = wish.tenant
        call.exact = wish.input_tokens
        self.service.submit(
            call,
            priority=wish.priority,
            output_tokens_max=cap,
            input_tokens=wish.input_tokens,
            ttft_s=wish.ttft_s,
            e2e_s=wish.e2e_s,
        )
        return ServiceFlight(self.service, call)

    async def close(self) -> None:
        await self._close()

    def _models(self) -> list[Model]:
        return [
            Model(name, owned_by="sage", kind="embedding" if served.kind is PoolKind.EMBEDDING else "llm")
            for name, served in self.service.models.items()
        ]


def _call(ask: Ask, taker: Taker) -> tuple[Call, int | None]:
    """With the most tokens that it may generate, as the gateway reckons."""
    path = "/v1" + ask.endpoint
    if ask.endpoint == CHAT:
        chat = decode_chat(ask.body)
        cap = chat.max_completion_tokens or chat.max_tokens
        asked = chat.stream_options is not None
        call = Call(taker, RequestKind.LLM_CHAT, chat.model, path, ask.body, stream=ask.stream, usage_asked=asked)
        return call, None if cap is None else cap * (chat.n or 1)
    if ask.endpoint == COMPLETIONS:
        completion = decode_completion(ask.body)
        asked = completion.stream_options is not None
        kind = RequestKind.LLM_GENERATE
        call = Call(taker, kind, completion.model, path, ask.body, stream=ask.stream, usage_asked=asked)
        return call, None if completion.max_tokens is None else completion.max_tokens * (completion.n or 1)
    embedding = decode_embedding(ask.body)
    return Call(taker, RequestKind.EMBEDDING, embedding.model, path, ask.body), None


class ServiceFlight:
    """A request in the service; None: there is none."""

    __slots__ = ("_call", "_service")

    def __init__(self, service: InferenceService, call: Call | None) -> None:
        self._service = service
        self._call = call

    def cancel(self) -> None:
        """The plane hears that the client went away."""
        if self._call is not None:
            self._service.cancel(self._call.request)

    def pause(self) -> None:
        if self._call is not None and self._call.flow is not None:
            self._call.flow.pause()

    def resume(self) -> None:
        if self._call is not None and self._call.flow is not None:
            self._call.flow.resume()
