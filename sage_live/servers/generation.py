"""Requests in an emulated engine, and the answers they become: whole, streamed, or embeddings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sage_live.errors import bad_request
from sage_live.http.server import Request
from sage_live.servers.api import refuse
from sage_live.servers.emulated_metrics import Statistics
from sage_live.servers.realtime import Job, RealTimeEngine
from sage_live.servers.synthetic import Words

_CHAT = (
    b"chat.completion",
    b'{"index":0,"message":{"role":"assistant","content":"%b"},"logprobs":null,"finish_reason":"%b"}',
)
_COMPLETION = (b"text_completion", b'{"index":0,"text":"%b","logprobs":null,"finish_reason":"%b"}')

_EVENT = b'data: {"id":"%b","object":"%b","created":%d,"model":%b,"choices":['
_CHAT_EVENT = (b"chat.completion.chunk", b'{"index":0,"delta":{"content":"')
_COMPLETION_EVENT = (b"text_completion", b'{"index":0,"text":"')
_ROLE = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'


@dataclass(slots=True)
class Site:
    """What all requests of a server share. ``model``: its name as JSON."""

    engine: RealTimeEngine
    words: Words
    statistics: Statistics
    model: bytes


class Generation(Job):
    """A chat or completion request."""

    __slots__ = ("arrived_at", "chat", "include_usage", "input_tokens", "name", "reason", "request", "seed", "site")

    def __init__(
        self,
        site: Site,
        request: Request,
        name: bytes,
        chat: bool,
        seed: int,
        input_tokens: int,
        reason: bytes,
        include_usage: bool,
    ) -> None:
        """``name``: its id, safe in JSON. ``reason``: why it will end, ``stop`` or ``length``."""
        super().__init__()
        self.site = site
        self.request = request
        self.name = (b"chatcmpl-" if chat else b"cmpl-") + name
        self.chat = chat
        self.seed = seed
        self.input_tokens = input_tokens
        self.reason = reason
        self.include_usage = include_usage
        self.arrived_at = time.monotonic()
        request.on_disconnect = self._disconnected

    def on_tokens(self, tokens: int) -> None:
        self._count_first()
        self.tokens = tokens

    def on_finished(self, tokens: int) -> None:
        """Answer with all of it."""
        self._count(tokens)
        kind, choice = _CHAT if self.chat else _COMPLETION
        site = self.site
        text = site.words.text(self.seed, 0, tokens)
        self.request.respond(
            200,
            b'{"id":"%b","object":"%b","created":%d,"model":%b,"choices":[%b],"usage":%b}'
            % (self.name, kind, time.time(), site.model, choice % (text, self.reason), self._usage(tokens)),
        )

    def on_failed(self, reason: str) -> None:
        refuse(self.request, bad_request(reason))

    def _disconnected(self) -> None:
        if self.site.engine.cancel(self):
            self.site.statistics.ended["abort"] += 1

    def _usage(self, tokens: int) -> bytes:
        total = self.input_tokens + tokens
        return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}' % (self.input_tokens, total, tokens)

    def _count_first(self) -> None:
        self.site.statistics.ttft.add(time.monotonic() - self.arrived_at)

    def _count(self, tokens: int) -> None:
        statistics = self.site.statistics
        statistics.e2e.add(time.monotonic() - self.arrived_at)
        statistics.prompt_tokens += self.input_tokens
        statistics.generation_tokens += tokens
        statistics.ended[self.reason.decode()] += 1


class Stream(Generation):
    """Answered with server-sent events, one for all tokens that became due together."""

    __slots__ = ("_before", "_head", "_writable")

    def __init__(
        self,
        site: Site,
        request: Request,
        name: bytes,
        chat: bool,
        seed: int,
        input_tokens: int,
        reason: bytes,
        include_usage: bool,
    ) -> None:
        super().__init__(site, request, name, chat, seed, input_tokens, reason, include_usage)
        self.streams = True
        kind, choice = _CHAT_EVENT if chat else _COMPLETION_EVENT
        self._head = _EVENT % (self.name, kind, time.time(), site.model)
        self._before = self._head + choice
        self._writable = True
        request.on_writable = self._on_writable

    def on_tokens(self, tokens: int) -> None:
        if self.tokens == 0:
            self._count_first()
            self.request.start(200)
            first = self._head + _ROLE if self.chat else b""
            self.request.write(first + self._event(tokens, b"null"))
        elif self._writable:
            self.request.write(self._event(tokens, b"null"))
        else:
            return  # they come with later ones
        self.tokens = tokens

    def on_finished(self, tokens: int) -> None:
        self._count(tokens)
        last = self._event(tokens, b'"%b"' % self.reason)
        if self.include_usage:
            last += b'%b],"usage":%b}\n\n' % (self._head, self._usage(tokens))
        self.request.write(last + b"data: [DONE]\n\n")
        self.request.end()

    def _event(self, tokens: int, reason: bytes) -> bytes:
        text = self.site.words.text(self.seed, self.tokens, tokens - self.tokens)
        if self.chat:
            return b'%b%b"},"logprobs":null,"finish_reason":%b}]}\n\n' % (self._before, text, reason)
        return b'%b%b","logprobs":null,"finish_reason":%b}]}\n\n' % (self._before, text, reason)

    def _on_writable(self, writable: bool) -> None:
        self._writable = writable


class Embeddings:
    """An embedding request: one task for each input, answered when the last is done."""

    __slots__ = ("_jobs", "_left", "_make_values", "_request", "_site", "_sizes", "_values")

    def __init__(
        self, site: Site, request: Request, sizes: Sequence[int], make_values: Callable[[], list[bytes]]
    ) -> None:
        """``sizes``: tokens of each input. ``make_values``: gives the vector of each as JSON."""
        self._site = site
        self._request = request
        self._sizes = sizes
        self._make_values = make_values
        self._values: list[bytes] = []
        self._left = len(sizes)
        self._jobs = [_Text(self) for _ in sizes]
        request.on_disconnect = self._disconnected

    def submit(self) -> None:
        """To the engine. The vectors are made while the model takes its time, which is the whole time that is meant."""
        for job, size in zip(self._jobs, self._sizes, strict=True):
            self._site.engine.embed(job, size)
        asyncio.get_running_loop().call_soon(self._prepare)

    def _prepare(self) -> None:
        if not self._values:
            self._values = self._make_values()

    def done(self) -> None:
        """One more input is."""
        self._left -= 1
        if self._left:
            return
        self._prepare()
        tokens = sum(self._sizes)
        self._site.statistics.prompt_tokens += tokens
        self._site.statistics.embedded += len(self._sizes)
        self._request.respond(200, embeddings_answer(self._site.model, self._values, tokens))

    def _disconnected(self) -> None:
        cancelled = [self._site.engine.cancel(job) for job in self._jobs]
        if any(cancelled):
            self._site.statistics.ended["abort"] += 1


class _Text(Job):
    __slots__ = ("_of",)

    def __init__(self, of: Embeddings) -> None:
        super().__init__()
        self._of = of

    def on_finished(self, tokens: int) -> None:
        self._of.done()


def embeddings_answer(model: bytes, values: Sequence[bytes], tokens: int) -> bytes:
    """OpenAI's body; ``model`` and ``values`` as JSON."""
    data = b",".join(
        [b'{"object":"embedding","index":%d,"embedding":%b}' % (place, value) for place, value in enumerate(values)]
    )
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, model, usage)
