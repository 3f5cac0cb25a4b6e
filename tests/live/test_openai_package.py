"""The official OpenAI client against the gateway: nothing is changed but ``base_url``."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import openai
import pytest

from sage_bench.config import EmbedConfig, LlmConfig, checked, composed
from sage_bench.emulate import emulation
from sage_bench.serving import Serving, gateway
from sage_core.units import PoolKind
from sage_live.gateway.app import GatewayConfig
from sage_live.gateway.keyfile import add_key
from sage_live.gateway.keys import ApiKeys
from sage_live.gateway.rate import Limits, RateLimits
from sage_live.http_engine import EngineSpec
from sage_live.servers.emulated import EmulatedServer

_T = TypeVar("_T")

WAIT_S = 10.0


class Site:
    """An LLM and an embedding engine, and gateways before them, in a loop of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._running = AsyncExitStack()
        self._engine = self.run(self._start())

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def gateway(self, keys: ApiKeys | None = None, rates: RateLimits | None = None) -> str:
        """Its base URL."""
        specs = [EngineSpec(self._engine, "llm"), EngineSpec(self._engine, "embed", PoolKind.EMBEDDING, name="embed")]
        return self.run(self._gateway(Serving(GatewayConfig(), engines=specs, keys=keys, rates=rates)))

    def close(self) -> None:
        self.run(self._running.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    async def _start(self) -> str:
        llm, embed = LlmConfig(profile="qwen2.5-7b-instruct-h100-tp1"), EmbedConfig(profile="bge-large-en-v1.5-h100")
        made = emulation(llm, embed, model="llm", embed_model="embed")
        server = await EmulatedServer.start(made.make, llm=made.llm, embedding=made.embedding)
        self._running.push_async_callback(server.close)
        return f"http://127.0.0.1:{server.port}"

    async def _gateway(self, serving: Serving) -> str:
        config, _ = checked(composed(["driver=live", "load=clients"]))
        made, _ = await self._running.enter_async_context(gateway(config, serving))
        return f"http://127.0.0.1:{made.port}/v1"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=site.gateway(), api_key="unused", max_retries=0, timeout=WAIT_S) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="llm",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        max_tokens=6,
        temperature=0.5,
        extra_body={"ignore_eos": True},
    )
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    assert answer._request_id is not None


def test_chat_streamed(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "llm",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 9,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**ask).choices[0].message.content
    with client.chat.completions.create(**ask, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    *_, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 9
    with client.chat.completions.stream(model="llm", messages=ask["messages"]) as events:  # puts the pieces together
        final = events.get_final_completion().choices[0]
    assert final.finish_reason == "stop" and str(final.message.content).startswith(str(whole))


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="llm", prompt="Once", max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion" and answer.usage is not None and answer.usage.completion_tokens == 5
    stream = client.completions.create(
        model="llm", prompt="Once", max_tokens=5, extra_body={"ignore_eos": True}, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    texts = ["one", "two", "three"]
    default = client.embeddings.create(model="embed", input=texts)  # base64 on the wire, decoded by the package
    floats = client.embeddings.create(model="embed", input=texts, encoding_format="float")
    coded = client.embeddings.create(model="embed", input=texts, encoding_format="base64")
    vectors = np.array([item.embedding for item in default.data], np.float32)
    assert vectors.shape == (3, 384) and [item.index for item in default.data] == [0, 1, 2]
    assert np.allclose(vectors, [item.embedding for item in floats.data], atol=1e-6)
    first = coded.data[0].embedding
    assert isinstance(first, str) and np.array_equal(np.frombuffer(base64.b64decode(first), "<f4"), vectors[0])
    alone = client.embeddings.create(model="embed", input="two").data[0].embedding
    assert np.array_equal(np.array(alone, np.float32), vectors[1])
    assert len(client.embeddings.create(model="embed", input=[[1, 2], [3]], dimensions=16).data[1].embedding) == 16
    assert default.usage.prompt_tokens == 4


def test_models(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["embed", "llm"]
    assert client.models.retrieve("llm").object == "model"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt")
    assert raised.value.code == "model_not_found"


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=messages)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="llm", messages=messages, max_tokens=10**6, stream=stream)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="llm", messages=[])
    assert wrong.value.param == "messages"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="llm", input="x")


def test_a_wrong_key_and_a_right_one(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "acme")
    url = site.gateway(keys=ApiKeys(path))
    with openai.OpenAI(base_url=url, api_key="sage-00000000-guess", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as raised:
            stranger.models.list()
        assert raised.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            stranger.embeddings.create(model="embed", input="x")
    with openai.OpenAI(base_url=url, api_key=secret, max_retries=0) as known:
        assert known.embeddings.create(model="embed", input="x").data


def test_a_tenant_over_its_rate_is_told_when_to_come_back(site: Site) -> None:
    url = site.gateway(rates=RateLimits(Limits(requests_per_minute=120)))  # 20 at once, then one every 500 ms
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:

        def ask(times: int) -> None:
            for _ in range(times):
                client.embeddings.create(model="embed", input="x")

        with pytest.raises(openai.RateLimitError) as raised:
            ask(2000)
        assert raised.value.code == "rate_limit_exceeded"
        assert 0 < float(raised.value.response.headers["retry-after-ms"]) <= 500
        patient = client.with_options(max_retries=5)
        assert patient.embeddings.create(model="embed", input="x").data  # waits as it was told


def test_asynchronously(site: Site) -> None:
    async def main(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="embed", input=[str(number)]) for number in range(20))
            )
            assert len({tuple(answer.data[0].embedding) for answer in answers}) == 20
            stream = await client.chat.completions.create(
                model="llm", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=True
            )
            assert [chunk async for chunk in stream]

    asyncio.run(main(site.gateway()))
