"""What engines said, through the gateway: each answer reaches the client as it was.

``tests/live/exchanges`` was recorded from real engines; ``tests/live/documented`` has the shapes that the documentation of
others states, which do not run here. A socket plays the bytes, with the reads at which they came (or might come); the gateway
in front of it is real.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httptools
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import (
    CHAT,
    COMPLETIONS,
    DONE,
    EMBED,
    EMBEDDINGS,
    LLM,
    ask,
    chat,
    embed_spec,
    embedding,
    listening,
    llm_spec,
    run,
    serving,
)

from sage_core import events as e
from sage_core.errors import ConfigError
from sage_live.adapters import ADAPTERS, Load, adapter
from sage_live.health import HealthConfig
from sage_live.wire import without_usage

EXCHANGES = Path(__file__).parent / "exchanges"
ENGINES = {folder.name: folder.name.partition("-")[0] for folder in sorted(EXCHANGES.iterdir())}
DOCUMENTED = sorted((Path(__file__).parent / "documented").glob("*.json"))


class Parsed:
    """Status, headers and body of recorded bytes."""

    def __init__(self, data: bytes) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(data)
        self.status = parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self.body += data


class Exchange:
    """What an engine is asked and says. reads: of the socket, one after another."""

    def __init__(self, engine: str, name: str, path: str, asked: str, reads: list[bytes]) -> None:
        self.engine = engine
        self.name = name
        self.path = path
        self.asked = asked
        self.reads = reads
        self.answer = Parsed(b"".join(reads))

    @classmethod
    def recorded(cls, folder: str, file: Path) -> Exchange:
        recorded = json.loads(file.read_text())
        head, _, asked = recorded["request"].partition("\r\n\r\n")
        reads = [data.encode("latin-1") for _, data in recorded["response"]]
        return cls(ENGINES[folder], f"{folder}/{file.stem}", head.split(" ")[1], asked, reads)

    @classmethod
    def documented(cls, engine: str, given: dict[str, Any]) -> Exchange:
        body = "".join(given["reads"]).encode()
        kind = "text/event-stream" if body.startswith(b"data: ") else "application/json"
        head = f"HTTP/1.1 {given['status']} Documented\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        reads = [head.encode(), *(read.encode() for read in given["reads"])]
        return cls(engine, f"{engine} (documented)/{given['name']}", given["path"], "", reads)

    @property
    def streamed(self) -> bool:
        return self.answer.headers.get("content-type", "").startswith("text/event-stream")


EVERY = [Exchange.recorded(folder, file) for folder in ENGINES for file in sorted((EXCHANGES / folder).glob("*.json"))]
INFERENCE = [
    exchange for exchange in EVERY if exchange.path in (CHAT, COMPLETIONS, adapter(exchange.engine).embeddings)
] + [
    Exchange.documented(file.stem, given) for file in DOCUMENTED for given in json.loads(file.read_text())["exchanges"]
]


@asynccontextmanager
async def playing(exchange: Exchange) -> AsyncIterator[int]:
    """An engine that answers every POST with the recording and is healthy."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                continue
            for data in exchange.reads:
                writer.write(data)
                await asyncio.sleep(0.001)  # so that the reads stay apart

    async with listening(serve) as port:
        yield port


def body_for(exchange: Exchange, usage: bool) -> dict[str, Any]:
    """A request that would get such an answer."""
    if exchange.path.endswith("/embeddings"):
        return embedding()
    more: dict[str, Any] = {"stream": exchange.streamed}
    if usage:
        more["stream_options"] = {"include_usage": True}
    if exchange.path == CHAT:
        return chat(**more)
    return {"model": LLM, "prompt": "Once", "max_tokens": 8} | more


def usage_of(body: bytes) -> dict[str, int] | None:
    """What the engine counted: in the only JSON, or in the last event that has it."""
    found = None
    for line in body.splitlines():
        text = line.removeprefix(b"data: ")
        if text.startswith(b"{"):
            found = json.loads(text).get("usage") or found
    return found


