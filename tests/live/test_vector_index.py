"""The vector index: what it finds against brute force, and what it says of files that are not an index any more."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sage_core.errors import ConfigError, DataError, OutputError
from sage_live.retrieval import store
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import VectorIndex


def chunks_of(count: int) -> list[Chunk]:
    return [Chunk(f"text {number} ü", f"d{number // 3}.md", 10 * number, number % 3) for number in range(count)]


def drawn(seed: int, count: int, dimensions: int, clusters: int = 0) -> NDArray[np.float32]:
    """Random vectors; in clusters, as texts are, if asked for."""
    draw = np.random.Generator(np.random.PCG64(seed))
    vectors = draw.standard_normal((count, dimensions))
    if clusters:
        vectors += 3 * draw.standard_normal((clusters, dimensions))[draw.integers(0, clusters, count)]
    return vectors.astype(np.float32)


def index_of(seed: int = 0, count: int = 200, dimensions: int = 16, **more: Any) -> VectorIndex:
    return VectorIndex.build(drawn(seed, count, dimensions), chunks_of(count), model="m", **more)


# --- what it finds ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 800), st.integers(2, 48), st.integers(0, 20))
def test_recall_at_10_against_brute_force(seed: int, count: int, dimensions: int, clusters: int) -> None:
    index = VectorIndex.build(drawn(seed, count, dimensions, clusters), chunks_of(count))
    found = wanted = 0
    for query in drawn(seed + 1, 20, dimensions):
        exact = index.exact(query, 10)
        hits = index.search(query, 10)
        assert len(hits) == len(exact) == min(10, count)
        found += len(set(hits) & set(exact))  # with the same scores, bit for bit
        wanted += len(exact)
    assert found >= 0.95 * wanted


def test_recall_at_10_of_many_vectors() -> None:
    index = VectorIndex.build(drawn(1, 4000, 96, clusters=200), chunks_of(4000))
    queries = drawn(2, 100, 96)
    found = sum(len(set(index.search(query, 10)) & set(index.exact(query, 10))) for query in queries)
    assert found >= 0.95 * 1000


def test_exact_is_the_cosine() -> None:
    vectors = drawn(3, 50, 8) * np.linspace(0.01, 100, 50, dtype=np.float32)[:, None]
    index = VectorIndex.build(vectors, chunks_of(50))
    query = drawn(4, 1, 8)[0]
    cosines = vectors.astype(float) @ query / np.linalg.norm(vectors.astype(float), axis=1) / np.linalg.norm(query)
    hits = index.exact(query, 50)
    assert [hit.chunk for hit in hits] == [chunks_of(50)[place] for place in np.argsort(-cosines)]
    assert [hit.score for hit in hits] == pytest.approx(np.sort(cosines)[::-1].tolist(), abs=1e-6)
    assert [hit.chunk for hit in index.exact(query * 1000, 3)] == [hit.chunk for hit in hits[:3]]


def test_ties_are_in_the_order_of_the_index() -> None:
    vectors = np.repeat(drawn(5, 4, 8), 5, axis=0)
    index = VectorIndex.build(vectors, chunks_of(20))
    hits = index.search(vectors[7], 5)
    assert [hit.chunk for hit in hits] == chunks_of(20)[5:10]
    assert len({hit.score for hit in hits}) == 1


def test_what_half_precision_cannot_tell_apart_is_still_in_order() -> None:
    vectors = np.array([1, 2, 3, 4], np.float32) + 1e-4 * drawn(8, 40, 4)
    index = VectorIndex.build(vectors, chunks_of(40))
    for query in vectors[:10]:
        assert index.search(query, 5) == index.exact(query, 5)


def test_equal_vectors_make_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        index_of(count=500).save(tmp_path / name)
    assert (tmp_path / "a" / store.MANIFEST).read_bytes() == (tmp_path / "b" / store.MANIFEST).read_bytes()


def test_any_number_of_threads_may_search() -> None:
    index = index_of(count=2000)
    queries = drawn(6, 50, 16)
    expected = [index.search(query, 5) for query in queries]
    wrong: list[int] = []

    def ask() -> None:
        wrong.extend(place for place, query in enumerate(queries) if index.search(query, 5) != expected[place])

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_answers_alike(tmp_path: Path) -> None:
    index = index_of(chunking={"words": 7, "overlap": 1})
    index.save(tmp_path / "made" / "index")
    again = VectorIndex.load(tmp_path / "made" / "index")
    query = drawn(7, 1, 16)[0]
    assert again.search(query, 10) == index.search(query, 10)
    assert again.exact(query, 10) == index.exact(query, 10)
    assert (again.model, again.dimensions, len(again), again.chunking) == ("m", 16, 200, {"words": 7, "overlap": 1})
    assert again.sources == index.sources == [f"d{number}.md" for number in range(67)]


def test_a_new_index_replaces_the_old_one_and_leaves_nothing_behind(tmp_path: Path) -> None:
    index_of(seed=1).save(tmp_path)
    (tmp_path / "vectors-1-99.new").write_bytes(b"of a writer that was stopped")
    index_of(seed=2, count=30).save(tmp_path)
    assert len(VectorIndex.load(tmp_path)) == 30
    manifest = store.read_manifest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *(f.name for f in manifest.files.values())}


@pytest.mark.parametrize("stopped_at", ["chunks", "vectors", "graph", "manifest"])
def test_an_interrupted_build_leaves_the_old_index(
    stopped_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_of(seed=1).save(tmp_path)
    replace = Path.replace

    def stop(new: Path, path: Path) -> Path:
        if Path(path).name.startswith(stopped_at):
            raise KeyboardInterrupt
        return replace(new, path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            index_of(seed=2, count=30).save(tmp_path)
    assert len(VectorIndex.load(tmp_path)) == 200
    assert not list(tmp_path.glob("*.new"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is neither empty nor an index"):
        index_of().save(tmp_path)
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        index_of().save(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the index cannot be written"):
        index_of().save(tmp_path / "file" / "index")


def test_files_of_two_indexes(tmp_path: Path) -> None:
    index_of(count=20).save(tmp_path / "a")
    index_of(count=30).save(tmp_path / "b")
    manifests = [store.read_manifest(tmp_path / name) for name in "ab"]
    contents = {
        f"{stem}.{file.name.partition('.')[2]}": store.read_file(tmp_path / "a", manifests[0], stem)
        for stem, file in manifests[0].files.items()
    }
    contents["graph.usearch"] = store.read_file(tmp_path / "b", manifests[1], "graph")
    store.write(tmp_path / "a", manifests[0], contents)
    with pytest.raises(DataError, match="not of one index"):
        VectorIndex.load(tmp_path / "a")


def damaged(folder: Path, **changes: Any) -> None:
    path = folder / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_no_index_any_more(tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(DataError) as error:
            VectorIndex.load(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    def fresh(name: str) -> Path:
        index_of().save(tmp_path / name)
        return tmp_path / name

    def file(folder: Path, stem: str) -> Path:
        return folder / store.read_manifest(folder).files[stem].name

    assert told(tmp_path / "absent").startswith(f"{tmp_path}/absent: no index here")
    for stem in ("chunks", "vectors", "graph"):
        folder = fresh(f"missing-{stem}")
        file(folder, stem).unlink()
        assert "cannot be read (No such file or directory); build the index again" in told(folder)
        folder = fresh(f"truncated-{stem}")
        path = file(folder, stem)
        path.write_bytes(path.read_bytes()[:-7])
        assert f"{path.stat().st_size} of {path.stat().st_size + 7} bytes" in told(folder)
        folder = fresh(f"altered-{stem}")
        path = file(folder, stem)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        assert "not what was written (SHA-256 differs)" in told(folder)
    damaged(folder := fresh("version"), format="sage-index/9")
    assert "format 'sage-index/9', expected 'sage-index/1'" in told(folder)
    damaged(folder := fresh("dimensions"), dimensions=17)
    assert "not of one index ({'chunks': (200,), 'vectors': (200, 16)}, expected" in told(folder)
    damaged(folder := fresh("count"), chunks=3)
    assert "not of one index" in told(folder)
    damaged(folder := fresh("no-files"), files={})
    assert "names no file 'chunks'" in told(folder)
    (folder := fresh("garbage")).joinpath(store.MANIFEST).write_text("{")
    assert "not the manifest of an index" in told(folder)


@pytest.mark.parametrize("stem", ["chunks", "vectors", "graph"])
def test_files_with_a_right_checksum_that_are_something_else(stem: str, tmp_path: Path) -> None:
    index_of().save(tmp_path)
    manifest = store.read_manifest(tmp_path)
    contents = {
        f"{each}.{file.name.partition('.')[2]}": b"junk" * 50
        if each == stem
        else store.read_file(tmp_path, manifest, each)
        for each, file in manifest.files.items()
    }
    store.write(tmp_path, manifest, contents)
    with pytest.raises(DataError, match=r"cannot (be )?read"):
        VectorIndex.load(tmp_path)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "told"),
    [
        (np.ones((2, 4), np.float32), "expected one for each of 3 chunks"),
        (np.ones((3, 0), np.float32), "expected one for each of 3 chunks"),
        (np.ones(3, np.float32), "expected one for each of 3 chunks"),
        (np.array([[1, 0], [np.nan, 1], [0, 1]]), r"d0\.md, chunk 1 has NaN or infinite"),
        (np.array([[1, 0], [np.inf, 1], [0, 1]]), r"d0\.md, chunk 1 has NaN or infinite"),
        (np.array([[1, 0], [1, 1], [0, 0]]), r"d0\.md, chunk 2 is all zeros"),
    ],
)
def test_vectors_that_are_none(vectors: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        VectorIndex.build(vectors, chunks_of(3))


def test_queries_that_do_not_fit() -> None:
    index = index_of()
    for search in (index.search, index.exact):
        with pytest.raises(DataError, match=r"shape \(8,\), the index has 16 dimensions; embed it with m"):
            search(np.ones(8, np.float32), 3)
        with pytest.raises(DataError, match="query's vector has NaN"):
            search(np.full(16, np.nan, np.float32), 3)
        with pytest.raises(DataError, match="query's vector is all zeros"):
            search(np.zeros(16, np.float32), 3)
        with pytest.raises(ConfigError, match="k: expected 1 or more"):
            search(np.ones(16, np.float32), 0)


def test_more_hits_than_chunks() -> None:
    assert len(index_of(count=3).search(np.ones(16, np.float32), 10)) == 3
