"""A search that needs no folder: a thousand made-up passages, indexed in memory when they are first asked for.

For live runs on emulated engines, whose vectors mean nothing: what is real is the search and the ranking, not what they find.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sage_bench.emulate import DIMENSIONS
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import VectorIndex
from sage_live.retrieval.rerank import rerank

PASSAGES: Final = 1000
WORDS: Final = 80
"""Of a passage; three of them are about the 490 tokens that conf/pipeline/live/rag_made_up.yaml says, at four bytes a token."""

FOUND, KEPT = 8, 3
"""As in conf/pipeline/rag.yaml."""


def passages(vector: NDArray[np.float32], question: str) -> str:
    """The three passages that fit ``question`` best of the eight nearest to ``vector``, (384,), a paragraph each."""
    return "\n\n".join(hit.chunk.text for hit in rerank(question, _index().search(vector, FOUND), KEPT))


@functools.cache
def _index() -> VectorIndex:
    draws = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(500)])
    texts = [" ".join(words[draws.integers(0, len(words), WORDS)]) for _ in range(PASSAGES)]
    chunks = [Chunk(text, f"made-up-{number}", 0, number) for number, text in enumerate(texts)]
    return VectorIndex.build(draws.standard_normal((PASSAGES, DIMENSIONS)).astype(np.float32), chunks, model="embed")
