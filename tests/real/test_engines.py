"""What the adapters count on, asked of the real engines: answers, streams, metrics, and that leaving frees a slot."""

from __future__ import annotations

import base64
import http.client
import json
import re
import time
import urllib.request
from typing import Any

import live_engines
import numpy as np
import pytest
from live_engines import Engine
from record_exchanges import EXCHANGES, ask

pytestmark = pytest.mark.live

CAPITAL = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
"""Over a minute of work for SmolLM2 on one core."""

LEFT_S = 20.0
"""A departure is noticed at the next iteration, 0.1 s; the rest is a machine that does other things."""


def post(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"model": engine.model} | body).encode()
    request = urllib.request.Request(engine.url + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def metrics(engine: Engine) -> dict[str, float]:
    """Every sample of ``/metrics`` by name; those that differ in labels only are added up."""
    with urllib.request.urlopen(engine.url + "/metrics", timeout=30) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def embeddings(engine: Engine, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    answer = post(engine, "/v1/embeddings", {"input": texts})
    return np.array([row["embedding"] for row in sorted(answer["data"], key=lambda row: int(row["index"]))])


def test_vllm_answers_a_question(smollm2: Engine) -> None:
    answer = post(smollm2, "/v1/chat/completions", CAPITAL | {"max_tokens": 16})
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_vllm_streams_a_token_an_event(smollm2: Engine) -> None:
    body = CAPITAL | {"max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps({"model": smollm2.model} | body).encode()
    request = urllib.request.Request(smollm2.url + "/v1/chat/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        events = [line.removeprefix(b"data: ").strip() for line in response if line.strip()]
    assert events.pop() == b"[DONE]"
    chunks = [json.loads(event) for event in events]
    usage = chunks.pop()["usage"]
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert "Paris" in "".join(pieces)
    # The first event opens the message; each other one is a token, the one that ends it included.
    assert len(chunks) == usage["completion_tokens"] + 1


@pytest.mark.parametrize("name", ["smollm2", "llamacpp"])
def test_a_completion_can_be_had_at_an_exact_length(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    exact = {"prompt": [504, 3575, 282, 4649, 314], "max_tokens": 33, "min_tokens": 33, "ignore_eos": True}
    usage = post(engine, "/v1/completions", exact)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 33)


def test_minilm_embeds(minilm: Engine) -> None:
    cat, kitten, tax = embeddings(
        minilm, ["A cat sat on the mat.", "A kitten rests on a rug.", "The tax return is late."]
    )
    assert np.linalg.norm([cat, kitten, tax], axis=1) == pytest.approx(1.0, abs=1e-4)
    assert cat @ kitten > 0.5 > 0.2 > cat @ tax


def test_base64_is_the_same_vector(minilm: Engine) -> None:
    (floats,) = embeddings(minilm, ["hello"])
    answer = post(minilm, "/v1/embeddings", {"input": "hello", "encoding_format": "base64"})
    packed = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    assert packed == pytest.approx(floats, abs=1e-6)


def test_vllm_tells_its_state(smollm2: Engine) -> None:
    before = metrics(smollm2)
    post(smollm2, "/v1/completions", {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True})
    after = metrics(smollm2)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 5
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert {"vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"} < set(after)


def test_llamacpp_completes_and_tells_its_state(llamacpp: Engine) -> None:
    answer = post(
        llamacpp, "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    )
    assert "Paris" in answer["choices"][0]["text"]
    assert {"llamacpp:requests_processing", "llamacpp:requests_deferred"} < set(metrics(llamacpp))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream: bool, smollm2: Engine) -> None:
    body = json.dumps({"model": smollm2.model, "stream": stream} | ENDLESS).encode()
    before = metrics(smollm2)["vllm:generation_tokens_total"]
    connection = http.client.HTTPConnection("127.0.0.1", smollm2.port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    until(smollm2, "vllm:num_requests_running", 1)
    connection.close()
    until(smollm2, "vllm:num_requests_running", 0)
    assert metrics(smollm2)["vllm:generation_tokens_total"] - before < 1000


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        (fixture, name)
        for fixture, names in {
            "smollm2": ("models", "chat", "completion", "completion-request-id", "unknown-model", "error-wrong-type"),
            "minilm": ("embedding-float", "embedding-base64", "embedding-unknown-model", "error-embedding-too-long"),
            "llamacpp": ("models", "chat", "completion", "error-wrong-type", "error-prompt-too-long"),
        }.items()
        for name in names
    ],
)
def test_recordings_are_what_the_engine_says_today(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(fixture)
    kind = "llamacpp" if fixture == "llamacpp" else "vllm"
    file = EXCHANGES / f"{kind}-{live_engines.version(kind)}" / f"{name}.json"
    recorded = json.loads(file.read_text())
    told = b"".join(data for _, data in ask(engine.port, recorded["request"].encode("latin-1")))
    assert outline(told) == outline("".join(data for _, data in recorded["response"]).encode("latin-1"))


def outline(response: bytes) -> tuple[bytes, set[bytes], Any]:
    """Status line, names of headers, and the body with every value replaced by its type."""
    head, _, body = response.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    return status, {header.partition(b":")[0] for header in headers}, shape(json.loads(body))


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


def until(engine: Engine, name: str, value: float) -> None:
    """Return once the metric has the value; the engine is what is waited for, so each look is a look at it."""
    give_up = time.monotonic() + LEFT_S
    while metrics(engine)[name] != value:
        assert time.monotonic() < give_up, f"{name} was not {value} within {LEFT_S} s"
