"""The embedding server: OpenAI's protocol over a small encoder of our own, and over a real model where there is one."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sage_core.errors import ConfigError
from sage_live.processes import EngineProcess
from sage_live.servers.embedding import EmbeddingServer
from sage_live.servers.encoder import SentenceEncoder


class Letters:
    """A text's vector counts its letters. A token is a letter; 99 breaks the model."""

    dimensions = 8
    tokens_max = 20
    vocabulary = 100
    shortens = True

    def __init__(self) -> None:
        self.batches: list[list[int]] = []  # lengths of their texts
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) % 26 for letter in text] for text in texts]

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.gate.wait(20)
        self.batches.append([len(ids) for ids in batch])
        if any(99 in ids for ids in batch):
            raise RuntimeError("out of memory")
        counts = np.array([np.bincount(np.array(ids) % 8, minlength=8) for ids in batch], np.float32)
        unit: NDArray[np.float32] = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return unit


@asynccontextmanager
async def serving(
    encoder: Letters, max_batch: int = 32, max_batch_tokens: int = 16384
) -> AsyncIterator[EmbeddingServer]:
    server = await EmbeddingServer.start(encoder, "letters", max_batch=max_batch, max_batch_tokens=max_batch_tokens)
    try:
        yield server
    finally:
        encoder.gate.set()
        await server.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def test_it_serves_where_the_native_part_is_not_installed() -> None:
    """As in the environment of the engines, where the model's libraries are."""
    without = "import sys; sys.modules['sage_core._native'] = None; import sage_bench.cli.embed"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


async def opened(port: int, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    writer.write(f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
    return reader, writer


async def asked(server: EmbeddingServer, path: str, body: Any = None) -> tuple[int, Any]:
    reader, writer = await opened(server.port, path, body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    raw = await reader.readexactly(length)
    writer.close()
    try:
        return int(head.split(b" ", 2)[1]), json.loads(raw)
    except ValueError:
        return int(head.split(b" ", 2)[1]), raw.decode()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


EMBEDDINGS = "/v1/embeddings"


def test_all_forms_of_input_and_encoding() -> None:
    async def main() -> None:
        async with serving(Letters()) as server:
            body = {"model": "letters", "input": ["abc", "zz", "abc"]}
            status, answer = await asked(server, EMBEDDINGS, body)
            _, packed = await asked(server, EMBEDDINGS, {**body, "encoding_format": "base64"})
            _, tokens = await asked(server, EMBEDDINGS, {"input": [[19, 20, 21], [18, 18]]})
            _, one = await asked(server, EMBEDDINGS, {"input": "zz"})
            _, ids = await asked(server, EMBEDDINGS, {"input": [18, 18]})
            _, short = await asked(server, EMBEDDINGS, {"input": "abz", "dimensions": 5})
        assert status == 200
        assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
        vectors = [item["embedding"] for item in answer["data"]]
        assert vectors[0] == vectors[2] != vectors[1]
        unpacked = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed["data"]]
        assert np.array_equal(unpacked, np.array(vectors, np.float32))
        assert [item["embedding"] for item in tokens["data"]] == vectors[:2]
        assert one["data"][0]["embedding"] == ids["data"][0]["embedding"] == vectors[1]
        (vector,) = (item["embedding"] for item in short["data"])
        assert len(vector) == 5
        assert np.linalg.norm(vector) == pytest.approx(1)

    run(main())


def test_clients_share_batches_which_are_bounded_and_sorted_by_length() -> None:
    async def main() -> None:
        encoder = Letters()
        encoder.gate.clear()
        async with serving(encoder, max_batch=4, max_batch_tokens=24) as server:
            first = asyncio.ensure_future(asked(server, EMBEDDINGS, {"input": "a"}))
            await until(encoder.entered.is_set)  # now everybody else has to wait
            texts = ["b" * (1 + 7 * n % 12) for n in range(12)]
            rest = [asyncio.ensure_future(asked(server, EMBEDDINGS, {"input": text})) for text in texts]
            await until(lambda: server.batcher.waiting == 12)
            encoder.gate.set()
            answers = await asyncio.gather(first, *rest)
        assert [status for status, _ in answers] == [200] * 13
        for text, (_, answer) in zip(["a", *texts], answers, strict=True):
            assert answer["usage"]["prompt_tokens"] == len(text)
        assert encoder.batches[0] == [1]
        assert sum(map(len, encoder.batches)) == 13
        assert sum(encoder.batches[1:], []) == sorted(map(len, texts), reverse=True)  # noqa: RUF017
        for batch in encoder.batches:
            assert len(batch) <= 4
            assert max(batch) * len(batch) <= 24
        assert len(encoder.batches) < 8

    run(main())


def test_one_request_larger_than_a_batch_keeps_its_order() -> None:
    async def main() -> None:
        encoder = Letters()
        async with serving(encoder, max_batch=3) as server:
            texts = [chr(97 + n % 8) * (1 + n % 5) for n in range(50)]
            _, answer = await asked(server, EMBEDDINGS, {"input": texts})
        for text, item in zip(texts, answer["data"], strict=True):
            assert np.argmax(item["embedding"]) == ord(text[0]) % 26 % 8
        assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))

    run(main())


