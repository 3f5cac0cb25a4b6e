"""One set of calls, three ways to have them answered: by a gateway, by engines without one, by a simulated cluster."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from sage_bench.cli import main as sage
from sage_bench.client import UnifiedInferenceClient
from sage_bench.config import EmbedConfig, LlmConfig, checked, composed
from sage_bench.emulate import emulation
from sage_bench.serving import EngineConfig, Serving, gateway
from sage_core.errors import ConfigError, EngineError
from sage_core.units import PoolKind
from sage_live.client.answers import ChatMessage
from sage_live.client.ask import GenerationOptions
from sage_live.client.inprocess import ServiceTransport
from sage_live.errors import ApiError
from sage_live.gateway.app import GatewayConfig
from sage_live.http_engine import EngineSpec
from sage_live.servers.emulated import EmulatedServer

_T = TypeVar("_T")

WAIT_S = 10.0
LLM, EMBED = "qwen2.5-7b-instruct-h100-tp1", "bge-large-en-v1.5-h100"
CLUSTER = (
    f"cluster.devices=[{{node: a, count: 2, llm: {{profile: {LLM}}}}}, {{node: b, embed: {{profile: {EMBED}}}}}]",
)
MODES = ("gateway", "engines", "cluster")


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


class Site:
    """Engines, and perhaps a gateway before them, in a loop of their own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._running = AsyncExitStack()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    async def engine(self, llm: LlmConfig | None, embed: EmbedConfig | None) -> str:
        made = emulation(llm, embed, model="llm", embed_model="embed")
        server = await EmulatedServer.start(made.make, llm=made.llm, embedding=made.embedding)
        self._running.push_async_callback(server.close)
        return f"http://127.0.0.1:{server.port}"

    def engines(self) -> list[str]:
        """Two with an LLM, one for embeddings."""
        llm, embed = LlmConfig(profile=LLM), EmbedConfig(profile=EMBED)
        return [self.run(self.engine(*each)) for each in ((llm, None), (llm, None), (None, embed))]

    async def _gateway(self, serving: Serving) -> str:
        config, _ = checked(composed(["driver=live", "load=clients"]))
        made, _ = await self._running.enter_async_context(gateway(config, serving))
        return f"http://127.0.0.1:{made.port}/v1"

    def gateway(self, serving: Serving) -> str:
        return self.run(self._gateway(serving))

    def close(self) -> None:
        self.run(self._running.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@dataclass
class Setting:
    mode: str
    client: UnifiedInferenceClient
    engines: list[str]

    def underway(self) -> int:
        """What the engines themselves say they are busy with."""
        count = 0.0
        for url in self.engines:
            with urllib.request.urlopen(f"{url}/metrics", timeout=WAIT_S) as answer:
                for line in answer.read().decode().splitlines():
                    if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting")):
                        count += float(line.rpartition(" ")[2])
        return int(count)


@contextlib.contextmanager
def setting(mode: str, record: Path | None = None) -> Iterator[Setting]:
    with ExitStack() as stack:
        if mode == "cluster":
            client = stack.enter_context(
                UnifiedInferenceClient.create(cluster="small", overrides=CLUSTER, record=record)
            )
            transport = client._session.transport
            assert isinstance(transport, ServiceTransport)
            urls = [watch.engine.spec.url for watch in transport.service.watches.values()]
            yield Setting(mode, client, urls)
            return
        site = Site()
        stack.callback(site.close)
        urls = site.engines()
        if mode == "engines":
            given: list[str | EngineConfig] = [f"{url},model=llm" for url in urls[:2]]
            given.append(EngineConfig(url=urls[2], kind="embedding"))  # which says what it serves
            client = stack.enter_context(UnifiedInferenceClient.create(engines=given, record=record))
        else:
            specs = [EngineSpec(url, "llm") for url in urls[:2]]
            specs.append(EngineSpec(urls[2], "embed", PoolKind.EMBEDDING))
            url = site.gateway(Serving(GatewayConfig(), engines=specs, record=record))
            client = stack.enter_context(UnifiedInferenceClient.create(url))
        yield Setting(mode, client, urls)


@pytest.fixture(scope="module", params=MODES)
def at(request: pytest.FixtureRequest) -> Iterator[Setting]:
    with setting(request.param) as made:
        yield made


class TestTheSameCalls:
    """Every mode, one expectation."""

    def test_models(self, at: Setting) -> None:
        assert sorted(model.id for model in at.client.models()) == ["embed", "llm"]

    def test_chat(self, at: Setting) -> None:
        answer = at.client.chat("What is the capital of France?", model="llm", max_tokens=7, ignore_eos=True)
        assert answer.object == "chat.completion" and answer.model == "llm" and answer.id.startswith("chatcmpl-")
        assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "length"
        assert answer.usage is not None and answer.usage.completion_tokens == 7 and answer.usage.total_tokens > 7
        conversation: list[dict[str, str] | ChatMessage] = [
            {"role": "user", "content": "What is the capital of France?"},
            answer.choices[0].message,
            {"role": "user", "content": "Sure?"},
        ]
        assert at.client.chat(conversation, model="llm", max_tokens=1).text

    def test_generate(self, at: Setting) -> None:
        answer = at.client.generate("Once upon", model="llm", max_tokens=5, ignore_eos=True)
        assert answer.object == "text_completion" and answer.choices[0].finish_reason == "length" and answer.text
        assert at.client.generate([1, 2, 3], model="llm", max_tokens=5, ignore_eos=True).usage is not None

    def test_what_is_said_is_the_same_however_it_is_asked(self, at: Setting) -> None:
        client = at.client
        ask: GenerationOptions = {"max_tokens": 12, "ignore_eos": True}
        whole = client.chat("Sing", model="llm", **ask).text
        chunks = list(client.chat("Sing", model="llm", stream=True, **ask))
        assert "".join(chunk.text for chunk in chunks) == whole and len(chunks) > 3
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)

        async def at_once() -> tuple[str, str, str]:
            aio = client.aio
            stream = await aio.chat("Sing", model="llm", stream=True, **ask)
            streamed = "".join([chunk.text async for chunk in stream])
            said, generated = await asyncio.gather(
                aio.chat("Sing", model="llm", **ask), aio.generate("Sing", model="llm", stream=True, **ask)
            )
            return said.text, streamed, "".join([chunk.text async for chunk in generated])

        said, streamed, generated = asyncio.run(at_once())
        assert said == streamed == whole and generated == client.generate("Sing", model="llm", **ask).text

    def test_a_stream_says_what_it_used_if_asked(self, at: Setting) -> None:
        *_, last = at.client.chat(
            "hi", model="llm", stream=True, max_tokens=4, ignore_eos=True, stream_options={"include_usage": True}
        )
        assert last.usage is not None and last.usage.completion_tokens == 4 and last.text == ""

    def test_embeddings_are_in_the_order_of_the_texts(self, at: Setting) -> None:
        texts = [f"text {number}" for number in range(40)]
        together = at.client.embed(texts, model="embed")
        assert together.vectors.shape == (40, 384) and together.vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(together.vectors, axis=1), 1, atol=1e-5)
        for number in (0, 17, 39):
            assert np.array_equal(at.client.embed(texts[number], model="embed").vectors[0], together.vectors[number])
        assert np.array_equal(at.client.embed(list(reversed(texts)), model="embed").vectors, together.vectors[::-1])
        assert at.client.embed([[1, 2], [3]], model="embed", dimensions=8).vectors.shape == (2, 8)

    def test_threads_share_batches_and_get_their_own(self, at: Setting) -> None:
        alone = {text: at.client.embed(text, model="embed").vectors for text in map(str, range(8))}
        wrong: list[str] = []

        def ask(text: str) -> None:
            for _ in range(10):
                if not np.array_equal(at.client.embed([text], model="embed").vectors, alone[text]):
                    wrong.append(text)
                usage = at.client.chat(text, model="llm", max_tokens=2, ignore_eos=True).usage
                if usage is None or usage.completion_tokens != 2:
                    wrong.append(text)

        threads = [threading.Thread(target=ask, args=(text,)) for text in alone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        until(lambda: at.underway() == 0)

    def test_leaving_a_stream_frees_the_engine(self, at: Setting) -> None:
        assert at.underway() == 0
        for _ in at.client.chat("long", model="llm", stream=True, max_tokens=20_000, ignore_eos=True):
            assert at.underway() == 1
            break
        until(lambda: at.underway() == 0)

    def test_a_cancelled_task_and_a_time_out_free_the_engine(self, at: Setting) -> None:
        async def leave() -> None:
            task = asyncio.create_task(at.client.aio.chat("long", model="llm", max_tokens=20_000, ignore_eos=True))
            await asyncio.to_thread(until, lambda: at.underway() == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(leave())
        until(lambda: at.underway() == 0)
        with pytest.raises(TimeoutError):
            at.client.chat("long", model="llm", max_tokens=20_000, ignore_eos=True, timeout_s=0.2)
        until(lambda: at.underway() == 0)

    @pytest.mark.parametrize(
        ("ask", "status", "code", "param"),
        [
            (lambda c: c.chat("hi", model="nope"), 404, "model_not_found", "model"),
            (lambda c: c.chat("hi", model="nope", stream=True), 404, "model_not_found", "model"),
            (lambda c: c.chat("hi", model="embed"), 400, None, "model"),
            (lambda c: c.embed("hi", model="llm"), 400, None, "model"),
            (lambda c: c.chat("hi", model="llm", max_tokens=10**6), 400, "context_length_exceeded", None),
            (lambda c: c.chat("hi", model="llm", max_tokens=10**6, stream=True), 400, "context_length_exceeded", None),
            (lambda c: c.chat("hi", model="llm", max_tokens=0), 400, "invalid_value", "max_tokens"),
            (lambda c: c.chat([], model="llm"), 400, "invalid_value", "messages"),
            (lambda c: c.generate("", model="llm"), 400, None, "prompt"),
            (lambda c: c.embed(["x" * 10_000], model="embed"), 400, "context_length_exceeded", "input"),
            (lambda c: c.embed(["x"], model="embed", dimensions=385), 400, None, "dimensions"),
            (lambda c: c.chat("hi", model="llm", priority=10**6), 400, "bad_header", "x-sage-priority"),
        ],
    )
    def test_refusals(
        self,
        at: Setting,
        ask: Callable[[UnifiedInferenceClient], object],
        status: int,
        code: str | None,
        param: str | None,
    ) -> None:
        with pytest.raises(ApiError) as raised:
            ask(at.client)
        error = raised.value
        assert (error.status, error.code, error.param) == (status, code, param), error
        assert error.type == "invalid_request_error" and error.message


@pytest.mark.parametrize("mode", MODES)
def test_tenants_priorities_and_objectives_reach_the_plane(mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with setting(mode, record=folder) as at:
        at.client.chat(
            "hi", model="llm", max_tokens=3, tenant="acme", priority=3, ttft_s=0.125, e2e_s=2.5, input_tokens=77
        )
        at.client.generate("hi", model="llm", max_tokens=3)
        at.client.embed(["a", "b"], model="embed", tenant="other")
        for _ in at.client.chat("hi", model="llm", max_tokens=20_000, ignore_eos=True, stream=True):
            break
        until(lambda: at.underway() == 0)
    rows = pq.read_table(folder / "requests.parquet").to_pylist()
    assert [(row["tenant"], row["priority"], row["outcome"]) for row in rows] == [
        ("acme", 3, "responded"), ("default", 0, "responded"), ("other", 0, "responded"), ("default", 0, "cancelled"),
    ]  # fmt: skip
    assert [row["pipeline"] for row in rows] == ["chat@llm", "generate@llm", "embed@embed", "chat@llm"]
    first = rows[0]
    assert first["input_tokens"] == 77
    assert first["ttft_due_ns"] - first["scheduled_ns"] == 125_000_000
    assert first["due_ns"] - first["scheduled_ns"] == 2_500_000_000
    if mode == "gateway":
        return  # whose manifest is written by the command
    assert sage_replay(folder) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_only_model_of_its_kind_need_not_be_named(mode: str) -> None:
    with setting(mode) as at:
        assert at.client.chat("hi", max_tokens=1).model == "llm" and at.client.embed("hi").model == "embed"


@pytest.mark.parametrize("mode", ["engines", "cluster"])
def test_without_a_gateway_policies_are_chosen(mode: str) -> None:
    with setting(mode) as at:
        given = [f"{url},model=llm" for url in at.engines[:2]]
        chosen: Mapping[str, Any] = {"_target_": "sage_policies.presets.fifo"}
        with UnifiedInferenceClient.create(engines=given, policy=chosen, slo="strict") as other:
            transport = other._session.transport
            assert isinstance(transport, ServiceTransport) and transport.service.policy == "fifo"
            assert other.chat("hi", max_tokens=1).text
            with pytest.raises(ConfigError, match="no embedding model is served"):
                other.embed("hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster": "smal"}, "Available options in 'cluster'"),
        ({"cluster": "small", "policy": "hybird"}, "Available options in 'policy'"),
        ({"cluster": "small", "overrides": ["attempts_max=0"]}, "attempts_max"),
        ({"cluster": "disaggregated"}, "device 0 is not one of LLM and embedding engines"),
        ({"cluster": "small", "overrides": ["cluster.faults=[{kind: crash, device: 0, at_s: 1}]"]}, "faults"),
        ({"cluster": "small", "api_key": "k"}, "api_key_env"),
        ({"engines": []}, "at least one"),
        ({"engines": ["http://127.0.0.1:1,model=m,colour=red"]}, "colour"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnifiedInferenceClient.create(**arguments)


def test_engines_that_are_not_there_are_named() -> None:
    for engine in ("http://127.0.0.1:1", "http://127.0.0.1:1,model=m"):
        with pytest.raises(EngineError, match=r"engine http://127\.0\.0\.1:1: .*refused"):
            UnifiedInferenceClient.create(engines=[engine], wait_s=0.1)


def sage_replay(folder: Path) -> int:
    argv, sys.argv = sys.argv, ["sage", "replay", str(folder)]
    try:
        sage()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    finally:
        sys.argv = argv
    return 0
