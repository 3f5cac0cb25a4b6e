"""The emulated engine: a backend model in real time behind the HTTP API of vLLM.

What is real: the protocol, the instants, token counts, ``usage``, the metrics, what a disconnect does. What is made up: the
words and the vectors (:mod:`sage_live.servers.synthetic`). Rules:

* Input tokens: ``x-sage-input-tokens`` where given; the number of token ids; else one for every four bytes of text, and
  four a message of a chat.
* Output tokens: ``max_tokens`` where ``ignore_eos`` is set or ``min_tokens`` asks for as many; else a length drawn from an
  exponential distribution by a hash of prompt and ``seed``, within ``min_tokens`` and ``max_tokens``.
* A stream gets its tokens as the model's iterations end; those that are due together are one event. Between the first token
  and the last, an engine's ``egress_s`` delays none of them.
* A request is one sequence: ``n`` above 1, ``echo`` and several prompts are refused.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import msgspec

from sage_core.load import Contents
from sage_live.errors import ApiError, bad_request, model_not_found
from sage_live.http.server import HttpServer, Limits, Request
from sage_live.servers.api import Api, error_body, models_list
from sage_live.servers.bodies import (
    BodyDecoder,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerationBody,
    TokenIds,
    chat_text,
    request_id,
    stated_input_tokens,
    utf8,
)
from sage_live.servers.emulated_metrics import KvCache, Statistics
from sage_live.servers.generation import Embeddings, Generation, Site, Stream
from sage_live.servers.prometheus import CONTENT_TYPE
from sage_live.servers.realtime import MakeModel, RealTimeEngine
from sage_live.servers.synthetic import (
    MESSAGE_TOKENS,
    Vectors,
    Words,
    content_ids,
    encoded_vector,
    estimated_tokens,
    output_length,
    seed_of,
)

INPUTS_MAX: Final = 2048
"""Of one embedding request; OpenAI's limit."""

COMPLETION_TOKENS: Final = 16
"""``max_tokens`` of a completion that does not say; OpenAI's and vLLM's default."""


@dataclass(frozen=True, slots=True)
class ServedLlm:
    """What the server must know of its LLM engine. ``max_model_len`` 0: as long as the KV cache."""

    model: str
    max_model_len: int
    kv_cache: KvCache
    priority: bool = False

    @property
    def tokens_max(self) -> int:
        """Longest sequence, prompt and output."""
        held = self.kv_cache.kv_blocks * self.kv_cache.block_size
        return min(self.max_model_len, held) if self.max_model_len else held


