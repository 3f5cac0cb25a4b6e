"""An index of this project's own pages by real vectors: a question finds the page that answers it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_engines import Engine

from sage_bench.client import UnifiedInferenceClient
from sage_bench.indexing import Build, build_index, embed_query
from sage_live.retrieval.corpus import documents
from sage_live.retrieval.index import VectorIndex
from sage_live.retrieval.rerank import rerank

pytestmark = pytest.mark.live

DOCS = Path(__file__).resolve().parents[2] / "docs"

QUESTIONS = {
    "How do I measure a profile of my own engine?": "calibrate.md",
    "What happens to an engine that fails its health checks?": "health.md",
    "Which Python class do programs use to ask for chat and embeddings?": "client.md",
    "What would another policy have done with the same recorded requests?": "whatif.md",
    "How do I add an API key for a tenant?": "gateway.md",
    "Import of a BurstGPT trace": "loads.md",
    "llama.cpp embeddings adapter": "adapters.md",
    "What is goodput?": "metrics.md",
}


@pytest.fixture(scope="module")
def client(minilm: Engine) -> Iterator[UnifiedInferenceClient]:
    with contextlib.closing(UnifiedInferenceClient.create(engines=[f"{minilm.url},kind=embedding"])) as client:
        yield client


@pytest.fixture(scope="module")
def index(client: UnifiedInferenceClient, tmp_path_factory: pytest.TempPathFactory) -> VectorIndex:
    folder = tmp_path_factory.mktemp("index")
    build_index(documents(DOCS), client, Build(), folder=folder)
    return VectorIndex.load(folder)


def test_the_index_is_of_real_vectors(index: VectorIndex) -> None:
    assert index.dimensions == 384 and len(index) > 100 and "client.md" in index.sources


def test_questions_find_their_pages(client: UnifiedInferenceClient, index: VectorIndex) -> None:
    """Most of them: the model is small, pages change, and three hits of several hundred are few."""
    by_vector, by_both = 0, 0
    for question, page in QUESTIONS.items():
        vector = embed_query(client, index, question)
        hits = index.search(vector, 16)
        assert hits == index.exact(vector, 16)
        by_vector += page in [hit.chunk.source for hit in hits[:3]]
        by_both += page in [hit.chunk.source for hit in rerank(question, hits, 3)]
    assert min(by_vector, by_both) >= 6, (by_vector, by_both)
