"""``sage index``: build a vector index of documents, ask it, look at it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from sage_core.errors import ConfigError
from sage_live.retrieval.chunk import OVERLAP, TOKENS, WORDS

if TYPE_CHECKING:
    from sage_bench.client import UnifiedInferenceClient
    from sage_live.retrieval.index import Hit

app = typer.Typer(help="Vector indexes of documents: build one, ask it, look at it.", no_args_is_help=True)

RERANKED: int = 16
"""How many hits are ranked again, of which the best k are shown."""

Url = Annotated[
    str | None, typer.Option(metavar="URL", help="Of a gateway, with /v1; default: the one on this machine.")
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="URL[,KEY=VALUE]",
        help="Without a gateway: an engine, kind=embedding unless said; the control plane runs in this process.",
    ),
]


@app.callback()
def index() -> None:
    """Vector indexes of documents: build one, ask it, look at it."""


@app.command()
def build(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the index goes; one that is there is replaced.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder of text files: .txt, .md, .rst, .py.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Python's reference texts instead of a folder.")] = False,
    url: Url = None,
    engine: Engines = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Embedding model; default: the only one served.")
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="Most words of a chunk.")] = WORDS,
    overlap: Annotated[int, typer.Option(min=0, help="Words repeated where a paragraph is cut.")] = OVERLAP,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a chunk, as estimated.")] = TOKENS,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a request.")] = 32,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
) -> None:
    """Cut documents into chunks, embed them through the control plane, store text and vectors."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sage_bench.indexing import Build, build_index
    from sage_live.retrieval.chunk import Chunking
    from sage_live.retrieval.corpus import documents, python_topics
    from sage_live.retrieval.store import check_target

    if (folder is None) is not demo:
        raise ConfigError("DIR: expected a folder of documents, or --demo, and not both")
    settings = Build(model, Chunking(words, overlap, tokens), batch, in_flight)
    settings.check()
    check_target(out)
    errors = Console(stderr=True, highlight=False)
    notes = lambda line: errors.print(f"note: {line}", markup=False, soft_wrap=True)  # noqa: E731
    texts = list(python_topics() if folder is None else documents(folder, note=notes))
    with (
        _client(url, engine) as client,
        Progress(TextColumn("embedding"), MofNCompleteColumn(), TimeElapsedColumn(), console=errors) as progress,
    ):
        bar = progress.add_task("", total=None)

        def tell(done: int, of: int) -> None:
            progress.update(bar, completed=done, total=of)

        made = build_index(texts, client, settings, folder=out, tell=tell)
    typer.echo(
        f"{out}: {len(made):,} chunks of {len(made.sources):,} documents, {made.dimensions} dimensions by {made.model}"
    )


@app.command()
def query(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An index.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many chunks.")] = 5,
    url: Url = None,
    engine: Engines = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Rank by words too (BM25, fused by rank).")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every vector: the check of the graph.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of text.")] = False,
) -> None:
    """The nearest chunks to a text, best first. The text is embedded by the model of the index."""
    from sage_bench.indexing import embed_query
    from sage_live.retrieval.index import VectorIndex
    from sage_live.retrieval.rerank import rerank as ranked_again

    found = VectorIndex.load(folder)
    with _client(url, engine) as client:
        vector = embed_query(client, found, text)
    search = found.exact if exact else found.search
    hits = search(vector, max(k, RERANKED) if rerank else k)
    if rerank:
        hits = ranked_again(text, hits, k)
    _show(hits, as_json)


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An index.")],
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as it is.")] = False,
) -> None:
    """What an index holds, after checking that it is whole."""
    from sage_live.retrieval.index import VectorIndex
    from sage_live.retrieval.store import read_manifest

    sources = VectorIndex.load(folder).sources
    manifest = read_manifest(folder)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode())
        return
    sizes = manifest.chunking or {}
    rows: dict[str, Any] = {
        "model": manifest.model,
        "vectors": f"{manifest.chunks:,} of {manifest.dimensions} dimensions, {manifest.metric}",
        "documents": f"{manifest.documents:,}: {', '.join(sources[:3])}{', ...' if len(sources) > 3 else ''}",
        "chunking": ", ".join(f"{size} {name}" for name, size in sizes.items()) or "not known",
        "size": f"{sum(file.bytes for file in manifest.files.values()) / 1e6:,.1f} MB",
        "written by": f"{manifest.library}, {manifest.format}",
    }
    for name, value in rows.items():
        typer.echo(f"{name:<11} {value}")


def _client(url: str | None, engines: Sequence[str] | None) -> UnifiedInferenceClient:
    """A client of a gateway, or of engines. A build outlasts a full queue, so it comes back when it is told to."""
    from sage_bench.client import UnifiedInferenceClient

    if url is not None and engines:
        raise ConfigError("--url, --engine: expected a gateway or engines, not both")
    if not engines:
        return UnifiedInferenceClient.create(url, retries=5)
    kinds = [each if ",kind=" in each else f"{each},kind=embedding" for each in engines]
    return UnifiedInferenceClient.create(engines=kinds, retries=5, wait_s=30.0)


def _show(hits: Sequence[Hit], as_json: bool) -> None:
    if as_json:
        rows = [
            {"score": hit.score, "source": hit.chunk.source, "start": hit.chunk.start, "text": hit.chunk.text}
            for hit in hits
        ]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for hit in hits:
        typer.echo(f"{hit.score:.3f}  {hit.chunk.source}, character {hit.chunk.start}")
        typer.echo(f"       {_first(hit.chunk.text)}")


def _first(text: str, width: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
