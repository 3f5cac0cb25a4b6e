"""An index of documents, embedded through the control plane: batches in flight, vectors checked, progress told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sage_bench.client import UnifiedInferenceClient
from sage_core.errors import ConfigError, DataError
from sage_live.client.verbs import only_model
from sage_live.errors import ApiError
from sage_live.retrieval.chunk import Chunk, Chunking, chunks
from sage_live.retrieval.index import VectorIndex
from sage_live.retrieval.store import check_target

BATCH: Final = 32
IN_FLIGHT: Final = 4
"""Texts of a request, and requests at once: enough for the plane to fill batches of several engines."""

DEFAULT_SIZES: Final = Chunking()

PRIORITY: Final = 1
"""Below interactive requests: nobody waits for one batch of a build."""

REFUSED: Final = (400, 413, 422)
"""Statuses that speak of the texts: too long, as a rule."""

Tell = Callable[[int, int], object]
"""Chunks embedded so far, and of how many."""


@dataclass(frozen=True, slots=True)
class Build:
    """How an index is built. ``model``: None takes the only embedding model that is served."""

    model: str | None = None
    chunking: Chunking = DEFAULT_SIZES
    batch: int = BATCH
    in_flight: int = IN_FLIGHT

    def check(self) -> None:
        """ConfigError naming the setting."""
        self.chunking.check()
        if self.batch < 1:
            raise ConfigError(f"batch: expected 1 or more texts a request, got {self.batch}")
        if self.in_flight < 1:
            raise ConfigError(f"in_flight: expected 1 or more requests at once, got {self.in_flight}")


def build_index(
    documents: Iterable[tuple[str, str]],
    client: UnifiedInferenceClient,
    build: Build,
    *,
    folder: Path | None = None,
    tell: Tell = lambda done, of: None,
) -> VectorIndex:
    """Chunk and embed ``documents``, (source, text) each; save the index to ``folder`` if one is given.

    What is wrong with settings, folder and documents is found before anything is embedded, and nothing is written before
    all is. ConfigError, DataError (no words, vectors that are none), OutputError, and what the client raises.
    """
    build.check()
    if folder is not None:
        check_target(folder)
    pieces = [piece for source, text in documents for piece in chunks(text, source, **build.chunking._asdict())]
    if not pieces:
        raise DataError("documents: there is not a word in them; nothing to index")
    model = build.model or only_model(client.models(), "embedding")
    vectors = asyncio.run(_embedded(client, pieces, model, build, tell))
    index = VectorIndex.build(vectors, pieces, model=model, chunking=build.chunking._asdict())
    if folder is not None:
        index.save(folder)
    return index


def embed_query(client: UnifiedInferenceClient, index: VectorIndex, query: str) -> NDArray[np.float32]:
    """The vector of a query, (d,), by the model of the index. ConfigError without words; DataError for a vector that does
    not fit; what the client raises."""
    if not query.strip():
        raise ConfigError("query: expected some words")
    vectors = client.embed([query], model=index.model).vectors
    _check(vectors, 1, index.dimensions, index.model)
    vector: NDArray[np.float32] = vectors[0]
    return vector


async def _embedded(
    client: UnifiedInferenceClient, pieces: Sequence[Chunk], model: str, build: Build, tell: Tell
) -> NDArray[np.float32]:
    """(n, d), a vector for each piece."""
    batches = [pieces[place : place + build.batch] for place in range(0, len(pieces), build.batch)]
    waiting = iter(enumerate(batches))
    found: dict[int, NDArray[np.float32]] = {}
    done = 0

    async def work() -> None:
        nonlocal done
        for place, batch in waiting:
            vectors = await _vectors(client, batch, model)
            others = next(iter(found.values()), vectors)
            _check(vectors, len(batch), others.shape[-1], model)
            found[place] = vectors
            done += len(batch)
            tell(done, len(pieces))

    tell(0, len(pieces))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(build.in_flight, len(batches))):
                group.create_task(work())
    except BaseExceptionGroup as errors:  # the first is what went wrong; the others were cancelled or follow from it
        raise errors.exceptions[0] from None
    return np.concatenate([found[place] for place in range(len(batches))])


async def _vectors(client: UnifiedInferenceClient, batch: Sequence[Chunk], model: str) -> NDArray[np.float32]:
    try:
        return (await client.aio.embed([chunk.text for chunk in batch], model=model, priority=PRIORITY)).vectors
    except ApiError as error:
        if error.status not in REFUSED:
            raise
        if len(batch) > 1:  # whose fault it is, the engine does not say
            return np.concatenate([await _vectors(client, [chunk], model) for chunk in batch])
        return await _of_halves(client, batch[0], model, error)


async def _of_halves(
    client: UnifiedInferenceClient, chunk: Chunk, model: str, refused: ApiError
) -> NDArray[np.float32]:
    """(1, d), the direction of a chunk that is too long for the model: the mean of its halves', by length."""
    middle = chunk.text.rfind(" ", 1, len(chunk.text) // 2 + 1)
    middle = len(chunk.text) // 2 if middle < len(chunk.text) // 4 else middle
    if middle == 0:
        where = f"{chunk.source}: the text at character {chunk.start}"
        raise DataError(f"{where} was refused by {model}, however short: {refused}") from refused
    halves = [
        chunk._replace(text=chunk.text[:middle]),
        chunk._replace(text=chunk.text[middle:], start=chunk.start + middle),
    ]
    vectors = [await _vectors(client, [half], model) for half in halves]
    units = [vector / max(float(np.linalg.norm(vector)), 1e-30) for vector in vectors]
    mean: NDArray[np.float32] = np.average(units, axis=0, weights=[len(half.text) for half in halves])
    return mean.astype(np.float32)


def _check(vectors: NDArray[np.float32], count: int, dimensions: int, model: str) -> None:
    if vectors.shape != (count, dimensions):
        raise DataError(
            f"{model}: {count} texts gave vectors of shape {vectors.shape}, expected {(count, dimensions)}; "
            "the index and its queries need one model that gives equal dimensions"
        )
    if not np.isfinite(vectors).all():
        raise DataError(f"{model}: a vector has NaN or infinite components; the embedding model is at fault")
