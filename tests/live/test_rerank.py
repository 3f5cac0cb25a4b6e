"""Ranking by words, and fusing it with ranking by vectors: against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import Hit
from sage_live.retrieval.rerank import bm25, fuse, rerank


def hits_of(*texts: str) -> list[Hit]:
    return [Hit(Chunk(text, "d", 0, number), 1 - number / 100) for number, text in enumerate(texts)]


def test_bm25_by_hand() -> None:
    # Lengths 2, 4, 3: mean 3. "cat" is in 2 of 3 texts: rarity ln(1 + 1.5 / 2.5) = ln 1.6; "mat" in 1: ln(1 + 2.5 / 1.5).
    texts = ["a cat", "cat and cat mat", "the dog barks"]
    cat, mat = math.log(1.6), math.log(1 + 2.5 / 1.5)
    first = cat * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))
    second = cat * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3)) + mat * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 4 / 3))
    assert bm25("Cat, MAT! cat", texts) == pytest.approx([first, second, 0.0])
    assert bm25("cat", texts)[0] == pytest.approx(0.5442147)


def test_bm25_of_nothing() -> None:
    assert bm25("cat", []) == []
    assert bm25("cat", ["", "..."]) == [0, 0]
    assert bm25("", ["cat"]) == [0]


def test_rare_words_and_short_texts_count_for_more() -> None:
    common, rare = bm25("x y", ["x a", "y a", "x b", "x c"])[:2]
    assert rare > common > 0
    short, long = bm25("x", ["x a", "x a b c d e f"])
    assert short > long > 0


def test_fusion_by_hand() -> None:
    assert fuse([[0, 1, 2], [2, 0]], 4) == pytest.approx([1 / 61 + 1 / 62, 1 / 62, 1 / 63 + 1 / 61, 0])


def test_a_word_brings_a_hit_up() -> None:
    hits = hits_of("restart the engine", "the queue is long", "exit code E4711 means", "nothing of it")
    again = rerank("what about E4711", hits)
    assert again[0].chunk.number == 2 and {hit.chunk for hit in again} == {hit.chunk for hit in hits}
    assert again[0].score == pytest.approx(1 / 63 + 1 / 61)
    assert rerank("what about E4711", hits, 1) == again[:1]


def test_without_common_words_the_order_stays() -> None:
    hits = hits_of("a", "b", "c")
    assert [hit.chunk.number for hit in rerank("zebra", hits)] == [0, 1, 2]
    assert rerank("zebra", []) == []
    with pytest.raises(ConfigError, match="k: expected 1 or more"):
        rerank("zebra", hits, 0)


@given(st.text(max_size=30), st.lists(st.text(max_size=40), max_size=8))
def test_reranking_is_a_permutation_with_falling_scores(query: str, texts: list[str]) -> None:
    hits = hits_of(*texts)
    again = rerank(query, hits)
    assert sorted(hit.chunk.number for hit in again) == list(range(len(texts)))
    scores = [hit.score for hit in again]
    assert scores == sorted(scores, reverse=True)
    assert all(math.isfinite(score) and score >= 0 for score in bm25(query, texts))
