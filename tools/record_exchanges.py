"""Record HTTP exchanges with the real engines of this machine, byte for byte, for adapters to be tested against.

``.venv/bin/python tools/record_exchanges.py vllm`` (or ``llamacpp``) starts the engines, asks each the questions below
and writes one JSON file for each into ``tests/live/exchanges/<engine>-<version>/``. An engine that needs another environment
is started by hand: ``record_exchanges.py infinity VERSION URL`` asks the one that is there, which serves MiniLM as minilm.

* ``request``: everything that was sent, as text;
* ``response``: a list of ``[milliseconds since the request was sent, what one read of the socket returned]``.

Bytes are written as Latin-1, one character a byte, for a read may end inside a character of UTF-8:
``text.encode("latin-1")`` gives them back, chunked framing included.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import live_engines

EXCHANGES: Final = live_engines.ROOT / "tests/live/exchanges"
TIMEOUT_S: Final = 60.0
FATAL_READS: Final = 5

FRANCE: Final = [{"role": "user", "content": "What is the capital of France?"}]
GREEK: Final = [{"role": "user", "content": "Repeat after me: α β γ → naïve café 🙂"}]
LONG: Final = "word " * 2200
"""More tokens than any of the models here takes."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request: a dict is sent as JSON, bytes as they are, ``None`` as no body."""

    name: str
    path: str
    body: Mapping[str, Any] | bytes | None = None
    method: str = "POST"
    headers: tuple[str, ...] = ()
    fatal: bool = False
    """Whether vLLM's worker process is killed after ``FATAL_READS`` reads; nothing can be asked after it."""


def chat(name: str, **fields: Any) -> Question:
    """A chat completion of at most 12 tokens, without randomness."""
    return Question(name, "/v1/chat/completions", {"messages": FRANCE, "max_tokens": 12, "temperature": 0} | fields)


def completion(name: str, **fields: Any) -> Question:
    """A completion of at most 6 tokens, without randomness."""
    defaults = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    return Question(name, "/v1/completions", defaults | fields)


def get(name: str, path: str) -> Question:
    """A request without a body."""
    return Question(name, path, method="GET")


USAGE: Final = {"stream": True, "stream_options": {"include_usage": True}}

TEXT: Final = (
    get("health", "/health"),
    get("models", "/v1/models"),
    chat("chat"),
    chat("chat-stream", stream=True),
    chat("chat-stream-usage", **USAGE),
    chat("chat-stream-unicode", messages=GREEK, **USAGE),
    chat("chat-two-choices", n=2, temperature=1, seed=1),
    completion("completion"),
    completion("completion-stream-usage", **USAGE),
    completion("completion-token-ids", prompt=[504, 3575, 282, 4649, 314]),
    completion("completion-two-prompts", prompt=["The capital of France is", "The capital of Italy is"]),
    completion("completion-exact-length", ignore_eos=True, min_tokens=9, max_tokens=9),
    chat("unknown-model", model="no-such-model"),
    chat("error-wrong-type", messages="not a list"),
    chat("error-prompt-too-long", messages=[{"role": "user", "content": LONG}]),
    chat("error-prompt-too-long-stream", messages=[{"role": "user", "content": LONG}], stream=True),
    chat("error-temperature-not-a-number", temperature="hot"),
    Question("error-bad-json", "/v1/chat/completions", b'{"model": "smollm2-135m", "messages": ['),
    Question("error-not-utf8", "/v1/chat/completions", b'{"model": "\xff\xfe"}'),
    Question("error-no-such-path", "/v1/nothing", {}),
    get("error-wrong-method", "/v1/chat/completions"),
    Question("error-embeddings-of-a-text-model", "/v1/embeddings", {"input": "hello"}),
)

EMBEDDINGS: Final = (
    get("embedding-models", "/v1/models"),
    Question("embedding-float", "/v1/embeddings", {"input": "hello"}),
    Question("embedding-base64", "/v1/embeddings", {"input": "hello", "encoding_format": "base64"}),
    Question(
        "embedding-batch-base64", "/v1/embeddings", {"input": ["one", "two", "three"], "encoding_format": "base64"}
    ),
    Question(
        "embedding-token-ids", "/v1/embeddings", {"input": [[101, 7592, 102], [101, 102]], "encoding_format": "base64"}
    ),
    Question("error-embedding-too-long", "/v1/embeddings", {"input": LONG}),
    Question("error-embedding-empty", "/v1/embeddings", {"input": []}),
    Question("error-embedding-wrong-type", "/v1/embeddings", {"input": 5}),
    Question("embedding-unknown-model", "/v1/embeddings", {"input": "hello", "model": "no-such-model"}),
    Question("chat-with-an-embedding-model", "/v1/chat/completions", {"messages": FRANCE}),
    get("embedding-metrics", "/metrics"),
)

