"""The baselines run: the same RAG as a script and as microservices, in processes of their own, before an emulated engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_bench.client import UnifiedInferenceClient
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import VectorIndex

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ROOT / "examples/apps/baselines"
SERVICES = BASELINES / "rag_microservices"
TEXTS = [f"Passage {n}: engine {n} is ejected after {n} failures." for n in range(20)]
# No proxy of the machine between loopback addresses.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


@contextlib.contextmanager
def serving(*command: str) -> Iterator[str]:
    """A process that prints its URL first; gives that."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield line.split()[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    options = ["--emulate", "llama-3.1-8b-h100-tp1", "--model", "llm", "--embed-model", "embed", "--port", "0"]
    with serving("-m", "sage_bench", "llm", "serve", *options, "--embed-profile", "bge-small-en-v1.5-cpu") as url:
        yield url


@pytest.fixture(scope="module")
def index(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the engine's own vectors, which are equal for equal texts."""

    with UnifiedInferenceClient.create(engine, timeout_s=20.0) as client:
        vectors = client.embed(TEXTS, model="embed").vectors
    folder = tmp_path_factory.mktemp("index") / "docs.index"
    chunks = [Chunk(text, f"{n}.md", 0, 0) for n, text in enumerate(TEXTS)]
    VectorIndex.build(np.asarray(vectors, np.float32), chunks, model="embed").save(folder)
    return folder


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BASELINES / "rag_script.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT)


def test_the_script_answers_with_sources(engine: str, index: Path) -> None:
    options = ["--index", str(index), "--embed-url", engine, "--llm-url", engine, "--llm-model", "llm"]
    done = script(*options, TEXTS[7], TEXTS[3])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n\n")
    assert first.splitlines()[2].startswith("[1] 7.md") and second.splitlines()[2].startswith("[1] 3.md")
    assert len(first.splitlines()) == len(second.splitlines()) == 5  # question, answer, three sources


def test_the_script_goes_on_to_the_next_engine_and_says_when_there_is_none(engine: str, index: Path) -> None:
    options = ["--index", str(index), "--embed-url", engine, "--llm-model", "llm"]
    nobody = "http://127.0.0.1:1"
    done = script(*options, "--llm-url", nobody, "--llm-url", engine, TEXTS[7])
    assert done.returncode == 0, done.stderr
    done = script(*options, "--llm-url", nobody, TEXTS[7])
    assert done.returncode == 1
    assert "failed: Connection error" in done.stderr and "Traceback" not in done.stderr
    done = script(
        "--index", str(index / "no"), "--embed-url", engine, "--llm-url", engine, "--llm-model", "llm", "why?"
    )
    assert done.returncode == 3 and "Traceback" not in done.stderr


def asked(url: str, content: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(content).encode(), method="POST")
    with contextlib.ExitStack() as stack:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            response = stack.enter_context(opener.open(request, timeout=30))
        except urllib.error.HTTPError as error:
            response = stack.enter_context(error)
        return response.status, json.load(response)


def test_the_microservices_answer_with_sources_and_pass_failures_on(engine: str, index: Path) -> None:
    def service(name: str, *overrides: str) -> contextlib.AbstractContextManager[str]:
        return serving(str(SERVICES / f"{name}.py"), str(SERVICES / f"{name}.yaml"), "port=0", "log=false", *overrides)

    nobody = "http://127.0.0.1:1"
    with (
        service("retriever", f"index={index}", f"engines=[{nobody}, {engine}]", "backoff_s=0.01") as retriever,
        service("generator", f"engines=[{engine}]", "model=llm") as generator,
    ):
        to = "timeout_s: 30, attempts: 2, backoff_s: 0.01"
        with service(
            "front", f"retriever={{url: {retriever}, {to}}}", f"generator={{url: {generator}, {to}}}"
        ) as front:
            for _ in range(2):  # whichever engine is the first in turn
                status, answer = asked(front, {"question": TEXTS[7]})
                assert status == 200 and answer["answer"]
                assert answer["sources"][0]["source"] == "7.md"
                assert len(answer["sources"]) == 3
            assert asked(front, {"query": "?"})[0] == 400
        with service("front", f"retriever={{url: {retriever}, {to}}}", f"generator={{url: {nobody}, {to}}}") as front:
            status, answer = asked(front, {"question": "why?"})
            assert status == 502 and nobody in answer["error"]


def test_the_declared_form_and_the_script_send_the_same_prompt(engine: str, index: Path) -> None:
    """What an emulated engine answers, and at what length, is decided by the prompt: what is compared is not the luck of it."""
    engines = [f"{engine},model=llm,pool=llm", f"{engine},model=embed,kind=embedding,pool=embed"]
    overrides = ["pipeline=rag", f"+driver.indexes.docs={index}"]
    with UnifiedInferenceClient.create(engines=engines, overrides=overrides) as client:
        declared = [client.chat(text, model="rag", max_tokens=128).text for text in TEXTS[:3]]
    done = script("--index", str(index), "--embed-url", engine, "--llm-url", engine, "--llm-model", "llm", *TEXTS[:3])
    assert [each.splitlines()[1] for each in done.stdout.strip().split("\n\n")] == declared


def test_a_service_says_which_key_is_unknown() -> None:
    command = [sys.executable, str(SERVICES / "front.py"), str(SERVICES / "front.yaml"), "prot=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "prot: no such key" in done.stderr
