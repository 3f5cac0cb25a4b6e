"""Chunks of a text, and where texts come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError, DataError
from sage_live.retrieval.chunk import Chunk, chunks, token_estimate
from sage_live.retrieval.corpus import documents, python_topics

WORDS = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=12)
GAPS = st.sampled_from([" ", " ", " ", "\n", "\n\n", " \n \t\n ", "\t", "\u3000"])
TEXTS = st.lists(st.tuples(WORDS, GAPS), max_size=80).map(lambda pairs: "".join(a + b for a, b in pairs))
SIZES = st.tuples(st.integers(1, 20), st.integers(0, 10), st.integers(1, 60)).filter(lambda s: s[1] <= s[0] // 2)


@given(TEXTS, SIZES)
def test_chunks_are_slices_that_cover_every_word(text: str, sizes: tuple[int, int, int]) -> None:
    words, overlap, tokens = sizes
    found = list(chunks(text, "d", words=words, overlap=overlap, tokens=tokens))
    covered = set()
    for number, chunk in enumerate(found):
        end = chunk.start + len(chunk.text)
        assert (chunk.source, chunk.number) == ("d", number)
        assert text[chunk.start : end] == chunk.text != ""
        # Never in the middle of a word.
        assert not chunk.text[0].isspace() and not chunk.text[-1].isspace()
        assert chunk.start == 0 or text[chunk.start - 1].isspace()
        assert end == len(text) or text[end].isspace()
        count = len(chunk.text.split())
        assert count <= words
        assert token_estimate(chunk.text) <= tokens or count == 1
        covered |= set(range(chunk.start, end))
    assert all(place in covered for place, letter in enumerate(text) if not letter.isspace())
    starts = [chunk.start for chunk in found]
    ends = [chunk.start + len(chunk.text) for chunk in found]
    assert starts == sorted(set(starts)) and ends == sorted(set(ends)), "a chunk adds nothing to the one before it"
    # Half of each chunk is new at least, so an index is at most twice the text.
    assert sum(len(chunk.text.split()) for chunk in found) <= 2 * len(text.split()) + 1


def test_a_cut_paragraph_overlaps_and_a_whole_one_does_not() -> None:
    ten = " ".join(f"w{number}" for number in range(10))
    assert [chunk.text for chunk in chunks(ten, "d", words=6, overlap=2)] == [
        "w0 w1 w2 w3 w4 w5",
        "w4 w5 w6 w7 w8 w9",
    ]
    text = "a b c d\n\ne f g\n  \nh i"
    assert list(chunks(text, "d", words=6, overlap=2)) == [
        Chunk("a b c d", "d", 0, 0),
        Chunk("e f g\n  \nh i", "d", 9, 1),
    ]
    # A break in the first half would make a chunk too small to mean anything.
    assert [chunk.text for chunk in chunks("a\n\nb c d e f", "d", words=4, overlap=0)] == ["a\n\nb c d", "e f"]


def test_a_long_word_stays_whole() -> None:
    assert [chunk.text for chunk in chunks("a " + "x" * 50 + " b", "d", tokens=3)] == ["a", "x" * 50, "b"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("cat", 1),
        ("scheduling", 2),
        ("scheduling policy", 4),
        ("2026", 2),
        ("|---|", 5),
        ("a_b", 3),
        ("über", 4),
    ],
)
def test_tokens_are_estimated(text: str, tokens: int) -> None:
    assert token_estimate(text) == token_estimate(f" {text}\n") == tokens


def test_tables_and_numbers_make_smaller_chunks() -> None:
    table = "| 0.12345 | 3.14159 |\n" * 200
    assert max(len(chunk.text.split()) for chunk in chunks(table, "d")) < 100


@pytest.mark.parametrize("text", ["", " \n\n\t "])
def test_no_words_no_chunks(text: str) -> None:
    assert list(chunks(text, "d")) == []


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"words": 0}, "words: expected at least 1"),
        ({"words": 10, "overlap": 6}, "overlap: expected 0 to 5"),
        ({"overlap": -1}, "overlap: expected 0 to 60"),
        ({"tokens": 0}, "tokens: expected at least 1"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        chunks("a b", "d", **sizes)


def test_documents_are_the_text_files_in_order(tmp_path: Path) -> None:
    for name, text in {"b.md": "bee", "a.txt": "\ufeffaye", "a/z.RST": "zed", "a/x.py": "ex", "no.csv": "1"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    os.mkfifo(tmp_path / "endless.txt")
    assert list(documents(tmp_path)) == [("a.txt", "aye"), ("a/x.py", "ex"), ("a/z.RST", "zed"), ("b.md", "bee")]


def test_a_file_that_is_not_text_is_named_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    (tmp_path / "b.txt").write_text("bee")
    notes: list[str] = []
    assert list(documents(tmp_path, note=notes.append)) == [("b.txt", "bee")]
    assert notes == [f"{tmp_path}/a.txt: skipped, not UTF-8 (byte 2)"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match="none of its 1 text files can be read as UTF-8"):
        list(documents(tmp_path, note=notes.append))


def test_folders_without_documents(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    for folder, told in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "data.csv", "is a file, not a folder"),
        (tmp_path, r"no text files; expected some that end in \.txt"),
    ):
        with pytest.raises(DataError, match=told) as error:
            documents(folder)
        assert str(folder) in str(error.value)


def test_python_has_a_corpus_with_it() -> None:
    topics = dict(python_topics())
    assert len(topics) > 50 and list(topics) == sorted(topics)
    assert "exception" in topics["python/try"]