@dataclass(frozen=True, slots=True)
class ServedEmbedding:
    """What the server must know of its embedding engine. ``tokens_max``: of one text."""

    model: str
    tokens_max: int
    dimensions: int = 384


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How it answers. output_tokens_mean: where the client leaves the end to the model. interval: least tokens of an event of
    a stream after its first; flush_ns: least time between two.

    Faults, for tests: slow multiplies every time of the model. hang_after: so many generations and embeddings are answered,
    those after them are accepted and never answered (None: off). fail_rate: the share that gets a 500.
    """

    output_tokens_mean: int = 128
    interval: int = 1
    flush_ns: int = 1_000_000
    slow: float = 1.0
    hang_after: int | None = None
    fail_rate: float = 0.0


class EmulatedServer:
    """One engine on one port. Made by :meth:`start` inside a running event loop."""

    def __init__(
        self, make: MakeModel, llm: ServedLlm | None, embedding: ServedEmbedding | None, behaviour: Behaviour
    ) -> None:
        self.engine = RealTimeEngine(
            make, slow=behaviour.slow, interval=behaviour.interval, flush_ns=behaviour.flush_ns
        )
        self.statistics = Statistics()
        self._llm, self._embedding, self._behaviour = llm, embedding, behaviour
        words = Words()
        self._llm_site = Site(self.engine, words, self.statistics, _json(llm.model if llm else ""))
        self._embedding_site = Site(self.engine, words, self.statistics, _json(embedding.model if embedding else ""))
        self._vectors = Vectors(embedding.dimensions if embedding else 1)
        self._created = int(time.time())
        self._numbers = itertools.count()
        self._decode_chat = BodyDecoder(ChatBody)
        self._decode_completion = BodyDecoder(CompletionBody)
        self._decode_embedding = BodyDecoder(EmbeddingBody)
        self._http: HttpServer | None = None

    @classmethod
    async def start(
        cls,
        make: MakeModel,
        *,
        llm: ServedLlm | None = None,
        embedding: ServedEmbedding | None = None,
        behaviour: Behaviour | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> EmulatedServer:
        """Listen. ``make`` gives a model with the engines that ``llm`` and ``embedding`` describe; port 0 is any free one.
        Raises ConfigError where the address cannot be had."""
        server = cls(make, llm, embedding, behaviour or Behaviour())
        routes = {
            "/v1/chat/completions": {"POST": server._chat},
            "/v1/completions": {"POST": server._completion},
            "/v1/embeddings": {"POST": server._embeddings},
            "/v1/models": {"GET": server._models},
            "/health": {"GET": server._health},
            "/version": {"GET": server._version},
            "/metrics": {"GET": server._metrics},
        }
        limits = Limits(body_bytes_max=64 * 2**20)
        try:
            server._http = await HttpServer.start(Api(routes), host, port, limits=limits, error_body=error_body)
        except BaseException:
            server.engine.close()
            raise
        return server

    @property
    def port(self) -> int:
        assert self._http is not None
        return self._http.port

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more connections, let what is in progress finish for up to ``grace_s`` seconds."""
        assert self._http is not None
        await self._http.close(grace_s)
        self.engine.close()

    # --- generation ---------------------------------------------------------------------------------------------------

    def _chat(self, request: Request) -> None:
        body: ChatBody = self._decode_chat(request.body)
        prompt = chat_text(body.messages)
        tokens = stated_input_tokens(request) or estimated_tokens(prompt) + MESSAGE_TOKENS * len(body.messages)
        self._generate(request, body, prompt, tokens, body.max_completion_tokens or body.max_tokens)

    def _completion(self, request: Request) -> None:
        body: CompletionBody = self._decode_completion(request.body)
        prompt = utf8(body.single_prompt())
        tokens = stated_input_tokens(request) or _tokens_of(prompt)
        self._generate(request, body, prompt, tokens, body.max_tokens or COMPLETION_TOKENS)

    def _generate(
        self, request: Request, body: GenerationBody, prompt: bytes | TokenIds, input_tokens: int, cap: int | None
    ) -> None:
        llm = self._llm
        if llm is None:
            raise bad_request("This engine serves an embedding model only.")
        _check_model(body.model, llm.model)
        if body.priority and not llm.priority:
            raise bad_request("priority: this engine does not schedule by priority", param="priority")
        if cap is None:
            cap = max(1, llm.tokens_max - input_tokens)
        if input_tokens + cap > llm.tokens_max:
            raise _too_long(llm.tokens_max, f"{input_tokens + cap} ({input_tokens} of them in the prompt)", None)
        if body.min_tokens > cap:
            what = f"min_tokens: expected at most max_tokens = {cap}, got {body.min_tokens}"
            raise bad_request(what, param="min_tokens")
        number = next(self._numbers)
        if self._fault(number):
            return
        seed = seed_of(prompt, body.seed)
        if body.ignore_eos or body.min_tokens == cap:
            tokens = cap
        else:
            tokens = output_length(seed, self._behaviour.output_tokens_mean, cap, body.min_tokens)
        contents = None
        block_size = llm.kv_cache.block_size
        if llm.kv_cache.prefix_caching and input_tokens >= block_size:
            contents = Contents(block_size, content_ids(prompt, input_tokens, block_size))
        make = Stream if body.stream else Generation
        job = make(
            self._llm_site,
            request,
            request_id(request, number),
            isinstance(body, ChatBody),
            seed,
            input_tokens,
            b"length" if tokens == cap else b"stop",
            body.stream_options is not None and bool(body.stream_options.include_usage),
        )
        self.engine.generate(job, input_tokens, tokens, body.priority, contents)

    # --- embeddings ---------------------------------------------------------------------------------------------------

    def _embeddings(self, request: Request) -> None:
        body: EmbeddingBody = self._decode_embedding(request.body)
        served = self._embedding
        if served is None:
            raise bad_request("This engine serves a generating model only.")
        _check_model(body.model, served.model)
        if body.dimensions is not None and body.dimensions > served.dimensions:
            raise bad_request(f"dimensions: expected at most {served.dimensions}", param="dimensions")
        inputs = [utf8(item) for item in body.inputs(INPUTS_MAX)]
        sizes = [_tokens_of(item) for item in inputs]
        stated = stated_input_tokens(request)
        if stated is not None:
            if stated < len(inputs):
                raise bad_request(f"x-sage-input-tokens: expected at least {len(inputs)}, one for each input")
            sizes = shared_out(stated, sizes)
        if max(sizes) > served.tokens_max:
            raise _too_long(served.tokens_max, f"{max(sizes)} in one input", "input")
        if self._fault(next(self._numbers)):
            return
        as_base64 = body.encoding_format == "base64"

        def values() -> list[bytes]:
            vectors = (self._vectors.vector(seed_of(item, None), body.dimensions) for item in inputs)
            return [encoded_vector(vector, as_base64) for vector in vectors]

        Embeddings(self._embedding_site, request, sizes, values).submit()

    # --- everything else ----------------------------------------------------------------------------------------------

    def _fault(self, number: int) -> bool:
        """Whether this one will never be answered. Raises ApiError if it was chosen to fail."""
        hang_after, rate = self._behaviour.hang_after, self._behaviour.fail_rate
        if hang_after is not None and number >= hang_after:
            return True
        if math.floor((number + 1) * rate) > math.floor(number * rate):  # evenly, so that tests can count on it
            self.statistics.failed += 1
            raise ApiError(500, "This failure was asked for (--fail-rate).", code="emulated_failure")
        return False

    def _models(self, request: Request) -> None:
        served = [each for each in (self._llm, self._embedding) if each is not None]
        request.respond(200, models_list({each.model: each.tokens_max for each in served}, self._created))

    def _health(self, request: Request) -> None:
        request.respond(200, b"")

    def _version(self, request: Request) -> None:
        request.respond(200, _json({"version": version("sage-serving"), "engine": "sage-emulated"}))

    def _metrics(self, request: Request) -> None:
        llm, engine = self._llm, self.engine
        model = llm.model if llm else self._embedding.model if self._embedding else ""
        kv_cache = llm.kv_cache if llm else None
        text = self.statistics.exposition(model, kv_cache, engine.reports(), engine.usage(), engine.lateness)
        request.respond(200, text, CONTENT_TYPE)


def shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` tokens over inputs in proportion to ``sizes``, at least one each; the last gets what is left.

    ``total`` is at least ``len(sizes)``.
    """
    whole = sum(sizes)
    shares: list[int] = []
    for place, size in enumerate(sizes):
        left, after = total - sum(shares), len(sizes) - place - 1
        shares.append(left if after == 0 else max(1, min(left - after, total * size // whole)))
    return shares


_json = msgspec.json.Encoder().encode


def _tokens_of(prompt: bytes | TokenIds) -> int:
    return estimated_tokens(prompt) if isinstance(prompt, bytes) else len(prompt)


def _check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        raise model_not_found(asked, [served])


def _too_long(most: int, got: str, param: str | None) -> ApiError:
    what = f"This model's maximum context length is {most} tokens. However, you requested {got}; shorten it."
    return bad_request(what, param=param, code="context_length_exceeded")