def test_who_disconnects_is_skipped() -> None:
    async def main() -> None:
        encoder = Letters()
        encoder.gate.clear()
        async with serving(encoder) as server:
            first = asyncio.ensure_future(asked(server, EMBEDDINGS, {"input": "a"}))
            await until(encoder.entered.is_set)
            _, leaver = await opened(server.port, EMBEDDINGS, {"input": "bb"})
            await until(lambda: server.batcher.waiting == 1)
            leaver.close()
            assert server._http is not None
            http = server._http
            await until(lambda: http.connections == 1)
            third = asyncio.ensure_future(asked(server, EMBEDDINGS, {"input": "ccc"}))
            await until(lambda: server.batcher.waiting == 2)
            encoder.gate.set()
            assert [(await first)[0], (await third)[0]] == [200, 200]
            assert encoder.batches == [[1], [3]]
            _, text = await asked(server, "/metrics")
            assert 'sage_embed_skipped_total{model_name="letters"} 1' in text
            assert 'sage_embed_texts_total{model_name="letters"} 2' in text

    run(main())


def test_a_model_that_fails_fails_its_batch_and_goes_on() -> None:
    async def main() -> None:
        async with serving(Letters()) as server:
            status, answer = await asked(server, EMBEDDINGS, {"input": [[99]]})
            assert status == 500
            assert answer["error"]["type"] == "server_error"
            assert (await asked(server, EMBEDDINGS, {"input": "fine"}))[0] == 200

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"input": "a" * 21}, 400, "maximum context length is 20"),
        ({"input": [[100]]}, 400, "below 100"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "empty"),
        ({"input": [["a"]]}, 400, "input"),
        ({"input": 3}, 400, "input"),
        ({"input": "a", "dimensions": 9}, 400, "dimensions"),
        ({"input": "a", "model": "other"}, 404, "other"),
        ({"input": "a", "encoding_format": "hex"}, 400, "hex"),
    ],
)
def test_what_is_wrong_is_told(body: Any, status: int, said: str) -> None:
    async def main() -> None:
        async with serving(Letters()) as server:
            got, answer = await asked(server, EMBEDDINGS, body)
            assert got == status
            assert said in answer["error"]["message"]
            assert (await asked(server, EMBEDDINGS, {"input": "fine"}))[0] == 200

    run(main())


def test_the_model_is_listed_and_healthy() -> None:
    async def main() -> None:
        async with serving(Letters()) as server:
            _, models = await asked(server, "/v1/models")
            assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("letters", 20)]
            assert (await asked(server, "/health"))[0] == 200

    run(main())


def test_without_the_library_the_error_says_what_to_install() -> None:
    try:
        import sentence_transformers  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install sentence-transformers"):
            SentenceEncoder("some-model")
    else:
        pytest.skip("sentence-transformers is installed here")


@pytest.mark.live
def test_a_real_model_embeds(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    python, model = root / ".sage/live/bin/python", root / ".sage/models/minilm"
    if not (python.exists() and model.exists()):
        pytest.skip("no sentence-transformers in .sage/live, or no MiniLM in .sage/models: run `make install-live`")

    def embed(url: str, texts: Sequence[str]) -> tuple[NDArray[np.float64], int]:
        body = json.dumps({"model": "minilm", "input": texts}).encode()
        with urllib.request.urlopen(f"{url}/v1/embeddings", body, timeout=60) as answer:
            told = json.load(answer)
        return np.array([item["embedding"] for item in told["data"]]), told["usage"]["prompt_tokens"]

    async def main() -> None:
        with_port = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = with_port.sockets[0].getsockname()[1]
        with_port.close()
        command = [str(python), "-m", "sage_bench.cli.embed", "serve", str(model), "--model", "minilm"]
        engine = await EngineProcess.start(
            "embed", [*command, "--port", str(port), "--threads", "1"], port=port, logs=tmp_path, cwd=root
        )
        try:
            texts = ["A cat sat on the mat.", "A kitten rested on a rug.", "The treaty was signed in 1648."]
            vectors, tokens = await asyncio.to_thread(embed, engine.url, texts)
            alone, _ = await asyncio.to_thread(embed, engine.url, texts[2:])
        finally:
            await engine.stop()
        assert vectors.shape == (3, 384)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]
        assert np.allclose(vectors[2], alone[0], atol=1e-5)  # padding changes nothing
        assert 3 * 6 < tokens < 3 * 15

    asyncio.run(asyncio.wait_for(main(), 180))