@pytest.mark.parametrize("exchange", INFERENCE, ids=lambda exchange: exchange.name)
@pytest.mark.parametrize("usage", [False, True])
def test_a_recorded_answer_reaches_the_client(exchange: Exchange, usage: bool) -> None:
    async def main() -> None:
        name = exchange.engine
        async with playing(exchange) as port:
            specs = [llm_spec(port, adapter=name), embed_spec(port, adapter=name)]
            health = HealthConfig(interval_s=5.0, scrape_s=5.0, errors_max=1000)
            async with serving(specs, health=health) as served:
                path = EMBEDDINGS if exchange.path.endswith("/embeddings") else exchange.path
                reply = await ask(served.port, path, body_for(exchange, usage))
                answer = exchange.answer
                if b'data: {"error"' in answer.body:
                    intact = answer.body.partition(b'data: {"error"')[0]
                    assert not reply.whole and reply.body.startswith(intact) and DONE not in reply.body
                    assert reply.events[-1]["error"]["code"] == "upstream_failed"
                    assert served.service.driver.plane.counts.failed == 1
                    return
                if (
                    answer.status in (424, 429) or answer.status >= 500
                ):  # llama.cpp blames itself for its clients' errors
                    assert reply.status == (503 if answer.status == 429 else 502)
                    assert served.service.driver.plane.counts.retries == 2
                    return
                assert (reply.status, reply.whole) == (answer.status, True)
                expected = answer.body
                if exchange.streamed and not usage:
                    expected = without_usage(expected)
                    assert b'"choices":[]' not in expected and expected.endswith(DONE)
                assert reply.body == expected
                assert served.service.driver.plane.counts.retries == 0
                if answer.status == 200:
                    (finished,) = served.heard(e.TaskFinished)
                    counted = usage_of(answer.body)
                    if exchange.path.endswith("/embeddings"):
                        assert finished.output_tokens == 0
                    elif counted is not None:
                        assert finished.output_tokens == counted["completion_tokens"]
                    else:  # recorded without usage: an event a token is the best guess there is
                        assert finished.output_tokens >= 1
                    series = served.gateway.metrics.render().decode()
                    if counted is not None:
                        assert f"}} {counted['prompt_tokens']}" in series.partition("# TYPE sage_input_tokens_total")[2]

    run(main())


@pytest.mark.parametrize("folder", ENGINES)
def test_embeddings_of_a_recorded_engine_are_split_as_they_came(folder: str) -> None:
    """Two clients whose inputs are those of a recorded batch."""
    from sage_live.batch import split_answer, take_apart

    (exchange,) = (each for each in EVERY if each.name == f"{folder}/embedding-batch-base64")
    inputs = json.loads(exchange.asked)["input"]
    parts = [take_apart(json.dumps({"model": EMBED, "input": part}).encode()) for part in (inputs[0], inputs[1:])]
    recorded = json.loads(exchange.answer.body)
    (first, _), (rest, _) = split_answer(exchange.answer.body, parts)
    together = json.loads(first)["data"] + json.loads(rest)["data"]
    assert [item["embedding"] for item in together] == [item["embedding"] for item in recorded["data"]]
    total = json.loads(first)["usage"]["prompt_tokens"] + json.loads(rest)["usage"]["prompt_tokens"]
    assert total == recorded["usage"]["prompt_tokens"]


@pytest.mark.parametrize("folder", ENGINES)
def test_health_and_metrics_are_where_the_adapter_looks(folder: str) -> None:
    by_name = {exchange.name: exchange for exchange in EVERY}
    engine = adapter(ENGINES[folder])
    health = by_name[f"{folder}/health"]
    assert (health.path, health.answer.status) == (engine.health, 200)
    if not engine.reports:
        return
    metrics = by_name[f"{folder}/metrics"]
    assert metrics.path == engine.metrics
    load = engine.load(metrics.answer.body.decode())
    assert (load.running, load.waiting) == (0, 0)
    if ENGINES[folder] == "vllm":
        assert load.kv_used == 0.0
        assert load.blocks == 364 and load.kv_tokens == 46592  # = kv_cache_size_tokens, as it says itself


def test_load_is_read_from_other_engines_metrics() -> None:
    """After their documentation: none of these was recorded."""
    expected = {"sglang": Load(3, 1, 0.28), "trtllm": Load(3, 2, 0.5, 5000, 160_000), "tei": Load(None, 7)}
    found = {file.stem: adapter(file.stem).load(json.loads(file.read_text())["metrics"]) for file in DOCUMENTED}
    assert found == expected
    assert adapter("openai").load("anything 1\n") == Load()


@pytest.mark.parametrize("file", DOCUMENTED, ids=lambda file: file.stem)
def test_what_is_documented_says_so_and_where(file: Path) -> None:
    documented = json.loads(file.read_text())
    assert "nothing was recorded" in documented["documented"]
    assert documented["sources"] and all(source.startswith("https://") for source in documented["sources"])


def test_ranks_add_up_and_fractions_are_averaged() -> None:
    text = "".join(
        f'vllm:num_requests_running{{engine="{rank}"}} {rank + 1}\nvllm:kv_cache_usage_perc{{engine="{rank}"}} 0.{rank}\n'
        for rank in range(3)
    )
    assert adapter("vllm").load(text) == Load(6, None, pytest.approx(0.1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vllm:num_requests_running NaN\n",
        "vllm:num_requests_running +Inf\nvllm:num_requests_waiting{} \n",
        "vllm:num_requests_running_total 5\n",
        'vllm:cache_config_info{num_gpu_blocks="None",block_size="16"} 1\nvllm:cache_config_info',
        "\x00\xff vllm:num_requests_running",
    ],
)
def test_what_cannot_be_read_is_absent(text: str) -> None:
    assert adapter("vllm").load(text) == Load()


def test_an_unknown_adapter_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown adapter 'vlmm'; known: vllm, "):
        adapter("vlmm")


def test_the_table_in_the_documentation_has_every_adapter() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    for name, each in ADAPTERS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{each.health}`" in row
        for metric in (each.running, each.waiting, each.kv_used):
            assert not metric or f"`{metric}`" in row, metric
