"""An embedding model behind OpenAI's HTTP API."""

from __future__ import annotations

import time
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from sage_live.errors import ApiError, bad_request, model_not_found
from sage_live.http.server import HttpServer, Limits, Request
from sage_live.servers.api import Api, error_body, models_list, refuse
from sage_live.servers.batching import Batcher, Wanted
from sage_live.servers.bodies import BodyDecoder, EmbeddingBody
from sage_live.servers.encoder import Encoder
from sage_live.servers.generation import embeddings_answer
from sage_live.servers.prometheus import CONTENT_TYPE, SECONDS, Exposition, Histogram
from sage_live.servers.synthetic import encoded_vector

INPUTS_MAX: Final = 2048
"""Of one request; OpenAI's limit."""


class EmbeddingServer:
    """One model on one port. Made by :meth:`start` inside a running event loop."""

    def __init__(self, encoder: Encoder, model: str, max_batch: int, max_batch_tokens: int) -> None:
        self.batcher = Batcher(encoder, max_batch, max_batch_tokens)
        self.latency = Histogram(SECONDS)
        self._encoder = encoder
        self._model = model
        self._model_json = msgspec.json.encode(model)
        self._decode = BodyDecoder(EmbeddingBody)
        self._created = int(time.time())
        self._failed = 0
        self._http: HttpServer | None = None

    @classmethod
    async def start(
        cls,
        encoder: Encoder,
        model: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_batch: int = 32,
        max_batch_tokens: int = 16384,
    ) -> EmbeddingServer:
        """Listen and serve ``encoder`` under the name ``model``. Raises ConfigError where the address cannot be had."""
        server = cls(encoder, model, max_batch, max_batch_tokens)
        routes = {
            "/v1/embeddings": {"POST": server._embeddings},
            "/v1/models": {"GET": server._models},
            "/health": {"GET": server._health},
            "/metrics": {"GET": server._metrics},
        }
        limits = Limits(body_bytes_max=64 * 2**20)
        try:
            server._http = await HttpServer.start(Api(routes), host, port, limits=limits, error_body=error_body)
        except BaseException:
            await server.batcher.close()
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
        await self.batcher.close()

    def _embeddings(self, request: Request) -> None:
        body: EmbeddingBody = self._decode(request.body)
        if body.model is not None and body.model != self._model:
            raise model_not_found(body.model, [self._model])
        size = body.dimensions or self._encoder.dimensions
        if size != self._encoder.dimensions and not (self._encoder.shortens and size < self._encoder.dimensions):
            raise bad_request(
                f"dimensions: {self._model} gives {self._encoder.dimensions}"
                f"{' or fewer' if self._encoder.shortens else ', no other number'}, got {size}",
                param="dimensions",
            )
        arrived_at = time.monotonic()

        def done(vectors: NDArray[np.float32], tokens: int) -> None:
            if size < vectors.shape[1]:
                vectors = vectors[:, :size] / np.linalg.norm(vectors[:, :size], axis=1, keepdims=True)
            values = [encoded_vector(vector, body.encoding_format == "base64") for vector in vectors]
            self.latency.add(time.monotonic() - arrived_at)
            request.respond(200, embeddings_answer(self._model_json, values, tokens))

        def failed(error: ApiError) -> None:
            self._failed += 1
            refuse(request, error)

        wanted = Wanted(body.inputs(INPUTS_MAX), done, failed)

        def gone() -> None:
            wanted.gone = True

        request.on_disconnect = gone
        self.batcher.submit(wanted)

    def _models(self, request: Request) -> None:
        request.respond(200, models_list({self._model: self._encoder.tokens_max}, self._created))

    def _health(self, request: Request) -> None:
        request.respond(200, b"")

    def _metrics(self, request: Request) -> None:
        batcher = self.batcher
        out = Exposition({"model_name": self._model})
        out.sample("vllm:num_requests_running", "gauge", "Texts in the batch in progress.", batcher.running)
        out.sample("vllm:num_requests_waiting", "gauge", "Requests that no batch has begun.", batcher.waiting)
        out.sample("vllm:prompt_tokens_total", "counter", "Tokens embedded.", batcher.tokens)
        out.sample("sage_embed_texts_total", "counter", "Texts embedded.", batcher.texts)
        out.sample("sage_embed_batches_total", "counter", "Batches.", batcher.batches)
        out.sample(
            "sage_embed_padded_tokens_total", "counter", "Tokens computed, padding included.", batcher.padded_tokens
        )
        out.sample("sage_embed_skipped_total", "counter", "Requests whose client had gone.", batcher.skipped)
        out.sample("sage_embed_failures_total", "counter", "Requests refused or failed by the model.", self._failed)
        out.histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", self.latency)
        out.sample("process_cpu_seconds_total", "counter", "CPU time of the process.", time.process_time())
        request.respond(200, out.text(), CONTENT_TYPE)
