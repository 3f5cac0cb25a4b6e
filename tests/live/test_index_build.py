"""Building an index through the control plane: an embedding server, a gateway's plane in this process, the command."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from sage_bench.cli.index import app
from sage_bench.client import UnifiedInferenceClient
from sage_bench.indexing import Build, build_index, embed_query
from sage_core.errors import ConfigError, DataError, EngineError, SageError
from sage_live.retrieval.chunk import Chunk, Chunking
from sage_live.retrieval.corpus import documents
from sage_live.retrieval.index import VectorIndex
from sage_live.servers.embedding import EmbeddingServer

_T = TypeVar("_T")

WAIT_S = 60.0
DIMENSIONS = 256


class WordCounts:
    """An encoder of our own: a text's vector counts its words, hashed; so texts with common words are near. A token is a
    word."""

    dimensions = DIMENSIONS
    tokens_max = 30
    vocabulary = 1 << 32
    shortens = False

    def __init__(self) -> None:
        self.texts = 0
        self.breaks = False
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[zlib.crc32(word.strip(".,").lower().encode()) for word in text.split()] for text in texts]

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.texts += len(batch)
        counts = [np.bincount(np.array(ids) % DIMENSIONS, minlength=DIMENSIONS) for ids in batch]
        unit: NDArray[np.float32] = np.array([each / np.linalg.norm(each) for each in counts], np.float32)
        return np.full_like(unit, np.nan) if self.breaks else unit


class Site:
    """The server in a loop of its own, as it would be in a process of its own."""

    def __init__(self) -> None:
        self.encoder = WordCounts()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(EmbeddingServer.start(self.encoder, "words"))
        self.url = f"http://127.0.0.1:{self._server.port}"

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def close(self) -> None:
        self.encoder.gate.set()
        self._run(self._server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def client(site: Site) -> Iterator[UnifiedInferenceClient]:
    """With a control plane in this process."""
    with UnifiedInferenceClient.create(engines=[f"{site.url},kind=embedding,adapter=sage"], wait_s=WAIT_S) as client:
        yield client


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.md").write_text(f"Chapter{number} tells of animal{number}. " * 9)
    (folder / "cats.txt").write_text("A cat is a small animal that purrs and hunts at night.")
    return folder


SMALL = Build(chunking=Chunking(words=12, overlap=2), batch=4, in_flight=3)


def test_every_chunk_has_its_own_vector(client: UnifiedInferenceClient, texts: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = build_index(
        documents(texts), client, SMALL, folder=tmp_path / "index", tell=lambda done, of: told.append((done, of))
    )
    index = VectorIndex.load(tmp_path / "index")
    assert (len(index), index.dimensions, index.model) == (len(made), DIMENSIONS, "words")
    assert index.chunking == {"words": 12, "overlap": 2, "tokens": 220}
    assert index.sources == [*(f"{number:02}.md" for number in range(12)), "cats.txt"]
    each_has_its_own_vector(index)
    assert told[0] == (0, len(index)) and told[-1] == (len(index), len(index))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    query = embed_query(client, index, "which animal purrs at night")
    assert index.search(query, 1)[0].chunk.source == "cats.txt"


def test_requests_in_flight_are_bounded(site: Site, client: UnifiedInferenceClient, texts: Path) -> None:
    site.encoder.gate.clear()
    seen: list[int] = []

    def watch() -> None:
        assert site.encoder.entered.wait(WAIT_S)
        batcher = site._server.batcher
        # What is underway, sampled while the encoder stands still: all that will come until it goes on.
        for _ in range(50):
            seen.append(batcher.running + batcher.waiting)
            threading.Event().wait(0.005)
        site.encoder.gate.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    build_index(documents(texts), client, SMALL)
    watcher.join(WAIT_S)
    assert 0 < max(seen) <= SMALL.batch * SMALL.in_flight


def test_answers_out_of_order_go_to_their_chunks(site: Site, texts: Path) -> None:
    other = Site()
    try:
        engines = [f"{each.url},kind=embedding,adapter=sage" for each in (site, other)]
        site.encoder.gate.clear()

        def tell(done: int, of: int) -> None:
            if done:  # the other engine has answered
                site.encoder.gate.set()

        with UnifiedInferenceClient.create(engines=engines, wait_s=WAIT_S) as client:
            index = build_index(documents(texts), client, SMALL, tell=tell)
    finally:
        other.close()
    assert site.encoder.texts and other.encoder.texts
    each_has_its_own_vector(index)


def each_has_its_own_vector(index: VectorIndex) -> None:
    encode = WordCounts()
    for hit in index.exact(np.ones(DIMENSIONS, np.float32), len(index)):  # every chunk of it
        (own,) = encode.encode(encode.tokenize([hit.chunk.text]))
        best = index.exact(own, 1)[0]
        assert best.score == pytest.approx(1, abs=1e-5)
        assert sorted(best.chunk.text.split()) == sorted(hit.chunk.text.split())  # their order is not in the vector


def test_a_chunk_that_is_too_long_for_the_model_gets_the_mean_of_its_parts(
    site: Site, client: UnifiedInferenceClient
) -> None:
    left, right = "cat " * 28, "dog " * 14
    index = build_index([("d", left + right)], client, Build())
    assert len(index) == 1
    cat, dog = (embed_query(client, index, word) for word in ("cat", "dog"))
    scores = [index.exact(vector, 1)[0].score for vector in (cat, dog)]
    assert scores[0] > scores[1] > 0.3
    # The others of its batch are not touched.
    index = build_index([("a", "dog"), ("d", left + right), ("e", "cat")], client, Build())
    assert [hit.chunk.source for hit in index.exact(cat, 3)] == ["e", "d", "a"]


def test_a_text_that_is_refused_however_short_is_named(
    site: Site, client: UnifiedInferenceClient, texts: Path, tmp_path: Path
) -> None:
    site.encoder.tokens_max = 0
    with pytest.raises(DataError) as error:
        build_index(documents(texts), client, SMALL, folder=tmp_path / "index")
    assert str(error.value).startswith("00.md: the text at character 0 was refused by words, however short: ")
    assert not (tmp_path / "index").exists()


def test_vectors_that_are_none_are_an_error_and_the_old_index_stays(
    site: Site, client: UnifiedInferenceClient, texts: Path, tmp_path: Path
) -> None:
    build_index(documents(texts), client, SMALL, folder=tmp_path / "index")
    before = (tmp_path / "index" / "manifest.json").read_bytes()
    index = VectorIndex.load(tmp_path / "index")
    site.encoder.breaks = True
    with pytest.raises(DataError, match="words: a vector has NaN or infinite components"):
        build_index(documents(texts), client, SMALL, folder=tmp_path / "index")
    with pytest.raises(DataError, match="words: a vector has NaN"):
        embed_query(client, index, "cat")
    assert (tmp_path / "index" / "manifest.json").read_bytes() == before


def test_a_model_of_other_dimensions_is_told(client: UnifiedInferenceClient) -> None:
    index = VectorIndex.build(np.eye(8, dtype=np.float32)[:1], [Chunk("a", "d", 0, 0)], model="words")
    with pytest.raises(DataError, match=r"1 texts gave vectors of shape \(1, 256\), expected \(1, 8\)"):
        embed_query(client, index, "cat")


def test_nothing_is_asked_before_all_settings_are_right(
    site: Site, client: UnifiedInferenceClient, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for build, folder, texts, told in (
        (Build(batch=0), None, [("d", "a")], "batch: expected 1 or more"),
        (Build(in_flight=0), None, [("d", "a")], "in_flight: expected 1 or more"),
        (Build(chunking=Chunking(words=0)), None, [("d", "a")], "words: expected"),
        (Build(), tmp_path, [("d", "a")], "neither empty nor an index"),
        (Build(), None, [("d", " ")], "not a word in them"),
    ):
        with pytest.raises(SageError, match=told):
            build_index(texts, client, build, folder=folder)
    with pytest.raises(ConfigError, match="query: expected some words"):
        embed_query(client, build_index([("d", "a")], client, Build()), " ")
    assert site.encoder.texts == 1


# --- the command -----------------------------------------------------------------------------------------------------


def sage_index(*args: object) -> str:
    """What ``sage index`` prints; a SageError comes out as such, for ``main`` to print."""
    done = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_build_query_info(site: Site, texts: Path, tmp_path: Path) -> None:
    (texts / "broken.txt").write_bytes(b"\xff")
    out = tmp_path / "index"
    engine = ("--engine", f"{site.url},adapter=sage")
    said = sage_index("build", texts, "--out", out, *engine, "--words", 12, "--overlap", 2)
    assert said.startswith(f"{out}: ") and "chunks of 13 documents, 256 dimensions by words" in said
    said = sage_index("query", out, "which animal purrs at night", "-k", 2, *engine)
    assert "cats.txt, character 0" in said.splitlines()[0] and len(said.splitlines()) == 4
    hits = json.loads(sage_index("query", out, "which animal purrs", "--rerank", "--exact", "--json", "-k", 3, *engine))
    assert hits[0]["source"] == "cats.txt" and len(hits) == 3
    said = sage_index("info", out)
    assert "words" in said and "12 words, 2 overlap, 220 tokens" in said
    assert json.loads(sage_index("info", out, "--json"))["documents"] == 13


def test_through_a_gateway_url(site: Site, texts: Path, tmp_path: Path) -> None:
    said = sage_index(
        "build", texts, "--out", tmp_path / "index", "--url", f"{site.url}/v1", "--words", 12, "--overlap", 2
    )
    assert "256 dimensions by words" in said


def test_interrupted_it_leaves_nothing(site: Site, texts: Path, tmp_path: Path) -> None:
    site.encoder.gate.clear()
    # A shell starts what it puts into the background with interrupts ignored, this test perhaps among it.
    entry = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sage_bench.cli import main; main()"
    args = ["index", "build", texts, "--out", tmp_path / "index", "--engine", f"{site.url},adapter=sage"]
    process = subprocess.Popen([sys.executable, "-c", entry, *map(str, args)], stderr=subprocess.PIPE, text=True)
    try:
        assert site.encoder.entered.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("args", "error", "told"),
    [
        (("build", "--out", "{tmp}/i"), ConfigError, "DIR: expected a folder of documents, or --demo"),
        (("build", "{texts}", "--demo", "--out", "{tmp}/i"), ConfigError, "DIR: expected"),
        (("build", "{texts}", "--out", "{texts}"), ConfigError, "neither empty nor an index"),
        (("build", "{tmp}/absent", "--out", "{tmp}/i"), DataError, "no such folder"),
        (("build", "{texts}", "--out", "{tmp}/i", "--overlap", "90"), ConfigError, "overlap: expected 0 to 60"),
        (("build", "{texts}", "--out", "{tmp}/i", "--url", "{u}", "--engine", "{u}"), ConfigError, "not both"),
        (("build", "{texts}", "--out", "{tmp}/i", "--url", "http://127.0.0.1:9/v1"), EngineError, "127.0.0.1:9"),
        (("query", "{tmp}/absent", "x"), DataError, "no index here"),
        (("info", "{tmp}/absent"), DataError, "no index here"),
    ],
)
def test_mistakes(args: Sequence[str], error: type[SageError], told: str, texts: Path, tmp_path: Path) -> None:
    filled = [arg.format(tmp=tmp_path, texts=texts, u="http://127.0.0.1:9") for arg in args]
    with pytest.raises(error, match=told):
        sage_index(*filled)
    assert not (tmp_path / "i").exists()