ENGINES: Final[Mapping[str, Mapping[str, Sequence[Question]]]] = {
    "vllm": {
        "smollm2": (
            *TEXT,
            get("version", "/version"),
            get("load", "/load"),
            get("ping", "/ping"),
            Question("tokenize", "/tokenize", {"prompt": "The capital of France is"}),
            Question("tokenize-chat", "/tokenize", {"messages": FRANCE}),
            chat(
                "chat-stream-continuous-usage",
                stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True},
            ),
            chat("chat-stream-interval", stream_interval=4, **USAGE),
            chat("chat-priority", priority=-3),
            chat("error-max-tokens-negative", max_tokens=-1),
            chat("error-max-tokens-over-the-context", max_tokens=5000),
            completion("completion-return-token-ids", return_token_ids=True),
            Question(
                "completion-request-id",
                "/v1/completions",
                {"prompt": "A", "max_tokens": 1},
                headers=("x-request-id: 77",),
            ),
            get("metrics", "/metrics"),
            Question(
                "completion-stream-engine-dies",
                "/v1/completions",
                {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True},
                fatal=True,
            ),
        ),
        "minilm": EMBEDDINGS,
    },
    "llamacpp": {
        "llamacpp": (
            *TEXT,
            get("props", "/props"),
            get("slots", "/slots"),
            Question("tokenize", "/tokenize", {"content": "The capital of France is"}),
            get("metrics", "/metrics"),
        ),
        "llamacpp-embeddings": EMBEDDINGS,
    },
    "infinity": {
        "minilm": (
            get("health", "/health"),
            *(replace(question, path=question.path.removeprefix("/v1")) for question in EMBEDDINGS),
            Question("error-bad-json", "/embeddings", b'{"model": "minilm", "input": ['),
            Question("error-with-the-usual-prefix", "/v1/embeddings", {"input": "hello"}),
        ),
    },
}


def main(engine: str) -> None:
    """Record everything of ``engine``, replacing what was recorded of the same version before."""
    version = live_engines.version(engine)
    folder = emptied(engine, version)
    logs = live_engines.ROOT / ".sage/logs/live"
    started = [live_engines.start(recipe, core % 2, logs) for core, recipe in enumerate(ENGINES[engine])]
    try:
        for running in started:
            running.wait()
            for question in ENGINES[engine][running.name]:
                record(folder, question, running.model, lambda sent: answer(running, question, sent))  # noqa: B023
    finally:
        for running in started:
            running.stop()


def main_there(engine: str, version: str, url: str) -> None:
    """The same of an engine that somebody has started."""
    folder = emptied(engine, version)
    port = urlsplit(url).port
    assert port is not None
    for model, questions in ENGINES[engine].items():
        for question in questions:
            record(folder, question, model, lambda sent: ask(port, sent))


def emptied(engine: str, version: str) -> Path:
    folder = EXCHANGES / f"{engine}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def record(
    folder: Path, question: Question, model: str, asked: Callable[[bytes], Iterator[tuple[float, bytes]]]
) -> None:
    """Ask one question and write its file."""
    request = encode(question, model)
    response = [[ms, data.decode("latin-1")] for ms, data in asked(request)]
    recorded = {"engine": folder.name.replace("-", " ", 1), "request": request.decode("latin-1"), "response": response}
    (folder / f"{question.name}.json").write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{folder.name}/{question.name}: {str(response[0][1]).splitlines()[0]}")


def encode(question: Question, model: str) -> bytes:
    """The request as it goes over the wire. ``model`` is filled in where the body names none."""
    body = question.body
    if isinstance(body, Mapping):
        body = json.dumps({"model": model} | dict(body)).encode()
    head = [f"{question.method} {question.path} HTTP/1.1", "host: engine", *question.headers]
    if body is not None:
        head += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + (body or b"")


def answer(running: live_engines.Engine, question: Question, request: bytes) -> Iterator[tuple[float, bytes]]:
    """What ``ask`` yields, and the death of the engine in between where the question is fatal."""
    for number, read in enumerate(ask(running.port, request), 1):
        yield read
        if question.fatal and number == FATAL_READS:
            os.kill(running.process_titled("VLLM::Worker").pid, signal.SIGKILL)


def ask(port: int, request: bytes) -> Iterator[tuple[float, bytes]]:
    """Milliseconds and bytes of each read, until the response is complete or the engine closes."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        sent = time.monotonic()
        connection.sendall(request)
        seen = b""
        while not complete(seen):
            data = connection.recv(1 << 20)
            if not data:
                return
            seen += data
            yield round(1000 * (time.monotonic() - sent), 1), data


def complete(response: bytes) -> bool:
    """Whether ``response`` is a whole one."""
    head, blank, body = response.partition(b"\r\n\r\n")
    if not blank:
        return False
    headers = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
    if b"content-length" in headers:
        return len(body) >= int(headers[b"content-length"])
    return body.endswith(b"0\r\n\r\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4) or sys.argv[1] not in ENGINES:
        raise SystemExit(f"usage: tools/record_exchanges.py {'|'.join(ENGINES)} [VERSION URL]")
    if len(sys.argv) == 4:
        main_there(*sys.argv[1:])
    else:
        main(sys.argv[1])
