"""Real engines behind the gateway: what a user of OpenAI's client does, what an operator does, and the replay of it all.

The tests share one gateway, which records; they run in order, and the last one stops it and replays what it decided.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import live_engines
import numpy as np
import openai
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from live_engines import Engine

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parent.parent.parent
LLM, EMBEDDING, SMALL = "smollm2-135m", "minilm", "tiny-random"
CROWD = 200


class Gateway:
    """``sage gateway start`` as a process, with its record in ``folder``."""

    def __init__(self, folder: Path, *engines: str, arguments: tuple[str, ...] = ()) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "sage_bench", "gateway", "start", "--port", "0", "--record", str(folder)]
        for engine in engines:
            command += ["--engine", engine]
        self.process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = line.split()[2].removesuffix(",").removesuffix("/v1")
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def engines(self) -> dict[str, dict[str, Any]]:
        return {engine["name"]: engine for engine in self.ask("/v1/management/engines")["data"]}

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return out


def until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def gateway(
    smollm2: Engine, minilm: Engine, tiny_random: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    made = Gateway(
        tmp_path_factory.mktemp("recorded") / "run",
        f"{smollm2.url},name=smollm2,priority_scheduling=true",
        f"{minilm.url},kind=embedding,name=minilm",
        f"{tiny_random.url},name=tiny",
    )
    try:
        until(lambda: all(each["state"] == "healthy" for each in made.engines().values()), "engines are not healthy")
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()


def test_models_are_those_of_the_engines(gateway: Gateway) -> None:
    assert {card.id for card in gateway.client.models.list()} == {LLM, EMBEDDING, SMALL}


def test_chat_answers(gateway: Gateway) -> None:
    answer = gateway.client.chat.completions.create(
        model=LLM,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None and answer.usage.completion_tokens <= 16


def test_a_stream_is_the_same_text_in_pieces(gateway: Gateway) -> None:
    asked: dict[str, Any] = {"model": LLM, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 12}
    whole = gateway.client.completions.create(**asked).choices[0].text
    chunks = list(gateway.client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 6, "the pieces came together"
    assert all(chunk.usage is None for chunk in chunks), "the client did not ask for usage"
    told = list(gateway.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert told[-1].usage is not None and told[-1].usage.completion_tokens == 12


def test_embeddings_are_those_of_the_engine(gateway: Gateway, minilm: Engine) -> None:
    texts = ["a cat sat on the mat", "a kitten lay on the rug", "stock markets fell sharply"]
    direct = openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none")
    ours, theirs = (
        np.array([row.embedding for row in client.embeddings.create(model=EMBEDDING, input=texts).data])
        for client in (gateway.client, direct)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[0] @ ours[1] > ours[0] @ ours[2]


def test_embeddings_of_many_clients_keep_their_order(gateway: Gateway) -> None:
    texts = [f"text number {number}" for number in range(24)]
    alone = gateway.client.embeddings.create(model=EMBEDDING, input=texts)
    with ThreadPoolExecutor(12) as pool:
        each = list(pool.map(lambda text: gateway.client.embeddings.create(model=EMBEDDING, input=text), texts))
    for row, answer in zip(alone.data, each, strict=True):
        np.testing.assert_allclose(row.embedding, answer.data[0].embedding, atol=1e-3)


def test_errors_are_the_engines_own_or_ours(gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError, match="nonesuch"):
        gateway.client.completions.create(model="nonesuch", prompt="x")
    with pytest.raises(openai.BadRequestError, match=r"context length|maximum"):
        gateway.client.completions.create(model=LLM, prompt="word " * 4000, max_tokens=4)


def test_a_client_that_leaves_frees_its_place_in_the_engine(gateway: Gateway, smollm2: Engine) -> None:
    def running() -> float:
        with urllib.request.urlopen(f"{smollm2.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    async def leave(stream: bool) -> None:
        client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        asked = client.completions.create(
            model=LLM, prompt="Tell me a long story.", max_tokens=1500, stream=stream, extra_body={"ignore_eos": True}
        )
        task: asyncio.Task[Any] = asyncio.ensure_future(asked)
        await asyncio.to_thread(until, lambda: running() >= 1, "the engine never started")
        if stream:
            answer = await task
            await anext(aiter(answer))
            await answer.close()
        else:
            task.cancel()
        await client.close()

    for stream in (True, False):
        asyncio.run(leave(stream))
        until(lambda: running() == 0, "the engine goes on for a client that has left", 10.0)
        until(lambda: gateway.engines()["smollm2"]["in_flight"] == 0, "the gateway counts it still", 10.0)


def test_a_crowd_and_a_change_of_policy(gateway: Gateway) -> None:
    """CROWD requests of mixed kinds, the policy switched in the middle; everything is answered."""
    before = gateway.ask("/v1/management/queue")["counts"]
    assert gateway.ask("/v1/management/policy")["name"] == "hybrid"

    def one(number: int) -> int:
        if number == CROWD // 2:
            gateway.ask("/v1/management/policy", "PUT", {"name": "fifo"})
        headers = {"x-sage-tenant": f"tenant-{number % 3}", "x-sage-priority": str(number % 2)}
        if number % 4 == 3:
            gateway.client.embeddings.create(model=EMBEDDING, input=f"text {number}", extra_headers=headers)
            return 0
        done = gateway.client.completions.create(
            model=SMALL, prompt=f"request {number} " * (1 + number % 7), max_tokens=4 + number % 9, extra_headers=headers,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert done.usage is not None
        assert done.usage.completion_tokens == 4 + number % 9
        return done.usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        tokens = sum(pool.map(one, range(CROWD)))
    assert tokens > CROWD
    after = gateway.ask("/v1/management/queue")["counts"]
    assert after["responded"] - before["responded"] == CROWD
    assert after["failed"] == before["failed"]
    assert gateway.ask("/v1/management/policy")["name"] == "fifo"


def test_an_engine_that_is_killed_loses_nothing(gateway: Gateway, tmp_path: Path) -> None:
    """A second engine of the same model, of another make, is killed while it has work: the first one answers it."""
    second = live_engines.start("llamacpp", 1, tmp_path).wait()
    try:
        gateway.ask(
            "/v1/management/engines", "POST",
            {"url": second.url, "model": LLM, "adapter": "llamacpp", "name": "second", "tasks_max": 4},
        )  # fmt: skip
        until(lambda: gateway.engines()["second"]["state"] == "healthy", "the second engine is not healthy")
        retries = gateway.ask("/v1/management/queue")["counts"]["retries"]

        def one(number: int) -> str:
            done = gateway.client.completions.create(
                model=LLM, prompt=f"Number {number} is", max_tokens=24, extra_body={"ignore_eos": True}
            )
            return done.choices[0].text

        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(one, number) for number in range(12)]
            until(lambda: gateway.engines()["second"]["in_flight"] > 0, "no work for the second engine")
            second.kill()
            assert all(answer.result() for answer in answers)
        until(lambda: gateway.engines()["second"]["state"] == "ejected", "the dead engine is still in service")
        assert gateway.ask("/v1/management/queue")["counts"]["retries"] > retries
        gateway.ask("/v1/management/engines/second", "DELETE")
        assert "second" not in gateway.engines()
    finally:
        second.stop()


def test_the_record_replays_to_the_same_decisions(gateway: Gateway) -> None:
    out = gateway.stop()
    rows = pq.read_table(gateway.folder / "requests.parquet")
    assert rows.num_rows >= CROWD
    told = pc.value_counts(rows["outcome"].cast("string")).to_pylist()
    outcomes = {each["values"]: each["counts"] for each in told}
    assert outcomes["responded"] >= CROWD and outcomes["cancelled"] >= 2
    assert sum(outcomes.values()) == rows.num_rows
    for mechanism in ("native", "reference"):
        replayed = subprocess.run(
            [sys.executable, "-m", "sage_bench", "replay", str(gateway.folder), "--mechanism", mechanism],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert replayed.returncode == 0, replayed.stderr
        assert "every digest equal" in replayed.stdout
    assert "digest" in out
