"""A second ranking of hits, by words, and the fusion of both: no model, a few microseconds a hit.

Vectors find what means the same, words what is called the same; names, flags and error codes are where the two differ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from sage_core.errors import ConfigError
from sage_live.retrieval.index import Hit

K1: Final = 1.2
B: Final = 0.75
"""Saturation of repeated words, and how much long texts are discounted: the usual values."""

RANK_OFFSET: Final = 60
"""Of reciprocal rank fusion, from Cormack et al., SIGIR 2009."""

_TERM: Final = re.compile(r"\w+")


def rerank(query: str, hits: Sequence[Hit], k: int | None = None) -> list[Hit]:
    """The best ``k`` of ``hits``, or all, by rank in their order (``search`` gives that of the cosine) fused with rank by
    BM25. ``score`` is then the fused one. ConfigError for k below 1."""
    if k is not None and k < 1:
        raise ConfigError(f"k: expected 1 or more hits, got {k}")
    scores = bm25(query, [hit.chunk.text for hit in hits])
    by_words = sorted((place for place in range(len(hits)) if scores[place] > 0), key=lambda place: -scores[place])
    fused = fuse([range(len(hits)), by_words], len(hits))
    order = sorted(range(len(hits)), key=lambda place: -fused[place])  # stable: ties stay in the order of the search
    return [Hit(hits[place].chunk, fused[place]) for place in order[:k]]


def bm25(query: str, texts: Sequence[str], *, k1: float = K1, b: float = B) -> list[float]:
    """Okapi BM25 of each text, the texts being the whole collection; 0 where no word of the query is.

    Robertson & Zaragoza 2009, with the rarity ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative. A word of the
    query counts once.
    """
    counts = [Counter(terms(text)) for text in texts]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    scores = [0.0] * len(texts)
    for term in dict.fromkeys(terms(query)):
        having = [place for place, count in enumerate(counts) if term in count]
        rarity = math.log(1 + (len(texts) - len(having) + 0.5) / (len(having) + 0.5))
        for place in having:
            often = counts[place][term]
            scores[place] += rarity * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths[place] / mean))
    return scores


def fuse(rankings: Sequence[Sequence[int]], count: int) -> list[float]:
    """Reciprocal rank fusion: for each of ``count`` items the sum over rankings of 1 / (60 + rank), ranks from 1. An item
    that a ranking leaves out gets nothing from it."""
    scores = [0.0] * count
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] += 1 / (RANK_OFFSET + rank)
    return scores


def terms(text: str) -> list[str]:
    """Words in lower case, letters, digits and underscores."""
    return _TERM.findall(text.lower())
