"""``sage app`` as a user meets it, on emulated engines behind real sockets; and what a live run of a pipeline is told."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "live"))
from gateway_harness import EMBED, LLM, emulated

from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import VectorIndex

Sage = Callable[..., Any]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a device with both engines, in a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stack = AsyncExitStack()

    def wait(what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, loop).result(30)

    yield wait(stack.enter_async_context(emulated())).port
    wait(stack.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def engines(port: int) -> list[str]:
    return [
        *("--engine", f"http://127.0.0.1:{port},model={LLM},name=texts"),
        *("--engine", f"http://127.0.0.1:{port},model={EMBED},kind=embedding,name=vectors"),
    ]


def built(folder: Path, dimensions: int = 16) -> Path:
    rng = np.random.default_rng(5)
    chunks = [Chunk(f"passage number {n} about ports", f"doc{n % 3}.md", 0, n) for n in range(12)]
    VectorIndex.build(rng.standard_normal((12, dimensions)).astype(np.float32), chunks, model=EMBED).save(folder)
    return folder


@pytest.mark.parametrize("name", ["docs", "my docs, 2nd (copy)=x", "it's [here]"])
def test_it_answers_with_sources_from_wherever_the_index_is(
    name: str, sage: Sage, engines: list[str], tmp_path: Path
) -> None:
    done = sage("app", "rag", "--ask", "Which port?", *engines, "--index", f"docs={built(tmp_path / name)}")
    assert done.code == 0, done.err
    assert done.out.strip() and "sources: " in done.err and "doc" in done.err


def test_a_file_is_a_pipeline_wherever_it_is(sage: Sage, engines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine, 2nd (copy).yaml"
    file.write_text('name: mine\nstages:\n  answer: {op: chat, prompt: "Say: {request}"}\noutput: answer\n')
    done = sage("app", file, "--ask", "hello", *engines)
    assert done.code == 0, done.err
    assert done.out.strip()


def test_an_index_of_another_model_is_told(sage: Sage, engines: list[str], tmp_path: Path) -> None:
    done = sage("app", "rag", "--ask", "Which port?", *engines, "--index", f"docs={built(tmp_path / 'docs', 8)}")
    assert done.code != 0 and done.err.startswith("sage: ") and "dimension" in done.err, done.err


def test_a_pool_without_an_engine_is_told(sage: Sage, engines: list[str], tmp_path: Path) -> None:
    done = sage("app", "rag", "--ask", "Which port?", *engines[2:], "--index", f"docs={built(tmp_path / 'docs')}")
    assert done.code == 2 and "no engine is in pool 'llm'" in done.err, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["app", "rag"], "--ask: expected a question"),
        (["app", "rag", "--ask", " "], "--ask: expected a question"),
        (["app", "rag", "--ask", "x", "--index", "docs=x"], "--index: is for --engine"),
        (
            ["app", "rag", "--ask", "x", "--engine", "http://127.0.0.1:1", "--index", "x"],
            "--index x: expected KEY=VALUE",
        ),
        (["app", "rag", "--ask", "x", "--engine", "http://127.0.0.1:1", "--index", "docs=/no/such"], "no such folder"),
        (["app", "nosuch", "--ask", "x", "--engine", "http://127.0.0.1:1"], "no such pipeline"),
        (["gateway", "start", "--pool", "llm=m"], "say which one with --pipeline"),
        (["gateway", "start", "--pipeline", "rag", "--pool", "llmm=m"], "no op has this pool"),
        (["run", "pipeline=file"], "pipeline.path"),
        (["run", "experiment=rag", "driver=live", "load.duration_s=2"], "+driver.indexes.docs=FOLDER"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_a_mistake_is_told_in_a_line_before_anything_starts(
    arguments: list[str], message: str, sage: Sage, tmp_path: Path
) -> None:
    done = sage(*arguments)
    assert done.code == 2 and message in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("results/*/*"))


def test_a_refused_start_of_the_gateway_leaves_no_record(sage: Sage, engines: list[str], tmp_path: Path) -> None:
    pools = ("--pool", f"llm={LLM}", "--pool", f"embed={EMBED}")
    record = tmp_path / "record"
    done = sage("gateway", "start", "--pipeline", "rag", *pools, *engines, "--port", "0", "--record", record)
    assert done.code == 2 and "needs index 'docs'" in done.err, done.err
    assert not record.exists()


def test_without_a_gateway_it_says_what_else_there_is(sage: Sage) -> None:
    done = sage("app", "rag", "--ask", "hi", "--url", "http://127.0.0.1:9/v1")
    assert done.code == 10
    assert "cannot connect" in done.err and "--pipeline rag" in done.err and "--engine" in done.err
