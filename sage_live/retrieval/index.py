"""Chunks by the direction of their vectors: nearest neighbours by cosine, approximate and exact.

The graph (HNSW) is usearch's: kept up, typed, with wheels for every CPython that we run on, x86-64 and aarch64. hnswlib
publishes sources only; FAISS is about as large, brings an OpenBLAS with threads of its own, and has no types.

The graph only proposes, from vectors of half precision, which halves its memory and its time. Scores are computed here from
the vectors themselves, the same way for :meth:`VectorIndex.search` and :meth:`VectorIndex.exact`: a hit has the same score
in both, and order is by score, then by place in the index. The graph is built by one thread, so equal vectors give the same
one, byte for byte, on the same machine.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from usearch.index import Index

from sage_core.errors import ConfigError, DataError
from sage_live.retrieval import store
from sage_live.retrieval.chunk import Chunk

CONNECTIVITY: Final = 16
EXPANSION_ADD: Final = 128
"""Edges of a node, and candidates held while one is added: usearch's defaults, which benchmarks/retrieval.py measures."""

PROPOSALS_MIN, PROPOSALS_PER_HIT = 64, 4
"""How many candidates the graph is asked for, the best k of which are returned."""

CHUNK_COLUMNS: Final = pa.schema(
    [("text", pa.string()), ("source", pa.string()), ("start", pa.int64()), ("number", pa.int64())]
)


class Hit(NamedTuple):
    """``score``: higher is nearer. Of a search, the cosine, -1 to 1."""

    chunk: Chunk
    score: float


class VectorIndex:
    """Made by :meth:`build` or :meth:`load`; does not change after that. Any number of threads may search."""

    def __init__(
        self,
        graph: Index,
        vectors: NDArray[np.float32],
        chunks: Sequence[Chunk],
        model: str,
        chunking: Mapping[str, int] | None,
    ) -> None:
        self.model = model  # which embedded the chunks, and has to embed the queries
        self.chunking = None if chunking is None else dict(chunking)
        self.dimensions: int = vectors.shape[1]
        self._graph = graph
        self._vectors = vectors  # of length 1
        self._chunks = chunks
        # In usearch, callers at once share the state of its first thread, and only the interpreter's lock keeps them apart.
        self._one_caller = threading.Lock()

    @classmethod
    def build(
        cls,
        vectors: NDArray[np.float32],
        chunks: Sequence[Chunk],
        *,
        model: str = "",
        chunking: Mapping[str, int] | None = None,
    ) -> Self:
        """``vectors``: (n, d), one for each chunk, of any length but 0. DataError for what has no direction."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or 0 in vectors.shape or len(vectors) != len(chunks):
            raise DataError(f"vectors: expected one for each of {len(chunks)} chunks, 1 or more, got {vectors.shape}")
        units = _units(vectors, lambda row: f"the vector of {chunks[row].source}, chunk {chunks[row].number}")
        graph = Index(
            ndim=units.shape[1], metric="cos", dtype="f16", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD
        )
        graph.add(np.arange(len(units), dtype=np.uint64), units, threads=1)
        return cls(graph, units, list(chunks), model, chunking)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What :meth:`save` wrote. DataError: missing, truncated, altered, of another version, or at odds with itself."""
        manifest = store.read_manifest(folder)
        chunks = _read_chunks(store.read_file(folder, manifest, "chunks"), folder)
        vectors = _read_vectors(store.read_file(folder, manifest, "vectors"), folder)
        graph = _read_graph(store.read_file(folder, manifest, "graph"), folder, manifest.library)
        told = {"chunks": (manifest.chunks,), "vectors": (manifest.chunks, manifest.dimensions)}
        found = {"chunks": (len(chunks),), "vectors": vectors.shape}
        if told != found or (len(graph), graph.ndim) != vectors.shape:
            raise DataError(
                f"{folder}: its files are not of one index ({found}, expected {told}); build the index again"
            )
        return cls(graph, vectors, chunks, manifest.model, manifest.chunking)

    def save(self, folder: Path) -> None:
        """Make ``folder`` this index; an index that is there is replaced at once, at the end. ConfigError, OutputError."""
        manifest = store.Manifest(
            model=self.model,
            dimensions=self.dimensions,
            chunks=len(self),
            documents=len(self.sources),
            chunking=self.chunking,
            library=_library(),
        )
        contents = {
            "chunks.parquet": _chunk_bytes(self._chunks),
            "vectors.npy": _vector_bytes(self._vectors),
            "graph.usearch": self._graph.save() or b"",
        }
        store.write(folder, manifest, contents)

    def search(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """The nearest ``k`` chunks, or all if there are fewer, best first; approximate. DataError for a query of other
        dimensions or without direction, ConfigError for k below 1."""
        query = self._query(vector, k)
        wanted = min(len(self), max(PROPOSALS_MIN, PROPOSALS_PER_HIT * k))
        with self._one_caller:
            keys = self._graph.search(query, wanted, threads=1).keys
        return self._best(np.asarray(keys, np.uint64), self._vectors[keys], query, k)

    def exact(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """What :meth:`search` should find: every vector is compared. Errors as there."""
        return self._best(np.arange(len(self), dtype=np.uint64), self._vectors, self._query(vector, k), k)

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def sources(self) -> list[str]:
        """The documents, in the order of the index."""
        return list(dict.fromkeys(chunk.source for chunk in self._chunks))

    def _query(self, vector: NDArray[np.float32], k: int) -> NDArray[np.float32]:
        if k < 1:
            raise ConfigError(f"k: expected 1 or more hits, got {k}")
        query = np.asarray(vector, np.float32)
        if query.shape != (self.dimensions,):
            raise DataError(
                f"query: a vector of shape {query.shape}, the index has {self.dimensions} dimensions; "
                f"embed it with {self.model or 'the model of the index'}"
            )
        unit: NDArray[np.float32] = _units(query[None], lambda row: "the query's vector")[0]
        return unit

    def _best(
        self, keys: NDArray[np.uint64], vectors: NDArray[np.float32], query: NDArray[np.float32], k: int
    ) -> list[Hit]:
        # einsum adds each row up in the same order however many there are; a matrix product need not.
        scores: NDArray[np.float32] = np.einsum("ij,j->i", vectors, query)
        places = np.lexsort((keys, -scores))[:k]
        return [Hit(self._chunks[int(keys[place])], float(scores[place])) for place in places]


def _units(vectors: NDArray[np.float32], whose: Callable[[int], str]) -> NDArray[np.float32]:
    """(n, d), each row of length 1. DataError naming the first that has no direction."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    wrong = ~(np.isfinite(norms) & (norms > 0))
    if wrong.any():
        row = int(wrong.argmax())
        what = "is all zeros" if norms[row] == 0 else "has NaN or infinite components"
        raise DataError(f"{whose(row)} {what}; the embedding model is at fault")
    units: NDArray[np.float32] = (vectors / norms[:, None]).astype(np.float32)
    return units


def _chunk_bytes(chunks: Sequence[Chunk]) -> bytes:
    columns = [
        pa.array(column, field.type) for column, field in zip(zip(*chunks, strict=True), CHUNK_COLUMNS, strict=True)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=CHUNK_COLUMNS), buffer, compression="zstd")
    return buffer.getvalue()


def _read_chunks(data: bytes, folder: Path) -> list[Chunk]:
    try:
        table = pq.read_table(io.BytesIO(data), schema=CHUNK_COLUMNS)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{folder}: its chunks cannot be read ({error}); build the index again") from error
    columns = [table.column(name).to_pylist() for name in CHUNK_COLUMNS.names]
    return [Chunk(*row) for row in zip(*columns, strict=True)]


def _vector_bytes(vectors: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors.astype("<f4", copy=False))
    return buffer.getvalue()


def _read_vectors(data: bytes, folder: Path) -> NDArray[np.float32]:
    try:
        vectors: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{folder}: its vectors cannot be read ({error}); build the index again") from error
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise DataError(
            f"{folder}: its vectors cannot be read (a matrix of float32 is not there); build the index again"
        )
    return vectors


def _read_graph(data: bytes, folder: Path, library: str) -> Index:
    try:
        graph = Index.restore(data)
    except Exception as error:  # usearch documents none
        raise DataError(
            f"{folder}: written by {library}, {_library()} cannot read it ({error}); build the index again"
        ) from error
    if graph is None:
        raise DataError(f"{folder}: written by {library}, {_library()} cannot read it; build the index again")
    return graph


def _library() -> str:
    return f"usearch {version('usearch')}"
